"""The device of every tensor, held without a GPU: the meta device in its place, where a stray CPU tensor shows, and so
does each time that the host waits for a value."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmit.config import parse_config
from mmit.inference.conversation import conversation
from mmit.inference.generate import Model, Sampling, load
from mmit.model.build import set_modes, set_trained
from mmit.training import start
from mmit.training.answers import answers, held_out_questions
from mmit.training.checks import finite_norm
from mmit.training.loop import _forward_backward
from mmit.training.optim import build_optimizer
from mmit.training.runlog import record_of
from tests.training.tiny import assembled, config, mixed, opened, shards, stage

GPU, CPU = torch.device("meta"), torch.device("cpu")
ONE: Any = SimpleNamespace(
    device=GPU,
    process_index=0,
    num_processes=1,
    is_main_process=True,
    autocast=nullcontext,
    reduce=lambda tensor: tensor,
)
PARTS = {"vision": {"lr": 1e-3}, "projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}
ADAPTED = {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3, "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}}


class Watched(TorchDispatchMode):
    """Fails where tensors of both devices meet, and counts what the host waits for. It is told zeros, and that nothing
    is so, but from question `so_after` on."""

    def __init__(self, so_after: float = float("inf")) -> None:
        super().__init__()
        self.so_after = so_after
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if tensor.device == GPU]
        name = func.name()
        if name == "aten::_local_scalar_dense" and here:
            self.waits["value"] += 1
            if here[0].dtype == torch.bool:
                return self.waits["value"] > self.so_after
            return torch.zeros((), dtype=here[0].dtype, device=CPU).item()
        if name == "aten::_to_copy" and here and torch.device(options.get("device") or GPU) == CPU:
            self.waits["copy"] += 1
            return torch.zeros(here[0].shape, dtype=options.get("dtype") or here[0].dtype, device=CPU)
        if name not in ("aten::_to_copy", "aten::copy_") and here:
            strays = [tuple(tensor.shape) for tensor in tensors if tensor.device != GPU and tensor.ndim]
            assert not strays, f"{name}: a tensor of {strays} is on the CPU"
        return func(*args, **options)


@pytest.mark.parametrize("trained", [PARTS, ADAPTED], ids=["whole", "lora"])
def test_a_step_lies_on_one_device_and_waits_for_it_thrice_and_once_a_row(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    """For the norm, for whether all is finite, and for the losses to tell; transformers asks each row whether it is
    packed."""
    only = stage("s", shards(tmp_path / "data", mixed(20)), trained, row_tokens=200)
    wanted = config(tmp_path / "run", only)
    assembly = assembled(wanted)
    data = opened(wanted, assembly)
    settings = wanted.stages[0]
    set_trained(assembly, settings.train, trained_dtype=torch.float32, frozen_dtype=torch.float32)
    set_modes(assembly, settings.train, gradient_checkpointing=True)
    assembly.vlm.to(GPU).chunk = 8
    optimizer = build_optimizer(assembly, settings)
    step = data.training[0]
    rows = len(step.rows)
    assert rows > 1
    with Watched(so_after=rows) as watched:
        sums: Any = _forward_backward(wanted, assembly.vlm, step, 10, ONE, 1, stopping=lambda: False)
        finite_norm(optimizer, sums, step, settings)
        optimizer.step()
        record_of(settings, step, sums, data)
    assert watched.waits == {"value": rows + 2, "copy": 1}


def test_the_features_a_projector_starts_from_are_computed_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = config(tmp_path / "run", stage("s", shards(tmp_path / "data", mixed(20)), PARTS)).model_dump(mode="json")
    tree["model"]["projector"]["init"] = "feature_statistics"
    wanted = parse_config(tree, "test")
    assembly = assembled(wanted, dtype=torch.float32)
    found: list[Tensor] = []
    monkeypatch.setattr(start, "feature_statistics_", lambda _projector, features, *_, **__: found.append(features))
    with Watched() as watched:
        start.initialise_projector(wanted, assembly, opened(wanted, assembly).training, GPU)
    assert watched.waits["copy"] > 1  # the features, and the tower as it goes back
    assert {value.device for value in [*found, *assembly.vlm.state_dict().values()]} == {CPU}


def test_held_out_questions_are_answered_on_one_device_with_two_waits_a_token(tmp_path: Path) -> None:
    only = stage("s", shards(tmp_path / "data", mixed(20)), PARTS)
    wanted = config(tmp_path / "run", only, eval={"holdout": {"fraction": 0.5, "by": "sample"}})
    assembly = assembled(wanted)
    held_out = opened(wanted, assembly).held_out
    assert held_out is not None
    asked = held_out_questions(held_out, 4)
    chat = held_out.encoders[0].rendering.chat
    assembly.vlm.to(GPU).eval()
    with Watched() as watched, torch.no_grad():
        said = answers(assembly.vlm, asked, chat, ONE, row_tokens=4096, max_new_tokens=3, stopping=lambda: False)
    assert said is not None
    assert len(said) == 4
    assert watched.waits == {"value": 3, "copy": 3}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_answer_is_made_on_one_device(temperature: float, tiny_run: Path, tmp_path: Path) -> None:
    saved = load(tiny_run, device="cpu", cache=tmp_path).saved
    model = Model(saved, run=tiny_run, cache=tmp_path, device=GPU, dtype=torch.bfloat16)
    asked = [conversation("what?", [Image.new("RGB", (40, 30))]), conversation("and longer, without a picture?")]
    with Watched(so_after=6) as watched:
        found = model.generate(asked, Sampling(8, temperature=temperature, top_p=0.9))
    assert [set(ids) for ids in found] == [{0}, {0}]
    assert watched.waits["copy"] == 1
