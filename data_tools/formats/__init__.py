"""The formats by name. Each is one small module with one function `samples(path, images, *, options...)` that yields a
`Sample` or a `Rejected` for every row; `package.module:function` names one of your own."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mmit.config import ConfigError, imported
from mmit.data.sample import Sample


@dataclass(frozen=True)
class Format:
    about: str
    module: str
    """A module of this package, imported when the format is used."""
    from_nothing: bool = False
    """INPUT is a word and not a file: the samples are made, or found elsewhere."""
    beside: bool = False
    """Its pictures lie beside the input when --images is not given."""
    given: Mapping[str, Any] | None = None
    """Options that make a general module this format."""


FORMATS: dict[str, Format] = {
    "llava": Format("LLaVA JSON or JSONL: id, image, conversations[from, value], with <image> in the text", "llava"),
    "messages": Format("OpenAI messages: role and content, text or parts with image_url; also bare lists", "messages"),
    "sharegpt": Format("conversations[from, value] or [human, assistant], system, tools, images", "sharegpt"),
    "trl": Format(
        "TRL: messages, or prompt and completion, with images; pictures without a place come first",
        "messages",
        given={"marker": None, "video_marker": None, "unmarked": "first"},
    ),
    "llamafactory": Format("a folder with dataset_info.json; --set dataset=NAME", "llamafactory", beside=True),
    "ms-swift": Format("ms-swift: messages or query and response, images, objects with boxes", "ms_swift"),
    "xtuner": Format(
        "xtuner: messages whose <IMG_CONTEXT> and <VIDEO_CONTEXT> place the message's image_url and video_url parts",
        "messages",
        given={"marker": "<IMG_CONTEXT>", "video_marker": "<VIDEO_CONTEXT>", "marked": "part"},
    ),
    "qwen-vl": Format("Qwen-VL finetuning: LLaVA rows with data_path, or packed lists of them", "qwen_vl"),
    "alpaca": Format("instruction, input, output, and where present system, history", "alpaca"),
    "dolly": Format("Dolly: instruction, context, response, category", "alpaca"),
    "magicoder": Format("Magicoder: problem, solution", "alpaca"),
    "evol": Format("Evol-Instruct: instruction, output or response", "alpaca"),
    "self-instruct": Format(
        "Self-Instruct, Unnatural Instructions: instruction, instances[input, output]", "self_instruct"
    ),
    "oasst": Format("OpenAssistant trees, or flat messages with parent_id: the best path of each tree", "oasst"),
    "prompt-target": Format(
        "two fields: prompt and completion, inputs and targets, ... (--set prompt=, target=)", "prompt_target"
    ),
    "flan": Format("FLAN dumps: inputs, targets, task_name", "prompt_target"),
    "p3": Format("P3: inputs_pretokenized, targets_pretokenized, is_correct", "prompt_target"),
    "xp3": Format("xP3: inputs, targets, language", "prompt_target"),
    "orca": Format("Orca: system_prompt, question, response", "prompt_target"),
    "superni": Format("Super-NaturalInstructions task files: Definition, Instances", "superni"),
    "lima": Format("LIMA: conversations[text, ...], the user's first", "turn_list"),
    "ultrachat": Format("UltraChat: data[text, ...], the user's first", "turn_list"),
    "delimited": Format("Baize, OIG, openassistant-guanaco: a chat in one text with turn marks", "delimited"),
    "coco-captions": Format("COCO captions: images, annotations[image_id, caption]", "coco_captions"),
    "vqav2": Format("VQAv2, OK-VQA: questions; --set annotations=FILE", "vqav2"),
    "gqa": Format("GQA: {question id: {imageId, question, answer}}", "gqa"),
    "ocr-vqa": Format("OCR-VQA: {id: {questions, answers, imageURL, split}}", "ocr_vqa"),
    "textvqa": Format("TextVQA and TextCaps: data[question, image_id, answers]", "textvqa"),
    "scienceqa": Format("ScienceQA: the folder with problems.json, or its parquet", "scienceqa"),
    "a-okvqa": Format("A-OKVQA: question, choices, direct_answers, rationales", "aokvqa"),
    "visual-genome": Format("Visual Genome region descriptions or question answers", "visual_genome"),
    "refcoco": Format("RefCOCO/+/g as JSON or parquet: sentences and a box", "refcoco"),
    "cauldron": Format("The Cauldron, FineVision: parquet with images, texts[user, assistant]", "cauldron"),
    "finevision": Format("FineVision: as cauldron, with ratings (--set least=4)", "cauldron"),
    "webdataset": Format("tars of KEY.jpg with KEY.txt or KEY.json", "webdataset"),
    "energon": Format("Megatron-Energon's tars", "webdataset"),
    "folder": Format("a folder of x.jpg with x.txt beside", "folder", beside=True),
    "table": Format("CSV, TSV or parquet; --set image=, question=, answer= name its columns", "table"),
    "hub": Format("a data set of the Hugging Face hub by name; --set revision=, split=", "hub", from_nothing=True),
    "mmc4": Format("MMC4: text_list, image_info[image_name, matched_text_index]", "interleaved"),
    "obelics": Format("OBELICS: images and texts by turns; --set files=JSON names the pictures", "interleaved"),
    "video": Format("messages or turns with <video>: frames with their times (pip install 'mmit[video]')", "video"),
    "dicom": Format("DICOM files named in a table, or x.dcm with x.txt (pip install 'mmit[dicom]')", "dicom"),
    "easy-vqa": Format(
        "the folder of the easy-VQA package: questions.json, answers.txt, images/", "easy_vqa", beside=True
    ),
    "synthetic": Format("made in code: `shapes` (questions) or `captions`", "synthetic", from_nothing=True),
}

Samples = Callable[..., Iterator[Any]]


def samples_function(name: str) -> Samples:
    """The `samples` of a format by its name, or of `package.module:function`."""
    if name not in FORMATS:
        found = imported(name, "format", FORMATS)
        if not callable(found):
            raise ConfigError(f"format {name}: is a {type(found).__name__}; name a function that yields samples")
        return cast(Samples, found)
    return importlib.import_module(f"data_tools.formats.{FORMATS[name].module}").samples


def options_for(name: str, options: Mapping[str, Any], beside: Iterable[str] = ()) -> dict[str, Any]:
    """All options of the format, the given ones and the defaults; unknown names are refused by name.

    `beside`: what else may stand where these options were written.
    """
    parameters = inspect.signature(samples_function(name)).parameters
    known = {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY or (parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    }
    known = {key: default for key, default in known.items() if key not in ("path", "images")}
    given = dict(FORMATS[name].given or {}) if name in FORMATS else {}
    hints = get_type_hints(samples_function(name)) if name in FORMATS else {}
    for key, value in options.items():
        if key not in known:
            names = [*known, *beside]
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"format {name}: unknown option {key!r}; {hint}It takes {', '.join(names) or 'no options'}"
            )
        given[key] = checked(name, key, value, hints.get(key, Any))
    merged = {key: given.get(key, default) for key, default in known.items()}
    needed = [key for key, value in merged.items() if value is inspect.Parameter.empty]
    if needed:
        raise ConfigError(f"format {name}: option {needed[0]} is needed; write --set {needed[0]}=...")
    return merged


def checked(format: str, key: str, value: Any, kind: Any) -> Any:
    """The value of an option as its kind has it, `ConfigError` if it is of another."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Input ").lower()
        raise ConfigError(f"format {format}: option {key} is {value!r}, and it {told}") from None


def samples_of(name: str, path: Path, images: Path | None, options: Mapping[str, Any]) -> Iterator[Any]:
    """The samples of an input, after checking that it is there."""
    function = samples_function(name)
    made = name in FORMATS and FORMATS[name].from_nothing
    if not made and not path.exists():
        raise ConfigError(f"{path}: no such file or folder; check the path (relative ones start in {Path.cwd()})")
    return function(path, images, **options_for(name, options))


__all__ = ["FORMATS", "Format", "Sample", "checked", "options_for", "samples_function", "samples_of"]
