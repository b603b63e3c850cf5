"""The schema of a run: its parts, and an ordered list of stages.

Paths are relative to the folder in which the command runs; `~` is the home folder.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mmit.config.faults import ELSEWHERE, NEEDLESS


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


def _placed(value: str) -> str:
    if "://" not in value and re.search(r"\$\{?[A-Za-z_]", value):
        raise ValueError(
            f"{value}: variables are not filled in here; write the path itself, or give the key on the command line, "
            f"where the shell fills them in"
        )
    return os.path.expanduser(value)


def _sized(value: dict[str, Any]) -> dict[str, Any]:
    """Of YAML 1.2, `no` is a text, which libraries that check no kinds would take for true."""
    for key, item in value.items():
        if isinstance(item, str) and item.lower() in ("yes", "no", "on", "off"):
            raise ValueError(f"{key}: found {item!r}; write true or false")
    return value


Sizes = Annotated[dict[str, Any], AfterValidator(_sized)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_placed)]
"""A path, hub name or address."""


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

    random: Sizes
    """A transformers configuration: `model_type` and its sizes."""
    tokenizer: Place = "bytes"
    """`bytes` for the built-in byte tokenizer, else a hub name or folder."""


class Vision(Section):
    library: Literal["open_clip", "transformers"]
    name: Annotated[str, AfterValidator(_placed)] = ""
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
    random: Sizes | None = None
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
    """auto: flash attention on a GPU that computes in bf16, where flash-attn is installed; else sdpa where the model
    has it, else eager."""

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
            if not (key in cls.model_fields or key in ELSEWHERE or key in NEEDLESS)
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
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

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
    compile: bool = False
    """Compile the decoder layers (`torch.compile`). The first step takes a minute or more; numbers differ from those
    without it by rounding."""
    workers: NonNegativeInt = 2
    """Loader processes of each rank; no number changes a result."""
    threads: PositiveInt | None = None
    """CPU threads of torch; null: torch's own choice."""
    cache: Place | None = None
    """Folder for converted data, lengths and features; null: $MMIT_CACHE or ~/.cache/mmit."""
    remote_cache_gb: PositiveFloat = 100.0
    """Most that tars of remote sources (`shards: s3://bucket/set`) may take in the cache; what was read longest ago
    goes first. With `order: window` each tar is fetched once an epoch, if the tars of a window fit."""

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
