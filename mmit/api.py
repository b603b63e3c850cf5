"""The same from Python as from the command line: sources converted, a config trained, a run loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmit.config import Config, ConfigError, RandomLanguage, Source, dump_config, load_config, parse_config, suggest

Say = Callable[[str], object]


def train(
    config: Config | Mapping[str, Any] | Path | str,
    overrides: Sequence[str] = (),
    *,
    check_memory: bool = False,
    processes: int = 1,
) -> Path:
    """Runs, or goes on with, what the config's `output` names, and returns its `final/`; a file, its tree, or loaded.

    With `check_memory` each stage computes its longest step first, which changes no result; neither does the number of
    `processes` that convert its sources (more than one needs `if __name__ == "__main__":` in a script).

    Raises ConfigError or SampleError for faults of the input, and mmit.training.run.Interrupted, which is no
    Exception, when a signal stopped the run after saving it.
    """
    if isinstance(config, Path | str):
        config = load_config(Path(config), overrides)
    elif overrides or not isinstance(config, Config):
        tree = config.model_dump(mode="json") if isinstance(config, Config) else dict(config)
        config = parse_config(tree, "config", overrides)
    check_names(config)
    check_places(config)
    from mmit.training.loop import train as run  # the seconds of torch and transformers, once the config is right

    say: Say = partial(print, flush=True) if os.environ.get("RANK", "0") == "0" else _nothing
    prepared = with_shards(config, processes=processes, say=say)
    return run(prepared, asked=dump_config(config), check_memory=check_memory)


def replay(folder: Path) -> Iterator[str]:
    """Repeats the step that a run has kept in `fault-step-N/`; says line by line what is not finite in it."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder}: no config.yaml; name a fault-step-N/ that a run has left in its directory")
    config = load_config(file)
    from mmit.training.replay import replay

    yield from replay(with_shards(config), folder)


def _nothing(line: str) -> None:
    pass


def with_shards(config: Config, *, processes: int = 1, say: Say = _nothing) -> Config:
    """The config with every `{FORMAT: PATH}` source converted, once, into shards in the cache; says of all sources what
    their conversion has left out."""
    from mmit.data.cache import cache_folder

    cache = cache_folder(config.cache)
    told: set[str] = set()

    def once(line: str) -> None:
        if line not in told:  # stages may share a source
            told.add(line)
            say(line)

    def shards_of(sources: Sequence[Source]) -> list[Source]:
        return [_converted(source, cache, processes, once) for source in sources]

    update: dict[str, object] = {
        "stages": [stage.model_copy(update={"data": shards_of(stage.data)}) for stage in config.stages]
    }
    if config.eval is not None:
        update["eval"] = config.eval.model_copy(update={"data": shards_of(config.eval.data)})
    return config.model_copy(update=update)


def check_names(config: Config) -> None:
    """ConfigError, before any weights are read, for formats, their options, projectors, metrics and trackers that are
    not known."""
    faults = [*_unknown_formats(config), *_unknown_chats(config)]
    if config.model.projector is not None and config.model.projector.kind not in ("linear", "mlp"):
        from mmit.model.projector import projector_class

        projector_class(config.model.projector)
    if config.eval is not None:
        from mmit.evaluation.scores import metric_of

        metric_of(config.eval.metric)
    if config.trackers:
        from mmit.training.trackers import maker

        for name in config.trackers:
            maker(name)
    if faults:
        raise ConfigError("\n".join(faults))


def check_places(config: Config) -> None:
    """ConfigError, before hours go into the first conversion, for files and folders that are not there, all of them."""
    faults = list(_absent(config))
    folder = Path(config.output).absolute()
    held = next(place for place in (folder, *folder.parents) if place.exists())
    if not held.is_dir():
        faults.append(f"output: {config.output} cannot be written: {held} is a file; name a folder")
    elif not os.access(held, os.W_OK | os.X_OK):
        faults.append(f"output: {config.output} cannot be written: you may not write into {held}; name another")
    if faults:
        raise ConfigError("\n".join(faults))


def _absent(config: Config) -> Iterator[str]:
    from data_tools.formats import FORMATS
    from mmit.data.remote import is_remote

    for where, source in _sources(config):
        made = source.format in FORMATS and FORMATS[source.format].from_nothing
        if source.path is not None and not made and not Path(source.path).exists():
            yield f"{where}: {source.path}: no such file or folder (relative ones start in {Path.cwd()})"
        if source.images is not None and not Path(source.images).is_dir():
            yield f"{where}: {source.images}: no such folder; `images` names the one below which the pictures lie"
        if source.shards is not None and not is_remote(source.shards) and not Path(source.shards).is_dir():
            yield f"{where}: {source.shards}: no such folder of shards (relative ones start in {Path.cwd()})"
    model = config.model
    named = {"from": model.source, "language": model.language, "vision.name": model.vision and model.vision.name}
    for key, name in named.items():
        if isinstance(name, str) and name.startswith((".", "/")) and not Path(name).exists():
            yield f"model.{key}: {name}: no such folder; name one that holds a model's files, or a hub model"
    files = {
        "projector.from": model.projector and model.projector.source,
        "vision.pretrained": model.vision and model.vision.pretrained,
        "language.tokenizer": isinstance(model.language, RandomLanguage) and model.language.tokenizer,
    }
    for key, name in files.items():
        local = key == "projector.from" or str(name).startswith((".", "/"))  # which is never a name of the Hub
        if name and local and not Path(name).exists():
            yield f"model.{key}: {name}: no such file or folder (relative ones start in {Path.cwd()})"


def _sources(config: Config) -> list[tuple[str, Source]]:
    sources = [(f"stages.{stage.name}.data", source) for stage in config.stages for source in stage.data]
    return sources + [("eval.data", source) for source in (config.eval.data if config.eval is not None else ())]


def _unknown_formats(config: Config) -> Iterator[str]:
    from data_tools.convert import choices_of
    from data_tools.formats import FORMATS

    for where, source in _sources(config):
        if source.format is not None and source.format not in FORMATS and ":" not in source.format:
            advice = suggest(source.format, sorted(FORMATS))
            detect = f"; `mmit-data detect {source.path}` tells what it is" if advice.startswith("known: ") else ""
            yield f"{where}: {source.format!r} is not a format; {advice}{detect}"
        elif source.format is not None:
            try:
                choices_of(source)
            except ConfigError as error:
                yield f"{where}: {error}"


def _unknown_chats(config: Config) -> Iterator[str]:
    named = {"model.chat": config.model.chat}
    named |= {f"stages.{stage.name}.chat": stage.chat for stage in config.stages if stage.chat is not None}
    named = {where: name for where, name in named.items() if name != "auto" and ":" not in name}
    if named:
        from mmit.data.chat_formats import CHAT_FORMATS

        for where, name in named.items():
            if name not in CHAT_FORMATS:
                yield f"{where}: {name!r} is not a chat format; {suggest(name, ['auto', *CHAT_FORMATS])}"


def _converted(source: Source, cache: Path, processes: int, say: Say) -> Source:
    from data_tools.convert import converted, losses
    from data_tools.index import not_indexed

    if source.format is None:
        for line in [*losses(Path(source.shards or "")), *not_indexed(Path(source.shards or ""))]:
            say(f"{source.title}: {line}")
        return source
    told = time.monotonic()

    def progress(read: int, rows: int, rejected: int) -> None:
        nonlocal told
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(f"{source.title}: {read} rows read, {rows} converted, {rejected} rejected")

    folder = converted(source, cache, processes=processes, progress=progress)
    say(f"{source.title}: its shards are in {folder}")
    for line in losses(folder):
        say(f"{source.title}: {line}")
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
