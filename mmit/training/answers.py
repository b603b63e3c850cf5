"""Held-out questions that the model answers while a stage trains, greedily, through the forward pass of training.

No keys and values are cached: a model that is sharded over ranks runs from its root alone, and this way every rank
computes the same rows, whatever its language model is. `mmit generate` gives the same tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

from mmit.data.chat import Chat
from mmit.data.loader import Encoder, Steps
from mmit.data.packing import IGNORED, Example, pack
from mmit.evaluation.answers import questions
from mmit.evaluation.scores import Metric
from mmit.inference.generate import StopText
from mmit.training import parallel


@dataclass(frozen=True)
class Question:
    """The first question of a held-out sample whose answer is learned, as a prompt without labels."""

    text: str
    expected: str
    prompt: Example
    pixels: dict[bytes, Tensor]


def held_out_questions(held_out: Steps, count: int) -> list[Question]:
    """The first `count` in the order of the held-out steps: the same ones at every evaluation and on every rank."""
    return list(itertools.islice(_questions(held_out), count))


def answers(
    model: nn.Module,
    asked: Sequence[Question],
    chat: Chat,
    accelerator: Accelerator,
    *,
    row_tokens: int,
    max_new_tokens: int,
    stopping: Callable[[], bool],
) -> list[str] | None:
    """The greedy answer to each question; None once `stopping` says so. Every rank must ask alike."""
    found: list[str] = []
    for group in _rows(asked, row_tokens, max_new_tokens):
        new: list[list[int]] = [[] for _ in group]
        going = list(range(len(group)))
        while going:
            if stopping():
                return None
            scores = _scores(model, [(group[number], new[number]) for number in going], accelerator)
            likeliest = parallel.as_on_main(accelerator, scores.argmax(-1).tolist())
            for number, token in zip(going, likeliest, strict=True):
                new[number].append(token)
            going = [number for number in going if len(new[number]) < max_new_tokens and not _ended(new[number], chat)]
        found += [chat.decode(ids).strip() for ids in new]
    return found


def scored(
    asked: Sequence[Question], answers: Sequence[str], titles: Sequence[str], metric: Metric
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The mean score of each source, and a record of each answer."""
    records: list[dict[str, Any]] = []
    by_source: dict[str, list[float]] = {}
    for question, answer in zip(asked, answers, strict=True):
        score = float(metric(answer, question.expected))
        source = titles[question.prompt.source]
        by_source.setdefault(source, []).append(score)
        record = {"source": source, "sample": question.prompt.where, "question": question.text}
        records.append(record | {"expected": question.expected, "answer": answer, "score": score})
    return {source: sum(scores) / len(scores) for source, scores in by_source.items()}, records


def _questions(held_out: Steps) -> Iterator[Question]:
    for number in range(held_out.order.steps(0)):
        for occurrence in held_out.order.step(number):
            question = held_out.guard(occurrence, _question)
            if isinstance(question, Question):  # a hole is one of the held-out steps too, which tell of it
                yield question


def _question(encoder: Encoder, index: int) -> Question | None:
    """None for a sample that asks nothing, or whose first question alone is too long."""
    rendering, sample = encoder.rendering, encoder.shards.read(index)
    found = next(questions([sample], history=True), None)
    if found is None:
        return None
    asked, expected = found
    tokens = [rendering.image_tokens] * len(sample.images)
    prompt = rendering.chat.prompt(asked.messages, tokens, boxes=lambda part: rendering._box(part, sample.images))
    if len(prompt) > rendering.max_tokens:
        return None
    names = tuple(rendering.identity(picture) for picture in sample.images)
    spans = np.asarray(prompt.images, dtype=np.int32).reshape(-1, 3)
    shown = {names[picture] for picture in spans[:, 2].tolist()}
    example = Example(prompt.ids, prompt.labels, spans, encoder.source, encoder.shards.where(index), names)
    pixels = dict(encoder.pixels(index, shown)) if shown else {}
    return Question(asked.messages[-1].text.strip(), expected.strip(), example, pixels)


def _rows(asked: Sequence[Question], row_tokens: int, answer_tokens: int) -> Iterator[list[Question]]:
    """The questions in order, as many a row as fit with their answers."""
    row: list[Question] = []
    for question in asked:
        if row and sum(len(other.prompt.ids) + answer_tokens for other in [*row, question]) > row_tokens:
            yield row
            row = []
        row.append(question)
    if row:
        yield row


def _scores(model: nn.Module, going: Sequence[tuple[Question, list[int]]], accelerator: Accelerator) -> Tensor:
    """Vocabulary scores `(number of questions, V)` of what comes next in each."""
    examples = [_longer(question.prompt, new) for question, new in going]
    pixels: dict[bytes, Tensor] = {}
    for question, _ in going:
        pixels |= question.pixels
    row = pack(examples, list(pixels.values()), list(pixels), touch_vision=accelerator.num_processes > 1)
    row = replace(row, predicts=row.boundaries[1:].long() - 1)
    with accelerator.autocast():
        return model(row.to(accelerator.device), want="scores")


def _longer(prompt: Example, new: Sequence[int]) -> Example:
    ids = np.concatenate([prompt.ids, np.asarray(new, dtype=prompt.ids.dtype)])
    return replace(prompt, ids=ids, labels=np.full_like(ids, IGNORED))


def _ended(ids: Sequence[int], chat: Chat) -> bool:
    return ids[-1] in chat.stop_ids or bool(chat.stop_text and StopText(chat).ends(ids))
