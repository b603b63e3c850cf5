"""What a chat format is: strings of data, and how a conversation reads in them, before any tokenizer is involved.

`pieces` is the only description of a rendered conversation: `chat.py` makes ids and labels of it, `chat_learn.py` text
to compare with a tokenizer's own template, and `jinja` writes the same as a template for other programs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from mmit.data.sample import BoxPart, Message, Part, Role, SampleError, TextPart, image_indices, message

Kind = Literal["begin", "marker", "text", "image", "stop", "end"]
Boxes = Callable[[BoxPart], str]


@dataclass(frozen=True)
class ChatFormat:
    """The strings around each message, as (before, after). A role without strings cannot occur in a conversation."""

    name: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    """Before: what ends a prompt. After: what follows the stop marker, which the model does not learn to write."""
    stop: str | None
    """What ends an answer and is learned; None: the tokenizer's own end-of-sequence token."""
    lead: str = ""
    """Text between the prompt and the answer that the model itself writes, as the space after `ASSISTANT:`."""
    system: tuple[str, str] | None = None
    system_place: Literal["before", "inside"] = "before"
    """`before` the first turn as a block of its own, or `inside` the first user turn, after its opening string."""
    default_system: str | None = None
    tool: tuple[str, str] | None = None
    begin: bool = True
    """Whether the ids that the tokenizer itself puts in front of a text (often bos) come first."""
    start: str = ""
    """A string that opens every conversation; bos tokens that a template writes out stand here."""
    strip: tuple[Role, ...] = ()
    """The roles whose texts lose the whitespace at the edges of the message."""
    strip_joined: bool = False
    """A system text `inside` the first user turn and the text of that turn lose their edges as one, strings between
    them included, as in Llama 2's template."""
    pictures_only: bool = False
    """Only pictures are kept of messages that are not the assistant's, as in LLaVA's first stage."""
    picture_ends_text: bool = False
    """What follows a picture is a new text, with the space that some tokenizers put before their first text alone: so
    LLaVA cuts a conversation at its pictures (`tokenizer_image_token`), and so its weights learned it."""
    needs: tuple[str, ...] = ()
    """Tokens without which the format makes no sense."""


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

# The strings of vicuna_v1, plain and llava_llama_2 are LLaVA's (llava/conversation.py): they must match its weights.
CHAT_FORMATS: dict[str, ChatFormat] = {
    "plain": ChatFormat(
        "plain", user=("", ""), assistant=("", ""), stop="\n", pictures_only=True, picture_ends_text=True
    ),
    "vicuna_v1": ChatFormat(
        "vicuna_v1",
        system=("", " "),
        default_system=VICUNA_SYSTEM,
        user=("USER: ", " "),
        assistant=("ASSISTANT:", ""),
        lead=" ",
        stop=None,
        picture_ends_text=True,
    ),
    "chatml": ChatFormat(
        "chatml",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        tool=("<|im_start|>tool\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "\n"),
        stop="<|im_end|>",
        needs=("<|im_start|>", "<|im_end|>"),
    ),
    "llama_3": ChatFormat(
        "llama_3",
        begin=False,
        start="<|begin_of_text|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        tool=("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", ""),
        stop="<|eot_id|>",
        strip=("system", "user", "assistant"),
        needs=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": ChatFormat(
        "gemma",
        begin=False,
        start="<bos>",
        system=("", "\n\n"),
        system_place="inside",
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "\n"),
        stop="<end_of_turn>",
        strip=("user", "assistant"),
        needs=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ),
    "llava_llama_2": ChatFormat(
        "llava_llama_2",
        begin=False,
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        system_place="inside",
        default_system=LLAVA_LLAMA_2_SYSTEM,
        user=("<s>[INST] ", " [/INST]"),
        assistant=("", ""),
        lead=" ",
        stop=" </s>",
        needs=("<s>", "</s>"),
        picture_ends_text=True,
    ),
}


class Piece(NamedTuple):
    """A stretch of a conversation: structure (`marker`, `stop`), a `text`, an `image`, or one of two points without
    text: `begin`, where the tokenizer's own opening ids go, and `end`, after which the conversation may be cut."""

    role: Role
    kind: Kind
    text: str = ""
    picture: int = -1
    segment: Literal["prompt", "answer", "stop"] = "prompt"
    """Neighbours of one segment are tokenized together, segments apart: so a prompt is a prefix of what is trained."""
    train: bool = False


def pieces(
    format: ChatFormat, messages: Sequence[Message], *, where: str, boxes: Boxes | None = None, prompt: bool = False
) -> Iterator[Piece]:
    """The conversation in reading order; with `prompt`, the opening of the assistant's next turn is added.

    Messages come in the order given: several of a role in a row and a conversation opened by the assistant are fine.
    """
    system, turns = _split_system(format, messages, where)
    if format.pictures_only and not any(image_indices(part) for item in turns for part in item.parts):
        raise SampleError(
            f"{where}: the chat format {format.name} writes captions of pictures but the sample shows none; "
            f"take it out of this stage's data, or give the stage another `chat:`"
        )
    if format.begin:
        yield Piece("system", "begin")
    if format.start:
        yield Piece("system", "marker", format.start)
    if system is not None and format.system_place == "before":
        yield from _wrapped(format, system, format.system, where, boxes)
    for number, item in enumerate(turns):
        if item.role == "assistant":
            yield from _answer(format, item, where, boxes)
            continue
        before, after = _strings(format, item.role, where)
        yield Piece(item.role, "marker", before)
        opening: list[Piece] = []
        if system is not None and number == 0 and format.system_place == "inside":
            opening = list(_wrapped(format, system, format.system, where, boxes))
        joined = bool(opening) and format.strip_joined
        laid = [*opening, *_body(format, item, where, boxes, segment="prompt", strip=not joined)]
        yield from _stripped(laid) if joined else laid
        yield Piece(item.role, "marker", after)
    if prompt:
        yield Piece("assistant", "marker", format.assistant[0])


def _split_system(
    format: ChatFormat, messages: Sequence[Message], where: str
) -> tuple[Message | None, Sequence[Message]]:
    given = bool(messages) and messages[0].role == "system"
    turns = messages[1:] if given else messages
    if any(item.role == "system" for item in turns):
        raise SampleError(f"{where}: a system message must come first; join its text to the first message")
    if format.pictures_only:
        return None, turns
    if given:
        _strings(format, "system", where)
        system = messages[0]
    elif format.default_system is not None:
        system = message("system", format.default_system)
    else:
        return None, turns
    if format.system_place == "inside" and (not turns or turns[0].role != "user"):
        raise SampleError(
            f"{where}: the chat format {format.name} puts the system text into the first user turn, but the "
            f"conversation does not start with one; add a user message first, or choose a format such as chatml"
        )
    return system, turns


def _strings(format: ChatFormat, role: Role, where: str) -> tuple[str, str]:
    strings = {"system": format.system, "user": format.user, "tool": format.tool}[role]
    if strings is None:
        raise SampleError(
            f"{where}: the chat format {format.name} has no place for a {role} message; "
            f"move its text into a user message, or choose a format that has one, such as chatml"
        )
    return strings


def _wrapped(
    format: ChatFormat, item: Message, strings: tuple[str, str] | None, where: str, boxes: Boxes | None
) -> Iterator[Piece]:
    assert strings is not None
    yield Piece(item.role, "marker", strings[0])
    yield from _body(format, item, where, boxes, segment="prompt")
    yield Piece(item.role, "marker", strings[1])


def _answer(format: ChatFormat, item: Message, where: str, boxes: Boxes | None) -> Iterator[Piece]:
    yield Piece("assistant", "marker", format.assistant[0])
    yield Piece("assistant", "marker", format.lead, segment="answer", train=item.train)
    yield from _body(format, item, where, boxes, segment="answer")
    yield Piece("assistant", "stop", format.stop or "", segment="stop", train=item.train)
    yield Piece("assistant", "marker", format.assistant[1])
    yield Piece("assistant", "end")


def _body(
    format: ChatFormat,
    item: Message,
    where: str,
    boxes: Boxes | None,
    *,
    segment: Literal["prompt", "answer"],
    strip: bool = True,
) -> Iterator[Piece]:
    last = len(item.parts) - 1
    for number, part in enumerate(item.parts):
        for picture in image_indices(part):
            yield Piece(item.role, "image", picture=picture, segment=segment)
        text = _text(part, where, boxes)
        if strip and item.role in format.strip:
            text = text.lstrip() if number == 0 else text
            text = text.rstrip() if number == last else text
        if text and not (format.pictures_only and item.role != "assistant"):
            yield Piece(item.role, "text", text, segment=segment, train=item.train)


def _stripped(laid: Sequence[Piece]) -> list[Piece]:
    """Neighbouring pieces without the whitespace at the edges of all of them; a picture is an edge."""

    def without(pieces: Sequence[Piece], edge: Callable[[str], str]) -> list[Piece]:
        kept = list(pieces)
        for place, piece in enumerate(kept):
            kept[place] = piece._replace(text=edge(piece.text))
            if piece.kind == "image" or kept[place].text:
                break
        return kept

    return without(without(laid, str.lstrip)[::-1], str.rstrip)[::-1]


def _text(part: Part, where: str, boxes: Boxes | None) -> str:
    match part:
        case TextPart(text):
            return text
        case BoxPart():
            if boxes is None:
                raise SampleError(
                    f"{where}: a box of picture {part.image} cannot be written here, because no picture fit is known "
                    f"to express it in; give `boxes`, or convert the data with boxes written out as text"
                )
            return boxes(part)
        case _:
            return ""


RESERVED = (
    *(r"<\|reserved_special_token_\d+\|>", r"<\|reserved_\d+\|>", r"<reserved\d+>", r"<unused\d+>", r"\[unused\d+\]"),
    *(r"<\|extra_\d+\|>", r"<SPECIAL_\d+>", r"<\|placeholder\d+\|>", r"<\|dummy_\d+\|>"),
)
"""Tokens that stand for nothing yet, in the order of preference."""

PLACEHOLDERS = (
    *(r"<image>", r"<\|image\|>", r"<image_soft_token>", r"<\|image_pad\|>", r"<IMG_CONTEXT>", r"\[IMG\]"),
    *(*RESERVED, r"<\|vision_pad\|>"),
)
"""Tokens that stand for a picture or for nothing yet, in the order of preference."""


def stands_for_nothing(token: str) -> bool:
    """Whether it is one of `PLACEHOLDERS`, so neither text nor part of any chat format."""
    return any(re.fullmatch(pattern, token) for pattern in PLACEHOLDERS)


def find_placeholder(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of an added token that is free to stand for image tokens; None: add a row to the embeddings."""
    added = cast(Mapping[int, AddedToken], tokenizer.added_tokens_decoder)
    taken = set(tokenizer.special_tokens_map.values()) - {tokenizer.special_tokens_map.get("image_token")}
    for pattern in PLACEHOLDERS:
        for number, token in sorted(added.items()):
            if re.fullmatch(pattern, token.content) and token.content not in taken:
                return number
    return None


def jinja(format: ChatFormat, *, begin: str = "", image: str = "<image>", space: str = "") -> str:
    """The format as a Jinja template that writes the same text, with markers around what is learned.

    `begin` is the text of what the tokenizer itself puts first; a picture (`{"type": "image"}`) is written as `image`,
    and before a text that follows one `space`.
    A format whose `stop` is None ends answers with the variable `eos_token`.
    """
    assistant, user = format.assistant, format.user
    body = "body(message['content'], {}, {})"
    body_of = (
        _BODY.replace("{%- for part in content -%}\n", _SPACED.replace("SPACE", _quoted(space))) if space else _BODY
    )
    lines = [body_of.replace("IMAGE", _quoted(image))]
    system = format.system if not format.pictures_only else None
    if system is None:
        refuse = "" if format.pictures_only else _refuse("system")
        lines += [
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            refuse + "{%- set turns = messages[1:] -%}",
        ]
        lines += ["{%- else -%}", "{%- set turns = messages -%}", "{%- endif -%}"]
    else:
        written = f"body(messages[0]['content'], {_flag('system' in format.strip)}, true)"
        default = format.default_system
        default = default.strip() if default is not None and "system" in format.strip else default
        block = f"{_quoted(system[0])} ~ {{}} ~ {_quoted(system[1])}"
        lines += ["{%- if messages and messages[0]['role'] == 'system' -%}"]
        lines += [f"{{%- set system = {block.format(written)} -%}}", "{%- set turns = messages[1:] -%}", "{%- else -%}"]
        lines += [f"{{%- set system = {block.format(_quoted(default)) if default is not None else _quoted('')} -%}}"]
        lines += ["{%- set turns = messages -%}", "{%- endif -%}"]
    lines += [f"{{{{- {_quoted((begin if format.begin else '') + format.start)} -}}}}"]
    if system is not None and format.system_place == "before":
        lines += ["{{- system -}}"]
    lines += ["{%- for message in turns -%}"]
    inside = "(system if loop.first else '') ~ " if system is not None and format.system_place == "inside" else ""
    texts = not format.pictures_only
    for word, role, strings in (("if", "user", user), ("elif", "tool", format.tool)):
        if strings is not None:
            text = body.format(_flag(role in format.strip), _flag(texts))
            lines += [f"{{%- {word} message['role'] == '{role}' -%}}"]
            if inside and format.strip_joined and role == "user":
                whole = body.format("false", _flag(texts))
                text = f"((system ~ {whole}) | trim if loop.first and system else {text})"
            else:
                text = f"{inside}{text}"
            lines += [f"{{{{- {_quoted(strings[0])} ~ {text} ~ {_quoted(strings[1])} -}}}}"]
    text = body.format(_flag("assistant" in format.strip), "true")
    stop = "eos_token" if format.stop is None else _quoted(format.stop)
    lines += ["{%- elif message['role'] == 'assistant' -%}", f"{{{{- {_quoted(assistant[0])} -}}}}"]
    lead = format.lead + (space if format.pictures_only else "")
    lines += [f"{{%- generation -%}}{{{{- {_quoted(lead)} ~ {text} ~ {stop} -}}}}{{%- endgeneration -%}}"]
    lines += [f"{{{{- {_quoted(assistant[1])} -}}}}"]
    lines += ["{%- else -%}", "{{- raise_exception('no place for a message of the role ' ~ message['role']) -}}"]
    lines += ["{%- endif -%}", "{%- endfor -%}"]
    lines += [f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(assistant[0])} -}}}}{{%- endif -%}}"]
    return "\n".join(lines)


_BODY = """\
{%- macro body(content, strip, texts) -%}
{%- if content is string -%}
{{- ((content | trim) if strip else content) if texts else '' -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{{- IMAGE -}}
{%- elif texts and strip and loop.first and loop.last -%}
{{- part['text'] | trim -}}
{%- elif texts and strip and loop.first -%}
{{- part['text'].lstrip() -}}
{%- elif texts and strip and loop.last -%}
{{- part['text'].rstrip() -}}
{%- elif texts -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}"""

_SPACED = """\
{%- set pictures = namespace(last=false) -%}
{%- for part in content -%}
{%- if texts and part['type'] != 'image' and part['text'] -%}
{%- if pictures.last and not part['text'].startswith(' ') -%}{{- SPACE -}}{%- endif -%}
{%- set pictures.last = false -%}
{%- elif part['type'] == 'image' -%}
{%- set pictures.last = true -%}
{%- endif -%}
"""


def _refuse(role: str) -> str:
    return f"{{{{- raise_exception('no place for a message of the role {role}') -}}}}"


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _quoted(text: str) -> str:
    """A string literal of Jinja, whose escapes are Python's."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(letter, letter) for letter in text) + '"'
