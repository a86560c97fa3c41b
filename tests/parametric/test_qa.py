"""What a model knows: likelihoods against one text at a time, records, surprisal, passages."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from kit.evaluation import grader
from kit.evaluation.store import Store
from kit.inference import decode
from kit.parametric import facts, ffn_memory, qa
from kit.parametric.rag import Passages
from kit.schema import Problem
from tests import rounding
from tests.conftest import loaded

ASKED = [
    Problem("a", "The city of Lagos is located in the country of", "Nigeria", "cities", 1, "facts"),
    Problem("b", "Of all the many cities, that of the ruler is", "Lima", "capitals", 2, "facts"),
    Problem("c", "The reason why it is so is", "Because of it", "capitals", 3, "facts"),
]
OPTIONS = [["Peru", "Nigeria", "Democratic Republic of the Congo", "China"],
           ["Lima", "Oslo", "Port-aux-Francais", "Rome"],
           ["No reason", "Because of it", "A", "B"]]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tiny_folder, dtype):
    return loaded(tiny_folder, dtype)


class Each:
    """A bank that gives each text the blocks of its number."""

    key = "each"

    def __init__(self, model, texts=tuple(problem.question for problem in ASKED)):
        self.texts = texts
        self.shape = ffn_memory.shape(model.weights, "ffn", (0, 1), (4,), 3)
        rng = torch.Generator().manual_seed(0)
        self.blocks = torch.randn(3, *self.shape.block(0), generator=rng)

    def paths(self, questions):
        return [(self.texts.index(question),) for question in questions]

    def fetch(self, path):
        return [self.blocks[path[0]]]

    def widened(self, weights, sequences):
        return ffn_memory.MemoryLayers.empty(weights, self.shape, sequences)


def alone(model, prompt: str, option: str) -> torch.Tensor:
    """Log-probabilities of the tokens of one option, by one forward pass of the whole text."""
    read = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    said = model.tokenizer(f" {option}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = model.weights(torch.tensor([read + said])).logits[0, len(read) - 1 : -1]
    return logp.log_softmax(-1).gather(-1, torch.tensor(said)[:, None])[:, 0]


@pytest.mark.parametrize("memory", (False, True))
def test_options_are_as_likely_as_one_by_one(tiny, memory):
    bank = Each(tiny) if memory else None
    prompts = [qa.text(problem) for problem in ASKED]
    with qa.fetched(tiny, [p.question for p in ASKED], bank):
        found = qa.likelihoods(tiny, prompts, OPTIONS)
    for number, (problem, prompt) in enumerate(zip(ASKED, prompts, strict=True)):
        pair = []
        for model in (tiny, rounding.exact(tiny)):
            with qa.fetched(model, [problem.question], bank):
                pair.append([alone(model, prompt, option) for option in OPTIONS[number]])
        for likelihood, plain, right in zip(found[number], *pair, strict=True):
            off = len(right) * rounding.tolerance(plain, right)
            assert likelihood == pytest.approx(float(right.sum()), abs=off)


def test_options_are_as_likely_one_by_one_where_layers_slide(tiny, dtype):
    """The window is shorter than the prompts, which differ in length: padding must not fill it."""
    config = Gemma3TextConfig(
        vocab_size=tiny.weights.config.vocab_size, hidden_size=64, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.3,
    )  # fmt: skip
    weights = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    model = dataclasses.replace(tiny, weights=weights)
    prompts = [qa.text(problem) for problem in ASKED]
    found = qa.likelihoods(model, prompts, OPTIONS)
    for row, prompt, options in zip(found, prompts, OPTIONS, strict=True):
        for likelihood, option in zip(row, options, strict=True):
            plain, right = (alone(m, prompt, option) for m in (model, rounding.exact(model)))
            off = len(right) * rounding.tolerance(plain, right)
            assert likelihood == pytest.approx(float(right.sum()), abs=off)


def test_the_choice_is_a_graded_record_and_is_made_once(tiny, tmp_path, monkeypatch):
    store = Store(tmp_path)
    how = (tiny, ASKED, OPTIONS, store)
    found = qa.multiple_choice(*how, "plain").set_index("problem_id")
    for problem, options in zip(ASKED, OPTIONS, strict=True):
        prompt = qa.text(problem)
        likely = max(options, key=lambda option: alone(tiny, prompt, option).float().sum())
        row = found.loc[problem.id]
        assert row["extracted"] == likely and row["correct"] == (likely == problem.answer)
        assert row["prompt_tokens"] > 5 and row["level"] == problem.level
    wide = qa.multiple_choice(*how, "fetched", Each(tiny))
    assert set(wide["key"]).isdisjoint(found["key"])
    read = qa.multiple_choice(*how, "rag", passages=[["Lagos is in Nigeria."], [], []])
    assert read.set_index("problem_id")["prompt_tokens"]["a"] > found["prompt_tokens"]["a"]
    monkeypatch.setattr(qa, "likelihoods", lambda *args: 1 / 0)
    assert (qa.multiple_choice(*how, "plain")["key"] == found["key"].sort_values().to_numpy()).all()


def test_a_new_grader_grades_stored_answers(tiny, tmp_path, monkeypatch):
    store = Store(tmp_path)
    asked = [*ASKED, dataclasses.replace(ASKED[0], id="d", answer="Ghana")]  # the same question
    old = [qa.multiple_choice(tiny, ASKED, OPTIONS, store, "plain"),
           qa.short_answer(tiny, ASKED, store, "plain")]  # fmt: skip
    monkeypatch.setattr(qa, "likelihoods", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(decode, "decode", lambda *_, **__: pytest.fail("decoded again"))
    monkeypatch.setattr(grader, "GRADE_VERSION", grader.GRADE_VERSION + 1)
    new = [qa.multiple_choice(tiny, asked, [*OPTIONS, OPTIONS[0]], store, "plain"),
           qa.short_answer(tiny, asked, store, "plain")]  # fmt: skip
    for before, after in zip(old, new, strict=True):
        assert len(after) == 4 and set(after["key"]).isdisjoint(before["key"])
        texts, said = (frame.set_index("problem_id")["text"] for frame in (before, after))
        assert said.drop("d").sort_index().equals(texts.sort_index()) and said["d"] == said["a"]
        assert after.set_index("problem_id").loc["d", "answer"] == "Ghana"


def test_a_free_answer_is_one_line_and_graded(bundled, tmp_path):
    asked = [Problem("f", "The capital of France is", "Paris", "capitals", 1, "facts")]
    told = [["The capital of Spain is Madrid.", "The capital of France is Paris."]]
    found = qa.short_answer(bundled, asked, Store(tmp_path), "rag", passages=told).iloc[0]
    ids = bundled.tokenizer(qa.text(asked[0], told[0]), return_tensors="pt")["input_ids"]
    out = bundled.weights.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    said = bundled.tokenizer.decode(out, skip_special_tokens=True).strip()
    assert found["text"] == f"Answer: {said.splitlines()[0]}" and "Paris" in said
    assert 0 < found["new_tokens"] <= 12


def test_surprisal_is_the_loss_of_each_text_alone(tiny):
    texts = ["The cat sat on the mat.", "Short text", "A much longer text, with more words in it."]
    found = qa.nll_per_token(tiny, texts)
    for text, nats in zip(texts, found, strict=True):
        ids = torch.tensor([tiny.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            plain, right = (
                m.weights(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
                for m in (tiny, rounding.exact(tiny))
            )
        off = rounding.tolerance(plain, right)
        assert nats == pytest.approx(-float(right.mean()), abs=off)
    wide = qa.nll_per_token(tiny, texts, Each(tiny, texts))
    assert abs(wide - found).max() > off


def test_surprisal_after_a_beginning_is_that_of_the_rest_with_the_blocks_of_the_beginning(tiny):
    texts = ["The cat sat on the mat.", "Short text", "A much longer text, with more words in it."]
    begins = ["The cat sat", "Short", "A much longer"]
    read, whole = ([len(tiny.tokenizer(t)["input_ids"]) for t in of] for of in (begins, texts))
    first, later, every = (
        qa.nll_per_token(tiny, *how) for how in ((begins,), (texts, None, begins), (texts,))
    )
    for i, (start, end) in enumerate(zip(read, whole)):
        of_begin = first[i] * (start - 1) if start > 1 else 0.0
        assert later[i] * (end - start) + of_begin == pytest.approx(every[i] * (end - 1), rel=1e-5)
    fetched = qa.nll_per_token(tiny, texts, Each(tiny, begins), begins)
    assert abs(fetched - later).max() > 1e-4
    with pytest.raises(ValueError):
        qa.nll_per_token(tiny, texts, Each(tiny, texts), begins)


def test_passages_are_found_by_meaning(tmp_path):
    from kit.models import embedder

    known = facts.load(["cities", "elements"])[:300]
    told = [f"{facts.STATEMENTS[f.family][0].format(f.subject)} {f.answer}." for f in known]
    found = Passages(tmp_path, told, embedder.load())
    again = Passages(tmp_path, told, embedder.load())
    for passages in (found, again):
        (nearest, three) = (
            passages.search(["The city of Lagos is located in the country of"], k)[0]
            for k in (1, 3)
        )
        assert nearest == ["Lagos lies in Nigeria."]
        assert len(three) == 3 and three[-1] == nearest[0], "the nearest stands last"
    assert found.nbytes()["vectors"] == 4 * 384 * len(set(told))
