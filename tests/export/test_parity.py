"""The law of exports: nothing changes. transformers alone, from the folder alone, says what our modules say."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from mmit import config as schema
from mmit.config import ConfigError
from mmit.data.byte_tokenizer import byte_tokenizer
from mmit.data.sample import ImagePart, TextPart, message
from mmit.export import verify, write
from mmit.export.llava import ExportError
from mmit.export.processor import padding_token, processor, speaking_tokenizer
from mmit.export.verify import Conversation, load_export, processed, rendered
from mmit.export.write import export, merge
from mmit.inference.conversation import Conversation as Asked
from mmit.inference.conversation import picture_of
from mmit.inference.generate import Model, Sampling
from mmit.model.saved import Saved, load_saved
from tests.data.made_tokenizers import byte_level, metaspace, unigram
from tests.export.conversations import conversations
from tests.export.models import LLAMA, MODELS, TOWERS, run_of, saved_model

LORA = schema.Lora(rank=4, alpha=8)
CLIP = MODELS["CLIP + llama"]
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks


@pytest.mark.parametrize("name", MODELS)
def test_ids_pixels_logits_and_greedy_tokens_are_ours(name: str, tmp_path: Path) -> None:
    done = export(run_of(saved_model(MODELS[name]), tmp_path / "run"), tmp_path / "out")
    assert done.parity.largest_difference <= 1e-5
    assert done.parity.greedy_tokens >= 12


@pytest.mark.parametrize("policy", ["crop", "squash"])
def test_the_processor_fits_pictures_as_the_run_did(policy: Any, tmp_path: Path) -> None:
    done = export(run_of(saved_model(CLIP, pictures=policy), tmp_path / "run"), tmp_path / "out")
    assert done.parity.pictures == 6


@pytest.mark.parametrize("tower", ["siglip", "open_clip"])
def test_a_tower_read_at_its_last_block_or_in_its_middle(tower: str, tmp_path: Path) -> None:
    for layer in (-1, 1):
        model = {"language": {"random": LLAMA}, "vision": TOWERS[tower] | {"layer": layer}}
        done = export(run_of(saved_model(model), tmp_path / f"run{layer}"), tmp_path / f"out{layer}")
        assert done.parity.largest_difference <= 1e-5


@PEFT
@pytest.mark.parametrize("name", ["CLIP + llama", "text only"])
def test_a_lora_is_merged_or_kept_and_both_say_what_was_trained(name: str, tmp_path: Path) -> None:
    run = run_of(saved_model(MODELS[name], lora=LORA), tmp_path / "run")
    export(run, tmp_path / "merged")
    export(run, tmp_path / "kept", adapter=True)
    assert not (tmp_path / "merged" / "adapter").exists()
    multimodal = name != "text only"
    conversation = verify.probes(load_saved(run))[-1]
    logits = []
    for folder, adapter in (("merged", None), ("kept", tmp_path / "kept/adapter"), ("kept", None)):
        model, speaker = load_export(tmp_path / folder, multimodal=multimodal, adapter=adapter)
        logits.append(verify.said_by_export(model, speaker, conversation).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)  # the adapter does something


@PEFT
@pytest.mark.parametrize(("targets", "table"), [(["q_proj", "lm_head"], "head"), (["embed_tokens"], "embeddings")])
def test_a_lora_on_the_vocabulary_can_only_be_merged(targets: list[str], table: str, tmp_path: Path) -> None:
    lora = schema.Lora(rank=2, alpha=4, targets=targets)
    run = run_of(saved_model(CLIP, lora=lora), tmp_path / "run")
    with pytest.raises(ExportError, match=f"--adapter: the LoRA adapts the {table}"):
        export(run, tmp_path / "out", adapter=True)
    export(run, tmp_path / "out")


@PEFT
def test_merge_writes_a_run_without_an_adapter_that_says_the_same(tmp_path: Path) -> None:
    run = run_of(saved_model(CLIP, lora=LORA), tmp_path / "run")
    done = merge(run, tmp_path / "merged")
    assert done.parity.largest_difference <= 1e-5
    again = load_saved(tmp_path / "merged")
    assert again.assembly.adapter is None
    assert not [name for name, _ in again.assembly.vlm.named_parameters() if "lora" in name]
    with pytest.raises(ConfigError, match="trained no LoRA"):
        merge(tmp_path / "merged", tmp_path / "twice")


@pytest.mark.parametrize("kind", ["run", "mmit"])
def test_a_run_and_its_folder_of_mmit_can_be_told_where_their_base_lies_now(kind: str, tmp_path: Path) -> None:
    export(run_of(saved_model(MODELS["text only"]), tmp_path / "random"), tmp_path / "there")
    model = {"language": str(tmp_path / "there"), "vision": TOWERS["clip"]}
    run = run_of(saved := saved_model(model), tmp_path / "run")
    if kind == "mmit":
        card = (export(run, tmp_path / "out", format="mmit").folder / "README.md").read_text()
        (known,) = saved.assembly.sources["language"]["sha256"].values()
        assert f"| language | `there` | model.safetensors {known[:16]} |" in card
    folder = run / "final" if kind == "run" else tmp_path / "out"
    conversation = verify.probes(saved)[0]
    before = verify.said(load_saved(folder), conversation)
    (tmp_path / "there").rename(tmp_path / "here")
    with pytest.raises(
        ConfigError, match=r"holds what was trained.*model\.language: .*/there.*`model` of .*model\.json"
    ):
        load_saved(folder)
    file = folder / "model.json"
    record = json.loads(file.read_text())
    record["model"]["language"] = str(tmp_path / "here")
    file.write_text(json.dumps(record))
    assert torch.equal(verify.said(load_saved(folder), conversation).logits, before.logits)


def test_with_fewer_bits_the_rounded_model_is_what_the_export_equals(tmp_path: Path) -> None:
    done = export(run_of(saved_model(CLIP), tmp_path / "run"), tmp_path / "out", dtype="bfloat16")
    assert done.parity.largest_difference <= 1e-5
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": byte_tokenizer,
    "byte-level BPE": byte_level,
    "BPE, space always": lambda: metaspace("always"),
    "BPE, space first": lambda: metaspace("first"),
    "BPE, space never": lambda: metaspace("never"),
    "BPE, space prepended": lambda: metaspace("prepend"),
    "unigram": lambda: unigram("always"),
}
SPOKEN = {name: ["vicuna_v1", "chatml"] if "byte" in name else ["vicuna_v1", "llava_llama_2"] for name in TOKENIZERS}


@pytest.mark.parametrize(("tokenizer", "chat"), [(name, chat) for name, chats in SPOKEN.items() for chat in chats])
@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.soak)])
def test_the_exported_processor_gives_our_ids_with_histories(
    tokenizer: str, chat: str, count: int, tmp_path: Path
) -> None:
    TOKENIZERS[tokenizer]().save_pretrained(tmp_path / "tokenizer")
    language = {"random": LLAMA, "tokenizer": str(tmp_path / "tokenizer")}
    saved = saved_model(CLIP | {"language": language}, chat=chat)
    processor(saved).save_pretrained(tmp_path / "out")
    speaker = AutoProcessor.from_pretrained(tmp_path / "out")
    for conversation in conversations(count):
        ours, _ = rendered(saved, conversation)
        assert processed(speaker, conversation)["input_ids"][0].tolist() == ours.tolist()


@pytest.mark.parametrize("edges", ["\n{}", "\n\n{}", "{}\n", "{}\n\n", " {} ", "\t{}\t"])
def test_whitespace_at_the_edges_of_texts_gives_our_ids_too(edges: str, tmp_path: Path) -> None:
    """But before an earlier answer: whole strings join it to the marker's line break, where the prompt must end."""
    byte_level().save_pretrained(tmp_path)
    saved = saved_model({"language": {"random": LLAMA, "tokenizer": str(tmp_path)}}, chat="chatml")
    speaker = speaking_tokenizer(saved)
    edged = edges.format("what is")
    messages = [message("system", edged), message("user", edged), message("assistant", edged.lstrip())]
    conversation = Conversation((*messages, message("user", edged)))
    ours, _ = rendered(saved, conversation)
    assert processed(speaker, conversation)["input_ids"][0].tolist() == ours.tolist()


def test_a_template_without_bos_is_kept_for_a_tokenizer_that_would_add_one(tmp_path: Path) -> None:
    """As of TinyLlama: the processors of transformers put bos in front of whatever does not begin with it."""
    tokenizer = metaspace("always")
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        chat_template="{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    language = {"random": LLAMA, "tokenizer": str(tmp_path / "tokenizer")}
    saved = saved_model(CLIP | {"language": language})
    export(run_of(saved, tmp_path / "run"), tmp_path / "out")
    speaker = AutoProcessor.from_pretrained(tmp_path / "out")
    for conversation in conversations(20):
        ours, _ = rendered(saved, conversation)
        assert ours[0] != tokenizer.bos_token_id
        assert processed(speaker, conversation)["input_ids"][0].tolist() == ours.tolist()


def both(*modules: str) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def below(prefix: str, names: set[str]) -> set[str]:
    return {prefix + name for name in names}


def blocks(prefix: str, count: int, names: set[str]) -> set[str]:
    return {f"{prefix}.{number}.{name}" for number in range(count) for name in names}


PROJECTOR = below("multi_modal_projector.", both("linear_1", "linear_2"))
ATTENTION = {f"self_attn.{letter}_proj.weight" for letter in "qkvo"}
LLAMA_BLOCK = ATTENTION | {
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}
QWEN2_BLOCK = LLAMA_BLOCK | {f"self_attn.{letter}_proj.bias" for letter in "qkv"}
AROUND = {"model.embed_tokens.weight", "model.norm.weight"}
LLAMA_NAMES = AROUND | blocks("model.layers", 2, LLAMA_BLOCK)
HEAD = {"lm_head.weight"}
CLIP_BLOCK = both(
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
)
CLIP_AROUND = {
    *("embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"),
    *both("pre_layrnorm", "post_layernorm"),
}
SIGLIP = {
    *both("embeddings.patch_embedding", "post_layernorm", "head.layernorm", "head.mlp.fc1", "head.mlp.fc2"),
    *("embeddings.position_embedding.weight", "head.probe"),
    *("head.attention.in_proj_weight", "head.attention.in_proj_bias", *both("head.attention.out_proj")),
    *blocks("encoder.layers", 3, CLIP_BLOCK),
}
DINOV2_BLOCK = {
    *both("norm1", "norm2", "mlp.fc1", "mlp.fc2", "attention.output.dense"),
    *both(*(f"attention.attention.{name}" for name in ("query", "key", "value"))),
    *("layer_scale1.lambda1", "layer_scale2.lambda1"),
}
DINOV2 = {
    *(f"embeddings.{name}" for name in ("cls_token", "mask_token", "position_embeddings")),
    *both("embeddings.patch_embeddings.projection", "layernorm"),
    *blocks("encoder.layer", 3, DINOV2_BLOCK),  # transformers 5.0 to 5.10 draw at random what is named otherwise
}
NAMES = {
    "CLIP + llama": PROJECTOR
    | below("vision_tower.vision_model.", CLIP_AROUND | blocks("encoder.layers", 3, CLIP_BLOCK))
    | below("language_model.", LLAMA_NAMES | HEAD),
    "SigLIP + qwen2, tied": PROJECTOR
    | below("vision_tower.vision_model.", SIGLIP)
    | below("language_model.", AROUND | blocks("model.layers", 2, QWEN2_BLOCK)),
    "open_clip ViT + llama, tied": PROJECTOR
    | below("vision_tower.vision_model.", CLIP_AROUND | blocks("encoder.layers", 4, CLIP_BLOCK))
    | below("language_model.", LLAMA_NAMES),
    "DINOv2 + llama": PROJECTOR | below("vision_tower.", DINOV2) | below("language_model.", LLAMA_NAMES | HEAD),
    "text only": LLAMA_NAMES | HEAD,
}
"""As the files of llava-hf, of the LLMs and of the towers on the Hub are named."""


@pytest.mark.parametrize("name", MODELS)
def test_the_names_of_the_exported_tensors_are_those_that_others_read(name: str, tmp_path: Path) -> None:
    export(run_of(saved_model(MODELS[name]), tmp_path / "run"), tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert set(file.keys()) == NAMES[name]


@PEFT
def test_the_names_of_a_kept_adapter_are_those_of_peft_around_llava(tmp_path: Path) -> None:
    export(run_of(saved_model(CLIP, lora=LORA), tmp_path / "run"), tmp_path / "out", adapter=True)
    with safe_open(tmp_path / "out/adapter/adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    adapted = {name.removesuffix(".weight") for name in LLAMA_BLOCK if "_proj" in name}
    matrices = {f"{name}.lora_{letter}.weight" for name in adapted for letter in "AB"}
    assert names == blocks("base_model.model.model.language_model.layers", 2, matrices)
    with safe_open(tmp_path / "out/model.safetensors", framework="pt") as file:
        assert set(file.keys()) == NAMES["CLIP + llama"]


def test_a_block_above_the_last_passes_its_input_on(tmp_path: Path) -> None:
    """Nothing reads it, but a program that reads one block too far would then see the same."""
    saved = saved_model({"language": {"random": LLAMA}, "vision": TOWERS["dinov2"] | {"layer": -1}})
    export(run_of(saved, tmp_path / "run"), tmp_path / "out")
    model: Any = load_export(tmp_path / "out", multimodal=True)[0]
    with torch.no_grad():
        states = model.model.vision_tower(torch.randn(1, 3, 28, 28), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-1], states[-2])


WITHOUT_MMIT = """
    import json
    import sys
    from pathlib import Path

    class Forbidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("mmit", "data_tools", "open_clip"):
                raise ImportError(name)

    sys.meta_path.insert(0, Forbidden())
    import torch
    from peft import PeftModel
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    def opened(content, folder):
        if isinstance(content, str):  # processors of transformers 5.0 read lists alone
            return [{"type": "text", "text": content}] if sees else content
        return [part | {"image": Image.open(folder / part["image"])} if "image" in part else part for part in content]

    for folder in sorted(Path(sys.argv[1]).iterdir()):
        asked = json.loads((folder / "asked.json").read_text())
        logits = load_file(folder / "logits.safetensors")
        sees = (folder / "out/processor_config.json").exists()
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = kind.from_pretrained(folder / "out", dtype=torch.float32)
        if (folder / "out/adapter").exists():
            model = PeftModel.from_pretrained(model, folder / "out/adapter")
        speaker = (AutoProcessor if sees else AutoTokenizer).from_pretrained(folder / "out")
        gap = 0.0
        for number, item in enumerate(asked):
            inputs = speaker.apply_chat_template(
                [{"role": role, "content": opened(content, folder)} for role, content in item["messages"]],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )
            ids = inputs["input_ids"][0].tolist()
            assert ids == item["ids"], (folder.name, number, ids, item["ids"])
            ours = logits[str(number)]
            with torch.no_grad():
                theirs = model(**inputs, logits_to_keep=len(ours)).logits[0]
            gap = max(gap, float((ours - theirs).abs().max()))
            answer = model.generate(**inputs, max_new_tokens=12)[0, len(ids):].tolist()
            assert answer == item["answer"], (folder.name, number, answer, item["answer"])
        assert gap <= 1e-5, (folder.name, gap)
        print(folder.name, len(asked))
"""
KINDS = {name: (model, None, False) for name, model in MODELS.items()} | {
    "LoRA merged": (CLIP, LORA, False),
    "LoRA kept": (CLIP, LORA, True),
}


def write_figures(saved: Saved, folder: Path) -> int:
    """What the model says to conversations, in files that ask for no code of ours; returns how many there are."""
    asked, logits = [], {}
    for number, conversation in enumerate(verify.probes(saved)):
        for place, picture in enumerate(conversation.pictures):
            (folder / f"{number}-{place}.png").write_bytes(picture)
        messages = []
        for item in conversation.messages:
            parts = [
                {"type": "image", "image": f"{number}-{part.image}.png"}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": cast(TextPart, part).text}
                for part in item.parts
            ]
            messages.append((item.role, parts if any("image" in part for part in parts) else item.text))
        ours = verify.said(saved, conversation)
        asked.append({"messages": messages, "ids": ours.ids, "answer": ours.answer})
        logits[str(number)] = ours.logits.contiguous()
    (folder / "asked.json").write_text(json.dumps(asked))
    save_file(logits, folder / "logits.safetensors")
    return len(asked)


@PEFT
def test_ids_logits_and_greedy_tokens_are_ours_where_mmit_cannot_be_imported(tmp_path: Path) -> None:
    expected = []
    for name, (model, lora, adapter) in sorted(KINDS.items()):
        run, folder = tmp_path / f"run of {name}", tmp_path / "kinds" / name
        folder.mkdir(parents=True)
        run_of(saved_model(model, lora=lora), run)
        export(run, folder / "out", adapter=adapter)
        expected.append(f"{name} {write_figures(load_saved(run), folder)}")
        shutil.rmtree(run)
    command = [sys.executable, "-I", "-c", textwrap.dedent(WITHOUT_MMIT), str(tmp_path / "kinds")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]


GEMMA2 = LLAMA | {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0}
REGISTERS = TOWERS["dinov2"]["random"] | {"model_type": "dinov2_with_registers", "num_register_tokens": 2}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (CLIP | {"projector": {"kind": "linear"}}, "LinearProjector of depth 1 is not linear, GELU, linear"),
        (CLIP | {"projector": {"depth": 3}}, "MlpProjector of depth 3"),
        (CLIP | {"language": {"random": GEMMA2}}, "Gemma2ForCausalLM caps or scales its logits"),
        (CLIP | {"vision": {"library": "transformers", "random": REGISTERS}}, "registers"),
        (CLIP | {"vision": TOWERS["clip"] | {"select": "cls"}}, "select: cls"),
    ],
)
def test_what_has_no_twin_is_refused_with_what_has_one(model: dict[str, Any], reason: str, tmp_path: Path) -> None:
    run = run_of(saved_model(model), tmp_path / "run")
    with pytest.raises(ExportError, match=reason) as caught:
        export(run, tmp_path / "out")
    assert "What Llava holds: CLIP, SigLIP" in str(caught.value)
    assert "--format mmit" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert export(run, tmp_path / "out", format="mmit").parity.largest_difference == 0


def answers_of(saved: Saved, conversations: list[Conversation], folder: Path) -> verify.Answers:
    """By the way that `mmit generate` and the demo ask, three at a time."""
    model = Model(saved, run=folder, cache=folder, device=torch.device("cpu"), dtype=torch.float32)
    asked = [Asked(item.messages, tuple(picture_of(data, "test") for data in item.pictures)) for item in conversations]
    batches = [asked[place : place + 3] for place in range(0, len(asked), 3)]
    tokens = [ids for batch in batches for ids in model.generate(batch, Sampling(max_new_tokens=6))]
    return verify.Answers(conversations, tokens, batch_size=3, max_new_tokens=6)


@pytest.mark.parametrize("name", MODELS)
def test_questions_answered_in_batches_get_the_same_tokens(name: str, tmp_path: Path) -> None:
    saved = saved_model(MODELS[name])
    run_of(saved, tmp_path / "run")
    asked = [item for item in conversations(12) if saved.fit is not None or not item.pictures]
    answers = answers_of(saved, asked, tmp_path)
    done = export(tmp_path / "run", tmp_path / "out", answers=answers)
    assert done.parity.answers == len(asked)
    assert f"{len(asked)} questions asked again in batches: every token equal" in done.parity.sentence()


PADLESS: dict[str, tuple[str, str, Callable[[], PreTrainedTokenizerFast]]] = {
    "reserved": ("chatml", "<|reserved_special_token_0|>", lambda: with_tokens("<|reserved_special_token_0|>")),
    "named so": ("chatml", "<|finetune_right_pad_id|>", lambda: with_tokens("<unused0>", "<|finetune_right_pad_id|>")),
    "unknown, as of Llama 2": ("vicuna_v1", "<unk>", lambda: metaspace("always")),
    "none to spare": ("chatml", "<|im_end|>", byte_level),
}


def with_tokens(*names: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)}, replace_extra_special_tokens=False)
    return tokenizer


@PEFT
@pytest.mark.parametrize("kind", ["text only", "pictures", "LoRA kept"])
@pytest.mark.parametrize("name", PADLESS)
def test_a_stranger_s_batch_is_answered_as_one_by_one_without_a_pad_token_in_the_base(
    name: str, kind: str, tmp_path: Path
) -> None:
    chat, token, tokenizer = PADLESS[name]
    tokenizer().save_pretrained(tmp_path / "base")
    language = {"random": LLAMA, "tokenizer": str(tmp_path / "base")}
    model = {"language": language} | ({"vision": TOWERS["clip"]} if kind == "pictures" else {})
    saved = saved_model(model, chat=chat, lora=LORA if kind == "LoRA kept" else None)
    assert saved.assembly.tokenizer.pad_token is None
    rows = len(cast(Any, saved.assembly.vlm.language.get_input_embeddings()).weight)
    export(run_of(saved, tmp_path / "run"), tmp_path / "out", adapter=kind == "LoRA kept")
    place = tmp_path / "out/adapter" if kind == "LoRA kept" else None
    twin, speaker = load_export(tmp_path / "out", multimodal=kind == "pictures", adapter=place)
    own = speaker.tokenizer if kind == "pictures" else speaker
    assert own.pad_token == token
    assert own.pad_token_id == cast(Any, twin).generation_config.pad_token_id < rows
    assert (own.pad_token_id in saved.chat.stop_ids) == (name == "none to spare")
    assert ("no token to spare" in (tmp_path / "out/README.md").read_text()) == (name == "none to spare")

    asked = verify.probes(saved)
    inputs = verify.processed_batch(speaker, asked)
    assert (inputs["attention_mask"] == 0).any()
    answers = cast(Any, twin).generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :].tolist()
    for answer, conversation in zip(answers, asked, strict=True):
        alone = verify.said_by_export(twin, speaker, conversation).answer[:8]
        assert answer[: len(alone)] == alone
        assert set(answer[len(alone) :]) <= {own.pad_token_id}


def test_a_pad_token_that_ends_answers_gives_way_to_another(tmp_path: Path) -> None:
    """As of SmolLM2: who masks padding by id would mask every end of an answer."""
    tokenizer = with_tokens("<|reserved_special_token_0|>")
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "base")
    saved = saved_model({"language": {"random": LLAMA, "tokenizer": str(tmp_path / "base")}}, chat="chatml")
    assert padding_token(saved) == "<|reserved_special_token_0|>"
    run = run_of(saved, tmp_path / "run")
    export(run, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<|reserved_special_token_0|>"


def test_the_pad_token_of_a_tokenizer_stays(tmp_path: Path) -> None:
    assert padding_token(saved_model(CLIP)) == "<pad>"


@pytest.mark.parametrize("what", ["one token", "one left out", "one too many"])
def test_an_export_that_answers_one_question_otherwise_is_not_kept(what: str, tmp_path: Path) -> None:
    saved = saved_model(CLIP)
    run_of(saved, tmp_path / "run")
    answers = answers_of(saved, conversations(5), tmp_path)
    last = list(answers.tokens[4])
    changed = {"one token": [*last[:-1], last[-1] ^ 1], "one left out": last[:-1], "one too many": [*last, last[-1]]}
    answers = replace(answers, tokens=[*answers.tokens[:4], changed[what]])
    with pytest.raises(ExportError, match="question 4: greedy tokens differ"):
        export(tmp_path / "run", tmp_path / "out", answers=answers)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_an_export_that_came_out_different_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(saved_model(CLIP), tmp_path / "run")
    whole = write.llava_model

    def damaged(*arguments: Any, **named: Any) -> Any:
        model = whole(*arguments, **named)
        model.config.vision_feature_layer = -1
        return model

    monkeypatch.setattr(write, "llava_model", damaged)
    with pytest.raises(ExportError, match=r"probe conversation 0: logits differ by"):
        export(run, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("what", ["one value of a weight", "one letter of the template", "the mean", "the stop id"])
@pytest.mark.parametrize("name", ["CLIP + llama", "text only"])
def test_whatever_is_altered_on_disk_is_noticed(
    name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verification trusts nothing that is in memory: here the files themselves are altered before it reads them."""
    if name == "text only" and what == "the mean":
        pytest.skip("no pictures")
    run = run_of(saved_model(MODELS[name]), tmp_path / "run")
    reads = write.load_export

    def altered(folder: Path, **arguments: Any) -> Any:
        if what == "one value of a weight":
            tensors = load_file(folder / "model.safetensors")
            (table,) = (value for key, value in tensors.items() if key.endswith("embed_tokens.weight"))
            table[7, 3] += 1e-6  # of a token that no probe holds
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        elif what == "one letter of the template":
            file = folder / "chat_template.jinja"
            file.write_text(file.read_text().replace("|>user", "|>User"))
        elif what == "the mean":
            for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
                file.write_text(file.read_text().replace("0.4814", "0.4815"))
        else:
            said_first = verify.said(load_saved(run), verify.probes(load_saved(run))[0]).answer
            file = folder / "generation_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [said_first[0]]}))
        return reads(folder, **arguments)

    monkeypatch.setattr(write, "load_export", altered)
    with pytest.raises(ExportError):
        export(run, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_big_models_come_in_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "SHARD", "50KB")
    for name in ("CLIP + llama", "text only"):
        export(run_of(saved_model(MODELS[name]), tmp_path / name), tmp_path / f"{name} out")
        index = json.loads((tmp_path / f"{name} out/model.safetensors.index.json").read_text())
        files = {file.name for file in (tmp_path / f"{name} out").glob("*.safetensors")}
        assert len(files) > 1
        assert set(index["weight_map"].values()) == files


def test_the_folder_one_stands_in_can_be_the_one_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(saved_model(MODELS["text only"]), tmp_path / "run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export(run, Path(".")).folder == tmp_path / "here"
    assert (tmp_path / "here/config.json").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


def test_the_template_of_the_export_marks_what_was_learned(tmp_path: Path) -> None:
    saved = saved_model(CLIP)
    export(run_of(saved, tmp_path / "run"), tmp_path / "out")
    _, speaker = load_export(tmp_path / "out", multimodal=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    found = speaker.tokenizer.apply_chat_template(
        messages, chat_template=speaker.chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    from mmit.data.sample import Sample

    ours = saved.chat.render(Sample("k", "s", (message("user", "Hi"), message("assistant", "Hello."))), [])
    assert found["input_ids"] == ours.ids.tolist()
    assert found["assistant_masks"] == (ours.labels != -100).astype(int).tolist()


def test_one_picture_more_than_the_processor_is_given_is_named(tmp_path: Path) -> None:
    """The processor must count as we do: a conversation of ours with its pictures is one of its own."""
    saved = saved_model(CLIP)
    export(run_of(saved, tmp_path / "run"), tmp_path / "out")
    _, speaker = load_export(tmp_path / "out", multimodal=True)
    conversation = next(item for item in conversations(20) if len(item.pictures) > 1)
    inputs = processed(speaker, conversation)
    shown = int((inputs["input_ids"] == saved.assembly.placeholder).sum())
    assert shown == len(conversation.pictures) * saved.image_tokens == len(inputs["pixel_values"]) * 16
    assert isinstance(conversation, Conversation)
