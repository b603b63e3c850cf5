"""What is due after a step: an evaluation, a checkpoint, or the end because a signal asked for it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from mmit.config import Config, ConfigError
from mmit.data.loader import Hole, load
from mmit.data.packing import Row
from mmit.evaluation.scores import metric_of
from mmit.training import parallel, state
from mmit.training.answers import answers, held_out_questions, scored
from mmit.training.checks import of_all_ranks
from mmit.training.data import StageData
from mmit.training.run import Interrupted
from mmit.training.runlog import or_none
from mmit.training.stage import RunningStage


def evaluation_is_due(config: Config, data: StageData, done: int) -> bool:
    return (
        data.held_out is not None and config.eval is not None and (done == data.total or done % config.eval.every == 0)
    )


def do_what_is_due(at: RunningStage) -> None:
    """What is due after a step: an evaluation, a checkpoint. Interrupted once a rank was asked to stop."""
    progress, settings = at.progress, at.settings
    best, before = False, (progress.best_step, progress.best_loss)
    if at.config.eval is None or at.data.held_out is None:
        progress.evaluation_due = False  # it was, before `eval` was taken out of the config
    if progress.evaluation_due:
        record = _evaluate(at)
        if record is None:
            save_and_stop(at)
        at.log.evaluation(record)
        progress.evaluation_due = False
        loss = record["loss"]
        if at.config.eval is not None and at.config.eval.keep_best and loss is not None and loss < progress.best_loss:
            progress.best_step, progress.best_loss, best = progress.done, loss, True
    last = progress.done == at.data.total
    if not last and at.stopping():
        save_and_stop(at)
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
        progress.best_step, progress.best_loss = before  # the best is one that is there
        at.log.say(
            f"{settings.name} step {progress.done}: not saved ({error}); the checkpoint before stays, training goes on"
        )


def save_and_stop(at: RunningStage) -> NoReturn:
    """Saves where the stage stands, unless it stands there already."""
    name, done = at.settings.name, at.progress.done
    at.optimizer.zero_grad(set_to_none=True)
    told = f"stopped after step {done} of stage {name}"
    if done == 0:
        raise Interrupted(f"{told}; the same command starts it anew")
    try:
        _save(at)
    except OSError as error:
        raise Interrupted(
            f"{told}, which could not be saved ({error}); the same command goes on from the one before"
        ) from None
    raise Interrupted(f"{told}; the same command goes on from there")


def _save(at: RunningStage) -> None:
    if at.saved == at.progress:
        return
    before = time.monotonic()
    state.save(at.config, at.number, at.run, at.assembly, at.optimizer, at.data, at.progress, at.accelerator)
    at.saved = replace(at.progress)
    at.saving += time.monotonic() - before


def say_cost(at: RunningStage, seconds: float) -> None:
    share = at.saving / max(seconds, 1e-9)
    at.log.say(f"{at.settings.name}: {seconds:.1f} s, of which checkpoints took {at.saving:.1f} s ({share:.1%})")


def _evaluate(at: RunningStage) -> dict[str, Any] | None:
    """Held-out loss of each source, per supervised token, and answers; None once a rank was asked to stop."""
    modes = [module for module in at.model.modules() if module.training]
    at.model.eval()
    try:
        with torch.no_grad():
            found = _held_out_loss(at)
            going_on = found is not None and _answer(at, found[0])
    finally:
        for module in modes:
            module.training = True
        parallel.reshard(at.model)
    if found is None or not going_on:
        return None
    record, holes = found
    at.log.holes(at.progress.done, holes, held_out=True)
    return record


def _held_out_loss(at: RunningStage) -> tuple[dict[str, Any], list[Hole]] | None:
    """The loss, and what takes no part in it, the same at every evaluation."""
    held_out, accelerator = at.data.held_out, at.accelerator
    assert held_out is not None
    sums = torch.zeros(len(at.data.titles), 2, dtype=torch.float64, device=accelerator.device)
    holes: list[Hole] = []
    on_cuda = accelerator.device.type == "cuda"
    last = held_out.order.steps(0)
    workers = min(at.config.workers, 1)
    steps = load(held_out, 0, last, workers=workers, pin=on_cuda, stoppable=at.stop.waiting)
    for step in parallel.together(accelerator, steps):
        holes += step.holes
        for row in step.rows:
            if at.stopping():
                return None
            row = row.to(accelerator.device)
            with accelerator.autocast():
                add_by_source(sums, at.model(row), row)
    sums = parallel.summed(accelerator, sums)
    holes = sorted(of_all_ranks(at, holes), key=lambda hole: hole.where)
    found = zip(at.data.titles, sums.tolist(), strict=True)
    losses = {title: or_none(total / count) for title, (total, count) in found if count}
    total, count = sums.sum(0).tolist()
    record = {"stage": at.settings.name, "step": at.progress.done, "held_out": losses, "supervised": int(count)}
    return record | {"skipped": len(holes), "loss": or_none(total / count) if count else None}, holes


def _answer(at: RunningStage, record: dict[str, Any]) -> bool:
    """Asks the held-out questions of `eval.generate`, adds their scores; False once a rank was asked to stop."""
    settings, held_out = at.config.eval, at.data.held_out
    assert settings is not None
    assert held_out is not None
    if not settings.generate:
        return True
    if at.asked is None:
        at.asked = parallel.on_all(at.accelerator, lambda: held_out_questions(held_out, settings.generate))
    said = answers(
        at.model,
        at.asked,
        held_out.encoders[0].rendering.chat,
        at.accelerator,
        row_tokens=held_out.row_tokens,
        max_new_tokens=settings.max_new_tokens,
        stopping=at.stopping,
    )
    if said is None:
        return False
    scores, lines = scored(at.asked, said, at.data.titles, metric_of(settings.metric))
    record |= {"scores": scores, "metric": settings.metric, "answered": len(lines)}
    at.log.answers(at.progress.done, lines)
    return True


def add_by_source(sums: Tensor, losses: Tensor, row: Row) -> None:
    sums[:, 0].index_add_(0, row.sources, losses.detach().double())
    sums[:, 1].index_add_(0, row.sources, torch.ones_like(losses, dtype=torch.float64))
