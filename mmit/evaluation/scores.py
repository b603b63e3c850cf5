"""Answers against what was expected, as the benchmarks count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from mmit.config import imported

Metric = Callable[[str, str], float]
"""The score, 0 to 1, of an answer beside what was expected."""


def exact_match(answer: str, expected: str) -> bool:
    """Strict: the same text but for whitespace at the edges."""
    return answer.strip() == expected.strip()


def token_f1(answer: str, expected: str) -> float:
    """Harmonic mean of precision and recall of the words of an answer, for free text.

    As SQuAD is scored (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1), but that case counts and no word is left
    out.
    """
    said, wanted = answer.split(), expected.split()
    if not said or not wanted:
        return float(said == wanted)
    return 2 * sum((Counter(said) & Counter(wanted)).values()) / (len(said) + len(wanted))


METRICS: dict[str, Metric] = {"exact_match": exact_match, "token_f1": token_f1}


def metric_of(name: str) -> Metric:
    """One of METRICS, or `package.module:Name` called with an answer and what was expected."""
    return METRICS[name] if name in METRICS else imported(name, "eval.metric", METRICS)


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
