"""The same from Python as from the command line: sources converted, a config trained, a run loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmit.config import Config, ConfigError, Source, dump_config, load_config, suggest


def train(config: Config | Path | str, overrides: tuple[str, ...] = (), *, check_memory: bool = False) -> Path:
    """Runs, or goes on with, what the config's `output` names, and returns its `final/`.

    With `check_memory` each stage computes its longest step first, which changes no result.

    Raises ConfigError or SampleError for faults of the input, and mmit.training.run.Interrupted when a signal stopped
    the run after saving it.
    """
    if not isinstance(config, Config):
        config = load_config(Path(config), overrides)
    check_formats(config)
    from mmit.training.loop import train as run  # the seconds of torch and transformers, once the config is right

    return run(with_shards(config), asked=dump_config(config), check_memory=check_memory)


def replay(folder: Path) -> Iterator[str]:
    """Repeats the step that a run has kept in `fault-step-N/`; says line by line what is not finite in it."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder}: no config.yaml; name a fault-step-N/ that a run has left in its directory")
    config = load_config(file)
    from mmit.training.replay import replay

    yield from replay(with_shards(config), folder)


def with_shards(config: Config) -> Config:
    """The config with every `{FORMAT: PATH}` source converted, once, into shards in the cache."""
    from mmit.data.cache import cache_folder

    cache = cache_folder(config.cache)
    stages = [
        stage.model_copy(update={"data": [_converted(source, cache) for source in stage.data]})
        for stage in config.stages
    ]
    update: dict[str, object] = {"stages": stages}
    if config.eval is not None:
        data = [_converted(source, cache) for source in config.eval.data]
        update["eval"] = config.eval.model_copy(update={"data": data})
    return config.model_copy(update=update)


def check_formats(config: Config) -> None:
    """ConfigError if a source names a format that mmit-data does not know."""
    from data_tools.formats import FORMATS

    sources = [(f"stages.{stage.name}.data", source) for stage in config.stages for source in stage.data]
    sources += [("eval.data", source) for source in (config.eval.data if config.eval is not None else ())]
    for where, source in sources:
        if source.format is not None and source.format not in FORMATS and ":" not in source.format:
            raise ConfigError(f"{where}: {source.format!r} is not a format; {suggest(source.format, sorted(FORMATS))}")


def _converted(source: Source, cache: Path) -> Source:
    if source.format is None:
        return source
    from data_tools.convert import converted

    folder = converted(source, cache)
    update = {"shards": str(folder), "format": None, "path": None, "images": None, "options": {}, "name": source.title}
    return source.model_copy(update=update)


def notes(config: Config) -> list[str]:
    """What a user should know of a valid config before running it."""
    names = {stage.chat or config.model.chat for stage in config.stages}
    plain_text = sorted(names & {"vicuna_v1", "llava_llama_2"})
    return [
        f"chat {name}: its markers are plain text, so a user's text can imitate a turn; image counts stay exact"
        for name in plain_text
    ]
