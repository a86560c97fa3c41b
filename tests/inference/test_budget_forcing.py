"""Budget forcing: a long generation, cut at a budget, equals a short one."""

import dataclasses
import itertools

import pytest

from kit.dms import evictor
from kit.inference import energy, policies
from kit.inference.budget_forcing import BudgetForcing
from kit.inference.decode import Request, decode
from kit.inference.kv_quantization import Quantized
from kit.models.load import RANDOM, load
from kit.schema import Sampling, digest
from tests.rounding import assert_same_greedy

ASK, CUTS, NEW = (7, 8, 9), (4, 9, 16), 16
FORCING = BudgetForcing(CUTS, ASK, 5)
REQUESTS = [Request(tuple(range(3 + i, 20 + 2 * i)), f"p{i}", i % 2) for i in range(5)]


def model(family: str, stops=None, dtype: str = "float64"):
    found = load(f"random:{family}", dtype=dtype)
    found.weights.generation_config.eos_token_id = stops
    return found


def untimed(generation):
    return generation and dataclasses.replace(generation, seconds=0.0, forced=())


@pytest.mark.parametrize("family", RANDOM)
def test_an_answer_is_what_the_text_so_far_and_the_question_for_it_give(family):
    tiny, sampling = model(family), Sampling(NEW)
    found = decode(tiny, REQUESTS, sampling, 2, forcing=FORCING)
    for request, whole, plain in zip(REQUESTS, found, decode(tiny, REQUESTS, sampling, 2)):
        assert untimed(whole) == untimed(plain)
        for cut, forced in zip(CUTS, whole.forced, strict=True):
            ids = (*whole.token_ids[:cut], *ASK)
            (alone,) = decode(tiny, [Request(request.prompt_ids + ids)], Sampling(5))
            assert forced.token_ids == ids + alone.token_ids
            assert forced.new_tokens == cut + 3 + 5 and forced.finish == "length"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_fewer_bits_an_answer_parts_only_where_rounding_decides(family):
    tiny = model(family, dtype="bfloat16")
    for request, whole in zip(REQUESTS, decode(tiny, REQUESTS, Sampling(NEW), 2, forcing=FORCING)):
        for cut, forced in zip(CUTS, whole.forced, strict=True):
            ids = (*whole.token_ids[:cut], *ASK)
            assert forced.token_ids[: len(ids)] == ids
            read = request.prompt_ids + ids
            (alone,) = decode(tiny, [Request(read)], Sampling(5))
            assert_same_greedy(tiny, read, forced.token_ids[len(ids) :], alone.token_ids)


def memories():
    tiny = model("qwen3")
    adapter = evictor.Evictor(
        tiny.weights, dataclasses.replace(evictor.LAPTOP, window=4), tiny.weights_hash
    )
    for parameter in adapter.parameters():
        parameter.data.normal_()
    yield 0.0, {}
    yield 1.0, {}
    yield 1.0, dict(policy=policies.Window(6))
    yield 0.0, dict(policy=policies.TOVA(6))
    yield 1.0, dict(policy=policies.H2O(6))
    yield 0.0, dict(policy=policies.DMS(adapter))
    yield 1.0, dict(quantized=Quantized(4, group=8, residual=4))


def test_one_long_generation_serves_every_shorter_budget():
    """Under each memory: the answer at a cut is that of a run whose budget ends there."""
    tiny = model("qwen3")
    for temperature, memory in memories():
        sampling = Sampling(NEW, temperature)
        found = decode(tiny, REQUESTS, sampling, 3, forcing=FORCING, **memory)
        for place, cut in enumerate(CUTS):
            short = decode(
                tiny, REQUESTS, dataclasses.replace(sampling, max_new_tokens=cut), 3,
                forcing=BudgetForcing((cut,), ASK, 5), **memory,
            )  # fmt: skip
            for whole, part in zip(found, short, strict=True):
                assert whole.token_ids[:cut] == part.token_ids
                assert untimed(whole.forced[place]) == untimed(part.forced[0]), memory


def test_what_has_ended_is_not_asked_and_a_stop_may_have_to_wait():
    free = decode(model("llama"), REQUESTS[:1], Sampling(NEW))[0].token_ids
    tiny = model("llama", stops=[free[6]])
    first = free.index(free[6])
    (ended,) = decode(tiny, REQUESTS[:1], Sampling(NEW), forcing=FORCING)
    assert ended.finish == "stop" and ended.new_tokens == first + 1
    assert [forced is not None for forced in ended.forced] == [cut <= first for cut in CUTS]
    waiting = dataclasses.replace(FORCING, wait_tokens=(5, 6), max_waits=1)
    (longer,) = decode(tiny, REQUESTS[:1], Sampling(NEW), forcing=waiting)
    assert longer.token_ids[: first + 2] == (*free[:first], 5, 6)
    assert longer.new_tokens > ended.new_tokens


def test_an_answer_is_asked_for_in_open_thoughts_or_after_them():
    free = decode(model("llama"), REQUESTS[:1], Sampling(NEW))[0].token_ids
    end, place = free[6], free.index(free[6])
    assert CUTS[0] <= place < CUTS[1], "no cut lies in the thoughts, or none after them"
    thinks = dataclasses.replace(FORCING, end_of_thinking=end, closing_prompt=(end, 11))
    (whole,) = decode(model("llama"), REQUESTS[:1], Sampling(NEW), forcing=thinks)
    assert whole.token_ids == free
    for cut, forced in zip(CUTS, whole.forced, strict=True):
        ids = (*free[:cut], *((end, 11) if cut <= place else ASK))
        (alone,) = decode(model("llama"), [Request(REQUESTS[0].prompt_ids + ids)], Sampling(5))
        assert forced.token_ids == ids + alone.token_ids


@pytest.mark.parametrize("waits", [1, 2, NEW])
def test_the_end_of_thoughts_has_to_wait_up_to_the_last_budget(waits):
    """Against tokens asked for one by one; this model says 230 again and again."""
    tiny, request, end = model("qwen3"), REQUESTS[2], 230
    said, left = (), waits
    while len(said) < CUTS[-1]:
        (one,) = decode(tiny, [Request(request.prompt_ids + said)], Sampling(1))
        replaced = one.token_ids == (end,) and left > 0
        said, left = said + ((5, 6) if replaced else one.token_ids), left - replaced
    forcing = dataclasses.replace(FORCING, wait_tokens=(5, 6), max_waits=waits,
                                  end_of_thinking=end, closing_prompt=(end, 11))  # fmt: skip
    (whole,) = decode(tiny, [request], Sampling(NEW), forcing=forcing)
    assert whole.token_ids == said[:NEW] and said.count(5) == waits - left > 0
    (stopping,) = decode(model("qwen3", stops=[end]), [request], Sampling(NEW), forcing=forcing)
    assert stopping.token_ids[: said.index(6) + 1] == said[: said.index(6) + 1], "a stop waits too"


def test_budgets_that_do_not_fit_are_refused():
    for wrong in (BudgetForcing(budgets, ASK, 5) for budgets in ((9, 4), (4, 17), (0,))):
        with pytest.raises(ValueError, match="give ascending numbers of new tokens, from 1 to 16"):
            decode(model("llama"), REQUESTS, Sampling(NEW), forcing=wrong)
    for wrong in (BudgetForcing((4,), (), 5), BudgetForcing((4,), ASK, 0)):
        with pytest.raises(ValueError, match="give at least one of each"):
            decode(model("llama"), REQUESTS, Sampling(NEW), forcing=wrong)
    with pytest.raises(ValueError, match="closing_prompt is empty; give tokens that end thoughts"):
        wrong = BudgetForcing((4,), ASK, 1, end_of_thinking=3)
        decode(model("llama"), REQUESTS, Sampling(NEW), forcing=wrong)
    with pytest.raises(ValueError, match="wait_tokens is empty; give tokens to wait by"):
        wrong = BudgetForcing((4,), ASK, 1, max_waits=1)
        decode(model("llama"), REQUESTS, Sampling(NEW), forcing=wrong)


def test_the_key_is_that_of_stored_records():
    forcing = BudgetForcing((4, 9), (5, 6), 3, wait_tokens=(7,), max_waits=2)
    # Digest of the dataclass as it was when the published records were stored.
    stored = {"cuts": [4, 9], "ask": [5, 6], "answer": 3, "wait": [7], "waits": 2}
    assert digest(forcing.key) == digest(stored)
    thinks = dataclasses.replace(forcing, end_of_thinking=1, closing_prompt=(1, 5))
    assert forcing.key.items() <= thinks.key.items() and len(thinks.key) == 7


def test_what_the_devices_drew_is_shared_by_the_tokens_decoded(monkeypatch):
    readings = itertools.chain([100.0], itertools.repeat(190.0))
    monkeypatch.setattr(energy, "joules", lambda: next(readings))
    asked = [Request((1, 2, 3), "a"), Request((4, 5), "b")]
    found = decode(model("llama"), asked, Sampling(4), batch_size=1)
    assert [(g.new_tokens, g.joules) for g in found] == [(4, 90.0 / 8 * 4), (4, 90.0)]
