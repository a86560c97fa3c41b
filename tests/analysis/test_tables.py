"""Tables against hand-computed cases, pandas and statsmodels."""

import re

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from kit.analysis import claims, contrasts, stats, tables, verdicts
from kit.schema import Record

BASE = Record(
    key="k", generation_key="g", model="tiny", weights_hash="abc", arm="plain", policy="full",
    source="laptop", problem_id="p0", family="sums", level=1, sample=0, seed=0, temperature=0.6,
    question="1+1?", answer="2", prompt_id="x", text="2", finish="stop", prompt_tokens=10,
    new_tokens=5, seconds=0.5, kv_reads_tokens=60.0, kv_peak_tokens=14.0, kv_peak_bytes=2**20,
    correct=True, extracted="2", reason="equal", method="last number", compliant=False,
)  # fmt: skip


PUBLISHED = claims.load()
AUDITS = tables.audits(PUBLISHED)


def frame(*rows: dict) -> pd.DataFrame:
    """Records that differ from BASE as given; a wrong one extracts "9"."""
    base = vars(BASE)
    return pd.DataFrame(
        [base | {"extracted": "2" if row.get("correct", True) else "9"} | row for row in rows]
    )


def paired(both: int, only_format: int, only_plain: int, neither: int, **more) -> pd.DataFrame:
    """One sample per problem and arm with these pair counts."""
    sides = [(True, True)] * both + [(True, False)] * only_format
    sides += [(False, True)] * only_plain + [(False, False)] * neither
    rows = []
    for number, (in_format, in_plain) in enumerate(sides):
        for arm, correct in (("format", in_format), ("plain", in_plain)):
            rows.append({"problem_id": f"p{number}", "arm": arm, "correct": correct, **more})
    return frame(*rows)


def noisy(seed: int = 0) -> pd.DataFrame:
    """Two arms, 3 families x 2 levels x 5 problems x 3 samples."""
    rng, rows = np.random.default_rng(seed), []
    for arm in ("plain", "format"):
        for family in ("gcd", "sums", "words"):
            for number in range(10):
                for sample in range(3):
                    rows.append({
                        "arm": arm, "family": family, "level": 1 + number % 2,
                        "problem_id": f"{family}{number}", "sample": sample,
                        "correct": bool(rng.random() < 0.4), "new_tokens": int(rng.integers(90)),
                        "finish": "stop" if rng.random() < 0.8 else "length",
                        "compliant": bool(rng.random() < 0.5), "seconds": float(rng.random()),
                        "kv_peak_bytes": int(rng.integers(2**22)),
                        "method": str(rng.choice(["boxed", "last number", "none"])),
                    })  # fmt: skip
    return frame(*rows)


def test_arms_by_hand():
    rows = [{"problem_id": f"p{i}", "correct": i < 3, "finish": "stop" if i < 8 else "length",
             "compliant": i == 0, "new_tokens": i, "kv_peak_bytes": i * 2**20}
            for i in range(10)]  # fmt: skip
    (row,) = tables.arms(frame(*rows)).to_dict("records")
    assert (row["model"], row["arm"], row["problems"], row["samples"]) == ("tiny", "plain", 10, 10)
    for measure, right, n in [
        ("accuracy", 3, 10), ("finished", 8, 10), ("compliance", 1, 10),
        ("accuracy_given_finished", 3, 8),
    ]:  # fmt: skip
        low, high = proportion_confint(right, n, method="wilson")
        assert row[measure] == pytest.approx((100 * right / n, 100 * low, 100 * high)), measure
    assert row["majority"] is None  # one sample is no vote
    assert row["new_tokens"] == 4.5 and row["kv_peak_bytes"] == 4.5 * 2**20


def test_majority_is_the_vote_and_not_the_mean():
    votes = {"p0": "229", "p1": "299", "p2": "222"}  # 2 is right
    rows = [{"problem_id": problem, "sample": i, "correct": answer == "2", "extracted": answer}
            for problem, answers in votes.items() for i, answer in enumerate(answers)]  # fmt: skip
    (row,) = tables.arms(frame(*rows)).to_dict("records")
    assert row["majority"][0] == pytest.approx(100 * 2 / 3)
    assert row["accuracy"][0] == pytest.approx(100 * 6 / 9)
    assert (row["problems"], row["samples"]) == (3, 9)


def test_answers_that_are_equal_are_one_vote():
    votes = [('"1."', False), ('"1"', True), ("1", True)]
    rows = [
        {"sample": i, "correct": hit, "extracted": answer} for i, (answer, hit) in enumerate(votes)
    ]
    (row,) = tables.arms(frame(*rows)).to_dict("records")
    assert row["majority"][0] == 100


def test_the_same_id_in_two_problem_sets_is_two_problems():
    (row,) = tables.arms(frame({"source": "math"}, {"source": "gsm8k"})).to_dict("records")
    assert row["problems"] == 2


def test_an_arm_that_asks_what_another_asked_is_its_twin():
    def arm(name, ids, **changes):
        return [{"arm": name, "problem_id": f"p{i}", "prompt_id": f"{i}", **changes} for i in ids]

    few = arm("k4", range(3)), arm("merged", range(5))
    other = arm("vote", range(3), temperature=0.7), arm("k1", range(3), prompt_id="x")
    asked = frame(*arm("retrieved", range(5)), *arm("plain", range(5), prompt_id="y"),
                  *(row for rows in (*few, *other) for row in rows))  # fmt: skip
    assert contrasts.twins(asked, ["retrieved"]) == {"k4": "retrieved", "merged": "retrieved"}
    assert contrasts.twins(asked, ["retrieved", "k4", "merged"]) == {}


def test_by_family_against_pandas():
    records = noisy()
    table = tables.by_family(records, "format")
    assert [*table["family"]] == ["gcd", "gcd", "sums", "sums", "words", "words", "all"]
    of_arm = records[records["arm"] == "format"]
    per_problem = of_arm.groupby(["family", "level", "problem_id"])["correct"].mean()
    expected = 100 * per_problem.groupby(["family", "level"]).mean()
    for row in table.iloc[:-1].itertuples():
        estimate, low, high = row.accuracy
        assert estimate == pytest.approx(expected[row.family, row.level])
        assert low <= estimate <= high
        assert (row.problems, row.samples) == (5, 15)
    assert table["accuracy"].iloc[-1][0] == pytest.approx(100 * per_problem.mean())
    assert table["new_tokens"].iloc[-1] == pytest.approx(of_arm["new_tokens"].mean())


def test_by_family_keeps_models_apart():
    records = pd.concat([frame({"correct": True}), frame({"correct": False, "model": "other"})])
    table = tables.by_family(records)
    accuracy = {(row.model, row.family): row.accuracy[0] for row in table.itertuples()}
    assert accuracy == {("tiny", "sums"): 100, ("tiny", "all"): 100,
                        ("other", "sums"): 0, ("other", "all"): 0}  # fmt: skip


def test_difference_of_the_published_pairs():
    records = paired(32, 16, 8, 44)
    table = tables.difference(records, "format", "plain").set_index("measure")
    estimate, low, high = table.loc["accuracy", "difference"]
    assert estimate == pytest.approx(8) and table.loc["accuracy", "problems"] == 100
    assert mcnemar([[32, 16], [8, 44]]).pvalue == pytest.approx(0.152, abs=5e-4)
    assert low < 0 < high  # as that p-value says
    assert "majority" not in table.index  # no votes, no row


def test_difference_is_paired_by_problem_and_per_model():
    records = pd.concat([paired(10, 5, 0, 5), paired(5, 0, 5, 10, model="other")])
    extra = frame({"problem_id": "only plain", "correct": False})  # in one arm only: left out
    table = tables.difference(pd.concat([records, extra]), "format", "plain", ("accuracy",))
    found = {row.model: (row.difference[0], row.problems) for row in table.itertuples()}
    assert found == {"tiny": (pytest.approx(25), 20), "other": (pytest.approx(-25), 20)}


def test_answers_against_crosstab():
    records = noisy()
    expected = pd.crosstab(records["arm"], records["method"], normalize="index") * 100
    found = tables.answers(records).droplevel("model")
    pd.testing.assert_frame_equal(found, expected, check_names=False)


def test_audits_of_all_published_claims():
    assert [*AUDITS["claim"]] == [claim.id for claim in PUBLISHED]
    assert {"system", "statement", "published", "reading", "source", "grade"} < {*AUDITS}
    rows = AUDITS.set_index("claim")
    gain = rows.loc["rbslm-memory-gain"]
    assert gain["published"] == "48 against 40 percent"
    assert gain["estimate"] == pytest.approx(8)
    assert gain["p"] == pytest.approx(0.152, abs=5e-4) and gain["n_needed"] == 292
    baseline = rows.loc["rbslm-baseline-accuracy"]  # a share: an interval and no test
    low, high = proportion_confint(40, 100, method="wilson")
    assert (baseline["low"], baseline["high"]) == pytest.approx((100 * low, 100 * high))
    assert np.isnan(baseline["p"]) and pd.isna(baseline["n_needed"])
    silent = rows.loc["dms-delayed-eviction"]  # neither a size nor counts were published
    assert silent["published"] == "direction" and silent["reading"] == "no counts published"
    assert silent[["estimate", "low", "high", "p"]].isna().all()
    for claim in PUBLISHED:  # the same words in both tables of the report
        shown = verdicts.measured_table([claim], pd.DataFrame(), "laptop")["published"].iloc[0]
        assert rows.loc[claim.id, "published"] == shown


@pytest.mark.parametrize(
    ("name", "cell", "expected"),
    [
        ("accuracy", (17.84, 13.06, 22.75), "17.8 [13.1, 22.8]"),
        ("difference", (8.04, -1.7, 17.94), "+8.0 [-1.7, 17.9]"),
        ("difference", (-2.0, -3.0, -1.0), "-2.0 [-3.0, -1.0]"),
        ("difference", (-0.04, -1.0, 1.0), "+0.0 [-1.0, 1.0]"),
        ("accuracy", (0.0, -0.04, -0.04), "0.0 [0.0, 0.0]"),
        ("kl", (0.18, 4e-10, 2.7e9), "0.180 [0.000, over 999]"),
        ("kl_ratio", (3.15, 1.2, 8.0), "3.15 [1.20, 8.00]"),
        ("cost", -0.01, "0.0"),
        ("majority", None, "–"),
        ("p", float("nan"), "–"),
        ("n_needed", pd.NA, "–"),
        ("p", 0.15158, "0.15"),
        ("p", 1.2e-12, "< 0.001"),
        ("n_needed", 9335, "9,335"),
        ("samples", np.int64(1200), "1,200"),
        ("kv_peak_bytes", 1.5 * 2**20, "1.50 MiB"),
        ("seconds", 12428.06, "12,428.1"),
        ("dollars", 0.00749, "0.0075"),
        ("level", "", ""),
    ],
)
def test_cell_text(name, cell, expected):
    assert tables.cell_text(name, cell) == expected


def test_text_names_units_and_changes_no_number_of_rows():
    shown = tables.text(AUDITS[["claim", "p", "n_needed"]])
    assert [*shown] == ["claim", "p", "n needed"]
    gain = shown[shown["claim"] == "rbslm-memory-gain"].iloc[0]
    assert (gain["p"], gain["n needed"]) == ("0.15", "292")
    assert "accuracy, %" in tables.text(tables.arms(noisy()))


def test_style_escapes_and_repeats():
    table = pd.DataFrame({"model": ["<script>alert(1)</script>"], "samples": [1]})
    page = tables.style(table).to_html()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert page == tables.style(table).to_html()
    assert page != tables.style(table.assign(samples=2)).to_html()


def test_words_and_their_headings_are_left_numbers_right():
    page = tables.style(pd.DataFrame({"claim": ["a", "b"], "p": [0.5, 0.1]})).to_html()
    rules = dict(re.findall(r"([^{}]+) \{\s+([^{}]+?);?\s+\}", page.partition("</style>")[0]))
    left = {name.strip() for name, rule in rules.items() if rule.endswith("text-align: left")}
    (headings,) = [name for name in left if "col_heading" in name]
    assert headings.endswith("th.col_heading.col0")
    assert any("row1_col0" in name for name in left) and not any("col1" in name for name in left)


@pytest.mark.parametrize(
    "difference, sentence",
    [
        ((4.84, 1.3, 8.2), "fetched beats plain: +4.8 [1.3, 8.2] points"),
        ((-3.0, -5.0, -0.01), "fetched is behind plain: -3.0 [-5.0, 0.0] points"),
        ((-0.01, -2.0, 2.0), "fetched is not told apart from plain: +0.0 [-2.0, 2.0] points"),
    ],
)
def test_a_comparison_is_said_by_its_interval(difference, sentence):
    assert tables.comparison("fetched", "plain", difference) == sentence


def test_quality_pairs_policies_by_sequence():
    rng = np.random.default_rng(0)
    hard = rng.random(40)  # a sequence is hard or easy for every policy
    base = {"nats": np.full(40, 1.0), "live_tokens": 20.0, "kept_fraction": 0.25, "kv_bytes": 100.0}
    frames = {
        ("dms", 4): pd.DataFrame({**base, "kl": hard}),
        ("window", 4): pd.DataFrame({**base, "kl": hard + 0.1 + 0.01 * rng.random(40)}),
        ("window", 8): pd.DataFrame({**base, "kl": hard + 0.5}),
    }
    found = tables.quality(frames).set_index(["policy", "compression_x"])
    estimate, low, high = found.loc[("window", 4), "kl_ratio"]
    wide = found.loc[("window", 4), "kl"]
    assert estimate == pytest.approx(wide[0] / hard.mean())
    assert 1 < low < estimate < high
    assert high / low < 0.8 * wide[2] / wide[1], "paired: narrower than either KL alone"
    assert (
        found.loc[("dms", 4), "kl_ratio"] is None and found.loc[("window", 8), "kl_ratio"] is None
    )
    assert found["perplexity"].tolist() == pytest.approx([np.e] * 3)
    shown = tables.text(found.reset_index())
    assert re.fullmatch(r"1\.\d\d \[1\.\d\d, 1\.\d\d\]", shown["KL over that of dms, x"][1])


def three_arms() -> pd.DataFrame:
    """Format against plain as published (32, 16, 8, 44), and against a copy of itself."""
    pairs = paired(32, 16, 8, 44)
    return pd.concat([pairs, pairs[pairs["arm"] == "format"].assign(arm="copy")])


def test_the_declared_contrast_stands_first_and_apart_from_holm():
    found = tables.against(three_arms(), "format", ["copy", "plain"], "plain")
    assert found["control"].tolist() == ["plain", "copy"]
    assert found["primary"].tolist() == [True, False]
    declared, copy = found.itertuples()
    assert declared.difference == pytest.approx((8.0, -1.7, 17.9), abs=0.05)
    assert declared.p == pytest.approx(mcnemar([[32, 16], [8, 44]], False, False).pvalue)
    assert declared.holm == declared.p
    assert copy.difference[0] == 0 and copy.p == 1
    every = tables.against(three_arms(), "format", ["copy", "plain"], "copy")
    assert every["holm"].tolist() == every["p"].tolist(), "one further contrast needs no correction"


def test_holm_is_over_the_further_contrasts():
    more = [three_arms()]
    for number in range(3):
        plain = more[0][more[0]["arm"] == "plain"]
        more.append(plain.assign(arm=f"other{number}"))
    controls = ["copy", "other0", "other1", "other2"]
    found = tables.against(pd.concat(more), "format", controls, "plain").set_index("control")
    p = found.loc[controls, "p"]
    assert found.loc[controls, "holm"].tolist() == pytest.approx(list(stats.holm(p)))
    assert found.loc["other0", "holm"] > found.loc["other0", "p"]


def test_arms_that_differ_in_what_was_cut_are_shown_at_equal_finish():
    """Of ten plain answers two are right and three, of the others, were cut."""
    arms = {"trained": 10, "plain": 2}

    def shown(cut: int) -> pd.Series:
        rows = [
            {"problem_id": f"p{number}", "arm": arm, "correct": number < right,
             "finish": "length" if arm == "plain" and number >= 10 - cut else "stop"}
            for arm, right in arms.items() for number in range(10)
        ]  # fmt: skip
        return tables.against(frame(*rows), "trained", ["plain"], "plain").iloc[0]

    assert shown(3)["difference"][0] == shown(0)["difference"][0] == pytest.approx(80)
    assert shown(3)["equal finish"][0] == pytest.approx(100 * 5 / 7)
    assert shown(0)["equal finish"] is None


def test_arms_whose_answers_do_not_end_are_named():
    ends = {"a": ["stop"] * 19 + ["length"], "b": ["stop"] * 3 + ["length"], "c": ["stop"]}
    rows = [{"arm": arm, "finish": finish} for arm in ends for finish in ends[arm]]
    assert tables.ended(frame(*rows)) == (
        "Fewer than 95% of the answers ended in 1 of 3 arms: b 75%."
    )
    left = [row for row in rows if row["arm"] != "b"]
    assert tables.ended(frame(*left)) == "At least 95% of the answers ended in each of 2 arms."


def test_an_arm_that_was_not_run_has_no_row():
    found = tables.against(three_arms(), "format", ["nothing"], "plain")
    assert found["control"].tolist() == ["plain"]
    assert tables.against(three_arms(), "nothing", ["plain"], "copy").empty
