"""Evictors and their training; above all that soft gates, made hard, are the evicting cache."""

import dataclasses
import json

import pytest
import torch

from kit import cli, hub, paths
from kit.data import problems
from kit.dms import distillation, evictor, gates
from kit.dms.train import EvictorTraining, own_traces, pack_documents
from kit.evaluation.store import Store
from kit.inference.decode import Request, decode, slots_attached
from kit.inference.kv_cache import SlotCache, layer_windows
from kit.inference.policies import DMS
from kit.schema import Sampling
from tests import rounding
from tests.toys import drawn, tokens, toy

SHAPES = ["llama", "qwen3", "gemma3"]  # GQA groups of 3, 8 and 1; gemma3 has sliding layers
SMALL = dict(context=48, window=4, ramp_steps=3, hold_steps=3)
LAPTOP = dataclasses.replace(evictor.LAPTOP, **SMALL)
PAPER = dataclasses.replace(evictor.PAPER, **SMALL, batch=2, fade_steps=4, learning_rate=1e-4)
KINDS = ["adapter", "neuron"]  # where their logits come from


@torch.no_grad()
def masked(model, made, ids: torch.Tensor):
    """Logits [B, T, V] and gates of whole sequences that are closed hard."""
    gate = gates.Gates(layer_windows(model.weights.config), made.window)
    with slots_attached(model), made.attached(model.weights):
        states = gates.hidden(model.weights, ids, gate)
    return model.weights.lm_head(states), gate


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_hard_gates_equal_the_evicting_cache(shape, window, dtype):
    """The test that matters: the masked whole sequence and the shrinking cache agree. In bfloat16,
    where a gate near 0 may fall on either side, both are as far from float64, all in all."""
    model, ids = toy(shape, dtype), tokens(3, 60)
    made = drawn(model, window=window)
    expected, gate = masked(model, made, ids)
    right, _ = masked(rounding.exact(model), made, ids)
    share = float(gate.eviction_rate().mean())
    assert 0.2 < share < 0.8, share
    cache, read = SlotCache(model.weights, 3, policy=DMS(made)), 20
    found = []
    with torch.no_grad(), slots_attached(model), made.attached(model.weights):
        positions = cache.prefill([[0], [1], [2]], [read] * 3)
        packed = ids[:, :read].reshape(1, -1)
        out = model.weights(
            input_ids=packed, position_ids=positions, use_cache=False, slots=cache
        ).logits.view(3, read, -1)
        for t in range(read, 60):
            positions = cache.step([0, 1, 2])
            step = model.weights(
                input_ids=ids[None, :, t], position_ids=positions, use_cache=False, slots=cache
            )
            found.append(step.logits[0])
            per_layer = [
                torch.tensor([[len(h) for h in layer] for layer in cache.live_positions(row)])
                for row in range(3)
            ]
            full = list(gate.closed)
            live = torch.stack([counts[full].float().mean() for counts in per_layer])
            if dtype == "float32":
                torch.testing.assert_close(live, gate.live_tokens()[:, t])
    logits = torch.cat([out, torch.stack(found, 1)], 1)
    if dtype == "float32":
        rounding.assert_close(logits, expected, right)
    off = [float((x.double() - right).square().mean().sqrt()) for x in (logits, expected)]
    assert off[0] <= rounding.TIMES * off[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_of_the_cache_are_those_of_the_mask(shape):
    model = toy(shape)
    made = drawn(model, window=5)
    requests = [
        Request(tuple(row[: 6 + 5 * i].tolist()), str(i)) for i, row in enumerate(tokens(4, 30))
    ]
    done = decode(model, requests, Sampling(max_new_tokens=24), batch_size=2, policy=DMS(made))
    for request, generation in zip(requests, done):
        ids = list(request.prompt_ids)
        for _ in range(24):
            ids.append(int(masked(model, made, torch.tensor([ids]))[0][0, -1].argmax()))
        assert list(generation.token_ids) == ids[len(request.prompt_ids) :]


def test_soft_gates_approach_hard_ones(dtype):
    """Without noise and as the temperature falls, training attention becomes the hard mask."""
    model, ids = toy("llama", dtype), tokens(2, 40)
    made = drawn(model, window=5)
    expected, hard = masked(model, made, ids)
    rounded = rounding.tolerance(expected, masked(rounding.exact(model), made, ids)[0])
    windows = layer_windows(model.weights.config)
    gaps = []
    for temperature in (1.0, 0.1, 1e-4):
        gate = gates.Gates(windows, made.window, temperature)
        with torch.no_grad(), slots_attached(model), made.attached(model.weights):
            states = gates.hidden(model.weights, ids, gate)
        gaps.append(float((model.weights.lm_head(states) - expected).abs().max().detach()))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] <= rounded, gaps
    assert torch.equal(gate.eviction_rate(), hard.eviction_rate())


def test_an_untrained_evictor_is_no_evictor(dtype):
    model, ids = toy("qwen3", dtype), tokens(2, 40)
    made = evictor.Evictor(model.weights, LAPTOP, model.weights_hash)
    found = gates.measure(model, made, ids)
    rounded = gates.measure(model, made, ids, teacher=rounding.exact(model))
    assert (found["kept_fraction"] == 1).all()
    assert found["kl"].abs().max() <= rounding.TIMES * rounded["kl"].abs().max()
    off = [(x["nats"] - x["full_nats"]).abs().max() for x in (found, rounded)]
    assert off[0] <= rounding.TIMES * off[1]
    plain = decode(model, [Request((1, 2, 3))], Sampling(max_new_tokens=20))
    quiet = decode(model, [Request((1, 2, 3))], Sampling(max_new_tokens=20), policy=DMS(made))
    assert plain[0].token_ids == quiet[0].token_ids
    assert plain[0].kv_reads_tokens == quiet[0].kv_reads_tokens


def test_only_full_attention_layers_evict():
    model = toy("gemma3")
    made = drawn(model, window=5)
    assert made.layers == (1, 3)
    assert set(masked(model, made, tokens(1, 20))[1].closed) == {1, 3}


def test_schedules_as_published():
    assert evictor.PAPER.steps_to(4) == 300 and evictor.PAPER.steps_to(8) == 700
    assert evictor.OFFICIAL.steps_to(8) == 238 and evictor.OFFICIAL.steps_to(16) == 510
    assert evictor.OFFICIAL.compression(510) == 16
    assert evictor.PAPER.compression(evictor.PAPER.fade_steps) == 1
    assert evictor.PAPER.compression(10_000) == 8


@pytest.mark.parametrize("kind", distillation.DIVERGENCES)
def test_divergence_and_its_gradients_equal_autograd(kind, monkeypatch):
    monkeypatch.setattr(distillation, "COLUMNS", 128)  # four casts of the head
    make = torch.Generator().manual_seed(0)
    student = torch.randn(300, 16, generator=make, requires_grad=True)
    teacher = torch.randn(300, 16, generator=make)
    head = torch.randn(400, 16, generator=make, requires_grad=True)
    other = torch.randn(400, 16, generator=make)
    found = distillation.divergence(student, teacher, head, other, kind)
    ours, theirs = (student @ head.T).log_softmax(-1), (teacher @ other.T).log_softmax(-1)
    p, q = (ours, theirs) if kind.startswith("student") else (theirs, ours)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(x, (student, head)) for x in (found, expected))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "shape, recipe, dtype",
    [
        ("gemma3", LAPTOP, "float32"),
        ("llama", PAPER, "float32"),
        ("qwen3", LAPTOP, "float32"),
        ("llama", LAPTOP, "bfloat16"),
        ("qwen3", PAPER, "bfloat16"),
    ],
)
def test_training_reaches_its_target_and_is_not_pushed_further(
    shape, recipe, dtype, tmp_path, monkeypatch
):
    model, rates, rate = toy(shape, dtype), [], gates.Gates.eviction_rate
    monkeypatch.setattr(  # of each sequence of each step
        gates.Gates, "eviction_rate", lambda *given: rates.append(rate(*given)) or rates[-1]
    )
    before = {k: v.clone() for k, v in model.weights.state_dict().items()}
    quick = dataclasses.replace(recipe, hinge_weight=50.0, learning_rate=5e-3, compression_x=3)
    quick = dataclasses.replace(quick, hold_steps=60)
    training = EvictorTraining(model, tokens(6, 48), quick, tmp_path)
    training.run()
    last = training.history[-1]
    assert last["target"] == pytest.approx(2 / 3) and last["closed"] > 0.5
    for figures, closed in zip(training.history, map(torch.Tensor.detach, rates), strict=True):
        short = [max(0, figures["target"] - share) for share in closed.tolist()]
        assert figures["hinge"] == pytest.approx(sum(short) / len(short), abs=1e-6)
        assert figures["closed"] == pytest.approx(float(closed.mean()), abs=1e-6)
    # The teacher is untouched, whatever is trained.
    assert all(torch.equal(v, before[k]) for k, v in model.weights.state_dict().items())


@pytest.mark.parametrize("recipe", [LAPTOP, PAPER], ids=KINDS)
def test_steps_that_bfloat16_does_not_hold_are_kept(recipe, tmp_path):
    """Weights of 1 and steps of 1e-5: each alone is lost in eight bits."""
    quick = dataclasses.replace(recipe, fade_steps=1, learning_rate=1e-5)
    training = EvictorTraining(toy("llama", "bfloat16"), tokens(4, 48), quick, tmp_path)
    assert {value.dtype for value in training.parameters.values()} == {torch.float32}
    before = {name: value.detach().clone() for name, value in training.parameters.items()}
    for _ in range(3):
        training.step()
    moved = [
        name for name, value in training.parameters.items() if not torch.equal(value, before[name])
    ]
    norms = [name for name in before if "norm" in name]
    assert norms and set(norms) <= set(moved), "all of which are 1"


OFFICIAL = dataclasses.replace(evictor.OFFICIAL, window=4, batch=4, context=48)
AS_PUBLISHED = dataclasses.replace(evictor.PAPER, window=4, batch=4, context=48, fade_steps=1)


@pytest.mark.parametrize(
    "shape, recipe, dtype, limit",
    [
        ("llama", OFFICIAL, "float32", 1e-4),
        ("qwen3", AS_PUBLISHED, "float32", 1e-4),
        ("qwen3", OFFICIAL, "bfloat16", 0.1),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_and_layers_computed_again_change_no_gradient(
    shape, recipe, dtype, limit, checkpointing, tmp_path, monkeypatch
):
    """Two steps of each recipe, in sequences that are padded to different lengths."""
    monkeypatch.setattr(EvictorTraining, "_scored", lambda self, ids: ids != 7)
    data = tokens(8, 48)
    for row, length in enumerate((48, 30, 20, 41, 9, 48, 33, 12)):
        data[row, length:] = 7
    found = []
    for size, again in ((None, False), (3, checkpointing)):
        folder = tmp_path / f"{size}{again}"
        training = EvictorTraining(toy(shape, dtype), data, recipe, folder, 0, size, again)
        with torch.no_grad():
            for linear in getattr(training.evictor, "linear", []):
                torch.nn.init.normal_(linear.weight, std=1e-3, generator=torch.manual_seed(1))
                linear.bias.fill_(0.06)  # so that many gates are between open and closed
        gradients = []
        for _ in range(2):
            figures = training.step()
            gradients += [p.grad.flatten().clone() for p in training.parameters.values()]
        assert 0 < figures["closed"] and figures["kl"] > 0
        found.append((torch.cat(gradients).double(), torch.tensor([*figures.values()][:-1])))
        assert not training.student.weights.training
    (one, figures), (parts, same) = found
    assert one.norm() > 0.01 and (parts - one).norm() <= limit * one.norm()
    torch.testing.assert_close(same, figures, rtol=10 * limit, atol=limit)


def test_each_sequence_must_meet_the_target_and_padding_counts_for_none():
    gate = gates.Gates([None], 4)
    closed = torch.zeros(2, 3, 6)
    closed[0, :, :3], closed[1, 0, :] = 1, 1
    gate.closed = {0: closed, 1: torch.zeros(2, 3, 6)}
    torch.testing.assert_close(gate.eviction_rate(), torch.tensor([3 / 5, 1 / 3]) / 2)
    found = gate.eviction_rate(torch.tensor([4, 6]))
    torch.testing.assert_close(found, torch.tensor([1, 1 / 3]) / 2)


def test_gradients_of_a_float16_model_are_float32(tmp_path):
    """A step's mean over a thousand tokens would lie below the least number of float16."""
    training = EvictorTraining(toy("llama", "float16"), tokens(4, 48), LAPTOP, tmp_path)
    assert training.model.dtype == torch.float16 and training.student.dtype == torch.float32
    training.step()
    assert all(linear.weight.grad.all() for linear in training.evictor.linear)


@pytest.mark.parametrize("recipe, dtype", [(LAPTOP, "float32"), (PAPER, "bfloat16")], ids=KINDS)
def test_a_killed_training_ends_like_an_undisturbed_one(recipe, dtype, tmp_path):
    data = tokens(5, 48)
    whole = EvictorTraining(toy("llama", dtype), data, recipe, tmp_path / "whole", seed=3)
    files = whole.run((2,))
    for stop in (3, 7, 9):
        part = EvictorTraining(toy("llama", dtype), data, recipe, tmp_path / "parts", seed=3)
        while len(part.history) < stop:
            part.step()
        part.save()
        part.step()  # lost: done after the last save
    again = EvictorTraining(toy("llama", dtype), data, recipe, tmp_path / "parts", seed=3).run((2,))
    for x in (recipe.compression_x,):
        assert again[x].read_bytes() == files[x].read_bytes()
    other = EvictorTraining(toy("llama", dtype), data, recipe, tmp_path / "parts", seed=4)
    assert other.history == [], "another seed is another training"


@pytest.mark.parametrize("recipe, dtype", [(LAPTOP, "float32"), (PAPER, "bfloat16")], ids=KINDS)
def test_a_saved_evictor_decides_as_before(recipe, dtype, tmp_path):
    model, ids = toy("qwen3", dtype), tokens(2, 48)
    quick = dataclasses.replace(recipe, hinge_weight=50.0, learning_rate=5e-3, hold_steps=20)
    training = EvictorTraining(model, tokens(4, 48, 1), quick, tmp_path)
    file = training.run(held_out=ids)[8]
    other = toy("qwen3", dtype)
    made = evictor.load(file, other)
    found = gates.measure(other, made, ids, teacher=model).mean()
    assert made.card["kl"] == pytest.approx(found["kl"], rel=1e-4) and found["kl"] > 0
    assert made.card["compression_x"] == pytest.approx(1 / found["kept_fraction"])
    assert made.name == "dms-8x"
    assert evictor.read_card(file)["recipe"]["name"] == recipe.name
    training.evictor.card = made.card
    assert made.fingerprint == training.evictor.fingerprint


def test_a_borrowed_neuron_is_gone_from_attention(dtype):
    """Whatever the neuron says, with fade 0 nothing but the gate changes."""
    model, ids = toy("llama", dtype), tokens(1, 30)
    made = evictor.Evictor(model.weights, dataclasses.replace(PAPER, window=29), "x")
    first = masked(model, made, ids)[0]  # no key is ever older than the window
    with torch.no_grad():
        for layer in model.weights.base_model.layers:
            size, group = layer.self_attn.head_dim, 3
            rows = torch.arange(2) * group * size + size - 1
            layer.self_attn.q_proj.weight[rows] = 7.0
    torch.testing.assert_close(masked(model, made, ids)[0], first)


def test_evictors_load_only_onto_their_base(tmp_path):
    model, file = toy("llama"), tmp_path / "8x.safetensors"
    evictor.Evictor(model.weights, LAPTOP, model.weights_hash).save(file)
    with pytest.raises(ValueError, match="was trained for weights .* random:qwen3 has"):
        evictor.load(file, toy("qwen3"))
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is no evictor of the kit"):
        evictor.load(file, model)


@pytest.mark.parametrize("bad", [dict(window=0), dict(compression_x=0.5)])
def test_impossible_recipes_are_refused(bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        evictor.Evictor(toy("llama").weights, dataclasses.replace(LAPTOP, **bad), "x")


def test_training_text_is_the_models_own_and_never_the_test_split(tiny, tmp_path):
    model, store = tiny, Store(tmp_path)
    train = problems.load("laptop", "train", n=12)
    chats = own_traces(model, train, store, max_new_tokens=8)
    first = store.table().set_index("problem_id").loc[train.problems[0].id]
    assert train.problems[0].question in chats[0] and first["text"].strip() in chats[0]
    ids = pack_documents(model, chats, 100, seed=1)
    again = pack_documents(model, own_traces(model, train, store, max_new_tokens=8), 100, seed=1)
    assert len(store.keys()) == 12 and torch.equal(ids, again)
    total = sum(len(model.tokenizer(chat)["input_ids"]) for chat in chats)
    assert ids.shape == (total // 100, 100)
    with pytest.raises(ValueError, match="test cannot be training text"):
        own_traces(model, problems.load("laptop", "test", n=2), store)
    with pytest.raises(ValueError, match="less than one sequence"):
        pack_documents(model, chats[:1], 5000)
    with pytest.raises(ValueError, match="fewer than a batch"):
        EvictorTraining(model, ids[:1], LAPTOP, tmp_path)


@pytest.mark.parametrize(
    "arguments, said",
    [(["--model", "nowhere"], "No model at 'nowhere'"), (["--problems", "none"], "no problem set")],
)
def test_the_command_says_in_one_sentence_what_is_wrong(arguments, said, tmp_path, capsys):
    assert cli.main(["train-evictor", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.startswith(said)


SHIPPED = sorted((paths.DATA / "evictors").glob("*.safetensors"))


def test_shipped_evictors_stand_beside_their_hashes():
    readme = (paths.DATA / "evictors" / "README.md").read_text()
    assert len(SHIPPED) >= 3
    for file in SHIPPED:
        assert f"{hub.hash_files([file])}  {file.name}" in readme and file.stat().st_size < 1e6


def test_a_shipped_evictor_beats_a_window_of_the_same_size(bundled):
    """On a text it has not seen, hard eviction at about 3x against the newest tokens and sinks."""
    text = "Question: Tom has 12 apples and buys 7 more. Then he eats 4. How many are left? "
    text += "Answer: He has 12 + 7 = 19 apples, and 19 - 4 = 15 are left. " * 2
    ids = torch.tensor(bundled.tokenizer(text * 3)["input_ids"][:150])[None]
    made = evictor.load(paths.DATA / "evictors" / "smollm2-135m-seed0-4x.safetensors", bundled)
    found = gates.measure(bundled, made, ids).iloc[0]
    assert found["kept_fraction"] < 0.6
    always = evictor.Evictor(bundled.weights, LAPTOP, bundled.weights_hash)
    window = int(found["live_tokens"]) + 1
    always.window = window
    for linear in always.linear:
        torch.nn.init.constant_(linear.bias, 10.0)  # every token goes when the window has passed
    rival = gates.measure(bundled, always, ids).iloc[0]
    assert found["kl"] < rival["kl"] / 2


def test_one_step_on_the_real_model(bundled, tmp_path):
    """Gradients reach every layer's evictor, and none of them is cut."""
    recipe = dataclasses.replace(LAPTOP, batch=1, context=40)
    text = "What is 12 + 7? Let me think step by step. 12 + 7 = 19. " * 10
    ids = pack_documents(bundled, [text], 40)
    training = EvictorTraining(bundled, ids, recipe, tmp_path)
    figures = training.step()
    training.step()
    assert abs(figures["kl"]) < 0.05 and figures["gradient_norm"] > 0
    moved = [float(linear.weight.detach().abs().sum()) for linear in training.evictor.linear]
    assert len(moved) == 30 and min(moved) > 0
    training.save()
    assert json.loads(json.dumps(training.history))[0]["step"] == 1
