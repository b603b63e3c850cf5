"""Laws of pretrained files: every parameter comes from them or the load is refused, in one sentence with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mmit.config import ConfigError, Model, Vision
from mmit.data.byte_tokenizer import byte_tokenizer
from mmit.model.build import Assembly, assemble, pinned
from mmit.model.pretrained import check_it_survives, load_tokenizer, random_config
from mmit.model.vision import build_vision
from tests.data.made_tokenizers import metaspace

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURES = {"image_size": 28, "patch_size": 14}


def language(folder: Path, **tokens: Any) -> Path:
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=260)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(tokens.get("added", []))
    tokenizer.save_pretrained(folder)
    return folder


def assembled(folder: Path, **more: Any) -> Assembly:
    return assemble(Model.model_validate({"language": str(folder), **more}), seed=0)


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def configured(**keys: Any) -> Callable[..., None]:
    def change(folder: Path, name: str = "config.json") -> None:
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(tree | keys))

    return change


def cut(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            without("model.layers.1.mlp.up_proj.weight"),
            r"lacks 1 parameters .*\(model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (without("lm_head.weight"), r"lacks 1 parameters of LlamaForCausalLM \(lm_head\.weight\)"),
        (configured(vocab_size=300), r"lacks 2 .*\(260, 32\) in the file and \(300, 32\) by config\.json"),
        (cut, "SafetensorError: Error while deserializing header"),
        (configured(quantization_config={"quant_method": "gptq"}), r"quantized weights \(gptq\); name the model they"),
        (configured(model_type="nosuch"), "nosuch"),
    ],
    ids=["a tensor is missing", "the head is missing", "other sizes", "cut", "quantized", "unknown"],
)
def test_a_language_model_that_is_not_whole_is_refused(
    change: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    change(language(tmp_path / "language"))
    with pytest.raises(ConfigError, match=rf"^model\.language: .*{told}"):
        assembled(tmp_path / "language")


def test_an_encoder_is_no_causal_language_model(tmp_path: Path) -> None:
    BertModel(BertConfig(**SIZES, vocab_size=260)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks \d+ parameters of BertLMHeadModel"):
        assembled(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("beside_a_config", [False, True])
def test_an_adapter_is_no_model(beside_a_config: bool, tmp_path: Path) -> None:
    """transformers would load the base and leave the adapter beside it, unmerged."""
    base: Any = LlamaForCausalLM.from_pretrained(language(tmp_path / "base"))
    adapter = get_peft_model(
        base, LoraConfig(target_modules=["q_proj"], base_model_name_or_path=str(tmp_path / "base"))
    )
    language(tmp_path / "adapter")
    adapter.save_pretrained(str(tmp_path / "adapter"))
    if not beside_a_config:
        (tmp_path / "adapter/config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter of peft.*merge"):
        assembled(tmp_path / "adapter")


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.language: .*nowhere: no such folder"):
        assembled(tmp_path / "nowhere")


def test_code_that_comes_with_a_model_neither_runs_nor_asks_to(tmp_path: Path) -> None:
    language(tmp_path)
    configured(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'boom')!r}, 'w')")
    with pytest.raises(ConfigError, match="contains custom code"):
        assembled(tmp_path)
    assert not (tmp_path / "boom").exists()


# Tokens and rows ----------------------------------------------------------------------------


def test_a_token_beyond_the_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 tokens \(<turn>\) beyond the 260 rows .*model\.add_tokens"):
        assembled(language(tmp_path, added=["<turn>"]))


def test_a_picture_token_beyond_the_rows_gets_the_mean_of_them(tmp_path: Path) -> None:
    """As the tokenizer of Gemma 3 1B has one: its embeddings end before it."""
    language(tmp_path)
    described = (tmp_path / "tokenizer.json").read_text().replace('"<image>"', '"<filler>"')
    (tmp_path / "tokenizer.json").write_text(described)
    settings = (tmp_path / "tokenizer_config.json").read_text().replace('"<image>"', '"<filler>"')
    (tmp_path / "tokenizer_config.json").write_text(settings)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(tmp_path)
    assert assembled(tmp_path).vlm.language.config.vocab_size == 260, "text never holds it"
    random = {"model_type": "clip_vision_model", **TOWER, **PICTURES}
    assembly = assembled(tmp_path, vision={"library": "transformers", "random": random})
    assert assembly.placeholder == 260
    rows: Any = assembly.vlm.language.get_input_embeddings()
    torch.testing.assert_close(rows.weight[260], rows.weight[:260].mean(0))
    assert "language.model.embed_tokens.weight" in assembly.fresh


@pytest.mark.parametrize("token", ["", "  "])
def test_an_added_token_that_is_only_whitespace_is_refused(token: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.add_tokens"):
        assembled(language(tmp_path), add_tokens=[token])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of sentencepiece's own bindings
def test_a_tokenizer_of_sentencepiece_alone_is_read(tmp_path: Path) -> None:
    """As Vicuna's, which the recipes of LLaVA-1.5 name: there is no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = iter([f"the quick brown fox jumps over the lazy dog, number {number}" for number in range(300)])
    settings = {"vocab_size": 310, "model_type": "bpe", "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}  # as Llama's
    language(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=310)).save_pretrained(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_prefix=str(tmp_path / "tokenizer"), minloglevel=2, **settings
    )
    record = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(record))
    found = assembled(tmp_path).tokenizer
    direct = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("the lazy fox", "é  two spaces", "number 7"):
        assert found(text, add_special_tokens=False).input_ids == direct.encode(text)


# Towers ----------------------------------------------------------------------------


def tower(folder: Path) -> Path:
    CLIPVisionModel(CLIPVisionConfig(**TOWER, **PICTURES)).save_pretrained(folder)
    square = {"height": 28, "width": 28}
    record = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": square}
    (folder / "preprocessor_config.json").write_text(json.dumps(record | {"do_center_crop": True}))
    return folder


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def processor(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (no_weights, "no file named model.safetensors"),
        (cut, "SafetensorError"),
        (configured(model_type="nosuch"), "nosuch"),
        (configured(intermediate_size=30), r"fc1\.bias, \(24,\) in the file and \(30,\) by config\.json"),
        (processor("{"), "not a valid JSON"),
        (processor('{"size": {"height": 28, "width": 56}}'), "pictures of 28 x 56; only squares"),
    ],
    ids=["no weights", "cut", "unknown", "other sizes", "damaged processor", "not square"],
)
def test_a_tower_that_is_not_whole_is_refused(change: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    change(tower(tmp_path))
    with pytest.raises(ConfigError, match=rf"^model\.vision\.name: .*{told}"):
        build_vision(Vision(library="transformers", name=str(tmp_path), layer=-1))


def test_its_own_side_may_be_written_out_though_the_patch_does_not_divide_it() -> None:
    """384 pixels in patches of 14, as SigLIP's."""
    random = {"model_type": "siglip_vision_model", **TOWER, "image_size": 50, "patch_size": 14}
    assert build_vision(Vision(library="transformers", random=random, side=50)).tokens == 9


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_damaged_weights_of_open_clip_are_named(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"junk")
    with pytest.raises(ConfigError, match=rf"^model\.vision\.pretrained: .*{file} cannot be read"):
        build_vision(Vision(library="open_clip", name="ViT-B-32", pretrained=str(tmp_path / file)))


@pytest.mark.parametrize(
    "spec",
    [
        {"library": "open_clip", "random": {"timm_model_name": "nosuch"}},
        {"library": "transformers", "random": {"model_type": "clip_vision_model", **TOWER, "hidden_size": 15}},
    ],
)
def test_random_sizes_that_do_not_fit_together_are_named(spec: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^model\.vision\.random: "):
        build_vision(Vision.model_validate(spec))


def on_the_hub(root: Path, name: str, revisions: dict[str, Path]) -> None:
    """What huggingface_hub caches of a repository, whose `main` is the last of the revisions."""
    cached = root / f"models--{name.replace('/', '--')}"
    for revision, folder in revisions.items():
        (cached / "snapshots" / revision).parent.mkdir(parents=True, exist_ok=True)
        folder.rename(cached / "snapshots" / revision)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(revision)


def test_a_run_keeps_the_revision_of_the_hub_that_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for part in ("old", "new"):
        language(tmp_path / f"{part}-language")
        CLIPVisionModel(CLIPVisionConfig(**TOWER, **PICTURES)).save_pretrained(tmp_path / f"{part}-tower")
    on_the_hub(tmp_path / "hub", "some/llm", {"a" * 40: tmp_path / "old-language"})
    on_the_hub(tmp_path / "hub", "some/tower", {"a" * 40: tmp_path / "old-tower"})
    model = Model.model_validate(
        {"language": "some/llm", "vision": {"library": "transformers", "name": "some/tower"}, "projector": {}}
    )
    before = assemble(model, seed=0)
    on_the_hub(tmp_path / "hub", "some/llm", {"b" * 40: tmp_path / "new-language"})
    on_the_hub(tmp_path / "hub", "some/tower", {"b" * 40: tmp_path / "new-tower"})
    again = assemble(pinned(model, before.sources), seed=0)
    moved = assemble(model, seed=0)
    assert again.sources == before.sources
    assert before.sources["language"]["revision"] == before.sources["vision"]["revision"] == "a" * 40
    assert moved.sources["language"]["revision"] == moved.sources["vision"]["revision"] == "b" * 40
    for part in ("language", "vision"):
        tensors = [assembly.parts()[part].state_dict() for assembly in (before, again, moved)]
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        assert not all(torch.equal(tensors[0][name], tensors[2][name]) for name in tensors[0])


@pytest.mark.parametrize(
    ("model_type", "sizes", "told"),
    [
        ("llama", {"hiden_size": 16}, "x.hiden_size: llama has no such size; did you mean 'hidden_size'"),
        ("clip_vision_model", {"num_hiden_layers": 2}, "x.num_hiden_layers: .* did you mean 'num_hidden_layers'"),
        ("lama", {}, "x.model_type: found 'lama'; did you mean 'llama'"),
        (None, {}, "x.model_type: found None; known: llama, "),
        ("llama", {"hidden_size": 10, "num_attention_heads": 3}, r"x: Class validation error .* not a multiple"),
    ],
)
def test_a_mistyped_size_of_a_random_model_is_refused(model_type: Any, sizes: dict[str, int], told: str) -> None:
    """A mistyped hidden_size made a model of 7 billion parameters, which ended the process."""
    with pytest.raises(ConfigError, match=told):
        random_config(model_type, sizes, "x")


def test_sizes_by_the_names_that_transformers_shares_and_had_before_are_known() -> None:
    made = random_config("gpt2", {"hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 3}, "x")
    assert (made.hidden_size, made.num_attention_heads) == (16, 2)
    rotary = random_config("llama", {"rope_theta": 500.0}, "x").to_dict()
    assert 500.0 in (rotary.get("rope_theta"), (rotary.get("rope_parameters") or {}).get("rope_theta"))


# Tokenizers ----------------------------------------------------------------------------


def like_llama(folder: Path, **settings: Any) -> Path:
    """A tokenizer of transformers' own class, which it builds from settings and not from tokenizer.json."""
    metaspace("prepend").save_pretrained(folder)
    configured(tokenizer_class="LlamaTokenizer", **settings)(folder, "tokenizer_config.json")
    return folder


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_of_llama_2_is_the_same_once_saved(legacy: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(like_llama(tmp_path / "base", legacy=legacy)))
    check_it_survives(tokenizer)
    tokenizer.save_pretrained(tmp_path / "run")
    load_tokenizer(str(tmp_path / "run")).save_pretrained(tmp_path / "export")
    again = AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in ("<s>hi</s>there", "hi there"):
        assert again(text).input_ids == tokenizer(text).input_ids


def test_a_tokenizer_that_transformers_alters_while_saving_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(like_llama(tmp_path / "base", legacy=True)))
    del tokenizer.init_kwargs["legacy"]
    with pytest.raises(ConfigError, match="makes another tokenizer of the saved LlamaTokenizer"):
        check_it_survives(tokenizer)
    like_llama(tmp_path / "base")
    configured(tokenizer_class="PreTrainedTokenizerFast")(tmp_path / "base", "tokenizer_config.json")
    check_it_survives(load_tokenizer(str(tmp_path / "base")))
