"""The comparison with kvpress, without kvpress: kept sets to rows, and our caches read as one."""

import pytest
import torch

from kit.inference import policies
from kit.models.load import load
from tests.peers import compare

PEER = [[[0, 1, 8, 9], [0, 3, 5, 9]], [[2, 4, 6, 8], [1, 3, 5, 7]]]  # 2 layers x 2 heads x 4
NO_TIES = [[[], []], [[], []]]


def altered(head: list[int]) -> list:
    """PEER with another set in layer 1, head 0."""
    return [PEER[0], [head, PEER[1][1]]]


def row(method: str, ours, ties=NO_TIES) -> compare.Row:
    return compare.row("random:llama", method, 0.5, [(ours, PEER, ties)] * 3, [0, 0, 0])


def test_equal_sets_are_equal():
    found = row("KnormPress", PEER)
    assert (found.sets, found.equal, found.jaccard, found.kept) == (12, 12, 1.0, 48)
    assert found.verdict == "equal"


def test_one_other_token_is_counted_on_both_sides_and_only_equal_rules_forbid_it():
    ours = altered([2, 4, 6, 7])
    found = row("KnormPress", ours)
    assert (found.equal, found.differ, found.wrong_size) == (9, 6, 0)
    assert found.jaccard == pytest.approx((3 * 1 + 3 / 5) / 4)
    assert found.verdict == "DIFFERS"
    assert row("ObservedAttentionPress", ours).verdict == "other rule"


def test_a_tie_excuses_its_positions_and_no_others():
    ties = [[[], []], [[7, 8], []]]
    excused = row("KnormPress", altered([2, 4, 6, 7]), ties)
    assert excused.verdict == "equal but for ties"
    assert (excused.differ, excused.ties, excused.equal) == (0, 6, 9)
    not_excused = row("KnormPress", altered([2, 4, 6, 9]), ties)
    assert (not_excused.differ, not_excused.verdict) == (3, "DIFFERS")


def test_where_most_scores_tie_equality_is_not_claimed():
    everything = [[list(range(10))] * 2] * 2
    assert row("KnormPress", PEER, everything).verdict == "ties decide"


def test_a_set_of_another_size_always_fails():
    found = row("RandomPress", altered([2, 4, 6]), [[[], []], [[8], []]])
    assert (found.wrong_size, found.verdict) == (3, "WRONG SIZE")


def test_layers_or_heads_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="zip"):
        row("KnormPress", PEER[:1])
    with pytest.raises(ValueError, match="zip"):
        row("KnormPress", [PEER[0][:1], PEER[1]])


def test_the_table_has_a_line_per_method_and_names_every_verdict():
    good, bad = row("KnormPress", PEER), row("KnormPress", altered([2, 4, 6, 7]))
    other = row("TOVAPress", altered([2, 4, 6, 7]))
    text = compare.table([good, bad, other]).splitlines()
    assert text[2].split()[2:] == ["12/12", "9/12", "1.000", "0.900", "6", "0", "equal,", "DIFFERS"]
    assert text[3].split()[2:] == ["9/12", "0.900", "6", "0", "other", "rule"]
    assert any("TOVAPress" in line and "newest token" in line for line in text[4:])


def test_every_method_has_its_reason():
    assert set(compare.OURS) == set(compare.EQUAL_RULES) | set(compare.OTHER_RULES)


def test_caches_that_read_together_keep_what_each_keeps_alone():
    model = load("random:llama", dtype="float32")
    ids = torch.randint(256, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [policies.Window(kept_tokens=12), policies.H2O(kept_tokens=20)]
    together = [cache.live_positions(0) for cache in compare.read(model, ids, chosen).caches]
    alone = [compare.read(model, ids, [policy]).caches[0].live_positions(0) for policy in chosen]
    for a, b in zip(together, alone, strict=True):
        assert [[h.tolist() for h in x] for x in a] == [[h.tolist() for h in x] for x in b]
    assert together[0][3][1].tolist() == [0, 1, 2, 3, *range(82, 90)]


def test_a_peer_that_read_another_prompt_is_noticed():
    model = load("random:llama", dtype="float32")
    one, same, other = (
        compare.read(model, ids, [policies.Full()]).dense
        for ids in (list(range(40)), list(range(40)), [*range(1, 40), 0])
    )
    compare.same_prompt("random:llama", one, same)
    with pytest.raises(ValueError, match="same prompt"):
        compare.same_prompt("random:llama", one, other)
