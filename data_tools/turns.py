"""From other people's words for a conversation to ours: role names, picture markers in texts, edge whitespace."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from mmit.config import ConfigError
from mmit.data.sample import (
    BoxPart,
    ImagePart,
    Message,
    Part,
    Picture,
    Role,
    Sample,
    SampleError,
    TextPart,
    stripped,
)

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


class Said(NamedTuple):
    """A turn as most files have it: a text, in which there may be markers."""

    role: Role
    text: str
    train: bool | None = None
    """None: what the role calls for."""


class Turn(NamedTuple):
    role: Role
    parts: Sequence[Part]
    train: bool | None = None


def said(role: Role, text: str, train: bool | None = None) -> Turn:
    return Turn(role, [TextPart(text)], train)


def role_of(name: Any, where: str, named: Mapping[str, Role] | None = None) -> Role:
    """`named`: what the data set itself calls its roles, besides the usual names."""
    if named and isinstance(name, str) and name in named:
        return named[name]
    if isinstance(name, str) and name.lower() in ROLES:
        return ROLES[name.lower()]
    raise SampleError(f"{where}: role {name!r} is unknown; write one of {', '.join([*(named or ()), *ROLES])}")


def conversation_of(value: Any, where: str) -> list[Any]:
    """A list of turns, also when it was stored as a string."""
    turns = list_of(value, where, "conversation", "turns")
    if not turns:
        raise SampleError(f"{where}: the conversation is empty; give it at least one answer")
    return turns


def list_of(value: Any, where: str, name: str, items: str) -> list[Any]:
    """A list, also when it was stored as a string: JSON, or a Python literal as some uploads hold."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            if BESIDE.search(value):
                raise SampleError(
                    f"{where}: the {name} is a string in which texts stand beside each other without a comma, as numpy "
                    f"prints them: {value[:60]!r}; save it as JSON"
                ) from None
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise SampleError(
                    f"{where}: the {name} is a string that is neither JSON nor a Python literal: {value[:60]!r}"
                ) from None
    if not isinstance(value, list):
        raise SampleError(f"{where}: the {name} is a {type(value).__name__}; write a list of {items}")
    return value


BESIDE = re.compile(r"""^\[(?:'[^'\\]*'|"[^"\\]*")\s+['"]""")
"""Python would join such texts into one."""


def valued_turns(
    value: Any,
    where: str,
    *,
    role: tuple[str, ...] = ("from", "role"),
    text: tuple[str, ...] = ("value", "content"),
    roles: Mapping[str, Role] | None = None,
) -> list[Said]:
    """The turns of a conversation of objects with a role and a text, under the first of these names that is there."""
    turns = []
    for number, turn in enumerate(conversation_of(value, where)):
        here = f"{where}: turn {number}"
        if not isinstance(turn, dict):
            raise SampleError(f"{here}: expected an object with {role[0]} and {text[0]}, found {str(turn)[:60]!r}")
        ours = role_of(_filled(turn, role), here, roles)
        said, calls = _filled(turn, text), called(turn, here)
        content = "" if said is None and calls else text_of(said, here)
        whole = f"{content}\n{calls}" if content and calls else content or calls
        turns.append(Said(ours, whole, trained(turn, ours, here)))
    return turns


def _filled(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """What the record has under the first of the names that is not empty."""
    for name in names:
        if (value := record.get(name)) is not None:
            return value
    return None


def trained(turn: Mapping[str, Any], role: Role, where: str) -> bool | None:
    """What a turn itself says about training: `loss`, `loss_scale` or `train`, or OpenAI's `weight`, of 0 or 1."""
    for key in ("loss", "loss_scale", "train", "weight"):
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise SampleError(f"{where}: {key} is {value!r}; only on and off are known, write 0 or 1")
        return bool(value) if role == "assistant" or value else None
    return None


UNREAD = ("reasoning_content", "reasoning", "thinking", "refusal")
SHOWN = ("image", "images", "video", "videos", "audio", "audios")


def called(turn: Mapping[str, Any], where: str) -> str:
    """The calls of tools of a turn as the model writes them, one JSON object a line; refuses what it would lose."""
    for key in UNREAD:
        if turn.get(key):
            raise SampleError(
                f"{where}: the turn has {key}, which is not read here; write it into the content as the model is to "
                f"write it, or take it out"
            )
    for key in SHOWN:
        if turn.get(key):
            raise SampleError(
                f"{where}: the turn itself has {key}, which is not read here; name the file in the row, and mark its "
                f"place in the text"
            )
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if not isinstance(calls, list):
        raise SampleError(f"{where}: tool_calls is a {type(calls).__name__}; write a list")
    lines = []
    for call in calls:
        named = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(named, dict) or not isinstance(named.get("name"), str):
            raise SampleError(f"{where}: a call of a tool needs name and arguments, found {str(call)[:60]!r}")
        lines.append(call_of(named["name"], named.get("arguments")))
    return "\n".join(lines)


def call_of(name: str, arguments: Any) -> str:
    if isinstance(arguments, str):
        with suppress(ValueError):  # arguments that are no JSON stay the text they are
            arguments = json.loads(arguments)
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def told_first(turns: Sequence[Turn], where: str, *, system: Any = None, tools: Any = None) -> list[Turn]:
    """The turns with a system text and a list of tools that stood beside them, where the model reads and never learns
    them: the texts before a system message of the turns (unless that repeats them), the tools at its end."""
    told: list[Part] = []
    turns = list(turns)
    own = list(turns.pop(0).parts) if turns and turns[0].role == "system" else []
    if system and [TextPart(text_of(system, where))] != own:
        told.append(TextPart(system))
    for parts in (own, [TextPart(tools if isinstance(tools, str) else _as_json(tools))] if tools else []):
        if parts:
            told += [TextPart("\n\n"), *parts] if told else parts
    return [Turn("system", told), *turns] if told else turns


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def refuse_unwanted(record: Mapping[str, Any], where: str, *keys: str) -> None:
    """`SampleError` for an answer that people did not want, as sets for KTO hold them."""
    for key in keys:
        if record.get(key) is False:
            raise SampleError(f"{where}: its {key} is false; an answer that is not wanted is nothing to learn")


def refuse_unanswered(record: Mapping[str, Any], turns: Sequence[Said | Turn], where: str) -> None:
    """`SampleError` for a ranking whose turns end before the answers: what is learned would be those before alone."""
    if record.get("chosen") and turns and turns[-1].role != "assistant":
        raise SampleError(
            f"{where}: its answer is in chosen, which is not read here; convert rankings with the format llamafactory, "
            f"or put the answer at the end of the turns"
        )


def refuse_media(record: Mapping[str, Any], where: str, *kinds: str) -> None:
    """`SampleError` for a row that shows what this format does not read (`image`, `video`, `audio`)."""
    remedy = {
        "image": "convert such rows with a format that shows pictures, such as llamafactory, ms-swift or table",
        "video": "convert such rows with the format video",
        "audio": "mmit reads texts, pictures and videos: leave the row out",
    }
    for kind in kinds:
        for key in (kind, f"{kind}s"):
            if record.get(key):
                raise SampleError(f"{where}: the row has {key}, which is not read here; {remedy[kind]}")


def text_of(value: Any, where: str) -> str:
    """The text itself, or `SampleError` if it is none or cannot be stored."""
    if not isinstance(value, str):
        raise SampleError(f"{where}: expected a text, found {type(value).__name__} {str(value)[:60]!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SampleError(f"{where}: the text holds half a character (a lone surrogate); mend its encoding") from None
    return value


def pictures_named(record: Mapping[str, Any], where: str, *, kind: str = "image") -> list[Any]:
    """The names under `images` or `image` (or those of another kind), whichever is filled."""
    many, single = (names_of(record.get(key), where, field=key) for key in (f"{kind}s", kind))
    if many and single and many != single:
        raise SampleError(f"{where}: the row has both {kind} and {kind}s, and they differ; keep the one that is meant")
    return many or single


def names_of(value: Any, where: str, *, field: str = "image") -> list[Any]:
    """Picture names given as one, as a list, or not at all."""
    if value is None or value == "":
        return []
    if isinstance(value, (str, dict, bytes, Picture)):
        return [value]
    if isinstance(value, Sequence):
        return list(value)
    raise SampleError(f"{where}: {field} is a {type(value).__name__}; write one name, a list of names, or leave it out")


def place_pictures(
    turns: Sequence[Said],
    count: int,
    where: str,
    *,
    marker: str = "<image>",
    unmarked: Literal["error", "first"] = "error",
    markers: Markers = "error",
) -> list[Turn]:
    """The turns in parts, every marker that stands for one of the `count` pictures become an `ImagePart`."""
    split = [Turn(role, [TextPart(text)] if text else [], train) for role, text, train in turns]
    shown = [ImagePart(number) for number in range(count)]
    return place_parts(split, shown, where, marker=marker, unmarked=unmarked, markers=markers)


def place_parts(
    turns: Sequence[Turn],
    shown: Sequence[Part],
    where: str,
    *,
    marker: str,
    what: str = "pictures",
    unmarked: Literal["error", "first"] = "error",
    markers: Markers = "error",
) -> list[Turn]:
    """The turns with the parts to be shown where the markers in their texts are, in order.

    A marker is a picture only if their number says so: all markers, or all those that the user wrote (an answer may
    speak of `<image>`). Everything else is a fault, unless an option says what it means.
    """
    count = len(shown)
    found = [(turn.role, sum(p.text.count(marker) for p in turn.parts if isinstance(p, TextPart))) for turn in turns]
    everywhere = sum(number for _, number in found)
    asked = sum(number for role, number in found if role != "assistant")
    if everywhere == count:
        holders = {"system", "user", "assistant", "tool"}
    elif asked == count:
        holders = {"system", "user", "tool"}
    elif everywhere == 0 and unmarked == "first":
        return first_shown(turns, shown, where)
    elif count == 0 and markers == "text":
        holders = set()
    else:
        single = what.removesuffix("s")
        remedy = {
            (True, False): f"name the {single} in the row, or set markers=text if the marker is only a word here",
            (False, True): f"write {marker} where each {single} belongs, or set unmarked=first to put them before the "
            f"first user turn",
        }.get((count == 0, everywhere == 0), f"write one {marker} for each {single}, no more and no fewer")
        raise SampleError(f"{where}: {count} {what} but {everywhere} {marker} markers; {remedy}")
    waiting = iter(shown)

    def cut(parts: Sequence[Part]) -> Iterator[Part]:
        for part in parts:
            if not isinstance(part, TextPart):
                yield part
                continue
            for index, piece in enumerate(part.text.split(marker)):
                if index:
                    yield next(waiting)
                if piece:
                    yield TextPart(piece)

    return [
        Turn(turn.role, list(cut(turn.parts)), turn.train) if number and turn.role in holders else turn
        for turn, (_, number) in zip(turns, found, strict=True)
    ]


def first_shown(turns: Sequence[Turn], pictures: Sequence[Part], where: str) -> list[Turn]:
    """The turns with these pictures before the first words of the user."""
    for number, turn in enumerate(turns):
        if turn.role == "user":
            return [*turns[:number], turn._replace(parts=[*pictures, *turn.parts]), *turns[number + 1 :]]
    raise SampleError(
        f"{where}: {len(pictures)} pictures but no user turn to put them in; add the question they belong to"
    )


def pictures_first(parts: Sequence[Part]) -> list[Part]:
    """The pictures before the text, with one line break between, as LLaVA-1.5 trains (`preprocess_multimodal`)."""
    pictures = [part for part in parts if isinstance(part, ImagePart)]
    if not pictures:
        return list(parts)
    text = "".join(part.text for part in parts if isinstance(part, TextPart)).strip()
    between = [piece for picture in pictures for piece in (picture, TextPart("\n"))]
    return [*between[:-1], TextPart(f"\n{text}")]


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
    for number, item in enumerate(typed):
        if item.train and not item.parts:
            raise SampleError(
                f"{where}: message {number}: the answer is empty, and would be learned as saying nothing; take the "
                f"turn out, or mark it as not learned (train: false)"
            )
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


def named_by(pattern: str, **values: Any) -> str:
    """A file name from a pattern with `{image_id}` in it, as an option gives it."""
    try:
        return pattern.format(**values)
    except (LookupError, ValueError) as error:
        told = ", ".join(f"{{{name}}} is {value!r}" for name, value in values.items())
        raise ConfigError(f"image_name {pattern!r} does not fit ({type(error).__name__}); {told}") from None


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


def most_common(answers: Any, where: str) -> str:
    """The answer given most often, of several the first given; VQA sets hold ten people's."""
    listed = list_of(answers, where, "list of answers", "answers")
    texts = [text_of(answer["answer"] if isinstance(answer, dict) else answer, where) for answer in listed]
    if not texts:
        raise SampleError(f"{where}: the list of answers is empty")
    return max(texts, key=texts.count)
