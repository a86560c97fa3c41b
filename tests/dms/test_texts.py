"""Text of other kinds: what each sequence holds, and where it is compared."""

import re

import pytest
import torch

from kit.dms import texts
from kit.models.load import BUNDLED, load

CHATS = [f"Chat {n}: " + "a question and its answer, " * (8 * n) for n in range(1, 5)]


@pytest.fixture(scope="module")
def model():
    return load(BUNDLED)


def read(model, ids) -> str:
    return model.tokenizer.decode(ids.tolist())


def test_kinds_have_their_own_length_and_place(model):
    found = texts.kinds(model, CHATS, 64, 3)
    assert {name: (*text.ids.shape, text.prompt) for name, text in found.items()} == {
        "single chats": (3, 64, 32),
        "prose": (3, 64, 32),
        "longer than trained": (3, 128, 64),
        "needles": (3, 256, 247),
        "variables": (3, 256, 249),
    }
    first = [read(model, ids) for ids in found["single chats"].ids]
    assert all(text == chat[: len(text)] for text, chat in zip(first, CHATS[1:]))
    assert "Apache License" in read(model, found["prose"].ids[0])
    assert texts.kinds(model, CHATS, 64, 0) == {}
    assert "longer than trained" not in texts.kinds(model, CHATS[:1], 64, 3)


def test_the_answer_alone_is_compared_and_stands_in_the_text_once(model):
    ids, prompt = texts.needles(model, 300, 6)
    assert ids.shape == (6, 300) and len({*map(tuple, ids.tolist())}) == 6
    places = []
    for row in ids:
        asked, answer = read(model, row[: prompt + 1]), read(model, row[prompt + 1 :])
        (told,) = re.finditer(r"numbers for (\w+) is: (\d{7})\.", asked)
        assert answer == f" {told[2]}"
        assert asked.endswith(f" magic number for {told[1]} mentioned in the provided text is")
        assert asked.count("There and back again.") > 3
        places.append(told.start())
    assert len({*places}) > 1
    again = texts.needles(model, 300, 6).ids
    assert torch.equal(ids, again) and not torch.equal(ids, texts.needles(model, 300, 6, 1).ids)


def test_a_value_is_followed_through_its_chain(model):
    ids, prompt = texts.variables(model, 320, 5)
    for row in ids:
        asked, answer = read(model, row[: prompt + 1]), read(model, row[prompt + 1 :])
        values: dict[str, str] = {}
        for name, value in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", asked):
            values[name] = values.get(value, value)  # told before, or a number
        assert len(values) == 6 and len({*values.values()}) == 2
        last = re.search(r"the value of VAR ([A-Z]{5}) is$", asked)[1]
        assert answer == f" {values[last]}" and answer[1:].isdigit()


def test_a_task_longer_than_asked_for_has_no_haystack(model):
    ids, prompt = texts.needles(model, 60, 2)
    assert ids.shape[1] > 60 and not any("The sky is blue" in read(model, row) for row in ids)
    assert all(re.fullmatch(r" \d{7}", read(model, row[prompt + 1 :])) for row in ids)
