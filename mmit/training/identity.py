"""Whether what a run is asked for is still the run that has begun: its settings, in words, and never its places.

Model parts and samples are known by their content, which is compared once they are read (`mmit.training.state`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmit.config import Source

FREE_TO_CHANGE = {
    *("output", "workers", "threads", "cache", "device", "save", "eval", "stages", "parallel", "offload"),
    *("compile", "trackers", "remote_cache_gb"),
}
FREE_IN_STAGE = {
    *("row_tokens", "row_images", "gradient_checkpointing"),
    *("on_bad_sample", "max_skipped", "skip_nonfinite"),
}
MODEL_PLACES = (
    *(("from",), ("language",), ("language", "tokenizer")),
    *(("vision", "name"), ("vision", "pretrained"), ("projector", "from")),
)
SOURCE_PLACES = ("shards", "path", "images")


def compare(before: Mapping[str, Any], now: Mapping[str, Any], begun: Sequence[str]) -> tuple[list[str], list[str]]:
    """What differs in two configs (as dumped) of a run whose stages `begun` have begun, a line each; and the keys under
    which they name other places, where the same may lie."""
    at_home = copy.deepcopy(dict(now))
    moved = [f"model.{'.'.join(path)}" for path in MODEL_PLACES if _set_back(before["model"], at_home["model"], path)]
    old_stages = {stage["name"]: stage for stage in before["stages"]}
    names = [stage["name"] for stage in now["stages"]]
    in_stages: list[str] = []
    for place, name in enumerate(begun):
        if place >= len(names) or names[place] != name:
            in_stages.append(f"stages: {name!r} has begun and was stage {place + 1}, now {names}")
            continue
        stage = at_home["stages"][place]
        for number, (old, new) in enumerate(zip(old_stages[name]["data"], stage["data"], strict=False)):
            if _set_source_back(old, new):
                moved.append(f"stages.{name}.data.{number}")
        in_stages += _differences(old_stages[name], stage, FREE_IN_STAGE, f"stages.{name}.")
    found = [*_differences(before, at_home, FREE_TO_CHANGE, "")]
    found += _differences(_holdout(before), _holdout(now), set(), "eval.holdout.")  # decides what is trained on
    return found + in_stages, moved


def _set_back(before: Any, now: Any, path: Sequence[str]) -> bool:
    """Whether both have a place there, now another one that lies on this machine; `now` is given the old one."""
    *sections, key = path
    for section in sections:
        before, now = before.get(section), now.get(section)
        if not (isinstance(before, dict) and isinstance(now, dict)):
            return False
    old, new = before.get(key), now.get(key)
    if not (isinstance(old, str) and isinstance(new, str)) or old == new:
        return False
    if not (new.startswith(("/", ".")) or Path(new.removeprefix("local-dir:")).exists()):
        return False  # another name of the Hub, or another tag
    now[key] = old
    return True


def _set_source_back(before: Mapping[str, Any], now: dict[str, Any]) -> bool:
    """The same of a source: what metrics and checkpoints call it must have stayed."""
    if [before.get(key) for key in SOURCE_PLACES] == [now.get(key) for key in SOURCE_PLACES]:
        return False
    kinds = [[source.get(key) is None for key in SOURCE_PLACES] for source in (before, now)]
    titles = [Source.model_construct(**source).title for source in (before, now)]
    if kinds[0] != kinds[1] or titles[0] != titles[1]:
        return False
    now |= {key: before.get(key) for key in (*SOURCE_PLACES, "name")}
    return True


def _holdout(tree: Mapping[str, Any]) -> Any:
    return (tree.get("eval") or {}).get("holdout")


def _differences(before: Any, now: Any, free: set[str], path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted((before.keys() | now.keys()) - free):
            if before.get(key) != now.get(key):
                yield from _differences(before.get(key), now.get(key), set(), f"{path}{key}.")
    elif _are_sources(before) and _are_sources(now) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, set(), f"{path}{number}.")
            titles = [Source.model_construct(**source).title for source in (old, new)]
            if titles[0] != titles[1] and old.get("name") == new.get("name"):
                yield f"{path}{number}.name: if those are the same samples elsewhere, write name: {titles[0]}"
    elif before != now:
        yield f"{path.rstrip('.')}: was {before!r}, now {now!r}"


def _are_sources(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
