"""The parity table of the README: what an export says, beside what the trained model says.

python -m tests.bench.parity
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from mmit import config as schema
from mmit.export.write import export
from tests.export.models import MODELS, run_of, saved_model

LORA = schema.Lora(rank=4, alpha=8)
CASES = {name: (model, None, False) for name, model in MODELS.items()} | {
    "CLIP + llama, LoRA merged": (MODELS["CLIP + llama"], LORA, False),
    "CLIP + llama, LoRA kept": (MODELS["CLIP + llama"], LORA, True),
}


def main() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    print("| model | conversations | pictures | ids equal | greedy tokens equal | largest logit difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (model, lora, adapter) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            run = run_of(saved_model(model, lora=lora), Path(folder) / "run")
            found = export(run, Path(folder) / "out", adapter=adapter).parity
        print(
            f"| {name} | {found.conversations} | {found.pictures} | {found.ids} of {found.ids} "
            f"| {found.greedy_tokens} of {found.greedy_tokens} | {found.largest_difference:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
