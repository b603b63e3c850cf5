"""A finished run that answers: the prompt of training, pictures fitted as in training, one batch at a time.

Letters: B conversations, T tokens of the longest prompt, H width of the LLM, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from mmit.config import ConfigError
from mmit.data.cache import cache_folder
from mmit.data.chat import Chat, Rendered
from mmit.data.loader import Rendering
from mmit.data.packing import Example, pack
from mmit.data.sample import SampleError
from mmit.inference.conversation import Asked, Conversation, ImageLike, conversation
from mmit.model.attention import FLASH, use_flash_attention, without_cudnn
from mmit.model.files import file_sha256
from mmit.model.saved import Saved, load_saved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen and when it ends, if the model does not end it."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    """Sample only among the likeliest tokens that together have this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: {self.max_new_tokens}; write at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: {self.temperature}; write 0 (the likeliest answer) or more, such as 0.7")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p}; write more than 0 and at most 1")


def load(
    run: Path | str,
    *,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto",
    cache: Path | None = None,
) -> Model:
    """The model of a run directory or its `final/`, ready to answer. ConfigError says what is missing.

    `auto` means a GPU and bf16 where there is one, else the CPU and fp32. `cache` is where hashes of weights are
    remembered; None: $MMIT_CACHE or ~/.cache/mmit.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        # Without emulation, by which torch answers for older GPUs too: fp32 is quicker there.
        able = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if able else "fp32"
    place = _place(device)
    cache = cache if cache is not None else cache_folder(None)
    saved = load_saved(Path(run), cache=cache)
    with _memory_told():
        return Model(saved, run=Path(run), cache=cache, device=place, dtype=DTYPES[precision])


def _place(device: str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device: {device} is none; write auto, cpu, cuda, or cuda:1 for the second GPU") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {device}, but torch sees no GPU (its driver, or a build for CPUs); write auto or cpu"
        )
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {device}, but torch sees {torch.cuda.device_count()} GPUs, counted from 0")
    return place


@contextmanager
def _memory_told() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the memory of the GPU is full ({str(error).partition('.')[0]}); ask fewer questions at a time (batch "
            f"size), for fewer new tokens, or on the CPU (device: cpu, or an empty CUDA_VISIBLE_DEVICES)"
        ) from error


class Model:
    """A loaded run. `saved` holds its parts; `answer` and `answers` are what it is for."""

    def __init__(self, saved: Saved, *, run: Path, cache: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.saved, self.run, self.cache, self.device = saved, run, cache, device
        self.vlm = saved.assembly.vlm
        self.vlm.requires_grad_(False).eval()
        for parameter in self.vlm.parameters():
            parameter.data = parameter.data.to(dtype)
        # Buffers keep their precision as in training: rotary frequencies in bf16 would misplace distant tokens.
        for buffer in self.vlm.buffers():
            if buffer.is_floating_point() and dtype == torch.float64:
                buffer.data = buffer.data.to(dtype)
        self.vlm.to(device)
        # Whoever asked for flash attention by name did so for the training, on another machine perhaps.
        wanted = str(saved.record["model"]["attention"])
        use_flash_attention(
            self.vlm.language, "auto" if wanted == FLASH else wanted, device, bf16=dtype == torch.bfloat16
        )
        # The defaults that came with pretrained weights (a repetition penalty, a top-k, other end tokens) would be
        # merged into every request for greedy decoding, silently.
        self.vlm.language.generation_config = GenerationConfig()
        self.rendering = Rendering(
            saved.chat, saved.fit, saved.image_tokens, max_tokens=saved.record["max_tokens"], over_long="cut"
        )

    @property
    def chat(self) -> Chat:
        return self.saved.chat

    @property
    def notes(self) -> list[str]:
        """What a user should know before believing an answer."""
        if not self.chat.format.pictures_only:
            return []
        return [
            f"stage {self.saved.record['stage']} ended this run with the chat format {self.chat.format.name}: the "
            f"model captions pictures, and the text of a prompt is not shown to it"
        ]

    def fingerprint(self) -> str:
        """Names the weights, parts and formats that answer."""
        folder = self.run if (self.run / "model.json").exists() else self.run / "final"
        described = json.dumps(self.saved.record, sort_keys=True) + file_sha256(
            folder / "model.safetensors", self.cache
        )
        return hashlib.sha256(described.encode()).hexdigest()

    def answer(
        self,
        messages: Asked,
        images: ImageLike | Sequence[ImageLike] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The answer to a conversation (see `mmit.inference.conversation`); before a bare string `images` are shown."""
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        return self.chat.decode(self.generate([conversation(messages, images)], sampling)[0])

    def answers(
        self,
        conversations: Sequence[Asked],
        *,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """The answer to each conversation, in order, computed `batch_size` at a time."""
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size}; write at least 1")
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        asked = [conversation(item, where=f"conversation {number}") for number, item in enumerate(conversations)]
        found: list[str] = []
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            found += [self.chat.decode(ids) for ids in self.generate(batch, sampling, first=start)]
        return found

    def prompt(self, asked: Conversation) -> Rendered:
        """The ids that the model is sent: those with which training on this conversation would begin."""
        if asked.pictures and self.rendering.fit is None:
            raise SampleError(
                f"{asked.where}: shows {len(asked.pictures)} pictures, but this run reads only text (model.vision is "
                f"null); ask without pictures, or a run with a vision tower"
            )
        pictures = [shown.picture for shown in asked.pictures]
        tokens = [self.rendering.image_tokens] * len(pictures)
        try:
            return self.chat.prompt(asked.messages, tokens, boxes=lambda part: self.rendering._box(part, pictures))
        except SampleError as error:
            raise SampleError(str(error) if asked.where == "prompt" else f"{asked.where}: {error}") from None

    def check(self, asked: Conversation, sampling: Sampling) -> None:
        """SampleError if it cannot be asked: a picture too many, or more tokens than the language model reads."""
        self._check_length(asked, self.prompt(asked), sampling)

    @torch.no_grad()
    @without_cudnn()
    @_memory_told()
    def generate(self, asked: Sequence[Conversation], sampling: Sampling, *, first: int = 0) -> list[list[int]]:
        """The new ids of each conversation up to and with its end, all computed as one batch.

        What is drawn depends on the seed and on the number of the conversation (counted from `first`), and not on its
        neighbours in the batch.
        """
        prompts = [self.prompt(item) for item in asked]
        for item, prompt in zip(asked, prompts, strict=True):
            self._check_length(item, prompt, sampling)
        embeds, mask = _padded_left(self._embeds(asked, prompts), [len(prompt) for prompt in prompts])
        stops = self.chat.stop_ids
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=list(stops) or None,
            # What stands behind the end of a shorter answer; never read, so a tokenizer needs no pad token.
            pad_token_id=stops[0] if stops else 0,
        )
        processors = LogitsProcessorList()
        if sampling.temperature > 0:
            processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(float(sampling.top_p)))
            processors.append(Draw([_seed(sampling.seed, first + number) for number in range(len(asked))]))
        criteria = StoppingCriteriaList([StopText(self.chat)] if self.chat.stop_text else [])
        # `generate` counts the positions from the mask. It takes no ids, so what it returns is new tokens only.
        new = cast(Any, self.vlm.language).generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=processors,
            stopping_criteria=criteria,
        )
        return [_ended(ids, self.chat) for ids in new.tolist()]

    def _embeds(self, asked: Sequence[Conversation], prompts: Sequence[Rendered]) -> Tensor:
        """The prompts' embeddings (1, sum of lengths, H), one after the other; each picture is encoded once."""
        examples, pixels = [], {}
        for item, prompt in zip(asked, prompts, strict=True):
            identities = [self.rendering.identity(shown.picture) for shown in item.pictures]
            for number in dict.fromkeys(picture for _, _, picture in prompt.images):
                if identities[number] not in pixels:
                    assert self.rendering.fit is not None
                    decoded = item.pictures[number].decoded(item.where)
                    pixels[identities[number]] = self.rendering.fit.apply(decoded, where=item.where)
            spans = np.asarray(prompt.images, dtype=np.int32).reshape(-1, 3)
            examples.append(Example(prompt.ids, prompt.labels, spans, 0, item.where, tuple(identities)))
        row = pack(examples, list(pixels.values()), list(pixels), touch_vision=False)
        return self.vlm.embed(row.to(self.device))

    def _check_length(self, asked: Conversation, prompt: Rendered, sampling: Sampling) -> None:
        config = self.vlm.language.config
        name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        context = config.to_dict().get(name)
        if context is not None and len(prompt) + sampling.max_new_tokens > context:
            raise SampleError(
                f"{asked.where}: the prompt has {len(prompt)} tokens and {sampling.max_new_tokens} may follow, but the "
                f"language model reads {context} in all; shorten the conversation, or ask for fewer new tokens"
            )


class Draw(LogitsProcessor):
    """Makes the largest score a draw from softmax(scores): the maximum of score + Gumbel noise (Gumbel 1954).

    Each conversation has its own generator, which torch.multinomial over a batch cannot have: its answer is then the
    same whichever batch it is in, also when a run over a file is interrupted and goes on.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self.generators]
        return scores - torch.stack(drawn).log().to(scores.device)


class StopText(StoppingCriteria):
    """Ends an answer at a stop marker that is plain text, as `Chat.decode` finds it."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        # No character has more than 4 bytes, no token less than one: the marker lies within the last so many tokens.
        self.window = 4 * len(chat.stop_text) + 4

    def __call__(
        self, input_ids: torch.LongTensor, scores: tuple[Tensor] | None = None, **kwargs: Any
    ) -> torch.BoolTensor:
        ended = [self.ends(ids) for ids in input_ids[:, -self.window :].tolist()]
        return cast(torch.BoolTensor, torch.tensor(ended, device=input_ids.device))

    def ends(self, ids: Sequence[int]) -> bool:
        return self.chat.stop_text in self.chat.text.decode(ids[-self.window :])


def _padded_left(embeds: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, H) with zeros before the shorter prompts, and the mask (B, T) that is 1 on prompts.

    By length and not by a pad id: a prompt may hold any id, and a tokenizer need not have that one.
    """
    longest = max(lengths)
    padded = embeds.new_zeros(len(lengths), longest, embeds.shape[-1])
    mask = torch.zeros(len(lengths), longest, dtype=torch.int64, device=embeds.device)
    for number, prompt in enumerate(embeds[0].split(list(lengths))):
        padded[number, longest - len(prompt) :] = prompt
        mask[number, longest - len(prompt) :] = 1
    return padded, mask


def _ended(ids: list[int], chat: Chat) -> list[int]:
    """Up to and with the stop marker; what follows fills the batch."""
    text = StopText(chat)
    ends = (
        place
        for place, number in enumerate(ids, 1)
        if number in chat.stop_ids or (chat.stop_text and text.ends(ids[:place]))
    )
    return ids[: next(ends, len(ids))]


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"answer {seed} {number}".encode()).digest()[:7], "little")
