"""Which attention computes: settled when a model is built, on the CPU, and once more where it is going to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from mmit.config import ConfigError
from mmit.model.pretrained import quiet

FLASH = "flash_attention_2"


def built_with(wanted: str) -> str | None:
    """What `model.attention` means on the CPU, where flash attention has no kernel. None leaves it to transformers:
    sdpa where the model has it, else eager."""
    return None if wanted in ("auto", FLASH) else wanted


def use_flash_attention(language: PreTrainedModel, wanted: str, device: torch.device, *, bf16: bool) -> None:
    """Turns to flash attention where it can compute (a GPU, in bf16), if it is wanted, or installed under `auto`.

    ConfigError if it was asked for by name and cannot be had.
    """
    able = device.type == "cuda" and bf16
    if not (wanted == FLASH or (wanted == "auto" and able and is_flash_attn_2_available())):
        return
    reason = f"this is {device.type}{'' if bf16 else ', not in bf16'}"
    if able:
        reason = f"{type(language).__name__} does not let it be chosen"
        try:
            with quiet():  # it warns of the precision and place in which the model was built
                language.set_attn_implementation(FLASH)
        except (ImportError, ValueError) as error:  # not installed, or not for this architecture
            reason = " ".join(str(error).split())[:300]
    if wanted == FLASH and language.config._attn_implementation != FLASH:
        raise ConfigError(f"model.attention: {FLASH} needs a GPU, bf16 and a model that has it ({reason}); write auto")


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Within it, sdpa leaves cuDNN's kernels aside, which torch puts before the memory-efficient ones for a row that
    comes with a mask, as packed ones do.

    Their gradients are not finite for some lengths on Hopper (github.com/pytorch/pytorch/issues/196678), and they are
    compiled anew for each length of row. Needless once torch's wheels carry a cuDNN without the two.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
