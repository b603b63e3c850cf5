from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.album import develop
from data_tools.formats.synthetic import samples
from mmit.data.sample import ImagePart, Sample, TextPart, message
from mmit.evaluation.answers import Answered, evaluate_answers, questions
from mmit.evaluation.scores import accuracy, exact_match, vqa_accuracy
from mmit.inference.generate import Model


def read(count: int) -> list[Sample]:
    made = samples(Path("shapes"), count=count, questions=4)
    return [
        replace(item, key=str(n), images=tuple(develop(image, "test") for image in item.images))
        for n, item in enumerate(made)
    ]


def test_a_match_is_strict_but_for_the_edges() -> None:
    assert exact_match(" red\n", "red")
    assert not exact_match("Red", "red")
    assert not exact_match("red.", "red")
    assert not exact_match("dark  red", "dark red")


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=2, max_size=10))
def test_vqa_accuracy_is_the_mean_over_leaving_each_person_out(people: Sequence[str]) -> None:
    groups = list(combinations(people, len(people) - 1))
    expected = sum(min(group.count("red") / 3, 1) for group in groups) / len(groups)
    assert vqa_accuracy("red", people) == pytest.approx(expected)


def test_vqa_accuracy_of_ten_people_has_the_known_steps() -> None:
    steps = [vqa_accuracy("a", ["a"] * same + ["b"] * (10 - same)) for same in range(6)]
    assert steps == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_a_share_of_nothing_is_refused() -> None:
    assert accuracy([True, False, True, True]) == 0.75
    with pytest.raises(ValueError, match="nothing was answered"):
        accuracy([])
    with pytest.raises(ValueError, match="no expected answers"):
        vqa_accuracy("a", [])


def test_each_question_alone_is_asked_like_the_first_of_a_conversation() -> None:
    sample = read(1)[0]
    asked = list(questions([sample]))
    assert [expected for _, expected in asked] == [item.text for item in sample.messages[1::2]]
    for (conversation, _), turn in zip(asked, sample.messages[::2], strict=True):
        assert len(conversation.messages) == 1
        (only,) = conversation.messages
        assert only.parts[0] == ImagePart(0)
        assert only.text == "\n" + turn.text.removeprefix("\n")


def test_a_later_question_brings_no_newline_that_the_sample_does_not_have() -> None:
    parts = (ImagePart(0), TextPart("first"))
    turns = [message("user", *parts), message("assistant", "1"), message("user", "second"), message("assistant", "2")]
    sample = replace(read(1)[0], messages=(message("system", "Be brief."), *turns))
    (_, (second, _)) = questions([sample])
    assert [item.role for item in second.messages] == ["system", "user"]
    assert second.messages[1].parts == (ImagePart(0), TextPart("second"))


def test_with_history_the_turns_before_stand_before() -> None:
    sample = read(1)[0]
    asked = [conversation.messages for conversation, _ in questions([sample], history=True)]
    assert asked == [sample.messages[: 2 * number + 1] for number in range(4)]


def test_answers_that_are_not_learned_are_not_asked_for() -> None:
    sample = read(1)[0]
    untrained = tuple(replace(item, train=False) for item in sample.messages[:2])
    sample = replace(sample, messages=untrained + sample.messages[2:])
    assert len(list(questions([sample]))) == 3


def test_an_answer_that_opens_a_conversation_is_asked_for_by_nothing() -> None:
    """It ended a run at its first evaluation, though training takes such conversations."""
    sample = read(1)[0]
    greeted = replace(sample, messages=(message("assistant", "Hello."), *sample.messages))
    assert len(list(questions([greeted], history=True))) == len(list(questions([sample], history=True))) == 4


@pytest.mark.parametrize("history", [False, True])
def test_records_hold_what_asking_by_hand_gives(model: Model, history: bool) -> None:
    held_out = read(3)
    by_hand = []
    for sample in held_out:
        for number in range(0, len(sample.messages), 2):
            if history:
                messages = sample.messages[: number + 1]
            else:
                text = "\n" + sample.messages[number].text.removeprefix("\n")
                messages = (message("user", ImagePart(0), text),)
            data = sample.images[0].data
            assert data is not None
            by_hand.append(model.answer(messages, [data], max_new_tokens=8).strip())
    seen: list[Answered] = []
    found = evaluate_answers(model, held_out, history=history, max_new_tokens=8, batch_size=5, progress=seen.append)
    assert [record.answer for record in found] == by_hand
    assert seen == found
    for record in found:
        assert record.correct == (record.answer == record.expected)
        assert (record.kind == "yes_no") == record.question.startswith("Is there")
    assert {record.where for record in found} == {":0", ":1", ":2"}
