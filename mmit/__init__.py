"""mmit: multimodal instruction tuning, in which nothing is silently wrong, lost or wasted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmit.api import train
    from mmit.config import Config, ConfigError, load_config
    from mmit.data.sample import Sample, SampleError
    from mmit.inference.generate import load

__all__ = ["Config", "ConfigError", "Sample", "SampleError", "load", "load_config", "train"]

_HOMES = {
    "Config": "mmit.config",
    "ConfigError": "mmit.config",
    "Sample": "mmit.data.sample",
    "SampleError": "mmit.data.sample",
    "load": "mmit.inference.generate",
    "load_config": "mmit.config",
    "train": "mmit.api",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: `import mmit` alone takes milliseconds, not the seconds of torch and transformers."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'mmit' has no attribute {name!r}")
    return vars(import_module(_HOMES[name]))[name]
