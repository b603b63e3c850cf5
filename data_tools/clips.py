"""Videos as frames: how many are taken, from where, at which seconds."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.album import Album, Unread, lies_below, open_below, unread
from data_tools.holders import Holder
from mmit.config import ConfigError
from mmit.data.sample import Picture, SampleError

PICTURES = {".jpg", ".jpeg", ".png", ".webp"}
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,flv,asf,ogg,gif"
"""What FFmpeg may take a file for. Playlists, which name further files to open, are none of them."""


@dataclass(frozen=True)
class Filming:
    """Which frames are taken of every video of an input."""

    frames: int = 8
    """So many, evenly over the video, from the middle of each stretch."""
    fps: float | None = None
    """So many a second, and at most `frames`; of a folder of frames, how many a second it holds."""
    times: bool = False
    """Their seconds stand as text before them."""

    def __post_init__(self) -> None:
        if self.frames < 1 or (self.fps is not None and self.fps <= 0):
            raise ConfigError("videos: frames must be at least 1 and fps above 0")


@dataclass(frozen=True)
class Clip(Holder):
    """A video file, or a folder of its frames."""

    filming: Filming = field(default_factory=Filming)
    rate: float | None = None
    """Frames a second of a folder of them, where the row says so."""

    def pictures(self) -> list[tuple[Picture, float]]:
        return self._listed() if os.path.isdir(self.path) else _decoded(self)

    def told(self, seconds: tuple[float, ...]) -> str:
        shown = ", ".join(f"{second:.1f}" for second in seconds)
        return f"Frames at {shown} s: " if self.filming.times else ""

    def _listed(self) -> list[tuple[Picture, float]]:
        if not lies_below(self.path, self.root):
            raise SampleError(f"{self.where}: {self.name} is a link that leads out of the images folder; copy it there")
        files = [name for name in sorted(os.listdir(self.path)) if Path(name).suffix.lower() in PICTURES]
        if not files:
            raise SampleError(f"{self.where}: the folder {self.name} holds no frames")
        rate = self.rate or self.filming.fps or 1.0
        chosen = spread(len(files), self.filming.frames)
        named = [os.path.join(self.name, files[number]) for number in chosen]
        return [
            (Unread(0, 0, "", "", name=name, root=self.root, where=self.where), number / rate)
            for name, number in zip(named, chosen, strict=True)
        ]


def clip_of(album: Album, name: Any, where: str, filming: Filming, *, rate: Any = None) -> Clip:
    """The video that a row calls `name`, a file or a folder of frames below --images."""
    if isinstance(name, dict):
        name = name.get("url") or name.get("path")
    if not isinstance(name, str) or not name or name.startswith("data:"):
        raise SampleError(
            f"{where}: a video is named by {str(name)[:60]!r}; write the path of its file, or of a folder of its "
            f"frames, below --images"
        )
    if album.root is None:
        raise SampleError(f"{where}: the row names the video {name!r}; say with --images which folder holds it")
    place = album.picture(name, where)
    known = float(rate) if isinstance(rate, int | float) and rate > 0 else None
    return Clip(0, 0, "", "", name=place.name, root=place.root, where=where, filming=filming, rate=known)


def _decoded(clip: Clip) -> list[tuple[Picture, float]]:
    try:
        import av  # pyright: ignore[reportMissingImports]
        from av.error import FFmpegError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("video files need PyAV to be opened: pip install 'mmit[video]'") from None
    allowed = {"format_whitelist": CONTAINERS}
    try:
        with os.fdopen(open_below(clip), "rb") as file:
            with av.open(file, "r", container_options=allowed) as container:
                # Two passes, the first without keeping a picture: headers are often wrong about length and rate.
                seconds = [float(frame.time or 0.0) for frame in container.decode(container.streams.video[0])]
                if not seconds:
                    raise SampleError(f"{clip.where}: {clip.name} holds no frame")
                _check_whole(clip, container, seconds)
            chosen = set(spread(len(seconds), _count(seconds, clip.filming)))
            kept: list[tuple[Picture, float]] = []
            file.seek(0)
            with av.open(file, "r", container_options=allowed) as container:
                for number, frame in enumerate(container.decode(container.streams.video[0])):
                    if number in chosen:
                        stream = io.BytesIO()
                        # Phones store how the video is to be turned beside the frames.
                        frame.to_image().rotate(frame.rotation, expand=True).save(stream, format="PNG")
                        kept.append((unread(stream.getvalue(), clip.where), round(seconds[number] - seconds[0], 3)))
        return kept
    except (FFmpegError, IndexError) as error:
        raise SampleError(
            f"{clip.where}: {clip.name} cannot be decoded as video ({type(error).__name__}); it is cut, or none of "
            f"mp4, mov, webm, mkv, avi, mpeg, flv, wmv, ogv and gif"
        ) from None
    except OSError as error:
        raise SampleError(f"{clip.where}: cannot read {clip.name} ({error.strerror})") from None


def _check_whole(clip: Clip, container: Any, seconds: list[float]) -> None:
    """FFmpeg gives the frames of a cut file as if there were no more. What mp4 and mkv say of their length can be
    trusted so far that a tenth, and a second, does not go missing."""
    counted, length = container.streams.video[0].frames, (container.duration or 0) / 1e6
    there = seconds[-1] - seconds[0]
    cut = "mp4" in container.format.name and len(seconds) < 0.9 * counted
    if cut or ("matroska" in container.format.name and there + 1 < 0.9 * length):
        raise SampleError(
            f"{clip.where}: {clip.name} is cut: {len(seconds)} frames of {there:.1f} s can be decoded, its header says "
            f"{f'{counted} frames' if cut else f'{length:.1f} s'}; fetch it again"
        )


def _count(seconds: list[float], filming: Filming) -> int:
    if filming.fps is None:
        return filming.frames
    return max(1, min(filming.frames, round((seconds[-1] - seconds[0]) * filming.fps)))


def spread(length: int, count: int) -> list[int]:
    """The middles of `count` equal stretches of `length` frames."""
    count = min(length, count)
    return [int((number + 0.5) * length / count) for number in range(count)]
