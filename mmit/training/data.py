"""The sources of a stage opened: which samples train, which are held out, in which order, rendered how."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from mmit.config import Config, ConfigError, Holdout, Source, Stage
from mmit.data.loader import Encoder, Rendering, Steps
from mmit.data.order import Order, Origin, held_out, permutation
from mmit.data.packing import Costs
from mmit.data.shards import ShardSet, components
from mmit.model.build import Assembly

SURVEYED = 1000
"""Samples rendered before step 0 to say how many are too long; all of them in a set no larger."""
SURVEYED_TARS = 4
"""Of a set that has to be fetched, the tars they are taken from: a thousand samples can lie in as many."""


@dataclass(frozen=True)
class StageData:
    titles: list[str]
    """What metrics call each source; held-out-only sources come last."""
    fingerprints: dict[str, str]
    training: Steps
    total: int
    """Steps of the stage."""
    held_out: Steps | None


def open_stage(
    config: Config, stage: Stage, assembly: Assembly, *, cache: Path, on_cuda: bool, rank: int, ranks: int
) -> StageData:
    """Opens every source (ConfigError or SampleError names a faulty one) and lays out the steps of this rank."""
    shards = [_open(source, config, cache) for source in stage.data]
    rendering = rendering_of(config, stage, assembly)
    out = None
    if config.eval is not None and config.eval.holdout is not None:
        # The pictures of the other stages join in: what this one holds out, no other may have trained on.
        by_picture = config.eval.holdout.by == "picture"
        rest = [other for other in config.stages if by_picture and other.name != stage.name]
        others = [_open(source, config, cache) for other in rest for source in other.data]
        out = _hold_out([*shards, *others], config.eval.holdout, config.seed)[: len(shards)]
    origins = []
    for number, (source, samples) in enumerate(zip(stage.data, shards, strict=True)):
        taken = np.flatnonzero(~out[number]) if out is not None else np.arange(len(samples))
        if source.limit is not None and source.limit < len(taken):
            chosen = permutation(len(taken), config.seed, samples.fingerprint, "limit")[: source.limit]
            taken = taken[np.sort(chosen)]
        if not len(taken):
            raise ConfigError(f"stage {stage.name}: source {source.title} has no sample left to train on")
        origins.append(_origin(source, samples, taken, stage))
    order = Order(tuple(origins), config.seed, stage.batch_size, stage.window if stage.order == "window" else None)
    total = stage.steps if stage.steps is not None else order.total_steps(stage.epochs or 1)
    if total == 0:
        raise ConfigError(f"stages.{stage.name}: {stage.epochs or 1:g} epochs are no step; raise epochs or repeat")
    encoders = [Encoder(samples, rendering, number, cache) for number, samples in enumerate(shards)]
    layout: dict[str, Any] = {
        "rank": rank,
        "ranks": ranks,
        "row_tokens": row_tokens(stage, on_cuda),
        "row_images": stage.row_images,
        "costs": _costs(assembly),
        "on_bad_sample": stage.on_bad_sample,
    }
    return StageData(
        titles=_titles(config, stage),
        fingerprints=_fingerprints(config, stage, shards),
        training=Steps(order, encoders, **layout),
        total=total,
        held_out=_held_out_steps(config, stage, out, encoders, cache, layout),
    )


def check_shown(stage: Stage, steps: Steps) -> None:
    """ConfigError for a part that learns from pictures alone, in a stage without one: it would stay as it is."""
    parts = [part for part in ("vision", "projector") if dict(stage.train)[part] is not None]
    pairs = zip(steps.encoders, steps.order.origins, strict=True)
    if parts and not any(encoder.shards.image_sizes(int(i)) for encoder, origin in pairs for i in origin.indices):
        raise ConfigError(
            f"stages.{stage.name}.train: {' and '.join(parts)} cannot learn, since no sample of the stage shows a "
            f"picture; take that out, or look at the data with `mmit-data show`: it may have lost its pictures, or "
            f"eval.holdout keeps them all"
        )


def fingerprints_of(config: Config, stage: Stage, cache: Path) -> dict[str, str]:
    """What the samples of each source of the stage are known by."""
    return _fingerprints(config, stage, [_open(source, config, cache) for source in stage.data])


def _fingerprints(config: Config, stage: Stage, shards: Sequence[ShardSet]) -> dict[str, str]:
    titles = _titles(config, stage)
    return {title: samples.fingerprint for title, samples in zip(titles, shards, strict=False)}


def rendering_of(config: Config, stage: Stage, assembly: Assembly) -> Rendering:
    vision, projector = assembly.vlm.vision, assembly.vlm.projector
    tokens = 0
    if vision is not None and projector is not None:
        tokens = cast(Any, type(projector)).tokens_for(vision.tokens)
    return Rendering(
        chat=assembly.chat(stage.chat or config.model.chat),
        fit=assembly.fit(stage.pictures),
        image_tokens=tokens,
        max_tokens=stage.max_tokens,
        over_long=stage.over_long,
    )


def row_tokens(stage: Stage, on_cuda: bool) -> int:
    if stage.row_tokens == "auto":
        # On a CPU, attention computes the whole square of a row.
        return max(8192 if on_cuda else 1024, stage.max_tokens)
    return stage.row_tokens


def too_long(data: StageData) -> list[str]:
    """Before step 0: what max_tokens will cut or drop, by source; exact for small sources, else from a sample. Also of
    what is held out, where a sample that cannot be rendered is named now and not at the first evaluation.

    ConfigError if nothing of a source would be left to train on: a run would end well and have learned nothing.
    """
    lines = []
    for steps in [data.training, *([data.held_out] if data.held_out is not None else [])]:
        for encoder, origin in zip(steps.encoders, steps.order.origins, strict=True):
            size = len(origin.indices)
            looked_at = _looked_at(origin, encoder.shards)
            outcomes = [steps.try_example(encoder, int(index)) for index in looked_at]
            cut = sum(isinstance(outcome, tuple) and outcome[1] for outcome in outcomes)
            dropped = sum(isinstance(outcome, str) for outcome in outcomes)
            bad = outcomes.count(None)
            title = data.titles[encoder.source]
            drawn = len(looked_at) == size or not encoder.shards.is_remote  # a few tars may hold the long ones
            if dropped == len(looked_at) and drawn and steps is data.training:
                raise ConfigError(
                    f"max_tokens: {encoder.rendering.max_tokens} leaves nothing of source {title}: each of the "
                    f"{dropped} samples looked at is longer, in its first turn or whole; raise max_tokens"
                )
            facts = [f"max_tokens cuts {cut} and drops {dropped}"] if cut or dropped else []
            facts += [f"{bad} cannot be rendered"] if bad else []
            if facts:
                among = "all" if size == len(looked_at) else f"{len(looked_at)} sampled of"
                what = "samples" if steps is data.training else "held-out samples"
                lines.append(f"{title}: {', '.join(facts)} of {among} {size} {what}")
    return lines


def fetched_again(data: StageData, config: Config, stage: Stage) -> list[str]:
    """Before training: whether the cache is too small for the tars among which the order draws, so that they would be
    fetched anew for nearly every sample."""
    drawn: dict[str, int] = {}
    for encoder, origin in zip(data.training.encoders, data.training.order.origins, strict=True):
        shards = encoder.shards
        if shards.is_remote:
            used = np.unique(np.searchsorted(np.cumsum(shards.shard_sizes), origin.indices, side="right")).tolist()
            largest = sorted(((shards.shard_bytes[shard], shards.shard_sha256[shard]) for shard in used), reverse=True)
            drawn |= {name: size for size, name in largest[: stage.window if stage.order == "window" else None]}
    needed = sum(drawn.values()) / 1e9
    if needed <= config.remote_cache_gb:
        return []
    remedy = f"lower window (now {stage.window})" if stage.order == "window" else "write order: window"
    return [
        f"samples are drawn from {len(drawn)} remote tars of {needed:.3g} GB at a time, and remote_cache_gb keeps "
        f"{config.remote_cache_gb:g}: tars will be fetched again and again; {remedy}, or raise remote_cache_gb"
    ]


def _looked_at(origin: Origin, shards: ShardSet) -> np.ndarray:
    """All that lie here are drawn from; of a set that has to be fetched, those of a few tars."""
    indices = origin.indices
    if shards.is_remote:
        tar_of = np.searchsorted(np.cumsum(shards.shard_sizes), indices, side="right")
        tars = np.unique(tar_of)
        indices = indices[np.isin(tar_of, tars[permutation(len(tars), "survey")[:SURVEYED_TARS]])]
    return indices[permutation(len(indices), "survey")[:SURVEYED]]


def _held_out_steps(
    config: Config,
    stage: Stage,
    out: list[np.ndarray] | None,
    encoders: Sequence[Encoder],
    cache: Path,
    layout: dict[str, Any],
) -> Steps | None:
    """Steps over what is held out and what is only evaluated, at most `eval.samples` a source, always the same ones."""
    if config.eval is None:
        return None
    pairs: list[tuple[Encoder, np.ndarray]] = []
    if out is not None:
        pairs += [(encoder, np.flatnonzero(mask)) for encoder, mask in zip(encoders, out, strict=True)]
    for number, source in enumerate(config.eval.data, start=len(encoders)):
        samples = _open(source, config, cache)
        pairs.append((Encoder(samples, encoders[0].rendering, number, cache), np.arange(len(samples))))
    origins, evaluated = [], []
    for encoder, indices in pairs:
        if len(indices):
            chosen = indices[np.sort(permutation(len(indices), config.seed, "evaluate")[: config.eval.samples])]
            origins.append(Origin(encoder.shards.fingerprint, chosen))
            # Chosen out of the whole set, they lie in many tars, each of which would else come, and come again at the
            # next evaluation where the cache is smaller than the set.
            few = encoder.shards.for_few(chosen.tolist())
            evaluated.append(Encoder(few, encoder.rendering, encoder.source, cache))
    if not origins:
        share = f"{config.eval.holdout.fraction:g} by {config.eval.holdout.by}" if config.eval.holdout else "eval.data"
        samples = sum(len(encoder.shards) for encoder in encoders)
        raise ConfigError(
            f"eval: a share of {share} holds out none of the {samples} samples of stage {stage.name}; raise "
            f"eval.holdout.fraction, or write eval: null"
        )
    order = Order(tuple(origins), config.seed, max(stage.batch_size, 8))
    return Steps(order, evaluated, **layout)


def _open(source: Source, config: Config, cache: Path) -> ShardSet:
    if source.shards is None:
        raise ConfigError(f"source {source.title}: {source.format} has not been converted to shards")
    return ShardSet(source.shards, cache=cache, limit=int(config.remote_cache_gb * 10**9))


def _origin(source: Source, samples: ShardSet, taken: np.ndarray, stage: Stage) -> Origin:
    shard_of = np.repeat(np.arange(len(samples.shard_sizes)), samples.shard_sizes)
    return Origin(
        fingerprint=samples.fingerprint,
        indices=taken,
        repeat=source.repeat,
        shards=shard_of[taken] if stage.order == "window" else None,
        groups=samples.picture_groups()[taken] if stage.group_by == "picture" else None,
    )


def _hold_out(shards: Sequence[ShardSet], holdout: Holdout, seed: int) -> list[np.ndarray]:
    """Which samples of each source are held out. Groups span sources: a picture used by two is on one side in both."""
    starts = np.cumsum([0, *(len(samples) for samples in shards)])
    if holdout.by == "picture":
        names = _picture_groups(shards)
    elif holdout.by == "sample":
        names = [f"{samples.fingerprint}:{key}" for samples in shards for key in samples.keys()]  # noqa: SIM118
    else:
        key = holdout.by.removeprefix("meta.")
        for samples in shards:
            samples.meta_groups(key)  # names a sample without the key
        values = (samples.meta(i)[key] for samples in shards for i in range(len(samples)))
        names = [json.dumps(value, sort_keys=True) for value in values]
    out = held_out(names, holdout.fraction, seed)
    return [out[start:stop] for start, stop in itertools.pairwise(starts)]


def _picture_groups(shards: Sequence[ShardSet]) -> list[str]:
    """Of each sample of all sources: a name that it shares with those that show one of its pictures, also through
    others. It is the least hash of the group's pictures, or the sample's own where it shows none."""
    starts = np.cumsum([0, *(len(samples) for samples in shards)])
    names = [f"{samples.fingerprint}:{key}" for samples in shards for key in samples.keys()]  # noqa: SIM118
    found = [samples.pictures() for samples in shards]
    owners = np.concatenate([own + start for (own, _), start in zip(found, starts, strict=False)])
    unique, pictures = np.unique(np.concatenate([hashes for _, hashes in found]), return_inverse=True)
    groups = components(int(starts[-1]), owners, pictures)
    least = np.full(int(starts[-1]), len(unique))
    np.minimum.at(least, groups[owners], pictures)
    of_group = [bytes(unique[place]).hex() if place < len(unique) else "" for place in least]
    return [of_group[group] or name for group, name in zip(groups, names, strict=True)]


def _titles(config: Config, stage: Stage) -> list[str]:
    """The title of each source, then of those that are only evaluated, numbered where two are the same."""
    titles: list[str] = []
    for source in [*stage.data, *(config.eval.data if config.eval is not None else ())]:
        same = (f"{source.title}-{number}" for number in itertools.count(2))
        titles.append(next(title for title in itertools.chain([source.title], same) if title not in titles))
    return titles


def _costs(assembly: Assembly) -> Costs:
    """Per token of the LLM: attention from 12 H^2 weights a layer, and a picture from the tower's weights."""
    vlm = assembly.vlm
    width = int(cast(Any, vlm.language.get_input_embeddings()).weight.shape[1])
    picture = 0.0
    if vlm.vision is not None:
        picture = vlm.vision.tokens * _size(vlm.vision) / _size(vlm.language) / 3  # forward only: a third of training
    return Costs(attention=1 / (12 * width), picture=picture)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
