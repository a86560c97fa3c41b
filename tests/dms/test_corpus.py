"""Text to train evictors on: where each sequence comes from, and what is taken of a row."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from kit import cli, hub
from kit.dms import corpus, evictor
from kit.dms.train import EvictorTraining

MESSAGES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]


def test_a_document_has_sequences_of_its_own(tiny, tmp_path):
    long, short = "one two three four five six seven eight nine ten " * 3, "one two"
    ids = [tiny.tokenizer(text)["input_ids"] for text in (long, short)]
    assert len(ids[0]) > 20 and len(ids[1]) < 10
    made = corpus.unpacked(tiny, [long, short], 10)
    whole = len(ids[0]) // 10
    assert made[:whole].flatten().tolist() == ids[0][: whole * 10]
    (last,) = made[whole:].tolist()
    assert last[: len(ids[1])] == ids[1]
    assert {*last[len(ids[1]) :]} == {tiny.tokenizer.eos_token_id}
    training = EvictorTraining(tiny, made, evictor.LAPTOP, tmp_path)
    assert training._lengths(made).tolist() == [10] * whole + [len(ids[1]) + 1]
    assert training._scored(made).sum(1).tolist() == [10] * whole + [len(ids[1])]


def test_half_of_mixed_text_is_prose_without_examples_and_tables(tiny):
    chats = [f"a chat about the number {n}" for n in range(20)]
    made = corpus.mixed(tiny, chats, 32)
    assert made.shape == (40, 32)
    assert tiny.tokenizer.decode(made[19]).startswith("a chat about the number 19")
    documents = corpus.prose()
    text = "\n\n".join(documents)
    assert len(text) > 100_000 and "descriptor" in text
    assert ">>>" not in text and "+--" not in text and "::=" not in text


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"messages": MESSAGES}, "2"),
        ({"problem": "1 + 1?", "generations": ["a", "b", "c"],
          "correctness_math_verify": [True, True, False], "messages": MESSAGES}, "b"),
        ({"problem": "1 + 1?", "generations": ["a"], "correctness_math_verify": [False]}, None),
        ({"question": "1 + 1?", "solution": "it is 2"}, "it is 2"),
        ({"question": "1 + 1?"}, None),
        (["no object"], None),
    ],
)  # fmt: skip
def test_the_last_correct_generation_of_a_row_is_its_answer(row, answer):
    found = corpus.chat(row)
    assert found is None if answer is None else found[-1]["content"] == answer
    assert found is None or found[0] == MESSAGES[0]


def test_traces_of_a_file_and_of_the_hub(tiny, tmp_path, monkeypatch):
    rows = [{"problem": f"{n} + 1?", "generations": [f"it is {n + 1}"],
             "correctness_math_verify": [n != 1]} for n in range(6)]  # fmt: skip
    file = tmp_path / "part.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    found = corpus.traces(str(file), tiny, 10**6)
    assert len(found) == 5 and "0 + 1?" in found[0] and "it is 1" in found[0]
    asked = []

    def fetch(repo, name, kind):
        asked.append((repo, name, kind))
        return file, "commit"

    monkeypatch.setattr(hub, "fetch", fetch)
    assert corpus.traces("hub:ORG/NAME/data/part.parquet", tiny, 10**6) == found
    tokens = sum(len(tiny.tokenizer(text)["input_ids"]) for text in found)
    assert len(corpus.traces("openr1-math", tiny, tokens + 1)) == 6
    repo = "open-r1/OpenR1-Math-220k"
    assert asked == [("ORG/NAME", "data/part.parquet", "dataset")] + [
        (repo, f"data/train-0000{n}-of-00010.parquet", "dataset") for n in (0, 1)
    ]


def test_the_command_refuses_traces_that_there_are_not(tiny_folder, tmp_path, capsys):
    file = tmp_path / "traces.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"What is {n} + {n}?"},
                          {"role": "assistant", "content": f"It is {2 * n}. " * 8}]}
            for n in range(40)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    say = ["train-evictor", str(tmp_path / "out"), "--model", str(tiny_folder), "--text", str(file)]
    assert cli.main([*say, "--recipe", "official", "--context", "4000"]) == 2
    assert "less than one sequence of 4000" in capsys.readouterr().err
    assert cli.main([*say, "--text", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("No traces at 'nowhere'")


@pytest.mark.parametrize("text", ["mixed", "own"])
def test_training_text_of_answers(tiny, tmp_path, text):
    recipe = evictor.EvictorRecipe(
        *("small", "adapter", "evictor", 4, 2, 1, "teacher||student"), batch=2, context=24
    )
    made, held_out = corpus.training_text(tiny, text, recipe, tmp_path, "laptop", 4, 6)
    assert made.shape[1] == held_out.shape[1] == 24 and isinstance(made, torch.Tensor)
    last = tiny.tokenizer.decode(made[-1])
    assert any(last in document for document in corpus.prose()) == (text == "mixed")
