"""What was declared before the first run stays, and what changed later is said."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from kit import notebook, paths
from kit.analysis import claims, tables
from kit.pipeline import declared
from kit.report import recompute
from kit.report.bundle import Run
from kit.report.verify import _declared

STAGE = "01_baseline"


@pytest.fixture(autouse=True)
def _outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)


def test_prose_may_change_and_what_decides_may_not():
    row = {"id": "a", "rule": "size", "resolution": 10, "statement": "One.", "scope": "here"}
    assert declared.digest_of(row) == declared.digest_of(row | {"statement": "Two.", "scope": ""})
    for change in ({"rule": "direction"}, {"resolution": 20}, {"contrast": {"arm": "b"}}):
        assert declared.digest_of(row) != declared.digest_of(row | change)


def test_a_claim_knows_the_digest_that_the_pipeline_writes():
    mine = {claim.id: claim.declared for claim in claims.load() if claim.notebook == STAGE}
    assert declared.current(STAGE) == mine and len(mine) > 3
    assert {*declared.current("02_strategies")} > {declared.PRIMARY}
    assert declared.current("00_tour") == {}


def test_the_first_declaration_is_kept_and_goes_into_the_results(tmp_path, monkeypatch):
    first = declared.first(tmp_path / "laptop", STAGE)
    monkeypatch.setattr(declared, "current", lambda stage: {"later": "x"})
    assert declared.first(tmp_path / "laptop", STAGE) == first
    assert declared.first(tmp_path / "laptop", "03_dms") == {"later": "x"}
    notebook.save_results(STAGE, {"keys": []}, "laptop")
    saved = (tmp_path / "laptop" / "results" / f"{STAGE}.json").read_text()
    assert all(of in saved for of in first.values())


def test_a_verdict_says_what_was_changed_after_the_run():
    arms = {"plain": np.arange(40) % 2, "format": np.arange(40) % 3}
    records = pd.DataFrame([
        dict(source="laptop", problem_id=f"p{i}", arm=arm, model="bundled:smollm2-135m", seed=0,
             sample=0, temperature=0.0, level=1, family="gcd", weights_hash="w", policy="full",
             correct=not value, extracted="1", method="number", compliant=arm == "format",
             finish="stop", prompt_tokens=9, new_tokens=9)
        for arm, right in arms.items() for i, value in enumerate(right)
    ])  # fmt: skip
    published = [claim for claim in claims.load() if claim.notebook == STAGE]
    one = next(claim for claim in published if claim.id == "rbslm-format-accuracy")

    def reasons(found: dict) -> dict:
        rows = tables.verdicts(published, {STAGE: found}, {STAGE: records}, "laptop")
        return dict(zip(rows["claim"], rows["reason"], strict=True))

    as_declared = reasons({"declared": declared.current(STAGE)})
    assert declared.CHANGED not in "".join(as_declared.values())
    assert reasons({}) == as_declared, "of runs before declarations were kept nothing is known"
    changed = reasons({"declared": declared.current(STAGE) | {one.id: "another"}})
    assert changed.pop(one.id) == f"{declared.CHANGED}; {as_declared.pop(one.id)}"
    assert changed == as_declared
    assert replace(one, margin=1.0).declared == one.declared, "the digest is of the file"


def test_the_primary_contrasts_are_those_of_the_tables_and_a_change_is_said():
    for stage, own in claims.primary().items():
        frame = pd.DataFrame({"arm": [own["arm"], own["control"]]})
        assert recompute.against(stage, frame.iloc[:0].assign(temperature=0), []).empty
        results = {stage: {"declared": declared.current(stage) | {declared.PRIMARY: "another"}}}
        run = Run({})
        run.__dict__["results"] = results | {"03_dms": {}}
        assert _declared(run) == [
            "when the claims of 03_dms were declared: not recorded",
            f"{stage}: its primary contrast was changed after the run",
        ]


def test_a_second_contrast_that_was_not_declared_before_is_said_to_be():
    stage, *_ = claims.secondary()
    now = declared.current(stage)
    before = {name: of for name, of in now.items() if name != declared.SECONDARY}
    assert declared.SECONDARY in now and declared.PRIMARY in before
    run, said = Run({}), [f"{stage}: its secondary contrast was changed after the run"]
    for first, shown, lines in ((now, True, []), (before, True, said), (before, False, []),
                                (now | {declared.SECONDARY: "another"}, True, said)):  # fmt: skip
        results = {"declared": first} | ({"handwritten": [{"arm": "shipped"}]} if shown else {})
        run.__dict__["results"] = {stage: results}
        assert _declared(run) == lines
