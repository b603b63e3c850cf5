"""GGUF for llama.cpp: the language model, and for CLIP and SigLIP towers the mmproj (tower and projector).

Needs the extra `gguf`. What is written is read back through transformers' own GGUF reader and compared; that
llama.cpp itself answers the same is a soak test (`tests/export/test_gguf.py`), run with llama-cpp-python 0.3.8 and
0.3.36. llama.cpp's GELU is the tanh approximation, so image vectors come out within about 1e-2 there.

Those of CLIP do so up to 0.3.8 alone. Since May 2025 llama.cpp puts the cls token behind the patches but still drops
the first token, as if that were it (its issue 25814). No file undoes this: the first patch is lost and cls is kept,
whatever its tables hold. So the mmproj is the one for a llama.cpp without the defect. SigLIP has no such token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmit.data.chat import Chat
from mmit.export.llava import ExportError, language_tensors
from mmit.export.processor import padding_token
from mmit.export.targets import LLAMA_CPP, targets
from mmit.export.towers import tower_config, tower_tensors
from mmit.model.build import Assembly
from mmit.model.projector import MlpProjector
from mmit.model.saved import Saved

LANGUAGE, MMPROJ = "model.gguf", "mmproj.gguf"
ROPE_DIVISORS = "rope_freqs.weight"

BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
CLIP_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    # Crossed, as in the files of LLaVA's days: llama.cpp before May 2025 reads nothing else. Later ones uncross a pair
    # whose ffn_down takes in the tower's width: ours, but a straight one too where both are square.
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}
CLIP_WHOLE = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
# How a byte-level tokenizer cuts text before merging, as a pattern in its tokenizer.json, and whether a word that is
# itself a token is taken whole (ignore_merges) -> llama.cpp's name for it.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2, LLAMA_3 = WORDS + r"\p{N}" + REST, WORDS + r"\p{N}{1,3}" + REST
PRE_TOKENIZERS = {(QWEN2, False): "qwen2", (LLAMA_3, True): "llama-bpe", (LLAMA_3, False): "dbrx"}


def write_gguf(saved: Saved, folder: Path, dtype: str) -> None:
    """`model.gguf` and, with a tower, `mmproj.gguf`; ExportError if llama.cpp computes this model otherwise."""
    reason = next((line for line in targets(saved.assembly) if "only (" in line or "not llama.cpp" in line), None)
    if reason is not None:
        raise ExportError(
            f"--format gguf: {reason}. What llama.cpp is given: {', '.join(LLAMA_CPP)} language models and CLIP or "
            f"SigLIP towers with select: patch before an mlp of depth 2"
        )
    if dtype == "bfloat16":
        raise ExportError("--format gguf: write --dtype float32 or float16; llama-quantize makes smaller ones of it")
    _write_language(saved, folder / LANGUAGE, dtype)
    if saved.assembly.vlm.vision is not None:
        _write_mmproj(saved.assembly, folder / MMPROJ, dtype)


@torch.no_grad()
def language_difference(saved: Saved, folder: Path, ids: list[list[int]]) -> tuple[float, float]:
    """Largest difference of logits between `model.gguf`, as transformers reads it, and ours; and the largest logit."""
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=LANGUAGE, dtype=torch.float32).eval()
    _scale_rope(theirs, folder / LANGUAGE)
    gaps, sizes = [0.0], [0.0]
    for row in ids:
        batch = torch.tensor([row])
        ours = cast(Any, saved.assembly.vlm.language)(input_ids=batch, use_cache=False).logits
        other = theirs(input_ids=batch, use_cache=False).logits[..., : ours.shape[-1]]
        gaps.append(float((ours - other).abs().max()))
        sizes.append(float(ours.abs().max()))
    return max(gaps), max(sizes)


def _scale_rope(theirs: Any, file: Path) -> None:
    """Turns `theirs` as the file says, which transformers' reader passes over for all but one architecture."""
    import gguf

    reader = gguf.GGUFReader(file)
    keys = {"type": "rope_type", "factor": "factor", "original_context_length": "original_max_position_embeddings"}
    fields = {
        own: reader.get_field(f"{LLAMA_CPP[theirs.config.model_type]}.rope.scaling.{key}") for key, own in keys.items()
    }
    scaling = {own: field.contents() for own, field in fields.items() if field is not None}
    if scaling:
        theirs.config.rope_parameters = {"rope_theta": theirs.config.rope_parameters["rope_theta"]} | scaling
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    for tensor in reader.tensors:
        if tensor.name == ROPE_DIVISORS:
            theirs.model.rotary_emb.inv_freq /= torch.from_numpy(np.array(tensor.data))


def _writer(file: Path, architecture: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError("--format gguf: needs the gguf package: pip install 'mmit[gguf]'") from None
    return gguf.GGUFWriter(file, architecture)


def finish(writer: Any, tensors: Callable[[], Iterator[tuple[str, Tensor]]], dtype: str) -> None:
    """The file of `writer` with its tensors, gone through twice: all sizes stand before the first value.

    One tensor at a time is held in the type of the file; gguf's own `add_tensor` would hold every one until the end.
    """

    def kind(name: str, value: Tensor) -> np.dtype:
        matrix = value.ndim >= 2 and dtype == "float16" and not name.startswith("v.position")
        return np.dtype(np.float16 if matrix else np.float32)

    for name, value in tensors():
        writer.add_tensor_info(name, tuple(value.shape), kind(name, value), value.numel() * kind(name, value).itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, value in tensors():
        array = value.detach().float().contiguous().numpy()
        writer.write_tensor_data(array.astype(kind(name, value), copy=False))
    writer.close()


def _write_language(saved: Saved, file: Path, dtype: str) -> None:
    assembly = saved.assembly
    language = assembly.vlm.language
    config: Any = language.config
    architecture = LLAMA_CPP[config.model_type]
    writer = _writer(file, architecture)
    heads = config.num_attention_heads
    width = config.head_dim if "head_dim" in config.to_dict() and config.head_dim else config.hidden_size // heads
    writer.add_file_type(1 if dtype == "float16" else 0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    _add_rope_scaling(writer, config.rope_parameters)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, saved, config.vocab_size)
    finish(writer, lambda: _language_tensors(assembly, architecture), dtype)


def _add_rope_scaling(writer: Any, rope: Mapping[str, Any]) -> None:
    """That of Llama 3.1 is a tensor instead."""
    import gguf

    if rope["rope_type"] not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def rope_divisors(config: Any) -> Tensor:
    """What llama.cpp divides the angle of each pair of a head by, (D / 2,), to turn as Llama 3.1 does."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return 1.0 / config.rope_parameters["rope_theta"] ** steps / scaled


def _language_tensors(assembly: Assembly, architecture: str) -> Iterator[tuple[str, Tensor]]:
    language = assembly.vlm.language
    config: Any = language.config
    if config.rope_parameters["rope_type"] == "llama3":
        yield ROPE_DIVISORS, rope_divisors(config)
    for name, value in language_tensors(language).items():
        if name in WHOLE:
            if not (name == "lm_head.weight" and config.tie_word_embeddings):
                yield WHOLE[name], value
            continue
        _, _, number, rest = name.split(".", 3)
        module, _, kind = rest.rpartition(".")
        if architecture == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            value = _interleaved(value, heads)
        yield f"blk.{number}.{BLOCK[module]}.{kind}", value


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from the halves that transformers rotates to the neighbouring pairs that llama.cpp does."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: Any, saved: Saved, size: int) -> None:
    import gguf

    tokenizer, chat = saved.assembly.tokenizer, saved.chat
    described = json.loads(cast(Any, tokenizer.backend_tokenizer).to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ExportError(f"--format gguf: a {model['type']} tokenizer; only BPE ones are written")
    added = {token["id"]: token for token in described["added_tokens"]}
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    by_bytes = bool(model.get("byte_fallback"))
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    # llama.cpp joins the neighbours whose whole scores best, tokenizers those of the earliest merge.
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
    tokens, types, scores = [], [], []
    for number in range(size):
        token = names.get(number, f"<unused_{number}>")
        kind = gguf.TokenType.NORMAL
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
        elif number not in names:
            kind = gguf.TokenType.UNUSED
        elif by_bytes and len(token) == 6 and token.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(kind)
        scores.append(float(-ranks.get(token, len(merges))))
    spaces = [bool(chat.text.prefix("x", section)) for section in ("first", "start")]
    if any(spaces) and not (by_bytes and all(spaces)):
        raise ExportError(
            "--format gguf: the tokenizer puts a space before some texts only; llama.cpp does so before every text "
            "that follows a control token, or before none, and would read other prompts than were trained"
        )
    if by_bytes:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(all(spaces))
        writer.add_token_scores(scores)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(described))
        # llama.cpp refuses a list without merges; bytes FF and FE stand in no UTF-8 text.
        writer.add_token_merges([" ".join(pair) for pair in merges] or ["ÿ þ"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_bos_token(bool(chat.begin))
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if (padding := padding_token(saved)) is not None:
        writer.add_pad_token_id(tokenizer.convert_tokens_to_ids(padding))
    if chat.stop_ids:
        writer.add_eos_token_id(chat.stop_ids[0])
    writer.add_chat_template(_plain_template(chat))


def _plain_template(chat: Chat) -> str:
    """Without the tags around answers: a plain Jinja knows none of them, and llama-cpp-python before 0.3.24 is one."""
    return re.sub(r"\{%- (end)?generation -%\}", "", chat.template())


def _pre_tokenizer(described: Mapping[str, Any]) -> str:
    if not described["model"]["merges"]:
        return "gpt-2"  # single bytes come out the same, however the text is cut
    whole = bool(described["model"].get("ignore_merges"))
    part = described["pre_tokenizer"] or {}
    parts = part["pretokenizers"] if part.get("type") == "Sequence" else [part]
    match parts:
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False},
        ] if (pattern, whole) in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern, whole]
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}] if not whole:
            return "smollm"
        case [{"type": "ByteLevel", "use_regex": True}] if not whole:
            return "gpt-2"
    raise ExportError(
        f"--format gguf: llama.cpp's name for how this tokenizer cuts text ({parts}, ignore_merges {whole}) is not "
        f"known here; export to transformers, and convert with llama.cpp's own convert_hf_to_gguf.py"
    )


def _write_mmproj(assembly: Assembly, file: Path, dtype: str) -> None:
    """As exported, hidden state -2, before any final norm: also what llama.cpp reads where it is not told which."""
    tower = assembly.vlm.vision
    assert tower is not None
    config: Any = tower_config(tower)
    acts = {"gelu": True, "gelu_pytorch_tanh": True, "quick_gelu": False}
    if config.hidden_act not in acts:
        raise ExportError(f"--format gguf: a tower with {config.hidden_act}; llama.cpp has {', '.join(acts)}")
    writer = _writer(file, "clip")
    writer.add_file_type(1 if dtype == "float16" else 0)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", acts[config.hidden_act])
    writer.add_uint32("clip.vision.image_size", tower.side)
    writer.add_uint32("clip.vision.patch_size", tower.patch)
    writer.add_uint32("clip.vision.embedding_length", config.hidden_size)
    writer.add_uint32("clip.vision.feed_forward_length", config.intermediate_size)
    writer.add_uint32("clip.vision.projection_dim", assembly.vlm.language.config.hidden_size)
    writer.add_uint32("clip.vision.attention.head_count", config.num_attention_heads)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", config.layer_norm_eps)
    writer.add_uint32("clip.vision.block_count", config.num_hidden_layers)
    writer.add_array("clip.vision.feature_layer", [tower.blocks])
    writer.add_array("clip.vision.image_mean", list(tower.mean))
    writer.add_array("clip.vision.image_std", list(tower.std))
    finish(writer, lambda: _mmproj_tensors(assembly), dtype)


def _mmproj_tensors(assembly: Assembly) -> Iterator[tuple[str, Tensor]]:
    tower, projector = assembly.vlm.vision, cast(MlpProjector, assembly.vlm.projector)
    assert tower is not None
    for name, value in tower_tensors(tower).items():
        if name in CLIP_WHOLE:
            yield CLIP_WHOLE[name], value
        elif name.startswith("encoder.layers."):
            _, _, number, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            yield f"v.blk.{number}.{CLIP_BLOCK[module]}.{kind}", value
    for number, linear in zip((0, 2), projector.linears, strict=True):
        for kind, value in linear.state_dict().items():
            yield f"mm.{number}.{kind}", value
