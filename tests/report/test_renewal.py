"""A published run renewed from its texts: what an earlier grader said leaves grades, tables and
verdicts; figures say what records say."""

import json

import pytest

from kit import paths
from kit.analysis import plots, tables
from kit.evaluation.grader import GRADE_VERSION
from kit.report import bundle, exhibits, published, recompute, redraw, renewal, verify
from kit.report.bundle import RECORDS
from tests.runs import CAPTION, FIGURE, ran


def test_a_run_that_another_grader_graded_is_renewed(tmp_path):
    ran()
    into = tmp_path / "published"
    place = published.publish("laptop", into)
    right = bundle.read(place)
    table = right.json(f"exhibits/01_baseline/{exhibits.LIST}")
    # An earlier kit, with other columns and another claim, took every answer without a form for
    # correct, and drew its verdicts and its table from that.
    records = right.all_records.drop(columns=["grade_version", "asks"])
    records.loc[records["arm"] == "plain", "correct"] = True
    records.to_parquet(place / RECORDS, index=False)
    measured = {"rbslm-of-another-day": {"estimate": 1, "low": 0, "high": 2, "n": 3, "unit": "x"}}
    results = right.results["01_baseline"] | {"accuracy": {}, "measurements": measured}
    results |= exhibits.plain(recompute.entries("01_baseline", results, {}, records), "")
    (place / "results" / "01_baseline.json").write_text(json.dumps(results))
    renewal.judge(place)
    shown = {CAPTION: recompute.table("01_baseline", CAPTION, results, records)}
    drawn = plots.accuracy_by_family(
        {arm: tables.by_family(records, arm) for arm in ("plain", "format")}
    )
    exhibits.renew(place / "exhibits" / "01_baseline", shown, {FIGURE: drawn})
    old = verify.check(place)
    assert old.differences == []
    assert any("the grader of an earlier kit" in line for line in old.unchecked)

    said = "\n".join(published.again("laptop", into))
    now, lost = (
        bundle.read(place),
        (~right.all_records["correct"] & (right.all_records["arm"] == "plain")).sum(),
    )
    assert now.all_records[right.all_records.columns].equals(right.all_records)
    assert now.json(f"exhibits/01_baseline/{exhibits.LIST}") == table
    assert now.verdicts == right.verdicts
    assert now.results["01_baseline"]["accuracy"]["bundled:smollm2-135m plain"] == pytest.approx(
        [*tables.arms(right.all_records).set_index("arm").loc["plain", "accuracy"]]
    )
    assert now.results["01_baseline"]["measurements"] == {}
    assert f"{lost} of 224 answers are graded otherwise" in said
    assert "rbslm-format-accuracy" in said and f"reads otherwise: 01_baseline: {CAPTION}" in said
    assert "stays as it was: 01_baseline: Format against plain" in said
    assert verify.check(place).differences == []
    page = published.text(into)
    assert f"by version {GRADE_VERSION} of the grader" in page and "executed notebooks" in page
    assert "Format against plain (`01_baseline`)" in page

    before = bundle.read(place).files
    assert published.again("laptop", into)[0] == "0 of 224 answers are graded otherwise"
    assert bundle.read(place).files == before and sorted(into.iterdir()) == [place]


def test_what_is_not_published_is_not_renewed(tmp_path):
    with pytest.raises(ValueError, match="laptop is no published run; `python -m kit publish"):
        published.again("laptop", tmp_path)
    assert not [*tmp_path.iterdir()]


def test_the_published_figures_say_what_the_records_say(subtests):
    run, left = bundle.read(paths.PUBLISHED_RUNS / "laptop"), []
    for stage, found in run.results.items():
        records, given = run.records[stage], run.stamps[stage]["parameters"]
        needs = (recompute.QUALITY, recompute.COMPOUNDING, recompute.KNOWN, recompute.RECALL,
                 recompute.BYTES)  # fmt: skip
        listed = run.json(f"exhibits/{stage}/{exhibits.LIST}")
        shown = {row["caption"]: recompute.table(stage, row["caption"], found, records)
                 for row in listed if row["caption"] in needs}  # fmt: skip
        for row in listed:
            if "file" not in row:
                continue
            with subtests.test(row["caption"]):
                made = redraw.figure(row["caption"], found, shown, records, given)
                left += [] if made else [row["caption"]]
                assert not made or made.alt == row["alt"]
    assert left == ["Accuracy against KV reads"]  # of shorter chains, whose records it has not


def test_a_figure_is_the_same_whether_or_not_it_was_drawn_before(monkeypatch):
    run, stage = bundle.read(paths.PUBLISHED_RUNS / "laptop"), "01_baseline"
    (row,) = [row for row in run.json(f"exhibits/{stage}/{exhibits.LIST}") if "file" in row]
    given = run.results[stage], {}, run.records[stage], run.stamps[stage]["parameters"]
    fresh, drawn = (redraw.figure(row["caption"], *given) for _ in "ab")
    drawn.draw_without_rendering()  # as a notebook does that shows it
    monkeypatch.setattr(redraw, "POINTS", 0.005)
    assert redraw.compare(fresh, {"a.pdf": exhibits.render(drawn, "pdf")}) == ([], [])


def test_advice_follows_from_the_scenarios_of_a_sweep():
    run = bundle.read(paths.PUBLISHED_RUNS / "laptop")
    found, given = (of["06_memory_budget"] for of in (run.results, run.stamps))
    listed = run.json(f"exhibits/06_memory_budget/{exhibits.LIST}")
    (row,) = [row for row in listed if row["caption"] == renewal.ADVICE]
    made = renewal.advice(found, given["parameters"])
    assert exhibits.as_table("", made).rows == row["rows"]
