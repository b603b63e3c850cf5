"""Videos of every spelling become the same frames, are opened late, and open nothing but themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_tools.clips import Clip, spread
from data_tools.convert import RejectedRows, Settings, convert
from data_tools.formats import samples_of
from mmit.config import ConfigError
from mmit.data.images import decode
from mmit.data.sample import Sample, VideoPart
from mmit.data.shard_index import INDEX
from tests.tools.conftest import Converter, flat, picture_bytes, read_all


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of films, each a folder of frames: `a` of 6, `b` of 3."""
    for name, count in (("a", 6), ("b", 3)):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "clips" / name / f"{number}.png").write_bytes(
                picture_bytes(number + 10 * len(name + "x" * count))
            )
    (tmp_path / "clips" / "0.png").write_bytes(picture_bytes(99))
    return tmp_path / "clips"


def asked(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}], **more}


def shown(sample: Sample) -> list[bytes | None]:
    return [picture.data for picture in sample.images]


TEXT = {"type": "text", "text": " What?"}


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", asked("<video> What?", videos=["a"])),
        ("messages", asked([{"type": "video_url", "video_url": {"url": "a"}}, TEXT])),
        ("messages", asked([{"type": "video_url", "video_url": "a"}, TEXT])),
        ("messages", asked([{"type": "video", "video": "a"}, TEXT])),
        ("messages", asked([{"type": "video"}, TEXT], videos=["a"])),
        ("trl", asked([{"type": "video"}, TEXT], video="a")),
        (
            "xtuner",
            asked(
                [{"type": "video_url", "video_url": {"url": "a/"}}, {"type": "text", "text": "<VIDEO_CONTEXT> What?"}]
            ),
        ),
        ("ms-swift", asked("<video> What?", videos=["a"])),
        ("ms-swift", {"query": "<video> What?", "response": "x", "videos": "a"}),
    ],
)
def test_every_spelling_of_a_video_gives_the_frames_of_the_video_format(
    run: Converter, clips: Path, format: str, row: dict[str, Any]
) -> None:
    (sample,) = run(format, [row], clips, frames=3)
    (expected,) = run("video", [asked("<video> What?", videos=["a"])], clips, frames=3)
    assert (
        flat(sample)
        == flat(expected)
        == [
            ("user", [VideoPart((0, 1, 2), (1.0, 3.0, 5.0)), " What?"]),
            ("assistant", ["x"]),
        ]
    )
    assert shown(sample) == shown(expected) == [(clips / "a" / f"{n}.png").read_bytes() for n in (1, 3, 5)]


def test_pictures_and_videos_of_one_row_keep_their_places(run: Converter, clips: Path) -> None:
    for format in ("messages", "ms-swift", "video"):
        (sample,) = run(
            format, [asked("<video>a<image>b<video>", videos=["b", "a"], images=["0.png"])], clips, frames=2
        )
        first, _, picture, _, second = sample.messages[0].parts
        assert isinstance(first, VideoPart)
        assert isinstance(second, VideoPart)
        assert (len(first.frames), len(second.frames)) == (2, 2)
        where = [*first.frames, picture.image, *second.frames]  # pyright: ignore[reportAttributeAccessIssue]
        names = ["b/0.png", "b/2.png", "0.png", "a/1.png", "a/4.png"]
        assert [sample.images[n].data for n in where] == [(clips / name).read_bytes() for name in names]


def test_llama_factorys_column_of_videos_is_read(run: Converter, clips: Path) -> None:
    (clips / "rows.json").write_text(json.dumps([asked("<video>q", clips=["b"])]))
    described = {
        "file_name": "rows.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "videos": "clips"},
    }
    described["tags"] = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    (clips / "dataset_info.json").write_text(json.dumps({"films": described}))
    (sample,) = run("llamafactory", clips, dataset="films")
    assert flat(sample)[0] == ("user", [VideoPart((0, 1, 2), (0.0, 1.0, 2.0)), "q"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (asked("<video>q"), None),
        (asked("q", videos=["a"]), "1 videos but 0 places"),
        (asked("<video><video>q", videos=["a"]), "the place of video 1, but the row has 1 videos"),
        (asked([{"type": "video", "video": "a", "video_start": 3.0}]), "a stretch of a video"),
        (asked([{"type": "video", "video": ["1.jpg", "2.jpg"]}]), "a video is named by"),
        (asked("<video>q", videos=["../a"]), "outside the images folder"),
        (asked("<video>q", videos=["https://x/y.mp4"]), "is a URL"),
    ],
)
def test_a_video_without_its_place_is_rejected_and_a_word_stays_a_word(
    run: Converter, clips: Path, row: dict[str, Any], reason: str | None
) -> None:
    if reason is None:
        assert flat(run("messages", [row], clips)[0])[0] == ("user", ["<video>q"])
        return
    with pytest.raises(RejectedRows, match=reason):
        run("messages", [row], clips)


def test_rows_are_read_without_opening_a_video(clips: Path, tmp_path: Path) -> None:
    (clips / "broken.mp4").write_bytes(b"no film")
    (tmp_path / "rows.json").write_text(json.dumps([asked("<video>", videos=["broken.mp4"])]))
    (sample,) = samples_of("messages", tmp_path / "rows.json", clips, {})
    assert isinstance(sample.images[0], Clip)


def test_missing_videos_are_all_named_before_anything_is_written(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([asked("<video>q", videos=[name]) for name in ("a", "x.mp4", "y")]))
    with pytest.raises(ConfigError, match=r"2 .* missing(.|\n)*x\.mp4(.|\n)*y"):
        convert("messages", tmp_path / "rows.json", clips, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()
    kept = convert("messages", tmp_path / "rows.json", clips, tmp_path / "t", settings=Settings(on_missing="text-only"))
    assert [flat(sample)[0][1][-1] for sample in read_all(kept)] == ["q"] * 3
    assert [len(sample.images) for sample in read_all(kept)] == [6, 0, 0]


def test_a_frame_that_is_missing_leaves_the_others_of_its_video(run: Converter, clips: Path) -> None:
    (clips / "b" / "1.png").unlink()
    (clips / "b" / "1.png").symlink_to("gone.png")
    rows = [asked("<video>q", videos=["b"])]
    (sample,) = run("video", rows, clips, settings=Settings(on_missing="text-only"))
    assert flat(sample)[0] == ("user", [VideoPart((0, 1), (0.0, 2.0)), "q"])


def test_frames_outside_of_the_folder_are_not_read(run: Converter, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "0.png").write_bytes(picture_bytes(1))
    (clips / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(RejectedRows, match="leads out of the images folder"):
        run("messages", [asked("<video>q", videos=["link"])], clips)


@pytest.mark.shared
@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile secret.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_that_poses_as_a_video_opens_nothing(
    run: Converter, shared: Path, clips: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av", reason="PyAV is an extra")
    monkeypatch.chdir(clips)
    (clips / "secret.mp4").symlink_to(shared / "llamafactory" / "mllm_demo_data" / "3.mp4")
    (clips / "a.mp4").write_text(text)
    with pytest.raises(RejectedRows, match="cannot be decoded as video"):
        run("messages", [asked("<video>q", videos=["a.mp4"])], clips)


@pytest.mark.shared
def test_a_film_gives_the_frames_nearest_the_middles_of_its_stretches(run: Converter, shared: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is an extra")
    folder = shared / "llamafactory"
    with av.open(str(folder / "mllm_demo_data" / "3.mp4")) as film:
        frames = [(frame.to_ndarray(format="rgb24"), float(frame.time)) for frame in film.decode(video=0)]
    (sample,) = run("messages", [asked("<video>q", videos=["mllm_demo_data/3.mp4"])], folder, frames=4)
    part = sample.messages[0].parts[0]
    assert isinstance(part, VideoPart)
    for picture, second, number in zip(sample.images, part.seconds, spread(len(frames), 4), strict=True):
        assert second == pytest.approx(frames[number][1] - frames[0][1], abs=1e-3)
        assert (decode(picture.data or b"", "") == frames[number][0]).all()


@pytest.mark.shared
@pytest.mark.parametrize(("kind", "more"), [("mp4", {"movflags": "faststart"}), ("matroska", {})])
def test_a_cut_film_is_rejected_and_not_taken_for_a_short_one(
    run: Converter, shared: Path, tmp_path: Path, kind: str, more: dict[str, str]
) -> None:
    av = pytest.importorskip("av", reason="PyAV is an extra")
    film = tmp_path / "film"
    with (
        av.open(str(shared / "llamafactory" / "mllm_demo_data" / "3.mp4")) as source,
        av.open(str(film), "w", format=kind, options=more) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    rows, whole = [asked("<video>q", videos=["film"])], film.read_bytes()
    assert len(run("messages", rows, tmp_path)[0].images) == 8
    for share in (0.3, 0.5, 0.75):
        film.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(RejectedRows, match=r"film is cut|cannot be decoded"):
            run("messages", rows, tmp_path)


@pytest.mark.shared
def test_real_video_rows_of_xtuner_are_read(run: Converter, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is an extra")
    path = shared / "xtuner" / "mllm_sft_video_example_data.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with pytest.raises(ConfigError, match=rf"4 .* named by {len(rows)} rows are missing"):
        run("xtuner", path, shared / "xtuner")
    # The films are not among the files: others stand in for them.
    shutil.copy(shared / "llamafactory" / "mllm_demo_data" / "3.mp4", tmp_path / "tennis.mp4")
    for rate in (2, 4, 15):
        (tmp_path / f"tennis_frames_{rate}fps").mkdir()
        for number in range(rate):
            (tmp_path / f"tennis_frames_{rate}fps" / f"{number:02d}.png").write_bytes(picture_bytes(number))
    samples = run("xtuner", path, tmp_path, frames=2)
    assert len(samples) == len(rows)
    for row, sample in zip(rows, samples, strict=True):
        assert [item.text.strip() for item in sample.messages] == [
            (item["content"] if isinstance(item["content"], str) else item["content"][-1]["text"])
            .replace("<VIDEO_CONTEXT>", "")
            .strip()
            for item in row["messages"]
        ]
        named = [part for part in row["messages"][0]["content"] if part["type"] == "video_url"]
        parts = [part for part in sample.messages[0].parts if isinstance(part, VideoPart)]
        assert len(parts) == len(named)
        for part, video in zip(parts, named, strict=True):
            rate = video["video_url"].get("processed_fps")
            if rate is not None:
                assert part.seconds == tuple(n / rate for n in spread(rate, 2)), "the row says how fast its frames are"
