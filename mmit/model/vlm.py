"""Encoder -> projector -> LLM -> losses: the glue, as one module whose forward is one packed row.

Letters: T tokens of the row, N pictures, S image spans, P tokens of a picture, D tower width, H LLM width, K supervised
tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mmit.config import ConfigError
from mmit.data.packing import Row
from mmit.model.vision import VisionTower


class VLM(nn.Module):
    """A vision tower and projector (both None for text only) before a causal LLM of transformers."""

    def __init__(self, vision: VisionTower | None, projector: nn.Module | None, language: PreTrainedModel) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.language = language
        self.chunk: int | None = None
        """Supervised tokens above which our own head makes the logits, so many at a time; None: never (`probes`)."""

    def forward(self, row: Row, *, want: Literal["losses", "states", "scores"] = "losses") -> Tensor:
        """The loss of each supervised token, `(K,)`, not reduced: -log p(target | what precedes it in its sample).

        Or the hidden states `(1, T, H)`, or the vocabulary scores at `row.predicts`, `(K, V)`.
        """
        embeds = self.embed(row)
        if want == "states":
            return self.hidden(row, embeds)
        if want == "scores":
            return self.language(**self._arguments(row, embeds), logits_to_keep=row.predicts).logits[0]
        if self.chunk is not None and len(row.predicts) > self.chunk:
            return self._chunked_losses(self.hidden(row, embeds)[0, row.predicts], row.targets)
        logits = self.language(**self._arguments(row, embeds), logits_to_keep=row.predicts).logits[0]
        return functional.cross_entropy(_at_least_fp32(logits), row.targets, reduction="none")

    def embed(self, row: Row) -> Tensor:
        """Input embeddings `(1, T, H)`: of the tokens, and of the pictures where these are shown."""
        embeds = cast(nn.Module, self.language.get_input_embeddings())(row.ids)
        if self.vision is None or self.projector is None:
            return embeds
        if len(row.pixels):
            features = self.projector(self.vision(row.pixels, row.keys))
            if row.image_tokens != len(row.shown) * features.shape[1] or features.shape[2] != embeds.shape[2]:
                raise ConfigError(
                    f"model.projector: {type(self.projector).__name__} makes {features.shape[1]} rows of width "
                    f"{features.shape[2]} of a picture; the language model is {embeds.shape[2]} wide, and "
                    f"{row.image_tokens} places were laid out for {len(row.shown)} pictures "
                    f"({', '.join(row.samples)}); mend its tokens_for or its forward"
                )
            return place_images(embeds, features[row.shown], row.is_image)
        if row.touch_vision:
            side = self.vision.side
            blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=row.ids.device)
            # Another rank's row shows a picture: the same modules must run here, or its collectives wait for ever.
            embeds = embeds + 0 * self.projector(self.vision(blank, (b"blank",))).sum().to(embeds.dtype)
        return embeds

    def hidden(self, row: Row, embeds: Tensor) -> Tensor:
        """Hidden states `(1, T, H)` as they enter the vocabulary projection."""
        return cast(nn.Module, self.language.get_decoder())(**self._arguments(row, embeds)).last_hidden_state

    def _arguments(self, row: Row, embeds: Tensor) -> dict[str, Tensor | int | bool | None]:
        return {
            "inputs_embeds": embeds,
            "position_ids": row.positions,
            # With a mask, or with a cache (the default, in training too), transformers ignores the restarts in
            # position_ids, and packed samples see each other, silently. Held by the isolation probe at each start.
            "attention_mask": None,
            "use_cache": False,
            "cu_seq_lens_q": row.boundaries,
            "cu_seq_lens_k": row.boundaries,
            "max_length_q": row.longest,
            "max_length_k": row.longest,
        }

    def _chunked_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Losses from `hidden` (K, H), with the logits of only `chunk` tokens alive at a time, backward included."""
        head = cast(nn.Module, self.language.get_output_embeddings())

        def losses(states: Tensor, wanted: Tensor) -> Tensor:
            return functional.cross_entropy(_at_least_fp32(head(states)), wanted, reduction="none")

        assert self.chunk is not None
        pieces = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        return torch.cat([cast(Tensor, checkpoint(losses, *piece, use_reentrant=False)) for piece in pieces])


def embedding_table(language: PreTrainedModel) -> Tensor:
    """The word embeddings `(V, H)`."""
    return cast(nn.Embedding, language.get_input_embeddings()).weight


def place_images(embeds: Tensor, features: Tensor, is_image: Tensor) -> Tensor:
    """Token embeddings (1, T, H) with the rows that `is_image` (1, T) marks replaced by `features` (S, P, H) in order.

    `is_image` must mark exactly S * P positions; `embed` has checked that.
    """
    return embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
