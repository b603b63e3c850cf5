"""What is told of a config that is not valid: every fault at once, each with its place and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


class ConfigError(ValueError):
    """A fault of the user's input: where it is, what was found and what to write instead."""


ELSEWHERE = {
    **dict.fromkeys(("model_name_or_path", "base_model", "llm"), "language"),
    **dict.fromkeys(("vision_tower", "image_encoder"), "vision"),
    "mm_vision_select_layer": "layer",
    "mm_vision_select_feature": "select",
    "mm_projector_type": "projector: {kind: mlp, depth: 2} of the model",
    "pretrain_mm_mlp_adapter": "projector: {from: FILE} of the model",
    **dict.fromkeys(("template", "chat_template", "version"), "chat"),
    **dict.fromkeys(("flash_attn", "attn_implementation"), "attention"),
    **dict.fromkeys(("dataset", "datasets", "data_path", "train_file"), "data: [{FORMAT: PATH}] of a stage"),
    "dataset_dir": "data: [{llamafactory: FOLDER, options: {dataset: NAME}}] of a stage",
    **dict.fromkeys(("mix_strategy", "interleave_probs", "dataset_weights"), "repeat"),
    **dict.fromkeys(("image_folder", "image_dir", "media_dir"), "images"),
    **dict.fromkeys(("max_samples", "max_train_samples"), "limit"),
    "image_aspect_ratio": "pictures",
    **dict.fromkeys(("max_length", "max_seq_length", "model_max_length", "cutoff_len", "sequence_len"), "max_tokens"),
    **dict.fromkeys(("lr", "learning_rate", "mm_projector_lr"), "train: {PART: {lr: ...}} of a stage"),
    **dict.fromkeys(("finetuning_type", "lora_enable", "use_peft"), "lora"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "rank"),
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules"), "targets"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps"),
        "batch_size of a stage, which counts the samples of a step over all devices (row_tokens bounds a forward pass)",
    ),
    **dict.fromkeys(("num_epochs", "num_train_epochs"), "epochs"),
    "max_steps": "steps",
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), "schedule"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "warmup, a share of the steps, of a stage"),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping"), "clip"),
    **dict.fromkeys(("val_size", "val_set_size"), "eval.holdout.fraction"),
    "eval_steps": "eval.every",
    "save_steps": "save.every",
    "save_total_limit": "save.keep",
    "output_dir": "output",
    "report_to": "trackers",
    **dict.fromkeys(("bf16", "fp16"), "precision"),
    **dict.fromkeys(("deepspeed", "fsdp"), "parallel"),
    "torch_compile": "compile",
    "dataloader_num_workers": "workers",
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "do_eval"), "eval.every"),
    "load_best_model_at_end": "eval.keep_best",
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "betas"),
    **dict.fromkeys(("new_special_tokens", "add_special_tokens"), "add_tokens"),
    **dict.fromkeys(("image_max_pixels", "image_min_pixels", "image_resolution"), "side"),
    **dict.fromkeys(
        (
            *("freeze", "freeze_backbone", "freeze_vision_tower", "freeze_multi_modal_projector"),
            *("freeze_language_model", "train_mm_proj_only", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"),
        ),
        "train of a stage, which names the parts that learn; all others stay frozen",
    ),
    "resume_from_checkpoint": "the same command again, which goes on by itself",
}
"""What keys of other trainers are called here."""

NEEDLESS = {
    word: why
    for words, why in (
        (
            "packing neat_packing sample_packing padding_free group_by_length group_by_modality_length",
            "rows are always packed, without padding, and no sample sees another",
        ),
        (
            "completion_only_loss assistant_only_loss train_on_responses_only train_on_prompt train_on_inputs "
            "train_on_input mask_prompt prompt_loss_weight",
            "the assistant's messages are learned and nothing else, unless a message of the data says `train` itself",
        ),
        (
            "mask_history train_on_last_turn_only last_turn_only",
            "every answer of a conversation is learned, but those whose messages in the data say `train: false`",
        ),
        (
            "quantization quantization_bit quantization_method load_in_4bit load_in_8bit bits qlora "
            "bnb_4bit_quant_type bnb_4bit_compute_dtype double_quantization",
            "quantized weights are not trained; a lora, small row_tokens, gradient_checkpointing and `parallel: fsdp` "
            "save memory",
        ),
        (
            "modules_to_save additional_target bias lora_bias use_dora use_rslora task_type",
            "an adapter here has rank, alpha, dropout and targets, and no more",
        ),
        ("optim optimizer adam_epsilon", "AdamW trains, with betas and weight_decay of a stage"),
        ("shuffle shuffle_dataset", "every epoch has an order of its own, drawn by the seed"),
        ("streaming", "data is read as it is needed; `order: window` of a stage is for sets larger than the disk"),
        ("logging_steps logging_strategy logging_dir plot_loss", "metrics.jsonl has a line for every step"),
        (
            "overwrite_output_dir overwrite_cache",
            "nothing is overwritten; another `output` begins anew, and changed data is converted anew",
        ),
        ("preprocessing_num_workers dataset_num_proc", "data is converted by all processors"),
        ("eos_token pad_token", "the chat format says how an answer ends, and nothing is padded"),
        ("trust_remote_code", "no code that comes with a model is run"),
        (
            "do_train do_predict predict_with_generate per_device_eval_batch_size eval_accumulation_steps ddp_timeout "
            "ddp_find_unused_parameters remove_unused_columns dataset_text_field tf32 use_unsloth enable_liger_kernel "
            "use_liger_kernel neftune_noise_alpha",
            "nothing here answers to it",
        ),
    )
    for word in words.split()
}
"""Keys of other trainers for which there is none here, and why."""


SOURCE = "{llava: notes.json, images: photos/}"


def suggest(word: str, known: Sequence[str]) -> str:
    """`did you mean 'x'?`, or the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def explain(error: ValidationError, tree: Any, root: type[BaseModel]) -> Iterator[str]:
    """A line for each place: what may stand there (all members of a union), and what was found."""
    faults = error.errors(include_url=False)
    deeper = {fault["loc"][:-2] for fault in faults if len(fault["loc"]) > 2}
    lines: dict[str, tuple[list[str], str]] = {}
    listed: set[tuple[int | str, ...]] = set()
    for fault in faults:
        if fault["type"] in ("string_type", "literal_error") and fault["loc"][:-1] in deeper:
            continue  # another member of the union came closer: it names the inner fault
        models, path, node = [root], [], tree
        for step in fault["loc"]:
            if isinstance(step, str) and step in {model.__name__ for model in models}:
                models = [model for model in models if model.__name__ == step]
            elif isinstance(step, int) or (isinstance(node, dict) and step in node) or step in _keys(models):
                path.append(str(step))
                models = [inner for model in models for inner in _models_at(model, step)] or models
                node = _inside(node, step)
        found = ""
        match fault["type"]:
            case "extra_forbidden":
                known = sorted(_keys(_parents(fault["loc"], root)))
                advice = _advice(str(fault["loc"][-1]), known, root)
                text = f"unknown key; {advice}"
                if advice.startswith("known: "):  # once for each section
                    text = "unknown key" if fault["loc"][:-1] in listed else text
                    listed.add(fault["loc"][:-1])
            case "missing":
                text = "is missing"
            case "value_error":
                text = fault["msg"].removeprefix("Value error, ")
            case "list_type" if path[-1:] == ["data"]:
                text, found = f"expected a list of sources, such as [{SOURCE}]", f"{fault['input']!r:.80}"
            case "model_type" if path[-2:-1] == ["data"]:
                text, found = f"expected a source, such as {SOURCE}", f"{fault['input']!r:.80}"
            case "model_type":
                inside = [model for model in models if model.__name__ == fault.get("ctx", {}).get("class_name")]
                text, found = (
                    f"expected keys of its own ({', '.join(sorted(_keys(inside)))})",
                    f"{fault['input']!r:.80}",
                )
            case _:
                text, found = fault["msg"].replace("Input should be", "expected"), f"{fault['input']!r:.80}"
        texts, _ = lines.setdefault(".".join(path) or "(the whole file)", ([], found))
        if text not in texts:
            texts.append(text)
    for place, (texts, found) in lines.items():
        yield f"  {place}: {', or '.join(texts)}" + (f"; found {found}" if found else "")


def _advice(key: str, known: Sequence[str], root: type[BaseModel]) -> str:
    """What to write instead of a key that a section does not have."""
    places = dict(_places(root))
    if key in ELSEWHERE:
        own = ELSEWHERE[key]
        return f"here it is {own if own in known else places.get(own, own)}"
    if key in NEEDLESS:
        return f"leave it out: {NEEDLESS[key]}"
    advice = suggest(key, known)
    return f"its place is {places[key]}" if advice.startswith("known: ") and key in places else advice


def _places(root: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Each key with a path to it, the shortest last: of `dict`, the one that stays."""
    found: list[tuple[str, str]] = []
    level = [("", root)]
    while level:
        deeper = []
        for path, model in level:
            for name, field in model.model_fields.items():
                key = field.alias or name
                found.append((key, path + key))
                items = {"stages": ".NAME", "data": ".0"}.get(key, "")
                deeper += [(f"{path}{key}{items}.", inner) for inner in _models_in(field.annotation)]
        level = deeper
    return reversed(found)


def _parents(location: tuple[int | str, ...], root: type[BaseModel]) -> list[type[BaseModel]]:
    models = [root]
    for step in location[:-1]:
        named = [model for model in models if model.__name__ == step]
        models = named or [inner for model in models for inner in _models_at(model, step)] or models
    return models


def _inside(node: Any, step: int | str) -> Any:
    """What lies under a key or number of a raw tree, None if nothing does."""
    if isinstance(node, dict):
        return node.get(step)
    return node[step] if isinstance(node, list) and isinstance(step, int) and step < len(node) else None


def _keys(models: Sequence[type[BaseModel]]) -> set[str]:
    return {field.alias or key for model in models for key, field in model.model_fields.items()}


def _models_at(model: type[BaseModel], step: int | str) -> list[type[BaseModel]]:
    """Models that the value of field `step` may be; an index into a list stays with the list's own models."""
    if isinstance(step, int):
        return [model]
    if step not in model.model_fields:
        return []
    return list(_models_in(model.model_fields[step].annotation))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, list, Annotated):
        for inner in get_args(annotation):
            yield from _models_in(inner)
