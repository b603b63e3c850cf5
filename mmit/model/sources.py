"""`model: {from: SOURCE}`: a whole model to go on from, whose parts and formats come from its own files.

SOURCE is a run of ours, an export of ours, a transformers Llava (hub name or folder), or a folder in the layout of the
LLaVA repository (`mm_*` keys in its config.json), as far as its tower can be had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils.hub import cached_file

from mmit import config as schema
from mmit.config import ConfigError
from mmit.data.chat_formats import ChatFormat
from mmit.data.fit import Policy
from mmit.data.provenance import taken
from mmit.model.attention import built_with
from mmit.model.build import Assembly, merge_lora, placeholder_of, tower_record
from mmit.model.files import file_sha256, located, provenance, split_revision
from mmit.model.pretrained import from_hub, load_tokenizer, load_whole
from mmit.model.projector import MlpProjector
from mmit.model.projector_file import fill_projector, projector_tensors
from mmit.model.tower_parts import Pixels, channels
from mmit.model.towers_transformers import cut_tower, family_of, processor_filter, processor_side
from mmit.model.vision import Select, VisionTower, build_vision
from mmit.model.vlm import VLM, embedding_table

RECORD = "mmit.json"
LLAVA_REPOSITORY = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
"""`model_type` in the LLaVA repository -> of the language model in transformers."""

PLAIN_LLAVA: dict[str, tuple[Any, ...]] = {
    "mm_use_im_start_end": (None, False),
    "mm_patch_merge_type": (None, "flat"),
    "mm_resampler_type": (None,),
    "image_aspect_ratio": (None, "square", "pad"),
    "s2": (None, False),
}
"""Keys of the LLaVA repository's config.json and the values under which a picture is one square of patches."""


def assemble_source(model: schema.Model, *, seed: int, cache: Path | None) -> Assembly:
    """The parts of `model.source` in fp32 on the CPU, nothing fresh: every tensor has its file."""
    assert model.source is not None
    name = model.source
    folder = Path(name)
    if any((folder / place).exists() for place in ("model.json", "final/model.json", "checkpoints")):
        return _from_run(folder, cache)  # which says so if it is not finished
    raw, _ = from_hub(lambda: PreTrainedConfig.get_config_dict(**located(name)), "model.from", name)
    if any(key.startswith("mm_") for key in raw):
        return _from_llava_repository(name, raw, model, cache)
    if raw.get("model_type") == "llava":
        return _from_llava(name, model, cache)
    if (own := record_of(name)) is not None:
        from mmit.model.build import assemble

        assembly = assemble(schema.Model(language=name, attention=model.attention), seed=seed, cache=cache)
        assembly.own_chat = chat_format(own["chat"])
        assembly.sources = {"from": assembly.sources["language"] | _history(own)}
        return assembly
    raise ConfigError(
        f"model.from: {name} is a {raw.get('model_type')!r}; name a Llava of transformers, an export or a run of mmit, "
        f"or a folder of the LLaVA repository; for a language model alone write model.language: {name}"
    )


def record_of(name: str) -> dict[str, Any] | None:
    """mmit.json of an export of ours, None for what others made."""
    try:
        base, revision = split_revision(name)
        file = cached_file(base, RECORD, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return json.loads(Path(file).read_text(encoding="utf-8")) if file is not None else None


def _history(own: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an export tells of its own parts and data, for the card of what is made of it."""
    return {key: own[key] for key in ("sources", "data") if own is not None and key in own}


def chat_format(record: Mapping[str, Any]) -> ChatFormat:
    """A format that was written as JSON, which has no tuples: lists of strings become them again."""
    known = {field.name for field in fields(ChatFormat)}
    values: dict[str, Any] = {key: value for key, value in record.items() if key in known}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return ChatFormat(**values)


def _from_run(folder: Path, cache: Path | None) -> Assembly:
    from mmit.model.saved import load_saved, settings_of  # whose own model may come from a source

    saved = load_saved(folder)  # without its feature cache: the tower may train now
    settings = settings_of(folder)
    assembly = saved.assembly
    if assembly.adapter is not None:
        merge_lora(assembly)
    tensors = (folder if (folder / "model.json").exists() else folder / "final") / "model.safetensors"
    assembly.sources = {
        "from": {
            "name": str(folder),
            "sha256": {tensors.name: file_sha256(tensors, cache)},
            "sources": saved.record["sources"],
            "data": taken(settings["stages"]) if settings is not None else [],
        }
    }
    assembly.fresh.clear()
    assembly.changed.clear()
    assembly.own_chat = saved.chat.format
    assembly.own_pictures = saved.fit.policy if saved.fit is not None else None
    return assembly


def _from_llava(name: str, model: schema.Model, cache: Path | None) -> Assembly:
    config = from_hub(lambda: AutoConfig.from_pretrained(**located(name)), "model.from", name)
    where = f"model.from: {name}"
    layer = config.vision_feature_layer
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    if not isinstance(layer, int):
        raise ConfigError(f"{where} joins the hidden states {layer}; only models that read one can be gone on from")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ConfigError(f"{where}: its projector is not linear, GELU, linear with biases, as mmit's is")
    twin = load_whole(LlavaForConditionalGeneration, "model.from", name)
    pixels, policy = _pixels(name, config.vision_config.image_size, where)
    family = family_of(config.vision_config.model_type, name)
    parts = cut_tower(twin.model.vision_tower, family, pixels, layer)
    select = _select(config.vision_feature_select_strategy, parts.layout.has_cls, parts.layout.prefix, where)
    vision = VisionTower(parts, select=select)
    projector = MlpProjector(vision.dim, config.text_config.hidden_size)
    old = twin.model.multi_modal_projector
    projector.linears = nn.ModuleList([old.linear_1, old.linear_2])
    own = record_of(name)
    assembly = Assembly(
        vlm=VLM(vision, projector, _causal_language(twin, model.attention)),
        tokenizer=_speaking_tokenizer(name),
        placeholder=config.image_token_id,
        sources={"from": provenance(name, cache) | _history(own)},
        fresh=set(),
        own_chat=chat_format(own["chat"]) if own is not None else None,
        own_pictures=policy,
    )
    assembly.vlm.requires_grad_(False)
    return assembly


def _causal_language(twin: Any, attention: str) -> PreTrainedModel:
    """The causal LM that Llava's base model and head make up, sharing their modules."""
    text = twin.config.text_config
    text.tie_word_embeddings = twin.config.tie_word_embeddings
    with torch.device("meta"):
        language: Any = AutoModelForCausalLM.from_config(text)
    setattr(language, language.base_model_prefix, twin.model.language_model)
    language.set_output_embeddings(twin.lm_head)
    if (implementation := built_with(attention)) is not None:
        language.set_attn_implementation(implementation)
    return language


def _speaking_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer, with the template of the processor where it has none of its own."""
    tokenizer = load_tokenizer(name)
    if tokenizer.chat_template is None:
        processor = from_hub(lambda: AutoProcessor.from_pretrained(**located(name)), "model.from", name)
        tokenizer.chat_template = processor.chat_template
    return tokenizer


def _pixels(name: str, side: int, where: str) -> tuple[Pixels, Policy]:
    """How the model's own processor fits and normalises pictures."""
    record, _ = from_hub(lambda: ImageProcessingMixin.get_image_processor_dict(**located(name)), "model.from", name)
    about = f"{where}: its image processor"
    interpolation, size = processor_filter(record, about), record.get("size", {})
    policy: Policy = "squash"
    if record.get("do_pad"):
        policy = "pad"
    elif record.get("do_center_crop"):
        policy = "crop"
    scaled = size if isinstance(size, int) else size.get("height" if policy == "squash" else "shortest_edge")
    if processor_side(record, about) != side or scaled != side:
        raise ConfigError(
            f"{about} scales pictures to {size} and crops to {record.get('crop_size')}; mmit makes squares of the "
            f"tower's side, {side}, by {{shortest_edge: {side}}} and a crop of {side}, or by {side} x {side}"
        )
    return Pixels(side, channels(record["image_mean"]), channels(record["image_std"]), interpolation), policy


def _select(strategy: str, has_cls: bool, prefix: int, where: str) -> Select:
    if prefix > 1:
        raise ConfigError(f"{where}: feeds register tokens to its LLM, which mmit does not")
    match strategy, has_cls:
        case "default", True:
            return "patch"
        case "full", True:
            return "cls_patch"
        case "full", False:
            return "patch"
    raise ConfigError(f"{where}: vision_feature_select_strategy {strategy!r} drops a patch of a tower without cls")


def _from_llava_repository(name: str, raw: Mapping[str, Any], model: schema.Model, cache: Path | None) -> Assembly:
    """Language model and projector from the folder, the tower from where its config.json says."""
    where, folder = f"model.from: {name}", Path(name)
    kind, tower = raw.get("model_type"), raw.get("mm_vision_tower")
    if kind not in LLAVA_REPOSITORY or not isinstance(tower, str) or not folder.is_dir():
        raise ConfigError(
            f"{where}: model_type {kind!r} with mm_vision_tower {tower!r}; a downloaded folder of the LLaVA repository "
            f"({', '.join(LLAVA_REPOSITORY)}) can be gone on from, or the same model from the Hub as a Llava of "
            f"transformers (llava-hf/...)"
        )
    depth = {"linear": 1, "mlp2x_gelu": 2}.get(str(raw.get("mm_projector_type", "linear")))
    if depth is None:
        raise ConfigError(f"{where}: mm_projector_type {raw['mm_projector_type']!r}; mmit has linear and mlp2x_gelu")
    for key, plain in PLAIN_LLAVA.items():
        if raw.get(key) not in plain:
            raise ConfigError(
                f"{where}: its config.json has {key} {raw[key]!r}, a way of showing pictures that mmit does not have; "
                f"name a model like LLaVA-1.5, which shows one square of patches a picture"
            )
    sizes = {key: value for key, value in raw.items() if not key.startswith("mm_") and key != "model_type"}
    config = AutoConfig.for_model(LLAVA_REPOSITORY[kind], **sizes)
    attention = built_with(model.attention)
    language = load_whole(AutoModelForCausalLM, "model.from", name, config=config, attn_implementation=attention)
    select: Select = "cls_patch" if raw.get("mm_vision_select_feature") == "cls_patch" else "patch"
    layer = int(raw.get("mm_vision_select_layer", -2))
    place = _tower(folder, tower)
    if place == tower and model.vision is not None:
        place = model.vision.name  # the revision that the run began with
    spec = schema.Vision(library="transformers", name=place, layer=layer, select=select)
    vision = build_vision(spec)
    projector = MlpProjector(vision.dim, embedding_table(language).shape[1], depth=depth)
    tensors = _beside_the_language(folder, where)
    fill_projector(projector, {key: value for key, value in tensors.items() if "mm_projector" in key}, where)
    _fill_tower(vision, tensors, where, trained=bool(raw.get("unfreeze_mm_vision_tower")))
    tokenizer = load_tokenizer(name)
    placeholder, fresh = placeholder_of(tokenizer, language)
    assembly = Assembly(
        vlm=VLM(vision, projector, language),
        tokenizer=tokenizer,
        placeholder=placeholder,
        sources={
            "from": provenance(name, cache),
            "vision": tower_record(spec, vision) | {"name": tower},
        },
        fresh=fresh,
        own_pictures="pad" if raw.get("image_aspect_ratio") == "pad" else "crop",
    )
    assembly.vlm.requires_grad_(False)
    return assembly


def _beside_the_language(folder: Path, where: str) -> dict[str, Tensor]:
    """Projector and, if it was trained, tower from the files of the whole model; the projector else from its own."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    found = {}
    for file in [folder / "mm_projector.bin", *files]:  # the file of the first stage gives way to the whole model's
        if file.exists():
            wanted = ("mm_projector", "vision_tower")
            found |= {k: v for k, v in projector_tensors(file, where).items() if any(part in k for part in wanted)}
    return found


@torch.no_grad()
def _fill_tower(vision: VisionTower, tensors: Mapping[str, Tensor], where: str, *, trained: bool) -> None:
    """Copies a tower in that was trained with the model; ConfigError if there is one and a part of it is missing."""
    mark = "vision_tower.vision_model."
    found = {key.split(mark, 1)[1]: value for key, value in tensors.items() if mark in key}
    if not found and not trained:
        return
    places = dict(vision.encoder.named_parameters())
    if vision.above[0] is not None:  # kept for an export
        above = vision.above[0].named_parameters()
        places |= {f"encoder.layers.{vision.blocks}.{name}": value for name, value in above}
    lost = [name for name, value in places.items() if name not in found or found[name].shape != value.shape]
    if lost:
        raise ConfigError(
            f"{where}: its tower was trained, but the files lack {len(lost)} of its tensors ({', '.join(lost[:3])}, "
            f"...); name a whole checkpoint"
        )
    for name, value in places.items():
        value.copy_(found[name])


def _tower(folder: Path, name: str) -> str:
    """A tower that lies in or beside the folder, else its hub name."""
    beside = [folder / Path(name).name, folder.parent / Path(name).name]
    return next((str(place) for place in beside if (place / "config.json").exists()), name)
