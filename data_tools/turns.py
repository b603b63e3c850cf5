"""From other people's words for a conversation to ours: role names, picture markers in texts, edge whitespace."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from mmit.config import ConfigError
from mmit.data.sample import BoxPart, ImagePart, Message, Part, Picture, Role, Sample, SampleError, TextPart

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "question": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "answer": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
"""Ours for each role name seen in data sets. A call of a tool is written by the model; its answer is not."""

Markers = Literal["error", "text"]


class Turn(NamedTuple):
    role: Role
    parts: Sequence[Part]
    train: bool | None = None
    """None: what the role calls for."""


def said(role: Role, text: str, train: bool | None = None) -> Turn:
    return Turn(role, [TextPart(text)], train)


def role_of(name: Any, where: str) -> Role:
    if isinstance(name, str) and name.lower() in ROLES:
        return ROLES[name.lower()]
    raise SampleError(f"{where}: role {name!r} is unknown; write one of {', '.join(ROLES)}")


def conversation_of(value: Any, where: str) -> list[Any]:
    """A list of turns, also when it was stored as a string: JSON, or a Python literal as some uploads hold."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise SampleError(
                    f"{where}: the conversation is a string that is neither JSON nor a Python literal: {value[:60]!r}"
                ) from None
    if not isinstance(value, list):
        raise SampleError(f"{where}: the conversation is a {type(value).__name__}; write a list of turns")
    if not value:
        raise SampleError(f"{where}: the conversation is empty; give it at least one answer")
    return value


def valued_turns(
    value: Any, where: str, *, role: tuple[str, ...] = ("from", "role"), text: tuple[str, ...] = ("value", "content")
) -> list[tuple[Role, str]]:
    """The turns of a conversation of objects with a role and a text, under the first of these names that is there."""
    turns = []
    for number, turn in enumerate(conversation_of(value, where)):
        here = f"{where}: turn {number}"
        if not isinstance(turn, dict):
            raise SampleError(f"{here}: expected an object with {role[0]} and {text[0]}, found {str(turn)[:60]!r}")
        named, said = (next((turn[key] for key in keys if key in turn), None) for keys in (role, text))
        turns.append((role_of(named, here), text_of(said, here)))
    return turns


def with_tools(turns: list[tuple[Role, str]], tools: Any) -> list[tuple[Role, str]]:
    """The turns with the list of tools at the end of the system message, where the model reads and never learns it."""
    if not tools:
        return turns
    listed = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
    if turns and turns[0][0] == "system":
        return [("system", f"{turns[0][1]}\n\n{listed}"), *turns[1:]]
    return [("system", listed), *turns]


def text_of(value: Any, where: str) -> str:
    """The text itself, or `SampleError` if it is none or cannot be stored."""
    if not isinstance(value, str):
        raise SampleError(f"{where}: expected a text, found {type(value).__name__} {str(value)[:60]!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SampleError(f"{where}: the text holds half a character (a lone surrogate); mend its encoding") from None
    return value


def names_of(value: Any, where: str, *, field: str = "image") -> list[Any]:
    """Picture names given as one, as a list, or not at all."""
    if value is None or value == "":
        return []
    if isinstance(value, str | dict | bytes):
        return [value]
    if isinstance(value, Sequence):
        return list(value)
    raise SampleError(f"{where}: {field} is a {type(value).__name__}; write one name, a list of names, or leave it out")


def count_markers(turns: Sequence[tuple[Role, str]], marker: str) -> int:
    return sum(text.count(marker) for _, text in turns)


def place_pictures(
    turns: Sequence[tuple[Role, str]],
    count: int,
    where: str,
    *,
    marker: str = "<image>",
    unmarked: Literal["error", "first"] = "error",
    markers: Markers = "error",
) -> list[list[Part]]:
    """The parts of each turn, every marker that stands for one of the `count` pictures become an `ImagePart`.

    A marker is a picture only if their number says so: all markers, or all those that the user wrote (an answer may
    speak of `<image>`). Everything else is a fault, unless an option says what it means.
    """
    everywhere = count_markers(turns, marker)
    asked = sum(text.count(marker) for role, text in turns if role != "assistant")
    if everywhere == count:
        holders = {"system", "user", "assistant", "tool"}
    elif asked == count:
        holders = {"system", "user", "tool"}
    elif everywhere == 0 and unmarked == "first":
        return _at_first_user(turns, count, where)
    elif count == 0 and markers == "text":
        holders = set()
    else:
        remedy = {
            (True, False): "name the picture in the row, or set markers=text if the marker is only a word here",
            (False, True): f"write {marker} where each picture belongs, or set unmarked=first to put them before the "
            f"first user turn",
        }.get((count == 0, everywhere == 0), f"write one {marker} for each picture, no more and no fewer")
        raise SampleError(f"{where}: {count} pictures but {everywhere} {marker} markers; {remedy}")
    placed, number = [], 0
    for role, text in turns:
        parts: list[Part] = []
        pieces = text.split(marker) if role in holders else [text]
        for index, piece in enumerate(pieces):
            if index:
                parts.append(ImagePart(number))
                number += 1
            if piece:
                parts.append(TextPart(piece))
        placed.append(parts)
    return placed


def _at_first_user(turns: Sequence[tuple[Role, str]], count: int, where: str) -> list[list[Part]]:
    placed: list[list[Part]] = [[TextPart(text)] if text else [] for _, text in turns]
    for parts, (role, _) in zip(placed, turns, strict=True):
        if role == "user":
            parts[:0] = [ImagePart(number) for number in range(count)]
            return placed
    raise SampleError(f"{where}: {count} pictures but no user turn to put them in; add the question they belong to")


def pictures_first(parts: Sequence[Part]) -> list[Part]:
    """The pictures before the text, with one line break between, as LLaVA-1.5 trains (`preprocess_multimodal`)."""
    pictures = [part for part in parts if isinstance(part, ImagePart)]
    if not pictures:
        return list(parts)
    text = "".join(part.text for part in parts if isinstance(part, TextPart)).strip()
    between = [piece for picture in pictures for piece in (picture, TextPart("\n"))]
    return [*between[:-1], TextPart(f"\n{text}")]


def stripped(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts without whitespace at the two outer edges; a text that was nothing else goes."""
    kept = list(parts)
    if kept and isinstance(kept[0], TextPart):
        kept[0] = TextPart(kept[0].text.lstrip())
    if kept and isinstance(kept[-1], TextPart):
        kept[-1] = TextPart(kept[-1].text.rstrip())
    return tuple(part for part in kept if not isinstance(part, TextPart) or part.text)


def sample_of(
    messages: Sequence[tuple[Role, Sequence[Part], bool | None]],
    *,
    images: Sequence[Picture] = (),
    meta: dict[str, Any] | None = None,
    where: str,
    strip: bool = True,
) -> Sample:
    """A sample from turns; its key and source come from the conversion.

    An answer that comes first, before any question, is kept as context and not trained, as LLaVA and FastChat have it;
    a sample of answers alone (captions, plain text) trains them all.
    """
    typed: list[Message] = []
    alone = all(role in ("assistant", "system") for role, _, _ in messages)
    asked = alone
    for role, parts, train in messages:
        asked = asked or role == "user"
        edged = stripped(parts) if strip else tuple(p for p in parts if not isinstance(p, TextPart) or p.text)
        typed.append(Message(role, edged, train=role == "assistant" and asked if train is None else train))
    typed = joined_system(typed)
    trained = [item for item in typed if item.train]
    if not trained:
        raise SampleError(f"{where}: no answer to learn from; the conversation needs at least one assistant turn")
    if not any(item.parts for item in trained):
        raise SampleError(f"{where}: every answer is empty; there is nothing to learn from it")
    return Sample("", "", tuple(typed), tuple(images), meta or {})


def joined_system(messages: list[Message]) -> list[Message]:
    """Several leading system messages as one, a blank line between them."""
    count = 0
    while count < len(messages) and messages[count].role == "system":
        count += 1
    if count < 2:
        return messages
    parts: list[Part] = []
    for item in messages[:count]:
        parts += [TextPart("\n\n"), *item.parts] if parts else item.parts
    return [Message("system", tuple(parts), train=False), *messages[count:]]


def box(image: int, left: float, top: float, right: float, bottom: float, where: str) -> BoxPart:
    if not (left <= right and top <= bottom):
        raise SampleError(f"{where}: the box [{left}, {top}, {right}, {bottom}] has its corners swapped")
    return BoxPart(image, left, top, right, bottom)


def asked_about(
    pictures: Sequence[Picture],
    pairs: Sequence[tuple[str | Sequence[Part], str | Sequence[Part]]],
    *,
    where: str,
    strip: bool = True,
    prompt: str = "{question}",
    meta: dict[str, Any] | None = None,
) -> Sample:
    """Questions about pictures and their answers as one conversation, the pictures before the first question.

    `prompt` is what is asked, with `{question}` in it; sets with short answers are best asked for short answers.
    """
    if "{question}" not in prompt:
        raise ConfigError(f"prompt {prompt!r} has no {{question}}; write for example '{{question}} Answer in a word.'")
    turns = []
    for number, (question, answer) in enumerate(pairs):
        shown: list[Part] = [ImagePart(index) for index in range(len(pictures))] if number == 0 else []
        shown += [TextPart("\n")] if shown else []
        if isinstance(question, str):
            shown.append(TextPart(prompt.replace("{question}", question)))
        else:
            before, after = prompt.split("{question}", 1)
            shown += [TextPart(before), *question, TextPart(after)]
        answered = [TextPart(answer)] if isinstance(answer, str) else answer
        turns += [Turn("user", shown), Turn("assistant", answered)]
    return sample_of(turns, images=pictures, meta=meta, where=where, strip=strip)


def most_common(answers: Sequence[Any], where: str) -> str:
    """The answer given most often, of several the first given; VQA sets hold ten people's."""
    texts = [text_of(answer["answer"] if isinstance(answer, dict) else answer, where) for answer in answers]
    if not texts:
        raise SampleError(f"{where}: the list of answers is empty")
    return max(texts, key=texts.count)
