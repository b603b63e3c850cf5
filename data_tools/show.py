"""A sample on the terminal: its pictures and messages, or every token coloured by who wrote it and what is trained."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from data_tools.album import png_of
from data_tools.finished import write_whole
from mmit.config import Config, ConfigError, RandomLanguage, load_config
from mmit.data.byte_tokenizer import byte_tokenizer
from mmit.data.chat import Chat, Rendered, Span, find_placeholder, resolve
from mmit.data.images import decode
from mmit.data.sample import BoxPart, ImagePart, Message, Part, Picture, Sample, TextPart, VideoPart
from mmit.data.shards import ShardSet

TRAINED = "bold green"
ROLE_STYLES = {"system": "magenta", "user": "cyan", "assistant": "yellow", "tool": "blue"}
PICTURE = "white on dark_blue"
CONTROL_PICTURES = {number: 0x2400 + number for number in range(32) if chr(number) not in "\n\t"} | {
    number: 0xFFFD for number in range(127, 160)
}
LARGEST = 1024
"""Pixels of the longer side of a picture on a page, which holds them all."""
LOOK_BACK = 6
"""Tokens before a token that decide how it reads (a leading space, a character of several tokens)."""


def show(
    shards: Path | str,
    *,
    index: int = 0,
    count: int = 1,
    run: Path | None = None,
    stage: str | None = None,
    language: str | None = None,
    chat: str = "auto",
    image_tokens: int = 16,
    console: Console | None = None,
) -> None:
    """Print `count` samples from `index` on; with a run or a tokenizer, as tokens."""
    samples, numbers = _asked_for(shards, index, count)
    binding = _binding(run, stage, language, chat, image_tokens)
    # No folding: a log or a pipe gets whole lines, a terminal folds by itself.
    screen = console or Console(highlight=False, soft_wrap=True)
    for number in numbers:
        _print(samples, number, binding, image_tokens, screen)


def _asked_for(shards: Path | str, index: int, count: int) -> tuple[ShardSet, range]:
    samples = ShardSet(shards)
    if not 0 <= index < len(samples):
        raise ConfigError(f"--index {index}: {shards} holds {len(samples)} samples; write 0 to {len(samples) - 1}")
    numbers = range(index, min(index + count, len(samples)))
    return samples.for_few(numbers), numbers


def _binding(run: Path | None, stage: str | None, language: str | None, chat: str, image_tokens: int) -> Chat | None:
    if run is not None and language is not None:
        raise ConfigError("--run and --language both name a tokenizer; keep one of them")
    if image_tokens < 1:
        raise ConfigError(f"--image-tokens {image_tokens}: a picture takes at least one token")
    return chat_of_run(run, stage) if run is not None else chat_of(language, chat) if language is not None else None


def _print(samples: ShardSet, number: int, binding: Chat | None, image_tokens: int, screen: Console) -> None:
    sample = samples.read(number, images=False)
    for line in headed(sample, samples.where(number)):
        screen.print(line, soft_wrap=True)
    if binding is None:
        for item in sample.messages:
            screen.print(as_text(item, sample), soft_wrap=True)
    else:
        rendered = binding.render(sample, [image_tokens] * len(sample.images), boxes=plain_box)
        screen.print(tokens(binding, rendered, sample, marks=not screen.is_terminal), soft_wrap=True)
        screen.print(legend(rendered, image_tokens if sample.images else None), soft_wrap=True)
    screen.print()


def page(
    shards: Path | str,
    out: Path,
    *,
    index: int = 0,
    count: int = 1,
    run: Path | None = None,
    stage: str | None = None,
    language: str | None = None,
    chat: str = "auto",
    image_tokens: int = 16,
) -> None:
    """The same as an HTML page with the pictures in it: texts escaped, no script, nothing fetched."""
    text = io.StringIO()
    console = Console(
        file=text, force_terminal=True, color_system="truecolor", record=True, soft_wrap=True, width=10**6
    )
    samples, numbers = _asked_for(shards, index, count)
    binding = _binding(run, stage, language, chat, image_tokens)
    blocks = []
    for number in numbers:
        _print(samples, number, binding, image_tokens, console)
        shown = console.export_html(theme=MONOKAI, inline_styles=True, code_format="{code}", clear=True)
        pictures = "".join(_inline(picture, samples.where(number)) for picture in samples.read(number).images)
        blocks.append(f"<section>{pictures}<pre>{shown}</pre></section>")
    write_whole(out, PAGE.format(title=html.escape(samples.name), body="".join(blocks)))


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"><title>{title}</title><style>
body{{background:#1b1b1b;color:#ddd;font:15px/1.6 ui-monospace,monospace;max-width:70em;margin:2em auto;padding:0 1em}}
pre{{white-space:pre-wrap;font:inherit}} img{{max-width:100%;max-height:320px;margin:0 1em 1em 0}}
section{{border-top:1px solid #444;padding:1em 0}}</style></head><body>{body}</body></html>
"""


def _inline(picture: Picture, where: str) -> str:
    """The picture as the decoder sees it, so that a page shows what is trained on; a large one made smaller."""
    shown = Image.fromarray(decode(picture.data or b"", where, window=picture.window))
    shown.thumbnail((LARGEST, LARGEST))
    data = png_of(np.asarray(shown), where)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def chat_of(language: str, chat: str) -> Chat:
    """The chat format bound to a tokenizer: a hub name, a folder, or `bytes`."""
    from transformers import AutoTokenizer

    if language == "bytes":
        tokenizer = byte_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(language)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"tokenizer {language!r} cannot be loaded ({reason}); name a folder, a hub model or `bytes`"
            ) from None
    placeholder = find_placeholder(tokenizer)
    return resolve(chat, tokenizer, placeholder=len(tokenizer) if placeholder is None else placeholder)


def chat_of_run(run: Path, stage: str | None) -> Chat:
    """The chat format of a config file or run folder, that of its last stage unless another is named."""
    config: Config = load_config(run / "config.yaml" if run.is_dir() else run)
    names = [item.name for item in config.stages]
    if stage is not None and stage not in names:
        raise ConfigError(f"--stage {stage}: {run} has the stages {', '.join(names)}")
    chosen = config.stages[names.index(stage)] if stage is not None else config.stages[-1]
    language = config.model.language
    name = language.tokenizer if isinstance(language, RandomLanguage) else language or str(config.model.source)
    return chat_of(name, chosen.chat or config.model.chat)


def plain_box(part: BoxPart) -> str:
    """A box in the pixels of its picture; a run writes it for its own picture fit instead."""
    return f"[{part.left:g}, {part.top:g}, {part.right:g}, {part.bottom:g}]"


def headed(sample: Sample, where: str) -> Iterator[Text]:
    yield Text(where, style="bold")
    for number, picture in enumerate(sample.images):
        yield Text(f"  picture {number}: {picture.width} x {picture.height} {picture.ending}, {picture.sha256[:12]}")
    if sample.meta:
        yield visible(f"  {json.dumps(dict(sample.meta), ensure_ascii=False)}", "dim")


def as_text(item: Message, sample: Sample) -> Text:
    line = Text(f"{item.role}: ", style=ROLE_STYLES[item.role])
    for part in item.parts:
        line.append_text(_part(part, sample, TRAINED if item.train else ROLE_STYLES[item.role]))
    return line


def _part(part: Part, sample: Sample, style: str) -> Text:
    match part:
        case TextPart(text):
            return visible(text, style)
        case ImagePart(image):
            return Text(f"[picture {image}: {size(sample, image)}]", style=PICTURE)
        case VideoPart(frames, seconds):
            return Text(f"[video of {len(frames)} frames, {seconds[0]:g} to {seconds[-1]:g} s]", style=PICTURE)
        case BoxPart():
            return Text(f"[box in picture {part.image}: {plain_box(part)[1:-1]}]", style=PICTURE)


def size(sample: Sample, picture: int) -> str:
    return f"{sample.images[picture].width} x {sample.images[picture].height}"


def visible(text: str, style: str) -> Text:
    """The text with control characters as pictures of themselves, so that no data steers the terminal."""
    return Text(text.translate(CONTROL_PICTURES), style=style)


@dataclass(frozen=True)
class Token:
    """One token as it reads, or several that only together make a character."""

    start: int
    stop: int
    text: str
    span: Span
    trained: bool


def read_tokens(chat: Chat, rendered: Rendered) -> Iterator[Token]:
    """All tokens in order; a picture's placeholders come as one."""
    ids = [int(number) for number in rendered.ids]
    control = {number: content for content, number in chat.text.special.items()}

    def text_of(start: int, stop: int) -> str:
        return chat.text.decode(ids[start:stop])

    for span in rendered.spans:
        if span.kind == "image":
            yield Token(span.start, span.stop, "", span, False)
            continue
        start = span.start
        while start < span.stop:
            trained = bool(rendered.labels[start] != -100)
            stop = start + 1
            if ids[start] in control:
                yield Token(start, stop, control[ids[start]], span, trained)
                start = stop
                continue
            before = max(span.start, start - LOOK_BACK)
            lead = text_of(before, start)
            while stop < span.stop and text_of(before, stop).endswith("�"):
                stop += 1
            whole = text_of(before, stop)
            text = whole.removeprefix(lead) if whole.startswith(lead) else text_of(start, stop)
            yield Token(start, stop, text, span, trained)
            start = stop


def tokens(chat: Chat, rendered: Rendered, sample: Sample, *, marks: bool) -> Text:
    """Coloured tokens, every other one underlined; with `marks`, what is trained also stands in ⟦ ⟧."""
    pictures = {start: picture for start, _, picture in rendered.images}
    line, inside = Text(), False
    for number, token in enumerate(read_tokens(chat, rendered)):
        if marks and token.trained != inside:
            line.append("⟦" if token.trained else "⟧")
            inside = token.trained
        if token.span.kind == "image":
            picture = pictures[token.start]
            line.append(
                f"[picture {picture}: {size(sample, picture)}, {token.stop - token.start} tokens]", style=PICTURE
            )
            continue
        style = TRAINED if token.trained else ROLE_STYLES[token.span.role]
        if token.span.kind == "marker" and not token.trained:
            style += " dim"
        shown = visible(token.text, f"{style} underline" if number % 2 else style)
        line.append_text(shown)
    if inside:
        line.append("⟧")
    return line


def legend(rendered: Rendered, image_tokens: int | None) -> Text:
    trained = int((rendered.labels != -100).sum())
    line = Text(f"{len(rendered)} tokens, {trained} trained   ")
    line.append("trained", style=TRAINED)
    for role, style in ROLE_STYLES.items():
        line.append("  ").append(role, style=style)
    line.append("  ").append("picture", style=PICTURE)
    if image_tokens is not None:
        line.append(f"  ({image_tokens} tokens a picture assumed: --image-tokens)", style="dim")
    return line
