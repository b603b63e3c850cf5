"""Rows as people really bring them, each of which was once lost, learned wrongly or ended in a traceback."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.convert import RejectedRows, Settings
from data_tools.detect import detect
from data_tools.formats import options_for, samples_of
from data_tools.rows import records
from mmit.config import ConfigError
from mmit.data.images import decode
from mmit.data.sample import BoxPart, Sample, SampleError, VideoPart
from tests.tools.conftest import Converter, flat, picture_bytes

PAIR = [("user", ["q"]), ("assistant", ["a"])]


def turns(question: str = "q", answer: str = "a", **more: Any) -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer, **more}]


def messages(question: Any = "q", answer: Any = "a", **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


# What a row says beside its turns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["llava", "sharegpt", "qwen-vl"])
def test_a_turn_that_says_it_is_not_trained_is_not(run: Converter, format: str) -> None:
    listed = [*turns(loss=False), *turns(weight=1)]
    (sample,) = run(format, [{"conversations": listed}])
    assert [item.train for item in sample.messages] == [False, False, False, True]


@pytest.mark.parametrize("format", ["messages", "sharegpt", "llava", "ms-swift"])
def test_a_system_text_beside_the_turns_joins_the_one_among_them(run: Converter, format: str) -> None:
    chat = format in ("messages", "ms-swift")
    listed = [{"role": "system", "content": "B"}, *messages()] if chat else [{"from": "system", "value": "B"}, *turns()]
    for beside, expected in (("A", "A\n\nB"), ("B", "B")):
        row = {"messages" if chat else "conversations": listed, "system": beside}
        (sample,) = run(format, [row])
        assert [(item.role, item.text) for item in sample.messages] == [
            ("system", expected),
            ("user", "q"),
            ("assistant", "a"),
        ]


@pytest.mark.parametrize("format", ["messages", "sharegpt", "llava", "ms-swift"])
def test_the_list_of_tools_is_kept_and_not_learned(run: Converter, format: str) -> None:
    row = {"messages": messages()} if format in ("messages", "ms-swift") else {"conversations": turns()}
    (sample,) = run(format, [row | {"tools": '[{"name": "<image>"}]'}])
    assert flat(sample) == [("system", ['[{"name": "<image>"}]']), *PAIR]
    assert not sample.messages[0].train


def test_calls_in_the_older_way_of_openai_are_kept(run: Converter) -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    row = {"messages": messages(answer=None, function_call=call), "functions": [{"name": "add"}]}
    (sample,) = run("messages", [row])
    assert flat(sample) == [
        ("system", ['[{"name": "add"}]']),
        ("user", ["q"]),
        ("assistant", ['{"name": "add", "arguments": {"a": 1}}']),
    ]


def test_reasoning_beside_the_content_is_not_lost_silently(run: Converter) -> None:
    with pytest.raises(RejectedRows, match="has reasoning_content"):
        run("messages", [{"messages": messages(reasoning_content="Because.")}])


def test_a_picture_is_found_beside_an_empty_field_of_the_other_name(run: Converter, photos: Path) -> None:
    """Parquet fills every column of every row."""
    rows = [
        {"conversations": turns("<image>q"), "image": None, "images": ["0.png"]},
        {"conversations": turns("<image>q"), "image": "0.png", "images": None},
    ]
    for format in ("llava", "sharegpt"):
        assert [len(sample.images) for sample in run(format, rows, photos)] == [1, 1]
    chats = [{"messages": messages(), "images": None, "image": "0.png"}]
    for format in ("trl", "ms-swift"):
        assert [len(sample.images) for sample in run(format, chats, photos)] == [1]


def test_two_fields_that_name_different_pictures_are_refused(run: Converter, photos: Path) -> None:
    with pytest.raises(RejectedRows, match="both image and images"):
        run("llava", [{"conversations": turns("<image>q"), "image": "0.png", "images": ["1.png"]}], photos)


@pytest.mark.parametrize("format", ["messages", "trl", "sharegpt", "llava", "qwen-vl", "ms-swift"])
@pytest.mark.parametrize("kind", ["videos", "audio"])
def test_a_row_with_a_video_or_a_sound_is_no_text(run: Converter, photos: Path, format: str, kind: str) -> None:
    row = {"messages": messages(), "conversations": turns(), kind: ["a.mp4"]}
    with pytest.raises(RejectedRows, match=f"the row has {kind}|1 videos but 0 places|have no <video> marker"):
        run(format, [row], photos)


@pytest.mark.parametrize("format", ["messages", "trl", "xtuner", "sharegpt", "llava", "qwen-vl", "ms-swift", "video"])
@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"images": ["0.png"]}, "the turn itself has images"),
        ({"content": None, "value": None, "parts": [{"text": "q"}]}, "no content; the turn has|found NoneType"),
        ({"content": None, "value": None}, "no content; the turn has|found NoneType"),
    ],
)
def test_a_turn_loses_nothing_that_stands_under_another_name(
    run: Converter, photos: Path, format: str, turn: dict[str, Any], reason: str
) -> None:
    kind = "messages" if format in ("messages", "trl", "xtuner", "ms-swift", "video") else "conversations"
    listed = messages() if kind == "messages" else turns()
    listed[0] |= turn
    with pytest.raises(RejectedRows, match=reason):
        run(format, [{kind: listed}], photos)


@pytest.mark.parametrize("format", ["sharegpt", "llava", "qwen-vl", "messages"])
def test_the_empty_columns_of_a_joined_table_hide_nothing(run: Converter, format: str) -> None:
    """Sets of both spellings joined into one parquet file have all four names in every turn."""
    both = [
        {"from": a, "value": b, "role": c, "content": d}
        for a, b, c, d in ((None, None, "user", "q"), (None, None, "assistant", "a"))
    ]
    (sample,) = run(format, [{"messages" if format == "messages" else "conversations": both}])
    assert flat(sample) == PAIR


@pytest.mark.parametrize("format", ["messages", "sharegpt", "llava", "qwen-vl", "ms-swift", "video"])
def test_tools_beside_the_turns_are_told(run: Converter, format: str) -> None:
    kind = "messages" if format in ("messages", "ms-swift", "video") else "conversations"
    (sample,) = run(format, [{kind: messages() if kind == "messages" else turns(), "tools": '[{"name": "f"}]'}])
    assert flat(sample) == [("system", ['[{"name": "f"}]']), *PAIR]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("prompt-target", {"prompt": "q", "completion": "a"}),
        ("lima", {"conversations": ["q", "a"]}),
        ("delimited", {"text": "<human>: q\n<bot>: a"}),
    ],
)
def test_a_text_format_drops_no_picture(run: Converter, format: str, row: dict[str, Any]) -> None:
    assert [flat(s) for s in run(format, [row | {"image": None}])] == [PAIR]
    with pytest.raises(RejectedRows, match="the row has images"):
        run(format, [row | {"images": ["0.png"]}])


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("trl", {"prompt": "q", "completion": "a", "label": False}),
        ("ms-swift", {"messages": messages(), "label": False}),
        ("sharegpt", {"conversations": turns(), "label": False}),
        ("alpaca", {"instruction": "q", "output": "a", "label": False}),
        ("prompt-target", {"prompt": "q", "completion": "a", "label": False}),
    ],
)
def test_an_answer_that_people_did_not_want_is_not_learned(run: Converter, format: str, row: dict[str, Any]) -> None:
    with pytest.raises(RejectedRows, match="label is false"):
        run(format, [row])
    assert len(run(format, [row | {"label": True}])) == 1


@pytest.mark.parametrize("format", ["sharegpt", "messages"])
def test_a_conversation_whose_answer_is_in_chosen_is_not_learned_without_it(run: Converter, format: str) -> None:
    asked = [*messages(), {"role": "user", "content": "again?"}]
    row = {"messages": asked, "chosen": {"role": "assistant", "content": "good"}, "rejected": {"content": "bad"}}
    with pytest.raises(RejectedRows, match=r"its answer is in chosen.*llamafactory"):
        run(format, [row])
    assert len(run(format, [row | {"messages": messages()}])) == 1, "as sets hold it beside the whole conversation"


# ms-swift ------------------------------------------------------------------------------------------------------------


def test_ms_swift_joins_instruction_and_input(run: Converter) -> None:
    (sample,) = run("ms-swift", [{"instruction": "q", "input": "i", "output": "a"}])
    assert flat(sample) == [("user", ["q\ni"]), ("assistant", ["a"])]
    with pytest.raises(RejectedRows, match="question, problem could each be the query"):
        run("ms-swift", [{"question": "q", "problem": "p", "answer": "a"}])


# LLaMA-Factory -------------------------------------------------------------------------------------------------------


def factory(folder: Path, rows: list[Any], **info: Any) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **info}}))
    return folder


def test_a_ranking_learns_the_chosen_answer_and_keeps_the_other(run: Converter, tmp_path: Path) -> None:
    chosen, rejected = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}
    row = {"conversations": turns()[:1], "chosen": chosen, "rejected": rejected}
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    folder = factory(tmp_path, [row], formatting="sharegpt", ranking=True, columns=columns)
    (sample,) = run("llamafactory", folder, dataset="mine")
    assert flat(sample) == [("user", ["q"]), ("assistant", ["good"])]
    assert sample.meta == {"rejected": rejected}


def test_rows_whose_kto_tag_is_false_are_rejected(run: Converter, tmp_path: Path) -> None:
    rows = [{"conversations": turns(), "wanted": wanted} for wanted in (True, False)]
    columns = {"messages": "conversations", "kto_tag": "wanted"}
    folder = factory(tmp_path, rows, formatting="sharegpt", columns=columns)
    with pytest.raises(RejectedRows, match="1 of 2 rows"):
        run("llamafactory", folder, dataset="mine")


def test_only_the_columns_that_are_named_are_texts(run: Converter, tmp_path: Path) -> None:
    row = {"ask": "q", "input": "a note, no question", "reply": "a"}
    folder = factory(tmp_path, [row], columns={"prompt": "ask", "response": "reply"})
    assert [flat(s) for s in run("llamafactory", folder, dataset="mine")] == [PAIR]


def test_a_marker_without_its_picture_is_rejected_in_a_set_with_pictures(run: Converter, tmp_path: Path) -> None:
    row = {"conversations": turns("<image>q")}
    folder = factory(tmp_path, [row], formatting="sharegpt", columns={"messages": "conversations", "images": "images"})
    with pytest.raises(RejectedRows, match="0 pictures but 1 <image> markers"):
        run("llamafactory", folder, dataset="mine")


def test_the_tags_of_the_set_name_its_roles(run: Converter, tmp_path: Path) -> None:
    listed = [
        {"who": "A", "text": "q"},
        {"who": "F", "text": "f"},
        {"who": "O", "text": "o"},
        {"who": "B", "text": "a"},
    ]
    tags = {"role_tag": "who", "content_tag": "text", "user_tag": "A", "assistant_tag": "B", "function_tag": "F"}
    folder = factory(tmp_path, [{"conversations": listed}], formatting="sharegpt", tags=tags | {"observation_tag": "O"})
    (sample,) = run("llamafactory", folder, dataset="mine")
    assert [(item.role, item.train) for item in sample.messages] == [
        ("user", False),
        ("assistant", True),
        ("tool", False),
        ("assistant", True),
    ]


def test_corners_read_as_width_and_height_are_not_clipped_silently(run: Converter, photos: Path) -> None:
    row = {"image": "0.png", "bbox": [10, 6, 18, 11], "sentences": [{"sent": "s"}]}  # of 20 x 12 pixels
    with pytest.raises(RejectedRows, match=r"box \[10, 6, 28, 17\] reaches out of its picture of 20 x 12"):
        run("refcoco", [row], photos)
    assert flat(run("refcoco", [row], photos, boxes="corners")[0])[1] == ("assistant", [BoxPart(0, 10, 6, 18, 11)])


# Tars ----------------------------------------------------------------------------------------------------------------


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_caption_in_a_tar_is_no_answer_about_a_picture_that_is_not_there(run: Converter, tmp_path: Path) -> None:
    members = {"1.mp4": b"x", "1.txt": b"a video", "2.pdf": b"x", "2.txt": b"a page", "3.txt": b"a"}
    tar = tar_of(tmp_path / "x.tar", members)
    with pytest.raises(RejectedRows, match="2 of 3 rows"):
        run("webdataset", tar)
    assert [flat(s) for s in run("webdataset", tar, settings=Settings(on_bad="drop"))] == [[("assistant", ["a"])]]


@pytest.mark.parametrize(("weights", "expected"), [([0.1, 0.2, 0.9], "y"), (None, "x")])
def test_the_answer_of_most_weight_is_learned(run: Converter, tmp_path: Path, weights: Any, expected: str) -> None:
    record = {"context": "q", "answers": ["x", "x", "y"], "answer_weights": weights}
    tar = tar_of(tmp_path / "x.tar", {"1.png": picture_bytes(), "1.json": json.dumps(record).encode()})
    assert run("webdataset", tar)[0].messages[1].text == expected


def test_a_system_text_in_a_tar_is_kept(run: Converter, tmp_path: Path) -> None:
    record = {"conversations": turns(), "system": "s"}
    tar = tar_of(tmp_path / "x.tar", {"1.json": json.dumps(record).encode(), "2.json": b'"no object"'})
    samples = run("webdataset", tar, settings=Settings(on_bad="drop"))
    assert [flat(sample) for sample in samples] == [[("system", ["s"]), *PAIR]]


# OASST, delimited, tables, captions ----------------------------------------------------------------------------------


def node(name: Any, parent: Any, role: str, **more: Any) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "role": role, "text": name or "x", **more}


def test_a_flat_oasst_message_that_hangs_nowhere_is_rejected(run: Converter) -> None:
    rows = [node("q", None, "prompter"), node("a", "q", "assistant"), node("b", "gone", "assistant")]
    with pytest.raises(RejectedRows, match=r"parent 'gone' is not in the file"):
        run("oasst", rows)
    assert [flat(s) for s in run("oasst", rows, settings=Settings(on_bad="drop"))] == [PAIR]


def test_a_flat_oasst_message_without_a_name_is_no_parent_of_itself(run: Converter) -> None:
    with pytest.raises(RejectedRows, match="its message_id None"):
        run("oasst", [node(None, None, "prompter"), node("q", None, "prompter"), node("a", "q", "assistant")])


def test_a_deleted_first_prompt_is_not_learned_from(run: Converter) -> None:
    with pytest.raises(RejectedRows, match="first prompt is deleted"):
        run("oasst", [node("q", None, "prompter", deleted=True), node("a", "q", "assistant")])


def test_a_last_question_in_one_text_is_kept(run: Converter) -> None:
    (sample,) = run("delimited", [{"text": "<human>: q\n<bot>: a\n<human>: r"}])
    assert flat(sample) == [*PAIR, ("user", ["r"])]


def test_a_missing_answer_of_a_table_is_no_answer_none(run: Converter, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"question": ["q", "r", "s"], "answer": [1.5, None, float("nan")], "score": [float("nan")] * 3})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(RejectedRows, match="2 of 3 rows"):
        run("table", tmp_path / "t.parquet")
    (sample,) = run("table", tmp_path / "t.parquet", settings=Settings(on_bad="drop"))
    assert flat(sample) == [("user", ["q"]), ("assistant", ["1.5"])]


def test_a_file_of_questions_to_be_asked_is_nothing_to_learn(run: Converter, photos: Path) -> None:
    row = {"question_id": 0, "image": "0.png", "text": "What is it?", "category": "conv"}
    with pytest.raises(RejectedRows, match="--set question=text and --set answer=COLUMN"):
        run("table", [row], photos)
    (sample,) = run("table", [row | {"gold": "A cat."}], photos, question="text", answer="gold")
    assert flat(sample) == [("user", [0, "\n", "What is it?"]), ("assistant", ["A cat."])]


def test_answers_are_learned_also_from_a_file_without_their_questions(run: Converter) -> None:
    row = {"question_id": 0, "text": "A cat.", "answer_id": "a", "model_id": "m"}
    (alone,) = run("table", [row])
    assert flat(alone) == [("assistant", ["A cat."])]
    (sample,) = run("table", [row | {"prompt": "What is it?"}])
    assert flat(sample) == [("user", ["What is it?"]), ("assistant", ["A cat."])]


def test_a_caption_without_its_picture_is_rejected(run: Converter, photos: Path) -> None:
    rows = [{"image": "0.png", "caption": "a"}, {"image": None, "caption": "b"}]
    with pytest.raises(RejectedRows, match="no picture in image"):
        run("table", rows, photos)


@pytest.mark.parametrize("captions", [[], None, "a", [3]])
def test_a_line_without_captions_is_rejected_and_not_gone(run: Converter, photos: Path, captions: Any) -> None:
    with pytest.raises(RejectedRows, match="1 of 2 rows"):
        run("coco-captions", [{"image": "0.png", "captions": c} for c in (["a"], captions)], photos, name="c.jsonl")


@pytest.mark.parametrize(("format", "row"), [("self-instruct", {"instruction": "q", "instances": []}), ("qwen-vl", [])])
def test_an_empty_row_is_rejected_and_not_gone(run: Converter, format: str, row: Any) -> None:
    with pytest.raises(RejectedRows, match="none of the 1 rows"):
        run(format, [row])


def test_a_wrong_file_of_answers_is_named(run: Converter, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text('{"questions": []}')
    with pytest.raises(SampleError, match=r"q\.json: it has no list of objects called annotations"):
        run("vqav2", {"questions": []}, photos, annotations=str(tmp_path / "q.json"))


def test_a_text_that_a_link_fetches_from_elsewhere_is_not_read(run: Converter, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (photos / "0.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(RejectedRows, match=r"0\.txt is a link that leads out"):
        run("folder", photos, settings=Settings(on_bad="error"))


def test_llava_video_marks_its_videos_as_images(run: Converter, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for n in range(2):
        (tmp_path / "clip" / f"{n}.png").write_bytes(picture_bytes(n))
    (sample,) = run(
        "video", [{"id": "7", "video": "clip", "system": "s", "conversations": turns("<image>\nq")}], tmp_path
    )
    assert flat(sample)[:2] == [("system", ["s"]), ("user", [VideoPart((0, 1), (0.0, 1.0)), "\nq"])]
    assert sample.meta == {"id": "7"}


def test_a_copy_that_an_editor_hid_in_a_folder_gives_no_rows(run: Converter, tmp_path: Path) -> None:
    (tmp_path / "in" / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("rows.json", ".ipynb_checkpoints/rows-checkpoint.json", "._rows.json"):
        (tmp_path / "in" / name).write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    assert len(run("alpaca", tmp_path / "in")) == 1
    assert detect(tmp_path / "in") == "alpaca"


AOKVQA = {"image": "0.png", "question": "q", "choices": ["x", "y"], "correct_choice_idx": 1, "rationales": ["r"]}


@pytest.mark.parametrize("stored", [list, str, json.dumps])
@pytest.mark.parametrize(
    ("answer", "expected"), [("direct", "y"), ("choice", "y"), ("rationale", "r\nThe answer is y.")]
)
def test_lists_that_a_table_holds_as_texts_are_lists(
    run: Converter, photos: Path, stored: Any, answer: str, expected: str
) -> None:
    """The A-OKVQA of the hub holds its answers as "['y', 'x', 'y']"; the letter given most often was learned."""
    row = AOKVQA | {key: stored(AOKVQA[key]) for key in ("choices", "rationales")}
    row["direct_answers"] = stored(["y", "x", "y"])
    (sample,) = run("a-okvqa", [row], photos, answer=answer)
    assert sample.messages[1].text == expected


def test_a_list_as_numpy_prints_it_is_rejected_and_not_joined(run: Converter, photos: Path) -> None:
    with pytest.raises(RejectedRows, match="as numpy prints them"):
        run("a-okvqa", [AOKVQA | {"direct_answers": "['a' 'b']"}], photos)


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("scienceqa", {"question": "q", "choices": "ab", "answer": 1}),
        ("a-okvqa", AOKVQA | {"direct_answers": "yes"}),
        ("a-okvqa", AOKVQA | {"direct_answers": 3}),
    ],
)
def test_a_text_where_a_list_belongs_is_not_taken_letter_by_letter(
    run: Converter, photos: Path, format: str, row: dict[str, Any]
) -> None:
    with pytest.raises(RejectedRows, match="the list of"):
        run(format, [row], photos)


# DICOM ---------------------------------------------------------------------------------------------------------------


def dicom(path: Path, values: Any, **more: Any) -> Path:
    pytest.importorskip("pydicom", reason="pydicom is an extra")
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    colours = values.ndim == 3 and values.shape[-1] == 3
    data.Rows, data.Columns = values.shape[-3:-1] if colours else values.shape[-2:]
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(values.dtype.kind == "i")
    data.SamplesPerPixel, data.PhotometricInterpretation = 3 if colours else 1, "RGB" if colours else "MONOCHROME2"
    if colours:
        data.PlanarConfiguration = 0
    data.PixelData = values.tobytes()
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, meta.MediaStorageSOPInstanceUID
    for name, value in more.items():
        setattr(data, name, value)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    path.with_suffix(".txt").write_text("Normal.")
    return path


def pixels(sample: Sample) -> np.ndarray:
    return decode(sample.images[0].data or b"", "")


def test_the_window_of_a_dicom_file_is_kept_where_the_picture_does_not_fill_it(run: Converter, tmp_path: Path) -> None:
    values = np.arange(64, dtype=np.int16).reshape(8, 8)
    dicom(tmp_path / "a.dcm", values, RescaleSlope=1, RescaleIntercept=-20, WindowCenter=0, WindowWidth=400)
    (sample,) = run("dicom", tmp_path)
    # PS3.3 C.11.2.1.2.1: (x - (c - 0.5)) / (w - 1) + 0.5
    expected = ((values - 20.0 + 0.5) / 399 + 0.5) * 255
    assert np.abs(pixels(sample)[..., 0] - expected).max() <= 0.51


def test_a_dicom_file_with_frames_is_shown_only_by_the_frame_that_is_named(run: Converter, tmp_path: Path) -> None:
    values = np.stack([np.arange(64, dtype=np.uint8).reshape(8, 8) * n for n in (1, 2, 4)])
    dicom(tmp_path / "a.DCM", values, NumberOfFrames=3)
    with pytest.raises(RejectedRows, match="holds 3 frames"):
        run("dicom", tmp_path)
    (sample,) = run("dicom", tmp_path, frame=1, levels=[0, 255])
    assert np.array_equal(pixels(sample)[..., 0], values[1])


def test_colours_of_dicom_files_are_kept(run: Converter, tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    dicom(tmp_path / "a.dcm", colours)
    table = np.arange(256, dtype=np.uint16) * 257
    channels = {"Red": table, "Green": table[::-1], "Blue": np.zeros(256, dtype=np.uint16)}
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in channels.items():
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    dicom(tmp_path / "b.dcm", colours[..., 0].copy(), **palette)
    plain, indexed = run("dicom", tmp_path)
    assert np.array_equal(pixels(plain), colours)
    number = colours[..., 0]
    assert np.array_equal(pixels(indexed), np.stack([number, 255 - number, number * 0], axis=-1))


def test_a_video_that_its_file_turns_is_turned(run: Converter, tmp_path: Path) -> None:
    """As phones store an upright video: lying, with a matrix that turns it a quarter clockwise."""
    av = pytest.importorskip("av", reason="PyAV is an extra")
    lying = np.zeros((32, 64, 3), dtype=np.uint8)
    lying[:, :32] = 255
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "v.mp4").read_bytes()
    one, kept = struct.pack(">i", 1 << 16), struct.pack(">i", 1 << 30)
    none, minus = bytes(4), struct.pack(">i", -(1 << 16))
    upright = b"".join([one, none, none, none, one, none, none, none, kept])
    turned = b"".join([none, one, none, minus, none, none, none, none, kept])
    place = data.index(upright, data.index(b"tkhd"))
    (tmp_path / "v.mp4").write_bytes(data[:place] + turned + data[place + len(turned) :])
    (sample,) = run("video", [{"video": "v.mp4", "conversations": turns("<video>q")}], tmp_path, frames=1)
    shown = pixels(sample)
    assert shown.shape == (64, 32, 3)
    assert shown[:24].mean() > 240, "what lay on the left stands above"
    assert shown[40:].mean() < 15


def test_a_repository_is_read_by_the_library_of_the_hub(
    run: Converter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is an extra")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = datasets.Value("string")
    features = datasets.Features({"images": [datasets.Image()], "texts": [{"user": text, "assistant": text}]})
    rows = [
        {
            "images": [{"bytes": picture_bytes(n, size=(90, 80)), "path": None}],
            "texts": [{"user": "q", "assistant": f"{n}"}],
        }
        for n in range(2)
    ]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    samples = run("hub", tmp_path / "set")
    assert [sample.messages[1].text for sample in samples] == ["0", "1"]
    assert [sample.images[0].data for sample in samples] == [picture_bytes(n, size=(90, 80)) for n in range(2)]
    with pytest.raises(ConfigError, match="cannot be loaded"):
        run("hub", tmp_path / "set", split="test")


# Files ---------------------------------------------------------------------------------------------------------------

GOOD = {"instruction": "q", "output": "a"}


def test_a_second_list_after_the_first_is_not_lost(run: Converter, tmp_path: Path) -> None:
    (tmp_path / "two.json").write_text(json.dumps([GOOD]) + "\n" + json.dumps([GOOD]))
    with pytest.raises(SampleError, match="more stands after the closing ]"):
        run("alpaca", tmp_path / "two.json")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_byte_order_mark_is_read_or_named(run: Converter, tmp_path: Path, encoding: str, name: str) -> None:
    text = json.dumps([GOOD]) if name == "rows.json" else json.dumps(GOOD) + "\r\n\r\n" + json.dumps(GOOD) + "\r\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    if encoding == "utf-16":
        with pytest.raises(ConfigError, match="save it as UTF-8"):
            run("alpaca", tmp_path / name)
    else:
        assert {str(flat(sample)) for sample in run("alpaca", tmp_path / name)} == {str(PAIR)}


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
@pytest.mark.parametrize("kept", [0.1, 0.7])
def test_a_cut_gzip_file_is_named(run: Converter, tmp_path: Path, name: str, kept: float) -> None:
    rows = [{"instruction": f"{n * 7919}", "output": "a"} for n in range(500)]
    lines = "\n".join(json.dumps(row) for row in rows) if ".jsonl" in name else json.dumps(rows)
    if ".csv" in name:
        lines = "instruction,output\n" + "\n".join(f"{row['instruction']},a" for row in rows)
    whole = gzip.compress(lines.encode())
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(SampleError, match="the gzip file is cut or damaged"):
        run("alpaca", tmp_path / name)


def test_lines_in_a_file_named_json_are_lines_however_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(GOOD | {"output": "a" * (1 << 21)}) for _ in range(2)))
    assert len(list(records(path))) == 2


def test_a_folder_of_tables_is_read_and_a_mixed_one_refused(run: Converter, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    for part in ("a", "b"):
        (folder / part).mkdir(parents=True)
        (folder / part / "rows.csv").write_text("instruction,output\nq,a\nshort\n")
    with pytest.raises(RejectedRows, match=r"b/rows\.csv\[1\]") as caught:
        run("alpaca", folder)
    assert "2 of 4 rows" in str(caught.value)
    (folder / "more.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(ConfigError, match=r"several kinds \(JSON, CSV\)"):
        run("alpaca", folder)


def test_two_columns_of_one_name_are_refused(run: Converter, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,answer,answer\nq,a,b\n")
    with pytest.raises(ConfigError, match="two columns of the header have one name"):
        run("table", tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("format", "options", "told"),
    [
        ("llava", {"strip": "maybe"}, "strip is 'maybe'"),
        ("llava", {"unmarked": "frist"}, "should be 'error' or 'first'"),
        ("video", {"frames": "many"}, "frames is 'many'"),
        ("dicom", {"levels": "-1000,400"}, "levels is '-1000,400'"),
        ("refcoco", {"ask": "find"}, "'locate' or 'describe'"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_named(format: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        options_for(format, options)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"image": "a", "conversations": messages("<image>q")}, "llava"),
        ({"conversations": messages()}, "messages"),
        ({"conversation": messages(), "model": "x"}, "messages"),
        ({"conversations": str(turns())}, "sharegpt"),
        ({"prompt": "Write replies.", "completion": "a"}, "prompt-target"),
        ({"prompt": {"text": "q", "role": "prompter", "replies": []}, "message_tree_id": "t"}, "oasst"),
    ],
)
def test_neighbours_are_told_apart(tmp_path: Path, row: dict[str, Any], format: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert detect(tmp_path / "rows.jsonl") == format


WRONG: list[Any] = [None, 3, True, "text", [], {}, [1], [None], {"a": 1}, [[]], float("nan"), "\ud800"]
ROWS: dict[str, Any] = {
    "llava": {"id": "1", "image": "0.png", "conversations": turns("<image>q")},
    "messages": {"messages": messages([{"type": "image", "image": "0.png"}, {"type": "text", "text": "q"}])},
    "ms-swift": {"messages": messages("<image>q", "<bbox>"), "images": ["0.png"], "objects": {"bbox": [[1, 2, 3, 4]]}},
    "alpaca": {"instruction": "q", "output": "a", "history": [["q", "a"]]},
    "visual-genome": {"id": 1, "regions": [{"x": 1, "y": 2, "width": 3, "height": 4, "phrase": "p"}]},
    "refcoco": {"image": "0.png", "bbox": [1, 2, 3, 4], "sentences": [{"sent": "s"}]},
    "cauldron": {"images": ["0.png"], "texts": [{"user": "q", "assistant": "a"}]},
    "mmc4": {"text_list": ["a", "b"], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]},
}


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, item in inside for place in places(item, (*here, key)))]


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = put(value[place[0]], place[1:], new)
    return copy


@pytest.mark.parametrize("format", ROWS)
def test_whatever_stands_in_a_field_a_row_is_a_sample_or_rejected(tmp_path: Path, photos: Path, format: str) -> None:
    row = ROWS[format]
    rows = [put(row, place, value) for place in places(row) for value in WRONG]
    (tmp_path / "rows.json").write_text(json.dumps([row, *rows]))
    made = [isinstance(item, Sample) for item in samples_of(format, tmp_path / "rows.json", photos, {})]
    assert made[0]
    assert len(made) == 1 + len(rows)
    assert made.count(False) > len(rows) / 3
