"""Leave out samples by what can be seen without a model: lengths, turns, wording, language, picture sizes, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_tools.quality.subset import Derived, Progress, Removal, derive, open_set, silent, texts_of
from mmit.config import ConfigError
from mmit.data.sample import Sample

REFUSALS = (
    r"\bas an ai( language)?( model| assistant)?\b",
    r"\bi('m| am) (just |only )?an ai\b",
    r"\bi('m| am) (very |so |really )?(sorry|afraid),? (but )?i (can('|no)t|am (not able|unable)|won't)\b",
    r"\bi (can('|no)t|am (not able|unable) to|won't) (help|assist|comply|fulfil|fulfill|provide|do that|answer)\b",
    r"\bi (can('|no)t|am (not able|unable) to) (see|view|look at|access|open) (the |any |an |your |this )?"
    r"(image|picture|photo|video|attachment)",
    r"\bi (do not|don't) have (the )?(ability|capability) to\b",
    r"\b(against|violates?) (my|our|the) (guidelines|policy|policies|programming)\b",
)
"""Wordings of answers that refuse; English only, searched in the first 300 characters of an answer."""
REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)
REFUSAL_REACH = 300


@dataclass(frozen=True)
class Rules:
    """What a sample must be like to stay; None and empty ask nothing."""

    least_characters: int | None = None
    """Of all texts of the sample together."""
    most_characters: int | None = None
    least_answer: int | None = None
    """Characters of every trained answer."""
    most_answer: int | None = None
    least_turns: int | None = None
    """A turn is an answer of the assistant."""
    most_turns: int | None = None
    user: str | None = None
    """Regular expression that some text of the user must hold."""
    not_user: str | None = None
    """Regular expression that no text of the user may hold."""
    assistant: str | None = None
    not_assistant: str | None = None
    least_side: int | None = None
    """Pixels of the shorter side of every picture."""
    most_side: int | None = None
    """Pixels of the longer side of every picture."""
    most_aspect: float | None = None
    """Longer side through shorter side of every picture."""
    no_refusals: bool = False
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes; the language of the user's and the assistant's texts together is guessed."""


def filter_set(shards: Path, out: Path, rules: Rules, *, progress: Progress = silent) -> Derived:
    """Write the samples that follow all rules; one that breaks several is counted under the first."""
    if rules == Rules():
        raise ConfigError("no rule given: name at least one, such as --least-answer 2 (all: mmit-data filter --help)")
    tests = _tests(rules)
    opened = open_set(shards)

    def decide(work: Path) -> Iterator[Removal]:
        for number, sample in texts_of(opened, progress, "judge"):
            sizes = opened.image_sizes(number)
            for reason, broken in tests:
                found = broken(sample, sizes)
                if found is not None:
                    yield Removal(number, reason, {"found": found})
                    break

    libraries = {"py3langid": version("py3langid")} if rules.languages else {}
    options = {
        name: value for name, value in asdict(rules).items() if value is not None and value is not False and value != ()
    }
    return derive(opened, out, tool="filter", options=options, decide=decide, libraries=libraries, progress=progress)


Sizes = list[tuple[int, int]]
Test = tuple[str, Callable[[Sample, Sizes], Any]]
"""A reason, and what breaks the rule: None if nothing does."""


def _tests(rules: Rules) -> list[Test]:
    tests: list[Test] = [
        *_bounds("characters", rules.least_characters, rules.most_characters, lambda s, _: [_characters(s)]),
        *_bounds("answer", rules.least_answer, rules.most_answer, lambda s, _: [len(t) for t in _answers(s)]),
        *_bounds("turns", rules.least_turns, rules.most_turns, lambda s, _: [len(_said(s, "assistant"))]),
        *_bounds("side", rules.least_side, None, lambda _, sizes: [min(size) for size in sizes]),
        *_bounds("side", None, rules.most_side, lambda _, sizes: [max(size) for size in sizes]),
        *_bounds("aspect", None, rules.most_aspect, lambda _, sizes: [round(max(s) / min(s), 3) for s in sizes]),
    ]
    for name, role, pattern, wanted in (
        ("user", "user", rules.user, True),
        ("not_user", "user", rules.not_user, False),
        ("assistant", "assistant", rules.assistant, True),
        ("not_assistant", "assistant", rules.not_assistant, False),
    ):
        if pattern is not None:
            tests.append((name, _wording(name, role, pattern, wanted)))
    if rules.no_refusals:
        tests.append(("refusal", lambda sample, _: refusal(sample)))
    if rules.languages:
        tests.append(("language", _language(rules.languages)))
    return tests


def _bounds(name: str, least: float | None, most: float | None, measure: Callable[[Sample, Sizes], list]) -> list[Test]:
    if least is not None and most is not None and least > most:
        raise ConfigError(f"least {name} {least} is more than most {name} {most}: nothing can follow both")
    tests: list[Test] = []
    if least is not None:
        tests.append((f"least_{name}", lambda s, sizes: next((v for v in measure(s, sizes) if v < least), None)))
    if most is not None:
        tests.append((f"most_{name}", lambda s, sizes: next((v for v in measure(s, sizes) if v > most), None)))
    return tests


def _said(sample: Sample, role: str) -> list[str]:
    return [item.text for item in sample.messages if item.role == role]


def _answers(sample: Sample) -> list[str]:
    return [item.text for item in sample.messages if item.train]


def _characters(sample: Sample) -> int:
    return sum(len(item.text) for item in sample.messages)


def _wording(name: str, role: str, pattern: str, wanted: bool) -> Callable[[Sample, Sizes], str | None]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--{name.replace('_', '-')} {pattern!r}: no regular expression ({error})") from None

    def broken(sample: Sample, sizes: Sizes) -> str | None:
        match = next((found for text in _said(sample, role) if (found := expression.search(text))), None)
        if wanted:
            return None if match else "not found"
        return match.group()[:100] if match else None

    return broken


def refusal(sample: Sample) -> str | None:
    """The words by which an answer of the sample refuses."""
    for text in _said(sample, "assistant"):
        found = REFUSAL.search(text[:REFUSAL_REACH].replace("’", "'"))
        if found:
            return found.group()
    return None


def _language(wanted: tuple[str, ...]) -> Callable[[Sample, Sizes], str | None]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError("--language needs py3langid; pip install 'mmit[quality]'") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    unknown = sorted(set(wanted) - set(identifier.labels))
    if unknown:
        raise ConfigError(
            f"--language {', '.join(unknown)}: not known; write codes out of {', '.join(sorted(identifier.labels))}"
        )

    def broken(sample: Sample, sizes: Sizes) -> str | None:
        text = "\n".join(item.text for item in sample.messages if item.role in ("user", "assistant"))
        guess = str(identifier.classify(text)[0])
        return None if guess in wanted else guess

    return broken
