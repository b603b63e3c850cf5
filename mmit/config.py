"""The schema of a run: one YAML with an ordered list of stages, loaded strictly, every fault named at once.

Paths are relative to the folder in which the command runs; `~` is the home folder. `section.key=value` overrides are
merged into the raw tree before it is validated, so a file and a command line are checked alike;
`stages.sft.batch_size=8` names a stage.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _number(value: Any) -> Any:
    """YAML's yes, no, on and off are booleans, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "expected a number")
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, bool | float):
        raise PydanticCustomError("whole_number", "expected a whole number")
    return value


Int = Annotated[int, BeforeValidator(_whole)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
Float = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path, hub name or address."""


class ConfigError(ValueError):
    """A fault of the user's input: where it is, what was found and what to write instead."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        serialize_by_alias=True,  # `from` is no name for a field in Python
    )


class RandomLanguage(Section):
    """A causal LLM with random weights, for trials and tests."""

    random: dict[str, Any]
    """A transformers configuration: `model_type` and its sizes."""
    tokenizer: Place = "bytes"
    """`bytes` for the built-in byte tokenizer, else a hub name or folder."""


class Vision(Section):
    library: Literal["open_clip", "transformers"]
    name: Annotated[str, AfterValidator(os.path.expanduser)] = ""
    """Model name (open_clip), hub name or folder (transformers)."""
    pretrained: Place | None = None
    """open_clip: the tag or file of the weights, unless `name` is hf-hub:NAME or local-dir:FOLDER, which hold them.
    transformers loads those of `name`."""
    layer: Int = -2
    """Hidden state to read, counted as transformers does: 0 the embeddings, -1 the last block, before the
    final norm."""
    select: Literal["patch", "cls_patch", "cls"] = "patch"
    """Which tokens of that layer reach the projector."""
    side: PositiveInt | None = None
    """Picture side in pixels, when it is not the tower's own; position embeddings are interpolated."""
    random: dict[str, Any] | None = None
    """Sizes of a tower with random weights, instead of pretrained ones."""
    cache: bool = False
    """Keep the features of a frozen tower on disk, so that every picture is encoded once."""

    @model_validator(mode="after")
    def _has_a_source(self) -> Vision:
        if self.random is None and not self.name:
            raise ValueError("write `name` (and, for open_clip, `pretrained`), or `random` for a tower without weights")
        holds_weights = self.name.startswith(("hf-hub:", "local-dir:"))
        if self.random is None and self.library == "open_clip" and self.pretrained is None and not holds_weights:
            raise ValueError("open_clip needs `pretrained` (a tag such as openai, or a file), or `random`")
        return self


class Projector(Section):
    kind: str = "mlp"
    """`linear`, `mlp`, or `package.module:Name` of your own."""
    depth: PositiveInt = 2
    """Linear layers of an mlp, with GELU between them."""
    init: Literal["default", "feature_statistics"] = "default"
    """`feature_statistics`: inputs whitened by the features of the first pictures, outputs scaled to the RMS of the
    word embeddings; learns to see several times sooner when data is short."""
    source: Place | None = Field(default=None, alias="from")
    """A file to start from: model.safetensors of a run or an export, or LLaVA's mm_projector.bin."""

    @model_validator(mode="after")
    def _one_start(self) -> Projector:
        if self.source is not None and self.init != "default":
            raise ValueError("`from` and `init` both say how the projector starts; keep one of them")
        return self


class Model(Section):
    source: Place | None = Field(default=None, alias="from")
    """A whole model to go on from, instead of the parts below: a transformers Llava (hub name or folder), an export, a
    run, or a folder in the layout of the LLaVA repository. Tower, projector, LLM, picture transform and chat format
    come from its files."""
    language: Place | RandomLanguage | None = None
    """Any causal LLM of transformers: hub name or folder."""
    vision: Vision | None = None
    """The picture encoder; null for text only."""
    projector: Projector | None = None
    chat: str = "auto"
    """Chat format: `auto` (learned from the tokenizer's template), a built-in, or `package.module:NAME`."""
    add_tokens: list[str] = []
    """New control tokens, such as those of a chat format that the tokenizer lacks. Their rows start as the mean of all
    rows and train with the language model, beside a LoRA too."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _fill_projector(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("vision") is not None and tree.get("projector") is None:
            return tree | {"projector": {}}
        return tree

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if self.source is None and self.language is None:
            raise ValueError("write `language` (and, to see, `vision`), or `from` for a whole model to go on from")
        parts = [name for name in ("language", "vision", "projector") if dict(self)[name] is not None]
        if self.source is not None and parts:
            raise ValueError(f"`from` brings its own {', '.join(parts)}; remove either `from` or those")
        return self

    @model_validator(mode="after")
    def _projector_needs_vision(self) -> Model:
        if self.vision is None and self.projector is not None:
            raise ValueError("projector is set but vision is null; name a vision tower or remove the projector")
        return self


class Source(Section):
    """Samples of one origin: `{shards: DIR}`, or `{FORMAT: PATH, images: DIR}` converted once into a cache."""

    shards: Place | None = None
    """A folder of shards with its index, or the address of one (s3://, gs://, https://, ... as fsspec knows them)."""
    format: str | None = None
    path: Place | None = None
    images: Place | None = None
    """The folder below which the pictures of `path` lie."""
    options: dict[str, Any] = {}
    """Options of the format, as `mmit-data convert` takes them."""
    name: str | None = None
    """What metrics call this source; by default the name of its folder or file."""
    repeat: PositiveFloat = 1.0
    """Share of the source that one epoch takes; 0.5: one half now, the other next epoch; 2.5: twice and a new half."""
    limit: PositiveInt | None = None
    """Use only this many samples, chosen by the seed."""

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, tree: Any) -> Any:
        """Turns `{llava: notes.json, ...}` into `{format: llava, path: notes.json, ...}`."""
        if not isinstance(tree, dict):
            return tree
        other = [
            key
            for key in tree
            if not (key in cls.model_fields or key in ELSEWHERE)
            and not difflib.get_close_matches(str(key), cls.model_fields, cutoff=0.8)
        ]
        origins = [str(key) for key in tree if key == "shards" or (key in other and isinstance(tree[key], str))]
        if len(origins) > 1:
            raise ValueError(f"found {' and '.join(origins)}, but a source has one origin; write a source for each")
        if not other or {"shards", "format", "path"} & tree.keys():
            return tree
        name = next((key for key in other if isinstance(tree[key], str)), other[0])
        return {key: value for key, value in tree.items() if key != name} | {"format": name, "path": tree[name]}

    @field_validator("path", mode="before")
    @classmethod
    def _path_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _has_one_origin(self) -> Source:
        if (self.shards is None) == (self.format is None):
            raise ValueError("write either `shards: FOLDER` or `FORMAT: PATH` (such as `llava: notes.json`)")
        if self.format is not None and self.path is None:
            raise ValueError(f"`{self.format}` names no path")
        if self.shards is not None and (self.images is not None or self.options):
            raise ValueError("`images` and `options` belong to a format such as `llava: notes.json`, not to `shards`")
        return self

    @property
    def title(self) -> str:
        return self.name or Path(self.shards or self.path or "").name or str(self.format)


class Lora(Section):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Module names of the language model to adapt (never the tower's)."""


class Trained(Section):
    lr: PositiveFloat
    """Peak learning rate of this part."""


class TrainedLanguage(Trained):
    lora: Lora | None = None
    """Train a low-rank adapter beside the frozen weights, instead of the weights."""


class Train(Section):
    """What a stage trains; a part that is not named stays frozen, to the bit."""

    vision: Trained | None = None
    projector: Trained | None = None
    language: TrainedLanguage | None = None

    @model_validator(mode="after")
    def _something(self) -> Train:
        if self.vision is None and self.projector is None and self.language is None:
            raise ValueError("nothing is trained; name at least one of vision, projector, language with its lr")
        return self


class Stage(Section):
    name: Name
    data: Annotated[list[Source], Field(min_length=1)]
    train: Train
    chat: str | None = None
    """Chat format of this stage alone, such as `plain` for alignment on captions; null: the model's."""
    pictures: Literal["crop", "pad", "squash"] | None = None
    """How a picture is made square: centre crop, mean-coloured borders, or stretched; null: as the model of
    `model.from` does, else pad."""
    batch_size: PositiveInt
    """Samples a step, over all ranks and micro-steps."""
    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None
    """Steps of the stage, instead of epochs (default: one epoch)."""
    max_tokens: PositiveInt = 2048
    """Longest sample."""
    over_long: Literal["cut", "drop"] = "cut"
    """`cut`: trailing turns go, the sample only if its first turn does not fit; `drop`: the sample goes."""
    row_tokens: PositiveInt | Literal["auto"] = "auto"
    """Most tokens of one packed row, that is of one forward pass; auto: 8192 on a GPU, 1024 on a CPU, or max_tokens."""
    row_images: PositiveInt | None = None
    """Most pictures of one packed row."""
    order: Literal["full", "window"] = "full"
    """`full`: one permutation of all samples; `window`: shards permuted, samples inside a window of shards."""
    window: PositiveInt = 16
    """Shards of a window."""
    group_by: Literal["picture"] | None = None
    """Keep the samples of one picture in one step, where the pictures are encoded once."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.03
    """Share of the stage's steps over which the learning rate rises."""
    final_lr: Share = 0.0
    """Learning rate at the end of a cosine or linear schedule, as a share of the peak."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW decay of matrices; norms and biases are never decayed."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip: PositiveFloat | None = 1.0
    """Largest norm of the whole gradient."""
    gradient_checkpointing: bool = False
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """`skip`: a sample that cannot be read leaves a hole in its step and a line in skipped.jsonl."""
    max_skipped: Share = 0.01
    """Share of the samples seen that may be skipped as bad, from the 100th on; the run stops beyond it, or when 100 in
    a row are bad."""
    skip_nonfinite: Annotated[Int, Field(ge=0, le=3)] = 0
    """Steps in a row, 3 at most, whose update is left out because loss or gradient is not finite, before the run
    stops."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Stage:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("both epochs and steps are set; keep one of them (KEY=null takes one out)")
        if self.group_by is not None and self.order == "window":
            raise ValueError("group_by permutes groups and needs order: full")
        if self.row_tokens != "auto" and self.row_tokens < self.max_tokens:
            raise ValueError(
                f"row_tokens {self.row_tokens} cannot hold a sample of max_tokens {self.max_tokens}; "
                f"raise row_tokens or lower max_tokens"
            )
        return self


class Holdout(Section):
    fraction: Annotated[Float, Field(gt=0, lt=1)]
    by: Annotated[str, Field(pattern=r"^(picture|sample|meta\..+)$")] = "picture"
    """What stays on one side: all samples of a picture, or of a value of `meta.KEY`."""


class Evaluation(Section):
    holdout: Holdout | None = None
    data: list[Source] = []
    """Further sources that are only evaluated."""
    every: PositiveInt = 200
    """Steps between evaluations; one more is made at the end of each stage."""
    samples: PositiveInt = 200
    """Most held-out samples of a source that an evaluation reads."""
    generate: NonNegativeInt = 0
    """Held-out questions that each evaluation also answers, greedily, into answers.jsonl."""
    max_new_tokens: PositiveInt = 32
    """Longest of these answers."""
    metric: str = "exact_match"
    """How an answer is scored against the sample's: exact_match, token_f1, or `package.module:Name`."""
    keep_best: bool = False
    """Keep the checkpoint of least held-out loss of each stage; that of the last one also becomes best/, a model as
    final/ is."""

    @model_validator(mode="after")
    def _has_data(self) -> Evaluation:
        if self.holdout is None and not self.data:
            raise ValueError("name a `holdout` share of the training data, or `data` to evaluate on")
        return self


class Save(Section):
    every: PositiveInt = 500
    """Steps between checkpoints; the end of a stage is always saved."""
    keep: PositiveInt = 2
    """Newest checkpoints kept within a stage."""


class Config(Section):
    output: Place
    """The run directory."""
    seed: NonNegativeInt = 0
    model: Model
    stages: Annotated[list[Stage], Field(min_length=1)]
    eval: Evaluation | None = None
    save: Save = Save()
    trackers: list[str] = []
    """Where the numbers of metrics.jsonl also go: tensorboard, wandb, trackio, mlflow, or `package.module:Name`."""
    log_samples: bool = False
    """Trackers also get the texts of `eval.generate`: questions, answers and what was expected."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Compute precision; auto: bf16 on a GPU that has it, else fp32. Trained parameters are fp32 in any case (fp64 for
    tests of exactness)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How several ranks share the model: `ddp` replicates it; `fsdp` shards parameters, gradients and optimizer state;
    `hsdp` shards within a node and replicates between nodes."""
    offload: bool = False
    """fsdp, hsdp: keep shards and optimizer state in the memory of the CPU."""
    workers: NonNegativeInt = 2
    """Loader processes of each rank; no number changes a result."""
    threads: PositiveInt | None = None
    """CPU threads of torch; null: torch's own choice."""
    cache: Place | None = None
    """Folder for converted data, lengths and features; null: $MMIT_CACHE or ~/.cache/mmit."""
    remote_cache_gb: PositiveFloat = 100.0
    """Most that tars of remote sources (`shards: s3://bucket/set`) may take in the cache; what was read longest ago
    goes first. With `order: window` each tar is fetched once an epoch, however small the cache."""

    @model_validator(mode="after")
    def _stages_fit_the_model(self) -> Config:
        if self.offload and self.parallel == "ddp":
            raise ValueError("offload keeps shards on the CPU and needs parallel: fsdp or hsdp")
        if self.model.source is not None and Path(self.model.source).absolute() == Path(self.output).absolute():
            raise ValueError("model.from is the `output` of this very run; name another folder as `output`")
        names = [stage.name for stage in self.stages]
        faults = [
            f"two stages are called {n!r}; give each its own name" for n in dict.fromkeys(names) if names.count(n) > 1
        ]
        for stage in self.stages:
            blind = self.model.vision is None and self.model.source is None
            if blind and (stage.train.vision or stage.train.projector):
                faults.append(
                    f"stage {stage.name!r} trains a vision tower or projector, but model.vision is null; "
                    f"train only the language model, or name a tower"
                )
            if self.model.vision is not None and self.model.vision.cache and stage.train.vision:
                faults.append(
                    f"stage {stage.name!r} trains the vision tower, whose features model.vision.cache would keep; "
                    f"set cache: false"
                )
        if faults:
            raise ValueError("\n  (the whole file): ".join(faults))
        return self


class _Yaml(yaml.SafeLoader):
    """YAML in which a key may stand once: of two `train:` sections PyYAML would silently keep the last."""

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


def recipes() -> Path:
    """The folder of recipes: that of the checkout, or as the wheel carries it."""
    checkout = Path(__file__).parents[1] / "configs"
    return checkout if (checkout / "demo.yaml").exists() else Path(__file__).parent / "configs"


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The run that `file` and the `section.key=value` overrides describe; `ConfigError` lists every fault at once."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; recipes to copy lie in {recipes()}") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a folder; name its config, {file / 'config.yaml'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as text ({error}); name a YAML file") from None
    try:
        loader = _Yaml(text)
        loader.name = file.name  # which its faults tell beside the line
        tree = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-02-30
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
        raise ConfigError(f"{where} is not a valid run:\n" + "\n".join(_explain(error, tree))) from None


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate", "mm_projector_lr"), "train: {PART: {lr: ...}} of a stage"),
    **dict.fromkeys(("llm", "model_name_or_path", "base_model"), "language"),
    **dict.fromkeys(("vision_tower", "image_encoder"), "vision"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "rank"),
    **dict.fromkeys(("max_length", "max_seq_length", "model_max_length", "cutoff_len", "sequence_len"), "max_tokens"),
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "epochs"),
    **dict.fromkeys(("output_dir",), "output"),
    **dict.fromkeys(("report_to",), "trackers"),
    **dict.fromkeys(("image_aspect_ratio",), "pictures"),
    **dict.fromkeys(("image_folder", "image_dir"), "images"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps"),
        "batch_size of a stage, which counts the samples of a step over all devices (row_tokens bounds a forward pass)",
    ),
}
"""What keys of other trainers are called here."""


def suggest(word: str, known: Sequence[str]) -> str:
    """`did you mean 'x'?`, or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _merge(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r}: write section.key=value, such as stages.sft.batch_size=8")
    try:
        value = _Yaml(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
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


def _explain(error: ValidationError, tree: Any) -> Iterator[str]:
    """A line for each place: what may stand there (all members of a union), and what was found."""
    faults = error.errors(include_url=False)
    deeper = {fault["loc"][:-2] for fault in faults if len(fault["loc"]) > 2}
    lines: dict[str, tuple[list[str], str]] = {}
    for fault in faults:
        if fault["type"] in ("string_type", "literal_error") and fault["loc"][:-1] in deeper:
            continue  # another member of the union came closer: it names the inner fault
        models, path, node = [Config], [], tree
        for step in fault["loc"]:
            if isinstance(step, str) and step in {model.__name__ for model in models}:
                models = [model for model in models if model.__name__ == step]
            elif isinstance(step, int) or (isinstance(node, dict) and step in node) or step in _keys(models):
                path.append(str(step))
                models = [inner for model in models for inner in _models_at(model, step)] or models
                node = _inside(node, step)
        found = ""
        match fault["type"]:
            case "extra_forbidden":
                known = sorted(_keys(_parents(fault["loc"])))
                key = str(fault["loc"][-1])
                text = f"unknown key; {f'here it is {ELSEWHERE[key]}' if key in ELSEWHERE else suggest(key, known)}"
            case "missing":
                text = "is missing"
            case "value_error":
                text = fault["msg"].removeprefix("Value error, ")
            case "model_type":
                inside = [model for model in models if model.__name__ == fault.get("ctx", {}).get("class_name")]
                text, found = (
                    f"expected keys of its own ({', '.join(sorted(_keys(inside)))})",
                    f"{fault['input']!r:.80}",
                )
            case _:
                text, found = fault["msg"].replace("Input should be", "expected"), f"{fault['input']!r:.80}"
        texts, _ = lines.setdefault(".".join(path) or "(the whole file)", ([], found))
        if text not in texts:
            texts.append(text)
    for place, (texts, found) in lines.items():
        yield f"  {place}: {', or '.join(texts)}" + (f"; found {found}" if found else "")


def _parents(location: tuple[int | str, ...]) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = [Config]
    for step in location[:-1]:
        named = [model for model in models if model.__name__ == step]
        models = named or [inner for model in models for inner in _models_at(model, step)] or models
    return models


def _inside(node: Any, step: int | str) -> Any:
    """What lies under a key or number of a raw tree, None if nothing does."""
    if isinstance(node, dict):
        return node.get(step)
    return node[step] if isinstance(node, list) and isinstance(step, int) and step < len(node) else None


def _keys(models: Sequence[type[BaseModel]]) -> set[str]:
    return {field.alias or key for model in models for key, field in model.model_fields.items()}


def _models_at(model: type[BaseModel], step: int | str) -> list[type[BaseModel]]:
    """Models that the value of field `step` may be; an index into a list stays with the list's own models."""
    if isinstance(step, int):
        return [model]
    if step not in model.model_fields:
        return []
    return list(_models_in(model.model_fields[step].annotation))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, list, Annotated):
        for inner in get_args(annotation):
            yield from _models_in(inner)
