"""From the `model` section of a config to parts: built, started from tensors of a run, and told what trains.

Every parameter has a source: pretrained files (recorded by hash), the seed (`fresh`), or a checkpoint of the run.
Everything is built and merged in fp32; `set_trained` then gives frozen parts their compute precision.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer

from mmit import config as schema
from mmit.config import ConfigError, suggest
from mmit.data.byte_tokenizer import byte_tokenizer
from mmit.data.cache import RecordCache
from mmit.data.chat import Chat, ChatFormat, find_placeholder, resolve
from mmit.data.chat_formats import stands_for_nothing
from mmit.data.fit import PictureFit, Policy
from mmit.model.attention import built_with
from mmit.model.files import provenance, revision_of, same_files, split_revision, told
from mmit.model.pretrained import load_tokenizer, load_whole, random_config
from mmit.model.projector import build_projector
from mmit.model.projector_file import start_projector
from mmit.model.vision import CachedTower, VisionTower, build_vision
from mmit.model.vlm import VLM, embedding_table


@dataclass
class Assembly:
    """The parts of a model, and what has happened to them."""

    vlm: VLM
    tokenizer: PreTrainedTokenizerFast
    placeholder: int | None
    """Id that stands where image features go; None for text only."""
    sources: dict[str, Any]
    """Where the pretrained parts come from: name, revision and sha256 of their files."""
    fresh: set[str]
    """Parameters that no pretrained file holds; every checkpoint does."""
    changed: set[str] = field(default_factory=set)
    """Parameters that earlier stages changed."""
    adapter: PeftModel | None = None
    lora: schema.Lora | None = None
    own_chat: ChatFormat | None = None
    """What chat: auto means, where the model came with a format of its own (`model.from`)."""
    added_tokens: tuple[int, ...] = ()
    """Ids of `model.add_tokens`, whose rows train beside a LoRA too."""
    own_pictures: Policy | None = None
    """How the model was shown pictures before, where it comes from (`model.from`)."""

    def chat(self, name: str) -> Chat:
        if name == "auto" and self.own_chat is not None:
            return Chat(self.own_chat, self.tokenizer, placeholder=self.placeholder)
        return resolve(name, self.tokenizer, placeholder=self.placeholder)

    def fit(self, pictures: Policy | None) -> PictureFit | None:
        """How pictures are fitted under the policy of a stage; None without a tower."""
        return self.vlm.vision.fit_for(pictures or self.own_pictures or "pad") if self.vlm.vision is not None else None

    @property
    def vision(self) -> VisionTower | None:
        return self.vlm.vision

    def parts(self) -> dict[str, nn.Module]:
        named = {"vision": self.vlm.vision, "projector": self.vlm.projector, "language": self.vlm.language}
        return {name: part for name, part in named.items() if part is not None}

    def kept(self) -> set[str]:
        """Parameters that a checkpoint must hold: without a pretrained source, or changed by this run so far."""
        trained = {name for name, parameter in self.vlm.named_parameters() if parameter.requires_grad}
        return self.fresh | self.changed | trained


def assemble(model: schema.Model, *, seed: int, cache: Path | None = None) -> Assembly:
    """The parts of `model` in fp32 on the CPU, pretrained or random by `seed`."""
    torch.manual_seed(seed)
    if model.source is not None:
        from mmit.model.sources import assemble_source  # which loads runs, and these are assembled here

        assembly = assemble_source(model, seed=seed, cache=cache)
    else:
        assembly = _assemble_parts(model, cache)
    if model.add_tokens:
        _add_tokens(assembly, model.add_tokens)
    return assembly


def _assemble_parts(model: schema.Model, cache: Path | None) -> Assembly:
    assert model.language is not None
    language, tokenizer = _language(model.language, model.attention)
    sources: dict[str, Any] = {}
    fresh: set[str] = set()
    if isinstance(model.language, str):
        sources["language"] = provenance(model.language, cache)
    else:
        fresh |= {f"language.{name}" for name, _ in language.named_parameters()}
    vision, projector, placeholder = None, None, None
    if model.vision is not None:
        assert model.projector is not None
        placeholder, added = placeholder_of(tokenizer, language)
        fresh |= added
        vision = build_vision(model.vision)
        if model.vision.random is None:
            sources["vision"] = tower_record(model.vision, vision)
        else:
            fresh |= {f"vision.{name}" for name, _ in vision.named_parameters()}
        if model.vision.cache and cache is not None:
            vision.requires_grad_(False)
            vision = CachedTower(vision, RecordCache(cache / "features" / f"{vision.fingerprint()[:32]}.features"))
        projector = build_projector(model.projector, vision.dim, embedding_table(language).shape[1])
        if model.projector.source is None:
            fresh |= {f"projector.{name}" for name, _ in projector.named_parameters()}
        else:
            sources["projector"] = start_projector(projector, Path(model.projector.source), cache)
    vlm = VLM(vision, projector, language)
    vlm.requires_grad_(False)
    return Assembly(vlm, tokenizer, placeholder, sources, fresh)


def tower_record(spec: schema.Vision, vision: VisionTower) -> dict[str, Any]:
    """Where a tower came from: its name, what decides its features and, from the Hub, the revision."""
    record = {"name": split_revision(str(spec.name))[0], "fingerprint": vision.fingerprint()}
    revision = revision_of(str(spec.name)) if spec.library == "transformers" else None
    return record | ({"revision": revision} if revision is not None else {})


def pinned(model: schema.Model, sources: Mapping[str, Any]) -> schema.Model:
    """`model` at the Hub revisions that `sources` of a run recorded: what moved on there since is not what it had."""

    def at(name: Any, part: str) -> Any:
        had = sources.get(part, {})
        if had.get("revision") is None or not isinstance(name, str) or split_revision(name)[0] != had["name"]:
            return name
        return f"{had['name']}@{had['revision']}"

    vision = model.vision and model.vision.model_copy(update={"name": at(model.vision.name, "vision")})
    if model.source is not None and "revision" in sources.get("vision", {}):  # a tower that its files only name
        name = at(sources["vision"]["name"], "vision")
        vision = schema.Vision(library="transformers", name=name)
    changes = {"language": at(model.language, "language"), "source": at(model.source, "from"), "vision": vision}
    return model.model_copy(update=changes)


def check_sources(before: Mapping[str, Any], assembly: Assembly, where: str) -> None:
    """ConfigError if a part was built from other files than those that a run recorded."""
    for part, record in assembly.sources.items():
        if part in before and not same_files(before[part], record):
            raise ConfigError(
                f"{where}: was trained from other files of model.{part} (then {told(before[part], record)}, now "
                f"{told(record, before[part])}); put those back"
            )


def _add_tokens(assembly: Assembly, tokens: Sequence[str]) -> None:
    if not all(token.strip() for token in tokens):
        raise ConfigError(f"model.add_tokens: {tokens}: a token of nothing but whitespace is text; remove it")
    known = [token for token in tokens if token in assembly.tokenizer.get_vocab()]
    if known or len(set(tokens)) < len(tokens):
        raise ConfigError(f"model.add_tokens: {', '.join(known) or 'a token twice'}: is a token already; remove it")
    assembly.added_tokens = tuple(add_rows(assembly.tokenizer, assembly.vlm.language, tokens))
    assembly.fresh |= {f"language.{name}" for name in vocabulary_parameters(assembly.vlm.language)}
    assembly.vlm.requires_grad_(False)


def add_lora(assembly: Assembly, lora: schema.Lora, *, seed: int) -> None:
    """Puts a fresh adapter beside the language model's weights; A by `seed`, B zero (arXiv 2106.09685, section 4.1)."""
    check_targets(assembly, lora, "language.lora.targets")
    torch.manual_seed(seed)
    targets = lora.targets if lora.targets == "all-linear" else list(lora.targets)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    before = {id(parameter) for parameter in assembly.vlm.parameters()}
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads a property that transformers 5.23 renames; needless once peft asks for the new name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            assembly.adapter = cast(PeftModel, get_peft_model(assembly.vlm.language, settings))
    except ValueError as error:  # a module of a kind that peft cannot adapt
        raise ConfigError(f"language.lora.targets: {error}") from None
    assembly.lora = lora
    _rename_adapted(assembly)
    assembly.fresh |= {name for name, p in assembly.vlm.named_parameters() if id(p) not in before}
    assembly.vlm.requires_grad_(False)


def check_targets(assembly: Assembly, lora: schema.Lora, where: str) -> None:
    """ConfigError for a target that names nothing: of several, peft adapts those that do without a word."""
    if lora.targets == "all-linear":
        return
    names = [name for name, _ in assembly.vlm.language.named_modules()]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            with_weights = assembly.vlm.language.named_parameters()
            layers = sorted({name.split(".")[-2] for name, weight in with_weights if weight.ndim == 2})
            raise ConfigError(f"{where}: {target!r} names no layer of the language model; {suggest(target, layers)}")


def merge_lora(assembly: Assembly) -> None:
    """Adds the adapter into the weights beside it; these then count as changed."""
    assert assembly.adapter is not None
    adapted = {name for name, _ in assembly.vlm.named_parameters() if ".base_layer." in name and ".lora_" not in name}
    assembly.fresh = {name for name in assembly.fresh if ".lora_" not in name}
    assembly.vlm.language = cast(PreTrainedModel, assembly.adapter.merge_and_unload())
    assembly.changed |= {name for name in adapted if not name.endswith("bias")}
    for names in (assembly.fresh, assembly.changed):
        plain = {plain_name(name) for name in names}
        names.clear()
        names |= plain
    assembly.adapter = assembly.lora = None
    assembly.vlm.requires_grad_(False)


def restore(assembly: Assembly, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies a checkpoint's tensors in. ConfigError unless each has its place and each fresh parameter its tensor."""
    parameters = dict(assembly.vlm.named_parameters())
    unknown = sorted(tensors.keys() - parameters.keys())
    missing = sorted(assembly.fresh - tensors.keys())
    shapes = [n for n in sorted(tensors.keys() & parameters.keys()) if tensors[n].shape != parameters[n].shape]
    if unknown or missing or shapes:
        raise ConfigError(
            f"{where} does not fit the model of the config: {_some(unknown, 'tensors without a place')}"
            f"{_some(missing, 'parameters without a source')}{_some(shapes, 'shapes that differ')}"
            f"use the model section that the run was started with (config.yaml beside its checkpoints)"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float64:
                parameters[name].data = parameters[name].data.double()
            parameters[name].copy_(tensor)
    assembly.changed |= set(tensors) - assembly.fresh


def set_trained(
    assembly: Assembly, train: schema.Train, *, trained_dtype: torch.dtype, frozen_dtype: torch.dtype
) -> None:
    """Freezes everything but what `train` names, and casts: trained parameters keep full precision.

    AdamW on bf16 parameters would round away most updates at a learning rate of 2e-5, silently.
    """
    vlm = assembly.vlm
    vlm.requires_grad_(False)
    if vlm.vision is None and (train.vision is not None or train.projector is not None):
        raise ConfigError("train: names vision or projector, but the model of model.from reads only text; remove them")
    if train.vision is not None and vlm.vision is not None:
        vlm.vision.requires_grad_(True)
        for name in vlm.vision.unused_parameters():
            vlm.vision.get_parameter(name).requires_grad_(False)
    if train.projector is not None and vlm.projector is not None:
        vlm.projector.requires_grad_(True)
    if train.language is not None:
        for name, parameter in vlm.language.named_parameters():
            parameter.requires_grad_(train.language.lora is None or ".lora_" in name)
        for parameter in beside_lora(assembly, train):
            parameter.requires_grad_(True)
            parameter.register_hook(partial(_only_rows, assembly.added_tokens))
    kept = assembly.kept()  # what checkpoints hold stays whole even where it is frozen now: a later stage may train it
    for name, parameter in vlm.named_parameters():
        parameter.data = parameter.data.to(trained_dtype if name in kept else frozen_dtype)
    for buffer in vlm.buffers():
        if buffer.is_floating_point() and trained_dtype == torch.float64:
            buffer.data = buffer.data.to(trained_dtype)


def beside_lora(assembly: Assembly, train: schema.Train) -> list[nn.Parameter]:
    """Vocabulary tables of which the rows of added tokens, and no others, train beside a LoRA."""
    if not assembly.added_tokens or train.language is None or train.language.lora is None:
        return []
    return [assembly.vlm.language.get_parameter(name) for name in vocabulary_parameters(assembly.vlm.language)]


def _only_rows(rows: Sequence[int], gradient: Tensor) -> Tensor:
    """The gradient with 0 in all other rows: AdamW then leaves them bit for bit, as they are never decayed either."""
    kept = torch.zeros_like(gradient)
    kept[list(rows)] = gradient[list(rows)]
    return kept


def set_modes(assembly: Assembly, train: schema.Train, *, gradient_checkpointing: bool) -> None:
    """Training mode (dropout, checkpointing) for the parts that train, evaluation mode for the others."""
    vlm = assembly.vlm
    vlm.eval()
    if gradient_checkpointing:
        vlm.language.activation_checkpointing_enable({"use_reentrant": False})
        if vlm.vision is not None and train.vision is not None:
            vlm.vision.gradient_checkpointing(True)
    for name, part in assembly.parts().items():
        part.train(train.model_dump()[name] is not None)
    if gradient_checkpointing and train.language is None:
        # A frozen LLM still carries gradients to the projector, and its layers checkpoint in training mode only. Only
        # they get it, not what is in them: there it would switch on the dropout of an LLM that does not train.
        for module in vlm.language.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True


def placeholder_of(tokenizer: PreTrainedTokenizerFast, language: PreTrainedModel) -> tuple[int, set[str]]:
    """The id that stands for pictures, never a label; and the parameters that now have a row no file holds."""
    placeholder = find_placeholder(tokenizer)
    if placeholder is None:
        (placeholder,) = add_rows(tokenizer, language, ["<image>"])
    elif placeholder >= len(embedding_table(language)):
        _grow(language, placeholder + 1, known=len(tokenizer))
    else:
        return placeholder, set()
    return placeholder, {f"language.{name}" for name in vocabulary_parameters(language)}


def add_rows(tokenizer: PreTrainedTokenizerFast, language: PreTrainedModel, tokens: Sequence[str]) -> list[int]:
    """Makes `tokens` special tokens, whose rows are the mean of all rows before them. Returns their ids."""
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    ids = [cast(int, tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    _grow(language, max(ids) + 1, known=known, ids=ids)
    return ids


@torch.no_grad()
def _grow(language: PreTrainedModel, wanted: int, *, known: int, ids: Sequence[int] = ()) -> None:
    """At least `wanted` rows; the new ones, and those of `ids`, become the mean of the rows before (of `known`)."""
    rows = len(embedding_table(language))
    if wanted > rows:
        language.resize_token_embeddings(wanted, mean_resizing=False)
    for name in vocabulary_parameters(language):
        weight = language.get_parameter(name)
        weight[[*ids, *range(rows, wanted)]] = weight[: min(rows, known)].float().mean(0).to(weight.dtype)


def embedding_rms(language: PreTrainedModel) -> float:
    """Root mean square of what the word embeddings put into the model (Gemma's scale their table on the way)."""
    table = cast(nn.Embedding, language.get_input_embeddings())
    with torch.no_grad():
        ids = torch.arange(len(table.weight), device=table.weight.device)
        squares = torch.cat([table(some).float().square().mean(1) for some in ids.split(8192)])
    return float(squares.mean().sqrt())


def lora_targets(assembly: Assembly) -> int:
    return sum(name.endswith("lora_A.default.weight") for name, _ in assembly.vlm.named_parameters())


def _language(
    wanted: str | schema.RandomLanguage, attention_wanted: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    attention = built_with(attention_wanted)
    if isinstance(wanted, str):
        language = load_whole(AutoModelForCausalLM, "model.language", wanted, attn_implementation=attention)
        tokenizer = load_tokenizer(wanted)
        _check_rows(tokenizer, language, f"model.language: {wanted}")
        return language, tokenizer
    settings = dict(wanted.random)
    tokenizer = byte_tokenizer() if wanted.tokenizer == "bytes" else load_tokenizer(wanted.tokenizer)
    settings.setdefault("vocab_size", len(tokenizer))
    language_config = random_config(settings.pop("model_type", None), settings, "model.language.random")
    try:
        language = AutoModelForCausalLM.from_config(language_config, attn_implementation=attention)
    except Exception as error:  # models raise whatever does not fit together in them
        raise ConfigError(f"model.language.random: {error}; give a transformers model_type and its sizes") from None
    _check_rows(tokenizer, language, "model.language.random")
    return language.to(torch.float32), tokenizer


def _check_rows(tokenizer: PreTrainedTokenizerFast, language: PreTrainedModel, where: str) -> None:
    """ConfigError if the tokenizer has a token without a row, but for tokens that stand for pictures or for nothing:
    text never holds those, and `add_rows` gives one its row when it is needed (Gemma 3 1B comes that way)."""
    rows = len(embedding_table(language))
    bare = [
        token for token, number in tokenizer.get_vocab().items() if number >= rows and not stands_for_nothing(token)
    ]
    if bare:
        raise ConfigError(
            f"{where}: the tokenizer has {len(bare)} tokens ({', '.join(sorted(bare)[:3])}"
            f"{', ...' if len(bare) > 3 else ''}) beyond the {rows} rows of the model's embeddings; take them out of "
            f"the tokenizer's files, and write those that are to be learned into model.add_tokens"
        )


def vocabulary_parameters(language: PreTrainedModel) -> list[str]:
    tables = {id(embedding_table(language))}
    head = language.get_output_embeddings()
    if head is not None:
        tables.add(id(head.weight))
    return [name for name, parameter in language.named_parameters() if id(parameter) in tables]


def plain_name(name: str) -> str:
    """A parameter's name without what peft puts into it: `x.base_layer.weight` is x.weight, and experts, which it
    wraps once for each of their tensors, are `x.base_layer.base_layer.down_proj`."""
    return re.sub(r"(\.base_layer)+(?=\.)", "", name)


def _rename_adapted(assembly: Assembly) -> None:
    """peft moves `x.weight` to `x.base_layer.weight`: names that are tracked follow."""
    present = {plain_name(name): name for name, _ in assembly.vlm.named_parameters() if ".lora_" not in name}
    for names in (assembly.fresh, assembly.changed):
        moved = {present[plain_name(name)] for name in names}
        names.clear()
        names |= moved


def _some(names: Iterable[str], what: str) -> str:
    names = list(names)
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); " if names else ""
