"""What every step must pass: finite numbers, a gradient for what is declared trained, few enough samples skipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmit.config import ConfigError, Stage
from mmit.data.loader import Hole, Step
from mmit.data.packing import Row
from mmit.data.sample import SampleError
from mmit.model.build import Assembly, vocabulary_parameters
from mmit.model.vlm import embedding_table
from mmit.training import parallel
from mmit.training.parallel import whole
from mmit.training.stage import RunningStage


def finite_norm(optimizer: torch.optim.Optimizer, sums: Tensor, step: Step, stage: Stage) -> float:
    """Clips the gradient and returns its norm; FloatingPointError, before any update, if loss or norm is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    limit = stage.clip if stage.clip is not None else float("inf")
    norm = float(whole(nn.utils.clip_grad_norm_(parameters, limit))) if parameters else 0.0
    if not (torch.isfinite(sums).all() and norm < float("inf")):
        samples = ", ".join(where for row in step.rows for where in row.samples)
        raise FloatingPointError(
            f"stage {stage.name}, step {step.number + 1}: loss or gradient is not finite (norm {norm}); nothing was "
            f"updated. Its samples: {samples}. Lower the learning rate, or look at them with `mmit-data show`"
        )
    return norm


class Gradients:
    """Fails the run if what is declared trained gets no gradient within two steps that could give it one."""

    def __init__(self, assembly: Assembly, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        trained = [(name, p) for name, p in assembly.vlm.named_parameters() if p.requires_grad]
        self._waiting = dict(trained)
        language = assembly.vlm.language
        if assembly.lora is not None and assembly.added_tokens and len(vocabulary_parameters(language)) > 1:
            # Of the embeddings only the rows of added tokens train then, and no step needs to hold one of those. A tied
            # table gets a gradient as the head.
            table = embedding_table(language)
            self._waiting = {name: parameter for name, parameter in trained if parameter is not table}
        self._chances = {"text": 0, "picture": 0}

    def check(self, step: Step) -> None:
        if not self._waiting:
            return
        learned = any(len(row.predicts) for row in step.rows)
        seen = any(_learns_from_pictures(row) for row in step.rows)
        learned, seen = parallel.agreed(self._accelerator, learned, seen)
        self._chances["text"] += bool(learned)
        self._chances["picture"] += bool(seen)
        for name in [name for name, p in self._waiting.items() if p.grad is not None and bool(whole(p.grad).any())]:
            del self._waiting[name]
        late = [
            name for name in self._waiting if self._chances["text" if name.startswith("language.") else "picture"] >= 2
        ]
        if late:
            raise ConfigError(
                f"train: {len(late)} parameters are declared trained but got no gradient in two steps "
                f"({', '.join(late[:3])}{', ...' if len(late) > 3 else ''}); take their part out of `train`, or this "
                f"is a model whose forward pass does not use them"
            )


def _learns_from_pictures(row: Row) -> bool:
    """Whether a supervised token follows a picture of its own sample."""
    shown = row.is_image[0].cumsum(0)
    sample = torch.bucketize(row.predicts, row.boundaries[1:-1], right=True)
    before = (shown - row.is_image[0].long())[row.boundaries[:-1].long()]
    return bool((shown[row.predicts] > before[sample]).any())


def count_skipped(at: RunningStage, step: Step) -> list[Hole]:
    """The holes of the step over all ranks. SampleError once too many samples could not be read."""
    holes = of_all_ranks(at, step.holes)
    progress, settings = at.progress, at.settings
    samples = step.samples + len(step.holes) - sum(hole.kind == "long" for hole in step.holes)
    bad = [hole for hole in holes if hole.kind == "bad"]
    progress.seen += samples
    progress.skipped += len(bad)
    progress.skipped_in_a_row = progress.skipped_in_a_row + len(bad) if len(bad) == samples else 0
    many = progress.seen >= 100 and progress.skipped > settings.max_skipped * progress.seen
    if many or progress.skipped_in_a_row >= 100:
        at.log.holes(step.number + 1, holes)
        raise SampleError(
            f"stage {settings.name}, step {step.number + 1}: {progress.skipped} of {progress.seen} samples could not "
            f"be read, {progress.skipped_in_a_row} in a row, and max_skipped is {settings.max_skipped:g}. "
            + (f"The last: {bad[-1].reason}. " if bad else "")
            + f"All are in {at.run.folder / 'skipped.jsonl'}; mend them (`mmit-data verify` lists all faults) or raise "
            f"stages.{settings.name}.max_skipped"
        )
    return holes


def of_all_ranks(at: RunningStage, holes: Sequence[Hole]) -> list[Hole]:
    """Those that every rank knows, and those that one alone has met while decoding its pictures."""
    if at.settings.on_bad_sample == "raise":  # it would have ended the run
        return list(holes)
    found = [hole for hole in holes if not hole.here]
    for own in parallel.gathered(at.accelerator, [hole for hole in holes if hole.here]):
        found += own
    return found
