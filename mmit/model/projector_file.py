"""A projector alone from a file: one of ours, of an export, or LLaVA's mm_projector.bin."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmit.config import ConfigError
from mmit.model.files import file_sha256, read_tensors
from mmit.model.projector import MlpProjector, Projector

log = logging.getLogger(__name__)

LINEARS = re.compile(
    r"(?:.*\.)?(?:projector\.linears|mm_projector|multi_modal_projector)[._](?:linear_)?(?:(?P<place>\d+)\.)?"
    r"(?P<kind>weight|bias)"
)
"""`projector.linears.0.weight` (ours), `model.mm_projector.2.bias` (LLaVA), `multi_modal_projector.linear_1.weight`."""


def start_projector(projector: Projector, file: Path, cache: Path | None = None) -> dict[str, Any]:
    """Copies the weights of `file` in and returns where they come from; ConfigError unless every one has its place."""
    where = f"model.projector.from: {file}"
    if not isinstance(projector, MlpProjector):
        raise ConfigError(f"{where}: files are read into kind: linear or mlp, not {type(projector).__name__}")
    fill_projector(projector, projector_tensors(file, where), where)
    return {"name": str(file), "sha256": {file.name: file_sha256(file, cache)}}


def projector_tensors(file: Path, where: str) -> dict[str, Tensor]:
    """All tensors of a file, a pickle of them read without running what it may hold."""
    if not file.is_file():
        raise ConfigError(f"{where}: no such file; name a model.safetensors or an mm_projector.bin")
    try:
        if file.suffix == ".safetensors":
            return read_tensors(file)
        log.warning("%s is a pickle: read with weights_only=True, so no code in it runs; safetensors is safer", file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise whatever a foreign file leads them into
        raise ConfigError(f"{where}: cannot be read as tensors ({type(error).__name__})") from None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: holds a {type(found).__name__}, expected names and tensors")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


@torch.no_grad()
def fill_projector(projector: MlpProjector, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies the linears among `tensors`, in the order of their numbers."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if match := LINEARS.fullmatch(name):
            found.setdefault(int(match["place"] or 0), {})[match["kind"]] = value
    linears = [cast(nn.Linear, linear) for linear in projector.linears]
    shapes = [tuple(found[place]["weight"].shape) for place in sorted(found) if "weight" in found[place]]
    wanted = [tuple(linear.weight.shape) for linear in linears]
    if shapes != wanted or any(len(kinds) != 2 for kinds in found.values()):
        raise ConfigError(
            f"{where}: holds linear layers of (out, in) {shapes}, the projector of this tower and language model needs "
            f"{wanted}; take the file of a model with the same parts, or set projector.depth"
        )
    for linear, place in zip(linears, sorted(found), strict=True):
        linear.weight.copy_(found[place]["weight"])
        linear.bias.copy_(found[place]["bias"])
