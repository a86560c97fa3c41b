"""The decode loop against transformers' generate and samplers, and the costs it reports."""

import dataclasses
import random

import pytest
import torch
from transformers import (
    MistralConfig,
    Phi3Config,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kit.data import prompts
from kit.inference import decode as decode_module
from kit.inference import policies, prefix_sharing, sampling
from kit.inference.decode import Request, decode, tokenize
from kit.inference.kv_cache import SlotCache, layer_windows
from kit.inference.prefix_sharing import padded
from kit.inference.sampling import HEAD, seeded_uniforms
from kit.models.load import RANDOM, Model, load
from kit.schema import Generation, Problem, Sampling
from tests.rounding import assert_same_greedy

SHAPES = sorted(RANDOM)  # query heads per KV head: gemma3 1, llama 3, qwen3 8
HEADS = {"llama": 2, "qwen3": 1, "gemma3": 4}  # of keys and values
WINDOW = 24  # of gemma3's sliding layers: prompts below are shorter and longer
LENGTHS = (3, 61, 24, 1, 35, 10, 23)
NEW = 20


def request(length: int, seed: int, sample: int = 0) -> Request:
    rng = random.Random(f"{length} {seed}")
    ids = tuple(rng.randrange(3, 256) for _ in range(length))
    return Request(ids, f"problem {length} {seed}", sample)


def generate(model: Model, ids: tuple[int, ...], new: int) -> list[int]:
    """The oracle: transformers on one unpadded prompt, greedy. New tokens, stop token included."""
    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    out = model.weights.generate(
        prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def untimed(generations: list[Generation]) -> list[Generation]:
    return [dataclasses.replace(g, seconds=0.0) for g in generations]


@pytest.fixture(scope="module")
def families() -> dict[str, Model]:
    return {shape: load(f"random:{shape}", dtype="float32") for shape in SHAPES}


@pytest.fixture(scope="module")
def greedy(families) -> dict[str, list[list[int]]]:
    """What transformers says to a prompt of each length, per family."""
    return {
        shape: [generate(model, request(n, i).prompt_ids, NEW) for i, n in enumerate(LENGTHS)]
        for shape, model in families.items()
    }


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_transformers(families, greedy, shape, batch_size):
    requests = [request(n, i) for i, n in enumerate(LENGTHS)]
    out = decode(families[shape], requests, Sampling(max_new_tokens=NEW), batch_size)
    assert [list(g.token_ids) for g in out] == greedy[shape]
    assert all(len(set(tokens)) > 5 for tokens in greedy[shape]), "not one token for ever"
    assert [g.prompt_tokens for g in out] == list(LENGTHS)
    assert {(g.new_tokens, g.finish) for g in out} == {(NEW, "length")}
    assert families[shape].weights.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("limit", [8, 72])
def test_prompts_read_in_small_packs_say_the_same(families, greedy, limit, monkeypatch):
    monkeypatch.setitem(decode_module.PACK_ROWS, "cpu", limit)
    requests = [request(n, i) for i, n in enumerate(LENGTHS)]
    read = []
    forward = decode_module._forward

    def watched(model, cache, ids, *rest):
        read.append(len(ids))
        return forward(model, cache, ids, *rest)

    monkeypatch.setattr(decode_module, "_forward", watched)
    out = decode(families["gemma3"], requests, Sampling(max_new_tokens=NEW), 16)
    assert [list(g.token_ids) for g in out] == greedy["gemma3"]
    assert max(read) <= max(limit, *map(padded, LENGTHS))
    assert sum(read[: len(LENGTHS)]) >= sum(LENGTHS)


def alike() -> list[Request]:
    """Two groups of prompts that begin alike, and one that does not; two samples of some."""
    made = []
    for seed, common in ((1, 60), (2, 41)):
        start = request(common, seed).prompt_ids
        for i, length in enumerate((5, 1, 17, 9)):
            ids = start + request(length, 10 * seed + i).prompt_ids
            made += [Request(ids, f"{seed} {i}", sample) for sample in range(1 + i % 2)]
    return [*made, request(50, 3)]


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_a_shared_beginning_is_read_once_and_changes_nothing(families, shape, monkeypatch):
    requests, model, read = alike(), families[shape], []
    oracle = {ids: generate(model, ids, NEW) for ids in {r.prompt_ids for r in requests}}
    forward = decode_module._forward

    def watched(model, cache, ids, *rest):
        read.append(len(ids))
        return forward(model, cache, ids, *rest)

    monkeypatch.setattr(decode_module, "_forward", watched)
    for batch_size in (1, 3, 16):
        read.clear()
        out = untimed(decode(model, requests, Sampling(max_new_tokens=NEW), batch_size))
        tokens = sum(read)
        assert [list(g.token_ids) for g in out] == [oracle[r.prompt_ids] for r in requests]
        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(prefix_sharing, "PREFIX_TOKENS", 10**6)
            alone = untimed(decode(model, requests, Sampling(max_new_tokens=NEW), batch_size))
        assert alone == out, "costs and tokens are the same"
        each = "each beginning was read once instead of 4 times, but for less than 8 tokens"
        assert sum(read) - tokens == 3 * 56 + 3 * 40, each


def test_policies_that_drop_tokens_share_no_beginnings(families):
    made = {}
    for policy in (policies.Full(), policies.Window(kept_tokens=20), policies.H2O(kept_tokens=20)):
        cache = SlotCache(families["llama"].weights, 2, policy)
        made[policy.name] = cache.shares_prefixes
    assert made == {"full": True, "window 20": False, "h2o 20": False}
    assert not SlotCache(families["gemma3"].weights, 2).shares_prefixes


def test_prefixes_are_what_prompts_share():
    prompts = [r.prompt_ids for r in alike()]
    found = prefix_sharing.prefixes(prompts)
    assert sorted(found.values()) == [0, *[40] * 4, *[56] * 4], "in multiples of 8"
    rng = random.Random(0)
    for _ in range(200):
        prompts = [tuple(rng.choices((1, 2), [9, 1], k=rng.randint(1, 90))) for _ in range(30)]
        found = prefix_sharing.prefixes(prompts)
        for ids, length in found.items():
            assert length < len(ids) and (length == 0 or length >= prefix_sharing.PREFIX_TOKENS)
            others = [o for o in found if o != ids and o[:length] == ids[:length]]
            assert length == 0 or any(found[o] == length for o in others)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stop_token_ends_a_sequence_and_its_place_is_refilled(
    families, greedy, shape, monkeypatch
):
    model = families[shape]
    stops = [greedy[shape][1][NEW // 2], greedy[shape][4][3]]
    monkeypatch.setattr(model.weights.generation_config, "eos_token_id", stops)
    requests = [request(n, i) for i, n in enumerate(LENGTHS)]
    out = decode(model, requests, Sampling(max_new_tokens=NEW), batch_size=3)
    for one, every in zip(out, greedy[shape]):
        at = min((every.index(stop) for stop in stops if stop in every), default=None)
        said = every if at is None else every[:at]
        assert list(one.token_ids) == said
        assert one.finish == ("length" if at is None else "stop")
        assert one.new_tokens == len(said) + (at is not None)
    assert {g.finish for g in out} == {"stop", "length"}
    assert list(out[1].token_ids) == generate(model, requests[1].prompt_ids, NEW)[:-1]


def test_a_stop_token_as_the_very_last_or_first_token_is_a_stop(families, greedy, monkeypatch):
    model, every = families["llama"], greedy["llama"][0]
    assert every.index(every[4]) == 4
    monkeypatch.setattr(model.weights.generation_config, "eos_token_id", every[4])
    (last,) = decode(model, [request(LENGTHS[0], 0)], Sampling(max_new_tokens=5))
    assert (last.finish, last.new_tokens, list(last.token_ids)) == ("stop", 5, every[:4])
    monkeypatch.setattr(model.weights.generation_config, "eos_token_id", every[0])
    (first,) = decode(model, [request(LENGTHS[0], 0)], Sampling(max_new_tokens=5))
    assert (first.finish, first.new_tokens, first.token_ids, first.text) == ("stop", 1, (), "")


def test_one_new_token_is_the_first_of_many(families, greedy):
    requests = [request(n, i) for i, n in enumerate(LENGTHS)]
    out = decode(families["gemma3"], requests, Sampling(max_new_tokens=1), batch_size=4)
    assert [list(g.token_ids) for g in out] == [tokens[:1] for tokens in greedy["gemma3"]]


def test_many_samples_of_one_prompt_are_each_what_they_are_alone(families, greedy):
    """A prompt is read once for all of its samples, also for those that wait for a place."""
    for shape in SHAPES:
        requests = [request(n, i, s) for s in range(4) for i, n in enumerate(LENGTHS[:3])]
        out = decode(families[shape], requests, Sampling(max_new_tokens=NEW), batch_size=4)
        assert [list(g.token_ids) for g in out] == greedy[shape][:3] * 4
        assert {g.prompt_tokens for g in out} == set(LENGTHS[:3])
        assert len({(g.prompt_tokens, g.kv_reads_tokens, g.kv_peak_bytes) for g in out}) == 3


def test_a_prompt_is_read_once_for_all_of_its_samples(families, monkeypatch):
    read, prefill = [], SlotCache.prefill
    monkeypatch.setattr(
        SlotCache, "prefill", lambda self, *what: read.extend(what[1]) or prefill(self, *what)
    )
    requests = [request(n, i, s) for s in range(5) for i, n in enumerate(LENGTHS)]
    decode(families["llama"], requests, Sampling(max_new_tokens=3), batch_size=4)
    assert sorted(read) == sorted(LENGTHS)


CHATS = (
    "What is the capital of France? Answer with one word.",
    "Compute 12 + 30.",
    "Tom has 3 apples and buys 4 more, then gives 2 to Ann. How many apples does Tom have now?",
)


@pytest.fixture(scope="module")
def chats(bundled) -> list[tuple[Request, Generation]]:
    problems = [Problem(str(i), text, "", "chat", 0, "test") for i, text in enumerate(CHATS)]
    asked = [
        Request(tokenize(bundled, p), p.problem.id) for p in prompts.build(prompts.plain, problems)
    ]
    return list(zip(asked, decode(bundled, asked, Sampling(max_new_tokens=12), batch_size=3)))


def test_the_bundled_model_says_what_it_says_in_transformers(bundled, chats):
    for one, out in chats:
        expected = generate(bundled, one.prompt_ids, 12)
        stopped = expected[-1] in bundled.stop_ids
        assert list(out.token_ids) == (expected[:-1] if stopped else expected)
        assert (out.finish, out.new_tokens) == ("stop" if stopped else "length", len(expected))
        assert out.text == bundled.tokenizer.decode(expected, skip_special_tokens=True)
    assert {out.finish for _, out in chats} == {"stop", "length"}
    assert "Paris" in chats[0][1].text and "<|im_end|>" not in chats[0][1].text


def test_the_prompt_is_the_chat_template_up_to_the_answer(bundled, chats):
    said = bundled.tokenizer.decode(chats[1][0].prompt_ids)
    assert said.endswith(f"<|im_start|>user\n{CHATS[1]}<|im_end|>\n<|im_start|>assistant\n")


def test_text_leaves_out_a_stop_token_in_the_middle(bundled, chats, monkeypatch):
    one, whole = chats[2]
    stop = whole.token_ids[8]
    at = whole.token_ids.index(stop)
    monkeypatch.setattr(bundled.weights.generation_config, "eos_token_id", [2, stop])
    (out,) = decode(bundled, [one], Sampling(max_new_tokens=12))
    assert (out.finish, out.new_tokens, out.token_ids) == ("stop", at + 1, whole.token_ids[:at])
    assert out.text == bundled.tokenizer.decode(whole.token_ids[:at])
    assert whole.text.startswith(out.text) and len(out.text) < len(whole.text)


@pytest.mark.parametrize("shape", ["llama", "gemma3"])
def test_a_sample_depends_on_its_request_and_not_on_order_or_batch(families, shape):
    model = families[shape]
    requests = [request(n, i, s) for i, n in enumerate(LENGTHS) for s in range(2)]
    sampling = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.95, top_k=50, seed=3)
    out = untimed(decode(model, requests, sampling, batch_size=4))
    for batch_size, seed in ((4, 1), (7, 2)):
        order = random.Random(seed).sample(range(len(requests)), len(requests))
        again = untimed(decode(model, [requests[i] for i in order], sampling, batch_size))
        assert again == [out[i] for i in order]
    assert all(a.token_ids != b.token_ids for a, b in zip(out[::2], out[1::2])), "samples differ"
    other = decode(model, requests[:4], dataclasses.replace(sampling, seed=4), batch_size=4)
    assert all(a.token_ids != b.token_ids for a, b in zip(out, other)), "run seeds differ"


def test_uniforms_derive_from_problem_sample_and_seed_alone():
    base, same = seeded_uniforms("p", 0, 0, 4000), seeded_uniforms("p", 0, 0, 10)
    assert (base[:10] == same).all()
    assert 0 <= base.min() and base.max() < 1 and abs(base.mean() - 0.5) < 0.02
    for other in (("q", 0, 0), ("p", 1, 0), ("p", 0, 1)):
        assert not (seeded_uniforms(*other, 10) == same).any()


def spread(kind: str) -> torch.Tensor:
    """Logits [V] of one kind, without ties at the cuts."""
    noise = torch.randn(2100, generator=torch.Generator().manual_seed(7))
    if kind == "one token":
        return torch.arange(2100) * -1e-4 + torch.nn.functional.one_hot(torch.tensor(99), 2100) * 60
    return {"flat": noise * 0.05, "plain": noise * 2, "peaked": noise[:300] * 6}[kind]


def oracle(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities of transformers' own processors, in the order of its generate."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None].double())
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1)[0]


def sample_tokens(logits, how: Sampling, uniform) -> torch.Tensor:
    """The tokens alone; nothing is told beside them."""
    return torch.tensor(sampling.sample_tokens(logits, how, uniform, uniform[:0])[0])


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("plain", dict(temperature=1.0)),
        ("plain", dict(temperature=0.6)),
        ("flat", dict(temperature=1.5)),
        ("plain", dict(temperature=1.0, top_k=1)),
        ("plain", dict(temperature=0.7, top_k=20)),
        ("flat", dict(temperature=1.0, top_k=HEAD)),
        ("flat", dict(temperature=1.0, top_k=HEAD + 1)),
        ("plain", dict(temperature=1.3, top_k=700)),
        ("peaked", dict(temperature=1.0, top_k=5000)),
        ("peaked", dict(temperature=1.0, top_p=0.9)),
        ("plain", dict(temperature=2.0, top_p=0.97)),
        ("flat", dict(temperature=1.0, top_p=0.95)),
        ("plain", dict(temperature=1.0, top_p=1e-6)),
        ("plain", dict(temperature=0.8, top_k=50, top_p=0.8)),
        ("flat", dict(temperature=1.0, top_k=600, top_p=0.9)),
        ("flat", dict(temperature=1.0, top_k=600, top_p=0.2)),
        ("one token", dict(temperature=1.0)),
        ("one token", dict(temperature=0.5, top_k=40, top_p=0.9)),
        ("one token", dict(temperature=30.0, top_p=0.9)),
    ],
)
def test_draw_has_the_frequencies_of_transformers_processors(kind, settings):
    logits, sampling, grid = spread(kind), Sampling(**settings), 800
    # Each token owns one interval of [0, 1), so a grid of uniforms counts it to within one.
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    drawn = sample_tokens(logits.float().expand(grid, -1), sampling, uniform)
    counts = torch.bincount(drawn, minlength=len(logits))
    expected = oracle(logits.float(), sampling)
    assert ((counts - expected * grid).abs() <= 1 + 1e-6).all()
    assert (expected[drawn] > 0).all(), "a token that is cut off is never drawn"


def test_rows_of_every_kind_are_drawn_in_one_call_as_alone():
    sampling = Sampling(temperature=1.0, top_p=0.95)
    rows = torch.stack([spread("plain"), spread("flat"), spread("one token")]).float().repeat(50, 1)
    uniform = torch.rand(150, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = sample_tokens(rows, sampling, uniform)
    alone = [sample_tokens(row[None], sampling, u[None]).item() for row, u in zip(rows, uniform)]
    assert together.tolist() == alone
    assert len(set(alone)) > 50


def test_the_ends_of_the_unit_interval_are_drawn():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for settings in (dict(), dict(top_p=0.9), dict(top_k=30), dict(top_k=600, top_p=0.9)):
        sampling = Sampling(temperature=1.0, **settings)
        logits = spread("flat").float()
        first, last = sample_tokens(logits.expand(2, -1), sampling, ends).tolist()
        expected = oracle(logits, sampling)
        assert first == expected.argmax()
        kept = torch.where(expected > 0, expected, torch.inf)
        # The least likely token that is kept; the last few of a wide cut are rounding apart.
        assert expected[last] <= kept.sort().values[1]


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.stack([spread("plain"), spread("flat")])
    for u in (0.0, 0.5, 0.999):
        uniform = torch.full((2,), u, dtype=torch.float64)
        assert sample_tokens(logits, Sampling(top_k=5, top_p=0.5), uniform).tolist() == [
            logits[0].argmax(),
            logits[1].argmax(),
        ]


def test_kv_accounting_of_a_case_counted_by_hand(families):
    (full,) = decode(families["llama"], [request(5, 0)], Sampling(max_new_tokens=4))
    assert full.kv_reads_tokens == 5 + 6 + 7 + 8
    assert full.kv_peak_tokens == 8
    assert full.kv_peak_bytes == 8 * 2 * 4 * 2 * 16 * 4  # K and V, 4 layers, 2 heads of 16 floats
    (mixed,) = decode(families["gemma3"], [request(23, 0)], Sampling(max_new_tokens=4))
    # Full layers see 23, 24, 25, 26; sliding ones 23, 24, 24, 24; there are two of each.
    assert mixed.kv_reads_tokens == (98 + 95) / 2
    assert mixed.kv_peak_tokens == (26 + 24) / 2
    assert mixed.kv_peak_bytes == (26 + 24) * 2 * 2 * 4 * 16 * 4


@pytest.mark.parametrize("shape", SHAPES)
def test_kv_accounting_equals_a_naive_recount(families, greedy, shape, monkeypatch):
    model = families[shape]
    monkeypatch.setattr(model.weights.generation_config, "eos_token_id", greedy[shape][1][NEW // 2])
    requests = [request(n, i) for i, n in enumerate(LENGTHS)]
    out = decode(model, requests, Sampling(max_new_tokens=NEW), batch_size=3)
    for one in out:
        p, n = one.prompt_tokens, one.new_tokens
        reads = n * p + n * (n - 1) / 2  # the first new token reads the prompt
        peak = p + n - 1  # the last new token is never stored
        if shape == "gemma3":  # every second layer sees the window only
            reads = (reads + sum(min(WINDOW, p + step) for step in range(n))) / 2
            peak = (peak + min(WINDOW, peak)) / 2
        assert (one.kv_reads_tokens, one.kv_peak_tokens) == (reads, peak)
        assert one.kv_peak_bytes == peak * 2 * 4 * HEADS[shape] * 16 * 4
    assert len({g.new_tokens for g in out}) > 1


def test_what_cannot_be_decoded_is_one_sentence(families):
    model = families["llama"]  # reads 1024 tokens
    fits, over = Request((5,) * 1020, "fits"), Request((5,) * 1021, "algebra/7")
    decode(model, [fits], Sampling(max_new_tokens=4))
    with pytest.raises(ValueError, match=r"'algebra/7' needs 1025 tokens .*reads 1024; lower") as e:
        decode(model, [fits, over], Sampling(max_new_tokens=4))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="'empty' has an empty prompt"):
        decode(model, [Request((), "empty")], Sampling())
    with pytest.raises(ValueError, match="max_new_tokens is 0; ask for at least one"):
        decode(model, [fits], Sampling(max_new_tokens=0))


def test_no_requests_no_generations(families):
    assert decode(families["llama"], [], Sampling()) == []


def test_an_interrupt_leaves_the_model_as_it_was(families, monkeypatch):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode_module, "_finish", interrupt)
    requests = [request(n, i) for i, n in enumerate(LENGTHS)]
    with pytest.raises(KeyboardInterrupt):
        decode(families["llama"], requests, Sampling(max_new_tokens=2), 2)
    monkeypatch.undo()
    assert families["llama"].weights.config._attn_implementation == "sdpa"


def test_a_model_whose_attention_cannot_be_replaced_is_refused(families, monkeypatch):
    weights = families["llama"].weights
    monkeypatch.setattr(type(weights), "_can_set_attn_implementation", classmethod(lambda _: False))
    with pytest.raises(ValueError, match="LlamaForCausalLM has an attention of its own"):
        decode(families["llama"], [request(3, 0)], Sampling(max_new_tokens=2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_parts_from_transformers_only_where_rounding_decides(shape, dtype):
    """Masked blocks, windows, long and short prompts together."""
    model = load(f"random:{shape}", dtype=dtype)
    requests = [request(n, i) for i, n in enumerate(LENGTHS)]
    out = decode(model, requests, Sampling(max_new_tokens=NEW), batch_size=4)
    for one, asked in zip(out, requests):
        theirs = generate(model, asked.prompt_ids, NEW)
        assert_same_greedy(model, asked.prompt_ids, one.token_ids, theirs)
        assert one.kv_peak_bytes == one.kv_peak_tokens * 2 * 4 * HEADS[shape] * 16 * 2


def test_an_autocast_around_it_changes_nothing(dtype):
    model, asked = load("random:llama", dtype=dtype), [request(9, 0), request(4, 1)]
    out = untimed(decode(model, asked, Sampling(max_new_tokens=6)))
    with torch.autocast("cpu", torch.bfloat16):
        assert untimed(decode(model, asked, Sampling(max_new_tokens=6))) == out


@pytest.mark.parametrize("kind", [MistralConfig, Phi3Config])
def test_every_layer_slides_where_a_config_names_a_window_and_no_kinds(kind, tmp_path):
    config = kind(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, sliding_window=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = load(f"random:{tmp_path}", dtype="float32")
    assert layer_windows(model.weights.config) == [16, 16]
    asked = [request(n, 0) for n in (9, 40, 61)]
    done = decode(model, asked, Sampling(NEW))
    for generation, one in zip(done, asked, strict=True):
        said = [*generation.token_ids, *([generation.stop_id] if generation.stop_id else [])]
        assert said == generate(model, one.prompt_ids, NEW)
