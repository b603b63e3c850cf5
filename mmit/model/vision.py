"""Vision towers of open_clip and transformers behind one face: uint8 pixels in, tokens of one hidden state out.

N counts pictures, S is the side in pixels, P the tokens the projector gets of one picture, D the width of the tower.

A tower holds only the blocks below the hidden state it reads: those above would never get a gradient, and cost memory
and time. `encoder` is the library's own module, cut to `blocks` of its `depth` blocks with a configuration that says
so; an export therefore reads its last hidden state (`vision_feature_layer: -1`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, Protocol, cast

import torch
import transformers
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mmit.config import ConfigError, Vision
from mmit.data.fit import PictureFit, normalise
from mmit.model.tower_parts import TowerParts
from mmit.model.towers_open_clip import open_clip_tower
from mmit.model.towers_transformers import transformers_tower

Select = Literal["patch", "cls_patch", "cls"]


class VisionTower(nn.Module):
    """Tokens (N, P, D) of hidden state `blocks`, counted as transformers does and taken before any final norm.

    `tokens` is P, known before any pixel is seen. A frozen tower runs without a graph and always in evaluation mode.
    """

    def __init__(self, parts: TowerParts, *, select: Select) -> None:
        super().__init__()
        pixels, layout = parts.pixels, parts.layout
        if select != "patch" and not layout.has_cls:
            raise ConfigError(
                f"model.vision.select: {select!r}, but this tower ({type(parts.encoder).__name__}) has no cls token; "
                f"write select: patch"
            )
        self.encoder = parts.encoder
        self.hidden_state = parts.hidden_state
        self.pixels = pixels
        self.layout = layout
        self.above = (parts.above,)  # in a tuple, so that it is no part of this module
        self.select: Select = select
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
        parts = TowerParts(tower.encoder, tower.hidden_state, tower.pixels, tower.layout, *tower.above)
        super().__init__(parts, select=tower.select)
        self.train(tower.training)
        self.store = store
        self._identity: tuple[torch.dtype, bytes] | None = None

    def forward(self, pixels: Tensor, keys: Sequence[bytes] = ()) -> Tensor:
        """Tokens (N, P, D); `keys[n]` identifies pixels n, as `mmit.data.loader.Rendering.identity` does."""
        if not self.frozen:
            raise ConfigError("model.vision.cache: the tower is being trained; write cache: false for this run")
        if len(keys) != len(pixels):
            raise ValueError(f"{len(pixels)} pictures came with {len(keys)} keys; give one a picture")
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


def build_vision(spec: Vision) -> VisionTower:
    """The tower a configuration names, in fp32 on the CPU, nothing frozen; random weights come from torch's seed."""
    match spec.library:
        case "open_clip":
            return VisionTower(open_clip_tower(spec), select=spec.select)
        case "transformers":
            return VisionTower(transformers_tower(spec), select=spec.select)


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
