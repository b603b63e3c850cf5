"""Laws of the projectors: the same numbers as transformers' own, and statistics that come out as promised."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mmit.config import ConfigError
from mmit.config import Projector as ProjectorConfig
from mmit.model.projector import (
    LinearProjector,
    MlpProjector,
    Projector,
    build_projector,
    feature_statistics_,
    kinds,
    projector_class,
)


def features_of(pictures: int, tokens: int, dim: int, *, seed: int = 0) -> torch.Tensor:
    """Correlated features (pictures, tokens, dim) with a large common offset, as real towers give."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    mixing = torch.logspace(0, -1, dim)[:, None] * turn
    return torch.randn(pictures, tokens, dim, generator=generator) @ mixing + 5 * torch.randn(dim, generator=generator)


def first_activations(projector: MlpProjector, features: torch.Tensor) -> torch.Tensor:
    return projector.linears[0](features).reshape(-1, projector.dim_out).double()


@pytest.mark.parametrize("dim_in", [24, 8])
def test_depth_two_is_the_projector_of_transformers_llava(dim_in: int) -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=dim_in, intermediate_size=8, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=16, intermediate_size=8, num_attention_heads=2, vocab_size=9),
    )
    theirs = LlavaMultiModalProjector(config)
    ours = build_projector(ProjectorConfig(kind="mlp", depth=2), dim_in, 16)
    renamed = {"linears.0": "linear_1", "linears.1": "linear_2"}
    theirs.load_state_dict(
        {
            name.replace(old, new): v
            for name, v in ours.state_dict().items()
            for old, new in renamed.items()
            if old in name
        }
    )
    features = torch.randn(3, 5, dim_in)
    torch.testing.assert_close(ours(features), theirs(features), rtol=0, atol=0)


def test_linear_is_one_matrix() -> None:
    projector = build_projector(ProjectorConfig(kind="linear"), 6, 4)
    features = torch.randn(2, 3, 6)
    weight, bias = projector.parameters()
    torch.testing.assert_close(projector(features), torch.einsum("npd,hd->nph", features, weight) + bias)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_mlp_has_as_many_linears_as_its_depth_with_gelu_between(depth: int) -> None:
    projector = build_projector(ProjectorConfig(kind="mlp", depth=depth), 6, 4)
    layers: list[torch.nn.Module] = []
    for module in projector.modules():
        if isinstance(module, torch.nn.Linear):
            layers += [torch.nn.GELU(), module]
    assert sum(isinstance(layer, torch.nn.Linear) for layer in layers) == depth
    features = torch.randn(2, 3, 6)
    torch.testing.assert_close(projector(features), torch.nn.Sequential(*layers[1:])(features))


@pytest.mark.parametrize("kind", sorted(kinds))
def test_a_projector_makes_the_tokens_it_promised_before_it_was_built(kind: str) -> None:
    spec = ProjectorConfig(kind=kind)
    promised = projector_class(spec).tokens_for(7)
    assert build_projector(spec, 6, 4)(torch.randn(2, 7, 6)).shape == (2, promised, 4)


class HalvingProjector(Projector):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out)
        self.linear = torch.nn.Linear(2 * dim_in, dim_out)

    @classmethod
    def tokens_for(cls, tokens: int) -> int:
        return tokens // 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features.reshape(len(features), -1, 2 * self.dim_in))


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("own_projectors")
    module.__dict__.update(Halving=HalvingProjector, NotOne=int)
    monkeypatch.setitem(sys.modules, "own_projectors", module)
    return "own_projectors"


def test_a_projector_of_ones_own_is_named_by_module(own_module: str) -> None:
    spec = ProjectorConfig(kind=f"{own_module}:Halving")
    assert projector_class(spec).tokens_for(6) == 3
    assert build_projector(spec, 5, 4)(torch.randn(2, 6, 5)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("mpl", "linear, mlp"),
        ("no_such_module_here:Name", "no_such_module_here"),
        ("own_projectors:Missing", "own_projectors holds no Missing"),
        ("own_projectors:NotOne", "derives from mmit.model.projector.Projector"),
    ],
)
def test_an_unknown_kind_says_what_to_write(own_module: str, kind: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.projector\.kind") as caught:
        build_projector(ProjectorConfig(kind=kind), 6, 4)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_whitened_activations_are_centred_with_covariance_one(kind: str) -> None:
    features = features_of(64, 100, 24)
    projector = build_projector(ProjectorConfig(kind=kind), 24, 12)
    assert isinstance(projector, MlpProjector)
    feature_statistics_(projector, features, 1.0, generator=torch.Generator().manual_seed(1))
    activations = first_activations(projector, features)
    torch.testing.assert_close(activations.mean(0), torch.zeros(12).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cov(activations.T), torch.eye(12).double(), rtol=0, atol=0.02)


def test_a_wider_hidden_layer_gets_unit_variance_in_every_unit() -> None:
    features = features_of(64, 100, 24)
    projector = MlpProjector(24, 60)
    feature_statistics_(projector, features, 1.0, generator=torch.Generator().manual_seed(1))
    variances = first_activations(projector, features).var(0)
    torch.testing.assert_close(variances, torch.ones(60).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("samples", [64, 1])
def test_outputs_are_centred_with_the_rms_of_the_word_embeddings(depth: int, samples: int) -> None:
    features = features_of(samples, 16, 24)
    projector = MlpProjector(24, 12, depth=depth)
    feature_statistics_(projector, features, 0.037, generator=torch.Generator().manual_seed(1))
    outputs = projector(features).reshape(-1, 12)
    assert outputs.square().mean().sqrt().item() == pytest.approx(0.037, rel=1e-4)
    torch.testing.assert_close(outputs.mean(0), torch.zeros(12), rtol=0, atol=1e-5)


def test_few_samples_shrink_the_covariance_so_that_unseen_directions_stay_bounded() -> None:
    features = features_of(40, 10, 24)
    projector = MlpProjector(24, 24)
    feature_statistics_(projector, features[:1], 1.0, generator=torch.Generator().manual_seed(1))
    seen, unseen = first_activations(projector, features[:1]), first_activations(projector, features[1:])
    assert unseen.var() < 3 * seen.var()


def test_the_same_generator_gives_the_same_weights_and_leaves_the_global_one_alone() -> None:
    features = features_of(4, 16, 8)
    made = []
    state = torch.get_rng_state()
    for _ in range(2):
        projector = MlpProjector(8, 8)
        torch.set_rng_state(state)
        feature_statistics_(projector, features, 1.0, generator=torch.Generator().manual_seed(3))
        assert torch.equal(torch.get_rng_state(), state)
        made.append(projector.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize(
    ("projector", "features"),
    [
        (HalvingProjector(8, 8), torch.randn(2, 4, 8)),
        (LinearProjector(8, 8), torch.full((2, 4, 8), float("nan"))),
        (LinearProjector(8, 8), torch.ones(2, 4, 8)),
        (LinearProjector(8, 8), torch.randn(1, 1, 8)),
    ],
)
def test_statistics_that_cannot_be_had_are_refused(projector: Projector, features: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="write init: default"):
        feature_statistics_(projector, features, 1.0)
