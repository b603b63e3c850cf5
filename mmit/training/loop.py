"""Training, stage by stage: the loop.

A step is a set of samples, and its loss the sum of its token losses over the number of its supervised tokens, whatever
the rows, micro-steps and ranks that compute it. A stage starts from the finished checkpoint of the one before, in a
straight run as after a kill, and the state of a running stage is its checkpoint and the number of its step.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import overload

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmit.config import Config, ConfigError
from mmit.data.loader import Step, load
from mmit.model.attention import without_cudnn
from mmit.model.layers import compiling
from mmit.training import faults, parallel, state
from mmit.training.checkpoint import Checkpoint
from mmit.training.checks import Gradients, count_skipped, finite_norm
from mmit.training.due import add_by_source, do_what_is_due, evaluation_is_due, save_and_stop, say_cost
from mmit.training.optim import set_rates
from mmit.training.run import NOTHING_LOST, Interrupted, RunDirectory, StopFlag, under_torchrun
from mmit.training.runlog import record_of
from mmit.training.stage import RunningStage, prepare


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
    computed_on = parallel.told(config, accelerator)
    with ExitStack() as held:
        held.enter_context(stop.listening())
        held.enter_context(without_cudnn())
        parallel.on_main(accelerator, lambda: (held.enter_context(run.locked()), run.begin(asked, computed_on)))
        try:
            first, resumed = parallel.from_main(accelerator, lambda: state.where_to_go_on(config, run))
            parallel.on_main(accelerator, lambda: state.check_moved_data(config, run))
            for number in range(first, len(config.stages)):
                at_first = resumed if number == first else None
                try:
                    _train_stage(config, number, at_first, run, accelerator, stop, check_memory=check_memory)
                except torch.OutOfMemoryError as error:
                    raise ConfigError(faults.too_large(config, config.stages[number])) from error
                # Model and optimizer are in reference cycles: they would lie beside those of the next stage.
                gc.collect()
                if accelerator.device.type == "cuda":
                    torch.cuda.empty_cache()
        except Interrupted as interrupted:
            if accelerator.is_main_process and under_torchrun():
                with suppress(OSError):  # a full disk; that would be a failure, after which torchrun starts again
                    run.preempted.write_text(f"{interrupted}\n", encoding="utf-8")
            raise
        parallel.on_main(accelerator, lambda: state.finish(config, run))
    return run.final


def _train_stage(
    config: Config,
    number: int,
    resumed: Checkpoint | None,
    run: RunDirectory,
    accelerator: Accelerator,
    stop: StopFlag,
    *,
    check_memory: bool,
) -> None:
    with stop.loading(alone=accelerator.num_processes == 1), ExitStack() as held:
        at = prepare(config, number, resumed, run, accelerator, stop, held)
        held = held.pop_all()
    with held, compiling(config.compile):
        if check_memory:
            faults.check_memory(at, lambda step: _gradients(at, step, at.stopping))
            at.optimizer.zero_grad(set_to_none=True)
        if at.stopping():
            raise Interrupted(NOTHING_LOST)
        reached = Gradients(at.assembly, accelerator)
        began = time.monotonic()
        if at.progress.evaluation_due:
            do_what_is_due(at)
        clock = time.monotonic()
        on_cuda = accelerator.device.type == "cuda"
        steps = load(
            at.data.training,
            at.progress.done,
            at.data.total,
            workers=config.workers,
            pin=on_cuda,
            stoppable=at.stop.waiting,
        )
        for step in parallel.together(accelerator, steps):
            losses = _gradients(at, step, at.stopping)
            if losses is None:
                save_and_stop(at)
            holes = count_skipped(at, step)  # not before: a step that is left off is counted when it is computed
            norm = _update(at, step, losses)
            if norm is not None:
                reached.check(step)
            at.optimizer.zero_grad(set_to_none=True)
            at.progress.done += 1
            record = record_of(at.settings, step, losses, at.data, holes)
            record |= {"grad_norm": norm, "seconds": round(time.monotonic() - clock, 4)}
            record["lr"] = {group["name"]: group["lr"] for group in at.optimizer.param_groups}
            at.log.step(record, holes)
            at.progress.evaluation_due = evaluation_is_due(config, at.data, at.progress.done)
            do_what_is_due(at)
            clock = time.monotonic()
        say_cost(at, time.monotonic() - began)


def _gradients(at: RunningStage, step: Step, stopping: Callable[[], bool]) -> Tensor | None:
    """`_forward_backward`, or None once a rank was asked to stop; ConfigError for a step that memory cannot hold."""
    supervised, stop = parallel.agreed(at.accelerator, step.supervised, at.stop.set)
    if stop:
        return None
    set_rates(at.optimizer, at.settings, step.number, at.data.total)
    try:
        return _forward_backward(
            at.config, at.model, step, supervised, at.accelerator, len(at.data.titles), stopping=stopping
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(faults.out_of_memory(at.config, at.settings, step)) from error


def _update(at: RunningStage, step: Step, losses: Tensor) -> float | None:
    """The optimizer's step. Returns the gradient's norm, None where it is not finite and the stage passes over that."""
    try:
        norm = finite_norm(at.optimizer, losses, step, at.settings)
    except FloatingPointError as error:
        at.optimizer.zero_grad(set_to_none=True)
        if at.progress.nonfinite_in_a_row < at.settings.skip_nonfinite:
            at.progress.nonfinite_in_a_row += 1
            at.log.say(str(error))
            return None
        folder = at.run.folder / f"fault-step-{step.number + 1}"
        texts = faults.texts(at.config, at.number, step, at.accelerator, str(error))
        stands = (at.config, at.number, at.assembly, at.optimizer, at.data, at.progress, at.accelerator)
        try:
            state.write(folder, *stands, texts=texts)
        except OSError as full:
            raise FloatingPointError(f"{error}\nThe state before it could not be kept ({full})") from None
        raise FloatingPointError(f"{error}\nThe state before it is kept: mmit replay {folder}") from None
    at.progress.nonfinite_in_a_row = 0
    at.optimizer.step()
    return norm


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

    None, with gradients of no use, once `stopping` says so between two micro-steps.
    """
    sums = torch.zeros(sources, 2, dtype=torch.float64, device=accelerator.device)
    for micro_step, row in enumerate(step.rows):
        if micro_step > 0 and stopping():
            return None
        row = row.to(accelerator.device)
        torch.manual_seed(dropout_seed(config.seed, step.number, accelerator.process_index, micro_step))
        with parallel.accumulating(model, last=micro_step == len(step.rows) - 1):
            with accelerator.autocast():
                losses = model(row)
            if losses.requires_grad:  # not in a row without pictures where the projector alone is trained
                # Ranks average their gradients; the loss is a sum over the step's tokens on all of them.
                # Not accelerate's backward: it divides once more where ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set.
                (losses.sum() * (accelerator.num_processes / max(supervised, 1))).backward()
        add_by_source(sums, losses, row)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            # A step without pictures: AdamW's moments would go on where ranks have touched the vision path (a gradient
            # of zeros), and rest where nobody did (none).
            parameter.grad = torch.zeros_like(parameter)
    return parallel.summed(accelerator, sums)


def dropout_seed(seed: int, step: int, rank: int, micro_step: int) -> int:
    digest = hashlib.sha256(f"dropout {seed} {step} {rank} {micro_step}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
