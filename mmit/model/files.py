"""Tensors in files, and where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file, extract_commit_hash

from mmit.config import ConfigError
from mmit.data.cache import RecordCache


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (FileNotFoundError, SafetensorError) as error:
        raise ConfigError(f"{file}: missing, cut or damaged ({error}); copy it again from where it was made") from None


def split_revision(name: str) -> tuple[str, str | None]:
    """Name and revision of a Hub model that is written `name@revision`; a folder, or a name alone, has none."""
    base, at, revision = name.rpartition("@")
    return (base, revision) if at and base and not Path(name).exists() else (name, None)


def located(name: str) -> dict[str, str]:
    """What the loaders of transformers take for `name`, or `name@revision`."""
    base, revision = split_revision(name)
    return {"pretrained_model_name_or_path": base} | ({"revision": revision} if revision is not None else {})


def revision_of(name: str) -> str | None:
    """The commit of the Hub that `name` stands for here and now; None for a folder."""
    base, revision = split_revision(name)
    file = cached_file(base, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return extract_commit_hash(file, None)


def provenance(name: str, cache: Path | None) -> dict[str, Any]:
    record: dict[str, Any] = {"name": split_revision(name)[0]}
    folder = Path(name)
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        record["sha256"] = {file.name: file_sha256(file, cache) for file in files}
    else:
        record["revision"] = revision_of(name)
    return record


def same_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two records of where a part came from hold the same content, wherever it lies now."""
    both = [key for key in ("sha256", "fingerprint", "revision") if key in before and key in now]
    if not both or any(before[key] != now[key] for key in both):
        return False
    inner, other = before.get("sources", {}), now.get("sources", {})
    return all(same_files(inner[part], other[part]) for part in inner.keys() & other.keys())


def told(record: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """A record in a line: its place, and what it has otherwise than `other`."""
    files, theirs = record.get("sha256", {}), other.get("sha256", {})
    facts = [f"{file} {sha256[:12]}" for file, sha256 in files.items() if theirs.get(file) != sha256][:3]
    facts += [f"{key} {record[key][:12]}" for key in ("revision", "fingerprint") if record.get(key)]
    inner, others = record.get("sources", {}), other.get("sources", {})
    facts += [told(inner[part], others[part]) for part in inner.keys() & others.keys()] if not facts else []
    return f"{record['name']}: {', '.join(facts)}" if facts else str(record["name"])


def file_sha256(file: Path, cache: Path | None = None) -> str:
    """The file's hash; remembered by size and time of change, since 14 GB of weights take half a minute to read."""
    status = file.stat()
    key = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode()
    memory = RecordCache(cache / "sha256.records") if cache is not None else None
    known = memory.get(key) if memory is not None else None
    if known is not None:
        return known.decode()
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if memory is not None:
        memory.put(key, digest.encode())
    return digest
