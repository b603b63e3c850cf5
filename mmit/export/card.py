"""The README.md of an export, with the YAML header that the Hub reads: what went in, how, and what was measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mmit.data.provenance import taken
from mmit.export.processor import padding_token
from mmit.export.targets import CLIP_DEFECT, targets
from mmit.export.verify import Parity
from mmit.model.saved import Saved, run_folder, settings_of

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    run: Path, saved: Saved, parity: Parity, *, name: str, format: str, dtype: str, adapter: bool, place: str = "PATH"
) -> str:
    """The whole file. What the run directory does not tell (a copied `final/` has no metrics) is left out.

    `place` is what the examples load: a repository, where it will lie in one.
    """
    folder = run_folder(run)
    config = settings_of(run)
    data = [*_data_before(saved.record["sources"]), *(taken(config["stages"]) if config is not None else ())]
    sections = [
        f"---\n{yaml.safe_dump(_header(saved, data, format), sort_keys=False)}---",
        f"# {name}",
        _what(saved, adapter=adapter, dtype=dtype),
        _how_to_load(saved, format=format, adapter=adapter).replace("PATH", place),
        _data(data),
        _recipe(config),
        _metrics(folder / "metrics.jsonl"),
        _checked(parity, format, dtype),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def without_places(tree: Any) -> Any:
    """Names and settings as they are, but of every path of this machine only its last name: others read this."""
    match tree:
        case Mapping():
            return {key: without_places(value) for key, value in tree.items()}
        case list() | tuple():
            return [without_places(value) for value in tree]
        case str() if tree.startswith(("/", "~/")) and "/" in tree[1:]:
            return Path(tree).name
        case _:
            return tree


def _data_before(sources: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the models that it goes on from were trained on, the oldest first; rows as `taken` gives them."""
    for source in sources.values():
        yield from _data_before(source.get("sources", {}))
        name = without_places(source["name"])
        for row in source.get("data", ()):
            yield row | {"stage": f"{row['stage']} of {name}"}


def _header(saved: Saved, data: Sequence[Mapping[str, Any]], format: str) -> dict[str, Any]:
    multimodal = saved.fit is not None
    header: dict[str, Any] = {
        "library_name": format,
        "pipeline_tag": "image-text-to-text" if multimodal else "text-generation",
        "tags": ["mmit", "instruction-tuning", *(["vision-language", "llava"] if multimodal else [])],
    }
    if bases := list(dict.fromkeys(_hub_models(saved.record["sources"]))):
        header["base_model"] = bases
    if datasets := list(dict.fromkeys(row["dataset"] for row in data if "dataset" in row)):
        header["datasets"] = datasets
    return header


def _hub_models(sources: Mapping[str, Any]) -> Iterator[str]:
    """The models of the Hub among what the parts come from, through runs that went on from runs.

    The Hub refuses a card whose `base_model` is no name of its own: towers named as open_clip does are left out.
    """
    for source in sources.values():
        name = str(source["name"]).removeprefix("hf-hub:")
        if "revision" in source or ("sha256" not in source and HUB_NAME.fullmatch(name) and not Path(name).exists()):
            yield name
        else:
            yield from _hub_models(source.get("sources", {}))


def _lineage(source: Mapping[str, Any]) -> str:
    """The name of what a part comes from, and in brackets what that was made of."""
    made_of = [
        ("from " if part == "from" else f"{part} from ") + _lineage(inner)
        for part, inner in source.get("sources", {}).items()
    ]
    return f"`{without_places(source['name'])}`" + (f" ({', '.join(made_of)})" if made_of else "")


def _what(saved: Saved, *, adapter: bool, dtype: str) -> str:
    vlm = saved.assembly.vlm
    rows = _table_head("part", "what", "parameters")
    named = {part: _lineage(source) for part, source in saved.record["sources"].items()}
    for part, module in saved.assembly.parts().items():
        kind = type(vlm.vision.encoder if part == "vision" and vlm.vision is not None else module).__name__
        origin = f"{kind}, from {named[part]}" if part in named else kind
        rows.append(f"| {part} | {origin} | {sum(p.numel() for p in module.parameters()):,} |")
    text = f"Trained with mmit {version('mmit')}. Weights are {dtype}."
    if "from" in named:
        text += f" It goes on from {named['from']}."
    if adapter:
        text += " The LoRA of the last stage lies in `adapter/`, beside the base it was trained on."
    if saved.fit is not None:
        text += (
            f" A picture is fitted to {saved.fit.side} x {saved.fit.side} pixels (`{saved.fit.policy}`) and takes "
            f"{saved.image_tokens} tokens."
        )
    return text + "\n\n" + "\n".join(rows)


def _how_to_load(saved: Saved, *, format: str, adapter: bool) -> str:
    if format == "gguf":
        eyes = " --mmproj mmproj.gguf --image photo.jpg" if saved.fit is not None else ""
        program = "llama-mtmd-cli" if saved.fit is not None else "llama-cli"
        text = f'```\n{program} -m model.gguf{eyes} -p "What is this?" --temp 0\n```'
        if saved.fit is None:
            return text
        if any(CLIP_DEFECT in line for line in targets(saved.assembly)):
            text += f"\n\nllama.cpp reads this mmproj, but {CLIP_DEFECT}."
        text += (
            f"\n\nllama.cpp itself fits a picture that is no square of {saved.fit.side} pixels, by padding it with the "
            f"mean colour of CLIP; this model was trained on pictures fitted by `{saved.fit.policy}`."
        )
        before = saved.chat.text.prefix
        if before("x", "start") and not before(" x", "start"):
            text += (
                "\n\nPut pictures at the beginning of a message: behind one, llama.cpp reads a text that begins with a "
                "space, that of the chat format too, with one space more than this model was trained on."
            )
        return text
    if format == "mmit":
        return '```python\nimport mmit\n\nmodel = mmit.load("PATH")\n```' + _needs(saved.record["sources"])
    if saved.fit is None:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
            'messages = [{"role": "user", "content": "Hello"}]',
            "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
            'return_tensors="pt")',
        ]
        decode = "tokenizer"
    else:
        lines = [
            "from transformers import AutoModelForImageTextToText, AutoProcessor",
            "",
            'model = AutoModelForImageTextToText.from_pretrained("PATH", dtype="auto")',
            'processor = AutoProcessor.from_pretrained("PATH")',
            'content = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is this?"}]',
            "inputs = processor.apply_chat_template(",
            '    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, '
            'return_dict=True, return_tensors="pt"',
            ")",
        ]
        decode = "processor"
    if adapter:
        lines.insert(1, "from peft import PeftModel")
        lines.insert(4, 'model = PeftModel.from_pretrained(model, "PATH/adapter")')
    lines += [
        "answer = model.generate(**inputs, max_new_tokens=100)",
        f'print({decode}.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    text = "```python\n" + "\n".join(lines) + "\n```"
    if saved.chat.stop_text:
        text += f"\n\nAnswers end with the text {saved.chat.stop_text!r}, which is no token: pass it as `stop_strings`."
    padding = padding_token(saved)
    if padding is not None and saved.assembly.tokenizer.convert_tokens_to_ids(padding) in saved.chat.stop_ids[:1]:
        text += (
            f"\n\nIts tokenizer has no token to spare: batches are padded with `{padding}`, which ends answers too. To "
            f"train it further, mask labels by `attention_mask` and not by id."
        )
    if saved.chat.markers_are_text:
        text += "\n\nThe markers of its chat format are plain text: a user's text can imitate a turn."
    text += (
        "\n\nPrograms that tokenize a whole prompt take a control token in a user's text for one, unlike mmit. For "
        "texts of strangers add `sanitize_control_tokens=True` to `apply_chat_template`. They may also join a line "
        "break at the start of an earlier answer to the one before it, which mmit keeps apart."
    )
    return text


def _needs(sources: Mapping[str, Any]) -> str:
    """What a folder of mmit does not hold itself."""
    rows = []
    for part, source in sources.items():
        held = source.get("sha256") or {key: source[key] for key in ("revision", "fingerprint") if source.get(key)}
        known = ", ".join(f"{name} {str(value)[:16]}" for name, value in held.items())
        rows.append(f"| {part} | {_lineage(source)} | {known} |")
    if not rows:
        return ""
    text = (
        "\n\nThe folder holds what was trained. The rest is read from where training found it; if it lies elsewhere, "
        "write its place into `model` of `model.json`. Content is compared with what it was:\n\n"
    )
    return text + "\n".join([*_table_head("part", "from", "known by"), *rows])


def _data(data: Sequence[Mapping[str, Any]]) -> str:
    if not data:
        return ""
    rows = ["## Data", "", *_table_head("stage", "source", "licence", "taken")]
    return "\n".join(
        [*rows, *(f"| {row['stage']} | {row['source']} | {row['licence']} | {row['taken']} |" for row in data)]
    )


def _recipe(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return ""
    rows = ["## Recipe", "", *_table_head("stage", "trained", "samples a step", "length", "schedule")]
    for stage in config["stages"]:
        trained = []
        for part, settings in stage["train"].items():
            if settings is not None:
                lora = settings.get("lora")
                trained.append(f"{part} {settings['lr']:g}" + (f" (LoRA rank {lora['rank']})" if lora else ""))
        length = f"{stage['steps']} steps" if stage.get("steps") else f"{stage.get('epochs') or 1:g} epochs"
        schedule = f"{stage['schedule']}, warm-up {stage['warmup']:g}, decay {stage['weight_decay']:g}"
        rows.append(f"| {stage['name']} | {', '.join(trained)} | {stage['batch_size']} | {length} | {schedule} |")
    told = without_places({key: value for key, value in config.items() if key not in ("output", "cache")})
    whole = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    rows += ["", f"<details><summary>The whole config</summary>\n\n```yaml\n{whole}```\n\n</details>"]
    return "\n".join(rows)


def _metrics(file: Path) -> str:
    """Loss at the start and end of each stage, and the last held-out losses."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return ""
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    losses: dict[str, dict[int, float]] = {}  # by step: what a killed run repeats, it writes again
    held_out: dict[str, dict[str, float]] = {}
    for record in records:
        if "held_out" in record:
            held_out[record["stage"]] = record["held_out"]
        elif record.get("loss") is not None:
            losses.setdefault(record["stage"], {})[record["step"]] = record["loss"]
    rows = ["## Metrics", "", *_table_head("stage", "steps", "loss, first and last tenth", "held-out loss")]
    for stage, by_step in losses.items():
        values = list(by_step.values())
        tenth = max(1, math.ceil(len(values) / 10))
        first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
        outside = ", ".join(f"{name} {loss:.4f}" for name, loss in held_out.get(stage, {}).items()) or "not measured"
        rows.append(f"| {stage} | {len(values)} | {first:.4f}, {last:.4f} | {outside} |")
    return "\n".join(rows)


def _checked(parity: Parity, format: str, dtype: str) -> str:
    loaders = {"transformers": "transformers' Auto classes", "gguf": "transformers' GGUF reader (the language model)"}
    loader = loaders.get(format, "mmit")
    rounded = "" if dtype == "float32" else f" rounded to {dtype}"
    return f"## Checked\n\nLoaded again by {loader}, beside the trained model{rounded}, in fp32: {parity.sentence()}."


def _table_head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
