"""A conversation to ids and labels. One renderer serves training and prompts.

Structure, texts and pictures are laid down in reading order. The prompt, the answer and the stop marker are tokenized
apart, so training ids start with exactly the ids that inference sends; what is learned is known from where a piece
stands, never found again in the ids. Control tokens come from the format and placeholders from typed parts, so a text
cannot pose as either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, takewhile
from typing import Literal, cast

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mmit.config import ConfigError, imported
from mmit.data.chat_formats import CHAT_FORMATS, Boxes, ChatFormat, Piece, find_placeholder, jinja, pieces
from mmit.data.chat_learn import learn
from mmit.data.chat_text import Section, TextEncoder
from mmit.data.sample import Message, Role, Sample, SampleError

__all__ = [
    "CHAT_FORMATS",
    "Chat",
    "ChatFormat",
    "Rendered",
    "Span",
    "cut",
    "find_placeholder",
    "jinja",
    "learn",
    "resolve",
]

UNSUPERVISED = -100
VERSION = 2  # part of the fingerprint: raise it when the same format begins to give other ids


@dataclass(frozen=True, slots=True)
class Span:
    """Ids start..stop of one role: structure (`marker`), `text`, `image` or `stop` marker."""

    start: int
    stop: int
    role: Role
    kind: Literal["marker", "text", "image", "stop"]


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids (T,) and labels (T,): label i is id i where it is learned, else -100, not shifted."""

    ids: np.ndarray
    labels: np.ndarray
    images: tuple[tuple[int, int, int], ...]
    """(start, stop, index of the picture) of each image's placeholders, in order."""
    spans: tuple[Span, ...]
    """What each id is, without gaps."""
    turn_ends: tuple[int, ...]
    """The lengths at which the conversation may be cut: after each assistant turn."""

    def __len__(self) -> int:
        return len(self.ids)


class Chat:
    """A chat format bound to a tokenizer. `placeholder` is the id that stands for an image's tokens, None without
    vision; it may lie beyond the tokenizer's own ids."""

    def __init__(
        self, format: ChatFormat, tokenizer: PreTrainedTokenizerBase, *, placeholder: int | None = None
    ) -> None:
        self.text = TextEncoder(tokenizer, placeholder=placeholder)
        self.placeholder = placeholder
        self.format = _with_stop(format, tokenizer, self.text, placeholder)
        self.begin = _opening_ids(tokenizer) if format.begin else []
        self._cache: dict[tuple[str, Section, tuple[int, ...]], tuple[list[int], list[int]]] = {}
        self._structures: dict[str, list[str | int]] = {}

        stop = self.structure(self.format.stop or "")
        marks = [item for item in stop if isinstance(item, int)]
        eos = tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*marks[:1], *([eos] if isinstance(eos, int) else [])]))
        """Any of these ids ends an answer."""
        self.stop_text = "" if marks else (self.format.stop or "")
        """A text that ends an answer when the format has no token for it; else empty."""
        self._stop_lead = stop[0] if marks and isinstance(stop[0], str) else ""
        self.markers_are_text = self._markers_are_text()
        """True when nothing but plain words parts user from assistant: then a text can imitate a turn."""
        self.after_picture: Section = "first" if format.picture_ends_text else "start"
        opening = self.structure(format.user[1] + format.assistant[0])
        self._answer_begins: Section = self.after_picture if not opening else "start"
        if opening and isinstance(opening[-1], str):
            self._answer_begins = "inside"
        described = [VERSION, asdict(self.format), placeholder, self.begin, self.text.description]
        self.fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def render(self, sample: Sample, image_tokens: Sequence[int], *, boxes: Boxes | None = None) -> Rendered:
        """The whole conversation as it is trained; `image_tokens[i]` is how many tokens picture i takes."""
        where = f"{sample.source}:{sample.key}"
        return self._rendered(pieces(self.format, sample.messages, where=where, boxes=boxes), image_tokens, where)

    def prompt(
        self, messages: Sequence[Message], image_tokens: Sequence[int] = (), *, boxes: Boxes | None = None
    ) -> Rendered:
        """What inference sends: the conversation so far and the opening of the assistant's next turn; no labels."""
        laid = pieces(self.format, messages, where="prompt", boxes=boxes, prompt=True)
        rendered = self._rendered(laid, image_tokens, "prompt")
        return replace(rendered, labels=np.full_like(rendered.labels, UNSUPERVISED))

    def decode(self, ids: Sequence[int]) -> str:
        """The answer that generated ids hold: up to the stop marker, without what the format puts around a text."""
        end = next((place for place, number in enumerate(ids) if number in self.stop_ids), len(ids))
        text = self.text.decode([int(number) for number in ids[:end]])
        if self.stop_text and self.stop_text in text:
            text = text[: text.index(self.stop_text)]
        text = text.removeprefix(self.text.prefix("x", self._answer_begins).replace("▁", " "))
        return text.removeprefix(self.format.lead).removesuffix(self._stop_lead)

    def template(self) -> str:
        """The same format as a Jinja template for other programs, in which an image is written as one placeholder."""
        names = {number: content for content, number in self.text.special.items()}
        image = "<image>" if self.placeholder is None else names.get(self.placeholder, "<image>")
        begin = "".join(names[number] for number in self.begin)
        # A tokenizer that puts a space before its first text alone does not do so after a token that is written out.
        space = "" if self.text.prefix("x", "start") else self.text.prefix("x", "first").replace("▁", " ")
        if begin and self._opens_with_text():
            begin += space
        return jinja(self.format, begin=begin, image=image, space=space if self.format.picture_ends_text else "")

    def _opens_with_text(self) -> bool:
        """Whether words, and no control token or picture, come first."""
        format = self.format
        system = format.system if format.system is not None and format.system_place == "before" else None
        opening = self.structure(format.start + (system or format.user)[0])
        return isinstance(opening[0], str) if opening else not format.pictures_only

    def _rendered(self, laid: Iterable[Piece], image_tokens: Sequence[int], where: str) -> Rendered:
        tape = _Tape(self, image_tokens, where)
        for piece in laid:
            tape.lay(piece)
        tape.flush()
        return Rendered(
            ids=np.array(tape.ids, dtype=np.int32),
            labels=np.array(tape.labels, dtype=np.int32),
            images=tuple(tape.images),
            spans=tuple(tape.spans),
            turn_ends=tuple(tape.turn_ends),
        )

    def structure(self, text: str) -> list[str | int]:
        """A string of the format as texts and the ids of its control tokens."""
        if text not in self._structures:
            self._structures[text] = self.text.structure(text)
        return self._structures[text]

    def encode(
        self, text: str, section: Section, borders: tuple[int, ...], *, structure: bool
    ) -> tuple[list[int], list[int]]:
        """`TextEncoder.encode`; what holds only structure is remembered, for it comes with every conversation."""
        if not structure:
            return self.text.encode(text, section, borders)
        key = (text, section, borders)
        if key not in self._cache:
            self._cache[key] = self.text.encode(text, section, borders)
        return self._cache[key]

    def _markers_are_text(self) -> bool:
        opening = self.structure(self.format.user[1] + self.format.assistant[0])
        closing = self.structure((self.format.stop or "") + self.format.assistant[1] + self.format.user[0])
        return not all(any(isinstance(item, int) for item in border) for border in (opening, closing))


class _Tape:
    """Lays pieces down one after the other, tokenizing each run of neighbouring texts at once."""

    def __init__(self, chat: Chat, image_tokens: Sequence[int], where: str) -> None:
        self.chat, self.image_tokens, self.where = chat, image_tokens, where
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.images: list[tuple[int, int, int]] = []
        self.spans: list[Span] = []
        self.turn_ends: list[int] = []
        self.run: list[tuple[Piece, str]] = []
        self.segment = "prompt"
        self.section: Section = "first"

    def lay(self, piece: Piece) -> None:
        if piece.segment != self.segment:
            self.flush()
            self.segment = piece.segment
        match piece.kind:
            case "begin":
                self.put(piece, self.chat.begin)
            case "text":
                self.run.append((piece, piece.text))
            case "image":
                self.flush()
                self.put_image(piece)
            case "marker" | "stop":
                for item in self.chat.structure(piece.text):
                    if isinstance(item, str):
                        self.run.append((piece, item))
                        continue
                    self.flush()
                    self.put(piece, [item])
                    self.section = "start"
            case "end":
                self.flush()
                self.turn_ends.append(len(self.ids))

    def put(self, piece: Piece, ids: Sequence[int]) -> None:
        start = len(self.ids)
        self.ids += ids
        self.labels += ids if piece.train else [UNSUPERVISED] * len(ids)
        self.mark(piece, start, len(self.ids))

    def put_image(self, piece: Piece) -> None:
        if self.chat.placeholder is None:
            raise SampleError(
                f"{self.where}: the sample shows a picture but the model reads only text; set model.vision"
            )
        if not piece.picture < len(self.image_tokens) or self.image_tokens[piece.picture] < 1:
            raise SampleError(
                f"{self.where}: picture {piece.picture} has no token count; {len(self.image_tokens)} were given, "
                f"give one of at least 1 for each picture of the sample"
            )
        start = len(self.ids)
        self.put(piece, [self.chat.placeholder] * self.image_tokens[piece.picture])
        self.images.append((start, len(self.ids), piece.picture))
        self.section = self.chat.after_picture

    def flush(self) -> None:
        """Tokenizes the run so far."""
        if not self.run:
            return
        laid, texts = zip(*self.run, strict=True)
        text = "".join(texts)
        ends = tuple(accumulate(map(len, texts[:-1])))
        structure = all(piece.kind != "text" for piece in laid)
        try:
            ids, borders = self.chat.encode(text, self.section, ends, structure=structure)
        except SampleError as error:
            raise SampleError(f"{self.where}: {error}") from error
        first = start = len(self.ids)
        self.ids += ids
        self.labels += ids if laid[0].train else [UNSUPERVISED] * len(ids)
        for piece, stop in zip(laid, [*borders, len(ids)], strict=True):
            self.mark(piece, start, first + stop)
            start = first + stop
        self.run.clear()
        self.section = "inside" if text else self.section

    def mark(self, piece: Piece, start: int, stop: int) -> None:
        kind = "marker" if piece.kind == "begin" else piece.kind
        assert kind != "end"
        last = self.spans[-1] if self.spans and self.spans[-1].stop not in self.turn_ends[-1:] else None
        if last is not None and kind != "image" and (last.role, last.kind) == (piece.role, kind):
            self.spans[-1] = Span(last.start, stop, last.role, last.kind)
        elif start < stop:
            self.spans.append(Span(start, stop, piece.role, kind))


def cut(rendered: Rendered, max_tokens: int, policy: Literal["cut", "drop"]) -> Rendered | None:
    """The conversation in at most `max_tokens`: whole trailing turns are dropped, with their pictures. None when the
    first turn does not fit, or when `policy` drops what is too long."""
    if len(rendered) <= max_tokens:
        return rendered
    fitting = [end for end in rendered.turn_ends if end <= max_tokens]
    if policy == "drop" or not fitting:
        return None
    end = fitting[-1]
    return Rendered(
        ids=rendered.ids[:end],
        labels=rendered.labels[:end],
        images=tuple(image for image in rendered.images if image[1] <= end),
        spans=tuple(span for span in rendered.spans if span.stop <= end),
        turn_ends=tuple(fitting),
    )


def resolve(name: str, tokenizer: PreTrainedTokenizerBase, *, placeholder: int | None = None) -> Chat:
    """The chat that a config names: `auto` (learned from the tokenizer's template), a built-in, or
    `package.module:NAME`, a `ChatFormat` of the user's own."""
    if name == "auto":
        return Chat(learn(tokenizer), tokenizer, placeholder=placeholder)
    if name in CHAT_FORMATS:
        return Chat(CHAT_FORMATS[name], tokenizer, placeholder=placeholder)
    found = imported(name, "chat", ["auto", *CHAT_FORMATS])
    if not isinstance(found, ChatFormat):
        raise ConfigError(f"chat: {name!r} is a {type(found).__name__}; write a ChatFormat of mmit.data.chat")
    return Chat(found, tokenizer, placeholder=placeholder)


def _with_stop(
    format: ChatFormat, tokenizer: PreTrainedTokenizerBase, text: TextEncoder, placeholder: int | None
) -> ChatFormat:
    """The format with its stop marker spelled out, or `ConfigError` if this tokenizer cannot speak the format."""
    missing = [token for token in format.needs if token not in text.special]
    if missing:
        raise ConfigError(
            f"chat: the format {format.name} needs the tokens {', '.join(missing)}, which the tokenizer lacks; "
            f"choose vicuna_v1, whose markers are words, or a tokenizer that has them"
        )
    strings = [*format.user, *format.assistant, format.stop, *(format.system or ()), *(format.tool or ()), format.start]
    if any(placeholder in text.structure(string) for string in strings if string):
        raise ConfigError(
            f"chat: a string of the format {format.name} holds the token {placeholder} that stands for pictures; "
            f"take it out, pictures are put where the messages have them"
        )
    if format.stop is not None:
        return format
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"chat: the format {format.name} ends an answer with the tokenizer's eos token, but it has none; "
            f"set eos_token in its tokenizer_config.json"
        )
    return replace(format, stop=str(tokenizer.eos_token))


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts in front of a text: bos for Llama, nothing for Qwen."""
    backend = cast(Tokenizer, tokenizer.backend_tokenizer)
    bare = backend.encode("a", add_special_tokens=False).ids
    return list(takewhile(lambda number: number != bare[0], backend.encode("a").ids))
