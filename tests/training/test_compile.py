"""Laws of `compile: true`: the same step, from few graphs, however many ranks compute it and whatever interrupts it."""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from mmit.model.layers import compile_layers
from mmit.training import stage as stages
from tests.training.ranks import assert_same_losses, run_ranks
from tests.training.test_ranks import two_stages
from tests.training.test_resume import OFTEN, assert_same_run, wait_for_steps
from tests.training.tiny import altered, config, ended, metrics, run, said, stage, start

LORA = {"projector": {"lr": 1e-3}, "language": {"lr": 1e-3, "lora": {"rank": 2, "alpha": 4}}}
ASKED = {"holdout": {"fraction": 0.3, "by": "sample"}, "every": 2, "generate": 3}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_all_layers_and_lengths_share_a_graph_also_in_evaluation(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    def counted(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        with (tmp_path / "graphs").open("a") as file:  # the run is a fork
            file.write("graph\n")
        return graph.forward

    monkeypatch.setattr(stages, "compile_layers", functools.partial(compile_layers, backend=counted))
    only = stage("sft", data, LORA, steps=8, gradient_checkpointing=checkpointing)
    plain = config(tmp_path / "plain", only, eval=ASKED)
    compiled = run(altered(plain, tmp_path / "compiled", compile=True))
    assert metrics(compiled) == metrics(run(plain))
    assert metrics(compiled, evaluations=True) == metrics(Path(plain.output), evaluations=True)
    assert (tmp_path / "graphs").read_text().count("graph") <= 3


def test_where_nothing_compiles_the_key_is_named(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "graphs"))
    only = stage("sft", texts, {"language": {"lr": 1e-3}}, steps=2)
    wanted = config(tmp_path / "run", only, vision=None, compile=True)
    assert ended(start(wanted)) == 2
    assert "compile: torch cannot compile this model here" in said(wanted)
    assert "Traceback" not in said(wanted)


def test_a_backward_that_does_not_compile_is_told_as_the_key_too(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probes compute no gradients: the first step is where it is met."""

    def plain(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    def bad(*_: Any) -> Any:
        raise RuntimeError("no kernel for this gradient")

    backend = aot_autograd(fw_compiler=plain, bw_compiler=bad, inference_compiler=plain)
    monkeypatch.setattr(stages, "compile_layers", functools.partial(compile_layers, backend=backend))
    only = stage("sft", texts, {"language": {"lr": 1e-3}}, steps=2)
    wanted = config(tmp_path / "run", only, vision=None, compile=True)
    assert ended(start(wanted)) == 2, said(wanted)
    assert "sft: 2 steps" in said(wanted)
    assert re.search("compile: torch cannot compile .*no kernel for this gradient.*write compile: false", said(wanted))
    assert "Traceback" not in said(wanted)
    run(altered(wanted, tmp_path / "run", compile=False))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one", "ddp", "fsdp"])
def test_compiled_layers_give_the_losses_of_the_others(how: str, tmp_path: Path, data: Path) -> None:
    plain = run(two_stages(tmp_path / "plain", data, "lora"))
    wanted = two_stages(tmp_path / "run", data, "lora", compile=True, **({} if how == "one" else {"parallel": how}))
    assert_same_losses(plain, run(wanted) if how == "one" else run_ranks(wanted, 2), relative=1e-6)


@pytest.mark.slow
def test_a_kill_changes_no_number_of_a_compiled_run(tmp_path: Path, data: Path) -> None:
    straight = run(two_stages(tmp_path / "straight", data, "lora", compile=True, save=OFTEN))
    wanted = two_stages(tmp_path / "killed", data, "lora", compile=True, save=OFTEN)
    process = start(wanted)
    wait_for_steps(wanted, process, 5)
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    assert_same_run(straight, run(wanted))
