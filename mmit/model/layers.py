"""The decoder layers of a language model: what is sharded, and compiled, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch._functorch import config as functorch

from mmit.config import ConfigError


def decoder_layers(language: nn.Module, key: str) -> list[nn.Module]:
    """The longest module list in it; ConfigError at the config's `key`, which needs one, if there is none."""
    lists = [module for module in language.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{key}: {type(language).__name__} has no list of layers; leave the key out")
    return list(max(lists, key=len))


def compile_layers(language: nn.Module, *, backend: str = "inductor") -> None:
    """Let each layer run as a compiled graph, one for all layers and all lengths of rows.

    Whole models break into pieces where transformers looks at its arguments, layers do not; and what checkpoints a
    layer, or shards it, stays around the graph.
    """
    for layer in decoder_layers(language, "compile"):
        layer.compile(backend=backend, dynamic=True)


@contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    """Around all passes: what the compiler says against one is a fault of the config, that of a backward too."""
    # Else torch warns of a backward that does not compile, with a traceback, and raises whatever it was where it runs.
    backward = functorch.patch(force_non_lazy_backward_lowering=True) if wanted else nullcontext()
    try:
        with backward:
            yield
    except Exception as error:
        module = type(error).__module__
        if not module.startswith(("torch._dynamo", "torch._inductor", "triton")):
            raise
        reason = " ".join(str(error).partition("\n\n")[0].split())[:300]
        key, instead = ("compile", "compile: false") if wanted else ("model.attention", "attention: sdpa")
        raise ConfigError(
            f"{key}: torch cannot compile this model here ({reason}); write {instead}, or install what is missing (a "
            f"C++ compiler on a CPU, Triton on a GPU)"
        ) from error
