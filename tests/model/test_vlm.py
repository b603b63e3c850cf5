"""Laws of the glue: the numbers of transformers' own Llava, packed as apart, nothing from nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmit.config import ConfigError, Train
from mmit.data.fit import normalise
from mmit.data.packing import Row
from mmit.model.build import Assembly, set_modes
from mmit.training.data import StageData
from tests.training.tiny import (
    CLIP,
    GEMMA3,
    GPT2,
    LANGUAGE,
    QUIET_GPT2,
    QWEN2,
    SIGLIP,
    alone,
    assembled,
    assert_close,
    config,
    gradients,
    mixed,
    opened,
    row_of,
    shards,
    stage,
    together,
)

ALL = {"vision": {"lr": 1e-3}, "projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}
TOWERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "clip": (CLIPVisionConfig, CLIPVisionModel, CLIP),
    "siglip": (SiglipVisionConfig, SiglipVisionModel, SIGLIP),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards(tmp_path_factory.mktemp("data") / "mixed", mixed(10))


def made(
    tmp_path: Path, data: Path, *, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[Assembly, StageData]:
    wanted = config(tmp_path / "run", stage("s", data, ALL, pictures="squash"), **settings)
    assembly = assembled(wanted, dtype=dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in assembly.vlm.parameters():  # random parts start so near to zero that little would show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return assembly, opened(wanted, assembly)


def loss_of_llava(
    llava: LlavaForConditionalGeneration, assembly: Assembly, row: Row
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, V) and losses (K,) of one sample, which sees its pictures in the order of its text."""
    vision = assembly.vision
    pixels = None
    if vision is not None and len(row.shown):
        dtype = next(llava.parameters()).dtype
        pixels = normalise(row.pixels, vision.mean, vision.std).to(dtype)[row.shown]
    logits = llava(input_ids=row.ids, pixel_values=pixels).logits[0]
    wanted = row.ids[0, 1:].clone()
    learned = torch.zeros_like(wanted, dtype=torch.bool)
    learned[row.predicts] = True
    losses = functional.cross_entropy(logits[:-1], wanted.masked_fill(~learned, -100), reduction="none")
    return logits, losses[learned]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("tower", "language"), [("clip", LANGUAGE), ("siglip", QWEN2)])
def test_losses_and_logits_are_those_of_transformers_llava(
    tower: str, language: dict[str, Any], dtype: torch.dtype, bound: float, tmp_path: Path, data: Path
) -> None:
    kind, model, sizes = TOWERS[tower]
    torch.manual_seed(7)
    whole = model(kind(**{key: value for key, value in sizes.items() if key != "model_type"}))
    whole.save_pretrained(tmp_path / "tower")
    vision = {"library": "transformers", "name": str(tmp_path / "tower"), "layer": -2}
    assembly, found = made(tmp_path, data, dtype=dtype, vision=vision, language=language)
    settings = LlavaConfig(
        vision_config=whole.config,
        text_config=assembly.vlm.language.config,
        image_token_id=assembly.placeholder,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    llava = LlavaForConditionalGeneration(settings).to(dtype).eval()
    inner = llava.model
    inner.language_model.load_state_dict(assembly.vlm.language.model.state_dict())
    llava.lm_head.load_state_dict(assembly.vlm.language.lm_head.state_dict())
    first, second = assembly.vlm.projector.linears
    inner.multi_modal_projector.linear_1.load_state_dict(first.state_dict())
    inner.multi_modal_projector.linear_2.load_state_dict(second.state_dict())
    assembly_tower = assembly.vlm.vision.encoder.state_dict()
    missing, unknown = inner.vision_tower.load_state_dict(assembly_tower, strict=False)
    assert not unknown
    assert all("layers.2." in name or "post_layernorm" in name or "head." in name for name in missing)
    several = 0
    for row in alone(found):
        with torch.no_grad():
            logits, losses = loss_of_llava(llava, assembly, row)
            hidden = assembly.vlm.hidden(row, assembly.vlm.embed(row))
            ours = assembly.vlm.language.lm_head(hidden)[0]
            torch.testing.assert_close(ours, logits, rtol=bound, atol=bound)
            torch.testing.assert_close(assembly.vlm(row), losses, rtol=bound, atol=bound)
        several += len(row.shown) > 1
    assert several >= 3


def test_every_saved_tower_is_the_one_of_auto_model(tmp_path: Path) -> None:
    """The premise of the test above: the folder holds the whole tower, ours is cut from it."""
    whole = CLIPVisionModel(CLIPVisionConfig(**{k: v for k, v in CLIP.items() if k != "model_type"}))
    whole.save_pretrained(tmp_path / "tower")
    assert sum(1 for name in AutoModel.from_pretrained(tmp_path / "tower").state_dict() if "layers.2." in name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("language", [LANGUAGE, QWEN2, GEMMA3, QUIET_GPT2], ids=lambda sizes: sizes["model_type"])
def test_packed_is_separate_in_losses_and_gradients(
    language: dict[str, Any], attention: str, tmp_path: Path, data: Path
) -> None:
    assembly, found = made(tmp_path, data, language=language, attention=attention)
    # transformers takes eager softmax and Gemma's norms through fp32 whatever the precision: roundings of 1e-8 show.
    bound = 1e-10 if attention == "sdpa" and language is not GEMMA3 else 1e-6
    rows = alone(found)
    one = together(found, range(len(rows)))
    assert len(one.pixels) < len(one.shown), "pictures in common are encoded once"
    apart = torch.cat([assembly.vlm(row) for row in rows])
    torch.testing.assert_close(assembly.vlm(one), apart, rtol=bound, atol=1e-12)
    assert_close(gradients(assembly, [one]), gradients(assembly, rows), bound)


def test_the_order_of_samples_in_a_row_is_only_an_order(tmp_path: Path, data: Path) -> None:
    assembly, found = made(tmp_path, data)
    there, back = together(found, range(10)), together(found, range(9, -1, -1))
    torch.testing.assert_close(assembly.vlm(there).sum(), assembly.vlm(back).sum(), rtol=1e-12, atol=0)
    assert_close(gradients(assembly, [there]), gradients(assembly, [back]), 1e-10)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_in_pieces_gives_the_models_own_losses_and_gradients(
    chunk: int, tied: bool, tmp_path: Path, data: Path
) -> None:
    assembly, found = made(tmp_path, data, language=LANGUAGE | {"tie_word_embeddings": tied})
    row = together(found, range(10))
    own, expected = assembly.vlm(row), gradients(assembly, [row])
    assembly.vlm.chunk = chunk
    torch.testing.assert_close(assembly.vlm(row), own, rtol=1e-12, atol=1e-12)
    assert_close(gradients(assembly, [row]), expected, 1e-10)


@pytest.mark.parametrize("chunk", [None, 0])
def test_a_row_without_labels_gives_nothing_and_no_nan(chunk: int | None, tmp_path: Path, data: Path) -> None:
    assembly, found = made(tmp_path, data)
    assembly.vlm.chunk = chunk
    silent = [row for row in alone(found) if not len(row.predicts)]
    assert silent
    for row in silent:
        losses = assembly.vlm(row)
        assert losses.shape == (0,)
        assert losses.sum().item() == 0.0
        assert all(not gradient.any() for gradient in gradients(assembly, [row]).values())


def test_touching_the_tower_changes_no_bit_and_gives_gradients_of_exactly_zero(tmp_path: Path, data: Path) -> None:
    assembly, found = made(tmp_path, data)
    row = next(row for row in alone(found) if not len(row.shown))
    touched = replace(row, touch_vision=True)
    assert torch.equal(assembly.vlm(touched), assembly.vlm(row))
    plain, beside = gradients(assembly, [row]), gradients(assembly, [touched])
    for name, gradient in beside.items():
        assert torch.equal(gradient, plain[name]), name
        assert gradient.any() or not name.startswith("language.model.layers"), name
    assembly.vlm.zero_grad(set_to_none=True)
    assembly.vlm(touched).sum().backward()
    projector = dict(assembly.vlm.projector.named_parameters())
    assert all(p.grad is not None for p in projector.values()), "the modules ran, so that collectives meet"


def test_a_rank_without_samples_runs_a_row_of_nothing(tmp_path: Path, data: Path) -> None:
    assembly, _ = made(tmp_path, data)
    for touch in (False, True):
        losses = assembly.vlm(row_of([], {}, touch_vision=touch))
        assert losses.shape == (0,)
        losses.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in assembly.vlm.parameters())


def test_a_picture_shown_twice_runs_through_the_tower_once(tmp_path: Path, data: Path) -> None:
    assembly, found = made(tmp_path, data)
    seen: list[int] = []
    assert assembly.vlm.vision is not None
    assembly.vlm.vision.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    row = together(found, range(10))
    assembly.vlm(row)
    assert seen == [len(set(row.keys))]
    assert seen[0] < len(row.shown)


def test_a_count_that_does_not_match_stops_with_the_samples_name(tmp_path: Path, data: Path) -> None:
    assembly, found = made(tmp_path, data)
    row = next(row for row in alone(found) if len(row.shown))
    wrong = row.is_image.clone()
    wrong[0, int(row.is_image[0].nonzero()[0])] = False
    with pytest.raises(ValueError, match=row.samples[0]):
        assembly.vlm(replace(row, is_image=wrong, image_tokens=int(wrong.sum())))


def test_a_projector_of_another_width_is_refused(tmp_path: Path, data: Path) -> None:
    """Its numbers would be laid out row after row in the places of the pictures, silently."""
    assembly, found = made(tmp_path, data)
    row = next(row for row in alone(found) if len(row.shown))
    assembly.vlm.projector = torch.nn.Linear(16, 48, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"model\.projector: Linear makes 4 rows of width 48 .* is 32 wide"):
        assembly.vlm(row)


def test_checkpointing_a_frozen_language_model_switches_on_no_dropout(tmp_path: Path, data: Path) -> None:
    assembly, found = made(tmp_path, data, language=GPT2)
    train = Train.model_validate({"projector": {"lr": 1e-3}})
    row = next(row for row in alone(found) if len(row.shown) and len(row.predicts))
    assembly.vlm.language.requires_grad_(False)
    counts: list[int] = []
    layers = assembly.vlm.language.transformer.h
    layers[0].attn.register_forward_hook(lambda *_: counts.append(1))
    losses = []
    for checkpointing in (False, True):
        set_modes(assembly, train, gradient_checkpointing=checkpointing)
        losses.append(assembly.vlm(row))
        losses[-1].sum().backward()
    assert torch.equal(*losses)
    assert len(counts) == 3, "the second pass was computed again for its gradient"


def test_other_pictures_change_the_loss(tmp_path: Path, data: Path) -> None:
    """Sight: what is shown reaches the answer, and an earlier answer does not see a later picture."""
    assembly, found = made(tmp_path, data)
    row = next(row for row in alone(found) if len(row.shown) and len(row.predicts))
    assert not torch.allclose(assembly.vlm(row), assembly.vlm(replace(row, pixels=255 - row.pixels)))
