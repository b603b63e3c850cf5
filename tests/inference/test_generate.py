from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from data_tools.formats.synthetic import samples
from mmit.config import ConfigError
from mmit.data.chat import CHAT_FORMATS, Chat
from mmit.data.sample import ImagePart, SampleError, message
from mmit.inference.conversation import Asked, Conversation, conversation
from mmit.inference.generate import Draw, Model, Sampling, StopText, load

NEW = 20


def picture(number: int, size: tuple[int, int] = (40, 28)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def shown(number: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(number)}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


CONVERSATIONS: list[Asked] = [
    "Hi",
    [{"role": "user", "content": [shown(0), said("\nWhich shape is shown?")]}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of your day, at length."}],
    [{"role": "user", "content": [shown(1), said("and"), shown(0), said("differ how?"), shown(1)]}],
    [
        {"role": "user", "content": [shown(2), said("What is it?")]},
        {"role": "assistant", "content": "a shape"},
        {"role": "user", "content": "Which?"},
    ],
]


def logits_without_cache(model: Model, ids: list[int], pictures: list[np.ndarray]) -> Tensor:
    """The next token's logits, by an own way: ids embedded one by one, features put where the placeholder stands."""
    vlm, fit = model.vlm, model.saved.fit
    assert fit is not None
    assert vlm.vision is not None
    assert vlm.projector is not None
    rows = [vlm.projector(vlm.vision(fit.apply(pixels)[None]))[0] for pixels in pictures]
    features = iter(torch.cat(rows)) if rows else iter(())
    table = cast(nn.Embedding, vlm.language.get_input_embeddings()).weight
    embeds = torch.stack([next(features) if number == model.chat.placeholder else table[number] for number in ids])
    assert next(features, None) is None
    positions = torch.arange(len(ids))[None]
    return vlm.language(inputs_embeds=embeds[None], position_ids=positions, use_cache=False).logits[0, -1]


@torch.no_grad()
def step_by_step(model: Model, asked: Conversation, count: int) -> list[int]:
    prompt = model.prompt(asked)
    pictures = [asked.pictures[number].decoded("test") for _, _, number in prompt.images]
    ids, new = prompt.ids.tolist(), []
    while len(new) < count and (not new or new[-1] not in model.chat.stop_ids):
        new.append(int(logits_without_cache(model, ids + new, pictures).argmax()))
    return new


def test_a_greedy_batch_gives_the_ids_of_full_forward_passes_without_a_cache(model: Model) -> None:
    asked = [conversation(item) for item in CONVERSATIONS]
    together = model.generate(asked, Sampling(NEW))
    assert together == [step_by_step(model, item, NEW) for item in asked]
    assert len({tuple(ids) for ids in together}) == len(asked)


def test_greedy_answers_do_not_depend_on_the_batch(model: Model) -> None:
    alone = [model.answer(item, max_new_tokens=NEW) for item in CONVERSATIONS]
    for batch_size in (1, 2, 5):
        assert model.answers(CONVERSATIONS, batch_size=batch_size, max_new_tokens=NEW) == alone


def test_an_ended_answer_is_not_touched_by_a_longer_neighbour(own_model: Model) -> None:
    asked = [conversation(item) for item in CONVERSATIONS]
    own_model.chat.stop_ids = ()  # as for a tokenizer without any end token
    free = own_model.generate(asked, Sampling(NEW))
    assert {len(ids) for ids in free} == {NEW}
    stop = free[0][3]
    own_model.chat.stop_ids = (stop,)
    for before, now in zip(free, own_model.generate(asked, Sampling(NEW)), strict=True):
        assert now == (before[: before.index(stop) + 1] if stop in before else before)


def test_the_prompt_is_how_training_begins(model: Model) -> None:
    for sample in samples(Path("shapes"), count=20):
        sized = replace(sample, images=tuple(replace(image, width=32, height=32) for image in sample.images))
        trained = model.rendering.render(sized, "test").ids.tolist()
        for number, item in enumerate(sample.messages):
            if item.role == "assistant":
                history = sample.messages[:number]
                content = [conversation([*history], images=[picture(0)])]
                prompt = model.prompt(content[0]).ids.tolist()
                assert trained[: len(prompt)] == prompt
                assert len(prompt) < len(trained)


def test_a_tokenizer_without_a_pad_token_will_do(own_model: Model) -> None:
    before = own_model.answers(CONVERSATIONS, max_new_tokens=NEW)
    own_model.saved.assembly.tokenizer.pad_token = None
    own_model.vlm.language.config.pad_token_id = None
    assert own_model.answers(CONVERSATIONS, max_new_tokens=NEW) == before


def test_defaults_that_came_with_the_weights_change_no_answer(own_model: Model) -> None:
    before = own_model.answers(CONVERSATIONS, max_new_tokens=NEW)
    own_model.vlm.language.generation_config = GenerationConfig(
        repetition_penalty=5.0, eos_token_id=65, do_sample=True, top_k=3, min_new_tokens=2
    )
    again = Model(
        own_model.saved, run=own_model.run, cache=own_model.cache, device=torch.device("cpu"), dtype=torch.float64
    )
    assert again.answers(CONVERSATIONS, max_new_tokens=NEW) == before


def test_what_is_drawn_depends_on_seed_and_number_alone(model: Model) -> None:
    options = {"max_new_tokens": NEW, "temperature": 1.0, "top_p": 0.95}
    state = torch.get_rng_state()
    drawn = model.answers(CONVERSATIONS, batch_size=5, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.answers(CONVERSATIONS, batch_size=2, seed=3, **options) == drawn
    assert model.answer(CONVERSATIONS[0], seed=3, **options) == drawn[0]
    assert model.answers(CONVERSATIONS, batch_size=5, seed=4, **options) != drawn


def test_a_temperature_near_zero_is_greedy(model: Model) -> None:
    cold = model.answers(CONVERSATIONS, max_new_tokens=NEW, temperature=1e-4)
    assert cold == model.answers(CONVERSATIONS, max_new_tokens=NEW)


def test_draws_follow_the_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]])
    draw = Draw([7])
    count = 20_000
    picks = torch.cat([draw(torch.empty(1, 0), scores).argmax(-1) for _ in range(count)])
    found = torch.bincount(picks, minlength=5) / count
    expected = scores[0].softmax(-1)
    # five standard deviations of a share
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all())


def test_a_stop_marker_of_plain_text_ends_an_answer(own_model: Model) -> None:
    asked = [conversation([{"role": "user", "content": [shown(number)]}]) for number in range(4)]
    assembly = own_model.saved.assembly

    def answer_with(stop: str) -> list[list[int]]:
        plain = Chat(replace(CHAT_FORMATS["plain"], stop=stop), assembly.tokenizer, placeholder=assembly.placeholder)
        own_model.saved = replace(own_model.saved, chat=plain)
        own_model.rendering = replace(own_model.rendering, chat=plain)
        return own_model.generate(asked, Sampling(NEW))

    free = answer_with("a text that no model writes")
    letters = [[chr(number) for number in ids if 33 <= number < 127] for ids in free]
    stop = letters[0][len(letters[0]) // 2]
    for before, now in zip(free, answer_with(stop), strict=True):
        text = own_model.chat.text.decode(before)
        assert own_model.chat.decode(now) == text.split(stop)[0]
        assert len(now) == (before.index(ord(stop)) + 1 if ord(stop) in before else NEW)
    assert "captions pictures" in own_model.notes[0]
    passes = []
    own_model.vlm.language.register_forward_hook(lambda *_: passes.append(1))
    (alone,) = own_model.generate(asked[:1], Sampling(NEW))
    assert len(passes) == len(alone) < NEW


@pytest.mark.parametrize("stop", ["\n", "###", "ÄÖ🙂"])
def test_a_stop_text_is_seen_whichever_tokens_spell_it(model: Model, stop: str) -> None:
    assembly = model.saved.assembly
    chat = Chat(replace(CHAT_FORMATS["plain"], stop=stop), assembly.tokenizer, placeholder=assembly.placeholder)
    ids = torch.tensor([list(("x" * 50 + stop).encode())])
    seen = [bool(StopText(chat)(cast(Any, ids[:, :end]))) for end in range(1, ids.shape[1] + 1)]
    assert seen == [False] * (ids.shape[1] - 1) + [True]


def test_our_own_messages_say_the_same_as_objects(model: Model) -> None:
    ours = [message("user", ImagePart(0), "\nWhat is it?")]
    theirs = [{"role": "user", "content": [shown(5), said("\nWhat is it?")]}]
    assert model.answer(ours, [picture(5)], max_new_tokens=NEW) == model.answer(theirs, max_new_tokens=NEW)
    assert model.answer("What is it?", [picture(5), picture(6)], max_new_tokens=NEW) == model.answer(
        [message("user", ImagePart(0), ImagePart(1), "\nWhat is it?")], [picture(5), picture(6)], max_new_tokens=NEW
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p")],
)
def test_impossible_settings_are_refused(model: Model, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        model.answer("Hi", **options)


def test_what_does_not_fit_the_language_model_is_refused(model: Model) -> None:
    with pytest.raises(SampleError, match="reads 2048 in all"):
        model.answer("x" * 2000, max_new_tokens=100)


def test_a_folder_without_a_finished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no final/model\.json"):
        load(tmp_path)
