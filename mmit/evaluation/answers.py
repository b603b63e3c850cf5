"""A model asked what the samples of a set ask, and its answers held against theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mmit.data.sample import ImagePart, Message, Part, Sample, TextPart, image_indices, message
from mmit.evaluation.scores import exact_match
from mmit.inference.conversation import Conversation, Shown
from mmit.inference.generate import Model, Sampling

Kind = Literal["yes_no", "open"]


@dataclass(frozen=True)
class Answered:
    """One question of a sample, what was expected and what the model said."""

    where: str
    """`source:key`."""
    question: str
    expected: str
    answer: str
    correct: bool
    """As the texts of `exact_match`."""
    kind: Kind
    """`yes_no` when yes or no is expected: guessing gets far there, and little elsewhere."""
    tokens: tuple[int, ...]
    """The answer's, up to and with its end."""


def evaluate_answers(
    model: Model,
    samples: Iterable[Sample],
    *,
    history: bool = False,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Callable[[Answered], None] = lambda answered: None,
) -> list[Answered]:
    """Asks each turn of `samples` (read with their pictures) whose answer is learned, and compares, greedily decoded.

    Each question is asked alone, after the system text and the pictures shown so far: in a conversation, one answer
    can tell another. With `history`, the turns before it stand before it, with the sample's own answers.
    """
    found: list[Answered] = []
    for batch in _batches(questions(samples, history=history), batch_size):
        said = model.generate([asked for asked, _ in batch], Sampling(max_new_tokens))
        for (asked, expected), tokens in zip(batch, said, strict=True):
            question, answer = asked.messages[-1].text.strip(), model.chat.decode(tokens)
            kind: Kind = "yes_no" if expected.strip().lower() in ("yes", "no") else "open"
            right = exact_match(answer, expected)
            texts = question, expected.strip(), answer.strip()
            found.append(Answered(asked.where, *texts, right, kind, tuple(tokens)))
            progress(found[-1])
    return found


def questions(samples: Iterable[Sample], *, history: bool = False) -> Iterator[tuple[Conversation, str]]:
    """Each question of the samples as a conversation, with the answer that is expected; a conversation may begin with
    an answer, which nothing asks for."""
    for sample in samples:
        where = f"{sample.source}:{sample.key}"
        pictures = tuple(Shown(picture) for picture in sample.images)
        before: list[Message] = []
        for item in sample.messages:
            follows_question = bool(before) and before[-1].role not in ("assistant", "system")
            if item.role == "assistant" and item.train and follows_question:
                asked = tuple(before) if history else _alone(before)
                yield Conversation(asked, pictures, where), item.text
            before.append(item)


def _alone(before: Sequence[Message]) -> tuple[Message, ...]:
    """The last message as the first of a conversation: pictures that were shown earlier come first.

    Where the sample has a newline between its first picture and the text, it gets one here as well.
    """
    *earlier, last = before
    system = tuple(item for item in earlier if item.role == "system")
    spoken = [item for item in earlier if item.role == "user"]
    own = {number for part in last.parts for number in image_indices(part)}
    shown = dict.fromkeys(number for item in spoken for part in item.parts for number in image_indices(part))
    pictures: list[Part] = [ImagePart(number) for number in shown if number not in own]
    if not pictures:
        return (*system, last)
    separated = any(isinstance(part, TextPart) and part.text.startswith("\n") for part in spoken[0].parts)
    starts = any(isinstance(part, TextPart) and part.text.startswith("\n") for part in last.parts[:1])
    newline: list[Part] = [TextPart("\n")] if separated and not starts else []
    return (*system, message(last.role, *pictures, *newline, *last.parts))


def _batches(asked: Iterable[tuple[Conversation, str]], size: int) -> Iterator[Sequence[tuple[Conversation, str]]]:
    batch: list[tuple[Conversation, str]] = []
    for item in asked:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
