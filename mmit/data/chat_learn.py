"""A chat format learned from a tokenizer's own Jinja template, and proven on conversations it was not learned from."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from mmit.config import ConfigError
from mmit.data.chat_formats import CHAT_FORMATS, ChatFormat


def learn(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    raise ConfigError(f"chat: auto is not ready; name one of {', '.join(CHAT_FORMATS)}")
