"""Conversation formats: every text, role, picture and place of real rows, read here by another route."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_tools.convert import RejectedRows, Settings
from mmit.data.images import decode
from mmit.data.sample import BoxPart, Sample
from tests.tools.conftest import Converter, flat, picture_bytes


def json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def pixels(sample: Sample) -> list[bytes]:
    return [decode(picture.data or b"", "").tobytes() for picture in sample.images]


def pixels_of(*files: Path) -> list[bytes]:
    return [decode(file.read_bytes(), "").tobytes() for file in files]


def split(text: str, marker: str, first: int) -> list[Any]:
    """Texts and picture numbers, edges stripped, worked out without the code under test."""
    parts: list[Any] = []
    for number, piece in enumerate(text.split(marker)):
        parts += [first + number - 1] if number else []
        parts += [piece] if piece else []
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return [part for part in parts if part != ""]


# Real rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize("format", ["messages", "llamafactory", "ms-swift"])
def test_real_marked_messages_keep_texts_pictures_and_places(run: Converter, shared: Path, format: str) -> None:
    folder = shared / "llamafactory"
    rows = json.loads((folder / "mllm_demo.json").read_text(encoding="utf-8"))
    if format == "llamafactory":
        samples = run(format, folder, dataset="mllm_demo")
    else:
        samples = run(format, folder / "mllm_demo.json", folder)
    assert len(samples) == len(rows) == 6
    for row, sample in zip(rows, samples, strict=True):
        seen, expected = 0, []
        for item in row["messages"]:
            expected.append((item["role"], split(item["content"], "<image>", seen)))
            seen += item["content"].count("<image>")
        assert flat(sample) == expected
        assert pixels(sample) == pixels_of(*(folder / name for name in row["images"]))


@pytest.mark.shared
def test_real_parts_named_value_are_read(run: Converter, shared: Path) -> None:
    folder = shared / "llamafactory"
    rows = json_lines(folder / "v1_multimodal_demo.jsonl")
    samples = run("messages", folder / "v1_multimodal_demo.jsonl", folder, image_prefix="data/")
    assert len(samples) == len(rows) > 10
    for row, sample in zip(rows, samples, strict=True):
        names = [p["value"] for m in row["messages"] for p in m["content"] if p["type"] == "image_url"]
        seen, expected = 0, []
        for item in row["messages"]:
            parts = []
            for part in item["content"]:
                parts.append(part["value"] if part["type"] == "text" else seen)
                seen += part["type"] == "image_url"
            expected.append((item["role"], parts))
        assert flat(sample) == expected
        assert pixels(sample) == pixels_of(*(folder / name.removeprefix("data/") for name in names))


@pytest.mark.shared
@pytest.mark.parametrize("kind", ["sft_single_image", "sft_multi_image", "pretrain_image", "sft_text"])
def test_real_xtuner_rows_place_pictures_at_their_markers(run: Converter, shared: Path, kind: str) -> None:
    path = shared / "xtuner" / f"mllm_{kind}_example_data.jsonl"
    rows = json_lines(path)
    samples = run("xtuner", path, shared / "xtuner", image_prefix="resource/", settings=Settings(on_bad="drop"))
    kept = []
    for row in rows:
        seen, expected, names = 0, [], []
        for item in row["messages"]:
            content = (
                item["content"] if isinstance(item["content"], list) else [{"type": "text", "text": item["content"]}]
            )
            pictures = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            text = "".join(part["text"] for part in content if part["type"] == "text")
            assert text.count("<IMG_CONTEXT>") == len(pictures), "real rows are consistent"
            role = "assistant" if item["role"] == "pretrain" else item["role"]
            expected.append((role, split(text, "<IMG_CONTEXT>", seen)))
            seen += len(pictures)
            names += pictures
        kept.append((expected, [name.removeprefix("resource/") for name in names]))
    assert len(samples) == len(kept) >= 9
    for sample, (expected, names) in zip(samples, kept, strict=True):
        assert flat(sample) == expected
        assert pixels(sample) == pixels_of(*(shared / "xtuner" / name for name in names))
        assert all(item.train == (item.role == "assistant") for item in sample.messages)


@pytest.mark.shared
def test_real_bare_message_lists_are_read(run: Converter, shared: Path) -> None:
    path = shared / "xtuner" / "openai_sft.jsonl"
    rows = json_lines(path)
    samples = run("messages", path)
    assert [flat(s) for s in samples] == [[(m["role"], [m["content"].strip()]) for m in row] for row in rows]


@pytest.mark.shared
@pytest.mark.parametrize("format", ["sharegpt", "llava"])
def test_real_sharegpt_rows_keep_every_turn(run: Converter, shared: Path, format: str) -> None:
    path = shared / "fastchat" / "dummy_conversation.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    samples = run(format, path)
    role = {"human": "user", "gpt": "assistant"}
    assert [flat(s) for s in samples] == [
        [(role[turn["from"]], [turn["value"].strip()]) for turn in row["conversations"]] for row in rows
    ]
    assert len(samples) == 500


@pytest.mark.shared
@pytest.mark.parametrize("format", ["sharegpt", "llamafactory"])
def test_real_tool_calls_train_and_observations_do_not(run: Converter, shared: Path, format: str) -> None:
    folder = shared / "llamafactory"
    path = folder / "glaive_toolcall_en_demo.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    samples = run(format, path) if format == "sharegpt" else run(format, folder, dataset="glaive_toolcall_en_demo")
    role = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    trained: Counter[str] = Counter()
    for row, sample in zip(rows, samples, strict=True):
        expected = [(role[turn["from"]], [turn["value"].strip()]) for turn in row["conversations"]]
        tools = [("system", [row["tools"].strip()])] if row["tools"] else []
        assert flat(sample) == tools + expected
        for turn, item in zip(row["conversations"], sample.messages[len(tools) :], strict=True):
            trained[turn["from"]] += item.train
    assert trained == {"gpt": 746, "function_call": 211, "human": 0, "observation": 0}


@pytest.mark.shared
def test_real_questions_with_answers_elsewhere_are_rejected_with_the_reason(run: Converter, shared: Path) -> None:
    with pytest.raises(RejectedRows, match="no messages"):
        run("messages", shared / "llava" / "qa90_questions.jsonl")


# The true keys of the others ------------------------------------------------------------------------------------------


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if len(content) == 1 and isinstance(content[0], str) else [*content]}


def test_every_way_to_hold_a_picture_in_a_part(run: Converter, photos: Path) -> None:
    data = picture_bytes(7)
    code = base64.b64encode(data).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{code}", "detail": "high"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{code}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": code}},
        {"type": "image", "base64": code},
        {"type": "image", "path": "0.png"},
        {"type": "image", "image": "0.png"},
        {"type": "image", "url": "0.png"},
        {"type": "text", "text": "What?"},
    ]
    rows = [{"messages": [user(*parts), {"role": "assistant", "content": "x"}]}]
    (sample,) = run("messages", rows, photos)
    assert flat(sample)[0] == ("user", [0, 1, 2, 3, 4, 5, 6, "What?"])
    assert pixels(sample) == [decode(data, "").tobytes()] * 4 + pixels_of(*[photos / "0.png"] * 3)


def test_tool_calls_and_weights_of_openai(run: Converter) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    rows = [
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "1+1? <image>"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
                {"role": "assistant", "content": "2", "weight": 0},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes", "weight": 1},
            ]
        }
    ]
    (sample,) = run("messages", rows)
    assert flat(sample) == [
        ("system", ["Be brief."]),
        ("user", ["1+1? <image>"]),
        ("assistant", ['{"name": "add", "arguments": {"a": 1}}']),
        ("tool", ["2"]),
        ("assistant", ["2"]),
        ("user", ["Sure?"]),
        ("assistant", ["Yes"]),
    ]
    assert [item.train for item in sample.messages] == [False, False, True, False, False, False, True]


def test_trl_rows(run: Converter, photos: Path) -> None:
    rows = [
        {"messages": [user("Two?"), {"role": "assistant", "content": "x"}], "images": ["0.png", "1.png"]},
        {
            "prompt": [user({"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "?"})],
            "completion": [{"role": "assistant", "content": "y"}],
            "image": "2.png",
        },
        {"prompt": "Say <image>", "completion": "<image>"},
    ]
    samples = run("trl", rows, photos)
    assert [flat(sample) for sample in samples] == [
        [("user", [0, 1, "Two?"]), ("assistant", ["x"])],
        [("user", ["And ", 0, "?"]), ("assistant", ["y"])],
        [("user", ["Say <image>"]), ("assistant", ["<image>"])],
    ]
    assert pixels(samples[0]) == pixels_of(photos / "0.png", photos / "1.png")


@pytest.mark.parametrize(
    ("images", "content"),
    [
        (["0.png"], [{"type": "image"}, {"type": "image"}]),
        (["0.png", "1.png"], [{"type": "image"}]),
        ([], [{"type": "image"}]),
        (["0.png"], "<image><image>"),
        (["0.png"], "none"),
    ],
)
def test_places_and_pictures_must_be_as_many(run: Converter, photos: Path, images: Any, content: Any) -> None:
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}], "images": images}
    ]
    with pytest.raises(RejectedRows, match=r"rows\.json\[0\]"):
        run("messages", rows, photos)


def test_pairs_of_human_and_assistant(run: Converter) -> None:
    rows = [{"system": "s", "conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]}]
    assert flat(run("sharegpt", rows)[0]) == [
        ("system", ["s"]),
        ("user", ["a"]),
        ("assistant", ["b"]),
        ("user", ["c"]),
        ("assistant", ["d"]),
    ]


def test_ms_swift_objects_become_boxes_in_pixels(run: Converter, photos: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>Where is <ref-object>?"},
                {"role": "assistant", "content": "At <bbox>.", "loss": True},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "None", "loss": False},
            ],
            "images": ["0.png"],
            "objects": {"ref": ["the dot"], "bbox": [[0.1, 0.5, 0.5, 1.0]], "bbox_type": "norm1"},
        },
        {"query": "What?", "response": "x", "history": [["a", "b"]], "images": ["1.png"]},
    ]
    boxed, plain = run("ms-swift", rows, photos)
    assert flat(boxed)[:2] == [
        ("user", [0, "Where is ", "the dot", "?"]),
        ("assistant", ["At ", BoxPart(0, 2.0, 6.0, 10.0, 12.0), "."]),
    ]
    assert [item.train for item in boxed.messages] == [False, True, False, False]
    assert flat(plain) == [("user", [0, "a"]), ("assistant", ["b"]), ("user", ["What?"]), ("assistant", ["x"])]


def test_qwen_rows_with_a_data_path_and_packed_lists(run: Converter, photos: Path) -> None:
    def row(image: str | None, path: str | None) -> dict[str, Any]:
        text = "<image>\nWhat?" if image else "Hi"
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]
        return {"conversations": turns} | ({"image": image} if image else {}) | ({"data_path": path} if path else {})

    samples = run("qwen-vl", [row("5.jpg", "deep"), [row("0.png", None), row(None, None)]], photos)
    assert [len(sample.images) for sample in samples] == [1, 1, 0]
    assert pixels(samples[0]) == pixels_of(photos / "deep" / "5.jpg")


def test_text_sets_under_their_own_names(run: Converter) -> None:
    pair = [("user", ["q"]), ("assistant", ["a"])]
    cases: list[tuple[str, dict[str, Any], Any]] = [
        ("dolly", {"instruction": "q", "context": "", "response": "a", "category": "open_qa"}, pair),
        ("dolly", {"instruction": "q", "context": "c", "response": "a"}, [("user", ["q\nc"]), ("assistant", ["a"])]),
        ("magicoder", {"lang": "python", "problem": "q", "solution": "a"}, pair),
        ("evol", {"instruction": "q", "output": "a"}, pair),
        ("flan", {"inputs": "q", "targets": "a", "task_source": "Flan2021", "task_name": "x"}, pair),
        ("p3", {"inputs": [1], "targets": [2], "inputs_pretokenized": " q", "targets_pretokenized": "a\n"}, pair),
        ("xp3", {"inputs": "q", "targets": "a", "language": "en"}, pair),
        ("prompt-target", {"prompt": "q", "completion": " a"}, pair),
        ("orca", {"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, [("system", ["s"]), *pair]),
        ("orca", {"id": "1", "system_prompt": "", "question": "q", "response": "a"}, pair),
        ("lima", {"conversations": ["q", "a", "r"], "source": "x"}, [*pair, ("user", ["r"])]),
        ("ultrachat", {"id": "1", "data": ["q", "a"]}, pair),
        ("delimited", {"topic": "t", "input": "s\n[|Human|] q\n[|AI|] a\n[|Human|] "}, [("system", ["s"]), *pair]),
        ("delimited", {"text": "<human>: q\n<bot>: a"}, pair),
        ("delimited", {"text": "### Human: q### Assistant: a"}, pair),
    ]
    for format, row, expected in cases:
        assert [flat(sample) for sample in run(format, [row])] == [expected], (format, row)


@pytest.mark.shared
def test_real_seed_tasks_give_a_sample_an_instance(run: Converter, shared: Path) -> None:
    path = shared / "self_instruct" / "seed_tasks.jsonl"
    expected = [
        [
            ("user", [(row["instruction"] + ("\n" + item["input"] if item["input"] else "")).strip()]),
            ("assistant", [item["output"].strip()]),
        ]
        for row in json_lines(path)
        for item in row["instances"]
    ]
    assert [flat(sample) for sample in run("self-instruct", path)] == expected
    assert len(expected) >= 175


def test_constraints_of_unnatural_instructions_are_told_unless_none(run: Converter) -> None:
    rows = [
        {"instruction": "q", "instances": [{"input": "i", "output": "a", "constraints": c}]} for c in ("None.", "Be")
    ]
    assert [s.messages[0].text for s in run("self-instruct", rows)] == ["q\ni", "q\ni\nBe"]


def test_wrong_p3_answers_are_rejected(run: Converter) -> None:
    row = {"inputs_pretokenized": "q", "targets_pretokenized": "a", "is_correct": False}
    with pytest.raises(RejectedRows, match="is_correct is false"):
        run("p3", [row])


def test_superni_instances(run: Converter) -> None:
    task = {
        "Definition": ["Add."],
        "Positive Examples": [{"input": "1 1", "output": "2", "explanation": ""}],
        "Instances": [{"id": "t-1", "input": "2 2", "output": ["4", "four"]}, {"input": "3 3", "output": ["6"]}],
    }
    first, second = run("superni", task)
    assert flat(second) == [("user", ["Add.\n\n3 3"]), ("assistant", ["6"])]
    assert first.messages[1].text in ("4", "four")
    assert first.meta["id"] == "t-1"
    shown = run("superni", task, examples=1)[1]
    assert shown.messages[0].text == "Add.\n\nInput: 1 1\nOutput: 2\n\nInput: 3 3\nOutput:"


def node(text: str, role: str, **more: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "lang": "en", "deleted": False, "rank": None, "replies": [], **more}


def test_oasst_takes_the_best_reply_at_each_step(run: Converter) -> None:
    bad = node("worse", "assistant", rank=1, replies=[node("never", "prompter")])
    gone = node("deleted", "assistant", rank=0, deleted=True)
    best = node("best", "assistant", rank=0, replies=[node("more?", "prompter", replies=[node("ok", "assistant")])])
    tree = {"message_tree_id": "t", "prompt": node("hi", "prompter", replies=[bad, gone, best])}
    expected = [("user", ["hi"]), ("assistant", ["best"]), ("user", ["more?"]), ("assistant", ["ok"])]
    assert [flat(s) for s in run("oasst", [tree], name="trees.jsonl")] == [expected]
    rows: list[dict[str, Any]] = []

    def walk(item: dict[str, Any], parent: str | None) -> None:
        name = f"m{len(rows)}"
        rows.append({**item, "message_id": name, "parent_id": parent, "message_tree_id": "t"})
        replies = rows[-1].pop("replies")
        for reply in replies:
            walk(reply, name)

    walk(tree["prompt"], None)  # type: ignore[arg-type]
    assert [flat(s) for s in run("oasst", rows, name="flat.jsonl")] == [expected]


def test_parquet_and_csv_rows_read_like_json(run: Converter, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"instruction": f"q{n}\n,", "input": "", "output": f"a{n}"} for n in range(150)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = ["instruction,input,output", *(f'"q{n}\n,",,a{n}' for n in range(150))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    expected = [flat(sample) for sample in run("alpaca", rows)]
    for name in ("rows.parquet", "rows.csv"):
        assert [flat(sample) for sample in run("alpaca", tmp_path / name)] == expected


def test_gzip_is_read(run: Converter, tmp_path: Path) -> None:
    import gzip

    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "q", "output": "a"}\n'))
    assert len(run("alpaca", tmp_path / "rows.jsonl.gz")) == 1


def test_an_unknown_llamafactory_name_lists_those_that_are_there(run: Converter, tmp_path: Path) -> None:
    from mmit.config import ConfigError

    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}, "far": {"hf_hub_url": "x"}}')
    (tmp_path / "mine.json").write_text('[{"instruction": "q", "input": "i", "output": "a"}]')
    (sample,) = run("llamafactory", tmp_path, dataset="mine")
    assert flat(sample) == [("user", ["q\ni"]), ("assistant", ["a"])]
    assert sample.source == "mine"
    with pytest.raises(ConfigError, match="one of mine"):
        run("llamafactory", tmp_path, dataset="yours")
