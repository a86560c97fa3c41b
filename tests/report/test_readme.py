"""What the README says of published runs: the counts, the figure, and that its findings hold."""

import json

import pandas as pd
import pytest

from kit import paths
from kit.report import readme
from kit.report.bundle import VERDICTS, Run


def exhibit(which: tuple[str, str]) -> pd.DataFrame:
    return readme.table(paths.PUBLISHED, *which)


def test_the_figure_is_drawn_from_what_is_published(tmp_path):
    picture = readme.figure()
    committed = (paths.ROOT / readme.FIGURE).read_text()
    assert picture.alt in committed, "stale: run `python -m kit publish`"
    assert [axes.get_title() for axes in picture.axes] == [
        *("KV-cache eviction", "Parametric memory", "Retrieved strategies")
    ]
    readme.save_figure(tmp_path / "findings.svg")
    assert picture.alt in (tmp_path / "findings.svg").read_text()


@pytest.mark.parametrize("model, published", [("bundled:smollm2-135m", False),
                                              ("hub:Qwen/Qwen3-1.7B", True)])  # fmt: skip
def test_claims_are_counted_by_what_they_were_measured_on(model, published):
    rows = [
        ("dms-delayed-eviction", "0.5 nats", "reproduced"),
        ("dms-short-context-loss", "1.8 points", "inconclusive"),
        ("nab-weights-4b-4bit", "2.486 GiB", "reproduced"),  # arithmetic
        ("rbslm-baseline-accuracy", "", "out of reach here"),  # the workstation decides it
        ("dms-throughput", "", "out of reach here"),  # no profile does
    ]
    names = ("claim", "measured", "verdict")
    verdicts = {"verdicts": [dict(zip(names, row)) for row in rows]}
    run = Run({VERDICTS: json.dumps(verdicts).encode()})
    run.__dict__["every"] = pd.DataFrame({"model": [model, f"{model} 4-bit g64", "outputs/x/y"]})
    text = readme._measured(run, "some")
    first, second, third = text.splitlines()
    assert f"`{model}`" in first and "2 claims, 1 reproduced, 1 inconclusive" in first
    assert ("stand-in" in first) == ("No claim has been measured on" in first) == (not published)
    assert "1, 1 reproduced" in second and "outputs" not in text
    assert "1 claims need the published models" in third and "1 are beyond" in third


def test_the_audit_counts_differences_that_their_counts_cannot_tell_from_zero():
    assert "of 34 published differences" in readme._audited()
    assert "the 95% interval of 25 includes zero" in readme._audited()


def test_a_table_that_nobody_published_is_named(tmp_path):
    with pytest.raises(ValueError, match="no published run of 03_dms has the table 'Quality at"):
        readme.figure(tmp_path)


# What README.md says in words under the figure. A run that says otherwise needs other words.


def test_dms_diverges_least_of_all_policies_at_equal_live_tokens():
    quality = exhibit(readme.DMS)
    rivals = quality[~quality["policy"].isin(["full", "dms"])]
    assert len(rivals) == 12
    assert all(low > 0 for _, low, _ in rivals["excess_kl"])


def test_fetched_blocks_beat_wrong_ones_but_not_one_shared_block():
    found = exhibit(readme.FACTS).set_index("control")["difference"]
    assert found["wrong"][1] > 0 and found["plain"][1] > 0
    assert found["shared"][1] < 0 < found["shared"][2]
    assert found["continued"][2] < 0


def test_retrieved_strategies_are_not_told_from_their_control():
    found = exhibit(readme.STRATEGIES).set_index("control")["difference"]
    for control in ("format-only", "plain"):
        _, low, high = found[control]
        assert low < 0 < high
