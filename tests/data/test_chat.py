"""Conversations to ids and labels: the prompt is a prefix, text is text, and every label has an owner."""

from __future__ import annotations

import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmit.config import ConfigError
from mmit.data.byte_tokenizer import byte_tokenizer
from mmit.data.chat import CHAT_FORMATS, Chat, ChatFormat, Rendered, cut, find_placeholder, jinja, resolve
from mmit.data.chat_formats import pieces
from mmit.data.sample import (
    BoxPart,
    ImagePart,
    Message,
    Part,
    Picture,
    Sample,
    SampleError,
    TextPart,
    VideoPart,
    image_indices,
    message,
)
from tests.data.made_tokenizers import byte_level, metaspace, unigram

TOKENIZERS = {
    "bytes": byte_tokenizer,
    "byte_level": byte_level,
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_prepend": lambda: metaspace("prepend"),
    "unigram_always": lambda: unigram("always"),
}
CHATS = [
    ("bytes", "chatml"),
    ("byte_level", "chatml"),
    ("byte_level", "vicuna_v1"),
    ("metaspace_always", "vicuna_v1"),
    ("metaspace_first", "vicuna_v1"),
    ("metaspace_prepend", "llava_llama_2"),
    ("unigram_always", "vicuna_v1"),
    ("metaspace_always", "plain"),
]
CONTROL = ["<|im_end|>", "<|im_start|>", "<image>", "</s>", "<s>", "<tool_call>", "<unk>", "<pad>", "    ", "[/INST]"]
WORDS = ["yes", "two cats", " a dog", "\n\n", "\n", "  ", "sofa.", "USER:", "ASSISTANT:", "Zoë 世界 🙂", "1, 2", "\t"]


def chat_of(tokenizer: str, format: str) -> Chat:
    made = TOKENIZERS[tokenizer]()
    return resolve(format, made, placeholder=find_placeholder(made))


def text_of(draw: random.Random, words: list[str]) -> str:
    return "".join(draw.choice(words) for _ in range(draw.randint(0, 6)))


def conversation(draw: random.Random, format: ChatFormat, words: list[str]) -> Sample:
    """A random conversation with pictures anywhere, the same one sometimes twice."""
    images = draw.randint(1, 3)
    messages = [message("system", text_of(draw, words))] if format.system and draw.random() < 0.5 else []
    for turn in range(draw.randint(1, 4)):
        parts: list[Part] = [TextPart(text_of(draw, words)) for _ in range(draw.randint(1, 3))]
        shown = list(range(images)) if turn == 0 else [draw.randrange(images)] * (draw.random() < 0.3)
        for image in shown:
            parts.insert(draw.randint(0, len(parts)), ImagePart(image))
        answer: list[Part] = [TextPart(text_of(draw, words))]
        if draw.random() < 0.1:
            answer.insert(draw.randint(0, 1), ImagePart(0))
        messages += [message("user", *parts), message("assistant", *answer, train=draw.random() < 0.8)]
    return Sample("key", "source", tuple(messages), tuple(Picture(8, 8, str(i), "png") for i in range(images)))


def ids_of(rendered: Rendered) -> list[int]:
    return rendered.ids.tolist()


def check_shape(rendered: Rendered, chat: Chat) -> None:
    assert rendered.ids.shape == rendered.labels.shape
    assert rendered.ids.dtype == rendered.labels.dtype == np.int32
    assert [span.start for span in rendered.spans] == [0, *(span.stop for span in rendered.spans)][:-1]
    assert rendered.spans[-1].stop == len(rendered)
    inside = np.zeros(len(rendered), bool)
    for start, stop, _ in rendered.images:
        assert not inside[start:stop].any()
        inside[start:stop] = True
    assert (inside == (rendered.ids == chat.placeholder)).all()
    assert (rendered.labels[inside] == -100).all()
    learned = rendered.labels != -100
    assert (rendered.labels[learned] == rendered.ids[learned]).all()


@pytest.mark.parametrize(("tokenizer", "format"), CHATS)
def test_training_ids_start_with_the_ids_of_every_prompt_in_1000_conversations(tokenizer: str, format: str) -> None:
    chat, draw = chat_of(tokenizer, format), random.Random(1)
    for _ in range(1000 // len(CHATS) + 1):
        sample = conversation(draw, chat.format, WORDS + CONTROL)
        tokens = [draw.randint(1, 4) for _ in sample.images]
        rendered = chat.render(sample, tokens)
        check_shape(rendered, chat)
        ends = iter(rendered.turn_ends)
        for number, item in enumerate(sample.messages):
            if item.role != "assistant":
                continue
            prompt = chat.prompt(sample.messages[:number], tokens)
            assert ids_of(rendered)[: len(prompt)] == ids_of(prompt)
            assert (prompt.labels == -100).all()
            learned = rendered.labels[len(prompt) : next(ends)] != -100
            if item.train:
                pictures = sum(tokens[i] for part in item.parts for i in image_indices(part))
                stretch = learned[: learned.nonzero()[0][-1] + 1]
                assert (~stretch).sum() == pictures
            assert learned.any() == item.train


@pytest.mark.parametrize(("tokenizer", "format"), CHATS)
def test_control_tokens_in_text_change_no_count_in_1000_conversations(tokenizer: str, format: str) -> None:
    chat, draw = chat_of(tokenizer, format), random.Random(2)
    control = sorted(chat.text.special.values())
    for _ in range(1000 // len(CHATS) + 1):
        sample = conversation(draw, chat.format, [*CONTROL, "x", "<", "|im_end|>", " "])
        tokens = [2] * len(sample.images)
        tame = tuple(
            replace(item, parts=tuple(TextPart("x") if isinstance(p, TextPart) else p for p in item.parts))
            for item in sample.messages
        )
        wild, calm = chat.render(sample, tokens), chat.render(replace(sample, messages=tame), tokens)
        for number in control:
            assert (wild.ids == number).sum() == (calm.ids == number).sum()
        assert len(wild.images) == len(calm.images)
        assert len(wild.turn_ends) == len(calm.turn_ends)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_any_text_decodes_back(tokenizer: str) -> None:
    made, draw = TOKENIZERS[tokenizer](), random.Random(3)
    text = Chat(CHAT_FORMATS["vicuna_v1"], made).text
    for _ in range(300):
        written = text_of(draw, CONTROL + WORDS + ["<", ">", "|"])
        assert text.decode(text.encode(written, "inside")[0]) == written


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_benign_text_gives_the_ids_of_the_tokenizer_itself(tokenizer: str) -> None:
    made, draw = TOKENIZERS[tokenizer](), random.Random(4)
    text = Chat(CHAT_FORMATS["vicuna_v1"], made).text
    for _ in range(300):
        written = text_of(draw, [*WORDS, "    "])
        assert text.encode(written, "first")[0] == made(written, add_special_tokens=False)["input_ids"]


WHOLE = ["metaspace_always", "metaspace_first", "metaspace_prepend", "bytes", "byte_level"]


@pytest.mark.parametrize("tokenizer", WHOLE)
def test_ids_and_labels_equal_a_whole_rendering_with_character_spans(tokenizer: str) -> None:
    """The oracle writes one string, lets the tokenizer cut it as it likes, and labels by character position."""
    made = TOKENIZERS[tokenizer]()
    format = "chatml" if tokenizer.startswith("byte") else "llava_llama_2"
    chat, draw = resolve(format, made, placeholder=find_placeholder(made)), random.Random(5)
    lead = chat.format.lead
    for _ in range(60):
        text, spans = "", []
        messages: list[Message] = []
        for turn in range(draw.randint(1, 4)):
            question, answer = (
                f"what is {turn}?\n\nand\n{'more' * turn}",
                f"{draw.choice(['yes', 'two cats'])}\nand {turn}",
            )
            opening, closing = chat.format.user
            system = ""
            if turn == 0 and chat.format.system and chat.format.default_system:
                system = chat.format.default_system.join(chat.format.system)
            space = " " if tokenizer == "metaspace_first" else ""  # which a tokenizer puts before its first text alone
            text += opening + system + "<image>" * 3 + space + question + closing + chat.format.assistant[0]
            spans.append((len(text), len(text) + len(lead + answer + (chat.format.stop or ""))))
            text += lead + answer + (chat.format.stop or "") + chat.format.assistant[1]
            messages += [message("user", ImagePart(0), question), message("assistant", answer)]
        rendered = chat.render(Sample("k", "s", tuple(messages), (Picture(1, 1, "a", "png"),)), [3])
        whole = made(text, add_special_tokens=False, return_offsets_mapping=True)
        labels = [
            number if any(start <= a and b <= stop and a < b for start, stop in spans) else -100
            for number, (a, b) in zip(whole["input_ids"], whole["offset_mapping"], strict=True)
        ]
        assert ids_of(rendered) == whole["input_ids"]
        assert rendered.labels.tolist() == labels


def test_a_prompt_with_a_control_token_in_text_is_that_of_the_sanitizer_of_transformers() -> None:
    """Which knows nothing of ours; it leaves added tokens that are not special as tokens, so those are left out,
    and it cuts the text around a control token, so whitespace there is left out too."""
    made, draw = byte_level(), random.Random(12)
    chat = resolve("chatml", made)
    for _ in range(200):
        text = draw.choice(["what", ""]) + draw.choice(["<|im_end|>", "<|im_start|>", "<image>"]) + " in the picture"
        theirs = made.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template=chat.template(),
            add_generation_prompt=True,
            sanitize_control_tokens=True,
            return_dict=True,
        )
        assert ids_of(chat.prompt([message("user", text)])) == theirs["input_ids"]


def llava_v1(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels of LLaVA's v1 training, worked out from its recipe: one string, cut at the pictures, each stretch
    tokenized by itself and joined without the later bos; of a round, what follows `ASSISTANT:` is learned."""
    system = CHAT_FORMATS["vicuna_v1"].default_system or ""
    whole = f"{system} " + "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns)
    ids = [tokenizer.bos_token_id]
    for place, stretch in enumerate(whole.split("<image>")):
        ids += [tokenizer.convert_tokens_to_ids("<image>")] * (place > 0) + tokenizer(stretch)["input_ids"][1:]
    labels, end = [-100] * len(ids), len(ids)
    for _, answer in reversed(turns):
        # The answer's first token carries the space; a word of its own begins the same way.
        learned = [*tokenizer(answer)["input_ids"][1:], tokenizer.eos_token_id]
        end = max(place for place in range(end) if ids[place : place + len(learned)] == learned)
        labels[end : end + len(learned)] = learned
    return ids, labels


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_vicuna_v1_gives_the_ids_and_labels_of_llava(scheme: str) -> None:
    """`first` is how transformers reads Vicuna's tokenizer (`legacy: false`)."""
    made = metaspace(scheme)
    chat = resolve("vicuna_v1", made, placeholder=made.convert_tokens_to_ids("<image>"))
    turns = [("<image>\nwhat is in the picture?", "two cats"), ("and a dog?", "yes, next to them.\n\nThe dog sleeps")]
    messages = [
        message("user", ImagePart(0), "\nwhat is in the picture?"),
        message("assistant", turns[0][1]),
        message("user", turns[1][0]),
        message("assistant", turns[1][1]),
    ]
    rendered = chat.render(Sample("k", "s", tuple(messages), (Picture(1, 1, "a", "png"),)), [1])
    ids, labels = llava_v1(made, turns)
    assert ids_of(rendered) == ids
    assert rendered.labels.tolist() == labels


@pytest.mark.parametrize("tokenizer", ["metaspace_always", "metaspace_first", "metaspace_prepend", "byte_level"])
def test_plain_learns_caption_and_newline_after_bos_and_picture(tokenizer: str) -> None:
    """As LLaVA does, which tokenizes what follows a picture as a text of its own (`tokenizer_image_token`)."""
    made = TOKENIZERS[tokenizer]()
    chat = resolve("plain", made, placeholder=made.convert_tokens_to_ids("<image>"))
    sample = Sample(
        "k",
        "s",
        (message("user", "Describe it.\n", ImagePart(0)), message("assistant", "two cats on a sofa")),
        (Picture(1, 1, "a", "png"),),
    )
    rendered = chat.render(sample, [4])
    begin = [made.bos_token_id] if made.bos_token_id is not None else []
    learned = made("two cats on a sofa\n", add_special_tokens=False)["input_ids"]
    assert ids_of(rendered) == [*begin, *[chat.placeholder] * 4, *learned]
    assert rendered.labels.tolist() == [-100] * (4 + len(begin)) + learned
    assert chat.stop_text == "\n"
    assert chat.decode(learned) == "two cats on a sofa"


def test_plain_refuses_a_sample_without_picture() -> None:
    chat = chat_of("bytes", "plain")
    with pytest.raises(SampleError, match=r"blip:7: .* captions"):
        chat.render(Sample("7", "blip", (message("user", "hi"), message("assistant", "a"))), [])


@pytest.mark.parametrize(("tokenizer", "format"), CHATS)
def test_an_answer_decodes_to_its_text(tokenizer: str, format: str) -> None:
    chat, draw = chat_of(tokenizer, format), random.Random(6)
    for _ in range(100):
        answer = text_of(draw, [*CONTROL, *WORDS]).strip()
        if chat.stop_text and chat.stop_text in answer:
            continue
        messages = (message("user", ImagePart(0), "x"), message("assistant", answer))
        rendered = chat.render(Sample("k", "s", messages, (Picture(1, 1, "a", "png"),)), [1])
        assert chat.decode([number for number in rendered.labels.tolist() if number >= 0]) == answer


@pytest.mark.parametrize(("tokenizer", "format"), CHATS)
def test_a_cut_conversation_is_the_shorter_conversation(tokenizer: str, format: str) -> None:
    chat, draw = chat_of(tokenizer, format), random.Random(7)
    for _ in range(3):
        sample = conversation(draw, chat.format, WORDS)
        tokens = [draw.randint(1, 9) for _ in sample.images]
        rendered = chat.render(sample, tokens)
        answers = [number for number, item in enumerate(sample.messages) if item.role == "assistant"]
        for limit in range(1, len(rendered) + 2):
            shorter = cut(rendered, limit, "cut")
            turns = sum(end <= limit for end in rendered.turn_ends)
            assert (shorter is None) == (turns == 0)
            assert (cut(rendered, limit, "drop") is None) == (limit < len(rendered))
            if shorter is None:
                continue
            check_shape(shorter, chat)
            kept = replace(sample, messages=sample.messages[: answers[turns - 1] + 1])
            again = chat.render(kept, tokens)
            assert ids_of(shorter) == ids_of(again)
            assert shorter.labels.tolist() == again.labels.tolist()
            assert (shorter.images, shorter.turn_ends, shorter.spans) == (again.images, again.turn_ends, again.spans)


@pytest.mark.parametrize(("tokenizer", "format"), [*CHATS, ("bytes", "vicuna_v1"), ("bytes", "llava_llama_2_words")])
def test_the_jinja_twin_writes_the_same_text(tokenizer: str, format: str) -> None:
    if format == "llava_llama_2_words":
        words = replace(CHAT_FORMATS["llava_llama_2"], needs=(), strip=("system", "user", "assistant"))
        chat = Chat(words, byte_tokenizer(), placeholder=259)
    else:
        chat = chat_of(tokenizer, format)
    made, draw = TOKENIZERS[tokenizer](), random.Random(8)
    for _ in range(60):
        sample = conversation(draw, chat.format, WORDS + CONTROL)
        for messages, prompt in ((sample.messages, False), (sample.messages[:-1], True)):
            content = [
                {
                    "role": item.role,
                    "content": [
                        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                        for part in item.parts
                    ],
                }
                for item in messages
            ]
            laid = pieces(chat.format, messages, where="test", prompt=prompt)
            begin = "".join(made.convert_ids_to_tokens(chat.begin))
            first = tokenizer == "metaspace_first"  # writes a space by itself, but not after what is written out
            begin += " " if (first and format == "vicuna_v1") else ""
            ours, after_picture = "", False
            for piece in laid:
                text = {"begin": begin, "image": "<image>"}.get(piece.kind, piece.text)
                ours += " " if first and after_picture and piece.kind == "text" and not text.startswith(" ") else ""
                ours, after_picture = ours + text, piece.kind == "image" or (after_picture and not text)
            theirs = made.apply_chat_template(
                content, chat_template=chat.template(), tokenize=False, add_generation_prompt=prompt
            )
            assert theirs == ours


@pytest.mark.parametrize("format", ["chatml", "vicuna_v1", "llava_llama_2"])
def test_the_masks_of_the_jinja_twin_are_our_labels(format: str) -> None:
    made, draw = byte_tokenizer(), random.Random(9)
    chat = Chat(replace(CHAT_FORMATS[format], needs=()), made, placeholder=259)
    for _ in range(30):
        turns = [message(r, text_of(draw, WORDS)) for _ in range(draw.randint(1, 4)) for r in ("user", "assistant")]
        theirs = made.apply_chat_template(
            [{"role": item.role, "content": item.text} for item in turns],
            chat_template=chat.template(),
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        rendered = chat.render(Sample("k", "s", tuple(turns)), [])
        assert theirs["input_ids"] == ids_of(rendered)
        assert [bool(flag) for flag in theirs["assistant_masks"]] == (rendered.labels != -100).tolist()


def test_the_spans_say_whose_each_id_is() -> None:
    chat = chat_of("bytes", "chatml")
    sample = Sample(
        "k", "s", (message("user", "hi", ImagePart(0)), message("assistant", "yes")), (Picture(1, 1, "a", "png"),)
    )
    rendered = chat.render(sample, [2])
    told = [(s.role, s.kind, chat.text.decode(ids_of(rendered)[s.start : s.stop])) for s in rendered.spans]
    assert told == [
        ("user", "marker", "user\n"),
        ("user", "text", "hi"),
        ("user", "image", ""),
        ("user", "marker", "\n"),
        ("assistant", "marker", "assistant\n"),
        ("assistant", "text", "yes"),
        ("assistant", "stop", ""),
        ("assistant", "marker", "\n"),
    ]


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<pad>"])
def test_the_stop_marker_is_learned_whatever_the_pad_token(pad: str | None) -> None:
    made = byte_tokenizer()
    made.pad_token = pad
    chat = resolve("chatml", made)
    turns = tuple(message(role, "x") for _ in range(5) for role in ("user", "assistant"))
    labels = chat.render(Sample("k", "s", turns), []).labels
    assert (labels == made.eos_token_id).sum() == 5


def test_the_default_system_text_stands_in_for_a_missing_one() -> None:
    chat = chat_of("bytes", "vicuna_v1")
    default = chat.text.decode(chat.prompt([message("user", "hi")]).ids.tolist())
    assert default == f"{CHAT_FORMATS['vicuna_v1'].default_system} USER: hi ASSISTANT:"
    given = chat.prompt([message("system", "Be brief."), message("user", "hi")])
    assert chat.text.decode(given.ids.tolist()) == "Be brief. USER: hi ASSISTANT:"


def test_messages_are_rendered_in_the_order_given() -> None:
    chat = resolve("chatml", byte_tokenizer())
    turns = tuple(message(r, t) for r, t in (("assistant", "1"), ("user", "2"), ("user", "3"), ("assistant", "4")))
    rendered = chat.render(Sample("k", "s", turns), [])
    texts = [chat.text.decode(ids_of(rendered)[s.start : s.stop]) for s in rendered.spans if s.kind == "text"]
    assert texts == ["1", "2", "3", "4"]


def test_frames_of_a_video_are_images_in_order() -> None:
    chat = chat_of("bytes", "chatml")
    pictures = tuple(Picture(1, 1, str(i), "png") for i in range(2))
    turns = (message("user", VideoPart((1, 0), (0.0, 0.5)), "?"), message("assistant", "a"))
    rendered = chat.render(Sample("k", "s", turns, pictures), [3, 2])
    assert [(picture, stop - start) for start, stop, picture in rendered.images] == [(1, 2), (0, 3)]


def test_a_box_is_written_by_the_caller_or_refused() -> None:
    chat = chat_of("bytes", "chatml")
    turns = (message("user", ImagePart(0), "what is ", BoxPart(0, 1, 2, 3, 4)), message("assistant", "a"))
    sample = Sample("k", "s", turns, (Picture(8, 8, "a", "png"),))
    rendered = chat.render(sample, [1], boxes=lambda box: f"[{box.left:g}, {box.bottom:g}]")
    assert "what is [1, 4]" in chat.text.decode(ids_of(rendered))
    with pytest.raises(SampleError, match="s:k: a box of picture 0"):
        chat.render(sample, [1])


def test_faults_name_the_sample_and_the_remedy() -> None:
    chat = chat_of("bytes", "vicuna_v1")
    user, answer = message("user", ImagePart(0)), message("assistant", "a")
    picture = (Picture(8, 8, "a", "png"),)
    with pytest.raises(SampleError, match=r"s:k: .* no place for a tool message; .*chatml"):
        chat.render(Sample("k", "s", (message("tool", "x"), answer)), [])
    with pytest.raises(SampleError, match=r"s:k: .* no token count"):
        chat.render(Sample("k", "s", (user, answer), picture), [])
    with pytest.raises(SampleError, match=r"s:k: .* reads only text; set model.vision"):
        resolve("chatml", byte_tokenizer()).render(Sample("k", "s", (user, answer), picture), [4])
    with pytest.raises(SampleError, match="s:k: a system message must come first"):
        chat.render(Sample("k", "s", (user, message("system", "x"), answer), picture), [4])
    inside = Chat(replace(CHAT_FORMATS["gemma"], needs=()), byte_tokenizer())
    with pytest.raises(SampleError, match=r"s:k: .* first user turn"):
        inside.render(Sample("k", "s", (message("system", "x"), answer)), [])


def test_a_control_token_that_text_cannot_avoid_is_a_fault_of_the_sample() -> None:
    made = metaspace("always")
    named = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    named.add_special_tokens({"additional_special_tokens": ["s"]})
    chat = Chat(CHAT_FORMATS["vicuna_v1"], named)
    with pytest.raises(SampleError, match="s:k: the tokenizer can write 's' only as its control token"):
        chat.render(Sample("k", "s", (message("user", "?s"), message("assistant", "a"))), [])


def test_a_format_says_what_the_tokenizer_lacks() -> None:
    with pytest.raises(ConfigError, match=r"chatml needs the tokens <\|im_start\|>, <\|im_end\|>.*vicuna_v1"):
        resolve("chatml", metaspace("always"))
    made = byte_tokenizer()
    made.eos_token = None
    with pytest.raises(ConfigError, match="vicuna_v1 ends an answer with the tokenizer's eos token, but it has none"):
        resolve("vicuna_v1", made)


def test_a_format_cannot_hold_the_placeholder() -> None:
    format = replace(CHAT_FORMATS["chatml"], user=("<|im_start|>user\n<image>", "<|im_end|>\n"))
    with pytest.raises(ConfigError, match="holds the token 259 that stands for pictures"):
        Chat(format, byte_tokenizer(), placeholder=259)


def test_a_tokenizer_without_a_fast_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="ByT5Tokenizer has no fast version"):
        resolve("vicuna_v1", ByT5Tokenizer())


def test_strings_of_a_format_hold_the_same_tokens_as_for_the_tokenizer() -> None:
    """The longest token counts, with the whitespace that Phi's take along on their right."""
    made = byte_tokenizer()
    made.add_tokens([AddedToken("<x>", special=True), AddedToken("<x>y", special=True, rstrip=True)])
    text = Chat(CHAT_FORMATS["chatml"], made).text
    for string in ("<x>y\n z", "a<x> z", "<x><x>y", "y<x"):
        items = text.structure(string)
        ids = [i for item in items for i in ([item] if isinstance(item, int) else text.encode(item, "inside")[0])]
        assert ids == made(string, add_special_tokens=False)["input_ids"]


OWN = ChatFormat("own", user=("Q: ", "\n"), assistant=("A:", "\n"), lead=" ", stop="\n")


def test_a_format_is_found_by_name_or_as_a_users_own() -> None:
    made = byte_tokenizer()
    assert resolve("tests.data.test_chat:OWN", made).format == OWN
    assert resolve("auto", made).format.user == CHAT_FORMATS["chatml"].user
    for name, told in {
        "chatlm": "did you mean 'chatml'[?] There are auto, plain, vicuna_v1, chatml",
        "no.such:NAME": "cannot be imported .*; install it, or name its folder in PYTHONPATH",
        "tests.data.test_chat:WORDS": "is a list; write a ChatFormat",
        "tests.data.test_chat:MISSING": "tests.data.test_chat holds no MISSING",
    }.items():
        with pytest.raises(ConfigError, match=f"^chat: '{name}' .*{told}"):
            resolve(name, made)


def test_formats_say_whether_their_markers_are_mere_words() -> None:
    assert chat_of("bytes", "vicuna_v1").markers_are_text
    assert not chat_of("bytes", "chatml").markers_are_text


def test_the_fingerprint_changes_with_format_tokenizer_and_placeholder_and_nothing_else() -> None:
    made = byte_tokenizer()
    first = resolve("chatml", made, placeholder=259).fingerprint
    made("padding and cutting are settings of a call", padding="max_length", max_length=99, truncation=True)
    assert resolve("chatml", made, placeholder=259).fingerprint == first
    others = [
        resolve("vicuna_v1", made, placeholder=259),
        resolve("chatml", made),
        resolve("chatml", byte_level(), placeholder=259),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 4


def test_a_chat_travels_to_another_process() -> None:
    chat, draw = chat_of("metaspace_always", "vicuna_v1"), random.Random(10)
    sample = conversation(draw, chat.format, WORDS)
    copy = pickle.loads(pickle.dumps(chat))
    assert ids_of(copy.render(sample, [2] * 3)) == ids_of(chat.render(sample, [2] * 3))
    assert copy.fingerprint == chat.fingerprint


def test_a_placeholder_is_a_free_added_token_or_none() -> None:
    assert find_placeholder(byte_tokenizer()) == 259
    plain = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer, eos_token="<|im_end|>")
    assert find_placeholder(plain) == byte_level().convert_tokens_to_ids("<image>")
    made = byte_tokenizer()
    made.pad_token = "<image>"
    assert find_placeholder(made) is None
    made.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_4|>", "<|image|>"]})
    assert find_placeholder(made) == made.convert_tokens_to_ids("<|image|>")


def test_the_byte_tokenizer_spells_bytes_and_survives_saving(tmp_path: Path) -> None:
    made = byte_tokenizer()
    text = "Zoë 世界 🙂\n\0\x7f\xad"
    assert made(text)["input_ids"] == list(text.encode())
    assert made.decode(list(text.encode())) == text
    made.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == 260
    assert resolve("auto", again, placeholder=259).fingerprint == resolve("auto", made, placeholder=259).fingerprint
    assert again.chat_template == jinja(CHAT_FORMATS["chatml"])


REAL = {"llama2": "vicuna_v1", "llama3": "llama_3", "qwen3": "chatml", "gemma3": "gemma"}


def real(name: str) -> PreTrainedTokenizerBase:
    folder = Path(os.environ.get("MMIT_TOKENIZERS", "")) / name
    if "MMIT_TOKENIZERS" not in os.environ or not (folder / "tokenizer.json").exists():
        pytest.skip(f"MMIT_TOKENIZERS names no folder with {name}/tokenizer.json")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_keep_the_laws(name: str) -> None:
    made, draw = real(name), random.Random(11)
    placeholder = find_placeholder(made)
    chat = resolve(REAL[name], made, placeholder=len(made) if placeholder is None else placeholder)
    control = list(chat.text.special)
    for _ in range(100):
        sample = conversation(draw, chat.format, [*WORDS, *draw.sample(control, min(20, len(control)))])
        rendered = chat.render(sample, [2] * 3)
        check_shape(rendered, chat)
        prompt = chat.prompt(sample.messages[:-1], [2] * 3)
        assert ids_of(rendered)[: len(prompt)] == ids_of(prompt)
        structure = {"begin": chat.begin, "image": []}
        for piece in pieces(chat.format, sample.messages, where="test"):
            if piece.kind in ("marker", "stop"):
                structure["begin"] = structure["begin"] + [i for i in chat.structure(piece.text) if isinstance(i, int)]
            if piece.kind == "image":
                structure["image"] = structure["image"] + [chat.placeholder] * 2
        expected = sorted([*structure["begin"], *structure["image"]])
        found = [i for i in ids_of(rendered) if i == chat.placeholder or i in chat.text.special.values()]
        assert sorted(found) == expected


@pytest.mark.slow
def test_vicuna_v1_with_a_real_llama_tokenizer_puts_spaces_around_the_picture_as_llava_does() -> None:
    """LLaVA-1.5's prompts hold a lone space token on both sides of the picture (29871 with Llama 2's numbers)."""
    made = real("llama2")
    chat = resolve("vicuna_v1", made, placeholder=len(made))
    prompt = ids_of(chat.prompt([message("user", ImagePart(0), "\nHi")], [1]))
    place = prompt.index(len(made))
    assert made.convert_ids_to_tokens(prompt[:5]) == ["<s>", "▁A", "▁chat", "▁between", "▁a"]
    assert made.convert_ids_to_tokens(prompt[place - 4 : place]) == ["▁US", "ER", ":", "▁"]
    assert made.convert_ids_to_tokens(prompt[place + 1 :]) == ["▁", "<0x0A>", "Hi", "▁ASS", "IST", "ANT", ":"]
