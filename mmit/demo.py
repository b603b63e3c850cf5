"""`mmit demo`: real parts, two stages, held-out questions, and what to do next. All of it is the ordinary machinery."""

from __future__ import annotations

import json
import resource
import shlex
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmit import api, demo_parts
from mmit.config import Config, Source, load_config, recipes
from mmit.data.cache import cache_folder
from mmit.data.order import permutation
from mmit.data.sample import ImagePart, Sample, message
from mmit.data.shards import ShardSet
from mmit.evaluation.answers import Answered, evaluate_answers
from mmit.evaluation.answers import questions as questions_of
from mmit.evaluation.pictures import answer_grid, loss_plot
from mmit.evaluation.scores import accuracy
from mmit.export.verify import Answers
from mmit.export.verify import Conversation as Compared
from mmit.export.write import export
from mmit.inference.conversation import Conversation
from mmit.inference.generate import Model, load
from mmit.model.saved import untrained

OPEN_QUESTIONS = 450
YES_NO_QUESTIONS = 200
SHOWN = 8
NEW_TOKENS, BATCH = 8, 32
LOGITS_COMPARED = 40
"""Of the held-out questions; the tokens of the answers are compared of all."""


def demo(out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains `configs/demo.yaml` in `out`, answers questions of easy-VQA's own test split, returns result.json."""
    console, started = Console(highlight=False, soft_wrap=not sys.stdout.isatty()), time.monotonic()
    recipe, parts = recipes() / "demo.yaml", out / "parts"
    load_config(recipe, overrides)  # a fault in them is told before anything is fetched
    console.print("[bold]1/4[/] parts: SmolLM2-135M-Instruct, DINOv2-small and easy-VQA (once; some 190 MB)")
    language = demo_parts.language(parts, say=console.print)
    vision = demo_parts.vision(parts, say=console.print)
    questions = demo_parts.easy_vqa(parts, say=console.print)

    config = load_config(recipe, [*_places(out, language, vision, questions), *overrides])
    console.print("[bold]2/4[/] training: the projector is aligned, then projector and language model learn to answer")
    training_started = time.monotonic()
    run = api.train(config).parent
    training_seconds = time.monotonic() - training_started

    console.print("[bold]3/4[/] questions about pictures that were never shown in training")
    cache = cache_folder(config.cache)
    test = _questions(questions, "test", cache)
    samples = _chosen(test, OPEN_QUESTIONS, YES_NO_QUESTIONS)
    model = load(run, device="cpu", cache=cache)  # in fp32, as transformers is to repeat the answers to the token
    answered = evaluate_answers(model, samples, max_new_tokens=NEW_TOKENS, batch_size=BATCH)
    shown = [replace(sample, messages=sample.messages[:4]) for sample in samples[:SHOWN]]
    before = _before(config, model, cache, shown)
    after = evaluate_answers(model, shown, max_new_tokens=NEW_TOKENS, batch_size=BATCH)

    guesses = _guesses(_questions(questions, "train", cache))
    console.print("[bold]4/4[/] export to transformers, where the held-out questions must get the same tokens")
    shutil.rmtree(out / "export", ignore_errors=True)
    export_started = time.monotonic()
    asked = [_to_compare(question) for question, _ in questions_of(samples)]
    answers = Answers(asked, [item.tokens for item in answered], batch_size=BATCH, max_new_tokens=NEW_TOKENS)
    exported = export(run, out / "export", more=asked[:LOGITS_COMPARED], answers=answers)
    export_seconds = time.monotonic() - export_started
    result = _result(answered, guesses) | {
        "answers_equal_in_export": exported.parity.answers,
        "training_seconds": round(training_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
        "peak_rss_mb": _peak_rss_mb(),
    }
    grid, plot = answer_grid(shown, after, out / "answers.png"), loss_plot(run, out / "loss.png")
    (out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    _report(console, result, before, after)
    told = f"{exported.parity.sentence()}, in {export_seconds:.0f} s"
    console.print(f"{exported.folder}, for transformers: {told}")
    console.print(f"pictures: {grid}, {plot}")
    # A terminal folds a long command itself; folded by us it could not be copied.
    learned = api.with_shards(config).stages[-1].data[0].shards
    console.print(_next_steps(str(learned), run, out), markup=False, soft_wrap=True)
    return result


def _to_compare(asked: Conversation) -> Compared:
    return Compared(asked.messages, tuple(shown.picture.data for shown in asked.pictures if shown.picture.data))


def _places(out: Path, language: Path, vision: Path, questions: Path) -> list[str]:
    return [
        f"output={json.dumps(str(out / 'run'))}",
        f"model.language={json.dumps(str(language))}",
        f"model.vision.name={json.dumps(str(vision))}",
        *(f"stages.{stage}.data.0.easy-vqa={json.dumps(str(questions))}" for stage in ("align", "sft")),
    ]


def _questions(folder: Path, split: str, cache: Path) -> ShardSet:
    from data_tools.convert import converted

    source = Source(format="easy-vqa", path=str(folder), options={"split": split})
    return ShardSet(converted(source, cache))


def _chosen(shards: ShardSet, open_questions: int, yes_no_questions: int) -> list[Sample]:
    """Pictures drawn by a fixed seed, each with its open questions and one with yes or no."""
    chosen: list[Sample] = []
    left = {"open": open_questions, "yes_no": yes_no_questions}
    for index in permutation(len(shards), "demo questions"):
        sample = shards.read(int(index))
        kept, taken = [], Counter[str]()
        for question, answer in zip(sample.messages[::2], sample.messages[1::2], strict=True):
            kind = "yes_no" if answer.text in ("yes", "no") else "open"
            if left[kind] > 0 and (kind == "open" or taken["yes_no"] < 1):
                left[kind] -= 1
                taken[kind] += 1
                picture = () if kept else (ImagePart(0), "\n")
                kept += [message("user", *picture, question.text.strip()), answer]
        if kept:
            chosen.append(replace(sample, messages=tuple(kept)))
        if not any(left.values()):
            break
    return chosen


def _before(config: Config, model: Model, cache: Path, samples: Sequence[Sample]) -> list[Answered]:
    """The same questions to the same parts before any training."""
    saved = untrained(config.model, model.saved, seed=config.seed, cache=cache)
    fresh = Model(saved, run=model.run, cache=cache, device=model.device, dtype=next(model.vlm.parameters()).dtype)
    return evaluate_answers(fresh, samples, max_new_tokens=NEW_TOKENS, batch_size=BATCH)


def _guesses(train: ShardSet) -> dict[str, str]:
    """The likeliest answer to each question in training, without looking at a picture."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(len(train)):
        messages = train.read(index, images=False).messages
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            counts[question.text.strip()][answer.text] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


def _result(answered: Sequence[Answered], guesses: dict[str, str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind in ("open", "yes_no"):
        mine = [item for item in answered if item.kind == kind]
        result[f"questions_{kind}"] = len(mine)
        result[f"accuracy_{kind}"] = round(accuracy([item.correct for item in mine]), 4)
        result[f"guess_{kind}"] = round(accuracy([guesses.get(i.question) == i.expected for i in mine]), 4)
    return result | {"questions": len(answered)}


def _report(console: Console, result: dict[str, Any], before: Sequence[Answered], after: Sequence[Answered]) -> None:
    table = Table(title="before and after", title_justify="left")
    for column in ("question", "right answer", "before training", "after"):
        table.add_column(column)
    for first, then in zip(before, after, strict=True):
        # As Text, since an answer may hold what rich takes for markup.
        shown = Text(then.answer[:40], style="green" if then.correct else "red")
        table.add_row(then.question, then.expected, Text(first.answer[:40]), shown)
    console.print(table)
    for kind, what in (("open", "questions for a colour or shape"), ("yes_no", "questions for yes or no")):
        console.print(
            f"{result[f'questions_{kind}']} {what}: [bold]{result[f'accuracy_{kind}']:.1%}[/] right; "
            f"guessing from the question alone: {result[f'guess_{kind}']:.1%}"
        )
    console.print(f"{result['seconds'] / 60:.1f} minutes in all, {result['peak_rss_mb']} MB of memory")


def _next_steps(shards: str, run: Path, out: Path) -> str:
    picture = out / "parts/easy-vqa/test/images/0.png"
    mine = "stages.sft.data=[{llava: notes.json, images: photos/}]"

    def command(*words: object) -> str:
        return "  " + shlex.join(str(word) for word in words)

    return "\n".join(
        (
            "\nAsk it:",
            command("mmit", "generate", run, "--image", picture, "--prompt", "what is the color of the shape?"),
            "Look at what it learned from, every token coloured by whether it is trained:",
            command("mmit-data", "show", shards, "--run", run),
            "Teach it your own pictures (notes.json in LLaVA's format; `mmit-data formats` lists forty others):",
            command("mmit", "train", run / "config.yaml", "output=runs/mine", mine),
            "The same on a GPU with a model of 7B; the recipe names the data that it needs:",
            command("mmit", "train", recipes() / "llava15_7b_lora.yaml"),
        )
    )


def _peak_rss_mb() -> int:
    """Of this process or its largest child; Linux counts kilobytes, macOS bytes."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak // (2**20 if sys.platform == "darwin" else 2**10)
