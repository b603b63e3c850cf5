"""A stage made ready: model, data, optimizer and log, as its newest checkpoint or the stage before left them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from mmit.config import Config, Stage
from mmit.data.cache import cache_folder
from mmit.model.attention import use_flash_attention
from mmit.model.build import Assembly, check_targets, set_modes, set_trained
from mmit.model.layers import compile_layers, compiling
from mmit.model.pretrained import check_it_survives
from mmit.model.probes import chunk_for, probe_embeddings, probe_head, probe_isolation
from mmit.training import parallel, state
from mmit.training.answers import Question
from mmit.training.checkpoint import Checkpoint
from mmit.training.data import StageData, check_shown, fetched_again, open_stage, too_long
from mmit.training.optim import build_optimizer
from mmit.training.run import RunDirectory, StopFlag
from mmit.training.runlog import RunLog
from mmit.training.space import check_space
from mmit.training.start import initialise_projector, table_of_parts
from mmit.training.state import Progress


@dataclass
class RunningStage:
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
    saved: Progress | None
    """As it is in the newest checkpoint."""
    saving: float = 0.0
    """Seconds."""
    asked: list[Question] | None = None
    """What evaluations ask, once the first one has."""

    @property
    def settings(self) -> Stage:
        return self.config.stages[self.number]

    def stopping(self) -> bool:
        """Whether a rank was asked to stop; every rank must ask."""
        return bool(parallel.agreed(self.accelerator, self.stop.set)[0])


def prepare(
    config: Config,
    number: int,
    resumed: Checkpoint | None,
    run: RunDirectory,
    accelerator: Accelerator,
    stop: StopFlag,
    held: ExitStack,
) -> RunningStage:
    """The stage ready for its next step: model, data and optimizer as `resumed` or the stage before left them, and its
    log."""
    stage, device = config.stages[number], accelerator.device
    cache = cache_folder(config.cache)
    origin = resumed or parallel.from_main(accelerator, lambda: state.finished_before(config, number, run))
    assembly = parallel.on_all(accelerator, lambda: state.start(config, number, origin, cache))
    data = parallel.on_all(
        accelerator,
        lambda: open_stage(
            config,
            stage,
            assembly,
            cache=cache,
            on_cuda=device.type == "cuda",
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
        ),
    )
    trained, frozen = dtypes(config, accelerator)
    parallel.on_main(accelerator, lambda: _look_ahead(config, number, assembly, cache))
    parallel.on_main(accelerator, lambda: check_space(config, number, run, assembly, trained))
    if resumed is None:
        parallel.on_main(accelerator, lambda: check_shown(stage, data.training))
    if resumed is None and number == 0:
        parallel.on_main(accelerator, lambda: check_it_survives(assembly.tokenizer))
        parallel.on_all(accelerator, lambda: initialise_projector(config, assembly, data.training, device))
    set_trained(assembly, stage.train, trained_dtype=trained, frozen_dtype=frozen)
    set_modes(assembly, stage.train, gradient_checkpointing=stage.gradient_checkpointing)
    table = table_of_parts(config, stage, assembly, data)  # whose probes need the parameters whole, as the next does
    probe_embeddings(assembly.vlm)
    if config.compile:
        compile_layers(assembly.vlm.language)
    model = parallel.spread(assembly.vlm, config.parallel, accelerator, offload=config.offload)
    bf16 = accelerator.mixed_precision == "bf16"
    use_flash_attention(assembly.vlm.language, config.model.attention, device, bf16=bf16)
    optimizer = build_optimizer(assembly, stage)
    progress = state.resume(assembly, optimizer, resumed, data) if resumed is not None else Progress()
    parallel.on_main(accelerator, lambda: run.settle() if run.moved else None)
    with accelerator.autocast(), compiling(config.compile):
        probe_isolation(assembly.vlm, device, through=model)
        assembly.vlm.chunk = chunk_for(assembly.vlm) if probe_head(assembly.vlm, device, through=model) else None
    parallel.reshard(model)
    log = RunLog(
        run.folder,
        stage.name,
        total=data.total,
        start=progress.done,
        active=accelerator.is_main_process,
        trackers=config.trackers,
        log_samples=config.log_samples,
    )
    held.enter_context(log)
    log.say(f"{parallel.told(config, accelerator)}, attention {assembly.vlm.language.config._attn_implementation}")
    log.say(table)
    for line in too_long(data) if progress.done == 0 else ():
        log.say(line)
    for line in fetched_again(data, config, stage):
        log.say(line)
    if progress.done:
        log.say(f"{stage.name}: going on after step {progress.done}")
    saved = replace(progress) if resumed is not None else None
    return RunningStage(config, number, run, accelerator, stop, assembly, data, model, optimizer, progress, log, saved)


def _look_ahead(config: Config, number: int, assembly: Assembly, cache: Path) -> None:
    """Raises now what later stages would raise once those before them have trained: data, chat formats, targets."""
    for stage in config.stages[number + 1 :]:
        if stage.train.language is not None and stage.train.language.lora is not None:
            check_targets(assembly, stage.train.language.lora, f"stages.{stage.name}.train.language.lora.targets")
        data = open_stage(config, stage, assembly, cache=cache, on_cuda=False, rank=0, ranks=1)
        check_shown(stage, data.training)
        if not any(encoder.shards.is_remote for encoder in data.training.encoders):  # tars would be fetched for it
            too_long(data)


def dtypes(config: Config, accelerator: Accelerator) -> tuple[torch.dtype, torch.dtype]:
    """Of trained and of frozen parameters."""
    if config.precision == "fp64":
        return torch.float64, torch.float64
    bf16 = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda"
    return torch.float32, torch.bfloat16 if bf16 else torch.float32
