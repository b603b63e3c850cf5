"""Text to ids such that a text is only ever text, whatever it contains."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from mmit.config import ConfigError
from mmit.data.sample import SampleError

Section = Literal["first", "start", "inside"]
"""Where a text begins: before everything else, after a special token or a picture, or right after other text."""


class TextEncoder:
    """The tokenizer's model, normalizer and splitting without its added tokens, so no text can give a control token, a
    placeholder or any other added token. Added tokens of whitespace only (Gemma, GPT-NeoX) stay: they are text.

    The space that SentencePiece-like tokenizers put before a text is put here instead, so that a text which goes on
    after the border of an answer does not get a second one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, placeholder: int | None) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"model.language: the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no fast "
                f"version, without which text and added tokens cannot be told apart; give one with a tokenizer.json"
            )
        backend = cast(Tokenizer, tokenizer.backend_tokenizer)
        self.description: dict[str, Any] = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        if self.description["model"].get("dropout"):
            raise ConfigError("model.language: the tokenizer drops merges at random; set its model's `dropout` to null")

        added = cast(Mapping[int, AddedToken], tokenizer.added_tokens_decoder)
        spaces = {number: token for number, token in added.items() if not token.special and _is_whitespace(token)}
        self.special = {token.content: number for number, token in added.items() if number not in spaces}
        self._forbidden = {*self.special.values(), *tokenizer.all_special_ids, placeholder} - {None}
        self._unknown = (tokenizer.unk_token_id, tokenizer.unk_token)
        self._markers = _matcher([added[number] for number in self.special.values()])

        parts, self._prefix, self._prefixed, self._skip = _without_prefix(self.description)
        self._tokenizer = _assembled(backend, parts)
        self._tokenizer.add_tokens(list(spaces.values()))
        # Tokens that are not in the model's own vocabulary get new numbers when they are added again.
        here = {number: self._tokenizer.token_to_id(token.content) for number, token in spaces.items()}
        self._inward = {number: new for number, new in here.items() if new is not None and new != number}
        self._outward = {new: number for number, new in self._inward.items()}

    def encode(self, text: str, section: Section, borders: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Ids of a text, and for each character position in `borders` the number of ids that begin before it."""
        prefix = self.prefix(text, section)
        ids, starts = self._encode(prefix + text, with_starts=bool(borders))
        return ids, [bisect_left(starts, border + len(prefix)) for border in borders]

    def prefix(self, text: str, section: Section) -> str:
        """What the tokenizer itself puts in front of a text that begins in this section."""
        applies = bool(text) and {"always": section != "inside", "first": section == "first"}.get(self._prefixed, False)
        return self._prefix if applies and not text.startswith(self._skip) else ""

    def structure(self, text: str) -> list[str | int]:
        """A string of a format, in which added tokens do count: texts and ids in order."""
        items: list[str | int] = []
        position = 0
        for match in self._markers.finditer(text):
            found = match.group() if match.group() in self.special else match.group().strip()
            items += [text[position : match.start()], self.special[found]]
            position = match.end()
        return [item for item in [*items, text[position:]] if item != ""]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, edge whitespace included, control tokens left out."""
        text_ids = [self._inward.get(number, number) for number in ids if number not in self._forbidden]
        return self._tokenizer.decode(text_ids, skip_special_tokens=False)

    def _encode(self, text: str, *, with_starts: bool) -> tuple[list[int], list[int]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids
        if self._outward:
            ids = [self._outward.get(number, number) for number in ids]
        if not self._forbidden.isdisjoint(ids):
            return self._encode_apart(text, ids, encoding.offsets)
        return ids, [start for start, _ in encoding.offsets] if with_starts else []

    def _encode_apart(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The ids of a text whose vocabulary entries include a forbidden one: the text is cut inside that stretch."""
        for number, (start, stop) in zip(ids, offsets, strict=True):
            unknown = number == self._unknown[0] and text[start:stop].strip() != self._unknown[1]
            if number not in self._forbidden or unknown:
                continue
            middle = (start + stop) // 2
            if not start < middle < stop:
                raise SampleError(
                    f"the tokenizer can write {text[start:stop]!r} only as its control token {number}; "
                    f"take that character out of the text"
                )
            left, right = (self._encode(part, with_starts=True) for part in (text[:middle], text[middle:]))
            return left[0] + right[0], left[1] + [middle + start for start in right[1]]
        return ids, [start for start, _ in offsets]


def _is_whitespace(token: AddedToken) -> bool:
    return token.content.replace("▁", " ").isspace()


def _matcher(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    """Finds added tokens in the strings of a format, the longest first, with the whitespace that they take along."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    patterns = [
        (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
        for token in longest_first
        if token.content
    ]
    return re.compile("|".join(patterns) if patterns else r"(?!)")


def _assembled(backend: Tokenizer, parts: Mapping[str, Any]) -> Tokenizer:
    """The model of a tokenizer with other parts around it and no added tokens; the vocabulary is shared, not copied."""
    around = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "post_processor": None,
                "model": {"type": "BPE", "vocab": {}, "merges": []},
                **parts,
            }
        )
    )
    plain = Tokenizer(backend.model)
    if around.normalizer is not None:
        plain.normalizer = around.normalizer
    if around.pre_tokenizer is not None:
        plain.pre_tokenizer = around.pre_tokenizer
    if around.decoder is not None:
        plain.decoder = around.decoder
    return plain


def _without_prefix(
    description: Mapping[str, Any],
) -> tuple[dict[str, Any], str, Literal["always", "first", "never"], tuple[str, ...]]:
    """Normalizer, pre-tokenizer and decoder that add and take no space in front; and the space, when it is added, and
    the beginnings of a text before which it is not."""
    parts = json.loads(json.dumps({name: description[name] for name in ("normalizer", "pre_tokenizer", "decoder")}))
    parts["decoder"] = _decoder_without_prefix(parts["decoder"])
    normalizers = _sequence(parts["normalizer"], "normalizers")
    prepend = next((item for item in normalizers if item["type"] == "Prepend"), None)
    if prepend is not None:
        rest = [item for item in normalizers if item is not prepend]
        parts["normalizer"] = {"type": "Sequence", "normalizers": rest} if rest else None
        return parts, prepend["prepend"], "always", ()
    first = next(iter(_sequence(parts["pre_tokenizer"], "pretokenizers")), None)
    match first:
        case {"type": "Metaspace", "prepend_scheme": rule, "replacement": mark}:
            first["prepend_scheme"] = "never"
            return parts, mark, rule, (" ", mark)
        case {"type": "ByteLevel", "add_prefix_space": True}:
            first["add_prefix_space"] = False
            return parts, " ", "always", (" ",)
        case _:
            return parts, "", "never", ()


def _decoder_without_prefix(decoder: dict[str, Any] | None) -> dict[str, Any] | None:
    kept = [item for item in _sequence(decoder, "decoders") if item["type"] != "Strip"]
    for item in kept:
        if item["type"] == "Metaspace":
            item["prepend_scheme"] = "never"
    return {"type": "Sequence", "decoders": kept} if kept else None


def _sequence(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[name] if part["type"] == "Sequence" else [part]
