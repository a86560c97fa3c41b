"""What the README says of published runs: the counts, the figure, and that its findings hold."""

import json

import pandas as pd
import pytest

from kit import paths
from kit.analysis import claims
from kit.report import readme
from kit.report.bundle import VERDICTS, Run


def exhibit(which: tuple[str, str]) -> pd.DataFrame:
    return readme.table(paths.PUBLISHED_RUNS, *which)


def test_the_figure_is_drawn_from_what_is_published(tmp_path):
    picture = readme.figure()
    committed = (paths.ROOT / readme.FIGURE).read_text()
    assert picture.alt in committed, "stale: run `python -m kit publish`"
    assert [axes.get_title() for axes in picture.axes] == [
        *("KV-cache eviction", "Parametric memory", "Retrieved strategies")
    ]
    readme.save_figure(tmp_path / "findings.svg")
    assert picture.alt in (tmp_path / "findings.svg").read_text()


def test_the_counts_are_the_headline_of_the_run():
    rows = [
        ("dms-delayed-eviction", "0.5 nats", "stand-in model", "holds here"),
        ("dms-short-context-loss", "1.8 points", "stand-in model", "undecided"),
        ("rbslm-memory-gain", "8 points", "published model and task", "reproduced"),
        ("nab-weights-4b-4bit", "2.486 GiB", "recomputed", "agrees"),
        ("rbslm-baseline-accuracy", "", "needs the workstation profile", ""),
        ("dms-throughput", "", "beyond this kit", ""),
    ]
    names = ("claim", "measured", "on", "verdict")
    verdicts = {"verdicts": [dict(zip(names, row)) for row in rows]}
    run = Run({VERDICTS: json.dumps(verdicts).encode()})
    model = "bundled:smollm2-135m"
    run.__dict__["all_records"] = pd.DataFrame(
        {"model": [model, f"{model} 4-bit g64", "outputs/x/y"]}
    )
    there, here, audit, again, left = readme._measured(run, "some")
    assert there == "- **On the published models and tasks:** 1 claim, 1 reproduced."
    assert here.startswith(
        f"- **On a stand-in model (`{model}`, profile some):** 2 claims, 1 holds"
    )
    assert "2 known from third-party notes only" in here
    effects = [found for found in map(claims.audit, claims.load()) if found.p is not None]
    unsure = sum("cannot tell" in found.reading for found in effects)
    assert f"Of {len(effects)} published differences" in audit
    assert f"{unsure} cannot be told from zero" in audit
    assert "1 claim, 1 agrees" in again and "outputs" not in here
    assert left == (
        "- Not judged, of 6 claims: 1 needs the workstation profile, 1 beyond this kit."
    )


def test_a_table_that_nobody_published_is_named(tmp_path):
    with pytest.raises(ValueError, match="no published run of 03_dms has the table 'Quality at"):
        readme.figure(tmp_path)


# What README.md says in words under the figure. A run that says otherwise needs other words.


def test_dms_diverges_least_of_all_policies_at_equal_live_tokens():
    quality = exhibit(readme.DMS)
    rivals = quality[~quality["policy"].isin(["full", "dms"])]
    assert len(rivals) == 12
    assert all(low > 1 for _, low, _ in rivals["kl_ratio"])


def test_fetched_blocks_are_behind_a_shared_block_and_not_told_from_none():
    found = exhibit(readme.FACTS).set_index("control")["difference"]
    for control in ("plain", "wrong", "continued"):
        _, low, high = found[control]
        assert low < 0 < high
    assert found["shared"][2] < 0 and found["rag"][2] < 0


def test_retrieved_strategies_do_harm_and_those_of_another_problem_more():
    found = exhibit(readme.STRATEGIES).set_index("control")["difference"]
    assert found["format-only"][2] < 0 and found["plain"][2] < 0
    assert found["shuffled"][1] > 0 and found["random"][1] > 0
    planted = exhibit(("02_strategies", "Planted rules, retrieved against each control"))
    assert all(low > 0 for _, low, _ in planted["difference"])
