"""Training, stage by stage: the loop.

A step is a set of samples, and its loss the sum of its token losses over the number of its supervised tokens, whatever
the rows, micro-steps and ranks that compute it. A stage starts from the finished checkpoint of the one before, in a
straight run as after a kill, and the state of a running stage is its checkpoint and the number of its step.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmit.config import Config, ConfigError, Stage
from mmit.data.cache import cache_folder
from mmit.data.loader import Step, load
from mmit.data.packing import Row
from mmit.model.build import Assembly, set_modes, set_trained
from mmit.model.probes import chunk_for, probe_head, probe_isolation
from mmit.training import parallel, state
from mmit.training.data import StageData, open_stage, too_long
from mmit.training.optim import build_optimizer, set_rates
from mmit.training.parallel import whole
from mmit.training.run import Interrupted, RunDirectory, StopFlag
from mmit.training.runlog import RunLog
from mmit.training.start import initialise_projector, table_of_parts


def train(config: Config, *, asked: str) -> Path:
    """Runs, or goes on with, what `config.output` names; returns its `final/`.

    Every source must be shards by now; `asked` is the YAML the user asked for, which the run directory keeps.

    Raises ConfigError or SampleError for faults of the input, Interrupted once an interrupted run is saved.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run, stop = RunDirectory(Path(config.output)), StopFlag()
    accelerator = parallel.start(config)
    with ExitStack() as held:
        held.enter_context(stop.listening())
        parallel.on_main(accelerator, lambda: (held.enter_context(run.locked()), run.begin(asked)))
        for number in range(_stage_to_go_on_with(config, run), len(config.stages)):
            if stop.set:
                name = config.stages[number].name
                raise Interrupted(f"stopped before stage {name}; the same command goes on from there")
            _train_stage(config, number, run, accelerator, stop)
        parallel.on_main(accelerator, lambda: state.finish(config, run))
    return run.final


def _stage_to_go_on_with(config: Config, run: RunDirectory) -> int:
    """The first stage that is not finished; whatever became of its files, one that a later stage went on from is."""
    for number in reversed(range(len(config.stages))):
        found = run.newest(config.stages[number].name)
        if found is not None:
            return number + found.finished
    return 0


def _train_stage(config: Config, number: int, run: RunDirectory, accelerator: Accelerator, stop: StopFlag) -> None:
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
    trained, frozen = _dtypes(config, device)
    set_trained(assembly, stage.train, trained_dtype=trained, frozen_dtype=frozen)
    set_modes(assembly, stage.train, gradient_checkpointing=stage.gradient_checkpointing)
    table = table_of_parts(config, stage, assembly, data)  # whose probes need the parameters whole
    model = parallel.spread(assembly.vlm, config.parallel, accelerator, offload=config.offload)
    optimizer = build_optimizer(assembly, stage)
    start = state.resume(assembly, optimizer, resumed, data) if resumed is not None else 0
    with accelerator.autocast():
        probe_isolation(assembly.vlm, device, through=model)
        assembly.vlm.chunk = chunk_for(assembly.vlm) if probe_head(assembly.vlm, device, through=model) else None
    parallel.reshard(model)

    with RunLog(run.folder, stage.name, total=data.total, start=start, active=accelerator.is_main_process) as log:
        log.say(table)
        for line in too_long(data.training, data.titles) if start == 0 else ():
            log.say(line)
        if start:
            log.say(f"{stage.name}: going on after step {start}")
        reached = Gradients(assembly)
        clock = time.monotonic()
        for step in _steps(data, start, config.workers):
            supervised, stopping = parallel.agreed(accelerator, step.supervised, stop.set)
            share = set_rates(optimizer, stage, step.number, data.total)
            losses = _forward_backward(config, model, step, supervised, accelerator, len(data.titles))
            norm = _finite_norm(optimizer, losses, step, stage)
            optimizer.step()
            reached.check(step)
            optimizer.zero_grad(set_to_none=True)
            done, now = step.number + 1, time.monotonic()
            record = _record(stage, step, losses, data) | {"grad_norm": norm, "seconds": round(now - clock, 4)}
            record["lr"] = {group["name"]: group["peak"] * share for group in optimizer.param_groups}
            log.step(record, step.holes)
            last = done == data.total
            if data.held_out is not None and config.eval and (last or done % config.eval.every == 0):
                log.evaluation(_evaluate(stage, model, data, done, accelerator, config.workers))
            if last or stopping or done % config.save.every == 0:
                state.save(config, number, run, assembly, optimizer, data, done, accelerator)
            if stopping and not last:
                raise Interrupted(
                    f"stopped after step {done} of stage {stage.name}; the same command goes on from there"
                )
            clock = time.monotonic()


def _forward_backward(
    config: Config, model: nn.Module, step: Step, supervised: int, accelerator: Accelerator, sources: int
) -> Tensor:
    """Gradients of the step's loss. Returns (sources, 2): summed loss and supervised tokens of each, over all ranks."""
    sums = torch.zeros(sources, 2, dtype=torch.float64, device=accelerator.device)
    for micro_step, row in enumerate(step.rows):
        row = row.to(accelerator.device)
        torch.manual_seed(_dropout_seed(config.seed, step.number, accelerator.process_index, micro_step))
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
    return accelerator.reduce(sums)


@torch.no_grad()
def _evaluate(
    stage: Stage, model: nn.Module, data: StageData, done: int, accelerator: Accelerator, workers: int
) -> dict[str, Any]:
    """Held-out loss of each source, per supervised token."""
    assert data.held_out is not None
    modes = [module for module in model.modules() if module.training]
    model.eval()
    sums = torch.zeros(len(data.titles), 2, dtype=torch.float64, device=accelerator.device)
    for step in load(data.held_out, 0, data.held_out.order.steps(0), workers=min(workers, 1)):
        for row in step.rows:
            row = row.to(accelerator.device)
            with accelerator.autocast():
                _add_by_source(sums, model(row), row)
    for module in modes:
        module.training = True
    parallel.reshard(model)
    sums = accelerator.reduce(sums)
    losses = {title: total / count for title, (total, count) in zip(data.titles, sums.tolist(), strict=True) if count}
    return {"stage": stage.name, "step": done, "held_out": losses, "supervised": int(sums[:, 1].sum())}


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


def _record(stage: Stage, step: Step, sums: Tensor, data: StageData) -> dict[str, Any]:
    totals = sums.tolist()
    count = sum(tokens for _, tokens in totals)
    return {
        "stage": stage.name,
        "step": step.number + 1,
        "loss": sum(loss for loss, _ in totals) / max(count, 1),
        "losses": {title: loss / tokens for title, (loss, tokens) in zip(data.titles, totals, strict=True) if tokens},
        "samples": step.samples,
        "tokens": step.tokens,
        "supervised": int(count),
        "pictures": step.pictures,
        "rows": len(step.rows),
        "cut": step.cut,
        "skipped": len(step.holes),
        "unlabelled": step.unlabelled,
    }


def _dropout_seed(seed: int, step: int, rank: int, micro_step: int) -> int:
    digest = hashlib.sha256(f"dropout {seed} {step} {rank} {micro_step}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _dtypes(config: Config, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """Of trained and of frozen parameters."""
    if config.precision == "fp64":
        return torch.float64, torch.float64
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.float32, torch.bfloat16 if bf16 and device.type == "cuda" else torch.float32
