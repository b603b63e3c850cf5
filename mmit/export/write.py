"""`mmit export`: a finished run as a folder that others load, verified before it gets its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from huggingface_hub import HfApi, save_torch_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from mmit.config import ConfigError, suggest
from mmit.data.provenance import taken
from mmit.export.adapter import check_adapter, write_adapter
from mmit.export.card import HUB_NAME, model_card, without_places
from mmit.export.gguf import language_difference, write_gguf
from mmit.export.llava import (
    ExportError,
    generation_config,
    language_tensors,
    llava_model,
    llava_tensors,
    published_names,
)
from mmit.export.processor import processor, speaking_tokenizer
from mmit.export.verify import (
    TOLERANCE,
    Answers,
    Conversation,
    Parity,
    Said,
    check_answers,
    compare,
    load_export,
    probes,
    said,
    said_by_export,
)
from mmit.model.build import merge_lora
from mmit.model.pretrained import bars_on_terminals
from mmit.model.saved import Saved, load_saved, run_folder, settings_of

RECORD = "mmit.json"
FORMAT = 1
ADAPTER = "adapter"
HISTORY = ("config.yaml", "metrics.jsonl")
SHARD = "5GB"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Format = Literal["transformers", "mmit", "gguf"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Exported:
    folder: Path
    parity: Parity


@bars_on_terminals()
def export(
    run: Path,
    out: Path,
    *,
    format: Format = "transformers",
    dtype: Dtype = "float32",
    adapter: bool = False,
    needs_adapter: bool = False,
    more: Sequence[Conversation] = (),
    answers: Answers | None = None,
    repository: str | None = None,
) -> Exported:
    """Writes `out`, loads it again and compares; `out` appears whole and equal, or not at all.

    What is compared are probe conversations, and those in `more`; and every tensor with the one it was written from.
    An export for transformers must also give the `answers` that the run gave.
    `repository` is what card and adapter call it, where it will be pushed to one.

    `adapter` keeps a LoRA beside its base, in `out/adapter`, instead of merging it. With another `dtype` the model is
    rounded first, and it is the rounded model that the export must equal. ConfigError for what cannot be read,
    ExportError for what cannot be written in this format or came out different.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; remove it, or name another folder")
    if format == "gguf" and adapter:
        raise ConfigError("--format gguf: writes merged weights; leave out --adapter")
    if format == "mmit" and (adapter or dtype != "float32"):
        raise ConfigError("--format mmit: writes merged weights as they were trained; leave out --adapter and --dtype")
    saved = load_saved(run)
    if (adapter or needs_adapter) and saved.assembly.adapter is None:
        raise ConfigError(f"{run}: its last stage trained no LoRA, so there is no adapter to keep or to merge")
    if adapter:
        check_adapter(saved.assembly)
    conversations = [*probes(saved), *more]
    expected = [said(saved, conversation) for conversation in conversations]
    if saved.assembly.adapter is not None and not adapter:
        merge_lora(saved.assembly)
        merged = [said(saved, conversation) for conversation in conversations]
        compare(expected, merged, saved, f"{run}: merging its adapter")
        expected = merged
    if dtype != "float32":
        vlm = saved.assembly.vlm
        above = vlm.vision.above[0] if vlm.vision is not None else None  # is written too
        for parameter in [*vlm.parameters(), *(above.parameters() if above is not None else ())]:
            parameter.data = parameter.data.to(DTYPES[dtype]).float()
        expected = [said(saved, conversation) for conversation in conversations]

    temporary = out.with_name(out.name + ".mmit-tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if format == "mmit":
            write_run(saved, temporary)
            for name in HISTORY:
                if (file := run_folder(run) / name).exists():
                    shutil.copy(file, temporary / name)
            again = load_saved(temporary)
            found = [said(again, conversation) for conversation in conversations]
            parity = compare(expected, found, saved, str(out))
        elif format == "gguf":
            write_gguf(saved, temporary, dtype)
            parity = _read_back(saved, temporary, expected)
        else:
            _write(saved, temporary, dtype)
            if adapter:
                write_adapter(saved.assembly, temporary / ADAPTER, base=repository or out.name)
            place = temporary / ADAPTER if adapter else None
            multimodal = saved.fit is not None
            own = llava_tensors(saved.assembly) if multimodal else language_tensors(saved.assembly.vlm.language)
            model, speaker = load_export(temporary, multimodal=multimodal, adapter=place, tensors=own)
            found = [said_by_export(model, speaker, conversation) for conversation in conversations]
            parity = compare(expected, found, saved, str(out))
            if answers is not None:
                parity = replace(parity, answers=check_answers(model, speaker, answers, saved, str(out)))
        _write_record(run, saved, temporary / RECORD, parity)
        told = {"name": repository or out.name, "place": repository or "PATH"}
        card = model_card(run, saved, parity, format=format, dtype=dtype, adapter=adapter, **told)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.rename(out)  # an empty folder of that name is replaced
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(out, parity)


def merge(run: Path, out: Path) -> Exported:
    """The run with its adapter merged, as a folder of mmit; ConfigError if it has no adapter."""
    return export(run, out, format="mmit", needs_adapter=True)


def format_named(name: str) -> Format:
    return _known(name, get_args(Format), "--format")


def dtype_named(name: str) -> Dtype:
    return _known(name, get_args(Dtype), "--dtype")


def _known(name: str, choices: tuple[Any, ...], option: str) -> Any:
    if name not in choices:
        raise ConfigError(f"{option}: {name!r}; {suggest(name, choices)}")
    return name


def check_push(repository: str) -> None:
    """ConfigError, before the minutes of an export, unless `repository` can be a name and the Hub knows who we are."""
    if not HUB_NAME.fullmatch(repository):
        raise ConfigError(f"--push: {repository!r} is no name of a repository; write OWNER/NAME")
    try:
        HfApi().whoami()
    except Exception as error:  # of whichever HTTP library the client stands on
        raise ConfigError(
            f"--push: the Hub does not let us in ({type(error).__name__}); log in with `hf auth login` or set "
            f"HF_TOKEN, and see that this machine reaches it"
        ) from None


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Uploads an exported folder to the Hub as `repository` (OWNER/NAME), made if need be; returns its address."""
    hub = HfApi()
    try:
        address = hub.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export from mmit")
    except Exception as error:  # as above; a card that the Hub refuses is a ValueError
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"--push: {repository} was not written in full ({type(error).__name__}: {reason}); the export is whole in "
            f"{folder}: once mended, `hf upload {repository} {folder}` pushes it"
        ) from None
    return str(address)


def _write(saved: Saved, folder: Path, dtype: Dtype) -> None:
    """Model, processor and generation settings, in files as they are found on the Hub."""
    assembly = saved.assembly
    model: PreTrainedModel
    if saved.fit is None:
        tokenizer = speaking_tokenizer(saved)
        tokenizer.save_pretrained(folder)
        model = _plain_language(assembly.vlm.language)
        model.generation_config = generation_config(tokenizer, saved.chat)
        cast(nn.Module, model).to(DTYPES[dtype])
        model.save_pretrained(folder, max_shard_size=SHARD)
        return
    speaker = processor(saved)
    speaker.save_pretrained(folder)
    cast(BaseImageProcessor, speaker.image_processor).save_pretrained(folder)  # where vLLM and transformers 4 look
    model = llava_model(assembly, image_tokens=saved.image_tokens)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = DTYPES[dtype]
    model.config.save_pretrained(folder)
    generation_config(cast(Any, speaker).tokenizer, saved.chat).save_pretrained(folder)
    tensors = published_names(model.state_dict(), tied=model.config.tie_word_embeddings)
    rounded = {name: value.to(DTYPES[dtype]).contiguous() for name, value in tensors.items()}
    save_torch_state_dict(rounded, folder, max_shard_size=SHARD, metadata={"format": "pt"})


def _read_back(saved: Saved, folder: Path, expected: Sequence[Said]) -> Parity:
    """The language part as transformers' GGUF reader has it, on our ids; ExportError if its logits differ."""
    difference, size = language_difference(saved, folder, [item.ids for item in expected])
    if not difference <= TOLERANCE * max(1.0, size):
        raise ExportError(f"{folder}: logits of the language model differ by {difference:.1e} (largest {size:.3g})")
    return Parity(len(expected), 0, 0, difference, size, 0)


def _plain_language(language: PreTrainedModel) -> PreTrainedModel:
    """The language model without an adapter beside its weights, sharing them."""
    with torch.device("meta"):
        plain = type(language)(language.config)
    plain.load_state_dict(language_tensors(language), strict=True, assign=True)
    plain.tie_weights()
    return plain


def write_run(saved: Saved, folder: Path) -> None:
    """What `load_saved` reads, as a run's `final/`."""
    assembly = saved.assembly
    kept = assembly.kept()
    tensors = {name: value.detach().contiguous() for name, value in assembly.vlm.named_parameters() if name in kept}
    save_file(tensors, folder / "model.safetensors")
    record = {**saved.record, "lora": assembly.lora.model_dump() if assembly.lora is not None else None}
    (folder / "model.json").write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    assembly.tokenizer.save_pretrained(folder / "tokenizer")
    assembly.vlm.language.config.save_pretrained(folder / "language")


def _write_record(run: Path, saved: Saved, file: Path, parity: Parity) -> None:
    """What transformers' files do not say, for a later `model: {from: FOLDER}`; and how the export was checked."""
    record = {
        "format": FORMAT,
        "mmit": version("mmit"),
        "chat": asdict(saved.chat.format),
        "placeholder": saved.chat.placeholder,
        "pictures": saved.fit.policy if saved.fit is not None else None,
        "sources": without_places(saved.record["sources"]),
        "data": taken(settings["stages"]) if (settings := settings_of(run)) is not None else [],
        "parity": asdict(parity),
    }
    file.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
