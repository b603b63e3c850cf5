"""What a user brings along: `package.module:Name` in place of a built-in part."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection
from typing import Any

from mmit.config.faults import ConfigError


def imported(name: str, where: str, known: Collection[str]) -> Any:
    """What `package.module:Name` names; ConfigError at `where`, with the `known` names, for what is neither."""
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        near = f"did you mean {close[0]!r}? " if (close := difflib.get_close_matches(name, known, n=1)) else ""
        all_known = ", ".join(known)
        raise ConfigError(
            f"{where}: {name!r} is not known; {near}There are {all_known}, or package.module:Name of your own"
        )
    try:
        return vars(importlib.import_module(module))[attribute]
    except ImportError as error:
        raise ConfigError(
            f"{where}: {name!r} cannot be imported ({error}); install it, or name its folder in PYTHONPATH"
        ) from None
    except KeyError:
        raise ConfigError(f"{where}: {name!r} cannot be imported ({module} holds no {attribute})") from None
