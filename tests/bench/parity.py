"""The parity table of the README: what an export says, beside what the trained model says.

Ids are those of 300 conversations with histories; logits and greedy tokens those of the probes of every export.

python -m tests.bench.parity
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoProcessor, AutoTokenizer
from transformers.utils import logging

from mmit import config as schema
from mmit.export.verify import processed, rendered
from mmit.export.write import export
from tests.export.conversations import conversations
from tests.export.models import MODELS, run_of, saved_model

LORA = schema.Lora(rank=4, alpha=8)
CASES = {name: (model, None, False) for name, model in MODELS.items()} | {
    "CLIP + llama, LoRA merged": (MODELS["CLIP + llama"], LORA, False),
    "CLIP + llama, LoRA kept": (MODELS["CLIP + llama"], LORA, True),
}


def main() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    print("| model | conversations with our ids | greedy tokens equal | largest logit difference |")
    print("| --- | --- | --- | --- |")
    asked = conversations(1500)
    for name, (model, lora, adapter) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            saved = saved_model(model, lora=lora)
            run, sees = run_of(saved, Path(folder) / "run"), saved.fit is not None
            found = export(run, Path(folder) / "out", adapter=adapter).parity
            speaker = (AutoProcessor if sees else AutoTokenizer).from_pretrained(Path(folder) / "out")
        read = [item for item in asked if sees or not item.pictures][:300]
        equal = [
            rendered(saved, item)[0].tolist() == processed(speaker, item)["input_ids"][0].tolist() for item in read
        ]
        print(
            f"| {name} | {sum(equal)} of {len(equal)} "
            f"| {found.greedy_tokens} of {found.greedy_tokens} | {found.largest_difference:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
