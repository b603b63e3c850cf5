"""The decoder layers of a language model: what is sharded, and compiled, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

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
def compiling() -> Iterator[None]:
    """Around the first pass: what the compiler says against it is a fault of the config."""
    try:
        yield
    except Exception as error:
        module = type(error).__module__
        if not module.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = " ".join(str(error).partition("\n\n")[0].split())[:300]
        raise ConfigError(
            f"compile: torch cannot compile this model here ({reason}); leave the key out, or install what is missing "
            f"(a C++ compiler on a CPU, Triton on a GPU)"
        ) from error
