"""Laws of a config: strict, every fault told at once with what to write, the same from a file and a command line."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from data_tools.formats import FORMATS
from mmit import cli
from mmit.api import check_names, train
from mmit.config import Config, ConfigError, RandomLanguage, dump_config, load_config, parse_config
from mmit.config.faults import ELSEWHERE, NEEDLESS
from mmit.config.reading import read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

GOOD: dict[str, Any] = {
    "output": "runs/x",
    "model": {
        "language": "some/llm",
        "vision": {"library": "open_clip", "name": "ViT-B-32", "pretrained": "openai"},
    },
    "stages": [
        {
            "name": "align",
            "data": [{"shards": "data/a"}],
            "chat": "plain",
            "train": {"projector": {"lr": 1e-3}},
            "batch_size": 256,
        },
        {
            "name": "sft",
            "data": [{"shards": "data/b"}, {"llava": "notes.json", "images": "photos", "repeat": 2}],
            "train": {"projector": {"lr": 2e-5}, "language": {"lr": 2e-5}},
            "batch_size": 128,
        },
    ],
}


def good() -> dict[str, Any]:
    return copy.deepcopy(GOOD)


def faults(change: Callable[[dict[str, Any]], object], *overrides: str) -> list[str]:
    """The lines that a changed config is refused with, without the first, which names the file."""
    tree = good()
    change(tree)
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, "run.yaml", overrides)
    first, *lines = str(caught.value).split("\n")
    assert first == "run.yaml is not a valid run:"
    assert all(line.startswith("  ") for line in lines)
    return [line[2:] for line in lines]


def nothing(tree: dict[str, Any]) -> None:
    pass


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_parses_and_comes_back_from_its_own_dump(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    again = tmp_path / "config.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config
    assert dump_config(load_config(again)) == dump_config(config)


def test_there_are_recipes() -> None:
    assert {"tiny.yaml", "text_sft.yaml", "llava15_7b.yaml", "llava15_7b_lora.yaml"} <= {file.name for file in RECIPES}


def test_a_rate_written_2e_5_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 wants a dot in floats: to PyYAML `2e-5` is a string."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(good()).replace("lr: 0.001", "lr: 2e-5"), encoding="utf-8")
    assert yaml.safe_load(file.read_text())["stages"][0]["train"]["projector"]["lr"] == "2e-5"
    part = load_config(file, ["stages.sft.train.language.lr=3e-6"]).stages[0].train.projector
    assert part is not None
    assert (part.lr, type(part.lr)) == (2e-5, float)
    language = load_config(file, ["stages.sft.train.language.lr=3e-6"]).stages[1].train.language
    assert language is not None
    assert language.lr == 3e-6


def test_a_source_in_short_form_is_a_format_and_its_path() -> None:
    first, second = parse_config(good(), "run.yaml").stages[1].data
    assert (first.shards, first.format, first.title) == ("data/b", None, "b")
    assert (second.format, second.path, second.images, second.repeat) == ("llava", "notes.json", "photos", 2.0)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_may_be_named_in_the_short_form(name: str) -> None:
    """`messages` was taken for a misspelt `images`."""
    source = f"stages.align.data=[{{{name}: rows.json, images: photos}}]"
    (found,) = parse_config(good(), "run.yaml", [source]).stages[0].data
    assert (found.format, found.path, found.images) == (name, "rows.json", "photos")


def test_a_tilde_is_the_home_folder_wherever_a_path_may_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    data = "stages.sft.data=[{llava: ~/notes.json, images: ~/photos}, {shards: ~/shards}]"
    places = ["output=~/run", "cache=~/cache", "model.language=~/llm", "model.vision.pretrained=~/clip.pt"]
    config = parse_config(good(), "run.yaml", [*places, data])
    first, second = config.stages[1].data
    assert (first.path, first.images, second.shards) == (
        "/home/me/notes.json",
        "/home/me/photos",
        "/home/me/shards",
    )
    assert (config.output, config.cache, config.model.language) == ("/home/me/run", "/home/me/cache", "/home/me/llm")
    assert config.model.vision is not None
    assert config.model.vision.pretrained == "/home/me/clip.pt"


def test_a_projector_need_not_be_written() -> None:
    projector = parse_config(good(), "run.yaml").model.projector
    assert projector is not None
    assert (projector.kind, projector.depth) == ("mlp", 2)


def test_a_random_language_model_is_told_from_a_name() -> None:
    tree = good() | {"model": {"language": {"random": {"model_type": "llama"}}, "vision": GOOD["model"]["vision"]}}
    assert isinstance(parse_config(tree, "run.yaml").model.language, RandomLanguage)


# Overrides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "1"])
def test_an_override_reaches_a_stage_by_name_and_by_number(stage: str) -> None:
    config = parse_config(
        good(),
        "run.yaml",
        [f"stages.{stage}.batch_size=8", f"stages.{stage}.data.1.repeat=0.5", "seed=7", "eval.holdout.fraction=0.1"],
    )
    assert [item.batch_size for item in config.stages] == [256, 8]
    assert config.stages[1].data[1].repeat == 0.5
    assert config.seed == 7
    assert config.eval is not None
    assert config.eval.holdout is not None
    assert config.eval.holdout.fraction == 0.1


def test_overrides_are_the_same_as_the_file_written_so() -> None:
    tree = good()
    tree["model"]["projector"] = {"kind": "linear"}
    tree["stages"][0]["data"] = [{"shards": "c"}]
    del tree["stages"][1]
    overrides = ["model.projector.kind=linear", "stages.align.data=[{shards: c}]"]
    shorter = good() | {"stages": good()["stages"][:1]}
    assert parse_config(shorter, "run.yaml", overrides) == parse_config(tree, "run.yaml")


def test_an_override_may_mend_what_is_missing_and_may_break_what_is_right() -> None:
    tree = good()
    del tree["stages"][0]["batch_size"]
    assert parse_config(tree, "run.yaml", ["stages.align.batch_size=3"]).stages[0].batch_size == 3
    assert faults(nothing, "stages.align.batch_size=0") == [
        "stages.0.batch_size: expected greater than 0; found 0",
    ]
    assert faults(nothing, "stages.sft.batchsize=3") == ["stages.1.batchsize: unknown key; did you mean 'batch_size'?"]


def test_overrides_leave_the_tree_of_the_caller_alone() -> None:
    tree = good()
    parse_config(tree, "run.yaml", ["stages.sft.batch_size=8", "eval.holdout.fraction=0.1"])
    assert tree == GOOD


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("seed=[", "is not a YAML value"),
        ("seed=!!python/object/apply:os.getpid []", "is not a YAML value"),
        ("stages.tune.batch_size=8", r"'tune' is none of 0..1 \['align', 'sft'\]"),
        ("stages.2.batch_size=8", r"'2' is none of 0..1"),
        ("stages.².batch_size=8", r"'²' is none of 0..1"),
        ("stages.-1.batch_size=8", r"'-1' is none of 0..1"),
        ("output.x=3", "output is 'runs/x', which has no keys"),
        ("stages.align.name.x=3", "stages.align.name is 'align', which has no keys"),
        ("stages.align.betas.0.x=3", "stages.align.betas.0 is 0.9, which has no keys"),
        ("stages.align.data..repeat=2", "'' is none of 0..0$"),
        ("model.vision={name: a, name: b}", "is not a YAML value"),
    ],
)
def test_an_override_that_leads_nowhere_says_where_it_stopped(override: str, told: str) -> None:
    tree = good()
    tree["stages"][0]["betas"] = [0.9, 0.95]
    with pytest.raises(ConfigError, match=told) as caught:
        parse_config(tree, "run.yaml", [override])
    assert repr(override) in str(caught.value)
    assert "\n" not in str(caught.value)


# Faults -------------------------------------------------------------------------------------------------------------


NUMBERS = {
    "whole": [
        *("seed", "workers", "threads", "save.every", "save.keep", "eval.every", "eval.samples", "eval.generate"),
        *("eval.max_new_tokens", "model.vision.layer", "model.vision.side", "model.projector.depth"),
        *("stages.sft.batch_size", "stages.sft.steps", "stages.sft.max_tokens", "stages.sft.row_tokens"),
        *("stages.sft.row_images", "stages.sft.window", "stages.sft.skip_nonfinite", "stages.sft.data.0.limit"),
        "stages.sft.train.language.lora.rank",
    ],
    "real": [
        *("eval.holdout.fraction", "remote_cache_gb", "stages.sft.epochs", "stages.sft.warmup", "stages.sft.final_lr"),
        *("stages.sft.weight_decay", "stages.sft.betas.0", "stages.sft.clip", "stages.sft.max_skipped"),
        *("stages.sft.train.language.lr", "stages.sft.train.language.lora.alpha", "stages.sft.data.0.repeat"),
        "stages.sft.train.language.lora.dropout",
    ],
}


def numbers_in(model: type[BaseModel]) -> set[str]:
    """The names of the fields, of a model and of those within it, that may hold a number."""

    def kinds(annotation: Any) -> Iterator[type]:
        if isinstance(annotation, type) and not get_args(annotation):
            yield annotation
        for item in get_args(annotation) if get_origin(annotation) is not Literal else ():
            yield from kinds(item)

    names: set[str] = set()
    for name, field in model.model_fields.items():
        for kind in kinds(field.annotation):
            names |= {name} if kind in (int, float) else numbers_in(kind) if issubclass(kind, BaseModel) else set()
    return names


def test_the_next_tests_leave_out_no_number() -> None:
    tested = {key.removesuffix(".0").rpartition(".")[2] for keys in NUMBERS.values() for key in keys}
    assert tested == numbers_in(Config)


@pytest.mark.parametrize("key", [key for keys in NUMBERS.values() for key in keys])
@pytest.mark.parametrize(("word", "found"), [("yes", "'yes'"), ("off", "'off'"), ("true", "True")])
def test_a_word_of_truth_is_no_number(key: str, word: str, found: str) -> None:
    """`batch_size: yes` was 1."""
    place = key.replace("sft", "1")
    (told,) = faults(put("stages/1/betas", [0.9, 0.95]), "eval.holdout.fraction=0.1", f"{key}={word}")
    assert re.match(rf"{re.escape(place)}: expected a (whole number|number|valid integer|valid number)", told)
    assert told.endswith(f"; found {found}")


WRITTEN = ("010", "08", "1:30", "1_000", "yes", "no", "on", "off", "2026-01-01", "2026-02-30", "+5", "0b11", "<", "=")


@pytest.mark.parametrize("text", WRITTEN)
def test_a_text_is_what_was_written(text: str) -> None:
    """`data.0.llava=010` was the file 8."""
    data = f"stages.sft.data=[{{llava: {text}}}]"
    config = parse_config(good(), "run.yaml", [data, f"output={text}", f"model.add_tokens=[{text}]"])
    assert (config.stages[1].data[0].path, config.output, config.model.add_tokens) == (text, text, [text])


@pytest.mark.parametrize("text", [*WRITTEN, "1e-4", "1E4", "0o10", "0x10", "5.", "null", "true", "y", "photos #2"])
def test_a_text_is_read_back_from_the_config_of_a_run_and_by_any_reader_of_yaml(text: str) -> None:
    tree = good()
    tree["output"] = text
    written = dump_config(parse_config(tree, "run.yaml"))
    assert yaml.safe_load(written)["output"] == read_yaml(written)["output"] == text


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("08", 8), ("1_000", 1000), ("+5", 5), ("0x10", 16)])
def test_a_whole_number_counts_by_tens(text: str, number: int) -> None:
    """`batch_size=010` was 8."""
    assert parse_config(good(), "run.yaml", [f"stages.sft.batch_size={text}"]).stages[1].batch_size == number


@pytest.mark.parametrize("text", ["1:30", "0b11", "2026-01-01", "1e3", ".inf"])
def test_what_is_no_whole_number_of_yaml_1_2_is_refused(text: str) -> None:
    """`batch_size=1:30` was 90."""
    (told,) = faults(nothing, f"stages.sft.batch_size={text}")
    assert told.startswith("stages.1.batch_size: expected a ")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "1.e-4", "+1e-4"])
def test_a_rate_is_the_number_it_says(text: str) -> None:
    """In an option of a format too, where nothing says that a number is meant."""
    changes = [f"stages.align.train.projector.lr={text}", f"stages.align.data.0.options={{x: {text}}}"]
    tree = good()
    tree["stages"][0]["data"] = [{"llava": "notes.json"}]
    stage = parse_config(tree, "run.yaml", changes).stages[0]
    assert stage.train.projector is not None
    assert stage.train.projector.lr == stage.data[0].options["x"] == 1e-4


@pytest.mark.parametrize(
    ("word", "truth"), [("yes", True), ("on", True), ("True", True), ("no", False), ("off", False)]
)
def test_words_of_truth_still_switch(word: str, truth: bool) -> None:
    assert parse_config(good(), "run.yaml", [f"log_samples={word}"]).log_samples is truth


def test_a_word_of_truth_among_the_sizes_of_a_random_tower_is_told() -> None:
    """To open_clip, which looks at no kinds, the text `no` would be true."""
    tower = "{library: open_clip, name: ViT-B-32, random: {quick_gelu: no}}"
    (told,) = faults(nothing, f"model.vision={tower}")
    assert told == "model.vision.random: quick_gelu: found 'no'; write true or false"


@pytest.mark.parametrize("text", ["runs/take #2", "#2"])
def test_nothing_on_a_command_line_is_a_comment(text: str) -> None:
    """`output="runs/take #2"` went to runs/take."""
    assert parse_config(good(), "run.yaml", [f"output={text}"]).output == text


@pytest.mark.parametrize("key", NUMBERS["whole"])
def test_a_number_with_a_point_does_not_count_things(key: str) -> None:
    (told,) = faults(nothing, "eval.holdout.fraction=0.1", f"{key}=2.0")
    assert told.startswith(f"{key.replace('sft', '1')}: expected a whole number")
    assert told.endswith("; found 2.0")


def test_all_faults_are_told_at_once_with_suggestions() -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["otput"] = tree.pop("output")
        tree["model"]["vision"]["layr"] = -2
        tree["model"]["vision"]["library"] = "openclip"
        tree["stages"][0]["batchsize"] = tree["stages"][0].pop("batch_size")
        tree["stages"][0]["data"] = []
        tree["stages"][1]["train"]["language"] = {"lr": "fast", "lora": {"rnk": 8}}

    assert faults(change) == [
        "output: is missing",
        "model.vision.library: expected 'open_clip' or 'transformers'; found 'openclip'",
        "model.vision.layr: unknown key; did you mean 'layer'?",
        "stages.0.data: List should have at least 1 item after validation, not 0; found []",
        "stages.0.batch_size: is missing",
        "stages.0.batchsize: unknown key; did you mean 'batch_size'?",
        "stages.1.train.language.lr: expected a valid number, unable to parse string as a number; found 'fast'",
        "stages.1.train.language.lora.rnk: unknown key; did you mean 'rank'?",
        "otput: unknown key; did you mean 'output'?",
    ]


def put(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(tree: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        node: Any = tree
        for word in parents:
            node = node[int(word) if isinstance(node, list) else word]
        node[int(last) if isinstance(node, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "lines"),
    [
        # Unions name the member that was meant, and never the others' complaints.
        ("model/language", {"random": {}, "tokeniser": "x"}, ["model.language.tokeniser: unknown key; did you mean"]),
        ("model/language", {"name": "x"}, ["model.language.random: is missing", "model.language.name: unknown key"]),
        ("model/language", 3, ["model.language: expected a valid string, or expected keys of its own (random, tok"]),
        ("stages/0/row_tokens", "lots", ["stages.0.row_tokens: expected a valid integer, unable to parse string as"]),
        (
            "stages/1/train/language",
            {"lr": 1, "lora": {"targets": ["q_proj", 5]}},
            ["stages.1.train.language.lora.targets.1: expected a valid string; found 5"],
        ),
        # Sources
        ("stages/0/data/0", {"shard": "x"}, ["stages.0.data.0.shard: unknown key; did you mean 'shards'?"]),
        (
            "stages/0/data/0",
            {"llava": "x", "imags": "y"},
            ["stages.0.data.0.imags: unknown key; did you mean 'images'?"],
        ),
        (
            "stages/0/data/0",
            {"llava": "x", "colour": 3},
            ["stages.0.data.0.colour: unknown key; known: format, images"],
        ),
        ("stages/0/data/0", {"llava": None}, ["stages.0.data.0: `llava` names no path"]),
        (
            "stages/0/data/0",
            {"llava": "x", "alpaca": "y"},
            ["stages.0.data.0: found llava and alpaca, but a source has one origin"],
        ),
        (
            "stages/0/data/0",
            {"shards": "x", "llava": "y", "images": "z"},
            ["stages.0.data.0: found shards and llava, but a source has one origin"],
        ),
        ("stages/0/data/0", {}, ["stages.0.data.0: write either `shards: FOLDER` or `FORMAT: PATH`"]),
        ("stages/0/data/0", {"shards": "x", "images": "y"}, ["stages.0.data.0: `images` and `options` belong to a"]),
        ("stages/0/data/0", "x", ["stages.0.data.0: expected a source, such as {llava: notes.json"]),
        # One thing against another
        ("model", {"from": "runs/x"}, ["(the whole file): model.from is the `output` of this very run"]),
        ("model/vision", None, ["(the whole file): stage 'align' trains", "(the whole file): stage 'sft' trains"]),
        ("model/vision/pretrained", None, ["model.vision: open_clip needs `pretrained`"]),
        ("stages/1/name", "align", ["(the whole file): two stages are called 'align'; give each its own name"]),
        ("stages/0/train", {}, ["stages.0.train: nothing is trained; name at least one of vision, projector, lang"]),
        ("eval", {}, ["eval: name a `holdout` share of the training data, or `data` to evaluate on"]),
        # Keys of other trainers
        ("stages/0/learning_rate", 1, ["stages.0.learning_rate: unknown key; here it is train: {PART: {lr: ...}}"]),
        (
            "stages/0/gradient_accumulation_steps",
            1,
            ["stages.0.gradient_accumulation_steps: unknown key; here"],
        ),
        (
            "stages/0/data/0",
            {"llava": "x", "image_folder": "y"},
            ["stages.0.data.0.image_folder: unknown key; here it is images"],
        ),
        ("stages/1/train/llm", {"lr": 1}, ["stages.1.train.llm: unknown key; here it is language"]),
        # Values
        ("output", "", ["output: String should have at least 1 character; found ''"]),
        ("stages/0/train/projector", 1e-3, ["stages.0.train.projector: expected keys of its own (lr); found 0.001"]),
        ("stages/0/train/projector/lr", float("nan"), ["stages.0.train.projector.lr: expected"]),
        ("stages/0/epochs", float("inf"), ["stages.0.epochs: expected a finite number; found inf"]),
        ("stages/0/name", "../x", ["stages.0.name: String should match pattern"]),
        ("eval", {"holdout": {"fraction": 1}}, ["eval.holdout.fraction: expected less than 1; found 1"]),
        ("stages", "x", ["stages: expected a valid list; found 'x'"]),
        ("stages", [], ["stages: List should have at least 1 item"]),
    ],
)
def test_a_fault_is_one_line_with_its_place_and_what_to_write(path: str, value: object, lines: list[str]) -> None:
    found = faults(put(path, value))
    assert len(found) == len(lines)
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(start)


def test_the_keys_of_a_llama_factory_file_are_answered_with_the_places_of_ours() -> None:
    """Of the thirty of one, twenty were answered with the same list of known keys."""
    tree: dict[str, Any] = {"model_name_or_path": "x/y", "template": "qwen", "finetuning_type": "lora", "lora_rank": 8}
    tree |= {"do_train": True, "cutoff_len": 2048, "val_size": 0.1, "eval_steps": 500, "logging_steps": 10}
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, "run.yaml")
    assert str(caught.value).split("\n  ")[1:] == [
        "output: is missing",
        "model: is missing",
        "stages: is missing",
        "model_name_or_path: unknown key; here it is model.language",
        "template: unknown key; here it is model.chat",
        "finetuning_type: unknown key; here it is stages.NAME.train.language.lora",
        "lora_rank: unknown key; here it is stages.NAME.train.language.lora.rank",
        "do_train: unknown key; leave it out: nothing here answers to it",
        "cutoff_len: unknown key; here it is stages.NAME.max_tokens",
        "val_size: unknown key; here it is eval.holdout.fraction",
        "eval_steps: unknown key; here it is eval.every",
        "logging_steps: unknown key; leave it out: metrics.jsonl has a line for every step",
    ]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("neat_packing", "rows are always packed"),
        ("completion_only_loss", "the assistant's messages are learned and nothing else"),
        ("mask_history", "every answer of a conversation is learned"),
        ("load_in_4bit", "quantized weights are not trained"),
        ("overwrite_cache", "nothing is overwritten"),
        ("eos_token", "the chat format says how an answer ends"),
    ],
)
def test_a_key_of_other_trainers_that_is_not_needed_is_answered_with_the_reason(key: str, told: str) -> None:
    """Three of these were answered with a near key of ours that means something else."""
    (line,) = faults(nothing, f"stages.sft.{key}=true")
    assert line.startswith(f"stages.1.{key}: unknown key; leave it out: {told}")


def test_a_key_of_other_trainers_has_a_place_here_or_a_reason_and_never_both() -> None:
    assert not ELSEWHERE.keys() & NEEDLESS.keys()
    (line,) = faults(nothing, "torch_compile=true")
    assert line == "torch_compile: unknown key; here it is compile"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("notes.json", "stages.1.data: expected a list of sources, such as [{llava: notes.json, images: photos/}]"),
        ("{llava: notes.json}", "stages.1.data: expected a list of sources, such as"),
        ("[notes.json]", "stages.1.data.0: expected a source, such as {llava: notes.json, images: photos/}; found"),
    ],
)
def test_data_that_is_no_list_of_sources_is_answered_with_one(value: str, told: str) -> None:
    (line,) = faults(nothing, f"stages.sft.data={value}")
    assert line.startswith(told)


@pytest.mark.parametrize("value", ["$HOME/run", "${HOME}/run", "runs/$USER"])
def test_a_variable_of_the_shell_in_a_path_is_refused_and_makes_no_folder_of_that_name(value: str) -> None:
    (line,) = faults(nothing, f"output={json.dumps(value)}")
    assert line.startswith(f"output: {value}: variables are not filled in here; write the path itself, or give")


def test_an_address_may_hold_a_dollar() -> None:
    config = parse_config(good(), "run.yaml", ["stages.sft.data=[{shards: 'https://host/set?a=$b'}]"])
    assert config.stages[1].data[0].shards == "https://host/set?a=$b"


def test_a_key_in_the_wrong_section_is_answered_with_its_place() -> None:
    assert faults(nothing, "batch_size=8", "stages.sft.holdout=0.1", "stages.sft.train.lora={rank: 8}") == [
        "stages.1.train.lora: unknown key; its place is stages.NAME.train.language.lora",
        "stages.1.holdout: unknown key; its place is eval.holdout",
        "batch_size: unknown key; its place is stages.NAME.batch_size",
    ]


def test_epochs_and_steps_exclude_each_other() -> None:
    assert faults(nothing, "stages.align.epochs=1", "stages.align.steps=5") == [
        "stages.0: both epochs and steps are set; keep one of them (KEY=null takes one out)"
    ]


def test_a_row_that_cannot_hold_a_sample_is_told_before_any_stage_runs() -> None:
    assert faults(nothing, "stages.sft.row_tokens=100") == [
        "stages.1: row_tokens 100 cannot hold a sample of max_tokens 2048; raise row_tokens or lower max_tokens"
    ]


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"stages: [\n", "not valid YAML: .*line 2"),
        (b"output: !!python/object/apply:os.getpid []\n", "not valid YAML: .*python/object"),
        (b"seed: 1\nseed: 2\n", "not valid YAML: the key 'seed' stands there twice.*line 2"),
        (b"model: {vision: null, language: x, vision: y}\n", "the key 'vision' stands there twice"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"output: a\x00b\n", "not valid YAML"),
        (b"model:\n\tlanguage: x\n", "line 2.*indent with spaces, not tabs"),
        (b"just text", "expected `key: value` lines with output, model and stages, found 'just text'"),
        (b"- a\n- b\n", "expected `key: value` lines"),
        (b"", "expected `key: value` lines.*found None"),
        (b"a: &a [*a]\n", r"is not a valid run:\n"),
        (b"[" * 5000, "not valid YAML"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_file_that_is_no_config_is_named_with_its_fault(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(file)
    assert str(caught.value).startswith(str(file))


def test_a_folder_in_place_of_a_config_is_answered_with_the_config_inside(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"is a folder; name its config, {tmp_path}/config\.yaml"):
        load_config(tmp_path)


def test_overrides_reach_a_config_that_python_has_loaded() -> None:
    config = parse_config(good(), "run.yaml")
    for given in (config, good()):
        with pytest.raises(ConfigError, match=r"stages\.1\.batch_size: expected greater than 0"):
            train(given, ["stages.sft.batch_size=0"])


def test_anchors_and_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    tree = yaml.safe_dump({key: value for key, value in good().items() if key != "stages"})
    stages = (
        "stages:\n- &first {name: one, data: [{shards: a}], train: {language: {lr: 1}}, batch_size: 2}\n"
        "- {<<: *first, name: two}\n"
    )
    file.write_text(tree + stages, encoding="utf-8")
    assert [stage.name for stage in load_config(file).stages] == ["one", "two"]


# The command --------------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `mmit`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mmit", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code if isinstance(ended.value.code, int) else int(ended.value.code is not None)


def test_config_prints_what_reads_back_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = next(file for file in RECIPES if file.name == "tiny.yaml")
    assert run(monkeypatch, "config", str(tiny), "seed=5") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert parse_config(printed, "printed") == load_config(tiny, ["seed=5"])


def test_the_schema_is_json_and_tells_every_key_of_the_recipes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "config", "--schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == Config.model_json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert all("description" in schema["$defs"]["Stage"]["properties"][key] for key in ("batch_size", "max_tokens"))


@pytest.mark.parametrize(
    "words",
    [
        ("config", "nowhere.yaml"),
        ("train", "nowhere.yaml"),
        ("config", "TINY", "stages.sft.batchsize=8"),
        ("config", "TINY", "stages.sft.data=[{lava: x.json}]"),
        ("train", "TINY", "stages.sft.data=[{lava: x.json}]"),
        ("config", "TINY", "stages.align.chat=plane"),
        ("config", "TINY", "model.projector.kind=mlp2x_gelu"),
        ("config", "TINY", "trackers=[wandbb]"),
        ("config",),
        ("config", "--colour"),
        ("tune",),
    ],
    ids=" ".join,
)
def test_a_fault_of_the_user_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    tiny = next(file for file in RECIPES if file.name == "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(str(tiny) if word == "TINY" else word for word in words)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.strip()
    assert "Traceback" not in told.err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_told_with_a_near_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = next(file for file in RECIPES if file.name == "tiny.yaml")
    assert run(monkeypatch, "config", str(tiny), "stages.sft.data=[{lava: x.json}]") == 2
    assert capsys.readouterr().err == "stages.sft.data: 'lava' is not a format; did you mean 'llava'?\n"


def test_a_format_that_is_to_be_guessed_is_answered_with_the_command_that_guesses() -> None:
    config = parse_config(good(), "run.yaml", ["stages.sft.data=[{auto: rows.json}]"])
    with pytest.raises(ConfigError, match=r"'auto' is not a format.*`mmit-data detect rows\.json` tells what"):
        check_names(config)


def test_options_of_all_sources_are_checked_before_the_first_is_converted() -> None:
    first = "stages.align.data=[{llava: a.json, options: {on_mising: drop}}]"
    second = "stages.sft.data=[{llava: b.json, options: {on_bad: skip}}]"
    config = parse_config(good(), "run.yaml", [first, second])
    with pytest.raises(ConfigError, match=r"(?s)align.*did you mean on_missing.*sft.*on_bad is 'skip'"):
        check_names(config)


def test_all_places_are_looked_for_before_the_first_source_is_converted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = f"[{{llava: {tmp_path}/gone.json, images: {tmp_path}/photos}}, {{shards: {tmp_path}/shards}}]"
    changes = [f"stages.sft.data={data}", f"output={tmp_path}/file/run", f"model.language={tmp_path}/llm"]
    changes += [f"model.vision.pretrained={tmp_path}/clip.pt", "model.projector.from=mm_projector.bin"]
    with pytest.raises(ConfigError) as caught:
        train(parse_config(good(), "run.yaml", [*changes, "stages.align.data=[{synthetic: captions}]"]))
    absent = ("gone.json", "photos", "shards", "llm", "clip.pt", "model.projector.from: mm_projector.bin")
    wanted = [*(f"{place}: no such" for place in absent), "file is a file"]
    assert [told for told in wanted if told not in str(caught.value)] == []


def test_the_installed_command_ends_so_too(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "mmit", "config", "nowhere.yaml"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == f"nowhere.yaml: no such file; recipes to copy lie in {RECIPES[0].parent}\n"


def test_mmit_alone_prints_what_to_begin_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch)
    begin = capsys.readouterr().out.partition("To begin with:")[2]
    for command in ("mmit demo", "mmit train", "mmit generate runs/tiny", "mmit config", "mmit-data --help"):
        assert command in begin


def test_ctrl_c_is_an_interruption_and_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ends: list[int] = []

    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cli, "load_config", interrupted)
    monkeypatch.setattr(cli, "_stop", lambda told, code: ends.append(code))
    monkeypatch.setattr(sys, "argv", ["mmit", "config", "x.yaml"])
    before = signal.getsignal(signal.SIGINT)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ends == [75]
    assert "Aborted" not in capsys.readouterr().err
