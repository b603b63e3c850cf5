"""Vision-language sets with their true keys: every text, picture and box, and which row is refused and why."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_tools.convert import RejectedRows, Settings, convert
from data_tools.detect import detect
from mmit.data.images import decode
from mmit.data.sample import BoxPart, Sample, VideoPart
from mmit.data.shards import ShardSet
from tests.tools.conftest import Converter, flat, picture_bytes, read_all

NO_DECODE = Settings()


def shows(sample: Sample, *files: Path) -> bool:
    found = [decode(picture.data or b"", "").tobytes() for picture in sample.images]
    return found == [decode(file.read_bytes(), "").tobytes() for file in files]


def asked(*pairs: tuple[Any, Any]) -> list[tuple[str, list[Any]]]:
    """The conversation in which the first question follows one picture."""
    turns: list[tuple[str, list[Any]]] = []
    for number, (question, answer) in enumerate(pairs):
        turns.append(("user", [0, "\n", question] if number == 0 else [question]))
        turns.append(("assistant", [answer]))
    return turns


def joined(sample: Sample) -> list[tuple[str, list[Any]]]:
    """`flat` with neighbouring texts joined."""
    turns = []
    for role, parts in flat(sample):
        merged: list[Any] = []
        for part in parts:
            if merged and isinstance(part, str) and isinstance(merged[-1], str):
                merged[-1] += part
            else:
                merged.append(part)
        turns.append((role, merged))
    return turns


def one(question: str, answer: str) -> list[tuple[str, list[Any]]]:
    return [("user", [0, f"\n{question}"]), ("assistant", [answer])]


def test_coco_captions_give_a_sample_each(run: Converter, photos: Path) -> None:
    record = {
        "info": {},
        "images": [{"id": 9, "file_name": "0.png"}, {"id": 8, "file_name": "1.png"}],
        "annotations": [
            {"image_id": 8, "id": 1, "caption": "A cat."},
            {"image_id": 9, "id": 2, "caption": "A dog. "},
            {"image_id": 8, "id": 3, "caption": "Cat!"},
        ],
    }
    samples = run("coco-captions", record, photos)
    assert [s.messages[1].text for s in samples] == ["A cat.", "A dog.", "Cat!"]
    assert [shows(s, photos / n) for s, n in zip(samples, ("1.png", "0.png", "1.png"), strict=True)] == [True] * 3
    assert len(run("coco-captions", record, photos, captions="first")) == 2


@pytest.mark.shared
def test_real_caption_lines_keep_every_caption(run: Converter, shared: Path, tmp_path: Path) -> None:
    path = shared / "llava" / "caps_boxes_coco2014_val_80.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:  # the pictures themselves are not among the real files
        (tmp_path / row["image"]).write_bytes(picture_bytes(int(row["id"]) % 97))
    samples = run("coco-captions", path, tmp_path)
    assert [s.messages[1].text for s in samples] == [c.strip() for row in rows for c in row["captions"]]
    assert [s.meta["id"] for s in samples] == [row["id"] for row in rows for _ in row["captions"]]


def test_vqav2_joins_questions_and_annotations(run: Converter, photos: Path, tmp_path: Path) -> None:
    (photos / "COCO_val2014_000000000042.jpg").write_bytes(picture_bytes(3, kind="JPEG"))
    questions = {
        "data_subtype": "val2014",
        "questions": [{"image_id": 42, "question": "What?", "question_id": n} for n in (420, 421, 422)],
    }
    answers = [{"answer": a, "answer_id": n} for n, a in enumerate(["no", "yes", "yes"])]
    (tmp_path / "a.json").write_text(
        json.dumps(
            {
                "annotations": [
                    {"question_id": 421, "image_id": 42, "multiple_choice_answer": "cat"},
                    {"question_id": 420, "image_id": 42, "answers": answers},
                ]
            }
        )
    )
    given: dict[str, Any] = {"annotations": str(tmp_path / "a.json"), "settings": Settings(on_bad="drop")}
    samples = run("vqav2", questions, photos, **given)
    assert [joined(s) for s in samples] == [one("What?", "yes"), one("What?", "cat")]
    with pytest.raises(RejectedRows, match="no answer to question_id 422"):
        run("vqav2", questions, photos, annotations=given["annotations"], prompt="{question} Be brief.")


def test_gqa(run: Converter, photos: Path) -> None:
    record = {
        "07": {"imageId": "0", "question": "What?", "answer": "cat", "fullAnswer": "It is a cat.", "isBalanced": True},
        "08": {"imageId": "1", "question": "Why?", "answer": "x", "fullAnswer": "y", "isBalanced": False},
    }
    (photos / "0.jpg").write_bytes(picture_bytes(0, kind="JPEG"))
    (photos / "1.jpg").write_bytes(picture_bytes(0, kind="JPEG"))
    samples = run("gqa", record, photos)
    assert [joined(s) for s in samples] == [one("What?", "cat")]
    assert samples[0].meta == {"question_id": "07", "image_id": "0"}
    every = run("gqa", record, photos, balanced=False, full=True)
    assert [s.messages[1].text for s in every] == ["It is a cat.", "y"]


def test_ocr_vqa_and_textvqa(run: Converter, photos: Path) -> None:
    (photos / "b1.jpg").write_bytes(picture_bytes(0, kind="JPEG"))
    book = {"questions": ["Who?", "What?"], "answers": ["Ann", "A book"], "imageURL": "http://x/y.jpg", "split": 1}
    (sample,) = run("ocr-vqa", {"b1": book, "b2": book | {"split": 3}}, photos)
    assert joined(sample) == [*one("Who?", "Ann"), ("user", ["What?"]), ("assistant", ["A book"])]
    rows = [{"question": "Brand?", "question_id": 1, "image_id": "b1", "answers": ["a", "dell", "b", "dell"]}]
    assert joined(run("textvqa", {"data": rows}, photos)[0]) == one("Brand?", "dell")


def test_scienceqa_from_its_folder(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sqa"
    folder.mkdir()
    (photos / "train" / "2").mkdir(parents=True)
    (photos / "train" / "2" / "image.png").write_bytes(picture_bytes(4))
    base = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "solution": "Because.", "image": None, "hint": ""}
    problems = {"1": base, "2": base | {"image": "image.png", "hint": "Look."}, "3": base}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["1", "2"], "test": ["3"]}))
    assert detect(folder) == "scienceqa"
    text, shown = read_all(convert("scienceqa", folder, photos, tmp_path / "a"))
    assert flat(text) == [
        ("user", ["Question: Which?\nOptions: (A) x (B) y"]),
        ("assistant", ["The answer is B."]),
    ]
    assert joined(shown)[0] == ("user", [0, "\nContext: Look.\nQuestion: Which?\nOptions: (A) x (B) y"])
    explained = read_all(convert("scienceqa", folder, photos, tmp_path / "b", options={"explain": True}))
    assert explained[0].messages[1].text == "Because.\nThe answer is B."


def test_aokvqa(run: Converter, photos: Path) -> None:
    (photos / "000000000007.jpg").write_bytes(picture_bytes(0, kind="JPEG"))
    row = {"image_id": 7, "question_id": "q", "question": "What?", "choices": ["a", "b"], "correct_choice_idx": 1}
    row |= {"direct_answers": ["b", "c", "c"], "rationales": ["It is."], "split": "train"}
    assert joined(run("a-okvqa", [row], photos)[0]) == one("What?", "c")
    assert joined(run("a-okvqa", [row], photos, answer="choice")[0]) == one("What?\nOptions: a, b", "b")
    assert run("a-okvqa", [row], photos, answer="rationale")[0].messages[1].text == "It is.\nThe answer is b."


def test_visual_genome_regions_become_boxes_whatever_the_outer_key(run: Converter, photos: Path) -> None:
    (photos / "VG_100K_2").mkdir()
    (photos / "VG_100K_2" / "5.jpg").write_bytes(picture_bytes(0, kind="JPEG"))
    region = {"region_id": 1, "image_id": 5, "x": 1, "y": 2, "width": 3, "height": 4, "phrase": "a dot", "synsets": []}
    expected = BoxPart(0, 1.0, 2.0, 4.0, 6.0)
    for outer in ({"id": 5}, {"image_id": 5}):
        (sample,) = run("visual-genome", [outer | {"regions": [region]}], photos)
        assert joined(sample) == [("user", [0, "\nWhat is at ", expected, "?"]), ("assistant", ["a dot"])]
    (sample,) = run("visual-genome", [{"id": 5, "regions": [region]}], photos, ask="locate")
    assert joined(sample) == [("user", [0, "\nWhere is a dot?"]), ("assistant", [expected])]
    qas = [{"qa_id": 1, "question": "What?", "answer": "Dot."}]
    assert joined(run("visual-genome", [{"id": 5, "qas": qas}], photos)[0]) == one("What?", "Dot.")


def test_refcoco_joined_with_instances_or_alone(run: Converter, photos: Path, tmp_path: Path) -> None:
    instances = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"id": 7, "bbox": [1, 2, 3, 4]}]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    ref = {"ref_id": 1, "ann_id": 7, "image_id": 1, "split": "train", "sentences": [{"sent": "left"}, {"sent": "cat"}]}
    (sample,) = run(
        "refcoco", [ref, ref | {"split": "val"}], photos, instances=str(tmp_path / "instances.json"), split="train"
    )
    box = BoxPart(0, 1.0, 2.0, 4.0, 6.0)
    assert joined(sample) == [
        ("user", [0, "\nWhere is left?"]),
        ("assistant", [box]),
        ("user", ["Where is cat?"]),
        ("assistant", [box]),
    ]
    row = {"question_id": "1", "image": "0.png", "answer": ["cat"], "bbox": [1.0, 2.0, 4.0, 6.0]}
    (sample,) = run("refcoco", [row], photos, boxes="corners", ask="describe")
    assert joined(sample) == [("user", [0, "\nWhat is at ", box, "?"]), ("assistant", ["cat"])]
    with pytest.raises(RejectedRows, match="set instances=FILE"):
        run("refcoco", [{"ref_id": 1, "ann_id": 9, "sentences": [{"sent": "x"}]}], photos)


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_cauldron_and_finevision_parquet(run: Converter, tmp_path: Path) -> None:
    data = [picture_bytes(n) for n in range(2)]
    rows = [
        {
            "images": [{"bytes": item, "path": None} for item in data],
            "texts": [
                {"user": "Two?", "assistant": "Yes", "source": "s"},
                {"user": "So?", "assistant": "No", "source": "s"},
            ],
            "relevance_ratings": [5, 2],
        },
        {
            "images": None,
            "texts": [{"user": "Hi", "assistant": "Hello", "source": "s"}],
            "relevance_ratings": None,
        },
    ]
    path = parquet(tmp_path / "rows.parquet", rows)
    assert detect(path) == "cauldron"
    both, text = run("cauldron", path)
    assert joined(both) == [
        ("user", [0, 1, "\nTwo?"]),
        ("assistant", ["Yes"]),
        ("user", ["So?"]),
        ("assistant", ["No"]),
    ]
    assert [picture.data for picture in both.images] == data
    assert flat(text) == [("user", ["Hi"]), ("assistant", ["Hello"])]
    rated = run("finevision", path, least=4, settings=Settings(on_bad="drop"))
    assert [joined(s) for s in rated] == [[("user", [0, 1, "\nTwo?"]), ("assistant", ["Yes"])]]


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_tars_of_many_shapes(run: Converter, tmp_path: Path) -> None:
    data = picture_bytes(0)
    turns = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "x"}]
    chat = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "y"}]
    members = [
        ("a/001.JPG", data),
        ("a/001.txt", b"A cat."),
        ("a/002.0.png", data),
        ("a/002.1.png", picture_bytes(1)),
        ("a/002.json", json.dumps({"conversations": turns}).encode()),
        ("a/003.json", json.dumps({"messages": chat}).encode()),
        ("a/003.img1.png", data),
        ("a/004.png", data),
        ("a/004.json", json.dumps({"question": "Q", "answer": "A"}).encode()),
        ("a/005.jpg", data),
        ("a/005.json", json.dumps([{"value": "<image>\nQ2"}, {"value": "A2"}]).encode()),
    ]
    samples = run("webdataset", tar_of(tmp_path / "x.tar", members))
    assert [joined(s) for s in samples] == [
        one("Describe the image.", "A cat."),
        [("user", [0, " and ", 1, "?"]), ("assistant", ["x"])],
        [("user", [0, "What?"]), ("assistant", ["y"])],
        one("Q", "A"),
        one("Q2", "A2"),
    ]
    assert samples[1].images[1].data == picture_bytes(1)


APART = [("1.txt", b"early"), ("2.png", picture_bytes(2)), ("2.txt", b"ok"), ("1.png", picture_bytes(1))]


def test_members_apart_are_joined(run: Converter, tmp_path: Path) -> None:
    samples = run("webdataset", tar_of(tmp_path / "x.tar", APART))
    assert [joined(s) for s in samples] == [one("Describe the image.", "early"), one("Describe the image.", "ok")]
    assert [s.images[0].data for s in samples] == [picture_bytes(1), picture_bytes(2)]


def test_members_apart_in_a_compressed_tar_and_samples_without_text_are_named(run: Converter, tmp_path: Path) -> None:
    plain = tar_of(tmp_path / "x.tar", [("1.png", picture_bytes(1)), *APART[1:3], APART[0]])
    (tmp_path / "y.tar").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(RejectedRows) as caught:
        run("webdataset", tmp_path / "y.tar")
    assert "y.tar:1: no conversation, answer or caption" in str(caught.value)
    assert "y.tar:1: members of this key also stand elsewhere" in str(caught.value)


def test_a_foreign_tar_cut_anywhere_is_reported(tmp_path: Path) -> None:
    members = [item for n in range(6) for item in ((f"{n}.png", picture_bytes(n)), (f"{n}.txt", b"text"))]
    whole = tar_of(tmp_path / "x.tar", members).read_bytes()
    random.seed(1)
    ends = [512 * n for n in range(1, 20)] + [random.randrange(1, len(whole) - 1024) for _ in range(30)]
    content = whole.rstrip(b"\0")
    for number, end in enumerate(ends):
        if end >= len(content):
            continue
        (tmp_path / "cut.tar").write_bytes(whole[:end])
        with pytest.raises(RejectedRows, match=r"cut\.tar"):
            convert("webdataset", tmp_path / "cut.tar", None, tmp_path / f"o{number}")


def test_no_member_is_run_or_unpickled(run: Converter, tmp_path: Path) -> None:
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    members = [("1.pyd", evil), ("1.pkl", evil), ("1.png", picture_bytes(0)), ("1.txt", b"ok"), ("../2.txt", b"out")]
    samples = run("webdataset", tar_of(tmp_path / "x.tar", members), settings=Settings(on_bad="drop"))
    assert samples[0].messages[1].text == "ok"
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path.parent / "2.txt").exists()


def test_our_own_tars_read_back_as_webdataset(run: Converter, photos: Path, tmp_path: Path) -> None:
    row = {"image": "0.png", "conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]}
    (tmp_path / "in.json").write_text(json.dumps([row]))
    first = convert("llava", tmp_path / "in.json", photos, tmp_path / "s")
    (again,) = run("webdataset", tmp_path / "s" / "shard-000000.tar")
    assert joined(again) == joined(first.read(0))


def test_a_folder_of_pictures_and_texts(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "in").mkdir(parents=True)
    for name in ("a.v1.jpg", "in/b.PNG", "c.png"):
        (folder / name).write_bytes(picture_bytes(1, kind="JPEG" if name.endswith("jpg") else "PNG"))
    (folder / "a.v1.txt").write_text("A\n")
    (folder / "in" / "b.txt").write_text("B")
    (folder / "d.txt").write_text("D")
    assert detect(folder) == "folder"
    with pytest.raises(RejectedRows) as caught:
        convert("folder", folder, None, tmp_path / "o")
    assert "c.png has no text" in str(caught.value)
    assert "d.txt has no picture" in str(caught.value)
    samples = read_all(ShardSet(tmp_path / "o"))
    assert [joined(s) for s in samples] == [one("Describe the image.", "A"), one("Describe the image.", "B")]


def test_tables_by_usual_and_by_named_columns(run: Converter, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("image\tcaption\tyear\n0.png\tA cat, sleeping\t1999\n")
    (sample,) = run("table", tmp_path / "t.tsv", photos)
    assert joined(sample) == one("Describe the image.", "A cat, sleeping")
    assert sample.meta == {"year": "1999"}
    (tmp_path / "t.csv").write_text('Figure_path,Question,Answer\n1.png,"What, now?","B: x"\n')
    named = {"image": "Figure_path", "question": "Question", "answer": "Answer"}
    assert joined(run("table", tmp_path / "t.csv", photos, **named)[0]) == one("What, now?", "B: x")
    path = parquet(tmp_path / "t.parquet", [{"image": {"bytes": picture_bytes(2), "path": "x"}, "text": "T"}])
    (sample,) = run("table", path)
    assert sample.images[0].data == picture_bytes(2)


def test_mmc4_places_pictures_before_their_sentence(run: Converter, photos: Path) -> None:
    row = {
        "text_list": ["One.", "Two.", "Three."],
        "image_info": [
            {"image_name": "0.png", "matched_text_index": 2, "matched_sim": 0.3},
            {"image_name": "gone.png", "matched_text_index": 0},
            {"image_base64": base64.b64encode(picture_bytes(9)).decode(), "matched_text_index": 2},
        ],
    }
    (sample,) = run("mmc4", [row], photos, name="docs.jsonl")
    assert joined(sample) == [("assistant", ["One.\nTwo.", 0, 1, "Three."])]
    assert sample.meta == {"absent": 1}
    assert sample.messages[0].train
    assert sample.images[1].data == picture_bytes(9)


def test_obelics_names_its_pictures_by_url(run: Converter, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "files.json").write_text(json.dumps({"http://a": "0.png"}))
    rows = [
        {"images": ["http://a", None, "http://b", None], "texts": [None, "One.", None, "Two."], "metadata": "[]"},
        {"images": ["http://b", None], "texts": [None, "Alone."], "metadata": "[]"},
    ]
    path = parquet(tmp_path / "o.parquet", rows)
    (sample,) = run("obelics", path, photos, files=str(tmp_path / "files.json"), settings=Settings(on_bad="drop"))
    assert joined(sample) == [("assistant", [0, "One.\nTwo."])]
    assert sample.meta == {"absent": 1}


def test_frames_in_a_folder_become_a_video(run: Converter, tmp_path: Path) -> None:
    (tmp_path / "clips" / "v_frames_2fps").mkdir(parents=True)
    for n in range(10):
        (tmp_path / "clips" / "v_frames_2fps" / f"{n:03d}.jpg").write_bytes(picture_bytes(n, kind="JPEG"))
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "x"}]
    rows = [{"messages": turns, "videos": ["v_frames_2fps"]}]
    (sample,) = run("video", rows, tmp_path / "clips", frames=5, fps=2.0)
    assert flat(sample)[0] == ("user", [VideoPart((0, 1, 2, 3, 4), (0.5, 1.5, 2.5, 3.5, 4.5)), "What?"])
    assert shows(sample, *(tmp_path / "clips" / "v_frames_2fps" / f"{n:03d}.jpg" for n in (1, 3, 5, 7, 9)))


@pytest.mark.shared
def test_real_videos_become_frames_in_order(run: Converter, shared: Path) -> None:
    pytest.importorskip("av", reason="PyAV is an extra")
    folder = shared / "llamafactory"
    samples = run("video", folder / "mllm_video_demo.json", folder, frames=4, settings=Settings(on_missing="drop"))
    assert len(samples) == 2, "the second row's .avi is not among the files"
    for sample in samples:
        part = sample.messages[0].parts[0]
        assert isinstance(part, VideoPart)
        assert len(sample.images) == 4
        assert list(part.seconds) == sorted(set(part.seconds))


def test_dicom_keeps_pixels_and_nothing_of_the_patient(run: Converter, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is an extra")
    import numpy as np
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    values = np.arange(64, dtype=np.int16).reshape(8, 8) * 40
    for name, kind in (("a", "MONOCHROME2"), ("b", "MONOCHROME1")):
        header = FileMetaDataset()
        header.TransferSyntaxUID, header.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
        header.MediaStorageSOPInstanceUID = generate_uid()
        data = FileDataset(str(tmp_path / name), {}, file_meta=header, preamble=b"\0" * 128)
        data.PatientName = "Canary^Patient"
        data.Rows = data.Columns = 8
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 15, 1, 1
        data.PhotometricInterpretation = kind
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = values.tobytes()
        data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, header.MediaStorageSOPInstanceUID
        pydicom.dcmwrite(tmp_path / f"{name}.dcm", data, enforce_file_format=True)
    rows = [{"image": "a.dcm", "answer": "Normal."}, {"image": "b.dcm", "answer": "Turned."}]
    plain, turned = run("dicom", rows, tmp_path, levels=[-1024, 1496])
    shades = np.clip(np.rint(values.astype(float) * 255 / 2520), 0, 255).astype(np.uint8)
    assert np.array_equal(decode(plain.images[0].data or b"", "")[..., 0], shades)
    assert np.array_equal(decode(turned.images[0].data or b"", "")[..., 0], 255 - shades)
    assert b"Canary" not in (plain.images[0].data or b"")


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}], "image": "a"},
            "llava",
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}, "sharegpt"),
        ({"messages": [{"role": "user", "content": "q"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "q"}], "images": ["a"]}, "trl"),
        ({"messages": [{"role": "user", "content": "<image>q"}], "images": ["a"]}, "messages"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"instruction": "a", "context": "", "response": "b", "category": "c"}, "dolly"),
        ({"problem": "a", "solution": "b"}, "magicoder"),
        ({"system_prompt": "", "question": "a", "response": "b"}, "orca"),
        ({"conversations": ["a", "b"]}, "lima"),
        ({"data": ["a", "b"]}, "ultrachat"),
        ({"inputs": "a", "targets": "b"}, "flan"),
        ({"text": "### Human: a### Assistant: b"}, "delimited"),
        ({"text_list": ["a"], "image_info": []}, "mmc4"),
        ({"question": "a", "choices": ["b"], "direct_answers": ["b"]}, "a-okvqa"),
        ({"id": 1, "regions": [{"x": 1}]}, "visual-genome"),
        ({"messages": [{"role": "user", "content": "<video>"}], "videos": ["a"]}, "video"),
        ({"query": "a", "response": "b"}, "ms-swift"),
        ({"image": "a", "caption": "b"}, "table"),
    ],
)
def test_formats_are_told_from_their_rows(tmp_path: Path, row: dict[str, Any], format: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert detect(tmp_path / "rows.jsonl") == format
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    assert detect(tmp_path / "rows.json") == format


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("fastchat/dummy_conversation.json", "sharegpt"),
        ("llamafactory", "llamafactory"),
        ("llamafactory/alpaca_en_demo.json", "alpaca"),
        ("llamafactory/glaive_toolcall_en_demo.json", "sharegpt"),
        ("llamafactory/mllm_demo.json", "messages"),
        ("llamafactory/mllm_video_demo.json", "video"),
        ("llamafactory/v1_multimodal_demo.jsonl", "messages"),
        ("llava/caps_boxes_coco2014_val_80.jsonl", "coco-captions"),
        ("self_instruct/seed_tasks.jsonl", "self-instruct"),
        ("xtuner/mllm_sft_single_image_example_data.jsonl", "xtuner"),
        ("xtuner/mllm_sft_text_example_data.jsonl", "messages"),
        ("xtuner/openai_sft.jsonl", "messages"),
    ],
)
def test_real_files_are_told(shared: Path, name: str, format: str) -> None:
    assert detect(shared / name) == format
