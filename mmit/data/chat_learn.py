"""A chat format learned from a tokenizer's own Jinja template, and proven on conversations it was not learned from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mmit.config import ConfigError
from mmit.data.chat_formats import CHAT_FORMATS, ChatFormat, pieces
from mmit.data.sample import Message, Role, message

Render = Callable[..., str]
"""(messages, prompt=False) -> the text that the template writes."""


class _Inexpressible(Exception):
    """Why a template cannot be written as the strings of a `ChatFormat`."""


def learn(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The format that writes, to the letter, what the tokenizer's template writes for conversations of text; but for
    what may follow the last answer, which no prompt holds and nothing learns.

    Raises `ConfigError` with the reason when there is none: no template, a date, reasoning blocks, other logic.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    remedy = f"name a built-in instead ({', '.join(CHAT_FORMATS)}), or package.module:NAME of a ChatFormat of your own"
    if tokenizer.chat_template is None:
        raise ConfigError(f"chat: auto needs a chat template, but the tokenizer of {name} has none; {remedy}")
    render = _renderer(tokenizer)
    try:
        format, ending = _extract(render, tokenizer)
        _prove(format, render, ending)
    except _Inexpressible as error:
        source = str(tokenizer.chat_template)
        reasoning = " (it handles reasoning blocks)" if "think" in source or "reasoning" in source else ""
        raise ConfigError(
            f"chat: auto cannot express the chat template of {name}: {error}{reasoning}; {remedy}"
        ) from error
    return format


def written(format: ChatFormat, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """The text of a conversation without pictures in a format, in which `stop` is spelled out."""
    return "".join(piece.text for piece in pieces(format, messages, where="probe", prompt=prompt))


def _renderer(tokenizer: PreTrainedTokenizerBase, *, before: str = "") -> Render:
    """Writes conversations with the tokenizer's template, with `before` put in front of it."""
    template = before + tokenizer.get_chat_template()

    def render(messages: Sequence[Message], *, prompt: bool = False) -> str:
        conversation = [{"role": item.role, "content": item.text} for item in messages]
        try:
            text = tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            roles = ", ".join(item.role for item in messages)
            raise _Inexpressible(f"it refuses a conversation of {roles} ({error})") from error
        assert isinstance(text, str)
        return text

    return render


# Words without meaning, so that no template looks for them and none is part of another.
USERS = ("qzxu", "wvku", "jfpu")
ANSWERS = ("qzxa", "wvka", "jfpa")
SYSTEM, DATE = "hgys", "qjdw"
CLOCK = f"{{%- macro strftime_now(format) -%}}{DATE}{{%- endmacro -%}}"
"""Shadows the clock that transformers gives to templates."""
TURNS = tuple(
    item for u, a in zip(USERS, ANSWERS, strict=True) for item in (message("user", u), message("assistant", a))
)


def _extract(render: Render, tokenizer: PreTrainedTokenizerBase) -> tuple[ChatFormat, tuple[str, str]]:
    """The strings found around known words; and what follows the last answer in the format and in the template."""
    full, asked, unasked = render(TURNS), render(TURNS[:1], prompt=True), render(TURNS[:1])
    if not any(word in full.lower() for word in (*USERS, *ANSWERS)):  # as LLaVA-1.5's on the Hub, which has no stop
        raise _Inexpressible("it reads messages as lists of parts alone, and writes nothing of a plain text")
    if DATE in _renderer(tokenizer, before=CLOCK)(TURNS, prompt=True):
        raise _Inexpressible("it writes today's date, so a sample would give other ids tomorrow")
    head, *between, end = _around(full, [item.text for item in TURNS])
    to_answer, to_user = between[0], between[1]
    if set(between[0::2]) != {to_answer} or set(between[1::2]) != {to_user}:
        raise _Inexpressible("it writes earlier turns otherwise than later ones")

    prompt_end, user_after = asked[len(head) + len(USERS[0]) :], unasked[len(head) + len(USERS[0]) :]
    tail, closing = end, tokenizer.eos_token
    if asked == unasked:  # it opens the assistant's turn without being asked: after the user, or after every message
        user_after = _split_stop(prompt_end, tokenizer)[0]
        tail = end if to_user.startswith(end) else _split_stop(end, tokenizer)[0]
    elif isinstance(closing, str) and not to_user.startswith(end):  # Phi writes eos after a whole conversation
        user_after, tail = user_after.removesuffix(closing), end.removesuffix(closing)
    if not (prompt_end.startswith(user_after) and to_answer.startswith(prompt_end)):
        raise _Inexpressible("an answer does not begin where its generation prompt leaves off")
    if not to_user.startswith(tail):
        raise _Inexpressible("it ends the last answer otherwise than earlier ones")
    if not tail:
        raise _Inexpressible("it writes nothing after an answer, so a model could not learn to stop")
    user_before = to_user[len(tail) :]
    if not head.endswith(user_before) and head.endswith(user_before.lstrip() or user_before):
        user_before = user_before.lstrip()  # Tulu's last answer goes without the line break of earlier ones
        tail = to_user.removesuffix(user_before)
    stop, assistant_after = _split_stop(tail, tokenizer)
    start, system, place, default = _system(render, head, user_before, [*between, end])
    roles: tuple[Role, ...] = ("user", "assistant") if system is None else ("system", "user", "assistant")
    strip: tuple[Role, ...] = tuple(role for role in roles if _strips(render, role))
    format = ChatFormat(
        name="auto",
        begin=False,
        start=start,
        system=system,
        system_place=place,
        default_system=default,
        user=(user_before, user_after),
        assistant=(prompt_end[len(user_after) :], assistant_after),
        lead=to_answer[len(prompt_end) :],
        stop=stop,
        strip=strip,
        strip_joined=place == "inside" and "user" in strip and _joins(render),
    )
    return format, (tail, end)


def _system(
    render: Render, head: str, user_before: str, rest: Sequence[str]
) -> tuple[str, tuple[str, str] | None, Literal["before", "inside"], str | None]:
    """What opens a conversation: start, system strings, their place and the default system text."""
    opening = head.removesuffix(user_before)
    try:
        text = render((message("system", SYSTEM), *TURNS))
    except _Inexpressible:
        text = ""
    if SYSTEM not in text:
        if not head.endswith(user_before):
            raise _Inexpressible("it opens the first user turn otherwise than later ones")
        return opening, None, "before", None
    before, after, *others = _around(text, [SYSTEM, *(item.text for item in TURNS)])
    if others != rest:
        raise _Inexpressible("with a system text it writes the turns otherwise")
    if after.endswith(user_before):
        after = after.removesuffix(user_before)
        if before.startswith(opening):
            return opening, (before[len(opening) :], after), "before", None
        return "", (before, after), "before", _between(opening, before, after)
    if head.endswith(user_before) and before.startswith(head):
        return opening, (before[len(head) :], after), "inside", None
    start, _, inner = before.partition(user_before)
    return start, (inner, after), "inside", _between(head, before, after)


def _between(text: str, before: str, after: str) -> str:
    if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
        raise _Inexpressible("its opening without a system text is not its opening with one")
    return text[len(before) : len(text) - len(after)]


def _strips(render: Render, role: Role) -> bool:
    """Whether a text loses its right edge; the left one goes too, but where strings stand before it (`_joins`)."""
    conversation = [message(item.role, f"{SYSTEM} \n ") if item.role == role else item for item in TURNS[:2]]
    if role == "system":
        conversation.insert(0, message("system", f"{SYSTEM} \n "))
    return f"{SYSTEM} \n " not in render(conversation)


def _joins(render: Render) -> bool:
    """Whether the first question keeps its left edge behind a system text, though it loses it without one."""
    return f" \n {USERS[0]}" in render((message("system", SYSTEM), message("user", f" \n {USERS[0]}"), TURNS[1]))


def _around(text: str, words: Sequence[str]) -> list[str]:
    """What stands before, between and after words that must each occur once, in this order."""
    stretches: list[str] = []
    for word in words:
        if text.count(word) != 1:
            raise _Inexpressible("it drops, repeats or reorders messages")
        stretch, _, text = text.partition(word)
        stretches.append(stretch)
    return [*stretches, text]


def _split_stop(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A text cut after the first added token in it; all of it before the cut when there is none."""
    contents = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    found = [(text.index(content), -len(content)) for content in contents if content in text]
    if not found:
        return text, ""
    start, length = min(found)
    return text[: start - length], text[start - length :]


HELD_OUT = (
    *(
        "What is this?",
        "Two\nlines\n\nand more",
        "  leading spaces",
        "\n\nleading lines",
        "trailing \n",
        "\tboth \t",
        "",
    ),
    *("<|im_end|>\n<|im_start|>assistant\nHi", "</s> [INST] x [/INST]", "<image>", "USER: a ASSISTANT: b", "user"),
    *("<think>first</think>then", "then</think>\n\nmore", "<tool_call>{}</tool_call>", "{{ messages }} {% if x %}"),
    *("<tool_response>x</tool_response>", "Zoë 世界 🙂 «»", '"quoted" \\ back', "<<SYS>>\nx\n<</SYS>>\n\n", "a" * 300),
)


def _prove(format: ChatFormat, render: Render, ending: tuple[str, str]) -> None:
    """Compares format and template on conversations that the format was not learned from."""
    draw = random.Random(0)
    for number in range(60):
        turns = [message(role, draw.choice(HELD_OUT)) for _ in range(1 + number % 5) for role in ("user", "assistant")]
        if format.system is not None and draw.random() < 0.5:
            turns.insert(0, message("system", draw.choice([text for text in HELD_OUT if text.strip()])))
        for conversation, prompt in ((turns, False), (turns[:-1], True)):
            ours = written(format, conversation, prompt=prompt)
            if not prompt:
                ours = ours.removesuffix(ending[0]) + ending[1]
            theirs = render(conversation, prompt=prompt)
            if ours != theirs:
                place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
                raise _Inexpressible(
                    f"learned from simple conversations, it fails on one that holds "
                    f"{theirs[max(0, place - 30) : place + 30]!r}, where {ours[place : place + 30]!r} was expected"
                )
