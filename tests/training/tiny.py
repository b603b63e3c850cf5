"""Runs small enough to be made by the dozen: shards of mixed samples, configs, and processes forked from a warm one."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import yaml

import mmit.training.loop  # noqa: F401 (for the forks)
from mmit.cli import main
from mmit.config import Config, dump_config, parse_config
from mmit.data.packing import Example, Row, pack
from mmit.data.sample import ImagePart, Sample, message
from mmit.data.shards import ShardSet, write_shards
from mmit.model.build import Assembly, add_lora, assemble, set_trained
from mmit.training.data import StageData, open_stage
from tests.data.pictures import picture

torch.set_num_threads(1)

LANGUAGE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN2: dict[str, Any] = LANGUAGE | {"model_type": "qwen2", "num_key_value_heads": 2}
GEMMA3: dict[str, Any] = QWEN2 | {
    "model_type": "gemma3_text",
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
QUIET_GPT2: dict[str, Any] = GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SIGLIP: dict[str, Any] = CLIP | {"model_type": "siglip_vision_model"}
PICTURES = [picture(13 + number, 11, seed=number) for number in range(5)]


def pictured(number: int) -> Sample:
    """One to three pictures between texts; every third shows one that its neighbour shows too."""
    shown = [PICTURES[(number + place) % 5] for place in range(1 + number % 3)]
    parts: list[ImagePart | str] = []
    for place in range(len(shown)):
        parts += [f"look {place} ", ImagePart(place)]
    turns = [message("user", *parts, f" what is {number}?"), message("assistant", f"it is {number * 7}")]
    if number % 2:
        turns += [message("user", "sure?"), message("assistant", "yes")]
    return Sample(f"p{number:04d}", "pictured", tuple(turns), tuple(shown))


def written(number: int) -> Sample:
    """A text-only sample."""
    turns = (message("user", f"count to {number}"), message("assistant", "one two three"[: 3 + number % 11]))
    return Sample(f"t{number:04d}", "written", turns)


def silent(number: int) -> Sample:
    """A picture and an answer from which nothing is learned."""
    turns = (message("user", ImagePart(0), "and?"), message("assistant", "nothing", train=False))
    return Sample(f"s{number:04d}", "silent", turns, (PICTURES[number % 5],))


def mixed(count: int) -> list[Sample]:
    makers = (pictured, written, pictured, pictured, silent)
    return [makers[number % 5](number) for number in range(count)]


def shards(folder: Path, samples: Sequence[Sample]) -> Path:
    found: ShardSet = write_shards(samples, folder, samples_per_shard=7)
    return found.folder


def stage(name: str, data: Path | Sequence[Path], train: dict[str, Any], **changes: Any) -> dict[str, Any]:
    folders = [data] if isinstance(data, Path) else data
    settings = {"batch_size": 5, "max_tokens": 200, "warmup": 0.1, "weight_decay": 0.01}
    return {"name": name, "data": [{"shards": str(folder)} for folder in folders], "train": train} | settings | changes


def config(output: Path, *stages: dict[str, Any], vision: dict[str, Any] | None = CLIP, **changes: Any) -> Config:
    language = changes.pop("language", LANGUAGE)
    model: dict[str, Any] = {"language": {"random": language} if isinstance(language, dict) else language}
    model |= {"vision": None, "attention": changes.pop("attention", "auto")}
    if vision is not None:
        model["vision"] = vision if "library" in vision else {"library": "transformers", "random": vision}
        model["projector"] = {"kind": "mlp", "depth": 2}
    tree: dict[str, Any] = {
        "output": str(output),
        "seed": 3,
        "model": model,
        "stages": list(stages),
        "workers": 0,
        "threads": 1,
        "device": "cpu",
        "cache": str(output.parent / "cache"),
    }
    return parse_config(json.loads(json.dumps(tree | changes)), "test")


def metrics(run: Path, *, evaluations: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock says; of a step told twice, both."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if evaluations == ("held_out" in line)]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in kept]


def once_each(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a step, in order. Fails if a step was told twice with other numbers."""
    told: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        place = line["stage"], line["step"]
        assert told.setdefault(place, line) == line, f"{place} was repeated with other numbers"
    return list(told.values())


def start(wanted: Config, *, lead_group: bool = False) -> int:
    """`mmit train` in a fork of this process, which has imported all that it needs; returns the process id.

    What it says lands beside the run, in `.log`; with `lead_group` it and its workers can be signalled together.
    """
    output = Path(wanted.output)
    file = output.with_suffix(".yaml")
    whole = file.with_suffix(".part")
    whole.write_text(dump_config(wanted), encoding="utf-8")
    whole.rename(file)  # another rank may be reading it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        process = os.fork()
    if process:
        return process
    code: Any = 1
    try:
        vars(forkserver._forkserver)["_forkserver_pid"] = None  # that of another process, which is not to be waited for
        if lead_group:
            os.setsid()
        descriptor = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        sys.argv = ["mmit", "train", str(file)]
        warnings.simplefilter("ignore")
        main()
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Waits; the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(wanted: Config) -> Path:
    """`mmit train` in a fork; fails with what it said unless it ends well."""
    code = ended(start(wanted))
    assert code == 0, said(wanted)
    return Path(wanted.output)


def altered(wanted: Config, output: Path, **changes: Any) -> Config:
    """The config with other top-level settings, validated anew."""
    tree = yaml.safe_load(yaml.safe_dump(wanted.model_dump(mode="json")))
    return parse_config(tree | {"output": str(output)} | changes, "test")


def said(wanted: Config) -> str:
    return Path(wanted.output).with_suffix(".log").read_text(encoding="utf-8")


# Without a run ----------------------------------------------------------------------------


def assembled(wanted: Config, *, number: int = 0, dtype: torch.dtype = torch.float64) -> Assembly:
    """The model as stage `number` trains it, in evaluation mode."""
    assembly = assemble(wanted.model, seed=wanted.seed)
    language = wanted.stages[number].train.language
    if language is not None and language.lora is not None:
        add_lora(assembly, language.lora, seed=0)
    set_trained(assembly, wanted.stages[number].train, trained_dtype=dtype, frozen_dtype=dtype)
    assembly.vlm.eval()
    return assembly


def opened(wanted: Config, assembly: Assembly, *, number: int = 0, rank: int = 0, ranks: int = 1) -> StageData:
    cache = Path(str(wanted.cache))
    return open_stage(wanted, wanted.stages[number], assembly, cache=cache, on_cuda=False, rank=rank, ranks=ranks)


def alone(found: StageData) -> list[Row]:
    """Every sample of the first source as a row of its own."""
    encoder = found.training.encoders[0]
    rows = []
    for index in range(len(encoder.shards)):
        outcome = encoder.example(index)
        assert not isinstance(outcome, str)
        rows.append(row_of([outcome[0]], dict(encoder.pixels(index))))
    return rows


def together(found: StageData, indices: Sequence[int]) -> Row:
    """Those samples of the first source in one row."""
    encoder = found.training.encoders[0]
    examples, pixels = [], {}
    for index in indices:
        outcome = encoder.example(index)
        assert not isinstance(outcome, str)
        examples.append(outcome[0])
        pixels |= dict(encoder.pixels(index))
    return row_of(examples, pixels)


def row_of(examples: Sequence[Example], pixels: dict[bytes, torch.Tensor], *, touch_vision: bool = False) -> Row:
    return pack(examples, list(pixels.values()), list(pixels), touch_vision=touch_vision)


def gradients(assembly: Assembly, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Of the summed losses of `rows`; zeros where there is none."""
    assembly.vlm.zero_grad(set_to_none=True)
    for row in rows:
        losses = assembly.vlm(row)
        if losses.requires_grad:
            losses.sum().backward()
    trained = {name: p for name, p in assembly.vlm.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    """Each tensor within `relative` of the other's largest entry (of a thousandth of the largest of all, for those that
    are zero but for rounding: a key's bias cancels in a softmax)."""
    assert found.keys() == expected.keys()
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    assert largest > 0
    for name, tensor in expected.items():
        size = max(float(tensor.abs().max()), 1e-3 * largest)
        difference = float((found[name] - tensor).abs().max()) / size
        assert difference <= relative, f"{name}: {difference:.1e}"
