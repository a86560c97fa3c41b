"""How verdicts are told; their rules are tested in test_claims."""

from kit.analysis import verdicts


def test_the_claims_of_a_notebook_are_counted_in_a_sentence():
    rows = [{"verdict": "undecided", "on": "stand-in model"}] * 2
    rows += [{"verdict": "agrees", "on": "recomputed"}] * 3 + [{"verdict": "", "on": "x"}]
    assert verdicts.counted(rows) == (
        "Of 6 published claims 5 got a verdict here: 3 agree, 2 undecided. Without one: 1 x."
    )
    assert verdicts.counted(rows[-1:]) == (
        "Of 1 published claims none got a verdict here. Without one: 1 x."
    )
