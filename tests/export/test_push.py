"""`--push`: asked before the work, done after the verification, and silent about the token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mmit.cli import main
from mmit.export import write
from tests.export.models import MODELS, run_of, saved_model

TOKEN = "hf_thisIsASecret"


class Hub:
    """What is asked of huggingface_hub, in order; `refuses` names the call that fails."""

    asked: list[str]
    refuses = ""

    def _ask(self, what: str, folder: Path | None = None) -> str:
        Hub.asked.append(what)
        if Hub.refuses == what:
            raise OSError(f"401 Unauthorized at {what}")
        assert folder is None or (folder / "README.md").exists()
        return "https://huggingface.co/us/seer"

    def whoami(self) -> str:
        return self._ask("whoami")

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> str:
        assert (repo_id, repo_type, private, exist_ok) == ("us/seer", "model", True, True)
        return self._ask("create_repo")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        assert repo_id == "us/seer"
        return self._ask("upload_folder", folder_path)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Hub.asked, Hub.refuses = [], ""
    monkeypatch.setattr(write, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return run_of(saved_model(MODELS["text only"]), tmp_path / "run")


def push(run: Path, monkeypatch: pytest.MonkeyPatch, repository: str = "us/seer") -> int:
    out = run.parent / "out"
    monkeypatch.setattr(sys, "argv", ["mmit", "export", str(run), str(out), "--push", repository])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_it_uploads_what_was_verified_under_its_name(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, monkeypatch) == 0
    assert Hub.asked == ["whoami", "create_repo", "upload_folder"]
    card = (run.parent / "out/README.md").read_text()
    assert "# us/seer" in card
    assert 'from_pretrained("us/seer"' in card
    told = capsys.readouterr()
    assert "https://huggingface.co/us/seer" in told.out
    assert TOKEN not in told.out + told.err + card


def test_what_came_out_different_is_not_uploaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*arguments: Any) -> Any:
        raise write.ExportError("logits differ")

    monkeypatch.setattr(write, "compare", differs)
    assert push(run, monkeypatch) == 2
    assert Hub.asked == ["whoami"]


@pytest.mark.parametrize("repository", ["seer", "us/", "https://huggingface.co/us/seer"])
def test_a_name_that_is_none_is_told_before_the_work(
    repository: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(run, monkeypatch, repository) == 2
    assert "OWNER/NAME" in capsys.readouterr().err
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize("call", ["whoami", "create_repo", "upload_folder"])
def test_a_hub_that_refuses_is_one_message_with_its_remedy(
    call: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Hub.refuses = call
    assert push(run, monkeypatch) == 2
    told = capsys.readouterr().err
    assert ("hf auth login" if call == "whoami" else "hf upload us/seer") in told
    assert TOKEN not in told
    assert "Traceback" not in told
    assert (run.parent / "out").exists() == (call != "whoami")
