"""Training, stage by stage: the loop.

A step is a set of samples, and its loss the sum of its token losses over the number of its supervised tokens, whatever
the rows, micro-steps and ranks that compute it. A stage starts from the finished checkpoint of the one before, in a
straight run as after a kill, and the state of a running stage is its checkpoint and the number of its step.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, overload

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmit.config import Config, ConfigError, Stage
from mmit.data.cache import cache_folder
from mmit.data.loader import Hole, Step, load
from mmit.data.packing import Row
from mmit.data.sample import SampleError
from mmit.model.build import Assembly, set_modes, set_trained
from mmit.model.probes import chunk_for, probe_head, probe_isolation
from mmit.training import faults, parallel, state
from mmit.training.data import StageData, open_stage, too_long
from mmit.training.optim import build_optimizer, set_rates
from mmit.training.parallel import whole
from mmit.training.run import NOTHING_LOST, Interrupted, RunDirectory, StopFlag, under_torchrun
from mmit.training.runlog import RunLog
from mmit.training.start import initialise_projector, table_of_parts
from mmit.training.state import Progress


def train(config: Config, *, asked: str, check_memory: bool = False) -> Path:
    """Runs, or goes on with, what `config.output` names; returns its `final/`.

    Every source must be shards by now; `asked` is the YAML the user asked for, which the run directory keeps. With
    `check_memory` each stage computes its longest step first.

    Raises ConfigError or SampleError for faults of the input, Interrupted once an interrupted run is saved.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run, stop = RunDirectory(Path(config.output)), StopFlag()
    accelerator = parallel.start(config)
    with ExitStack() as held:
        held.enter_context(stop.listening())
        parallel.on_main(accelerator, lambda: (held.enter_context(run.locked()), run.begin(asked)))
        try:
            for number in range(_stage_to_go_on_with(config, run), len(config.stages)):
                _train_stage(config, number, run, accelerator, stop, check_memory=check_memory)
        except Interrupted as interrupted:
            if accelerator.is_main_process and under_torchrun():
                run.preempted.write_text(f"{interrupted}\n", encoding="utf-8")
            raise
        parallel.on_main(accelerator, lambda: state.finish(config, run))
    return run.final


def _stage_to_go_on_with(config: Config, run: RunDirectory) -> int:
    """The first stage that is not finished; whatever became of its files, one that a later stage went on from is."""
    for number in reversed(range(len(config.stages))):
        found = run.newest(config.stages[number].name)
        if found is not None:
            return number + found.finished
    return 0


@dataclass
class _Stage:
    """A stage on its way: what every step of it needs."""

    config: Config
    number: int
    run: RunDirectory
    accelerator: Accelerator
    stop: StopFlag
    assembly: Assembly
    data: StageData
    model: nn.Module
    """The assembly's, spread over ranks."""
    optimizer: torch.optim.Optimizer
    progress: Progress
    log: RunLog
    saving: float = 0.0
    """Seconds."""

    @property
    def settings(self) -> Stage:
        return self.config.stages[self.number]

    def stopping(self) -> bool:
        """Whether a rank was asked to stop; every rank must ask."""
        return bool(parallel.agreed(self.accelerator, self.stop.set)[0])


def _train_stage(
    config: Config, number: int, run: RunDirectory, accelerator: Accelerator, stop: StopFlag, *, check_memory: bool
) -> None:
    with stop.at_once(accelerator.num_processes == 1), ExitStack() as held:
        at = _prepare(config, number, run, accelerator, stop, held)
        held = held.pop_all()
    with held:
        if at.stopping():
            raise Interrupted(NOTHING_LOST)
        if check_memory:
            faults.check_memory(at.data, at.accelerator, at.log, lambda step: _gradients(at, step, lambda: False))
            at.optimizer.zero_grad(set_to_none=True)
        reached = Gradients(at.assembly)
        began = time.monotonic()
        if at.progress.evaluation_due:
            _evaluate_and_save(at)
        clock = time.monotonic()
        for step in _steps(at.data, at.progress.done, config.workers):
            holes = _count_skipped(at, step)
            losses = _gradients(at, step, at.stopping)
            if losses is None:
                _save_and_stop(at)
            norm = _update(at, step, losses)
            if norm is not None:
                reached.check(step)
            at.optimizer.zero_grad(set_to_none=True)
            at.progress.done += 1
            record = _record(at.settings, step, losses, at.data, holes)
            record |= {"grad_norm": norm, "seconds": round(time.monotonic() - clock, 4)}
            record["lr"] = {group["name"]: group["lr"] for group in at.optimizer.param_groups}
            at.log.step(record, holes)
            at.progress.evaluation_due = _evaluates_now(config, at.data, at.progress.done)
            _evaluate_and_save(at)
            clock = time.monotonic()
        _say_cost(at, time.monotonic() - began)


def _prepare(
    config: Config, number: int, run: RunDirectory, accelerator: Accelerator, stop: StopFlag, held: ExitStack
) -> _Stage:
    """The stage ready for its next step: model, data and optimizer as its newest checkpoint left them, and its log."""
    stage, device = config.stages[number], accelerator.device
    cache = cache_folder(config.cache)
    resumed = run.newest(stage.name)
    assembly = state.start(config, number, run, resumed, cache)
    data = open_stage(
        config,
        stage,
        assembly,
        cache=cache,
        on_cuda=device.type == "cuda",
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    if resumed is None and number == 0:
        initialise_projector(config, assembly, data.training)
    trained, frozen = dtypes(config, device)
    set_trained(assembly, stage.train, trained_dtype=trained, frozen_dtype=frozen)
    set_modes(assembly, stage.train, gradient_checkpointing=stage.gradient_checkpointing)
    table = table_of_parts(config, stage, assembly, data)  # whose probes need the parameters whole
    model = parallel.spread(assembly.vlm, config.parallel, accelerator, offload=config.offload)
    optimizer = build_optimizer(assembly, stage)
    progress = state.resume(assembly, optimizer, resumed, data) if resumed is not None else Progress()
    with accelerator.autocast():
        probe_isolation(assembly.vlm, device, through=model)
        assembly.vlm.chunk = chunk_for(assembly.vlm) if probe_head(assembly.vlm, device, through=model) else None
    parallel.reshard(model)
    parallel.on_main(accelerator, lambda: state.check_space(config, run, assembly, optimizer))
    log = RunLog(
        run.folder,
        stage.name,
        total=data.total,
        start=progress.done,
        active=accelerator.is_main_process,
        trackers=config.trackers,
    )
    held.enter_context(log)
    log.say(table)
    for line in too_long(data.training, data.titles) if progress.done == 0 else ():
        log.say(line)
    if progress.done:
        log.say(f"{stage.name}: going on after step {progress.done}")
    return _Stage(config, number, run, accelerator, stop, assembly, data, model, optimizer, progress, log)


def _gradients(at: _Stage, step: Step, stopping: Callable[[], bool]) -> Tensor | None:
    """`_forward_backward`, or None once a rank was asked to stop; ConfigError for a step that memory cannot hold."""
    (supervised,) = parallel.agreed(at.accelerator, step.supervised)
    set_rates(at.optimizer, at.settings, step.number, at.data.total)
    try:
        return _forward_backward(
            at.config, at.model, step, supervised, at.accelerator, len(at.data.titles), stopping=stopping
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(faults.out_of_memory(at.config, at.settings, step)) from error


def _update(at: _Stage, step: Step, losses: Tensor) -> float | None:
    """The optimizer's step. Returns the gradient's norm, None where it is not finite and the stage passes over that."""
    try:
        norm = _finite_norm(at.optimizer, losses, step, at.settings)
    except FloatingPointError as error:
        at.optimizer.zero_grad(set_to_none=True)
        if at.progress.nonfinite_in_a_row < at.settings.skip_nonfinite:
            at.progress.nonfinite_in_a_row += 1
            at.log.say(str(error))
            return None
        folder = at.run.folder / f"fault-step-{step.number + 1}"
        texts = faults.texts(at.config, at.number, step, at.accelerator, str(error))
        state.write(
            folder, at.config, at.number, at.assembly, at.optimizer, at.data, at.progress, at.accelerator, texts=texts
        )
        raise FloatingPointError(f"{error}\nThe state before it is kept: mmit replay {folder}") from None
    at.progress.nonfinite_in_a_row = 0
    at.optimizer.step()
    return norm


def _count_skipped(at: _Stage, step: Step) -> list[Hole]:
    """The holes of the step over all ranks. SampleError once too many samples could not be read."""
    holes = [hole for hole in step.holes if not hole.here]
    own = [hole for hole in step.holes if hole.here]
    for found in parallel.gathered(at.accelerator, own):
        holes += found
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


def _evaluates_now(config: Config, data: StageData, done: int) -> bool:
    return (
        data.held_out is not None and config.eval is not None and (done == data.total or done % config.eval.every == 0)
    )


def _evaluate_and_save(at: _Stage) -> None:
    """What is due after a step: an evaluation, a checkpoint. Interrupted once a rank was asked to stop."""
    progress, settings = at.progress, at.settings
    best = False
    if progress.evaluation_due:
        record = _evaluate(at)
        if record is None:
            _save_and_stop(at)
        at.log.evaluation(record)
        progress.evaluation_due = False
        assert at.config.eval is not None
        if at.config.eval.keep_best and record["loss"] < progress.best_loss:
            progress.best_step, progress.best_loss, best = progress.done, record["loss"], True
    last = progress.done == at.data.total
    if not last and at.stopping():
        _save_and_stop(at)
    if not (last or best or progress.done % at.config.save.every == 0):
        return
    try:
        _save(at)
    except OSError as error:
        if last:
            raise ConfigError(
                f"{at.run.folder}: the last checkpoint of stage {settings.name} could not be written ({error}); free "
                f"some space, and the same command goes on from the one before"
            ) from error
        at.log.say(
            f"{settings.name} step {progress.done}: not saved ({error}); the checkpoint before stays, training goes on"
        )


def _save_and_stop(at: _Stage) -> NoReturn:
    """Saves where the stage stands, unless it stands there already."""
    name, done = at.settings.name, at.progress.done
    at.optimizer.zero_grad(set_to_none=True)
    told = f"stopped after step {done} of stage {name}"
    if done == 0:
        raise Interrupted(f"{told}; the same command starts anew")
    try:
        _save(at)
    except OSError as error:
        raise Interrupted(
            f"{told}, which could not be saved ({error}); the same command goes on from the one before"
        ) from None
    raise Interrupted(f"{told}; the same command goes on from there")


def _save(at: _Stage) -> None:
    before = time.monotonic()
    state.save(at.config, at.number, at.run, at.assembly, at.optimizer, at.data, at.progress, at.accelerator)
    at.saving += time.monotonic() - before


def _say_cost(at: _Stage, seconds: float) -> None:
    share = at.saving / max(seconds, 1e-9)
    at.log.say(f"{at.settings.name}: {seconds:.1f} s, of which checkpoints took {at.saving:.1f} s ({share:.1%})")


@overload
def _forward_backward(
    config: Config, model: nn.Module, step: Step, supervised: int, accelerator: Accelerator, sources: int
) -> Tensor: ...


@overload
def _forward_backward(
    config: Config,
    model: nn.Module,
    step: Step,
    supervised: int,
    accelerator: Accelerator,
    sources: int,
    *,
    stopping: Callable[[], bool],
) -> Tensor | None: ...


def _forward_backward(
    config: Config,
    model: nn.Module,
    step: Step,
    supervised: int,
    accelerator: Accelerator,
    sources: int,
    *,
    stopping: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """Gradients of the step's loss. Returns (sources, 2): summed loss and supervised tokens of each, over all ranks.

    None, with gradients of no use, once `stopping` says so before a micro-step.
    """
    sums = torch.zeros(sources, 2, dtype=torch.float64, device=accelerator.device)
    for micro_step, row in enumerate(step.rows):
        if stopping():
            return None
        row = row.to(accelerator.device)
        torch.manual_seed(dropout_seed(config.seed, step.number, accelerator.process_index, micro_step))
        with parallel.accumulating(model, last=micro_step == len(step.rows) - 1):
            with accelerator.autocast():
                losses = model(row)
            if losses.requires_grad:  # not in a row without pictures where the projector alone is trained
                # Ranks average their gradients; the loss is a sum over the step's tokens on all of them.
                accelerator.backward(losses.sum() * (accelerator.num_processes / max(supervised, 1)))
        _add_by_source(sums, losses, row)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            # A step without pictures: AdamW's moments would go on where ranks have touched the vision path (a gradient
            # of zeros), and rest where nobody did (none).
            parameter.grad = torch.zeros_like(parameter)
    return parallel.summed(accelerator, sums)


@torch.no_grad()
def _evaluate(at: _Stage) -> dict[str, Any] | None:
    """Held-out loss of each source, per supervised token; None once a rank was asked to stop."""
    data, model, accelerator = at.data, at.model, at.accelerator
    assert data.held_out is not None
    modes = [module for module in model.modules() if module.training]
    model.eval()
    sums = torch.zeros(len(data.titles), 2, dtype=torch.float64, device=accelerator.device)
    for step in load(data.held_out, 0, data.held_out.order.steps(0), workers=min(at.config.workers, 1)):
        for row in step.rows:
            if at.stopping():
                return None
            row = row.to(accelerator.device)
            with accelerator.autocast():
                _add_by_source(sums, model(row), row)
    for module in modes:
        module.training = True
    parallel.reshard(model)
    sums = parallel.summed(accelerator, sums)
    losses = {title: total / count for title, (total, count) in zip(data.titles, sums.tolist(), strict=True) if count}
    total, count = sums.sum(0).tolist()
    record = {"stage": at.settings.name, "step": at.progress.done, "held_out": losses, "supervised": int(count)}
    return record | {"loss": total / max(count, 1)}


class Gradients:
    """Fails the run if what is declared trained gets no gradient within two steps that could give it one."""

    def __init__(self, assembly: Assembly) -> None:
        trained = [(name, p) for name, p in assembly.vlm.named_parameters() if p.requires_grad]
        self._waiting = dict(trained)
        self._chances = {"text": 0, "picture": 0}

    def check(self, step: Step) -> None:
        if not self._waiting:
            return
        learned = any(len(row.predicts) for row in step.rows)
        self._chances["text"] += learned
        self._chances["picture"] += any(_learns_from_pictures(row) for row in step.rows)
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


def _steps(data: StageData, start: int, workers: int) -> Iterator[Step]:
    return load(data.training, start, data.total, workers=workers)


def _add_by_source(sums: Tensor, losses: Tensor, row: Row) -> None:
    sums[:, 0].index_add_(0, row.sources, losses.detach().double())
    sums[:, 1].index_add_(0, row.sources, torch.ones_like(losses, dtype=torch.float64))


def _finite_norm(optimizer: torch.optim.Optimizer, sums: Tensor, step: Step, stage: Stage) -> float:
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


def _record(
    stage: Stage, step: Step, sums: Tensor, data: StageData, holes: Sequence[Hole] | None = None
) -> dict[str, Any]:
    """The line of the step in metrics.jsonl; `holes` are those of all ranks."""
    totals = sums.tolist()
    count = sum(tokens for _, tokens in totals)
    losses = {title: loss / tokens for title, (loss, tokens) in zip(data.titles, totals, strict=True) if tokens}
    holes = step.holes if holes is None else holes
    elsewhere = [hole for hole in holes if hole.here and hole not in step.holes]
    return {
        "stage": stage.name,
        "step": step.number + 1,
        "loss": _or_none(sum(loss for loss, _ in totals) / max(count, 1)),
        "losses": {title: _or_none(loss) for title, loss in losses.items()},
        "samples": step.samples - len(elsewhere),
        "tokens": step.tokens - sum(hole.tokens for hole in elsewhere),
        "supervised": int(count),
        "pictures": step.pictures - sum(hole.pictures for hole in elsewhere),
        "rows": len(step.rows),
        "cut": step.cut - sum(hole.was_cut for hole in elsewhere),
        "skipped": len(holes),
        "unlabelled": step.unlabelled - sum(hole.unlabelled for hole in elsewhere),
    }


def _or_none(loss: float) -> float | None:
    """JSON knows no NaN."""
    return loss if math.isfinite(loss) else None


def dropout_seed(seed: int, step: int, rank: int, micro_step: int) -> int:
    digest = hashlib.sha256(f"dropout {seed} {step} {rank} {micro_step}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def dtypes(config: Config, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of trained and of frozen parameters."""
    if config.precision == "fp64":
        return torch.float64, torch.float64
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.float32, torch.bfloat16 if bf16 and device.type == "cuda" else torch.float32
