"""A chat format learned from a template writes what the template writes, or the template is refused with a reason."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from mmit.config import ConfigError
from mmit.data.byte_tokenizer import byte_tokenizer
from mmit.data.chat import CHAT_FORMATS, Chat, jinja, learn, resolve
from mmit.data.chat_formats import pieces
from mmit.data.sample import ImagePart, Message, Sample, TextPart, message

MARKS = ["<s>", "</s>", "<bos>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MARKS += ["<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": MARKS})
    made.bos_token, made.eos_token = "<s>", "</s>"
    made.chat_template = template
    return made


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CHATML_DEFAULT_SYSTEM = (
    """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}""" + CHATML
)
LLAMA_3 = """{% for m in messages %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA_3_ALWAYS_OPEN = LLAMA_3.replace("{%- if add_generation_prompt %}", "").removesuffix("{% endif %}")
GEMMA = """{{ '<bos>' }}{% if messages[0].role == 'system' %}{% set opening = messages[0].content + '\n\n' %}
{%- set rest = messages[1:] %}{% else %}{% set opening = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate!') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (opening if loop.first else '') }}
{{- m.content | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
GEMMA_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + GEMMA
LLAMA_2 = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = DEFAULT %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if loop.first and system is not false %}
{%- set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}{% else %}{% set text = m.content %}{% endif %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + text + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_2_STRIPPED = LLAMA_2.replace("text + ' [/INST]'", "text.strip() + ' [/INST]'").replace(
    "m.content + ' '", "m.content.strip() + ' '"
)
"""As Meta wrote it: what loses its edges is the system text and the first question as one."""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ raise_exception('roles') }}{% endif %}
{%- endfor %}"""
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
ALPACA = """{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}
{%- elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}
{%- else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""
CLOSED = PHI.removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"
LAST_LINE_OPEN = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}
{%- if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{%- if not (loop.last and m.role == 'assistant') %}{{ '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
ANSWER_OPENED = """{% for m in messages %}{% if m.role == 'user' %}
{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n<|im_start|>assistant\n' }}{% elif m.role == 'assistant' %}
{{- m.content + '<|im_end|>\n' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"""
TOOLS = "{% if tools %}{{ raise_exception('tools come later') }}{% endif %}" + CHATML

LEARNABLE = {
    "chatml": CHATML,
    "chatml with a default system text": CHATML_DEFAULT_SYSTEM,
    "llama 3": LLAMA_3,
    "llama 3 that always opens a turn": LLAMA_3_ALWAYS_OPEN,
    "gemma": GEMMA,
    "gemma without system": GEMMA_NO_SYSTEM,
    "llama 2": LLAMA_2.replace("DEFAULT", "false"),
    "llama 2 with a default system text": LLAMA_2.replace("DEFAULT", "'You help.'"),
    "llama 2 that strips": LLAMA_2_STRIPPED.replace("DEFAULT", "false"),
    "llama 2 that strips, with a default system text": LLAMA_2_STRIPPED.replace("DEFAULT", "'You help. '"),
    "a system text that is stripped with the question": LLAMA_2_STRIPPED.replace("DEFAULT", "false")
    .replace("'<<SYS>>\n' + ", "")
    .replace("<</SYS>>", ""),
    "mistral": MISTRAL,
    "phi": PHI,
    "phi that closes a conversation": CLOSED,
    "a last answer without its line break": LAST_LINE_OPEN,
    "a user turn that opens the answer": ANSWER_OPENED,
    "alpaca": ALPACA,
    "chatml with tools": TOOLS,
    "our own twin of vicuna_v1": jinja(CHAT_FORMATS["vicuna_v1"], begin="<s>"),
    "our own twin of llava_llama_2": jinja(CHAT_FORMATS["llava_llama_2"]),
}
TEXTS = [
    "hi",
    " edge",
    "edge \n",
    "\n\nlines\nmore",
    "Zoë 世界",
    "USER: x",
    "{{ bos_token }}",
    "a  b",
    "x" * 50,
    "",
    " \n ",
]


@pytest.mark.parametrize("name", LEARNABLE)
def test_a_learned_format_gives_the_ids_of_the_template(name: str) -> None:
    """The oracle is transformers: with byte ids, tokenizing the whole string cannot differ from tokenizing apart."""
    made, draw = with_template(LEARNABLE[name]), random.Random(0)
    chat = resolve("auto", made)
    for turns in range(1, 7):
        messages = [message(role, draw.choice(TEXTS)) for _ in range(turns) for role in ("user", "assistant")]
        if chat.format.system and turns % 2:
            messages.insert(0, message("system", draw.choice(TEXTS)))
        content = [{"role": item.role, "content": item.text} for item in messages]
        whole = made.apply_chat_template(content, tokenize=True, return_dict=True)["input_ids"]
        ours = chat.render(Sample("k", "s", tuple(messages)), []).ids.tolist()
        if name == "a last answer without its line break":
            assert ours.pop() == ord("\n")
        assert whole[: len(ours)] == ours
        asked = made.apply_chat_template(content[:-1], tokenize=True, add_generation_prompt=True, return_dict=True)
        prompt = chat.prompt(messages[:-1]).ids.tolist()
        assert prompt == asked["input_ids"]
        more = {"llama 3 that always opens a turn": chat.format.assistant[0], "phi that closes a conversation": "</s>"}
        assert made.decode(whole[len(ours) :]) == more.get(name, "")
        assert ours[: len(prompt)] == prompt


@pytest.mark.parametrize("name", LEARNABLE)
def test_the_twin_of_a_learned_format_writes_the_same(name: str) -> None:
    """Messages of the twin may hold pictures, which the template it was learned from need not know."""
    format, draw = learn(with_template(LEARNABLE[name])), random.Random(0)
    made = with_template(jinja(format))
    for turns in range(1, 7):
        messages = [message(role, draw.choice(TEXTS)) for _ in range(turns) for role in ("user", "assistant")]
        messages[0] = message("user", draw.choice(TEXTS), ImagePart(0), *draw.choices(TEXTS, k=turns % 2))
        if format.system and turns % 2:
            messages.insert(0, message("system", draw.choice(TEXTS)))
        laid = "".join(
            "<image>" if piece.kind == "image" else piece.text for piece in pieces(format, messages, where="")
        )
        content = [{"role": item.role, "content": _content(item)} for item in messages]
        assert made.apply_chat_template(content, tokenize=False) == laid


def _content(item: Message) -> str | list[dict[str, str]]:
    parts = [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"} for p in item.parts]
    return parts if {"type": "image"} in parts else item.text


def test_what_is_learned_is_the_built_in_where_there_is_one() -> None:
    for name, format in {"chatml": "chatml", "llama 3": "llama_3", "gemma": "gemma"}.items():
        learned, known = learn(with_template(LEARNABLE[name])), CHAT_FORMATS[format]
        for field in ("user", "assistant", "stop", "lead", "system", "system_place", "default_system", "start"):
            assert getattr(learned, field) == getattr(known, field), field
        assert set(learned.strip) == set(known.strip)


def test_the_stop_marker_ends_at_the_first_control_token() -> None:
    learned = learn(with_template(LEARNABLE["llama 2"]))
    assert (learned.lead, learned.stop, learned.assistant) == (" ", " </s>", ("", ""))
    chat = Chat(learned, with_template(None))
    assert chat.stop_ids == (chat.text.special["</s>"],)
    assert chat.decode([*b" yes ", chat.text.special["</s>"]]) == "yes"


REFUSED = {
    "date": ("{{ strftime_now('%d %b %Y') }}" + CHATML, "today's date"),
    "optional date": (
        "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}2024{% endif %}" + CHATML,
        "today's date",
    ),
    "reasoning of earlier turns": (
        CHATML.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])"),
        "fails on one that holds .*reasoning blocks",
    ),
    "reasoning block in the last turn": (
        CHATML.replace("m.content", "('<think></think>' if loop.last and m.role == 'assistant' else '') + m.content"),
        "earlier turns otherwise than later ones .*reasoning blocks",
    ),
    "a refusal": ("{{ raise_exception('never') }}", "refuses a conversation of user, assistant.*never"),
    "a fault in the template": ("{{ messages[0].content + 1 }}", "refuses a conversation"),
    "a syntax error": ("{% if %}", "refuses a conversation"),
    "parts alone": (
        "{% for m in messages %}{{ m.role }}: {% for part in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ part.text }} {% endfor %}{% endfor %}",
        "lists of parts alone",
    ),
    "a dropped message": ("{{ messages[-1].content }}", "drops, repeats or reorders"),
    "a repeated message": (CHATML + "{{ messages[0].content }}", "drops, repeats or reorders"),
    "no end of turn": (
        "{% for m in messages %}{{ '\n' + m.role + ':' + m.content }}{% endfor %}",
        "could not learn to stop",
    ),
    "nothing after an answer": ("{% for m in messages %}{{ m.content }}{% endfor %}", "could not learn to stop"),
    "upper case": (CHATML.replace("m.content", "m.content | upper"), "drops, repeats or reorders"),
    "left edge only": (CHATML.replace("m.content", "m.content.lstrip()"), "fails on one that holds"),
    "system text in the last turn": (
        CHATML.replace("m.content", "(messages[0].content if loop.last else '') + m.content"),
        "drops, repeats or reorders",
    ),
    "no template": (None, "has none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_is_more_than_strings_is_refused_with_the_reason(name: str) -> None:
    template, reason = REFUSED[name]
    with pytest.raises(ConfigError, match=f"(?s){reason}") as caught:
        learn(with_template(template))
    assert "plain, vicuna_v1, chatml" in str(caught.value)
