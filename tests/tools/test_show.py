from __future__ import annotations

import html
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.convert import convert
from data_tools.show import chat_of, page, read_tokens, show
from mmit.config import ConfigError
from mmit.data.sample import ImagePart, Sample, TextPart, message
from tests.tools.conftest import picture_bytes
from tests.tools.test_convert import rows_with


def shown(folder: Path, *, terminal: bool = False, **options: object) -> str:
    stream = io.StringIO()
    color = "truecolor" if terminal else None
    console = Console(file=stream, force_terminal=terminal, color_system=color, soft_wrap=True, highlight=False)
    show(folder, console=console, **options)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    convert("llava", rows_with(photos, 3), photos, tmp_path / "shards")
    return tmp_path / "shards"


def test_what_is_trained_stands_in_brackets_and_is_counted(shards: Path) -> None:
    text = shown(shards, index=1, language="bytes", chat="chatml", image_tokens=5)
    assert "<|im_start|>user\n[picture 0: 20 x 12, 5 tokens]\n1?<|im_end|>" in text
    assert re.findall("⟦(.*?)⟧", text) == ["1!<|im_end|>"]
    assert "3 trained" in text


def test_without_a_tokenizer_the_messages_are_shown(shards: Path) -> None:
    text = shown(shards, index=1, count=2)
    assert "user: [picture 0: 20 x 12]\n1?\nassistant: 1!" in text
    assert "assistant: 2!" in text


def test_no_data_steers_the_terminal() -> None:
    sample = Sample("k", "s", (message("user", "a\x1b[2Jb\x9bc[bold]"), message("assistant", "x")))
    from data_tools.show import as_text

    console = Console(file=io.StringIO(), force_terminal=False, soft_wrap=True)
    console.print(as_text(sample.messages[0], sample))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "a␛[2Jb" in text
    assert "[bold]" in text


def test_every_token_is_read_once_and_the_texts_join_to_the_messages() -> None:
    chat = chat_of("bytes", "chatml")
    texts = ("Grüße, 世界 🙂\n\n end", " e\u0301\u0302 <|im_end|> x")
    sample = Sample(
        "k", "s", (message("user", ImagePart(0), TextPart(texts[0])), message("assistant", texts[1])), images=()
    )
    rendered = chat.render(sample, [3])
    tokens = list(read_tokens(chat, rendered))
    assert [token.start for token in tokens[1:]] == [token.stop for token in tokens[:-1]]
    assert tokens[-1].stop == len(rendered.ids)
    for text, role in zip(texts, ("user", "assistant"), strict=True):
        assert "".join(t.text for t in tokens if t.span.role == role and t.span.kind == "text") == text


def test_colours_say_role_and_trained(shards: Path) -> None:
    text = shown(shards, terminal=True, language="bytes", chat="chatml")
    assert "⟦" not in text
    trained = re.findall("\x1b\\[1(?:;4)?;32m([^\x1b]*)\x1b", text)
    assert "".join(trained).startswith("0!<|im_end|>")


def test_a_config_names_tokenizer_and_chat(shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
output: {tmp_path}/run
model:
  language: {{random: {{model_type: llama}}, tokenizer: bytes}}
  vision: {{library: open_clip, random: {{}}}}
  chat: vicuna_v1
stages:
  - {{name: align, data: [{{shards: {shards}}}], chat: plain, train: {{projector: {{lr: 1e-3}}}}, batch_size: 2}}
  - {{name: sft, data: [{{shards: {shards}}}], train: {{projector: {{lr: 1e-3}}}}, batch_size: 2}}
"""
    )
    assert "USER: " in shown(shards, run=config)
    plain = shown(shards, run=config, stage="align")
    assert "USER: " not in plain
    assert "⟦0!\n⟧" in plain
    with pytest.raises(ConfigError, match="has the stages align, sft"):
        shown(shards, run=config, stage="sleep")


def test_a_large_photo_is_made_smaller_for_the_page(photos: Path, tmp_path: Path) -> None:
    # 9 megapixels of noise: over 20 MB as PNG
    (photos / "large.jpg").write_bytes(picture_bytes(1, kind="JPEG", size=(3600, 2500)))
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "in.json").write_text(json.dumps([{"image": "large.jpg", "conversations": turns}]))
    convert("llava", tmp_path / "in.json", photos, tmp_path / "set")
    page(tmp_path / "set", tmp_path / "page.html")
    assert 10_000 < (tmp_path / "page.html").stat().st_size < 5_000_000


def test_a_wrong_index_is_told_the_range(shards: Path) -> None:
    with pytest.raises(ConfigError, match="write 0 to 2"):
        shown(shards, index=3)


def test_the_page_shows_pictures_and_text_as_text(photos: Path, tmp_path: Path) -> None:
    evil = '<script>alert(1)</script><img src="http://x/y"> &amp; {body}'
    turns = [{"from": "human", "value": f"<image>{evil}"}, {"from": "gpt", "value": "</pre>x"}]
    (tmp_path / "in.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}] * 2))
    convert("llava", tmp_path / "in.json", photos, tmp_path / "set")
    page(tmp_path / "set", tmp_path / "page.html", count=2, language="bytes", chat="chatml")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("</pre>") == 2
    assert re.findall(r'<img [^>]*src="(?!data:image/png;base64,)', text) == []
    assert text.count("<img ") == 2
    plain = html.unescape(re.sub("<[^>]*>", "", text))
    assert plain.count(evil) == 2
    with pytest.raises(ConfigError, match="write 0 to 1"):
        page(tmp_path / "set", tmp_path / "page.html", index=2)
