"""A config read: from a file or a tree, with `section.key=value` overrides; and written again.

Overrides are merged into the raw tree before it is validated, so a file and a command line are checked alike;
`stages.sft.batch_size=8` names a stage.

YAML is read as its version 1.2 has it. To 1.1, which PyYAML speaks, 010 is 8, 1:30 is 90, `on` is true, 2026-01-01 a
date, and 1e-4 a text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mmit.config.faults import ConfigError, explain
from mmit.config.schema import Config


def recipes() -> Path:
    """The folder of recipes: that of the checkout, or as the wheel carries it."""
    checkout = Path(__file__).parents[2] / "configs"
    return checkout if (checkout / "demo.yaml").exists() else Path(__file__).parents[1] / "configs"


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The run that `file` and the `section.key=value` overrides describe; `ConfigError` lists every fault at once."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; recipes to copy lie in {recipes()}") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a folder; name its config, {file / 'config.yaml'}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: cannot be read as text; save it as UTF-8, or name a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read as text ({error}); name a YAML file") from None
    try:
        tree = read_yaml(text, file.name)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of 5,000 digits
        tabs = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
        raise ConfigError(f"{file}: not valid YAML: {' '.join(str(error).split())}{tabs}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected `key: value` lines with output, model and stages, found {tree!r:.60}")
    return parse_config(tree, str(file), overrides)


def parse_config(tree: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """`load_config` for a tree that is already in memory."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        _merge(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where} is not a valid run:\n" + "\n".join(explain(error, tree, Config))) from None


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str, name: str = "") -> Any:
    """What a text of YAML says; `name` is told beside the line of a fault (yaml.YAMLError)."""
    loader = _Yaml(text)
    loader.name = name
    return loader.get_single_data()


def read_value(text: str) -> Any:
    """What the value of a KEY=VALUE on a command line says."""
    node = (loader := _Yaml(text)).get_single_node()
    if node is None:
        return text.strip() or None
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value != text.strip():
        return text.strip()  # photos #2: nothing on a command line is a comment
    return loader.construct_document(node)


def _merge(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: write section.key=value, such as stages.sft.batch_size=8")
    try:
        value = read_value(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(
            f"override {override!r}: {text!r} is not a YAML value; if it is a text, write '{path}=\"...\"'"
        ) from None
    *parents, last = path.split(".")
    here: Any = tree
    for number, word in enumerate(parents):
        here = _child(here, word, override, ".".join(parents[: number + 1]))
    if isinstance(here, list):
        here[_position(here, last, override)] = value
    else:
        here[last] = value


def _child(node: Any, word: str, override: str, path: str) -> Any:
    key: Any = _position(node, word, override) if isinstance(node, list) else word
    child = node[key] if isinstance(node, list) else node.get(key)
    if child is None:
        child = node[key] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(f"override {override!r}: {path} is {child!r}, which has no keys; set it as a whole")
    return child


def _position(items: list[Any], word: str, override: str) -> int:
    names = [str(item.get("name", "")) if isinstance(item, dict) else "" for item in items]
    if word and word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(items):
        return int(word)
    named = [name for name in names if name]
    raise ConfigError(
        f"override {override!r}: {word!r} is none of 0..{len(items) - 1}" + (f" {named}" if named else "")
    )


NUMBERS = {
    # 010 and +1 stay texts, of which a number is made, by tens, where one is meant; a folder is called what it says.
    "int": r"-?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
SCALARS = NUMBERS | {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "null": r"~|null|Null|NULL|",
    "merge": r"<<",  # of 1.1 alone, but configs share sections by it
}


class _Yaml(yaml.SafeLoader):
    """YAML 1.2 in which a key may stand once: of two `train:` sections PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands there twice; keep one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that would be something else to either version."""


_Yaml.yaml_implicit_resolvers = {
    None: [(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{known})\Z")) for kind, known in SCALARS.items()]
}
for _kind, _known in NUMBERS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_known})\Z"), list("-+.0123456789"))
