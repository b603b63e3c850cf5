"""Small tokenizers of the families in use, trained in a moment on a few sentences."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful answers.",
    "USER: what is in the picture? ASSISTANT: two cats on a sofa, and a dog next to them.\n\nThe dog sleeps.\n",
    "system user assistant tool, yes and no; one, two, three lines\nof text\n\n and more text. " * 3,
    "[INST] <<SYS>> <</SYS>> [/INST] < s > </ s > <| im _ start |> image im_end",
]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as of GPT-2, with ChatML tokens, an added token that is not special and one of whitespace."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>", "<image>"]
    )
    fast.add_tokens([AddedToken("<tool_call>", special=False, normalized=False), AddedToken("    ", normalized=False)])
    return fast


@cache
def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """BPE in the manner of Llama 2: bytes as a fallback, bos in front, and a space before a text as `scheme` says:
    `always`, `first`, `never`, or `prepend` (the older normalizer)."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name in model["vocab"] if name not in names]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    return _like_llama(tokenizer, scheme)


@cache
def unigram(scheme: str) -> PreTrainedTokenizerFast:
    """Unigram whose vocabulary holds the control tokens as ordinary pieces, so the model itself could write them."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(CORPUS * 4, trainers.UnigramTrainer(vocab_size=200, show_progress=False))
    learned = [tuple(piece) for piece in json.loads(trained.to_str())["model"]["vocab"]]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [piece for piece in learned if piece[0] not in {name for name, _ in pieces}]
    return _like_llama(Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True)), scheme)


def _like_llama(tokenizer: Tokenizer, scheme: str) -> PreTrainedTokenizerFast:
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 0 if scheme == "never" else 1, 0)])
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast
