"""What policies cost on given text, fed through the real cache, against masked sequences."""

from functools import partial

import pytest
import torch

from kit.dms import fidelity, gates
from kit.inference import policies
from tests.rounding import TIMES
from tests.toys import drawn, tokens, toy


def test_full_attention_costs_no_more_than_rounding(dtype):
    model, ids = toy(dtype=dtype), tokens(3, 40)
    found, floor = (
        fidelity.teacher_forced_kl(model, ids, prompt=10),
        fidelity.rounding(model, ids, prompt=10),
    )
    assert 0 < found["kl"].max() < TIMES * floor["kl"].max()
    assert (found["kept_fraction"] == 1).all()
    assert (found["live_tokens"] == sum(range(11, 40)) / 29).all()
    window = fidelity.teacher_forced_kl(model, ids, policies.Window(kept_tokens=20), prompt=10)
    assert window["kl"].min() > TIMES * floor["kl"].max(), "what is forgotten shows in any dtype"


def test_the_fed_cache_agrees_with_the_masked_sequence():
    """Prompt of one token, so that both see the same positions, the first apart."""
    model, ids = toy("qwen3"), tokens(3, 50)
    made = drawn(model)
    fed = fidelity.teacher_forced_kl(model, ids, policies.DMS(made), prompt=1)
    whole = gates.measure(model, made, ids)
    kl = whole["kl"] * 49 / 48  # the first token sees only itself: its KL is 0
    torch.testing.assert_close(torch.tensor(fed["kl"]), torch.tensor(kl), rtol=1e-3, atol=1e-4)
    assert 0.3 < fed["kept_fraction"].mean() < 0.9


RKV = partial(policies.RKV, window=3, buffer=8)


@pytest.mark.parametrize(
    "kind", [policies.Window, policies.TOVA, policies.H2O, policies.Random, RKV]
)
@pytest.mark.parametrize("live", [12.3, 17.0, 25.1])
@pytest.mark.parametrize("budget", [{"kept_tokens": 8}, {"kept_fraction": 0.9}])
def test_matched_policies_take_as_much_memory_and_hardly_more(kind, live, budget):
    model, ids = toy(), tokens(2, 60)
    chosen = fidelity.match_live_tokens(kind(**budget), live, 10, 60)
    assert getattr(chosen, *budget) != budget[[*budget][0]]
    found = fidelity.teacher_forced_kl(model, ids, chosen, prompt=10)["live_tokens"]
    assert (live <= found).all() and (found < live + 1.1).all()


def test_a_policy_of_prompts_is_matched_by_what_it_keeps_of_them():
    model, ids = toy(), tokens(2, 60)
    for live in (30.2, 40.0):
        policy = policies.SnapKV(60, window=4)
        chosen = fidelity.match_live_tokens(policy, live, 40, 60)
        found = fidelity.teacher_forced_kl(model, ids, chosen, prompt=40)["live_tokens"]
        assert (live <= found).all() and (found < live + 1.1).all()


def test_rivals_are_compared_at_the_live_tokens_that_each_evictor_took(tmp_path):
    model, ids = toy("qwen3"), tokens(2, 40)
    evictors = {2: drawn(model, logit_offset=-9.0), 4: drawn(model)}
    kinds = [policies.Window, policies.H2O]
    frames = fidelity.at_equal_live_tokens(tmp_path, model, ids, evictors, kinds, prompt=10)
    assert [*frames] == [("full", 1), *((n, x) for x in (2, 4) for n in ("dms", "window", "h2o"))]
    for x in evictors:
        live = [frames[name, x]["live_tokens"].mean() for name in ("dms", "window", "h2o")]
        assert all(live[0] <= rival < live[0] + 1.1 for rival in live[1:])
    alone = fidelity.teacher_forced_kl(model, ids, policies.DMS(evictors[4]), 10)
    assert frames["dms", 4].equals(alone)
    how = dict(prompt=10, shares=True)
    both = fidelity.at_equal_live_tokens(tmp_path, model, ids, {4: evictors[4]}, [RKV], **how)
    assert [*both] == [("full", 1), ("dms", 4), ("rkv", 4), ("rkv, share", 4)]
    assert len({*(both["rkv", 4]["policy"]), *(both["rkv, share", 4]["policy"])}) == 2


def test_kept_is_what_a_window_keeps():
    found = fidelity.kept_positions(
        toy(), tokens(1, 30)[0], policies.Window(kept_tokens=8), prompt=10
    )
    assert {tuple(head.tolist()) for layer in found for head in layer} == {
        (0, 1, 2, 3, *range(25, 30))
    }


def test_a_prompt_longer_than_the_text_is_refused():
    with pytest.raises(ValueError, match="prompt is 29; the sequences have 30 tokens"):
        fidelity.teacher_forced_kl(toy(), tokens(1, 30), prompt=29)


def test_what_was_measured_is_read_back(tmp_path, monkeypatch):
    model, ids = toy(), tokens(2, 30)
    window, other = policies.Window(kept_tokens=8), policies.Window(kept_tokens=9)
    first = fidelity.cached_teacher_forced_kl(tmp_path, model, ids, window, 10)
    found = fidelity.teacher_forced_kl(model, ids, window, 10)
    assert first.equals(found), "the file says something else than was measured"
    assert not fidelity.cached_teacher_forced_kl(tmp_path, model, ids, other, 10).equals(first)
    assert len(list(tmp_path.iterdir())) == 2, "another policy is another file, and no part is left"
    monkeypatch.setattr(fidelity, "teacher_forced_kl", None)  # a second measurement would fail
    assert fidelity.cached_teacher_forced_kl(tmp_path, model, ids, window, 10).equals(first)


@pytest.mark.parametrize("wanted", [0.6, 0.7, 0.95])
def test_an_evictor_is_moved_to_a_kept_fraction(wanted):
    model, ids = toy("qwen3"), tokens(4, 50)
    made = drawn(model)
    before = gates.measure(model, made, ids)["kept_fraction"].mean()
    found = gates.measure(model, gates.at_fraction(model, made, ids, wanted), ids)
    assert abs(found["kept_fraction"].mean() - wanted) < 0.01 < abs(before - wanted)
    assert gates.measure(model, made, ids)["kept_fraction"].mean() == before, "the original moved"
