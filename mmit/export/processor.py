"""The processor of an export: exactly the picture transform, the tokenizer and the chat template of the run."""

from __future__ import annotations

import copy
import re
from typing import Any, cast

from tokenizers import Tokenizer, processors
from transformers import (
    CLIPImageProcessor,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)
from transformers.image_processing_utils import BaseImageProcessor

from mmit.data.chat_formats import RESERVED
from mmit.data.fit import PictureFit
from mmit.export.towers import select_strategy
from mmit.model.saved import Saved
from mmit.model.vision import VisionTower
from mmit.model.vlm import embedding_table

PADDING = (r"<pad>", r"<PAD>", r"\[PAD\]", r"<\|pad\|>", r"<\|padding\|>", r"<\|finetune_right_pad_id\|>")
RESAMPLE = {"bicubic": 3, "bilinear": 2}


def image_processor(fit: PictureFit) -> BaseImageProcessor:
    """The class of transformers that makes the same pixels as `fit`, to the bit."""
    square = {"height": fit.side, "width": fit.side}
    shared: dict[str, Any] = {
        "image_mean": list(fit.mean),
        "image_std": list(fit.std),
        "resample": RESAMPLE[fit.interpolation],
        "crop_size": square,
    }
    match fit.policy:
        case "crop":
            return CLIPImageProcessor(size={"shortest_edge": fit.side}, do_center_crop=True, **shared)
        case "pad":
            return LlavaImageProcessor(do_pad=True, size={"shortest_edge": fit.side}, do_center_crop=True, **shared)
        case "squash":
            return SiglipImageProcessor(size=square, do_center_crop=False, **shared)


def processor(saved: Saved) -> LlavaProcessor:
    """Expands one placeholder to as many as a picture has tokens."""
    tower, fit, placeholder = saved.assembly.vlm.vision, saved.fit, saved.assembly.placeholder
    assert tower is not None
    assert fit is not None
    assert placeholder is not None
    tokenizer = speaking_tokenizer(saved)
    return LlavaProcessor(
        image_processor=image_processor(fit),
        tokenizer=tokenizer,
        patch_size=tower.patch,
        vision_feature_select_strategy=select_strategy(tower),
        chat_template=tokenizer.chat_template,
        image_token=str(tokenizer.convert_ids_to_tokens(placeholder)),
        num_additional_image_tokens=additional_tokens(tower),
    )


def speaking_tokenizer(saved: Saved) -> PreTrainedTokenizerFast:
    """The tokenizer with the run's chat format as its one template.

    A processor of transformers puts bos in front of a prompt that does not begin with it, although the template has
    said everything; where the run trained without bos, the exported tokenizer therefore adds nothing by itself.
    """
    tokenizer = copy.deepcopy(saved.assembly.tokenizer)
    tokenizer.chat_template = saved.chat.template()
    tokenizer.pad_token = padding_token(saved)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # answers begin where prompts end
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False))
    bos = tokenizer.bos_token
    if saved.fit is None or (bos is not None and text.startswith(str(bos))):
        return tokenizer
    backend = cast(Tokenizer, tokenizer.backend_tokenizer)
    if backend.num_special_tokens_to_add(is_pair=False):
        tokenizer.add_bos_token = tokenizer.add_eos_token = False
        backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return tokenizer


def padding_token(saved: Saved) -> str | None:
    """What fills up a batch: the tokenizer's own pad token, one of that name, one that is reserved, or the unknown one,
    which a vocabulary with bytes never needs. Only if none of them is to be had, the one that ends answers.

    Whoever trains an export further by the ids of a batch leaves padding out of the loss by its id; where it is the
    token that ends answers, the model unlearns to stop (github.com/huggingface/transformers/issues/23530).
    """
    tokenizer: Any = saved.assembly.tokenizer
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    spare = [name for pattern in (*PADDING, *RESERVED) for name in special if re.fullmatch(pattern, name)]
    # Of the ids that end an answer only the first is ever learned; the others may fill up a batch.
    ruled_out = {*saved.chat.stop_ids[:1], *saved.chat.begin, saved.chat.placeholder}
    rows = len(embedding_table(saved.assembly.vlm.language))
    for name in (tokenizer.pad_token, *spare, tokenizer.unk_token):
        number = tokenizer.convert_tokens_to_ids(name) if name is not None else None
        if number is not None and number < rows and number not in ruled_out:
            return name
    return tokenizer.pad_token or tokenizer.eos_token


def additional_tokens(tower: VisionTower) -> int:
    """Tokens beside the patches that the tower itself gives out; `default` takes one off again."""
    return int(tower.layout.has_cls)
