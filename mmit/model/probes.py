"""What is tried on the real model before step 0, because a version or a setting could break it without a word."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmit.config import ConfigError
from mmit.data.packing import Example, Row, pack
from mmit.model.vlm import VLM, embedding_table

LENGTHS = (13, 9, 17)
LARGE = 40.0
"""Spread of the logits in `probe_head`: beyond every cap in use (Gemma 2 caps at 30, others higher but softly)."""


@torch.no_grad()
def probe_embeddings(vlm: VLM) -> None:
    """ConfigError if the language model does more with ids than to look up their embeddings, which is all it is given.

    Gemma 3n and the small Gemma 4 look up each token once more for every layer: from embeddings alone, the first leaves
    that out without a word and the second stops at the first picture. Call it before the model is spread over ranks.
    """
    model: Any = vlm.language.get_decoder()
    table = cast(nn.Embedding, vlm.language.get_input_embeddings())
    ids = torch.arange(5, device=table.weight.device)[None]
    was_training = _pause(vlm)
    mixed = len({parameter.dtype for parameter in vlm.language.parameters()}) > 1  # as while a part of it trains
    try:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed):
            by_ids = model(input_ids=ids, use_cache=False).last_hidden_state
            by_rows = model(inputs_embeds=table(ids), use_cache=False).last_hidden_state
            model(inputs_embeds=table(ids) * 0.5, use_cache=False)  # rows of no token, as pictures are
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.language: {type(vlm.language).__name__} cannot be given embeddings in place of ids ({reason}); "
            f"name another model"
        ) from error
    finally:
        _resume(was_training)
    if not torch.allclose(by_ids, by_rows, rtol=1e-3, atol=1e-5):
        raise ConfigError(
            f"model.language: {type(vlm.language).__name__} computes other hidden states from embeddings than from the "
            f"ids they belong to: it looks its tokens up in more than one table; name another model"
        )


@torch.no_grad()
def probe_isolation(vlm: VLM, device: torch.device, *, through: nn.Module | None = None) -> None:
    """ConfigError unless a conversation's hidden states keep their bits when its neighbours in the row change.

    `through` is the model as it is spread over ranks, if it is: then only its forward may be called.
    """
    model = vlm if through is None else through
    generator = torch.Generator().manual_seed(0)
    ids = [_random_ids(vlm, length, generator) for length in LENGTHS]
    others = [_random_ids(vlm, length, generator) for length in LENGTHS]
    begin, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    was_training = _pause(vlm)
    try:
        kept = _states(model, [ids[0], ids[1], ids[2]], device)[begin:end]
        beside_others = _states(model, [others[0], ids[1], others[2]], device)[begin:end]
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.language: {type(vlm.language).__name__} refuses a row of several conversations ({reason}); "
            f"do what that says, or name another model"
        ) from error
    finally:
        _resume(was_training)
    if not torch.equal(kept, beside_others) and (isinstance(through, FSDPModule) or _others_reach(vlm, ids, device)):
        difference = float((kept.float() - beside_others.float()).abs().max())
        kind = type(vlm.language).__name__
        raise ConfigError(
            f"model.language: packed conversations see each other in {kind} (hidden states differ by {difference:.1e} "
            f"when the neighbour changes); try model.attention: eager or sdpa, or another model: this architecture "
            f"carries state past the restarts of position_ids"
        )


@torch.no_grad()
def probe_head(vlm: VLM, device: torch.device, *, through: nn.Module | None = None) -> bool:
    """Whether our head in pieces gives the model's own losses: false for models that cap or scale their logits.

    Logits are made large for it: those of a model that has not learned yet are too small for a cap to show.
    """
    model, head = vlm if through is None else through, vlm.language.get_output_embeddings()
    if head is None:
        return False
    generator = torch.Generator().manual_seed(0)
    row = _row([_random_ids(vlm, length, generator) for length in LENGTHS], learned=True).to(device)
    was_training, chunk = _pause(vlm), vlm.chunk
    spread: list[float] = []
    rounding: list[float] = []

    def look(_module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        spread.append(float(logits.float().std()))
        rounding.append(torch.finfo(logits.dtype).eps)

    vlm.chunk = None
    hook = head.register_forward_hook(look)
    try:
        model(row)
        hook.remove()
        hook = head.register_forward_hook(lambda _module, _inputs, logits: logits * (LARGE / spread[0]))
        own = model(row)
        vlm.chunk = len(row.predicts) // 2
        ours = model(row)
    finally:
        hook.remove()
        vlm.chunk = chunk
        _resume(was_training)
    # A GPU's kernels add in another order for fewer rows, which bf16 logits of this size show by a whole unit.
    difference = float((own - ours).abs().mean() / own.mean())
    return difference <= max(1e-5, 4 * rounding[0])


def _others_reach(vlm: VLM, ids: list[Tensor], device: torch.device) -> bool:
    """Whether the states of the middle conversation have a gradient with respect to its neighbours' embeddings.

    A mixture of experts multiplies the tokens of an expert together, so a neighbour changes the rounding of others, but
    not what they depend on. Parameters that are spread over ranks cannot be asked this way.
    """
    begin, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    row, was_training = _row(ids, learned=False).to(device), _pause(vlm)
    try:
        with torch.enable_grad():
            embeds = vlm.embed(row).detach().requires_grad_()
            states = vlm.hidden(row, embeds)[0, begin:end].float()
            mix = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(device)
            (gradient,) = torch.autograd.grad((states * mix).sum(), embeds)
    finally:
        _resume(was_training)
    reached = gradient[0].abs().sum(-1) > 0
    assert reached[begin:end].any()
    return bool(reached[:begin].any() or reached[end:].any())


def chunk_for(vlm: VLM) -> int:
    """Tokens whose fp32 logits take about 256 MiB."""
    return max(64, 2**26 // len(embedding_table(vlm.language)))


def _random_ids(vlm: VLM, length: int, generator: torch.Generator) -> Tensor:
    rows = len(embedding_table(vlm.language))
    return torch.randint(rows, (length,), generator=generator, dtype=torch.int32)


def _row(ids: list[Tensor], *, learned: bool) -> Row:
    empty = np.empty((0, 3), dtype=np.int32)
    examples = [
        Example(part.numpy(), part.numpy() if learned else np.full(len(part), -100, np.int32), empty, 0, "probe")
        for part in ids
    ]
    return pack(examples, [], [], touch_vision=False)


def _states(model: nn.Module, ids: list[Tensor], device: torch.device) -> Tensor:
    return model(_row(ids, learned=False).to(device), want="states")[0]


def _pause(vlm: VLM) -> list[torch.nn.Module]:
    """Evaluation mode, so that dropout does not differ between two passes; returns what was training."""
    training = [module for module in vlm.modules() if module.training]
    vlm.eval()
    return training


def _resume(training: list[torch.nn.Module]) -> None:
    for module in training:
        module.training = True
