"""Pretrained parts of transformers from a folder or the Hub: whole, without code of their own, or refused by name."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import torch
import transformers.utils.logging
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from mmit.config import ConfigError, suggest
from mmit.model.files import located, split_revision

T = TypeVar("T")
log = logging.getLogger(__name__)


def from_hub(load: Callable[[], T], key: str, name: str) -> T:
    """What `load()` gives; ConfigError if the files of `name` cannot be had, are damaged or would run code."""
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise ConfigError(f"{key}: {name}: no such folder; name one that holds a model's files, or a hub model")
    try:
        with bars_on_terminals():
            return load()
    except MemoryError:
        raise
    except Exception as error:  # loaders raise whatever they run into, each library its own kinds
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ConfigError(
            f"{key}: cannot load {name!r} ({kind}{reason}); name a folder with its files, all of them whole, or a hub "
            f"model that this machine has cached or can reach"
        ) from error


def random_config(model_type: Any, sizes: Mapping[str, Any], key: str) -> PreTrainedConfig:
    """The configuration of a model without weights; ConfigError for a mistyped size, which transformers would keep
    aside without a word: the model would have the usual size, of billions."""
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"{key}.model_type: found {model_type!r}; {suggest(str(model_type), LIKELY)}")
    try:
        usual = AutoConfig.for_model(model_type)
        own = {*dir(usual), *usual.attribute_map}
        for name in sizes.keys() - own:  # models read some that no configuration lists, such as head_dim
            if near := difflib.get_close_matches(name, own, n=1, cutoff=0.85):
                raise ConfigError(f"{key}.{name}: {model_type} has no such size; did you mean {near[0]!r}?")
        return AutoConfig.for_model(model_type, **sizes)
    except ConfigError:
        raise
    except Exception as error:  # configurations raise whatever does not fit together in them
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key}: {reason}; give a transformers model_type and its sizes") from None


LIKELY = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2")
"""What is proposed of the hundreds that transformers has."""


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Progress bars on a terminal alone: in a log, a bar is a line of its own for every tensor."""
    if sys.stderr.isatty():
        yield
        return
    transformers.utils.logging.disable_progress_bar()
    bar = cast(Any, transformers.utils.logging).tqdm_lib.tqdm  # of which the reader of GGUF makes one unasked
    shown = bar.__init__
    bar.__init__ = partialmethod(shown, disable=True)
    try:
        yield
    finally:
        bar.__init__ = shown


def load_whole(kind: Any, key: str, name: str, **options: Any) -> Any:
    """The model of class `kind` in fp32. ConfigError unless the files of `name` hold each of its parameters, in full
    precision: transformers would draw the others at random, with a warning."""
    raw, _ = from_hub(lambda: PreTrainedConfig.get_config_dict(**located(name)), key, name)
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(f"{key}: {name} holds quantized weights ({method}); name the model they were made from")
    if not raw and has_file(name, "adapter_config.json"):
        raise ConfigError(
            f"{key}: {name} is an adapter of peft, not a model; merge it into its base first (merge_and_unload of "
            f"peft, `mmit merge` for a run) and name the result"
        )
    with quiet():
        model, found = from_hub(
            lambda: kind.from_pretrained(
                **located(name),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below; transformers only points to its log
                trust_remote_code=False,  # null would ask on the terminal
                **options,
            ),
            key,
            name,
        )
    if any(".base_layer." in parameter for parameter, _ in model.named_parameters()):
        raise ConfigError(
            f"{key}: {name} holds an adapter_config.json, an adapter of peft; merge it into its base first"
        )
    lost = sorted(found["missing_keys"]) + sorted(_sizes(*mismatch) for mismatch in found["mismatched_keys"])
    if lost:
        raise ConfigError(
            f"{key}: {name} lacks {len(lost)} parameters of {type(model).__name__} ({', '.join(lost[:3])}"
            f"{', ...' if len(lost) > 3 else ''}); name a complete checkpoint of that class"
        )
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    load = partial(AutoTokenizer.from_pretrained, **located(name), trust_remote_code=False)
    tokenizer = from_hub(load, "tokenizer", name)
    if not tokenizer.is_fast:
        raise ConfigError(f"{name}: its tokenizer has no fast version (tokenizer.json), which mmit needs")
    # transformers 5 takes this setting and does not write it: a tokenizer of Llama 2's day would lose the space before
    # texts behind a control token once it is saved. Needless when `save_pretrained` writes it itself.
    if vars(tokenizer).get("legacy"):
        tokenizer.init_kwargs["legacy"] = True
    return cast(PreTrainedTokenizerFast, tokenizer)


def check_it_survives(tokenizer: PreTrainedTokenizerFast) -> None:
    """ConfigError unless the tokenizer is the same once it was saved: inference and exports load that one, whose
    prompts must be those of training."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if steps_of(load_tokenizer(folder).backend_tokenizer) != steps_of(tokenizer.backend_tokenizer):
            raise ConfigError(
                f"model.language: transformers makes another tokenizer of the saved {type(tokenizer).__name__} than it "
                f'was; write "tokenizer_class": "PreTrainedTokenizerFast" into its tokenizer_config.json, with which '
                f"its tokenizer.json is taken as it is"
            )


def steps_of(backend: Any) -> str:
    """All that decides the ids of a text, of a tokenizer of the tokenizers library."""
    backend.no_truncation()  # as every call without them does
    backend.no_padding()
    return backend.to_str()


def has_file(name: str, file: str) -> bool:
    base, revision = split_revision(name)
    return cached_file(base, file, revision=revision, _raise_exceptions_for_missing_entries=False) is not None


def _sizes(name: str, found: Any, wanted: Any) -> str:
    return f"{name}, {tuple(found)} in the file and {tuple(wanted)} by config.json"


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report of the keys it did not need or find, and the like; what matters of it is checked
    here."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
