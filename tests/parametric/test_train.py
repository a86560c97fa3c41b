"""Training a bank: rows, the loss by hand, independent jobs, resuming, co-training, knowing."""

import dataclasses

import numpy as np
import pytest
import torch

from kit.models.load import load, twin
from kit.parametric import cluster_tree, facts, ffn_memory, qa, shards
from kit.parametric.activation_cache import ActivationCache
from kit.parametric.bank import ParametricBank
from kit.parametric.train import (
    IGNORED,
    BankTraining,
    MemoryTrainConfig,
    completion_loss,
    encode_sentence,
    pack_rows,
    train_bank,
)
from tests import rounding
from tests.conftest import loaded

SAID = [(f"The sum of {a} and {b} is", f" {a + b}.") for a in range(4) for b in range(5)]
PATHS = [(i % 2, 2 * (i % 2) + i % 4 // 2) for i in range(20)]
QUICK = MemoryTrainConfig(batch=2, context=40, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tiny(tiny_folder, dtype):
    return loaded(tiny_folder, dtype)


@pytest.fixture(scope="module")
def shape(tiny):
    return ffn_memory.shape(tiny.weights, "ffn", (0, 1), (3, 2), 2)


@pytest.fixture(scope="module")
def data(tiny):
    return pack_rows(tiny, SAID, PATHS, QUICK.context)


def test_rows_hold_all_sentences_each_with_its_path_and_its_positions(tiny, data):
    end, found = tiny.tokenizer.eos_token_id, []
    for row in data:
        assert len(row.ids) == len(row.targets) == len(row.positions) == QUICK.context
        starts = [*(row.positions == 0).nonzero()[:, 0].tolist(), QUICK.context]
        for first, last in zip(starts, starts[1:]):
            ids, targets = row.ids[first:last], row.targets[first:last]
            spoken = targets[targets != IGNORED].tolist()
            if not spoken:
                continue  # what fills the row
            assert spoken[-1] == end
            text = tiny.tokenizer.decode(ids[ids != end])
            assert text.endswith(tiny.tokenizer.decode(spoken[:-1])) and spoken
            assert (
                targets[:-1][targets[:-1] != IGNORED].tolist()
                == ids[1:][targets[:-1] != IGNORED].tolist()
            )
            found.append((text, row.path))
    assert sorted(found) == sorted(("".join(pair), path) for pair, path in zip(SAID, PATHS))
    with pytest.raises(ValueError, match="'The sum of 0 and 0 is' has 13 tokens, a row 4"):
        pack_rows(tiny, SAID, PATHS, 4)


def test_the_loss_is_that_of_each_sentence_alone(tiny, data):
    """Sentences of a row do not see each other."""

    @torch.no_grad()
    def alone(model, row) -> torch.Tensor:
        """Nats of each token that is asked for."""
        starts = [*(row.positions == 0).nonzero()[:, 0].tolist(), QUICK.context]
        each = []
        for first, last in zip(starts, starts[1:]):
            targets = row.targets[first:last]
            logp = model.weights(row.ids[None, first:last]).logits[0].log_softmax(-1)
            each += [-logp[t, target] for t, target in enumerate(targets) if target >= 0]
        return torch.stack(each)

    plain, right = ([alone(m, row) for row in data[:3]] for m in (tiny, rounding.exact(tiny)))
    off = rounding.tolerance(torch.cat(plain), torch.cat(right))
    expected = np.mean([row.mean().item() for row in right])
    assert completion_loss(tiny, data[:3]).item() == pytest.approx(expected, abs=off)


def test_lower_layers_computed_once_give_the_same_loss_and_gradient(data):
    """Sentence by sentence beforehand, against the whole model."""
    model = load("random:qwen3", dtype="float64")
    cut = [
        dataclasses.replace(row, ids=row.ids % 256, targets=row.targets.clamp(max=255))
        for row in data[:3]
    ]
    sentences = []
    for row in cut:
        starts = [*(row.positions == 0).nonzero()[:, 0].tolist(), len(row.ids)]
        sentences += [tuple(row.ids[a:b].tolist()) for a, b in zip(starts, starts[1:])]
    prefix = ActivationCache(model, 2, sentences)
    shape = ffn_memory.shape(model.weights, "ffn", (2, 3), (3, 2), 2)
    for batch in (cut[:2], cut[1:3]):
        found = []
        for knows in (None, prefix):
            rng = torch.Generator().manual_seed(0)
            sizes = ffn_memory.MemoryLayers.empty(model.weights, shape, 2).blocks.shape
            blocks = (0.1 * torch.randn(sizes, generator=rng)).double().requires_grad_()
            with ffn_memory.MemoryLayers(model.weights, shape, blocks).attached():
                value = completion_loss(model, batch, knows)
            value.backward()
            found.append((value.item(), blocks.grad))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
        torch.testing.assert_close(found[0][1], found[1][1])
    with pytest.raises(KeyError):
        prefix.states(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]))
    assert ActivationCache.fits(model, 2, 1000) and not ActivationCache.fits(model, 2, 10**9)
    assert not ActivationCache.fits(load("random:gemma3"), 2, 1000), "layers of two kinds"


def test_jobs_are_independent_and_make_one_bank(tiny, shape, data, tmp_path):
    """Subtrees trained in any order, by whoever, are the same bank; the model is left alone."""
    before = {name: value.clone() for name, value in tiny.weights.state_dict().items()}
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    tree, seen = cluster_tree.fit(vectors, 2, 2), []
    how = (tiny, tree, shape, data, QUICK)
    whole = train_bank(*how, tmp_path / "a", report=seen.append)
    assert train_bank(*how, tmp_path / "b", only=[1]) is None
    parts = train_bank(*how, tmp_path / "b", only=[0])
    for node in range(2):
        assert (whole / shards.name(node)).read_bytes() == (parts / shards.name(node)).read_bytes()
    assert train_bank(*how, tmp_path / "a", report=lambda figures: 1 / 0) == whole
    assert all(
        torch.equal(before[name], value) for name, value in tiny.weights.state_dict().items()
    )
    assert {figures["nodes"] for figures in seen} == {(0,), (1,)}
    bank = ParametricBank(whole, tiny)
    for row in data:
        wider = ffn_memory.MemoryLayers.empty(tiny.weights, shape, 1)
        wider.put(0, bank.fetch(row.path))
        with torch.no_grad(), wider.attached():
            fetched = completion_loss(tiny, [row])
        assert fetched < completion_loss(tiny, [row])


def test_a_killed_job_ends_as_an_undisturbed_one(tiny, shape, data, tmp_path):
    recipe = dataclasses.replace(QUICK, epochs=3)
    whole = BankTraining(tiny, shape, [0], data, recipe, tmp_path / "a")
    whole.run()
    first = BankTraining(tiny, shape, [0], data, recipe, tmp_path / "b")
    for _ in range(4):
        first.step()
    first.save()
    seen = []
    again = BankTraining(tiny, shape, [0], data, recipe, tmp_path / "b")
    again.run(seen.append)
    assert [figures["step"] for figures in seen] == list(range(5, whole.steps + 1))
    assert whole.files[0].read_bytes() == again.files[0].read_bytes()
    losses = [[figures["loss"] for figures in job.history] for job in (whole, again)]
    assert losses[0] == losses[1]
    assert not (again.folder / "state.safetensors").exists()


def test_a_float16_model_has_the_gradients_of_float32(tiny_folder, shape, data, tmp_path):
    half, steps = loaded(tiny_folder, "float16"), []
    for model in (
        half,
        dataclasses.replace(half, weights=twin(half.weights, torch.float32)),
    ):
        steps.append(BankTraining(model, shape, [0], data, QUICK, tmp_path).step())
    for name in ("loss", "gradient_norm"):
        assert steps[0][name] == pytest.approx(steps[1][name], rel=1e-6)


def test_together_with_the_anchor_both_learn_and_some_rows_read_the_generic_block(
    tiny, shape, data, tmp_path
):
    recipe = dataclasses.replace(QUICK, anchor_rate=1e-3, generic=0.5, epochs=3)
    job = BankTraining(tiny, shape, [0, 1], data, recipe, tmp_path)
    place = job.run()
    trained = load(str(place / "model"), dtype="float32")
    assert trained.weights_hash != tiny.weights_hash
    assert job.history[-1]["loss"] < job.history[0]["loss"]
    blocks = [*job.files, place / "generic.safetensors"]
    for file in blocks:
        written = shards.Shard(file).block(0, 0)[0]
        assert written[..., -tiny.weights.config.hidden_size :].any(), "down is no longer zero"


def test_without_nodes_the_model_alone_goes_on(tiny, shape, data, tmp_path):
    recipe = dataclasses.replace(QUICK, anchor_rate=1e-3)
    job = BankTraining(tiny, shape, [], data, recipe, tmp_path)
    assert len(job.data) == len(data)
    place = job.run()
    assert not [*place.glob("subtree*")]
    trained = load(str(place / "model"), dtype="float32")
    assert completion_loss(trained, data) < completion_loss(tiny, data)


def test_a_loss_that_is_no_number_is_one_sentence(tiny, shape, data, tmp_path):
    wild = dataclasses.replace(QUICK, learning_rate=1e30, epochs=4, clip=1e30)
    with pytest.raises(ValueError, match=r"The loss is \S+ at step \d+ of subtrees \(0,\); lower"):
        BankTraining(tiny, shape, [0], data, wild, tmp_path).run()


def test_the_bundled_model_learns_cities_by_heart_from_its_cluster(bundled, tmp_path):
    """Twelve cities, two clusters: fetched it knows them, with the other cluster's it does not."""
    from kit.evaluation.store import Store
    from kit.models import embedder

    known = facts.load(["cities"])[1500:1512]
    told = [facts.Sentence(form.format(fact.subject), f" {fact.answer}.", fact)
            for form in 2 * facts.STATEMENTS["cities"] for fact in known]  # fmt: skip
    minilm = embedder.load()
    vectors = minilm.embed([sentence.context for sentence in told])
    tree = cluster_tree.fit(vectors, 2, 1)
    shape = ffn_memory.shape(
        bundled.weights, "ffn", ffn_memory.choose_layers(4, 30, "late"), (32,), 2
    )
    data = pack_rows(
        bundled, [(s.context, s.completion) for s in told],
        [tuple(path) for path in tree.assign(vectors).tolist()], 64,
    )  # fmt: skip
    recipe = MemoryTrainConfig(batch=1, context=64, learning_rate=3e-3, epochs=2)
    sentences = [tuple(encode_sentence(bundled, s.context, s.completion)[0]) for s in told]
    prefix = ActivationCache(bundled, 26, sentences)
    name = minilm.fingerprint
    folder = train_bank(bundled, tree, shape, data, recipe, tmp_path, name, prefix=prefix)
    asked = facts.build_questions(known, {"cities": 12}, [10] * 12)
    offered = [facts.options(problem, facts.load(["cities"])) for problem in asked]
    store = Store(tmp_path / "store")
    correct = {}
    for arm, turn in (("fetched", 0), ("wrong", 1)):
        bank = ParametricBank(folder, bundled, minilm, turn=turn)
        correct[arm] = qa.multiple_choice(bundled, asked, offered, store, arm, bank)[
            "correct"
        ].mean()
    assert correct["fetched"] >= 0.75
    assert correct["fetched"] > correct["wrong"]
