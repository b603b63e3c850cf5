"""`model: {from: ...}`: what others made goes in, trains as declared, and comes out again."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from mmit import api
from mmit import config as schema
from mmit.config import Config, ConfigError, parse_config
from mmit.export.verify import compare, load_export, probes, said, said_by_export
from mmit.export.write import DTYPES, Dtype, export
from mmit.model.build import Assembly, assemble, pinned
from mmit.model.saved import Saved, load_saved
from tests.export.foreign import llava_repository, random_llava
from tests.export.models import MODELS, run_of, saved_model
from tests.model.test_pretrained import on_the_hub


def from_source(source: Path, **more: Any) -> Assembly:
    return assemble(schema.Model.model_validate({"from": str(source), **more}), seed=0)


def as_saved(assembly: Assembly, **record: Any) -> Saved:
    tokens = assembly.vlm.vision.tokens if assembly.vlm.vision is not None else 0
    return Saved(assembly, assembly.chat("auto"), assembly.fit(None), tokens, {"sources": assembly.sources, **record})


def config_for(folder: Path, source: Path, **train: Any) -> Config:
    tree = {
        "output": str(folder / "run"),
        "model": {"from": str(source)},
        "stages": [
            {
                "name": "sft",
                "data": [{"synthetic": "shapes", "options": {"count": 24}}],
                "train": train or {"projector": {"lr": 1e-2}, "language": {"lr": 1e-2}},
                "batch_size": 8,
                "max_tokens": 512,
            }
        ],
        **{"workers": 0, "cache": str(folder / "cache"), "threads": 1, "device": "cpu"},
    }
    return parse_config(tree, "test")


@pytest.mark.parametrize("name", MODELS)
def test_an_export_gone_on_from_is_exported_again_tensor_by_tensor(name: str, tmp_path: Path) -> None:
    export(run_of(saved_model(MODELS[name]), tmp_path / "run"), tmp_path / "out")
    ours = from_source(tmp_path / "out")
    tokens = ours.vlm.vision.tokens if ours.vlm.vision is not None else 0
    about = {"model": {"from": str(tmp_path / "out")}, "chat": vars(ours.chat("auto").format), "pictures": "pad"}
    about |= {"format": 1, "seed": 0, "placeholder": ours.placeholder, "image_tokens": tokens, "max_tokens": 64}
    export(run_of(as_saved(ours, **about), tmp_path / "run2"), tmp_path / "out2")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "out2"))
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize(("tied", "layer"), [(False, -2), (True, -1), (False, 2)])
def test_a_llava_of_transformers_says_the_same_here(tied: bool, layer: int, tmp_path: Path) -> None:
    random_llava(tmp_path / "llava", tied=tied, layer=layer)
    saved = as_saved(from_source(tmp_path / "llava"))
    assert saved.fit is not None
    assert saved.fit.policy == "crop"
    model, processor = load_export(tmp_path / "llava", multimodal=True)
    conversations = probes(saved)
    theirs = [said_by_export(model, processor, conversation) for conversation in conversations]
    assert compare([said(saved, item) for item in conversations], theirs, saved, "test").largest_difference <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_llava_to_ours_to_llava_keeps_every_tensor(tied: bool, dtype: Dtype, tmp_path: Path) -> None:
    llava = random_llava(tmp_path / "llava", tied=tied)
    llava.to(DTYPES[dtype]).save_pretrained(tmp_path / "llava")
    before = llava.state_dict()
    ours = from_source(tmp_path / "llava")
    about = {"model": {"from": str(tmp_path / "llava")}, "chat": vars(ours.chat("auto").format), "pictures": "crop"}
    about |= {"format": 1, "seed": 0, "placeholder": ours.placeholder, "image_tokens": 16, "max_tokens": 64}
    export(run_of(as_saved(ours, **about), tmp_path / "run"), tmp_path / "out", dtype=dtype)
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert {value.dtype for value in after.values()} == {DTYPES[dtype]}
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_sft_alone_trains_what_is_declared_and_exports_again(tmp_path: Path) -> None:
    llava = random_llava(tmp_path / "llava")
    final = api.train(config_for(tmp_path, tmp_path / "llava"))
    tensors = load_file(final / "model.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"projector", "language"}
    record = json.loads((final / "model.json").read_text())
    assert list(record["sources"]["from"]["sha256"]) == ["model.safetensors"]
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.parity.largest_difference <= 1e-5
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    before = llava.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if "vision_tower" in name]
    assert {"model.multi_modal_projector.linear_1.weight", "lm_head.weight"} <= moved


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    random_llava(tmp_path / "llava")
    api.train(config_for(tmp_path, tmp_path / "llava"))
    file = tmp_path / "llava/model.safetensors"
    tensors = {name: value + 1e-3 for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other files of model\.from"):
        load_saved(tmp_path / "run")


@pytest.mark.parametrize("lora", [None, schema.Lora(rank=2, alpha=4)])
def test_a_run_and_its_export_go_on_as_the_same_model(lora: schema.Lora | None, tmp_path: Path) -> None:
    saved = saved_model(MODELS["open_clip ViT + llama, tied"], lora=lora, pictures="squash", chat="vicuna_v1")
    run_of(saved, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    conversations = probes(saved)
    ours = [said(saved, item) for item in conversations]
    for source in ("run", "run/final", "out"):
        again = as_saved(from_source(tmp_path / source))
        assert not again.assembly.fresh
        assert again.chat.format == saved.chat.format
        assert again.fit == saved.fit
        found = [said(again, item) for item in conversations]
        assert compare(ours, found, saved, source).largest_difference <= 1e-5


def test_a_text_only_export_brings_its_chat_format(tmp_path: Path) -> None:
    saved = saved_model(MODELS["text only"], chat="vicuna_v1")
    export(run_of(saved, tmp_path / "run"), tmp_path / "out")
    assert from_source(tmp_path / "out").chat("auto").format == saved.chat.format


def test_the_layout_of_the_llava_repository(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llava = random_llava(tmp_path / "llava")
    llava_repository(tmp_path / "liuhaotian", llava)
    with caplog.at_level(logging.WARNING):
        theirs = as_saved(from_source(tmp_path / "liuhaotian"))
    assert "weights_only=True" in caplog.text
    assert theirs.fit is not None
    assert theirs.fit.policy == "pad"
    same = from_source(tmp_path / "llava")
    same.own_pictures = "pad"
    conversations = probes(theirs)
    ours = [said(as_saved(same), item) for item in conversations]
    found = [said(theirs, item) for item in conversations]
    assert compare(ours, found, theirs, "test").largest_difference <= 1e-5


def test_the_tower_of_the_hub_that_such_a_folder_names_is_kept_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder, llava = repository(tmp_path)
    shutil.copytree(folder / "clip-tower", tmp_path / "moved")
    llava.model.vision_tower.post_layernorm.weight.data += 1
    llava.model.vision_tower.embeddings.class_embedding.data += 1
    llava.model.vision_tower.save_pretrained(tmp_path / "moved")
    on_the_hub(tmp_path / "hub", "somewhere/clip-tower", {"a" * 40: folder / "clip-tower"})
    model = schema.Model.model_validate({"from": str(folder)})
    before = assemble(model, seed=0)
    on_the_hub(tmp_path / "hub", "somewhere/clip-tower", {"b" * 40: tmp_path / "moved"})
    again, moved = assemble(pinned(model, before.sources), seed=0), assemble(model, seed=0)
    assert before.sources["vision"]["revision"] == again.sources["vision"]["revision"] == "a" * 40
    assert moved.sources["vision"]["revision"] == "b" * 40
    assert again.sources == before.sources
    towers: list[Any] = [assembly.vlm.vision for assembly in (before, again, moved)]
    embeddings = [tower.encoder.get_parameter("embeddings.class_embedding") for tower in towers]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])


def test_a_text_only_export_of_the_hub_is_kept_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = schema.Model.model_validate({"from": "us/speaker"})
    found = []
    for revision in "ab":
        export(run_of(saved_model(MODELS["text only"]), tmp_path / f"run {revision}"), tmp_path / revision)
        on_the_hub(tmp_path / "hub", "us/speaker", {revision * 40: tmp_path / revision})
        found.append(assemble(model, seed=0).sources)
    assert [sources["from"]["revision"][0] for sources in found] == ["a", "b"]
    assert assemble(pinned(model, found[0]), seed=0).sources == found[0]


def repository(tmp_path: Path, **keys: Any) -> tuple[Path, LlavaForConditionalGeneration]:
    """A folder of the LLaVA repository with these keys in its config.json, and the model in it."""
    llava = random_llava(tmp_path / "llava")
    folder = tmp_path / "liuhaotian"
    llava_repository(folder, llava)
    record = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(record))
    return folder, llava


def test_what_a_trainer_leaves_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    folder, llava = repository(tmp_path)
    torch.save(Boom(), folder / "training_args.bin")
    stale = {f"model.mm_projector.{place}.{kind}": torch.zeros(1) for place in (0, 2) for kind in ("weight", "bias")}
    torch.save(stale, folder / "mm_projector.bin")
    found: Any = from_source(folder).vlm.projector
    expected: Any = llava.model.multi_modal_projector
    assert torch.equal(found.linears[1].weight, expected.linear_2.weight)


def test_a_tower_that_was_trained_with_the_model_is_the_one_that_is_read(tmp_path: Path) -> None:
    """As LLaVA-NeXT trains its towers: the one that config.json names is where training began."""
    folder, llava = repository(tmp_path, unfreeze_mm_vision_tower=True)
    with pytest.raises(ConfigError, match=r"its tower was trained, but the files lack \d+ of its tensors"):
        from_source(folder)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name, value in llava.model.vision_tower.state_dict().items():
        tensors[f"model.vision_tower.vision_tower.vision_model.{name}"] = value + 1
    torch.save(tensors, folder / "pytorch_model.bin")
    tower: Any = from_source(folder).vlm.vision
    for name, value in tower.encoder.named_parameters():
        assert torch.equal(value, llava.model.vision_tower.state_dict()[name] + 1), name
    above = llava.model.vision_tower.encoder.layers[tower.blocks].state_dict()
    assert all(torch.equal(value, above[name] + 1) for name, value in tower.above[0].state_dict().items())


@pytest.mark.parametrize(
    "keys",
    [{"image_aspect_ratio": "anyres"}, {"mm_patch_merge_type": "spatial_unpad"}, {"mm_use_im_start_end": True}],
    ids=str,
)
def test_another_way_of_showing_pictures_is_refused(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json has {next(iter(keys))} .*one square of patches"):
        from_source(repository(tmp_path, **keys)[0])


def test_a_language_model_of_the_llava_repository_is_whole_or_refused(tmp_path: Path) -> None:
    folder, _ = repository(tmp_path)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"lacks 1 parameters of LlamaForCausalLM"):
        from_source(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"shortest_edge": 32}},
        {"do_center_crop": False},
        {"crop_size": {"height": 28, "width": 32}},
        {"do_normalize": False},
    ],
    ids=str,
)
def test_a_processor_that_makes_other_pictures_than_ours_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    random_llava(tmp_path)
    file = tmp_path / "processor_config.json"
    record = json.loads(file.read_text())
    record["image_processor"] |= changes
    file.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"model\.from: .*its image processor"):
        from_source(tmp_path)


def test_a_run_that_is_not_finished_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds no finished run"):
        from_source(tmp_path / "run")


def test_a_damaged_projector_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").write_bytes(b"junk")
    model = MODELS["CLIP + llama"] | {"projector": {"from": str(tmp_path / "p.safetensors")}}
    with pytest.raises(ConfigError, match=r"model\.projector\.from: .*cannot be read as tensors"):
        assemble(schema.Model.model_validate(model), seed=0)


@pytest.mark.parametrize("kind", ["run", "export", "mm_projector.bin"])
def test_a_projector_alone(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = saved_model(MODELS["CLIP + llama"])
    run_of(saved, tmp_path / "run")
    projector: Any = saved.assembly.vlm.projector
    if kind == "export":
        file = export(tmp_path / "run", tmp_path / "out").folder / "model.safetensors"
    elif kind == "run":
        file = tmp_path / "run/final/model.safetensors"
    else:
        file = tmp_path / kind
        state = projector.linears.state_dict()
        torch.save({f"model.mm_projector.{name.replace('1.', '2.')}": value for name, value in state.items()}, file)
    model = MODELS["CLIP + llama"] | {"projector": {"from": str(file)}}
    with caplog.at_level(logging.WARNING):
        assembly = assemble(schema.Model.model_validate(model), seed=5)
    assert ("is a pickle" in caplog.text) == (kind == "mm_projector.bin")
    found: Any = assembly.vlm.projector
    assert all(torch.equal(found.state_dict()[name], value) for name, value in projector.state_dict().items())
    assert assembly.sources["projector"]["sha256"].keys() == {file.name}
    assert not [name for name in assembly.fresh if name.startswith("projector.")]


def test_a_projector_of_other_sizes_is_refused(tmp_path: Path) -> None:
    tensors = {"projector.linears.0.weight": torch.zeros(8, 8), "projector.linears.0.bias": torch.zeros(8)}
    save_file(tensors, tmp_path / "p.safetensors")
    model = MODELS["CLIP + llama"] | {"projector": {"from": str(tmp_path / "p.safetensors")}}
    with pytest.raises(ConfigError, match=r"model\.projector\.from.*\[\(8, 8\)\].*needs \[\(32, 32\), \(32, 32\)\]"):
        assemble(schema.Model.model_validate(model), seed=0)


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("boom"),))


def test_code_in_a_pickle_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model.mm_projector.0.weight": Boom()}, tmp_path / "mm_projector.bin")
    model = MODELS["CLIP + llama"] | {"projector": {"from": "mm_projector.bin"}}
    with pytest.raises(ConfigError, match="cannot be read as tensors"):
        assemble(schema.Model.model_validate(model), seed=0)
    assert not (tmp_path / "boom").exists()


def test_a_source_brings_its_own_parts(tmp_path: Path) -> None:
    for model, message in (
        ({"from": "x", "language": "y"}, "`from` brings its own language"),
        ({}, "write `language`"),
        ({"language": "x", "vision": None, "form": "y"}, "did you mean 'from'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({"output": "o", "model": model, "stages": []}, "test")


def test_a_source_without_eyes_cannot_train_them(tmp_path: Path) -> None:
    saved = saved_model(MODELS["text only"])
    run_of(saved, tmp_path / "text")
    with pytest.raises(ConfigError, match="reads only text"):
        api.train(config_for(tmp_path, tmp_path / "text", projector={"lr": 1e-3}))
