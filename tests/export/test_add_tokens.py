"""`model.add_tokens`: rows that train, beside a LoRA too, and are there wherever the model goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmit import api
from mmit import config as schema
from mmit.config import Config, ConfigError, parse_config
from mmit.export.write import export
from mmit.model.build import assemble
from mmit.model.saved import load_saved
from tests.export.models import LLAMA

TOKENS = ["<|turn|>", "<|over|>"]
FORMAT = "tests.export.test_add_tokens:TURNS"


def turns() -> Any:
    from mmit.data.chat import ChatFormat

    return ChatFormat("turns", user=("<|turn|>", ""), assistant=("<|turn|>", ""), stop="<|over|>", begin=False)


TURNS = turns()


def config_for(folder: Path, *, tied: bool, lora: bool) -> Config:
    language = {"lr": 1e-2} | ({"lora": {"rank": 2, "alpha": 4}} if lora else {})
    tree = {
        "output": str(folder / "run"),
        "model": {
            "language": {"random": LLAMA | {"tie_word_embeddings": tied}},
            "add_tokens": TOKENS,
            "chat": FORMAT,
        },
        "stages": [
            {
                "name": "sft",
                "data": [{"synthetic": "shapes", "options": {"count": 24}}],
                "train": {"language": language},
                "batch_size": 8,
                "weight_decay": 0.1,
            }
        ],
        **{"workers": 0, "cache": str(folder / "cache"), "threads": 1, "device": "cpu"},
    }
    return parse_config(tree, "test")


@pytest.mark.parametrize("tied", [True, False])
def test_beside_a_lora_the_new_rows_train_and_the_old_keep_their_bits(tied: bool, tmp_path: Path) -> None:
    config = config_for(tmp_path, tied=tied, lora=True)
    config = config.model_copy(update={"stages": [text_stage(config, tmp_path)]})
    start = assemble(config.model, seed=config.seed).vlm.language
    api.train(config)
    saved = load_saved(tmp_path / "run")
    ids = list(saved.assembly.added_tokens)
    assert len(ids) == 2
    for table in ("get_input_embeddings", "get_output_embeddings"):
        before = getattr(start, table)().weight
        after = getattr(saved.assembly.vlm.language, table)().weight
        others = [row for row in range(len(before)) if row not in ids]
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[ids], after[ids])
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.parity.largest_difference <= 1e-5
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(TOKENS) == ids
    exported = model.get_input_embeddings().weight[ids]
    assert torch.equal(exported, saved.assembly.vlm.language.get_input_embeddings().weight[ids])


def test_a_token_that_the_data_never_hold_does_not_stop_the_run(tmp_path: Path) -> None:
    """Beside a LoRA its row is all that trains of the embeddings, and rows that no step reads get no gradient."""
    config = config_for(tmp_path, tied=False, lora=True)
    model = config.model.model_copy(update={"chat": "auto"})
    final = api.train(config.model_copy(update={"model": model, "stages": [text_stage(config, tmp_path)]}))
    assert load_saved(final).assembly.added_tokens


def text_stage(config: Config, folder: Path) -> schema.Stage:
    """The stage on texts alone."""
    import json

    file = folder / "texts.json"
    file.write_text(json.dumps([{"instruction": f"Say {n}.", "input": "", "output": f"{n} it is."} for n in range(24)]))
    source = schema.Source.model_validate({"alpaca": str(file)})
    return config.stages[0].model_copy(update={"data": [source]})


def test_a_token_the_tokenizer_has_is_refused() -> None:
    model = schema.Model.model_validate({"language": {"random": LLAMA}, "add_tokens": ["<|im_end|>"]})
    with pytest.raises(ConfigError, match=r"model\.add_tokens: <\|im_end\|>: is a token already"):
        assemble(model, seed=0)
