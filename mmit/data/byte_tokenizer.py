"""A tokenizer made in code, whose text ids are the bytes of the text: for tiny models, tests and trials."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmit.data.chat_formats import CHAT_FORMATS, jinja


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes, then `<pad>`, `<|im_start|>`, `<|im_end|>` (ends a sequence) and `<image>`; the template
    is ChatML. Saved and loaded like any other tokenizer."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in _letters().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = jinja(CHAT_FORMATS["chatml"])
    return fast


def _letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level tokenizers since GPT-2: bytes that Latin-1 prints
    stand for themselves, the others are numbered on from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
