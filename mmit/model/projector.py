"""Projectors: from features of a picture (N, P, D) to rows among the word embeddings (N, P', H).

A projector says how many rows it makes of P features before it is built, because the sequence is laid out before any
pixel is seen. N counts pictures, P and P' tokens of a picture, D and H are the widths of the tower and the LLM.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mmit.config import ConfigError, imported
from mmit.config import Projector as ProjectorConfig


class Projector(nn.Module):
    """What a user's own derives from, built as `Name(dim_in, dim_out)`: `forward` and, if it merges, `tokens_for`."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.dim_in = dim_in
        self.dim_out = dim_out

    @classmethod
    def tokens_for(cls, tokens: int) -> int:
        """P' of P: the rows one picture of `tokens` features becomes."""
        return tokens

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, P, D) as rows (N, P', H)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(features)")


class MlpProjector(Projector):
    """Linear, then (GELU, linear) `depth` - 1 times, every hidden layer as wide as the LLM.

    Depth 2 is the `mlp2x_gelu` of LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744, section 3.2), and so the only depth
    that transformers' `LlavaMultiModalProjector` can hold. Depth 1 is the linear projector of LLaVA (arXiv:2304.08485).
    """

    def __init__(self, dim_in: int, dim_out: int, *, depth: int = 2) -> None:
        super().__init__(dim_in, dim_out)
        self.linears = nn.ModuleList(nn.Linear(dim_out if number else dim_in, dim_out) for number in range(depth))

    def forward(self, features: Tensor) -> Tensor:
        first, *rest = self.linears
        hidden = first(features)
        for linear in rest:
            hidden = linear(nn.functional.gelu(hidden))
        return hidden


class LinearProjector(MlpProjector):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, depth=1)


kinds: dict[str, type[Projector]] = {"linear": LinearProjector, "mlp": MlpProjector}


def projector_class(spec: ProjectorConfig) -> type[Projector]:
    """The class `kind` names: one of `kinds`, or a user's own `package.module:Name`."""
    if spec.kind in kinds:
        return kinds[spec.kind]
    found = imported(spec.kind, "model.projector.kind", kinds)
    if not (isinstance(found, type) and issubclass(found, Projector)):
        raise ConfigError(
            f"model.projector.kind: {spec.kind!r} is {found!r}; write a class that derives from "
            f"mmit.model.projector.Projector"
        )
    return found


def build_projector(spec: ProjectorConfig, dim_in: int, dim_out: int) -> Projector:
    """A freshly initialised projector; `init: feature_statistics` is a second step, once features can be had."""
    kind = projector_class(spec)
    if kind is MlpProjector:
        return MlpProjector(dim_in, dim_out, depth=spec.depth)
    return kind(dim_in, dim_out)


@torch.no_grad()
def feature_statistics_(
    projector: Projector, features: Tensor, embedding_rms: float, *, generator: torch.Generator | None = None
) -> None:
    """Set the projector so that its rows for `features` (N, P, D) are centred and have the RMS of word embeddings.

    The first linear whitens its input, so that no direction of the features drowns the others: its pre-activations
    have mean 0 and covariance I (where H > D: unit variance each). Later linears are random rotations, centred, and
    the last one is scaled to `embedding_rms`, the root mean square over all entries of the word embeddings. Few
    features whiten less (`_whitening`). `generator` (CPU) draws the rotations; the same state and features give the
    same weights.
    """
    if not isinstance(projector, MlpProjector):
        raise ConfigError(
            f"model.projector.init: feature_statistics knows linear and mlp projectors, "
            f"found {type(projector).__name__}; write init: default"
        )
    rows = features.detach().reshape(-1, features.shape[-1]).to("cpu", torch.float64)
    if len(rows) < 2 or not bool(torch.isfinite(rows).all()):
        raise ConfigError(
            f"model.projector.init: feature_statistics needs finite features of at least two tokens, "
            f"found {tuple(features.shape)}; write init: default or give more pictures"
        )
    if bool((rows == rows[0]).all()):
        raise ConfigError(
            "model.projector.init: feature_statistics found the same features in every token; "
            "write init: default, or give pictures that differ"
        )
    *hidden, last = (cast(nn.Linear, linear) for linear in projector.linears)
    for number, linear in enumerate((*hidden, last)):
        center = rows.mean(0)
        weight = _rotation(linear.out_features, linear.in_features, generator)
        if number == 0:
            weight = weight @ _whitening(rows - center)
        output = (rows - center) @ weight.T
        rms = output.square().mean().sqrt()
        if linear is last:
            weight = weight * (embedding_rms / rms)
        elif number > 0:
            weight = weight / rms
        linear.weight.copy_(weight)
        linear.bias.copy_(-weight @ center)
        rows = nn.functional.gelu((rows - center) @ weight.T)


def _whitening(centred: Tensor) -> Tensor:
    """The symmetric inverse root (D, D) of the covariance of `centred` rows (M, D), mixed with its mean variance.

    The smallest variances of a sample are too small, the more so the nearer D comes to M (Marchenko and Pastur 1967: by
    (1 - sqrt(D / M))^2), and dividing by them would blow up what other pictures show there. The share of I is therefore
    (D / M)^3: all of it for M <= D, 1e-3 at M = 10 D, never under 1e-5. The power is a choice, not a result.
    """
    count, dim = centred.shape
    covariance = centred.T @ centred / count
    share = min(1.0, max(1e-5, (dim / count) ** 3))
    values, vectors = torch.linalg.eigh(covariance)
    values = (1 - share) * values.clamp(min=0) + share * values.mean()
    return (vectors * values.rsqrt()) @ vectors.T


def _rotation(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """A random (rows, columns) matrix with rows of length 1: orthogonal to each other where rows <= columns."""
    drawn = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64)
    orthogonal = torch.linalg.qr(drawn).Q
    weight = orthogonal.T if rows <= columns else orthogonal
    return weight / weight.norm(dim=1, keepdim=True)
