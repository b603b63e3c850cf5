"""Laws of the towers: the hidden states of the libraries themselves, promised counts, nothing run or stored in vain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmit.config import ConfigError, Vision
from mmit.data.cache import RecordCache
from mmit.data.fit import normalise
from mmit.model.vision import CachedTower, VisionTower, build_vision

Select = Literal["patch", "cls_patch", "cls"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 48, **SIZES},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 48, **SIZES},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, **SIZES},
    "registers": {"model_type": "dinov2_with_registers", "mlp_ratio": 2, "num_register_tokens": 3, **SIZES},
}
OPEN_CLIP: dict[str, Any] = {"layers": 4, "width": 32, "head_width": 16, "patch_size": 14, "image_size": 42}
TIMM: dict[str, Any] = {
    "timm_model_name": "vit_tiny_patch16_224",
    "timm_proj": "",
    "timm_pool": "",
    "image_size": 32,
}
ALL = {
    **{name: Vision(library="transformers", random=sizes) for name, sizes in TRANSFORMERS.items()},
    "open_clip": Vision(library="open_clip", random=OPEN_CLIP),
    "timm": Vision(library="open_clip", random=TIMM, layer=2),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pixels_for(tower: VisionTower, pictures: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (pictures, 3, tower.side, tower.side), dtype=torch.uint8)


def build(name: str, **changes: Any) -> VisionTower:
    return build_vision(ALL[name].model_copy(update=changes)).eval()


def full_and_cut(folder: Path, model: Any, **choices: Any) -> VisionTower:
    """The tower that loads `model` from a folder."""
    model.save_pretrained(folder)
    return build_vision(Vision(library="transformers", name=str(folder), **choices)).eval()


def selected(states: torch.Tensor, select: Select, prefix: int) -> torch.Tensor:
    patches = states[:, prefix:]
    return {"patch": patches, "cls": states[:, :1], "cls_patch": torch.cat([states[:, :1], patches], 1)}[select]


# --- the same numbers -----------------------------------------------------------------------------------------------


def as_clip_vision(visual: Any, act: str) -> CLIPVisionModel:
    """open_clip's weights under the names of transformers."""
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=42,
            patch_size=14,
            hidden_act=act,
            layer_norm_eps=1e-5,
        )
    )
    state: dict[str, torch.Tensor] = {}
    names = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
        "transformer.resblocks": "encoder.layers",
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for name, value in visual.state_dict().items():
        if "in_proj_" in name:
            start, kind = name.split("attn.in_proj_")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                layer = start.replace("transformer.resblocks", "encoder.layers")
                state[f"{layer}self_attn.{letter}_proj.{kind}"] = part
        elif name != "proj":
            for old, new in names.items():
                name = name.replace(old, new)
            state[name] = value
    theirs.load_state_dict(state)
    return theirs.eval()


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("select", ["patch", "cls_patch", "cls"])
@pytest.mark.parametrize("layer", [-1, -2, 1, 3])
def test_an_open_clip_vit_is_a_clip_vision_model(act: str, select: Select, layer: int) -> None:
    sizes = OPEN_CLIP | {"quick_gelu": act == "quick_gelu"}
    whole = build_vision(Vision(library="open_clip", random=sizes, layer=-1))
    theirs = as_clip_vision(whole.encoder, act)
    torch.manual_seed(0)
    ours = build_vision(Vision(library="open_clip", random=sizes, layer=layer, select=select)).eval()
    pixels = pixels_for(ours)
    states = theirs(normalise(pixels, ours.mean, ours.std), output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours(pixels), selected(states[layer], select, 1), rtol=1e-5, atol=1e-5)


def model_and_prefix(name: str) -> tuple[Any, int]:
    sizes = {key: value for key, value in TRANSFORMERS[name].items() if key != "model_type"}
    match name:
        case "clip":
            return CLIPVisionModel(CLIPVisionConfig(**sizes)), 1
        case "siglip":
            return SiglipVisionModel(SiglipVisionConfig(**sizes)), 0
        case _:
            return Dinov2Model(Dinov2Config(**sizes)), 1


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("layer", [-1, -2, 0, 3])
def test_a_transformers_tower_gives_the_models_own_hidden_state(tmp_path: Path, name: str, layer: int) -> None:
    model, prefix = model_and_prefix(name)
    for select in ("patch", "cls_patch", "cls")[: 3 if prefix else 1]:
        tower = full_and_cut(tmp_path, model, layer=layer, select=select)
        pixels = pixels_for(tower)
        states = model.eval()(normalise(pixels, tower.mean, tower.std), output_hidden_states=True).hidden_states
        torch.testing.assert_close(tower(pixels), selected(states[layer], select, prefix), rtol=0, atol=1e-6)


def test_register_tokens_are_no_patches() -> None:
    tower = build("registers", layer=-1, select="cls_patch")
    pixels = pixels_for(tower)
    states = tower.encoder(normalise(pixels, tower.mean, tower.std), output_hidden_states=True).hidden_states[-1]
    assert states.shape[1] == 1 + 3 + 9
    torch.testing.assert_close(tower(pixels), states[:, [0, *range(4, 13)]])


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("clip", CLIPImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})),
        ("siglip", SiglipImageProcessor(size={"height": 42, "width": 42})),
        ("clip", CLIPImageProcessor(size={"shortest_edge": 42}, crop_size=42, image_mean=[0.1] * 3, resample=2)),
    ],
)
def test_a_picture_gives_what_the_processor_and_the_model_give(tmp_path: Path, name: str, processor: Any) -> None:
    model, _ = model_and_prefix(name)
    processor.save_pretrained(tmp_path)
    tower = full_and_cut(tmp_path, model, layer=-2, select="patch")
    picture = np.random.default_rng(0).integers(0, 256, (67, 91, 3), dtype=np.uint8)
    fit = tower.fit_for("squash" if name == "siglip" else "crop")
    values = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    states = model.eval()(values, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tower(fit.apply(picture)[None]), states[:, int(name == "clip") :], rtol=0, atol=1e-5)


def test_the_vision_part_of_a_whole_clip_is_found(tmp_path: Path) -> None:
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {key: value for key, value in TRANSFORMERS["clip"].items() if key != "model_type"}
    whole = CLIPModel(CLIPConfig(vision_config=sizes, text_config=text | ids)).eval()
    tower = full_and_cut(tmp_path, whole)
    pixels = pixels_for(tower)
    states = whole.vision_model(normalise(pixels, tower.mean, tower.std), output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels), states[-2][:, 1:])


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("side", [28, 56])
def test_another_side_is_the_models_own_interpolation(tmp_path: Path, name: str, side: int) -> None:
    model, prefix = model_and_prefix(name)
    tower = full_and_cut(tmp_path, model, side=side)
    pixels = pixels_for(tower)
    option = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    values = normalise(pixels, tower.mean, tower.std)
    states = model.eval()(values, output_hidden_states=True, **option).hidden_states[-2]
    assert tower.tokens == (side // 14) ** 2
    torch.testing.assert_close(tower(pixels), states[:, prefix:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "registers"])
def test_the_encoder_saves_and_loads_as_the_library_would(tmp_path: Path, name: str) -> None:
    tower = build(name, side=28)
    encoder: Any = tower.encoder
    encoder.save_pretrained(tmp_path)
    again, found = type(encoder).from_pretrained(tmp_path, output_loading_info=True)
    assert [found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [set()] * 3
    pixels = pixels_for(tower)
    states = again.eval()(normalise(pixels, tower.mean, tower.std), output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower(pixels), states[-1][:, tower.layout.prefix :], rtol=0, atol=1e-6)


# --- what is promised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("select", ["patch", "cls_patch", "cls"])
@pytest.mark.parametrize("grid", [None, 2, 5])
def test_the_tokens_promised_are_the_tokens_produced(name: str, select: Select, grid: int | None) -> None:
    patch = 16 if name == "timm" else 14
    if name == "siglip" and select != "patch":
        with pytest.raises(ConfigError, match=r"model\.vision\.select.*write select: patch"):
            build(name, select=select)
        return
    tower = build(name, select=select, side=grid and grid * patch)
    for pictures in (3, 0):
        assert tower(pixels_for(tower, pictures)).shape == (pictures, tower.tokens, tower.dim)
    assert tower.fit_for("pad").side == tower.side == (grid * patch if grid else {16: 32, 14: 42}[patch])


def test_a_side_the_patch_does_not_divide_is_not_cut_off_when_it_is_the_towers_own() -> None:
    tower = build_vision(Vision(library="transformers", random=TRANSFORMERS["siglip"] | {"image_size": 50}))
    assert tower(pixels_for(tower)).shape[1] == tower.tokens == 9


@pytest.mark.parametrize("name", sorted(ALL))
def test_blocks_above_the_layer_do_not_exist(name: str) -> None:
    tower = build(name, layer=2)
    numbers = {
        int(found[1])
        for key, _ in tower.named_parameters()
        if (found := re.search(r"(?:layers?|blocks)\.(\d+)\.", key))
    }
    assert numbers == {0, 1}
    assert (tower.blocks, tower.depth) == (2, 12 if name == "timm" else 4)


@pytest.mark.parametrize("name", sorted(ALL))
def test_nothing_but_embeddings_and_blocks_runs(name: str) -> None:
    tower = build(name, layer=2)
    calls: dict[str, int] = {}
    for key, module in tower.named_modules():
        module.register_forward_hook(lambda *_, key=key: calls.__setitem__(key, calls.get(key, 0) + 1))
    tower(pixels_for(tower))
    blocks = [key for key in calls if re.search(r"(layers?|blocks)\.\d+$", key)]
    assert len(blocks) == 2
    assert all(calls[key] == 1 for key in blocks)
    assert not [
        key for key in calls if re.search(r"encoder\.(trunk\.)?(post_layernorm|layernorm|ln_post|norm$|head)", key)
    ]


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize(("layer", "select"), [(-2, "patch"), (1, "patch"), (0, "patch"), (0, "cls"), (-1, "cls")])
def test_unused_parameters_are_those_that_get_no_gradient(name: str, layer: int, select: Select) -> None:
    if (name == "siglip" and select == "cls") or (name in ("open_clip", "timm") and layer == 0):
        pytest.skip("this tower has no such tokens")
    tower = build(name, layer=layer, select=select)
    tower(pixels_for(tower)).square().sum().backward()
    assert tower.unused_parameters() == [key for key, value in tower.named_parameters() if value.grad is None]


def test_asking_for_unused_parameters_changes_nothing() -> None:
    tower = build("clip").requires_grad_(False)
    before = {key: value.clone() for key, value in tower.state_dict().items()}
    assert tower.unused_parameters() == ["encoder.post_layernorm.weight", "encoder.post_layernorm.bias"]
    assert tower.frozen
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_frozen_tower_makes_no_graph_and_no_dropout(name: str) -> None:
    tower = build(name)
    pixels = pixels_for(tower)
    assert tower(pixels).requires_grad
    tower.requires_grad_(False).train()
    assert not tower(pixels).requires_grad
    assert not any(module.training for module in tower.modules())
    next(tower.parameters()).requires_grad_(True)
    assert tower.train().training


@pytest.mark.parametrize("name", sorted(ALL))
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    tower = build(name).train()
    pixels = pixels_for(tower)
    gradients = []
    for enabled in (False, True):
        tower.gradient_checkpointing(enabled)
        tower.zero_grad()
        tower(pixels).square().sum().backward()
        gradients.append([value.grad for value in tower.parameters() if value.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_seed_decides_random_weights_and_the_fingerprint_every_weight(name: str) -> None:
    prints = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        prints.append(build(name).fingerprint())
    assert prints[0] == prints[1] != prints[2]
    torch.manual_seed(1)
    tower = build(name)
    assert tower.bfloat16().fingerprint() != prints[0]


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_bfloat16_tower_gives_bfloat16_tokens(name: str) -> None:
    tower = build(name).bfloat16()
    assert tower(pixels_for(tower)).dtype == torch.bfloat16


# --- what is refused ------------------------------------------------------------------------------------------------


def test_the_wrong_gelu_for_a_tag_stops_before_any_download() -> None:
    spec = Vision(library="open_clip", name="ViT-L-14-336", pretrained="openai")
    with pytest.raises(ConfigError, match=r"name: ViT-L-14-336-quickgelu$"):
        build_vision(spec)


def test_every_tag_of_the_other_gelu_stops_and_every_name_advised_would_not() -> None:
    def mismatch(name: str, tag: str) -> bool:
        config = open_clip.get_model_config(name) or {}
        return config.get("quick_gelu", False) != open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)

    wrong = [(name, tag) for name, tag in open_clip.list_pretrained() if mismatch(name, tag)]
    assert ("ViT-B-32", "openai") in wrong
    for name, tag in wrong:
        with pytest.raises(ConfigError, match="write name: ") as caught:
            build_vision(Vision(library="open_clip", name=name, pretrained=tag))
        advised = str(caught.value).rsplit("write name: ", 1)[1].split(" or ")
        assert not any(mismatch(other, tag) for other in advised if not other.startswith("local-dir:"))


@pytest.mark.parametrize(
    ("spec", "place", "remedy"),
    [
        ({"library": "open_clip", "name": "ViT-L-41", "pretrained": "openai"}, "name", "list_models"),
        ({"library": "open_clip", "name": "ViT-B-32", "pretrained": "no_such"}, "pretrained", "laion2b_s34b_b79k"),
        ({"library": "open_clip", "random": {"width": 32, "lairs": 2}}, "random", "layers"),
        ({"library": "open_clip", "random": OPEN_CLIP, "layer": 0}, "layer", "write 1 to 4"),
        ({"library": "open_clip", "random": OPEN_CLIP, "layer": 5}, "layer", "4 blocks"),
        ({"library": "open_clip", "name": "RN50", "random": {}}, "name", "name a ViT"),
        ({"library": "open_clip", "random": OPEN_CLIP, "side": 40}, "side", "write side: 42"),
        ({"library": "transformers", "random": TRANSFORMERS["clip"], "layer": -6}, "layer", "-5 to -1"),
        ({"library": "transformers", "random": TRANSFORMERS["dinov2"], "side": 50}, "side", "write side: 56"),
        ({"library": "transformers", "random": {"model_type": "llama"}}, "random", "clip_vision_model"),
        ({"library": "transformers", "name": "/no/such/folder"}, "name", "/no/such/folder"),
    ],
)
def test_what_cannot_be_built_says_where_and_what_to_write(spec: dict[str, Any], place: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.vision\.{place}") as caught:
        build_vision(Vision(**spec))
    assert remedy in str(caught.value)


def test_a_processor_for_another_side_than_the_weights_is_named(tmp_path: Path) -> None:
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    model, _ = model_and_prefix("clip")
    with pytest.raises(ConfigError, match=r"write side: 42, or side: 56"):
        full_and_cut(tmp_path, model)
    assert full_and_cut(tmp_path, model, side=56).side == 56


def test_a_checkpoint_that_lacks_a_parameter_is_refused(tmp_path: Path) -> None:
    model, _ = model_and_prefix("clip")
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    del state["encoder.layers.1.mlp.fc1.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 parameters .*encoder\.layers\.1\.mlp\.fc1\.weight"):
        build_vision(Vision(library="transformers", name=str(tmp_path)))


SMALL = "small-vit"


@pytest.fixture
def small_open_clip(tmp_path: Path) -> Path:
    """A file of weights of a small CLIP which open_clip knows by the name `SMALL`."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / f"{SMALL}.json").write_text(
        '{"embed_dim": 16, "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 14,'
        ' "image_size": 42}, "text_cfg": {"context_length": 4, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1}}'
    )
    open_clip.add_model_config(folder)
    model = open_clip.create_model(SMALL, load_weights=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_a_file_of_open_clip_weights_is_loaded(small_open_clip: Path) -> None:
    tower = build_vision(Vision(library="open_clip", name=SMALL, pretrained=str(small_open_clip), layer=-1)).eval()
    model = open_clip.create_model(SMALL, pretrained=str(small_open_clip)).eval()
    pixels = pixels_for(tower)
    visual: Any = model.visual
    found = visual.forward_intermediates(normalise(pixels, tower.mean, tower.std), output_fmt="NLC")
    torch.testing.assert_close(tower(pixels), found["image_intermediates"][-1])


def test_open_clip_weights_trained_at_another_side_are_named(small_open_clip: Path) -> None:
    config = small_open_clip.parent / "configs" / f"{SMALL}.json"
    config.write_text(config.read_text().replace('"image_size": 42', '"image_size": 56'))
    open_clip.add_model_config(config)
    spec = Vision(library="open_clip", name=SMALL, pretrained=str(small_open_clip))
    with pytest.raises(ConfigError, match=r"trained on 42 pixels, but small-vit is for 56; write side: 42"):
        build_vision(spec)
    assert build_vision(spec.model_copy(update={"side": 28})).tokens == 4


def test_pixels_of_another_side_are_refused() -> None:
    with pytest.raises(ValueError, match="side of 42"):
        build("clip")(torch.zeros(1, 3, 56, 56, dtype=torch.uint8))


# --- remembered features --------------------------------------------------------------------------------------------


class Memory(dict[bytes, bytes]):
    def put(self, key: bytes, value: bytes) -> None:
        self[key] = value


def keys_for(pictures: int) -> list[bytes]:
    return [number.to_bytes(32, "little") for number in range(pictures)]


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_remembered_tokens_have_the_bits_of_the_tower_and_cost_no_second_run(name: str, dtype: torch.dtype) -> None:
    plain = build(name).requires_grad_(False).to(dtype)
    pixels = pixels_for(plain, 3)
    alone = torch.cat([plain(picture[None]) for picture in pixels])
    memory = Memory()
    runs: list[int] = []
    plain.encoder.register_forward_hook(lambda *_: runs.append(1))
    next(m for m in plain.encoder.modules() if isinstance(m, torch.nn.Conv2d)).register_forward_hook(
        lambda *_: runs.append(1)
    )
    tower = CachedTower(plain, memory)
    keys = keys_for(3)
    first = tower(pixels, keys)
    assert len(runs) == len(memory) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = CachedTower(plain, memory)(pixels.flip(0), keys[::-1]).flip(0)
    assert len(runs) == 3
    assert torch.equal(first, alone)
    assert torch.equal(again, alone)
    assert again.dtype == dtype


def test_another_process_finds_what_was_remembered(tmp_path: Path) -> None:
    plain = build("clip").requires_grad_(False)
    pixels, keys = pixels_for(plain, 2), keys_for(2)
    first = CachedTower(plain, RecordCache(tmp_path / "features"))(pixels, keys)
    nothing = torch.zeros_like(pixels)
    assert torch.equal(CachedTower(plain, RecordCache(tmp_path / "features"))(nothing, keys), first)


def test_remembering_keeps_the_parameter_names() -> None:
    plain = build("clip").requires_grad_(False)
    assert list(CachedTower(plain, Memory()).state_dict()) == list(plain.state_dict())


def test_other_weights_read_other_records() -> None:
    memory = Memory()
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain = build("clip").requires_grad_(False)
        pixels = torch.zeros(1, 3, 42, 42, dtype=torch.uint8)
        assert torch.equal(CachedTower(plain, memory)(pixels, [b"picture"]), plain(pixels))
    assert len(memory) == 2


def test_a_tower_that_trains_is_not_remembered() -> None:
    with pytest.raises(ConfigError, match=r"model\.vision\.cache.*write cache: false"):
        CachedTower(build("clip"), Memory())
    tower = CachedTower(build("clip").requires_grad_(False), Memory())
    tower.requires_grad_(True)
    with pytest.raises(ConfigError, match="write cache: false"):
        tower(pixels_for(tower, 1), [b"k"])


def test_a_key_for_every_picture() -> None:
    tower = CachedTower(build("clip").requires_grad_(False), Memory())
    with pytest.raises(ValueError, match="2 pictures came with 1 keys"):
        tower(pixels_for(tower, 2), [b"k"])
    assert tower(pixels_for(tower, 0), []).shape == (0, tower.tokens, tower.dim)
