"""What a run is asked to do: its schema, read from YAML and overrides, and every fault in it told at once."""

from mmit.config.faults import ConfigError, suggest
from mmit.config.own import imported
from mmit.config.reading import dump_config, load_config, parse_config, read_value, recipes
from mmit.config.schema import (
    Config,
    Holdout,
    Lora,
    Model,
    Projector,
    RandomLanguage,
    Source,
    Stage,
    Train,
    Trained,
    Vision,
)

__all__ = [
    "Config",
    "ConfigError",
    "Holdout",
    "Lora",
    "Model",
    "Projector",
    "RandomLanguage",
    "Source",
    "Stage",
    "Train",
    "Trained",
    "Vision",
    "dump_config",
    "imported",
    "load_config",
    "parse_config",
    "read_value",
    "recipes",
    "suggest",
]
