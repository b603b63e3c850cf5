"""What was written is loaded again, as a stranger would, and must say the same as the model it was written from.

Compared on a few conversations with histories and pictures of odd sizes: ids, pixels, logits and greedy answers. The
export is read by transformers alone, ours goes through the renderer and the modules of training.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)

from mmit.data.chat import Rendered
from mmit.data.fit import normalise
from mmit.data.images import decode
from mmit.data.packing import Example, pack
from mmit.data.sample import ImagePart, Message, message
from mmit.export.llava import ExportError
from mmit.model.saved import Saved

TOLERANCE = 1e-5
"""Of the largest logit, or of 1 where logits are smaller, in fp32."""
NEW_TOKENS = 12
COMPARED = 32
"""Positions of each conversation whose logits are compared."""


@dataclass(frozen=True)
class Conversation:
    """Messages up to the one to answer, and its pictures as PNG."""

    messages: tuple[Message, ...]
    pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Said:
    """What a model makes of a conversation. Letters: T ids, N pictures, L the last positions, V vocabulary."""

    ids: list[int]
    pixels: Tensor | None
    """(N, 3, S, S), normalised."""
    logits: Tensor
    """(L, V) of the last positions, which everything before them reaches."""
    answer: list[int]
    """Greedy tokens, up to a stop id."""


@dataclass(frozen=True)
class Answers:
    """What the trained model answered, `batch_size` questions at a time: the export must in the same batches, since
    padding changes the last bits of logits."""

    conversations: Sequence[Conversation]
    tokens: Sequence[Sequence[int]]
    """Of each conversation, up to and with the stop id."""
    batch_size: int
    max_new_tokens: int


@dataclass(frozen=True)
class Parity:
    """How close the export came; ids, pixels and greedy tokens are equal, or there is no `Parity`.

    0 of a kind were not compared: of a GGUF only the logits are, on our ids.
    """

    conversations: int
    pictures: int
    ids: int
    largest_difference: float
    """Of any logit."""
    largest_logit: float
    greedy_tokens: int
    answers: int = 0
    """Questions asked again in batches, whose ids and tokens are equal too."""

    def sentence(self) -> str:
        again = f"; {self.answers} questions asked again in batches: every token equal" if self.answers else ""
        shown = f" with {self.pictures} pictures" if self.pictures else ""
        equal = f"{self.ids} ids and {self.greedy_tokens} greedy tokens equal, " if self.ids else ""
        return (
            f"{self.conversations} conversations{shown} compared: {equal}logits within {self.largest_difference:.1e} "
            f"(the largest is {self.largest_logit:.3g}){again}"
        )


def probes(saved: Saved) -> list[Conversation]:
    """Conversations that the model's chat format can write."""
    asked = [message("user", "What is this?"), message("assistant", "Something small.")]
    system = [message("system", "Answer briefly.")] if saved.chat.format.system is not None else []
    texts = [
        Conversation((message("user", "Name three colours."),)),
        Conversation((*system, *asked, message("user", "Where does it stand?\nAnswer in one line."))),
        Conversation((*asked, *asked, message("user", "Zoë: 1 + 1 = ?"))),
    ]
    if saved.assembly.vlm.vision is None:
        return texts
    one, two, three = ImagePart(0), ImagePart(1), ImagePart(2)
    shown = [
        Conversation((message("user", one, "\nWhat is this?"),), (picture(37, 53),)),
        Conversation(
            (message("user", one, two, "Compare."), message("assistant", "Both are noise."), message("user", "Why?")),
            (picture(120, 31), picture(64, 64)),
        ),
        Conversation(
            (
                *(*system, *asked),
                *(message("user", "Look: ", one, " and ", two, three), message("assistant", "Yes.")),
                message("user", "Which is the largest?"),
            ),
            (picture(5, 90), picture(201, 199), picture(31, 31)),
        ),
    ]
    return shown if saved.chat.format.pictures_only else [*shown, *texts]


def picture(width: int, height: int) -> bytes:
    """A PNG of soft shapes in noise, the same for the same size."""
    generator = np.random.default_rng(width * 1000 + height)
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / 7 + k) + np.cos(columns / 5 - k) for k in range(3)], axis=-1)
    pixels = 128 + 45 * waves + generator.normal(0, 12, waves.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


def load_export(
    folder: Path, *, multimodal: bool, adapter: Path | None = None, tensors: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, Any]:
    """The model in fp32 and its processor (or tokenizer), as anyone loads them; ExportError names a lost tensor.

    `tensors` are what it must hold to the bit: of a vocabulary the probes touch few rows.
    """
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model, found = cast(Any, kind).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    lost = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[key]]
    if lost:
        raise ExportError(f"{folder}: {len(lost)} tensors do not fit the class that loads them ({lost[:3]})")
    found = model.state_dict()
    other = [name for name, value in (tensors or {}).items() if not torch.equal(found[name], value)]
    if other:
        raise ExportError(f"{folder}: {len(other)} tensors came back with other values ({other[:3]})")
    speaker = AutoProcessor.from_pretrained(folder) if multimodal else AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        model = cast(nn.Module, PeftModel.from_pretrained(cast(Any, model), adapter))
    return model.eval(), speaker


@torch.no_grad()
def said(saved: Saved, conversation: Conversation) -> Said:
    """By our own renderer and the modules of training, without a cache that could be wrong."""
    ids, pixels = rendered(saved, conversation)
    embeds = embed(saved, conversation, ids, pixels)
    language = cast(Any, saved.assembly.vlm.language)
    logits = language(inputs_embeds=embeds, use_cache=False, logits_to_keep=COMPARED).logits[0]
    normal = normalise(torch.stack(pixels), saved.fit.mean, saved.fit.std) if pixels and saved.fit is not None else None
    return Said(ids.tolist(), normal, logits, greedy(saved, embeds, NEW_TOKENS))


@torch.no_grad()
def said_by_export(model: nn.Module, speaker: Any, conversation: Conversation) -> Said:
    """By the exported processor (or tokenizer) and transformers' generate."""
    inputs = processed(speaker, conversation)
    logits = cast(Any, model)(**inputs, logits_to_keep=COMPARED).logits[0]
    answer = cast(Any, model).generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = inputs["input_ids"][0].tolist()
    return Said(ids, inputs.get("pixel_values"), logits, answer[0, len(ids) :].tolist())


def compare(ours: Sequence[Said], theirs: Sequence[Said], saved: Saved, where: str) -> Parity:
    """ExportError at the first conversation whose ids, pixels, logits or greedy tokens differ."""
    difference, largest = 0.0, 0.0
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        here = f"{where}: probe conversation {number}"
        if mine.ids != other.ids:
            raise ExportError(f"{here}: {_first_difference(saved, mine.ids, other.ids)}")
        _check_pixels(mine.pixels, other.pixels, here)
        gap, size = float((mine.logits - other.logits).abs().max()), float(mine.logits.abs().max())
        if not gap <= TOLERANCE * max(1.0, size):
            raise ExportError(f"{here}: logits differ by {gap:.1e} (the largest is {size:.3g})")
        if mine.answer != other.answer:
            raise ExportError(f"{here}: greedy tokens differ: ours {mine.answer}, of the export {other.answer}")
        difference, largest = max(difference, gap), max(largest, size)
    return Parity(
        conversations=len(ours),
        pictures=sum(len(item.pixels) for item in ours if item.pixels is not None),
        ids=sum(len(item.ids) for item in ours),
        largest_difference=difference,
        largest_logit=largest,
        greedy_tokens=sum(len(item.answer) for item in ours),
    )


@torch.no_grad()
def check_answers(model: nn.Module, speaker: Any, asked: Answers, saved: Saved, where: str) -> int:
    """The number of questions that the export answers with the same tokens; ExportError at the first with others."""
    questions, size = asked.conversations, asked.batch_size
    fill = cast(Any, model).generation_config.pad_token_id
    for start in range(0, len(questions), size):
        inputs = processed_batch(speaker, questions[start : start + size])
        whole = cast(Any, model).generate(**inputs, max_new_tokens=asked.max_new_tokens, do_sample=False)
        answers = whole[:, inputs["input_ids"].shape[1] :].tolist()
        for number, answer in enumerate(answers, start):
            here = f"{where}: question {number}"
            sent = inputs["input_ids"][number - start][inputs["attention_mask"][number - start] == 1].tolist()
            if sent != (ids := _prompt(saved, questions[number]).ids.tolist()):
                raise ExportError(f"{here}: {_first_difference(saved, ids, sent)}")
            ours = list(asked.tokens[number])
            rest = set(answer[len(ours) :]) - {fill}
            # Of itself `generate` does not stop at a text; the card says how it does.
            if answer[: len(ours)] != ours or (rest and not saved.chat.stop_text):
                raise ExportError(f"{here}: greedy tokens differ: ours {ours}, of the export {answer}")
    return len(questions)


def processed(speaker: Any, conversation: Conversation, *, prompt: bool = True) -> Any:
    """What the exported processor or tokenizer makes of a conversation, as tensors."""
    return speaker.apply_chat_template(
        _messages(conversation), add_generation_prompt=prompt, tokenize=True, return_dict=True, return_tensors="pt"
    )


def processed_batch(speaker: Any, conversations: Sequence[Conversation]) -> Any:
    """The same of several conversations, padded where the export says: on the left, as `generate` needs it."""
    messages = [_messages(conversation) for conversation in conversations]
    seeing = isinstance(speaker, ProcessorMixin)
    padding: Any = {"processor_kwargs": {"padding": True}} if seeing else {"padding": True}
    return speaker.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **padding
    )


def rendered(saved: Saved, conversation: Conversation) -> tuple[np.ndarray, list[Tensor]]:
    """The ids that inference sends, and the fitted pictures, by our own renderer."""
    fit = saved.fit
    pixels = [fit.apply(decode(data, "probe")) for data in conversation.pictures] if fit is not None else []
    return _prompt(saved, conversation).ids, pixels


def embed(saved: Saved, conversation: Conversation, ids: np.ndarray, pixels: list[Tensor]) -> Tensor:
    """Input embeddings (1, T, H), by the modules of training."""
    spans = np.asarray(_prompt(saved, conversation).images, np.int32).reshape(-1, 3)
    names = tuple(bytes([number]) for number in range(len(pixels)))
    example = Example(ids, np.full(len(ids), -100, np.int32), spans, 0, "probe", names)
    row = pack([example], pixels, list(names), touch_vision=False)
    return saved.assembly.vlm.embed(row)


def greedy(saved: Saved, embeds: Tensor, new_tokens: int) -> list[int]:
    """The likeliest tokens one after the other, each from the whole sequence anew."""
    language = saved.assembly.vlm.language
    answer: list[int] = []
    for _ in range(new_tokens):
        logits = cast(Any, language)(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] in saved.chat.stop_ids:
            break
        following = cast(nn.Module, language.get_input_embeddings())(torch.tensor([[answer[-1]]]))
        embeds = torch.cat([embeds, following], dim=1)
    return answer


def _prompt(saved: Saved, conversation: Conversation) -> Rendered:
    return saved.chat.prompt(conversation.messages, [saved.image_tokens] * len(conversation.pictures))


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": item.role, "content": _content(item, conversation.pictures)} for item in conversation.messages]


def _content(item: Message, pictures: Sequence[bytes]) -> Any:
    if all(not isinstance(part, ImagePart) for part in item.parts):
        return item.text
    return [
        {"type": "image", "image": Image.open(io.BytesIO(pictures[part.image]))}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": cast(Any, part).text}
        for part in item.parts
    ]


def _check_pixels(ours: Tensor | None, theirs: Tensor | None, here: str) -> None:
    if ours is None and theirs is None:
        return
    shapes = [None if pixels is None else tuple(pixels.shape) for pixels in (ours, theirs)]
    if ours is None or theirs is None or shapes[0] != shapes[1]:
        raise ExportError(f"{here}: the exported processor makes pixels of shape {shapes[1]}, ours are {shapes[0]}")
    if not torch.equal(ours, theirs):
        gap = float((ours - theirs).abs().max())
        raise ExportError(f"{here}: the exported processor makes other pixels (they differ by {gap:.1e})")


def _first_difference(saved: Saved, ours: list[int], theirs: list[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    decode_ids = saved.assembly.tokenizer.decode
    return (
        f"the exported processor gives other ids from position {place} on ({len(theirs)} ids, ours {len(ours)}): "
        f"ours read {decode_ids(ours[place : place + 8])!r}, its {decode_ids(theirs[place : place + 8])!r}; "
        f"use a chat format whose markers are tokens, such as the tokenizer's own (chat: auto) or chatml"
    )
