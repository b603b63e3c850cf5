"""Answers against what was expected, as the benchmarks count them."""

from __future__ import annotations

from collections.abc import Sequence


def exact_match(answer: str, expected: str) -> bool:
    """Strict: the same text but for whitespace at the edges."""
    return answer.strip() == expected.strip()


def vqa_accuracy(answer: str, expected: Sequence[str]) -> float:
    """VQA accuracy against the answers of several people, 0 to 1: min(people who said the same / 3, 1).

    As VQA v2 is scored (Antol et al. 2015, arXiv:1505.00468; https://visualqa.org/evaluation.html), that is averaged
    over leaving each of the (ten) people out. The benchmark also rewrites articles, numbers and punctuation before
    comparing; here texts are compared as they are, edge whitespace aside.
    """
    if not expected:
        raise ValueError("vqa_accuracy: no expected answers; give those of all people, usually ten")
    same = [exact_match(answer, other) for other in expected]
    return sum(min((sum(same) - own) / 3, 1.0) for own in same) / len(same)


def accuracy(correct: Sequence[bool]) -> float:
    """The share that is right."""
    if not correct:
        raise ValueError("accuracy: nothing was answered; give at least one question")
    return sum(correct) / len(correct)
