"""Before step 0: the projector's start from real features, and the table of what trains."""

from __future__ import annotations

from typing import Any, cast

import torch
from rich.table import Table

from mmit.config import Config, ConfigError, Stage
from mmit.data.loader import Steps
from mmit.export.targets import targets
from mmit.model.build import Assembly, embedding_rms
from mmit.model.projector import Projector, feature_statistics_
from mmit.training.data import StageData

PICTURES_FOR_STATISTICS = 256


@torch.no_grad()
def initialise_projector(config: Config, assembly: Assembly, steps: Steps, device: torch.device) -> None:
    """`projector.init: feature_statistics` from the first pictures of the stage, the same on every rank."""
    spec, vision = config.model.projector, assembly.vlm.vision
    if spec is None or spec.init == "default" or vision is None:
        return
    pixels: dict[bytes, torch.Tensor] = {}
    for number in range(steps.order.steps(0)):
        for occurrence in steps.order.step(number):
            pixels.update(steps.encoders[occurrence.source].pixels(occurrence.index))
        if len(pixels) >= PICTURES_FOR_STATISTICS:
            break
    if not pixels:
        raise ConfigError(
            f"model.projector.init: feature_statistics needs pictures, stage {config.stages[0].name} has none"
        )
    keys = list(pixels)[:PICTURES_FOR_STATISTICS]
    batches = [keys[place : place + 32] for place in range(0, len(keys), 32)]
    vision.to(device)  # under torchrun a CPU has one thread, and would take minutes
    stacked = (torch.stack([pixels[key] for key in batch]).to(device) for batch in batches)
    features = torch.cat([vision(some, batch).cpu() for some, batch in zip(stacked, batches, strict=True)])
    vision.cpu()
    generator = torch.Generator().manual_seed(config.seed)
    feature_statistics_(
        cast(Projector, assembly.vlm.projector), features, embedding_rms(assembly.vlm.language), generator=generator
    )


def table_of_parts(config: Config, stage: Stage, assembly: Assembly, data: StageData) -> Table:
    """Every part: its parameters, how many of them train, at which rate and in which precision."""
    samples = min(stage.batch_size, data.training.order.samples(0))
    fewer = f", all that an epoch has (batch_size is {stage.batch_size})" if samples < stage.batch_size else ""
    table = Table(title=f"stage {stage.name}: {data.total} steps of {samples} samples{fewer}", title_justify="left")
    lines = ["will be loaded by: " + "; ".join(targets(assembly))]
    unused = assembly.vlm.vision.unused_parameters() if stage.train.vision and assembly.vlm.vision else []
    if unused:
        lines.append(f"vision, frozen because no token depends on them: {', '.join(unused)}")
    table.caption, table.caption_justify = "\n".join(lines), "left"
    for column in ("part", "what", "parameters", "trained", "peak rate", "precision"):
        # Folded where the terminal is narrow: rich would cut names and numbers short.
        number = column in ("parameters", "trained", "peak rate")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    chosen: dict[str, Any] = dict(stage.train)
    for name, part in assembly.parts().items():
        parameters = list(part.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        settings = chosen[name]
        kind = type(part.encoder if name == "vision" else part).__name__
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
        table.add_row(
            name,
            kind + (f" + LoRA rank {assembly.lora.rank}" if name == "language" and assembly.lora else ""),
            f"{sum(p.numel() for p in parameters):,}",
            f"{sum(p.numel() for p in trained):,}" if trained else "frozen",
            f"{settings.lr:g}" if settings is not None else "",
            ", ".join(dtypes),
        )
    return table
