"""GGUF: read back by transformers and by the gguf package; by llama.cpp itself as a soak test."""

from __future__ import annotations

import io
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_size_t, c_uint8
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers.utils.logging
from jinja2 import Environment
from packaging.version import Version
from PIL import Image
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmit.data.fit import normalise
from mmit.data.images import decode
from mmit.data.sample import Part, TextPart, message
from mmit.export.gguf import LLAMA_3, QWEN2, finish
from mmit.export.llava import ExportError
from mmit.export.processor import speaking_tokenizer
from mmit.export.verify import Conversation, probes, rendered, said
from mmit.export.write import export
from mmit.model.saved import Saved
from tests.data.made_tokenizers import CORPUS, byte_level, metaspace
from tests.export.models import LLAMA, MODELS, TOWERS, run_of, saved_model

gguf = pytest.importorskip("gguf")

# Blocks of llama.cpp hold 32 values, heads at least 8.
WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 96}
TEXT: dict[str, dict[str, Any]] = {
    "llama": {"language": {"random": WIDE}},
    "llama, tied": {"language": {"random": WIDE | {"tie_word_embeddings": True}}},
    "qwen2": {"language": {"random": WIDE | {"model_type": "qwen2"}}},
    "qwen2, tied": {"language": {"random": WIDE | {"model_type": "qwen2", "tie_word_embeddings": True}}},
    "mistral": {"language": {"random": WIDE | {"model_type": "mistral", "sliding_window": None}}},
}
LLAMA_3_1 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 32},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
"""But for the length it was first trained on: 8192 there."""
YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"random": WIDE | {"rope_parameters": LLAMA_3_1}},
    "linear": {"random": WIDE | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}},
    "yarn": {"random": WIDE | {"rope_parameters": YARN}},
    "qwen2, yarn": {"random": WIDE | {"model_type": "qwen2", "rope_parameters": YARN}},
}
TEXT |= {name: {"language": language} for name, language in ROPES.items()}
SEEING = {"language": {"random": WIDE}, "vision": TOWERS["open_clip"]}
SIGLIP = {"language": {"random": WIDE}, "vision": TOWERS["siglip"]}


@pytest.mark.parametrize("name", TEXT)
def test_the_language_part_read_back_has_the_same_logits(name: str, tmp_path: Path) -> None:
    done = export(run_of(saved_model(TEXT[name]), tmp_path / "run"), tmp_path / "out", format="gguf")
    assert done.parity.largest_difference <= 1e-5
    assert (tmp_path / "out/model.gguf").exists()
    assert not (tmp_path / "out/mmproj.gguf").exists()


def test_the_divisors_of_angles_are_those_of_llama_3_1(tmp_path: Path) -> None:
    """Pairs that turn in up to a quarter of 8192 positions as they are, from 8192 on 8 times slower, between them the
    share of both by turns in 8192 positions."""
    rope = LLAMA_3_1 | {"original_max_position_embeddings": 8192}
    language = WIDE | {"head_dim": 128, "rope_parameters": rope}
    export(run_of(saved_model({"language": {"random": language}}), tmp_path / "run"), tmp_path / "out", format="gguf")
    (found,) = (
        tensor for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors if tensor.name == "rope_freqs.weight"
    )
    assert found.data.dtype == np.float32
    expected = []
    for pair in range(64):
        turns = 8192 * 500000 ** (-pair / 64) / (2 * math.pi)
        kept = min(max((turns - 1) / 3, 0), 1)
        expected.append(1 / (kept + (1 - kept) / 8))
    assert {1.0, 8.0} < set(expected)
    np.testing.assert_allclose(found.data, expected, rtol=1e-5)


def test_divisors_lost_from_the_file_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmit.export.gguf.rope_divisors", lambda config: torch.ones(8))
    with pytest.raises(ExportError, match="logits of the language model differ"):
        export(run_of(saved_model(TEXT["llama3"]), tmp_path / "run"), tmp_path / "out", format="gguf")


def test_half_precision_is_that_of_the_rounded_model(tmp_path: Path) -> None:
    run = run_of(saved_model(TEXT["llama"]), tmp_path / "run")
    assert export(run, tmp_path / "out", format="gguf", dtype="float16").parity.largest_difference <= 1e-5


def test_no_progress_bar_is_written_into_a_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = run_of(saved_model(TEXT["llama"]), tmp_path / "run")
    transformers.utils.logging.enable_progress_bar()
    capfd.readouterr()
    export(run, tmp_path / "out", format="gguf")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_bytes_are_those_of_the_writer_of_gguf(dtype: str, tmp_path: Path) -> None:
    tensors = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(2))
        for name, shape in {"a": (3, 5), "v.position_embd.weight": (2, 3), "b": (7,), "c": (4, 3, 2, 2)}.items()
    }
    ours, theirs = (gguf.GGUFWriter(tmp_path / name, "clip") for name in ("ours", "theirs"))
    finish(ours, lambda: iter(tensors.items()), dtype)
    for name, value in tensors.items():
        halved = dtype == "float16" and name in ("a", "c")
        theirs.add_tensor(name, value.half().numpy() if halved else value.numpy())
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_one_tensor_is_held_at_a_time_while_they_are_written(tmp_path: Path) -> None:
    value = torch.zeros(512, 1024)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    tracemalloc.start()
    finish(writer, lambda: ((f"{number}", value) for number in range(20)), "float16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "model.gguf").stat().st_size > 20 * 2**20
    assert peak < 3 * 2**20


@pytest.mark.parametrize("model", [SEEING, SIGLIP], ids=["CLIP", "SigLIP"])
def test_the_mmproj_computes_our_image_vectors(model: dict[str, Any], tmp_path: Path) -> None:
    """Its own tensors, through the steps that llama.cpp takes, in NumPy; its GELU is the tanh approximation."""
    saved = saved_model(model)
    export(run_of(saved, tmp_path / "run"), tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out/mmproj.gguf")
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    about = {name: reader.get_field(f"clip.{name}").contents() for name in ("use_gelu", "vision.feature_layer")}
    _, pixels = rendered(saved, probes(saved)[0])
    vision, projector = saved.assembly.vlm.vision, saved.assembly.vlm.projector
    assert vision is not None
    assert projector is not None
    with torch.no_grad():
        ours = projector(vision(pixels[0][None]))[0].numpy()
    picture = normalise(pixels[0][None], vision.mean, vision.std)[0].numpy()
    theirs = image_vectors(tensors, picture, blocks=about["vision.feature_layer"][0], heads=2, gelu=about["use_gelu"])
    np.testing.assert_allclose(theirs, ours, atol=1e-2 if about["use_gelu"] else 1e-5)


@pytest.mark.parametrize(("scheme", "space"), [("always", True), ("prepend", True), ("never", False), ("first", None)])
def test_where_spaces_go_before_texts_is_said_or_refused(scheme: str, space: bool | None, tmp_path: Path) -> None:
    metaspace(scheme).save_pretrained(tmp_path / "tokenizer")
    model = {"language": {"random": WIDE, "tokenizer": str(tmp_path / "tokenizer")}}
    run = run_of(saved_model(model, chat="vicuna_v1"), tmp_path / "run")
    if space is None:
        with pytest.raises(ExportError, match="a space before some texts only"):
            export(run, tmp_path / "out", format="gguf")
        return
    export(run, tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    assert reader.get_field("tokenizer.ggml.add_space_prefix").contents() == space


def test_a_tokenizer_without_a_pad_token_is_given_one(tmp_path: Path) -> None:
    metaspace("always").save_pretrained(tmp_path / "tokenizer")
    model = {"language": {"random": WIDE, "tokenizer": str(tmp_path / "tokenizer")}}
    export(run_of(saved_model(model, chat="vicuna_v1"), tmp_path / "run"), tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    number = reader.get_field("tokenizer.ggml.padding_token_id").contents()
    assert reader.get_field("tokenizer.ggml.tokens").contents()[number] == "<unk>"


@pytest.mark.parametrize(("scheme", "told"), [("always", True), ("prepend", False), ("never", False)])
def test_the_card_says_where_llama_cpp_puts_a_space_too_many(scheme: str, told: bool, tmp_path: Path) -> None:
    metaspace(scheme).save_pretrained(tmp_path / "tokenizer")
    model = SIGLIP | {"language": {"random": WIDE, "tokenizer": str(tmp_path / "tokenizer")}}
    export(run_of(saved_model(model, chat="vicuna_v1"), tmp_path / "run"), tmp_path / "out", format="gguf")
    assert ("one space more" in (tmp_path / "out/README.md").read_text(encoding="utf-8")) == told


def cut_as(steps: str | list[Any], *, whole: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the control tokens of ChatML and Llama 3 that cuts text by a pattern, or in these steps."""
    described = json.loads(cast(Any, byte_level().backend_tokenizer).to_str())
    described["model"]["ignore_merges"] = whole
    backend = Tokenizer.from_str(json.dumps(described))
    if isinstance(steps, str):
        steps = [pre_tokenizers.Split(Regex(steps), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<image>"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=names)


@pytest.mark.parametrize(
    ("steps", "whole", "name"),
    [
        (QWEN2, False, "qwen2"),
        (QWEN2, True, None),
        (LLAMA_3, True, "llama-bpe"),
        (LLAMA_3, False, "dbrx"),
        (r"\p{L}+|\s+", False, None),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)], False, "smollm"),
        ([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)], False, None),
        ([pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(False)], False, None),
        ([pre_tokenizers.ByteLevel(False)], False, "gpt-2"),
        ([pre_tokenizers.ByteLevel(False)], True, None),
    ],
)
def test_how_a_tokenizer_cuts_text_is_named_or_refused(
    steps: str | list[Any], whole: bool, name: str | None, tmp_path: Path
) -> None:
    cut_as(steps, whole=whole).save_pretrained(tmp_path / "tokenizer")
    model = {"language": {"random": WIDE, "tokenizer": str(tmp_path / "tokenizer")}}
    run = run_of(saved_model(model, chat="chatml"), tmp_path / "run")
    if name is None:
        with pytest.raises(ExportError, match="how this tokenizer cuts text"):
            export(run, tmp_path / "out", format="gguf")
        return
    export(run, tmp_path / "out", format="gguf")
    assert gguf.GGUFReader(tmp_path / "out/model.gguf").get_field("tokenizer.ggml.pre").contents() == name


@pytest.mark.parametrize("order", ["as merged", "reversed"])
def test_scores_cut_a_text_as_merges_do_in_whatever_order_the_ids_stand(order: str, tmp_path: Path) -> None:
    """By the rule of llama.cpp for tokenizers as of Llama 2: the neighbours whose whole scores best, leftmost first."""
    described = json.loads(cast(Any, metaspace("always").backend_tokenizer).to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < 259]
    if order == "reversed":  # behind three control tokens and the bytes
        names = sorted(described["model"]["vocab"], key=described["model"]["vocab"].__getitem__)
        names[259:] = reversed(names[259:])
        described["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    backend = Tokenizer.from_str(json.dumps(described))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "tokenizer")
    model = {"language": {"random": WIDE, "tokenizer": str(tmp_path / "tokenizer")}}
    export(run_of(saved_model(model, chat="vicuna_v1"), tmp_path / "run"), tmp_path / "out", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    names, numbers = (reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "scores"))
    scores = dict(zip(names, numbers, strict=True))
    for text in CORPUS:
        cut = list("▁" + text.replace(" ", "▁"))
        while True:
            whole = [(scores.get(left + right), -place) for place, (left, right) in enumerate(pairwise(cut))]
            found = [(score, place) for score, place in whole if score is not None]
            if not found:
                break
            place = -max(found)[1]
            cut[place : place + 2] = [cut[place] + cut[place + 1]]
        assert cut == backend.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("chat", ["auto", "vicuna_v1"])
def test_a_jinja_without_tags_of_its_own_writes_our_prompts(chat: str, tmp_path: Path) -> None:
    saved = saved_model(TEXT["llama"], chat=chat)
    export(run_of(saved, tmp_path / "run"), tmp_path / "out", format="gguf")
    written = gguf.GGUFReader(tmp_path / "out/model.gguf").get_field("tokenizer.chat_template").contents()
    template = Environment(trim_blocks=True, lstrip_blocks=True).from_string(written)
    for conversation in probes(saved):
        messages = [{"role": item.role, "content": item.text} for item in conversation.messages]
        ours = saved.assembly.tokenizer.decode(rendered(saved, conversation)[0].tolist())
        eos = saved.assembly.tokenizer.eos_token
        assert template.render(messages=messages, add_generation_prompt=True, eos_token=eos) == ours


def image_vectors(
    tensors: dict[str, np.ndarray],
    picture: np.ndarray,
    *,
    blocks: int,
    heads: int,
    gelu: bool,
    cls_last: bool = False,
) -> np.ndarray:
    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def exact_gelu(x: np.ndarray) -> np.ndarray:
        return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()

    kernel = tensors["v.patch_embd.weight"]
    size = kernel.shape[-1]
    side = picture.shape[-1] // size
    cut = picture.reshape(3, side, size, side, size).transpose(1, 3, 0, 2, 4).reshape(side * side, -1)
    x = cut @ kernel.reshape(len(kernel), -1).T
    has_cls = "v.class_embd" in tensors
    if has_cls:
        cls = tensors["v.class_embd"].reshape(1, -1)
        x = np.concatenate([x, cls] if cls_last else [cls, x]) + tensors["v.position_embd.weight"]
        x = norm(x, "v.pre_ln")
    else:
        x = x + tensors["v.patch_embd.bias"] + tensors["v.position_embd.weight"]
    for number in range(blocks):
        at = f"v.blk.{number}"
        y = norm(x, f"{at}.ln1")
        q, k, v = (linear(y, f"{at}.attn_{part}").reshape(len(x), heads, -1).swapaxes(0, 1) for part in "qkv")
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.swapaxes(0, 1).reshape(len(x), -1), f"{at}.attn_out")
        hidden = linear(norm(x, f"{at}.ln2"), f"{at}.ffn_down")
        x = x + linear(exact_gelu(hidden) if gelu else hidden / (1 + np.exp(-1.702 * hidden)), f"{at}.ffn_up")
    return linear(exact_gelu(linear(x[int(has_cls) :], "mm.0")), "mm.2")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (MODELS["DINOv2 + llama"], "not llama.cpp"),
        ({"language": {"random": WIDE | {"model_type": "gemma", "head_dim": 16}}}, "gemma is not among llama"),
        (SEEING | {"projector": {"kind": "linear"}}, "mmit only"),
        ({"language": {"random": WIDE | {"model_type": "mistral", "sliding_window": 8}}}, "sliding window"),
        (
            {"language": {"random": WIDE | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}}},
            "its qwen2 has no sliding window",
        ),
        (
            {"language": {"random": WIDE | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}}},
            "rope_type dynamic is not among default, linear, yarn, llama3",
        ),
        (
            {"language": {"random": WIDE | {"rope_parameters": YARN | {"attention_factor": 1.5, "beta_fast": 16}}}},
            "rope_type yarn with attention_factor, beta_fast",
        ),
        (
            {"language": {"random": WIDE | {"rope_parameters": YARN | {"factor": None}}}},
            "rope_type yarn without factor",
        ),
        (
            {"language": {"random": WIDE | {"model_type": "qwen2", "rope_parameters": LLAMA_3_1}}},
            "its qwen2 does not read rope_type llama3",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(model: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason):
        export(run_of(saved_model(model), tmp_path / "run"), tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.soak
@pytest.mark.parametrize("name", TEXT)
def test_llama_cpp_itself_answers_with_our_tokens(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    saved = saved_model(TEXT[name])
    export(run_of(saved, tmp_path / "run"), tmp_path / "out", format="gguf")
    model = llama_cpp.Llama(str(tmp_path / "out/model.gguf"), n_ctx=1024, logits_all=True, verbose=False)
    for conversation in probes(saved):
        ours = said(saved, conversation)
        text = saved.assembly.tokenizer.decode(ours.ids)
        assert model.tokenize(str(text).encode(), add_bos=False, special=True) == ours.ids
        model.reset()
        model.eval(ours.ids)
        answer: list[int] = []
        while len(answer) < len(ours.answer):
            answer.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(answer[-1:])
        assert answer == ours.answer


@pytest.mark.soak
@pytest.mark.parametrize("name", ROPES)
def test_llama_cpp_itself_turns_as_far_as_we_do_past_the_first_length(name: str, tmp_path: Path) -> None:
    """600 positions, of which the first training knew 32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    saved = saved_model(TEXT[name])
    export(run_of(saved, tmp_path / "run"), tmp_path / "out", format="gguf")
    model = llama_cpp.Llama(str(tmp_path / "out/model.gguf"), n_ctx=1024, logits_all=True, verbose=False)
    ids = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    model.eval(ids)
    with torch.no_grad():
        ours = cast(Any, saved.assembly.vlm.language)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    theirs = np.asarray(model.scores[:600, : ours.shape[1]])
    np.testing.assert_allclose(theirs, ours, atol=2e-3 * float(np.abs(ours).max()))
    assert theirs.argmax(-1).tolist() == ours.argmax(-1).tolist()


CHATS: dict[str, tuple[str, Callable[[], PreTrainedTokenizerFast]]] = {
    "chatml, GPT-2": ("chatml", byte_level),
    "chatml, Qwen2": ("chatml", lambda: cut_as(QWEN2)),
    "llama_3": ("llama_3", lambda: cut_as(LLAMA_3, whole=True)),
    "llama_3, merging all": ("llama_3", lambda: cut_as(LLAMA_3)),
    "vicuna_v1, always": ("vicuna_v1", lambda: metaspace("always")),
    "vicuna_v1, prepend": ("vicuna_v1", lambda: metaspace("prepend")),
    "vicuna_v1, never": ("vicuna_v1", lambda: metaspace("never")),
    "llava_llama_2, always": ("llava_llama_2", lambda: metaspace("always")),
    "llava_llama_2, never": ("llava_llama_2", lambda: metaspace("never")),
}
ODD = (
    message("user", "  it's WE'LL 12345678, 3.14\tand\n\n\nnaïve 漢字 🙂🙂 \n"),
    message("assistant", " a  b   c    d▁e "),
    message("user", " "),
)


@pytest.mark.soak
@pytest.mark.parametrize("name", CHATS)
def test_the_chat_handler_of_llama_cpp_writes_our_prompts(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    chat, tokenizer = CHATS[name]
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    saved = saved_model({"language": {"random": WIDE, "tokenizer": str(tmp_path / "tokenizer")}}, chat=chat)
    export(run_of(saved, tmp_path / "run"), tmp_path / "out", format="gguf")
    model = llama_cpp.Llama(str(tmp_path / "out/model.gguf"), n_ctx=1024, verbose=False)
    for conversation in [*probes(saved), Conversation(ODD)]:
        messages = [{"role": item.role, "content": item.text} for item in conversation.messages]
        model.reset()
        done = model.create_chat_completion(messages=messages, max_tokens=1)
        prompt = model.input_ids[: done["usage"]["prompt_tokens"]].tolist()
        assert prompt == rendered(saved, conversation)[0].tolist()


@pytest.mark.soak
@pytest.mark.parametrize("name", CHATS)
def test_llama_cpp_itself_puts_pictures_where_we_do(name: str, tmp_path: Path) -> None:
    """Their tokens among the prompt's; it is given a marker in the text for each, as its programs do.

    What follows a picture and begins with a space differs for a Metaspace that is `always` there: it puts no second
    space, llama.cpp does, and the card says so. The third conversation has such places.
    """
    mtmd = pytest.importorskip("llama_cpp.mtmd_cpp", exc_type=ImportError)
    chat, tokenizer = CHATS[name]
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    language = {"random": WIDE, "tokenizer": str(tmp_path / "tokenizer")}
    saved = saved_model(SIGLIP | {"language": language}, chat=chat)
    export(run_of(saved, tmp_path / "run"), tmp_path / "out", format="gguf")
    speaker = speaking_tokenizer(saved)
    placeholder = saved.assembly.placeholder
    assert placeholder is not None
    with opened(tmp_path / "out") as context:
        for conversation in probes(saved)[: 2 if name.endswith("always") else None]:
            messages = [
                {"role": item.role, "content": "".join(map(marked, item.parts))} for item in conversation.messages
            ]
            prompt = str(speaker.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            theirs: list[int] = []
            for chunk in chunks_of(context, prompt, [decode(data, "probe") for data in conversation.pictures]):
                count = c_size_t()
                if mtmd.mtmd_input_chunk_get_type(chunk) == 1:
                    theirs += [placeholder] * mtmd.mtmd_input_chunk_get_n_tokens(chunk)
                else:
                    ids = mtmd.mtmd_input_chunk_get_tokens_text(chunk, byref(count))
                    theirs += ids[: count.value]
            assert theirs == rendered(saved, conversation)[0].tolist()


def marked(part: Part) -> str:
    if isinstance(part, TextPart):
        return part.text
    return import_module("llama_cpp.mtmd_cpp").mtmd_default_marker().decode()


CLIP = {"language": {"random": WIDE}, "vision": TOWERS["clip"]}
DEFECT = "github.com/ggml-org/llama.cpp/issues/25814: cls token behind the patches"


def cls_behind_patches() -> bool:
    """Of the releases of llama-cpp-python, 0.3.8 is the last whose llama.cpp puts it first; 0.3.36 does not yet."""
    found = find_spec("llama_cpp")
    return found is not None and Version(version("llama_cpp_python")) > Version("0.3.8")


@pytest.mark.soak
@pytest.mark.parametrize(
    "model",
    [
        SIGLIP,
        SIGLIP
        | {"vision": {"library": "transformers", "random": TOWERS["siglip"]["random"] | {"intermediate_size": 32}}},
        *(
            pytest.param(model, marks=pytest.mark.xfail(cls_behind_patches(), reason=DEFECT, strict=True))
            for model in (SEEING, CLIP)
        ),
    ],
    ids=["SigLIP", "SigLIP, MLP as wide as the tower", "open_clip", "CLIP"],
)
def test_llama_cpp_itself_sees_our_image_vectors(model: dict[str, Any], tmp_path: Path) -> None:
    saved, pixels = seen(model, tmp_path)
    vision, projector = saved.assembly.vlm.vision, saved.assembly.vlm.projector
    assert vision is not None
    assert projector is not None
    with torch.no_grad():
        ours = projector(vision(pixels[None]))[0].numpy()
    theirs = llama_cpp_vectors(tmp_path / "out", pixels, shape=ours.shape)
    np.testing.assert_allclose(theirs, ours, atol=1e-2 * max(1.0, float(np.abs(ours).max())))


@pytest.mark.soak
@pytest.mark.parametrize("model", [SEEING, CLIP], ids=["open_clip", "CLIP"])
def test_with_the_cls_token_behind_the_patches_the_image_vectors_are_those_of_llama_cpp(
    model: dict[str, Any], tmp_path: Path
) -> None:
    """So nothing else differs."""
    pytest.importorskip("llama_cpp")
    if not cls_behind_patches():
        pytest.skip("this llama.cpp puts it first")
    saved, pixels = seen(model, tmp_path)
    vision = saved.assembly.vlm.vision
    assert vision is not None
    reader = gguf.GGUFReader(tmp_path / "out/mmproj.gguf")
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    picture = normalise(pixels[None], vision.mean, vision.std)[0].numpy()
    gelu = reader.get_field("clip.use_gelu").contents()
    ours = image_vectors(tensors, picture, blocks=vision.blocks, heads=2, gelu=gelu, cls_last=True)
    theirs = llama_cpp_vectors(tmp_path / "out", pixels, shape=ours.shape)
    np.testing.assert_allclose(theirs, ours, atol=1e-2 * max(1.0, float(np.abs(ours).max())))


def seen(model: dict[str, Any], folder: Path) -> tuple[Saved, torch.Tensor]:
    """The model, exported to `folder`/out, and a picture as large as it sees, so that no resize comes between."""
    saved = saved_model(model)
    export(run_of(saved, folder / "run"), folder / "out", format="gguf")
    vision = saved.assembly.vlm.vision
    assert vision is not None
    pixels = torch.randint(0, 256, (3, vision.side, vision.side), generator=torch.Generator().manual_seed(1))
    return saved, pixels.to(torch.uint8)


def llama_cpp_vectors(folder: Path, pixels: torch.Tensor, *, shape: tuple[int, ...]) -> np.ndarray:
    """What llama.cpp makes of `pixels` (3, S, S), by the interface that the release has: mtmd, or llava before it."""
    pytest.importorskip("llama_cpp")
    if find_spec("llama_cpp.mtmd_cpp") is None:
        llava = import_module("llama_cpp.llava_cpp")
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG")
        raw = file.getvalue()
        clip = llava.clip_model_load(str(folder / "mmproj.gguf").encode(), 0)
        assert clip
        embedded = llava.llava_image_embed_make_with_bytes(
            clip, 1, (c_uint8 * len(raw)).from_buffer_copy(raw), len(raw)
        )
        assert embedded.contents.n_image_pos == shape[0]
        vectors = np.ctypeslib.as_array(embedded.contents.embed, shape=shape).copy()
        llava.llava_image_embed_free(embedded)
        llava.clip_free(clip)
        return vectors
    mtmd = import_module("llama_cpp.mtmd_cpp")
    with opened(folder) as context:
        (image,) = [
            chunk
            for chunk in chunks_of(context, mtmd.mtmd_default_marker().decode(), [pixels.permute(1, 2, 0).numpy()])
            if mtmd.mtmd_input_chunk_get_type(chunk) == 1
        ]
        assert mtmd.mtmd_encode_chunk(context, image) == 0
        return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), shape=shape).copy()


@contextmanager
def opened(folder: Path) -> Iterator[Any]:
    """A context of mtmd with the language part and the mmproj in `folder`."""
    llama_cpp, mtmd = import_module("llama_cpp"), import_module("llama_cpp.mtmd_cpp")
    language = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=256, verbose=False)
    settings = mtmd.mtmd_context_params_default()
    settings.use_gpu, settings.n_threads, settings.warmup = False, 1, False
    context = mtmd.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), language._model.model, settings)
    assert context
    yield context
    mtmd.mtmd_free(context)


def chunks_of(context: Any, prompt: str, pictures: Sequence[np.ndarray]) -> list[Any]:
    """The prompt, its markers replaced by pictures uint8 (H, W, 3), as mtmd cuts it into texts and pictures."""
    mtmd = import_module("llama_cpp.mtmd_cpp")
    bitmaps = []
    for picture in pictures:
        raw = np.ascontiguousarray(picture).tobytes()
        height, width = picture.shape[:2]
        bitmaps.append(mtmd.mtmd_bitmap_init(width, height, (c_uint8 * len(raw)).from_buffer_copy(raw)))
    text = mtmd.mtmd_input_text(
        text=prompt.encode(), text_len=len(prompt.encode()), add_special=False, parse_special=True
    )
    chunks = mtmd.mtmd_input_chunks_init()
    array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
    assert mtmd.mtmd_tokenize(context, chunks, byref(text), array, len(bitmaps)) == 0
    return [mtmd.mtmd_input_chunks_get(chunks, place) for place in range(mtmd.mtmd_input_chunks_size(chunks))]
