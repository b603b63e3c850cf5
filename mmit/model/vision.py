"""Vision towers of open_clip and transformers behind one face: uint8 pixels in, tokens of one hidden state out.

N counts pictures, S is the side in pixels, P the tokens the projector gets of one picture, D the width of the tower.

A tower holds only the blocks below the hidden state it reads: those above would never get a gradient, and cost memory
and time. `encoder` is the library's own module, cut to `blocks` of its `depth` blocks with a configuration that says
so; an export therefore reads its last hidden state (`vision_feature_layer: -1`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import open_clip
import torch
import transformers
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors import safe_open
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from transformers.image_processing_base import ImageProcessingMixin

from mmit.config import ConfigError, Vision
from mmit.data.images import PictureFit, normalise

log = logging.getLogger(__name__)

Channels = tuple[float, float, float]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Pixels:
    """How a tower wants its pictures: side in pixels, normalisation and the filter they are resized with."""

    side: int
    mean: Channels
    std: Channels
    interpolation: Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Layout:
    """What an encoder makes of a picture: `prefix` tokens (the first is cls if `has_cls`), then a square of patches."""

    patch: int
    dim: int
    prefix: int
    has_cls: bool
    blocks: int
    """Blocks that run, which is also the hidden state that is read."""
    depth: int
    """Blocks of the whole tower."""


class VisionTower(nn.Module):
    """Tokens (N, P, D) of hidden state `blocks`, counted as transformers does and taken before any final norm.

    `tokens` is P, known before any pixel is seen. A frozen tower runs without a graph and always in evaluation mode.
    """

    def __init__(
        self,
        encoder: nn.Module,
        hidden_state: Callable[[nn.Module, Tensor], Tensor],
        *,
        pixels: Pixels,
        layout: Layout,
        select: Literal["patch", "cls_patch", "cls"],
    ) -> None:
        super().__init__()
        if select != "patch" and not layout.has_cls:
            raise ConfigError(
                f"model.vision.select: {select!r}, but this tower ({type(encoder).__name__}) has no cls token; "
                f"write select: patch"
            )
        self.encoder = encoder
        self.hidden_state = hidden_state
        self.pixels = pixels
        self.layout = layout
        self.select: Literal["patch", "cls_patch", "cls"] = select
        self.side, self.mean, self.std = pixels.side, pixels.mean, pixels.std
        self.interpolation: Literal["bicubic", "bilinear"] = pixels.interpolation
        self.patch, self.dim = layout.patch, layout.dim
        self.blocks, self.depth = layout.blocks, layout.depth
        patches = (self.side // self.patch) ** 2
        self.tokens = {"patch": patches, "cls_patch": 1 + patches, "cls": 1}[select]

    def fit_for(self, policy: Literal["crop", "pad", "squash"]) -> PictureFit:
        """How pictures are brought to this tower's side."""
        return PictureFit(policy, self.side, self.mean, self.std, self.interpolation)

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> VisionTower:
        """Training mode, except that a frozen tower stays in evaluation mode: dropout would change its features."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, pixels: Tensor, keys: Sequence[bytes] = ()) -> Tensor:
        """Tokens (N, P, D) of uint8 pixels (N, 3, S, S); `keys` are for a tower that remembers (`CachedTower`)."""
        if not len(pixels):
            return self._nothing(pixels)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encode(pixels)

    def _nothing(self, pixels: Tensor) -> Tensor:
        return pixels.new_empty((0, self.tokens, self.dim), dtype=next(self.parameters()).dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens (N, P, D) with whatever grad mode is on; `forward` is the way in."""
        if pixels.shape[-2:] != (self.side, self.side):
            raise ValueError(f"pixels are {tuple(pixels.shape)}, the tower takes a side of {self.side}; use `fit_for`")
        normal = normalise(pixels, self.mean, self.std).to(next(self.parameters()).dtype)
        states = self.hidden_state(self.encoder, normal)
        cls, patches = states[:, :1], states[:, self.layout.prefix :]
        match self.select:
            case "patch":
                return patches
            case "cls":
                return cls
            case "cls_patch":
                return torch.cat([cls, patches], dim=1)

    def unused_parameters(self) -> list[str]:
        """Parameters no selected token depends on (final norm, pooling head, ...): to be frozen, and listed as such.

        Read off the graph of one picture on the meta device, where nothing is computed, so it holds for any tower.
        """
        owned = dict(self.named_parameters())
        empty = {name: torch.empty_like(value, device="meta").requires_grad_() for name, value in owned.items()}
        buffers = {name: torch.empty_like(value, device="meta") for name, value in self.named_buffers()}
        blank = torch.empty(1, 3, self.side, self.side, dtype=torch.uint8, device="meta")
        with torch.enable_grad():
            tokens = torch.func.functional_call(_Encode(self), _prefixed(empty | buffers), (blank,))
        used = _leaves(tokens)
        return [name for name, value in empty.items() if id(value) not in used]

    def gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations of the blocks in the backward pass instead of keeping them."""
        match self.encoder:
            case transformers.PreTrainedModel() if enabled:
                self.encoder.activation_checkpointing_enable({"use_reentrant": False})
            case transformers.PreTrainedModel():
                self.encoder.activation_checkpointing_disable()
            case VisionTransformer() | TimmModel():
                self.encoder.set_grad_checkpointing(enabled)

    def fingerprint(self) -> str:
        """sha256 over all that decides a feature: what is read of which pixels, and every weight as it is now."""
        plan = {"pixels": asdict(self.pixels), "layout": asdict(self.layout), "select": self.select}
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(_raw(value))
        return digest.hexdigest()


class FeatureStore(Protocol):
    """Where `CachedTower` keeps features: `mmit.data.cache.RecordCache`."""

    def get(self, key: bytes) -> bytes | None: ...

    def put(self, key: bytes, value: bytes) -> None: ...


class CachedTower(VisionTower):
    """A frozen tower that encodes every picture once, and then reads its tokens from `store`.

    It takes over the encoder of `tower`, so parameter names stay the same. Each picture is encoded alone and outside
    autocast: kernels round differently for other batch sizes, and a feature must not depend on its neighbours.
    """

    def __init__(self, tower: VisionTower, store: FeatureStore) -> None:
        if not tower.frozen:
            raise ConfigError("model.vision.cache: true keeps features of a frozen tower only; write cache: false")
        super().__init__(
            tower.encoder, tower.hidden_state, pixels=tower.pixels, layout=tower.layout, select=tower.select
        )
        self.train(tower.training)
        self.store = store
        self._identity: tuple[torch.dtype, bytes] | None = None

    def forward(self, pixels: Tensor, keys: Sequence[bytes] = ()) -> Tensor:
        """Tokens (N, P, D); `keys[n]` identifies pixels n: see `feature_key`."""
        if not self.frozen:
            raise ConfigError("model.vision.cache: the tower is being trained; write cache: false for this run")
        if len(keys) != len(pixels):
            raise ValueError(f"{len(pixels)} pictures came with {len(keys)} keys; give one `feature_key` a picture")
        if not keys:
            return self._nothing(pixels)
        return torch.stack([self._tokens_of(picture, key) for picture, key in zip(pixels, keys, strict=True)])

    @torch.no_grad()
    def _tokens_of(self, picture: Tensor, key: bytes) -> Tensor:
        dtype = next(self.parameters()).dtype
        # Hashed once for each dtype: a frozen tower is cast and moved after it was built, but never changed otherwise.
        if self._identity is None or self._identity[0] != dtype:
            self._identity = dtype, bytes.fromhex(self.fingerprint())
        record = hashlib.sha256(self._identity[1] + key).digest()
        stored = self.store.get(record)
        if stored is None:
            with torch.autocast(picture.device.type, enabled=False):
                tokens = self.encode(picture[None])[0]
            self.store.put(record, _raw(tokens))
            return tokens
        expected = self.tokens * self.dim * dtype.itemsize
        if len(stored) != expected:
            raise ConfigError(
                f"model.vision.cache: a stored feature has {len(stored)} bytes instead of {expected}; "
                f"delete the feature cache, it is made anew"
            )
        flat = torch.frombuffer(bytearray(stored), dtype=dtype)
        return flat.view(self.tokens, self.dim).to(picture.device)


def feature_key(sha256: str, fit: PictureFit, window: tuple[float, float] | None = None) -> bytes:
    """The key of one fitted picture: its bytes' hash, how it was fitted, and the window of a 16-bit picture."""
    record = [sha256, asdict(fit), window]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()


def build_vision(spec: Vision) -> VisionTower:
    """The tower a configuration names, in fp32 on the CPU, nothing frozen; random weights come from torch's seed."""
    match spec.library:
        case "open_clip":
            return _open_clip_tower(spec)
        case "transformers":
            return _transformers_tower(spec)


# --- transformers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A kind of transformers tower; normalisation and filter are used only where no processor file says otherwise."""

    model: type[transformers.PreTrainedModel]
    hidden_state: Callable[[Any, Tensor], Tensor]
    mean: Channels
    std: Channels
    has_cls: bool
    any_side: bool = False
    """Made for sides other than the one of its position embeddings."""


def _clip_state(model: Any, pixels: Tensor) -> Tensor:
    return model.encoder(inputs_embeds=model.pre_layrnorm(model.embeddings(pixels))).last_hidden_state


def _siglip_state(model: Any, pixels: Tensor) -> Tensor:
    return model.encoder(inputs_embeds=model.embeddings(pixels)).last_hidden_state


def _dinov2_state(model: Any, pixels: Tensor) -> Tensor:
    return model.encoder(model.embeddings(pixels)).last_hidden_state


_CLIP = Family(transformers.CLIPVisionModel, _clip_state, CLIP_MEAN, CLIP_STD, has_cls=True)
_SIGLIP = Family(transformers.SiglipVisionModel, _siglip_state, HALF, HALF, has_cls=False)
_DINOV2 = Family(transformers.Dinov2Model, _dinov2_state, IMAGENET_MEAN, IMAGENET_STD, has_cls=True, any_side=True)
_DINOV2_REGISTERS = Family(
    transformers.Dinov2WithRegistersModel, _dinov2_state, IMAGENET_MEAN, IMAGENET_STD, has_cls=True, any_side=True
)

FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2_REGISTERS,
}


def _transformers_tower(spec: Vision) -> VisionTower:
    model_type, config = _transformers_config(spec)
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model.vision: {spec.name or 'random'} is of model_type {model_type!r}; "
            f"transformers towers are {', '.join(FAMILIES)} (SigLIP 2 of fixed resolution is siglip)"
        )
    family = FAMILIES[model_type]
    pixels = _transformers_pixels(spec, family, config)
    _check_side(spec, config.patch_size)
    blocks = _blocks_below(spec.layer, config.num_hidden_layers)
    depth = config.num_hidden_layers
    model = family.model(config) if spec.random is not None else _load_transformers(spec.name, family)
    _resize_positions(cast(Any, model), pixels.side)
    model.config.num_hidden_layers = blocks
    match model:
        case transformers.Dinov2Model() | transformers.Dinov2WithRegistersModel():
            model.encoder.layer = model.encoder.layer[:blocks]
            # Without this, the saved configuration names a last stage that is gone, and cannot be loaded again.
            model.config.stage_names = model.config.stage_names[: blocks + 1]
            model.config.set_output_features_output_indices(out_features=None, out_indices=None)
        case transformers.CLIPVisionModel() | transformers.SiglipVisionModel():
            model.encoder.layers = model.encoder.layers[:blocks]
    registers = model.config.num_register_tokens if family is _DINOV2_REGISTERS else 0
    layout = Layout(
        patch=config.patch_size,
        dim=config.hidden_size,
        prefix=int(family.has_cls) + registers,
        has_cls=family.has_cls,
        blocks=blocks,
        depth=depth,
    )
    return VisionTower(model, family.hidden_state, pixels=pixels, layout=layout, select=spec.select)


def _transformers_config(spec: Vision) -> tuple[str, Any]:
    """model_type and the configuration of the vision part."""
    try:
        if spec.random is not None:
            sizes = dict(spec.random)
            model_type = sizes.pop("model_type", None)
            if model_type not in FAMILIES or model_type in ("clip", "siglip"):
                known = ", ".join(name for name in FAMILIES if name not in ("clip", "siglip"))
                raise ConfigError(f"model.vision.random.model_type: found {model_type!r}; write one of {known}")
            return model_type, transformers.AutoConfig.for_model(model_type, **sizes)
        if spec.pretrained is not None:
            raise ConfigError(
                f"model.vision.pretrained: {spec.pretrained!r}; transformers loads the weights of `name`, leave it out"
            )
        config = transformers.AutoConfig.from_pretrained(spec.name)
    except (OSError, TypeError) as error:
        raise ConfigError(f"model.vision.{'random' if spec.random else 'name'}: {error}") from error
    both = isinstance(config, transformers.CLIPConfig | transformers.SiglipConfig)
    return config.model_type, config.vision_config if both else config


def _transformers_pixels(spec: Vision, family: Family, config: Any) -> Pixels:
    """From the processor file beside the weights where there is one, else the family's own values."""
    record: dict[str, Any] = {}
    if spec.random is None:
        try:
            record, _ = ImageProcessingMixin.get_image_processor_dict(spec.name)
        except OSError:
            log.warning("%s has no image processor file; normalising as %s does", spec.name, family.model.__name__)
    where = f"model.vision.name: the image processor of {spec.name}"
    if not record.get("do_normalize", True) or not record.get("do_rescale", True):
        raise ConfigError(f"{where} does not rescale and normalise; only towers of normalised pictures are supported")
    if abs(record.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ConfigError(f"{where} rescales by {record['rescale_factor']}; only 1/255 is supported")
    filters: dict[int, Literal["bicubic", "bilinear"]] = {3: "bicubic", 2: "bilinear"}
    resample = int(record.get("resample", 3))
    if resample not in filters:
        raise ConfigError(f"{where} resizes with filter {resample}; only 3 (bicubic) and 2 (bilinear) are supported")
    side = spec.side or _processor_side(record) or config.image_size
    if side != config.image_size and not (spec.side or family.any_side):
        raise ConfigError(
            f"{where} makes pictures of {side} pixels, but the weights are for {config.image_size}; "
            f"write side: {config.image_size}, or side: {side} to interpolate the position embeddings"
        )
    return Pixels(
        side=side,
        mean=_channels(record.get("image_mean", family.mean)),
        std=_channels(record.get("image_std", family.std)),
        interpolation=filters[resample],
    )


def _processor_side(record: dict[str, Any]) -> int | None:
    """The side of the pictures a processor makes: of its crop, or of a square resize."""
    size = record.get("size", {})
    if record.get("do_center_crop") and "crop_size" in record:
        size = record["crop_size"]
    if isinstance(size, int):
        return size
    return size.get("height", size.get("shortest_edge"))


def _load_transformers(name: str, family: Family) -> Any:
    """The model, or ConfigError if any of its parameters is not in the files."""
    with _quiet_transformers():
        model, found = cast(Any, family.model).from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    lost = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if lost:
        raise ConfigError(
            f"model.vision.name: {name} lacks {len(lost)} parameters of {family.model.__name__} "
            f"({', '.join(lost[:3])}, ...); name a complete checkpoint"
        )
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' report of the text tower's keys; what matters of it is checked here."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


@torch.no_grad()
def _resize_positions(model: Any, side: int) -> None:
    """Position embeddings for another side, by the model's own interpolation; stored, so an export needs no option."""
    if side == model.config.image_size:
        return
    embeddings = model.embeddings
    patches = (side // model.config.patch_size) ** 2
    match model:
        case transformers.Dinov2Model() | transformers.Dinov2WithRegistersModel():
            like = embeddings.position_embeddings.new_empty(1, patches + 1, model.config.hidden_size)
            resized = embeddings.interpolate_pos_encoding(like, side, side)
            embeddings.position_embeddings = nn.Parameter(resized.clone())
        case _:
            extra = int(isinstance(model, transformers.CLIPVisionModel))
            count = patches + extra
            like = embeddings.position_embedding.weight.new_empty(1, count, model.config.hidden_size)
            resized = embeddings.interpolate_pos_encoding(like, side, side)
            embeddings.position_embedding = nn.Embedding.from_pretrained(resized[0].clone(), freeze=False)
            embeddings.position_ids = torch.arange(count).expand((1, -1))
            embeddings.num_patches, embeddings.num_positions = patches, count
            embeddings.image_size = side
    model.config.image_size = side


# --- open_clip ------------------------------------------------------------------------------------------------------


def _open_clip_tower(spec: Vision) -> VisionTower:
    visual: Any
    visual, pixels = _random_open_clip(spec) if spec.random is not None else _load_open_clip(spec)
    match visual:
        case VisionTransformer():
            trunk, blocks, prefix, has_cls = visual, visual.transformer.resblocks, 1, True
            patch, dim = cast(Any, visual).patch_size[0], visual.conv1.out_channels
        case TimmModel(trunk=TimmVisionTransformer() | Eva() as trunk):
            blocks, prefix, has_cls = trunk.blocks, trunk.num_prefix_tokens, trunk.cls_token is not None
            patch, dim = cast(Any, trunk.patch_embed).patch_size[0], trunk.embed_dim
        case _:
            raise ConfigError(
                f"model.vision.name: {spec.name} of open_clip is no plain vision transformer "
                f"(found {type(visual).__name__}); name a ViT, such as ViT-L-14-336-quickgelu"
            )
    _check_side(spec, patch)
    depth = len(blocks)
    below = _blocks_below(spec.layer, depth)
    if below == 0:
        raise ConfigError(
            f"model.vision.layer: {spec.layer} is the embeddings, which open_clip does not give out; "
            f"write 1 to {depth}, or negative, -1 being the last block"
        )
    trunk.prune_intermediate_layers([below - 1], prune_norm=False, prune_head=False)
    layout = Layout(patch=patch, dim=dim, prefix=prefix, has_cls=has_cls, blocks=below, depth=depth)
    return VisionTower(visual, _open_clip_state, pixels=pixels, layout=layout, select=spec.select)


def _open_clip_state(visual: Any, pixels: Tensor) -> Tensor:
    found = visual.forward_intermediates(
        pixels,
        indices=1,
        stop_early=True,
        normalize_intermediates=False,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    patches = found["image_intermediates"][0]
    prefix = found.get("image_intermediates_prefix")
    return patches if prefix is None else torch.cat([prefix[0], patches], dim=1)


def _random_open_clip(spec: Vision) -> tuple[nn.Module, Pixels]:
    """`random` holds fields of open_clip's vision_cfg, on top of those of `name` if it is given; and `quick_gelu`."""
    known: dict[str, Any] = _named_config(spec) if spec.name else {"vision_cfg": {}}
    sizes: dict[str, Any] = {**known["vision_cfg"], **(spec.random or {}), "patch_dropout": 0.0}
    quick_gelu = sizes.pop("quick_gelu", known.get("quick_gelu", False))
    if spec.side:
        sizes["image_size"] = spec.side
    text = open_clip.CLIPTextCfg(context_length=4, vocab_size=4, width=8, heads=1, layers=1)
    try:
        vision = open_clip.CLIPVisionCfg(**sizes)
    except TypeError as error:
        fields = ", ".join(open_clip.CLIPVisionCfg.__dataclass_fields__)
        raise ConfigError(f"model.vision.random: {error}; the fields are {fields}, quick_gelu") from error
    visual = open_clip.CLIP(known.get("embed_dim", vision.width), vision, text, quick_gelu=quick_gelu).visual
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    if isinstance(visual, TimmModel):
        visual.set_input_size(side)
    return visual, Pixels(side, CLIP_MEAN, CLIP_STD, "bicubic")


def _load_open_clip(spec: Vision) -> tuple[nn.Module, Pixels]:
    repository = spec.name.startswith(("hf-hub:", "local-dir:"))
    preprocess: dict[str, Any] | None = None
    if not repository:
        config = _named_config(spec)
        if open_clip.is_pretrained_cfg(spec.name, cast(str, spec.pretrained)):
            _check_activation(spec, config)
        else:
            preprocess = _check_file(spec, config)
    try:
        model = open_clip.create_model(
            spec.name,
            pretrained=None if repository else spec.pretrained,
            force_image_size=spec.side,
            force_patch_dropout=0.0,
            force_preprocess_cfg=preprocess,
            pretrained_text=False,
            require_pretrained=True,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"model.vision: open_clip cannot load {spec.name}, {spec.pretrained}: {error}") from error
    visual = cast(Any, model).visual
    record = visual.preprocess_cfg
    if record["interpolation"] not in ("bicubic", "bilinear"):
        raise ConfigError(f"model.vision.name: {spec.name} resizes {record['interpolation']!r}; only bicubic, bilinear")
    height, width = record["size"] if isinstance(record["size"], Sequence) else (record["size"],) * 2
    if height != width:
        raise ConfigError(f"model.vision.name: {spec.name} takes {width}x{height} pixels; name a tower of squares")
    pixels = Pixels(height, _channels(record["mean"]), _channels(record["std"]), record["interpolation"])
    return visual, pixels


def _named_config(spec: Vision) -> dict[str, Any]:
    config = open_clip.get_model_config(spec.name)
    if config is None:
        raise ConfigError(
            f"model.vision.name: open_clip has no {spec.name!r}; `python -c 'import open_clip; "
            f"print(open_clip.list_models())'` lists what it has"
        )
    return config


def _check_activation(spec: Vision, config: dict[str, Any]) -> None:
    """ConfigError if the weights of a tag were trained with the other GELU: open_clip loads them with a warning."""
    pretrained = cast(str, spec.pretrained)
    trained = open_clip.get_pretrained_cfg(spec.name, pretrained).get("quick_gelu", False)
    if trained == config.get("quick_gelu", False):
        return
    right = [
        name
        for name in open_clip.list_pretrained_models_by_tag(pretrained)
        if (other := open_clip.get_model_config(name))
        and other["vision_cfg"] == config["vision_cfg"]
        and other.get("quick_gelu", False) == trained
    ]
    names = " or ".join(right) or "local-dir:FOLDER with weights and an open_clip_config.json"
    gelu = {True: "QuickGELU", False: "GELU"}
    raise ConfigError(
        f"model.vision.name: {spec.name} computes {gelu[not trained]}, but the weights {pretrained!r} were trained "
        f"with {gelu[trained]}; write name: {names}"
    )


def _check_file(spec: Vision, config: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing for weights in a file, which says nothing of it: that of this name's tags, if they agree."""
    path = Path(cast(str, spec.pretrained))
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    if not path.is_file():
        raise ConfigError(
            f"model.vision.pretrained: {spec.pretrained!r} is neither a tag of {spec.name} nor a file; "
            f"its tags are {', '.join(tags) or 'none'}"
        )
    keys = ("mean", "std", "interpolation")
    found = {tuple(open_clip.get_pretrained_cfg(spec.name, tag).get(key) for key in keys) for tag in tags}
    if len(found) > 1:
        raise ConfigError(
            f"model.vision.pretrained: {path} does not say how its pictures were normalised, and the tags of "
            f"{spec.name} differ; put it in a folder with an open_clip_config.json "
            f"(model_cfg, preprocess_cfg) and write name: local-dir:FOLDER"
        )
    if not spec.side:
        _check_positions(spec, config, path)
    return dict(zip(keys, found.pop(), strict=True)) if found else {}


def _check_positions(spec: Vision, config: dict[str, Any], path: Path) -> None:
    """ConfigError if the weights were trained at another side: open_clip would interpolate without a word."""
    name = "visual.positional_embedding"
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            rows = file.get_slice(name).get_shape()[0] if name in file.keys() else None  # noqa: SIM118 - not a dict
    else:
        log.warning("%s is a pickle: read with weights_only=True; safetensors is safer and faster", path)
        tensors: Any = open_clip.factory.load_state_dict(str(path), weights_only=True)
        rows = len(tensors[name]) if name in tensors else None
    patch, side = config["vision_cfg"].get("patch_size", 16), config["vision_cfg"].get("image_size", 224)
    if rows is not None and rows != (side // patch) ** 2 + 1:
        trained = round((rows - 1) ** 0.5) * patch
        raise ConfigError(
            f"model.vision.pretrained: {path} was trained on {trained} pixels, but {spec.name} is for {side}; "
            f"write side: {trained}, or side: {side} to interpolate the position embeddings"
        )


# --- both -----------------------------------------------------------------------------------------------------------


def _blocks_below(layer: int, depth: int) -> int:
    """How many of `depth` blocks hidden state `layer` needs; there are depth + 1 states, the first the embeddings."""
    if not -(depth + 1) <= layer <= depth:
        raise ConfigError(
            f"model.vision.layer: {layer}, but the tower has {depth} blocks; write 0 (embeddings) to {depth}, "
            f"or -{depth + 1} to -1"
        )
    return layer if layer >= 0 else depth + 1 + layer


def _check_side(spec: Vision, patch: int) -> None:
    if spec.side and spec.side % patch:
        nearest = max(1, round(spec.side / patch)) * patch
        raise ConfigError(f"model.vision.side: {spec.side} is no multiple of the patch, {patch}; write side: {nearest}")


def _channels(values: Sequence[float]) -> Channels:
    red, green, blue = values
    return (float(red), float(green), float(blue))


def _raw(value: Tensor) -> bytes:
    """The bytes of a tensor; NumPy has no bfloat16, so they are viewed as uint8."""
    flat = value.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


class _Encode(nn.Module):
    """`encode` as a module's forward, as `functional_call` needs it."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower.encode(pixels)


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"tower.{name}": value for name, value in tensors.items()}


def _leaves(output: Tensor) -> set[int]:
    """The ids of the leaf tensors in the graph of `output`."""
    leaves: set[int] = set()
    seen = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "AccumulateGrad" in node.name():
            leaves.add(id(cast(Any, node).variable))
        waiting += [following for following, _ in node.next_functions]
    return leaves
