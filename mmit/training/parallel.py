"""Ranks: how a model is spread over them, and what they agree on. One process is one rank, with nothing to agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast
from torch import Tensor, nn
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] it is documented there
    ProcessGroup,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmit.config import Config, ConfigError
from mmit.model.layers import decoder_layers
from mmit.model.vlm import VLM

T = TypeVar("T")
Spread = Literal["ddp", "fsdp", "hsdp"]

TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for the others within a step before it gives up."""

PATIENCE = timedelta(hours=3)
"""How long it waits while others load, read or write files: a large checkpoint on a slow disk takes its time. One that
dies is noticed at once all the same, because its connections close."""


def start(config: Config) -> Accelerator:
    """Device, autocast, backward and the process group; loaders and schedules stay ours (accelerate would split and
    step them anew)."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda, but torch sees no GPU (its driver, or a build for CPUs); write auto or cpu")
    on_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    _meet(on_cuda)  # first, as whatever asks a GPU asks number 0 until then
    # By itself, torch's answer is true for older GPUs too, which emulate it, slowly.
    able = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and able)
    # accelerate keeps the precision of the process's first run for good, and refuses another.
    AcceleratorState._reset_state(reset_partial_state=True)
    group = InitProcessGroupKwargs(timeout=TIMEOUT)
    try:
        return Accelerator(cpu=not on_cuda, mixed_precision="bf16" if bf16 else "no", kwargs_handlers=[group])
    except (NotImplementedError, ValueError) as error:  # GPUs that cannot reach each other, or have no bf16
        raise ConfigError(f"device, precision: {' '.join(str(error).split())}") from None


def told(config: Config, accelerator: Accelerator) -> str:
    """What computes, and in which precision: `auto` takes a CPU without a word where a driver is too old."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp64" if config.precision == "fp64" else "fp32"
    ranks = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    return f"{ranks}{name}, {precision}"


def _meet(on_cuda: bool) -> None:
    """Joins the process group, under another name at each start.

    torchrun keeps one store over its restarts (torch 2.14, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE is 1), in which a
    rank that is quicker than the others finds the addresses of ranks that have crashed, and fails to connect to them.
    Needless once torch prefixes its keys by attempt.
    """
    here = os.environ
    alone = int(here.get("WORLD_SIZE", "1")) == 1
    # One rank of torchrun has a group too, for fsdp; accelerate's would have no gloo.
    if torch.distributed.is_initialized() or "RANK" not in here or (alone and "LOCAL_RANK" not in here):
        return
    if on_cuda:
        if "LOCAL_RANK" not in here:  # accelerate would take each rank for a run of its own
            raise ConfigError(
                "RANK and WORLD_SIZE are set, but LOCAL_RANK, the number of the process on its machine, is not; start "
                "with torchrun --nproc-per-node N -m mmit train ..., or set it too"
            )
        # As accelerate counts: where a scheduler shows each process its own GPU alone, that is number 0.
        torch.cuda.set_device(int(here["LOCAL_RANK"]) % torch.cuda.device_count())
    store, rank, ranks = next(rendezvous("env://", timeout=TIMEOUT))
    # Offloaded gradients lie on the CPU, where nccl cannot sum them.
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=PrefixStore(f"attempt {here.get('TORCHELASTIC_RESTART_COUNT', '0')}", store),
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
    )


def spread(vlm: VLM, how: Spread, accelerator: Accelerator, *, offload: bool) -> nn.Module:
    """The model over all ranks: replicated (`ddp`), or its trained and frozen language weights sharded (`fsdp`; `hsdp`
    within a node, replicated between nodes).

    A frozen tower is replicated in any case: it is small beside the language model and runs outside autograd.
    """
    if how == "ddp":
        vlm.to(accelerator.device)
        if accelerator.num_processes == 1:
            return vlm
        devices = [accelerator.device] if accelerator.device.type == "cuda" else None
        return DistributedDataParallel(
            vlm, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    if not torch.distributed.is_initialized():
        raise ConfigError(f"parallel: {how} needs ranks; start with torchrun --nproc-per-node N -m mmit train ...")
    if any(parameter._backward_hooks for parameter in vlm.parameters()):
        raise ConfigError(
            f"parallel: {how} cannot train the rows of model.add_tokens alone, beside a LoRA; write parallel: ddp, or "
            f"train the language model whole"
        )
    mesh = _mesh(how, accelerator)
    bf16 = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda"
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    offloading = CPUOffloadPolicy(pin_memory=accelerator.device.type == "cuda") if offload else OffloadPolicy()
    replicated = {p for p in vlm.vision.parameters() if vlm.vision.frozen} if vlm.vision is not None else set()
    for layer in decoder_layers(vlm.language, f"parallel: {how}"):
        fully_shard(layer, mesh=mesh, mp_policy=precision, offload_policy=offloading)
    if vlm.vision is not None:
        vlm.vision.to(accelerator.device)
    return cast(
        nn.Module,
        fully_shard(vlm, mesh=mesh, mp_policy=precision, offload_policy=offloading, ignored_params=replicated),
    )


def accumulating(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Around a micro-step: replicas exchange gradients once a step, after the last; shards do so in each."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, on every rank; every rank must ask. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """After forward passes without a backward one: the root keeps its weights whole until a backward pass, and whoever
    asked for the parameters meanwhile (an optimizer, a checkpoint) would get the wrong objects."""
    if isinstance(model, FSDPModule):
        model.reshard()


class OtherRankFailed(OSError):
    """Another rank met a fault, and says which; this rank has nothing to add."""


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Runs `action` on rank 0 while the others wait; if it fails there, all of them stop."""
    on_all(accelerator, action if accelerator.is_main_process else lambda: None)


def on_all(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What `action` gives on each rank; if it fails on one, all of them stop."""
    found: list[T] = []
    fault: Exception | None = None
    try:
        found.append(action())
    except Exception as error:
        fault = error
    failed = torch.tensor(fault is not None, dtype=torch.int64)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(failed, group=patient_group())
    if fault is not None:
        raise fault
    if failed:
        raise OtherRankFailed("another rank has stopped")
    return found[0]


def from_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, on every rank."""
    found: list[Any] = [on_all(accelerator, action if accelerator.is_main_process else lambda: None)]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(found, group=patient_group())
    return found[0]


def together(accelerator: Accelerator, items: Generator[T]) -> Iterator[T]:
    """The items of each rank, of which all have as many; if making one fails on one rank, all of them stop."""
    with closing(items):
        while (item := on_all(accelerator, lambda: next(items, None))) is not None:
            yield item


def patient_group() -> ProcessGroup | None:
    """The ranks on the CPU, where they wait for each other's files; None where there is one rank."""
    default = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    return _patient_twin(default) if default is not None else None


@lru_cache(maxsize=1)
def _patient_twin(_default: ProcessGroup) -> ProcessGroup:
    return cast(ProcessGroup, torch.distributed.new_group(timeout=PATIENCE, backend="gloo"))


def agreed(accelerator: Accelerator, *values: int) -> list[int]:
    """Each value summed over all ranks."""
    if accelerator.num_processes == 1:
        return list(values)
    return summed(accelerator, torch.tensor(values, device=accelerator.device)).tolist()


def summed(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Over all ranks."""
    return cast(Tensor, accelerator.reduce(tensor))


def as_on_main(accelerator: Accelerator, values: Sequence[int]) -> list[int]:
    """The `values` of rank 0, as many as here: what ranks decide by must not differ in a bit."""
    if accelerator.num_processes == 1:
        return list(values)
    return cast(Tensor, broadcast(torch.tensor(values, device=accelerator.device))).tolist()


def gathered(accelerator: Accelerator, values: Sequence[Any]) -> list[Sequence[Any]]:
    """The `values` of every rank, by rank; nothing is sent where all have none."""
    if accelerator.num_processes == 1:
        return [values]
    if not agreed(accelerator, len(values))[0]:
        return []
    found: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(found, list(values))
    return found


def _mesh(how: Spread, accelerator: Accelerator) -> DeviceMesh:
    kind, ranks = accelerator.device.type, accelerator.num_processes
    if how == "fsdp":
        return init_device_mesh(kind, (ranks,))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    if ranks % local or ranks == local:
        raise ConfigError(
            f"parallel: hsdp replicates between nodes, but there are {ranks} ranks, {local} on this node; use fsdp"
        )
    return init_device_mesh(kind, (ranks // local, local), mesh_dim_names=("replicas", "shards"))
