"""Budget forcing: what is cut off a long generation is what a short one says."""

import dataclasses

import pytest

from kit.dms import evictor
from kit.inference import energy, policies
from kit.inference.budget_forcing import Forcing
from kit.inference.decode import Request, decode
from kit.inference.kv_quantization import Quantised
from kit.models import load as models
from kit.schema import Sampling
from tests.rounding import assert_same_greedy

ASK, CUTS, NEW = (7, 8, 9), (4, 9, 16), 16
FORCING = Forcing(CUTS, ASK, 5)
REQUESTS = [Request(tuple(range(3 + i, 20 + 2 * i)), f"p{i}", i % 2) for i in range(5)]


def model(family: str, stops=None, dtype: str = "float64"):
    found = models.load(f"random:{family}", dtype=dtype)
    found.weights.generation_config.eos_token_id = stops
    return found


def untimed(generation):
    return generation and dataclasses.replace(generation, seconds=0.0, forced=())


@pytest.mark.parametrize("family", models.RANDOM)
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
    for rule in (policies.Window(6), policies.TOVA(6), policies.H2O(6), policies.DMS(adapter)):
        yield dict(policy=rule)
    yield dict(quantised=Quantised(4, group=8, residual=4))


@pytest.mark.parametrize("temperature", (0.0, 1.0))
def test_one_long_generation_serves_every_shorter_budget(temperature):
    """Under each memory: the answer at a cut is that of a run whose budget ends there."""
    tiny = model("qwen3")
    for memory in ({}, *memories()):
        sampling = Sampling(NEW, temperature)
        found = decode(tiny, REQUESTS, sampling, 3, forcing=FORCING, **memory)
        for place, cut in enumerate(CUTS):
            short = decode(
                tiny, REQUESTS, dataclasses.replace(sampling, max_new_tokens=cut), 3,
                forcing=Forcing((cut,), ASK, 5), **memory,
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
    waiting = dataclasses.replace(FORCING, wait=(5, 6), waits=1)
    (longer,) = decode(tiny, REQUESTS[:1], Sampling(NEW), forcing=waiting)
    assert longer.token_ids[: first + 2] == (*free[:first], 5, 6)
    assert longer.new_tokens > ended.new_tokens


def test_what_does_not_fit_is_told():
    for wrong in (Forcing((9, 4), ASK, 5), Forcing((4, 17), ASK, 5), Forcing((0,), ASK, 5)):
        with pytest.raises(ValueError, match="give ascending numbers of new tokens, from 1 to 16"):
            decode(model("llama"), REQUESTS, Sampling(NEW), forcing=wrong)
    for wrong in (Forcing((4,), (), 5), Forcing((4,), ASK, 0), Forcing((4,), ASK, 1, waits=1)):
        with pytest.raises(ValueError, match="forcing needs some of each that it uses"):
            decode(model("llama"), REQUESTS, Sampling(NEW), forcing=wrong)


def test_what_the_devices_drew_is_shared_by_the_tokens_decoded(monkeypatch):
    readings = iter([100.0, 190.0])
    monkeypatch.setattr(energy, "joules", lambda: next(readings))
    asked = [Request((1, 2, 3), "a"), Request((4, 5), "b")]
    found = decode(model("llama"), asked, Sampling(4), forcing=Forcing((2,), (5,), answer=1))
    assert [g.new_tokens for g in found] == [4, 4] and found[0].forced[0].new_tokens == 4
    assert {g.joules for whole in found for g in (whole, *whole.forced)} == {4 * 90 / (8 + 4)}
