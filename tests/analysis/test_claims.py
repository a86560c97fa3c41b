"""kit.analysis.claims and kit.analysis.contrasts: the data file, the audits, the rules and their
error rates."""

import re
import subprocess
import sys
import tomllib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import multinomial, ttest_1samp
from scipy.stats import t as student

from kit.analysis import claims, contrasts, stats
from kit.analysis.verdicts import CLASSES, COLUMNS, RULES, VERDICTS, measured_table, verdict
from kit.parametric import scratch
from kit.paths import DATA, ROOT
from kit.pipeline.stages import LARGER, larger_tables, load_stages, read_profile

CLAIMS = {claim.id: claim for claim in claims.load()}
MODEL = "hub:Qwen/Qwen3-1.7B"
GAIN = replace(  # published: +8 points from pairs 32, 16, 8, 44
    CLAIMS["rbslm-format-accuracy"], unit="percent", model=("Qwen3-1.7B",), task="published",
    check=None,
    profiles=("laptop", "workstation"), pairs=(32, 16, 8, 44), value=48.0, baseline=40.0, scope="",
    contrast={"measure": "accuracy", "arm": "format", "control": "plain",
              "model": ["smollm2-135m", "Qwen3-1.7B"]},
)  # fmt: skip
SHARP = replace(GAIN, pairs=(3200, 1600, 800, 4400))  # the same from a hundred times as many


def records(arms: dict[str, np.ndarray], **columns) -> pd.DataFrame:
    """Records of arms given as problems x samples of 0, 1 or NaN."""
    rows = [
        {"arm": arm, "problem_id": f"p{i}", "sample": j, "correct": bool(value)}
        for arm, matrix in arms.items()
        for (i, j), value in np.ndenumerate(matrix)
        if not np.isnan(value)
    ]
    fixed = dict(
        model=MODEL, weights_hash="w", policy="full", source="laptop",
        family="gcd", level=1, seed=0, finish="stop", prompt_tokens=50, new_tokens=100,
        extracted="1", method="last number", compliant=True, temperature=0.7,
    )  # fmt: skip
    return pd.DataFrame(rows).assign(**{**fixed, **columns})


def measured(b: int, c: int, n: int) -> claims.Measurement:
    """The measurement that b wins and c losses in n pairs give, in points."""
    outer, inner = stats.tango(b, c, n), stats.tango(b, c, n, level=0.90)
    low, high = 100 * outer.low, 100 * outer.high
    bounds = (100 * inner.low, 100 * inner.high)
    return claims.Measurement(100 * outer.estimate, low, high, n, "points", bounds, model=MODEL)


def word_rates(claim: claims.Claim, n: int, wins: float, losses: float) -> dict[str, float]:
    """Exact chance of each word when pairs disagree at these rates: all outcomes, no sampling."""
    rates = dict.fromkeys(VERDICTS, 0.0)
    for b in range(n + 1):
        c = np.arange(n + 1 - b)
        table = np.stack([np.full_like(c, b), c, n - b - c], axis=1)
        chance = multinomial.pmf(table, n, [wins, losses, 1 - wins - losses])
        for loss in c[chance > 1e-6]:
            word = verdict(claim, measured(b, int(loss), n), "laptop").word
            rates[word] += chance[loss]
    return rates


# ------------------------------------------------------------------ the data file


def test_the_file_holds_all_six_systems_and_no_word_outside_the_vocabulary():
    systems = pd.Series([claim.system for claim in CLAIMS.values()]).value_counts()
    assert set(systems.index) == {
        "reasoning-bank-slm", "reasoningbank", "dms", "open-rs", "hierarchical-memories",
        "not-all-bits",
    }  # fmt: skip
    assert systems.min() >= 9
    assert {claim.notebook for claim in CLAIMS.values()} == set(claims.NOTEBOOKS)
    assert set(claims.NEEDS) == set(RULES)


def test_each_claim_is_consistent_with_its_own_counts(subtests):
    for claim in CLAIMS.values():
        with subtests.test(claim.id):
            assert claim.statement.endswith(".") and not re.search(r"[.!?] [A-Z]", claim.statement)
            assert claim.reported_value is not None or claim.rule in (
                "direction",
                "equivalence",
                "non_inferiority",
            )
            if claim.rule == "direction" and claim.value is not None:
                assert claim.reported_value != 0
            for share, counts in (
                (claim.value, claim.counts),
                (claim.baseline, claim.baseline_counts),
            ):
                if counts:
                    assert share == pytest.approx(100 * counts[0] / counts[1], abs=0.5)
            if claim.pairs:
                both, wins, losses, neither = claim.pairs
                n = both + wins + losses + neither
                assert claim.reported_value == pytest.approx(100 * (wins - losses) / n, abs=0.5)
                if claim.baseline is not None:
                    assert claim.baseline == pytest.approx(100 * (both + losses) / n, abs=0.5)
            assert claims.audit(claim).reading


def test_every_number_names_where_a_reader_finds_it(subtests):
    sources = tomllib.loads((DATA / "claims.toml").read_text())["sources"]
    for name, link in sources.items():
        assert link.startswith("https://") and name.split()[-1] in link, name
        assert any(claim.link == link for claim in CLAIMS.values()), f"{name} is not used"
    for claim in CLAIMS.values():
        with subtests.test(claim.id):
            name = next(name for name, link in sources.items() if link == claim.link)
            where = claim.source.removeprefix(name).strip(" ,;")
            assert where, f"{claim.id} names no section, table or file of {name}"
            if claim.grade in ("CODE", "DATA") and " at " in name:
                assert re.search(r"README|\w+/|\.json|\.md", where), where
            if claim.grade == "NOTE":
                assert name.startswith("arXiv"), "a note is of a paper"


def test_a_statement_has_the_numbers_that_it_is_held_to(subtests):
    derived = {  # arithmetic on published numbers, as its source or metric says
        "rbslm-memory-gain-both-finished",  # 6/51 - 2/51
        "rbslm-bank-from-successes",  # 211/223
        "rbslm-baseline-accuracy-given-finished", "rbslm-memory-accuracy-given-finished",
        "dms-fast-perplexity",  # 9.226 - 9.200
    }  # fmt: skip
    for claim in CLAIMS.values():
        said = re.findall(r"\d[\d,]*\.?\d*", claim.statement)
        numbers = {float(text.replace(",", "")) for text in said}
        numbers |= {5.0} if "fivefold" in claim.statement else set()
        for number in {claim.value, claim.baseline} - {None}:
            with subtests.test(f"{claim.id} {number}"):
                assert number in numbers or claim.id in derived


def test_counts_of_open_rs_are_those_of_its_logs():
    logs = pd.read_csv(DATA / "openrs_checkpoints.csv", comment="#")
    rows = logs.set_index(["experiment", "step", "benchmark"])
    for name, *at in (
        ("openrs-rs3-aime24", 3, 50, "aime24"), ("openrs-rs3-aime24-gain", 3, 50, "aime24"),
        ("openrs-rs2-amc23-gain", 2, 50, "amc23"), ("openrs-rs2-math500-gain", 2, 50, "math500"),
        ("openrs-late-collapse", 2, 200, "math500"),
    ):  # fmt: skip
        assert CLAIMS[name].counts == tuple(rows.loc[tuple(at), ["correct", "items"]]), name
    collapse = CLAIMS["openrs-late-collapse"].baseline_counts
    assert collapse == tuple(rows.loc[(2, 50, "math500"), ["correct", "items"]])


def test_what_shares_a_contrast_is_judged_once():
    seen = {}
    for claim in CLAIMS.values():
        if claim.profiles and claim.rule not in ("arithmetic", "quoted"):
            contrast = {key: of for key, of in claim.contrast.items() if key != "within"}
            same = seen.setdefault(repr(sorted(contrast.items())), claim.id)
            assert same == claim.id, f"{claim.id} has the contrast of {same}"
        else:
            judged = re.search(r"judged by ([\w.-]+),", claim.scope)
            assert not judged or CLAIMS[judged[1]].profiles, claim.id


def test_what_the_baseline_notebook_can_decide_now():
    now = {claim.id: claim.profiles for claim in CLAIMS.values() if claim.notebook == "01_baseline"}
    both = ("laptop", "workstation")
    assert now["nab-voting-idle-below"] == now["rbslm-format-accuracy"] == both
    assert now["rbslm-baseline-accuracy"] == now["rbslm-baseline-finished"] == ("workstation",)


def test_arithmetic_is_decided_under_any_profile_and_a_floor_under_none_of_minutes():
    for claim in CLAIMS.values():
        if claim.rule == "arithmetic" and claim.profiles:
            assert claim.profiles == ("any",), claim.id
            assert all(claim.decided_by(size) for size in ("tour", "quick", "one's own"))
    quick = {claim.id for claim in CLAIMS.values() if "quick" in claim.profiles}
    assert quick == {"dms-delayed-eviction", "hier-frozen-posthoc-elements"}


def test_what_is_measured_is_shown_where_it_is_too_little_for_a_verdict():
    rows = [
        dict(source="laptop", problem_id=f"p{i}", arm=arm, model="bundled:smollm2-135m", seed=0,
             sample=0, temperature=0.2, weights_hash="w", policy="full", correct=bool(i % 2),
             extracted="1", method="number", compliant=arm == "format", finish="stop",
             prompt_tokens=9, new_tokens=9)
        for arm in ("plain", "format") for i in range(8)
    ]  # fmt: skip
    compliance = GAIN.contrast | {"measure": "compliance"}
    mine = [replace(GAIN, contrast=compliance), CELL]
    cell = {CELL.id: claims.Measurement(1.11, 1.11, 1.11, 1, "GiB")}
    found = measured_table(mine, pd.DataFrame(rows), "tour", cell).set_index("claim")
    assert list(found["on"]) == ["needs the laptop profile", "recomputed"]
    assert list(found["verdict"]) == ["", "differs"]
    assert list(found["measured"]) == ["100.0 points", "1.11 GiB"]
    assert "the laptop profile would" in found["reason"][GAIN.id]


GOOD = """
[sources]
"a paper" = "https://example.org"
[[claim]]
id = "a"
system = "dms"
statement = "One sentence."
metric = "accuracy"
value = 48
unit = "percent"
source = "a paper, table 1"
grade = "FULL"
notebook = "01_baseline"
profiles = ["laptop"]
model = ["Qwen3-1.7B"]
task = "published"
contrast = { measure = "accuracy", arm = "plain" }
rule = "size"
resolution = 10
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('rule = "size"', 'rule = "sizes"', "claim a: rule is 'sizes'; use one of direction"),
        ('notebook = "01_baseline"', 'notebook = "1"', "claim a: notebook is '1'"),
        (
            '"a paper, table 1"',
            '"hearsay"',
            "claim a: source must begin with one of [sources]: a p",
        ),
        ('grade = "FULL"', 'grade = "GOOD"', "claim a: grade is 'GOOD'"),
        ("resolution = 10", "", "claim a: resolution is missing; the rule size needs it"),
        ('unit = "percent"', "", "claim a: unit is missing"),
        ("value = 48", "value = 48\nvalu = 3", "claim a: valu is no field of a claim"),
        ('["laptop"]', '["desktop"]', "claim a: profiles may hold any, quick, laptop, workstation"),
        ('["laptop"]', "[]", "claim a: scope must say why no profile decides it"),
        ("value = 48", "value = 48\npairs = [1, 2]", "claim a: pairs must hold 4 numbers"),
        ('measure = "accuracy"', 'measure = "luck"', "claim a: contrast: measure 'luck'"),
        ('arm = "plain"', 'amr = "plain"', "claim a: contrast: contrast key 'amr' is unknown"),
        ('model = ["Qwen3-1.7B"]', "", "claim a: model must name the published models, as a list"),
        ('task = "published"', 'task = "mine"', "claim a: task is 'mine'; use one of published, o"),
        (
            "resolution = 10",
            "resolution = 10\ncheck = { measure = 'luck', arm = 'plain' }",
            "claim a: check: measure 'luck' is unknown",
        ),
        (
            'arm = "plain"',
            'arm = "plain", control = ["a"], by = 3, x = 1',
            "contrast key 'x' is unkn",
        ),
        ('id = "a"', "", "claim number 1: id is missing"),
        ("value = 48", "value = ", "claims.toml is no TOML file"),
    ],
)
def test_a_bad_file_is_named_by_claim_and_field(tmp_path, old, new, message):
    path = tmp_path / "claims.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        claims.load(path)


def test_an_id_used_twice_is_refused(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(GOOD)
    assert claims.load(path)[0].profiles == ("laptop",)
    path.write_text(GOOD + GOOD[GOOD.index("[[claim]]") :])
    with pytest.raises(ValueError, match="claim a: id is used twice"):
        claims.load(path)


# ------------------------------------------------------------------ audits


def test_audit_of_the_published_pairs():
    found = claims.audit(CLAIMS["rbslm-memory-gain"])
    assert found.reading == "p = 0.15: cannot tell 8 points from none; 292 pairs needed"
    assert (found.interval.low, found.interval.high) == pytest.approx((-1.5, 17.5), abs=0.6)
    assert claims.audit(CLAIMS["rbslm-memory-gain-two-fixes"]).n_needed == 1175


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        ("rbslm-baseline-accuracy", "30.9 to 49.8 percent from n = 100"),
        ("rbslm-memory-compliance", "p < 0.001: the counts bear a difference of 32.3 to 53.3"),
        ("rb-webarena-flash", "p = 0.0019: the counts bear a difference of 3.1 to 13.6 points"),
        ("openrs-sober-rs3-aime24", "p = 0.64: cannot tell 1 points from none; 348 runs per arm"),
        ("dms-aime24", "no counts published"),
        ("nab-weights-4b-8bit", "no counts published"),
    ],
)
def test_audit_readings(name, reading):
    assert claims.audit(CLAIMS[name]).reading.startswith(reading)


# ------------------------------------------------------------------ verdicts, rule by rule


def point(estimate, low, high, n=300, model=MODEL, **rest):
    return claims.Measurement(estimate, low, high, n, "points", model=model, **rest)


DOWN = replace(GAIN, value=40.0, baseline=48.0, pairs=None)
UNSIZED = replace(GAIN, value=None, baseline=None, pairs=None)
UNCOUNTED = replace(GAIN, pairs=None)
SIZE = replace(SHARP, rule="size", resolution=10.0)
ALONE = replace(CLAIMS["rbslm-baseline-accuracy"], profiles=("laptop",), task="published")
EQUAL = replace(GAIN, rule="equivalence", margin=3.0)
LOSES = replace(GAIN, rule="non_inferiority", margin=3.0)
CELL = CLAIMS["nab-weights-0.6b-16bit"]


@pytest.mark.parametrize(
    ("claim", "measurement", "word"),
    [
        (GAIN, point(6, 1, 11), "reproduced"),
        (GAIN, point(-6, -11, -1), "contradicted"),
        (GAIN, point(2, -3, 7), "undecided"),  # the published study spans -1.5 to 17.5 itself
        (SHARP, point(2, -3, 7), "not reproduced"),
        (UNCOUNTED, point(2, -3, 7), "not reproduced"),
        (SHARP, point(4, -1, 9), "undecided"),  # zero and 8 are both inside
        (SHARP, point(0, -7.3, 7.3), "not reproduced"),
        (SHARP, point(-9, -19, 1), "undecided"),  # excludes 8, but could not have found it
        (SHARP, point(3, 1, 5), "direction only"),
        (UNCOUNTED, point(3, 1, 5), "reproduced"),  # its own error is unknown: the reason says so
        (GAIN, point(3, 1, 5), "reproduced"),
        (SHARP, point(20, 14, 26), "direction only"),
        (DOWN, point(-6, -11, -1), "reproduced"),
        (DOWN, point(6, 1, 11), "contradicted"),
        (DOWN, point(-2, -7, 3), "not reproduced"),
        (DOWN, point(-3, -5, -1), "reproduced"),
        (UNSIZED, point(6, 1, 11), "reproduced"),
        (UNSIZED, point(0, -1, 1), "undecided"),
        (SIZE, point(7, 1, 13), "reproduced"),
        (SIZE, point(20, 14, 26), "not reproduced"),
        (SIZE, point(3, 1, 5), "not reproduced"),
        (SIZE, point(6, -2, 14), "undecided"),  # holds 8 and 0
        (SIZE, point(20, 5, 35), "undecided"),  # too wide to decide
        (SIZE, point(-20, -35, -5), "contradicted"),  # wide, yet on the other side
        (ALONE, point(43, 38, 48), "reproduced"),
        (ALONE, point(70, 65, 75), "not reproduced"),
        (ALONE, point(50, 45, 55), "reproduced"),  # 31 to 50 of 100 were published
        (ALONE, point(45, 33, 57), "undecided"),
        (EQUAL, point(0, -2.9, 2.9, inner=(-2.4, 2.4)), "reproduced"),
        (EQUAL, point(0, -3.4, 3.4, inner=(-2.9, 2.9)), "reproduced"),  # TOST looks at 90%
        (EQUAL, point(0, -2.9, 2.9), "reproduced"),  # no 90% interval: the 95% one is stricter
        (EQUAL, point(-2, -5, 1, inner=(-4.5, 0.5)), "undecided"),
        (EQUAL, point(-8, -12, -4, inner=(-11, -5)), "not reproduced"),
        (EQUAL, point(8, 4, 12, inner=(5, 11)), "not reproduced"),
        (LOSES, point(8, 4, 12, inner=(5, 11)), "reproduced"),  # a gain is no loss
        (LOSES, point(-1, -3.2, 1.2, inner=(-2.8, 0.8)), "reproduced"),
        (LOSES, point(-2, -5, 1, inner=(-4.5, 0.5)), "undecided"),
        (LOSES, point(-8, -12, -4, inner=(-11, -5)), "contradicted"),
        (GAIN, point(0, -3, 3, sides=(1.0, 1.0)), "floor"),
        (EQUAL, point(0, -1, 1, sides=(99.0, 97.0)), "ceiling"),
        (GAIN, point(3, 1, 5, sides=(4.0, 1.0)), "reproduced"),  # it did move
        (SHARP, point(0, -7, 7, sides=(10.0, 10.0)), "not reproduced"),
        (GAIN, point(6, 1, 11, failed="the check failed"), "floor"),
        (CELL, claims.Measurement(1.42, 1.42, 1.42, 1, "GiB"), "agrees"),
        (CELL, claims.Measurement(1.11, 1.11, 1.11, 1, "GiB"), "differs"),
    ],
)
def test_each_rule_gives_its_word(claim, measurement, word):
    found = verdict(claim, measurement, "laptop")
    assert found.word == word, found.reason
    assert found.word in VERDICTS and found.reason
    assert (found.claim_id, found.estimate, found.n) == (
        claim.id, measurement.estimate, measurement.n,
    )  # fmt: skip


def test_threshold_is_decided_by_its_bootstrap_interval():
    claim = replace(CLAIMS["nab-scale-threshold"], profiles=("laptop",))
    words = [
        verdict(claim, claims.Measurement(*bounds, 100, "GiB"), "laptop").word
        for bounds in ((4.0, 3.5, 4.6), (2.0, 1.5, 2.6), (4.0, 1.0, 8.0))
    ]
    assert words == ["holds here", "not here", "undecided"]


def test_only_the_published_model_and_task_is_a_reproduction():
    gain = [point(6, 1, 11, model=name) for name in (MODEL, "bundled:smollm2-135m", "")]
    found = [verdict(GAIN, each, "laptop") for each in gain]
    assert [each.on for each in found] == ["published model and task", *2 * ["stand-in model"]]
    assert [each.word for each in found] == ["reproduced", "holds here", "holds here"]
    other = verdict(replace(GAIN, task="other"), gain[0], "laptop")
    assert (other.on, other.word) == ("published model, other task", "holds here")
    loss = verdict(GAIN, point(-6, -11, -1, model="x"), "laptop")
    assert (loss.on, loss.word) == ("stand-in model", "opposite here")
    assert {each.on for each in (*found, other)} < {*CLASSES}


def test_what_nothing_measures_says_what_would_help():
    reach = verdict(CLAIMS["rbslm-memory-gain"], point(6, 1, 11), "laptop")
    assert (reach.word, reach.on) == ("", "needs the workstation profile")
    assert "workstation profile would decide" in reach.reason
    counted = verdict(CLAIMS["rb-webarena-flash"], None, "workstation")
    assert (counted.on, counted.word) == ("audit", "bears it") and "WebArena" in counted.reason
    unsure = verdict(replace(GAIN, profiles=(), scope="why"), None, "workstation")
    assert (unsure.on, unsure.word) == ("audit", "cannot tell")
    impossible = verdict(CLAIMS["rb-webarena-pro"], None, "workstation")
    assert impossible.word == "impossible" and "46.7 is no share of 684" in impossible.reason
    never = verdict(CLAIMS["dms-throughput"], None, "workstation")
    assert (never.on, never.word) == ("beyond this kit", "")
    quoted = verdict(replace(GAIN, rule="quoted"), None, "laptop")
    assert (quoted.on, quoted.word) == ("documentary", "quoted")
    tour = verdict(GAIN, point(6, 1, 11), "tour")
    assert tour.on == "needs the laptop profile" and not tour.word
    waiting = verdict(GAIN, None, "laptop")
    assert (waiting.on, waiting.word) == ("not measured yet", "")
    assert waiting.reason == "not measured yet: run 01_baseline on smollm2-135m or Qwen3-1.7B"


def test_a_claim_that_the_laptop_profile_decides_takes_records_of_each_model_it_may_run_on():
    larger = larger_tables(read_profile("laptop")[LARGER])
    for model in ["", *larger]:
        for stage in load_stages("laptop", model=model):
            own = [claim for claim in CLAIMS.values() if claim.notebook == stage.name
                   and claim.decided_by("laptop") and "measure" in claim.contrast]  # fmt: skip
            for claim in own:
                for contrast in filter(None, (claim.contrast, claim.check)):
                    arm, by = contrast["arm"], contrast.get("by", "arm")
                    row = pd.DataFrame([{"model": stage.models[0], by: arm}])
                    chosen = {key: contrast[key] for key in ("by", "model") if key in contrast}
                    assert len(contrasts._select(chosen, arm, row)) == 1, (claim.id, stage.models)


def test_a_claim_holds_only_over_all_of_its_controls():
    rng = np.random.default_rng(1)
    plain = (rng.random((300, 1)) < 0.3).astype(float)
    format_ = np.maximum(plain, rng.random((300, 1)) < 0.2)
    arms = {"plain": plain, "format": format_, "memory": format_}
    contrast = {"measure": "accuracy", "arm": "memory", "control": ["plain", "format"]}
    claim = replace(UNCOUNTED, contrast=contrast)
    found = claims.measure(claim, records(arms))
    assert (found.control, found.beaten, found.estimate) == ("format", ("plain",), 0.0)
    said = verdict(claim, found, "laptop")
    assert said.word == "not reproduced" and "it holds over plain" in said.reason
    assert claims.measure(claim, records({"plain": plain, "memory": format_})) is None
    better = records(arms | {"memory": np.maximum(format_, rng.random((300, 1)) < 0.2)})
    both = claims.measure(claim, better)
    assert (
        both.beaten == ("plain", "format") and verdict(claim, both, "laptop").word == "reproduced"
    )
    dropped = replace(DOWN, contrast=contrast | {"arm": "plain", "control": ["format", "memory"]})
    assert claims.measure(dropped, better).control == "format", "of losses the smallest"


def test_a_check_that_fails_leaves_the_measure_at_its_floor():
    check = {"measure": "compliance", "arm": "format", "control": "plain", "above": 10}
    claim = replace(GAIN, check=check)
    table = records({"plain": np.zeros((99, 1)), "format": np.ones((99, 1))})
    failed = verdict(claim, claims.measure(claim, table), "laptop")
    assert failed.word == "floor" and "compliance of format against plain came" in failed.reason
    table["compliant"] = table["arm"] == "format"
    assert verdict(claim, claims.measure(claim, table), "laptop").word in (
        "reproduced",
        "direction only",
    )


def test_two_studies_of_one_truth_rarely_differ():
    rng, words = np.random.default_rng(2), []
    for _ in range(400):  # 40 of 100 were published; 300 problems here, the truth is the same
        there, here = rng.binomial(100, 0.4), stats.wilson(int(rng.binomial(300, 0.4)), 300)
        claim = replace(ALONE, value=float(there), counts=(int(there), 100))
        m = claims.Measurement(*here.percent, 300, "percent", model=MODEL)
        words.append(verdict(claim, m, "laptop").word)
    assert words.count("not reproduced") <= 0.05 * 400 + 9, "35% by the published point alone"
    assert words.count("reproduced") > 0.9 * 400


def test_shares_that_no_count_gives_are_not_audited():
    claim = replace(UNCOUNTED, value=80.0, baseline=62.9, n=40)
    assert claims.impossible(claim) == ["62.9"] and claims.audit(claim).interval is None
    assert claims.impossible(replace(claim, baseline=62.5)) == []
    assert claims.impossible(replace(claim, baseline_counts=(25, 40))) == []


def test_a_run_too_small_says_how_many_problems_it_needs():
    # 60 pairs at the published discordance; the published size needs 292
    small = verdict(GAIN, measured(10, 5, 60), "laptop")
    assert small.word == "undecided"
    needed = int(re.search(r"80% power takes about (\d+)", small.reason)[1])
    assert 250 < needed < 350


# ------------------------------------------------------------------ error rates, exact


def test_a_true_effect_at_the_required_n_is_reproduced_in_eighty_percent():
    rates = word_rates(SHARP, 292, 0.16, 0.08)
    assert rates["reproduced"] + rates["direction only"] == pytest.approx(0.80, abs=0.02)
    assert rates["contradicted"] < 0.001
    assert rates["not reproduced"] + rates["direction only"] < 0.05


def test_a_null_effect_at_the_required_n_is_rarely_reproduced():
    rates = word_rates(SHARP, 292, 0.12, 0.12)
    assert rates["reproduced"] + rates["direction only"] <= 0.03  # one side of a two-sided 5% test
    assert rates["contradicted"] <= 0.03
    assert rates["not reproduced"] > 0.7
    assert sum(rates.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("wins", "losses"), [(0.12, 0.12), (0.16, 0.08)])
def test_an_underpowered_run_comes_out_inconclusive(wins, losses):
    rates = word_rates(SHARP, 60, wins, losses)
    assert rates["undecided"] > 0.7
    assert rates["not reproduced"] < 0.03
    if wins == losses:
        assert rates["reproduced"] <= 0.03 and rates["undecided"] > 0.9


def test_equivalence_is_shown_with_power_and_refuted_at_the_margin():
    for rule in ("equivalence", "non_inferiority"):
        claim = replace(GAIN, rule=rule, margin=8.0)
        assert word_rates(claim, 292, 0.12, 0.12)["reproduced"] > 0.7
        assert word_rates(claim, 292, 0.08, 0.16)["reproduced"] <= 0.055
    assert word_rates(replace(claim, rule="equivalence"), 40, 0.12, 0.12)["undecided"] > 0.9


def test_studies_simulated_from_nested_records_keep_the_null_rate():
    rng, found = np.random.default_rng(4), []
    table = records({arm: np.zeros((60, 3)) for arm in ("plain", "format")})
    for _ in range(100):
        skill = np.repeat(rng.beta(1, 2, size=60), 3)  # the same problems in both arms
        table["correct"] = rng.random(360) < np.tile(skill, 2)
        found.append(verdict(GAIN, claims.measure(GAIN, table), "laptop").word)
    shares = pd.Series(found).value_counts(normalize=True)
    assert shares.get("reproduced", 0) <= 0.05  # nominal 0.025
    assert 0 < shares.get("reproduced", 0) + shares.get("contradicted", 0) <= 0.09


# ------------------------------------------------------------------ measuring from records


def test_paired_by_problem_whatever_the_order_and_only_where_both_arms_are():
    plain = np.array([[0], [1], [0], [1], [np.nan], [1.0]])
    format_ = np.array([[1], [1], [1], [0], [1], [np.nan]])
    table = records({"plain": plain, "format": format_}).sample(frac=1, random_state=3)
    found = claims.measure(GAIN, table)
    oracle = stats.tango(2, 1, 4)  # p0 and p2 won, p3 lost, p1 equal
    assert (found.estimate, found.low, found.high) == pytest.approx(
        (25.0, 100 * oracle.low, 100 * oracle.high)
    )
    assert (found.n, found.records, found.unit) == (4, 8, "points")
    assert found.origin == "01_baseline"
    assert found.inner[0] > found.low


def test_samples_are_nested_in_their_problem():
    plain, format_ = np.zeros((12, 4)), np.zeros((12, 4))
    format_[:6, 0] = 1  # six problems gain a quarter each
    format_[6, :] = 1  # one gains all
    found = claims.measure(GAIN, records({"plain": plain, "format": format_}))
    assert found.estimate == pytest.approx(100 * (6 * 0.25 + 1) / 12)
    assert (found.n, found.records) == (12, 96)


def test_trainings_are_crossed_with_problems_and_their_samples_nested():
    rng = np.random.default_rng(1)
    values = rng.random((40, 3, 2)) < rng.random((40, 1, 1)) + np.reshape(
        [0.0, 0.3, 0.1], (1, 3, 1)
    )
    trained = {
        seed: records({"format": values[:, seed].astype(float)}, weights_hash=f"w{seed}")
        for seed in range(3)
    }
    plain = rng.random((40, 2)) < 0.3
    pooled = contrasts.pooled("format", trained)
    whole = pd.concat([pooled, records({"plain": plain.astype(float)}, weights_hash="", model="")])
    contrast = {"measure": "accuracy", "arm": "format", "control": "plain"}
    found = contrasts.compute(contrast, whole)
    sides = values.astype(float), plain.astype(float)
    oracle = stats.paired_interval(*sides, rng=np.random.default_rng(0))
    assert (found.estimate, found.low, found.high) == pytest.approx(oracle.percent)
    assert (found.n, found.records) == (40, 40 * 8)
    alone = contrasts.compute({"measure": "accuracy", "arm": "format"}, pooled)
    oracle = stats.mean_interval(sides[0], rng=np.random.default_rng(0))
    assert (alone.low, alone.high) == pytest.approx(oracle.percent[1:])
    as_samples = pooled.assign(seed=pooled["training"]).drop(columns="training")
    nested = contrasts.compute(contrast, pd.concat([as_samples, whole[whole["arm"] == "plain"]]))
    assert nested.estimate == pytest.approx(found.estimate)
    assert nested.high - nested.low < 0.8 * (found.high - found.low)


def test_each_training_votes_for_itself():
    answers = {0: ["2", "2", "3"], 1: ["3", "3", "2"], 2: ["3", "4", "3"]}
    trained = {
        seed: records({"plain": np.array([[a == "2" for a in said]], float)}, extracted=said)
        for seed, said in answers.items()
    }
    assert single("majority", contrasts.pooled("plain", trained)).estimate == pytest.approx(100 / 3)


def test_absent_arms_are_not_measured():
    table = records({"plain": np.ones((5, 1))})
    assert claims.measure(GAIN, table) is None
    assert claims.measure(GAIN, table.iloc[:0]) is None
    assert claims.measure(GAIN, pd.DataFrame()) is None
    assert claims.measure(CLAIMS["nab-kv-4b-x1"], table) is None
    other = records({"plain": np.ones((5, 1)), "format": np.ones((5, 1))}, model="hub:else")
    assert claims.measure(GAIN, other) is None


def single(measure, table, **rest):
    return contrasts.compute({"measure": measure, "arm": "plain", **rest}, table)


def test_measures_of_one_arm():
    table = records({"plain": np.array([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]).T.astype(float)})
    table["finish"] = ["stop"] * 3 + ["length"] * 3 + ["stop"] * 4
    table["new_tokens"] = [100] * 9 + [5000]
    table["compliant"] = [True] * 2 + [False] * 8
    table["method"] = ["boxed"] * 7 + ["none"] * 3
    assert single("accuracy", table).estimate == pytest.approx(40)
    assert single("finished", table).estimate == pytest.approx(70)
    assert single("compliance", table).estimate == pytest.approx(20)
    assert single("boxed", table).estimate == pytest.approx(70)
    given = single("accuracy_given_finished", table)
    oracle = stats.wilson(3, 7)
    assert (given.estimate, given.n) == (pytest.approx(300 / 7), 7)
    assert (given.low, given.high) == pytest.approx((100 * oracle.low, 100 * oracle.high))
    # within a context of 4,096 the last one is unfinished, and what is unfinished is not correct
    assert single("finished", table, within=4096).estimate == pytest.approx(60)
    assert single("accuracy", table, within=4096).estimate == pytest.approx(30)
    assert single("accuracy", table).unit == "percent"
    nothing = table.assign(finish="length")
    assert single("accuracy_given_finished", nothing) is None


def test_majority_against_one_sample():
    answers = [["2", "3", "2"], ["", "", "5"], ["1", "4", "4"], ["7", "8", "9"]]
    gold = ["2", "5", "1", "7"]
    right = np.array([[a == g for a in row] for row, g in zip(answers, gold, strict=True)])
    table = records({"plain": right.astype(float)}, extracted=sum(answers, []))
    table = table.sample(
        frac=1, random_state=1
    )  # the tie of the last problem must not depend on it
    assert single("majority", table).estimate == pytest.approx(75)  # right, right, wrong, right
    both = single("majority", table, control_measure="accuracy")
    assert both.estimate == pytest.approx(75 - 100 * (2 + 1 + 1 + 1) / 12)
    assert (both.n, both.records) == (4, 12)


def test_one_sample_or_greedy_copies_are_no_vote():
    idle = CLAIMS["nab-voting-idle-below"]
    assert claims.measure(idle, records({"plain": np.ones((300, 1))})) is None
    greedy = records({"plain": np.ones((300, 5))}, temperature=0.0)
    assert claims.measure(idle, greedy) is None
    assert single("majority", greedy) is None
    sampled = records({"plain": np.ones((300, 5))})
    assert verdict(idle, claims.measure(idle, sampled), "laptop").word == "ceiling"
    sampled["correct"] = sampled["problem_id"].isin([f"p{i}" for i in range(90)])
    sampled["extracted"] = sampled["correct"].map({True: "1", False: "2"})
    assert verdict(idle, claims.measure(idle, sampled), "laptop").word == "holds here"
    greedy["sample"] += 5
    both = pd.concat([sampled, greedy])
    assert claims.measure(idle, both).records == 1500
    with pytest.raises(ValueError, match="more than one temperature: 0.0, 0.7"):
        single("accuracy", both)


def test_filters_restrict_the_records():
    easy = records({"plain": np.ones((20, 1))}, level=1, model="hub:Qwen/Qwen3-1.7B")
    hard = records(
        {"plain": np.zeros((20, 1))}, level=4, source="math", model="hub:Qwen/Qwen3-1.7B"
    )
    table = pd.concat([easy, hard], ignore_index=True)
    assert single("accuracy", table).estimate == 50
    assert single("accuracy", table, level=[3, 4]).estimate == 0
    assert single("accuracy", table, source="laptop", model="qwen3-1.7b").estimate == 100


def test_policies_are_arms_where_a_contrast_says_so():
    full = records({"plain": np.ones((30, 1))})
    evicted = records({"plain": np.zeros((30, 1))}, policy="dms-4x")
    table = pd.concat([full, evicted], ignore_index=True)
    found = claims.measure(CLAIMS["dms-short-context-loss"], table)
    assert found.estimate == -100
    found = verdict(CLAIMS["dms-short-context-loss"], found, "laptop")
    assert found.word == "opposite here"
    with pytest.raises(ValueError, match="'plain' has records of more than one policy: dms-4x, f"):
        single("accuracy", table)


def test_pooling_and_double_counting_are_refused_by_name():
    arms = {"plain": np.ones((5, 1)), "format": np.ones((5, 1))}
    two = pd.concat([records(arms), records(arms, model=f"{MODEL}-Base")])
    with pytest.raises(ValueError, match="claim rbslm-format-accuracy: .*more than one model"):
        claims.measure(GAIN, two)
    with pytest.raises(ValueError, match="two records of problem 'p0', seed 0, sample 0"):
        claims.measure(GAIN, pd.concat([records(arms), records(arms)]))


def test_measured_table_joins_records_and_given_measurements():
    rng = np.random.default_rng(0)
    plain = (rng.random((300, 1)) < 0.3).astype(float)
    table = records({"plain": plain, "format": np.maximum(plain, rng.random((300, 1)) < 0.1)})
    table["compliant"] = table["arm"] == "format"
    given = {"nab-kv-4b-x1": claims.Measurement(4.12, 4.12, 4.12, 1, "GiB")}
    found = measured_table(CLAIMS.values(), table, "laptop", given).set_index("claim")
    assert list(found.reset_index().columns) == COLUMNS
    assert len(found) == len(CLAIMS)
    assert found.loc["rbslm-format-accuracy", "verdict"] == "holds here"
    assert found.loc["rbslm-format-accuracy", "on"] == "published model, other task"
    assert found.loc["rbslm-format-accuracy", "n"] == 300
    assert found.loc["rbslm-format-accuracy", "published"] == "direction"
    assert found.loc["rbslm-memory-gain", "published"] == "48 against 40 percent"
    assert found.loc["nab-kv-4b-x1", "verdict"] == "agrees"
    assert found.loc["rbslm-baseline-accuracy", "on"] == "needs the workstation profile"
    assert pd.isna(found.loc["rbslm-baseline-accuracy", "n"])
    assert found.loc["nab-kv-32b-x16", "verdict"] == ""
    assert found.loc["nab-kv-32b-x16", "reason"] == "not measured yet: run 06_memory_budget"
    assert set(found["verdict"]) <= {*VERDICTS, ""}


def test_claims_need_no_model_library():
    heavy = "{'torch', 'lancedb', 'transformers'}"
    code = f"import sys, kit.analysis.claims; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "set()"
    assert (DATA / "claims.toml").exists()


def test_a_mean_of_values_has_students_interval():
    values = [0.3, -0.1, 0.5, 0.2, 0.9]
    found = contrasts.mean_of(values, "nats")
    for level, ends in ((0.95, (found.low, found.high)), (0.90, found.inner)):
        expected = ttest_1samp(values, 0).confidence_interval(level)
        assert ends == pytest.approx((expected.low, expected.high))
    assert (found.estimate, found.n) == (pytest.approx(0.36), 5)
    alone = contrasts.mean_of([-0.3], "nats")
    assert (alone.low, alone.high) == (-np.inf, np.inf), "one value says nothing of its spread"
    alone = contrasts.mean_of([0.3], "nats")
    assert (alone.low, alone.estimate, alone.high) == (0, pytest.approx(0.3), np.inf)


def test_a_mean_of_positive_values_has_an_interval_of_its_logarithm():
    values = np.array([0.3, 0.1, 0.5, 0.2, 2.9])
    without = np.log([np.delete(values, i).mean() for i in range(5)])
    error = (4 / 5 * ((without - without.mean()) ** 2).sum()) ** 0.5  # the jackknife's
    found = contrasts.mean_of(values, "nats")
    for level, ends in ((0.975, (found.low, found.high)), (0.95, found.inner)):
        half = student.ppf(level, 4) * error
        assert ends == pytest.approx((0.8 * np.exp(-half), 0.8 * np.exp(half)))
    assert found.estimate == pytest.approx(0.8) and found.low > 0
    other = np.array([0.2, 0.1, 0.2, 0.2, 0.8])
    less = np.log([np.delete(other, i).mean() for i in range(5)])
    error = (4 / 5 * ((without - less - (without - less).mean()) ** 2).sum()) ** 0.5
    found = contrasts.excess_of(values, other)
    ratio, half = values.mean() / other.mean(), student.ppf(0.975, 4) * error
    assert found.estimate == pytest.approx(100 * (ratio - 1))
    assert found.low == pytest.approx(100 * (ratio * np.exp(-half) - 1))
    assert found.high == pytest.approx(100 * (ratio * np.exp(half) - 1))
    assert contrasts.excess_of(3 * other, other).low == pytest.approx(200), "paired"
    assert contrasts.excess_of(values, other - 0.1) is None


def test_skewed_divergences_of_eight_sequences_are_covered_better_than_by_t():
    draw, spread, reps = np.random.default_rng(5), 1.0, 1500
    hard = draw.normal(size=(reps, 8))  # a sequence is hard for both policies
    one, two = (
        np.exp(spread * (0.8**0.5 * hard + 0.2**0.5 * draw.normal(size=(reps, 8))))
        for _ in range(2)
    )
    truth = np.exp(spread**2 / 2)
    level = [contrasts.mean_of(row, "nats") for row in one]
    ratio = [contrasts.excess_of(3 * a, b) for a, b in zip(one, two)]
    covered = np.mean([found.low <= truth <= found.high for found in level])
    paired = np.mean([found.low <= 200 <= found.high for found in ratio])
    t = np.mean([c.low <= truth <= c.high for c in
                 (ttest_1samp(row, 0).confidence_interval() for row in one)])  # fmt: skip
    assert t < 0.86 and covered > t + 0.04 and paired > 0.90


def test_a_share_has_wilsons_interval_and_no_other():
    agreed = [1] * 2 + [0] * 40
    found = contrasts.share_of(agreed)
    assert found.texts() == ("4.8 percent", "1.3 to 15.8") and found.n == 42
    assert found.inner == pytest.approx(stats.wilson(2, 42, 0.9).percent[1:])
    for values, unit in ((agreed, "agreement"), ([0.4, 0.5], "percent"), ([True] * 3, "x")):
        with pytest.raises(ValueError, match="a share has no t interval"):
            contrasts.mean_of(values, unit)
    assert contrasts.mean_of([0.0, 0.0], "nats").estimate == 0, "a KL may be zero"
    with pytest.raises(ValueError, match="0 or 1"):
        contrasts.share_of([0.5])


@pytest.mark.parametrize(
    "made, texts",
    [
        (contrasts.exact(36_000, "completions"), ("36000 completions", "")),
        (contrasts.exact(4.62437, "billion"), ("4.624 billion", "")),
        (contrasts.mean_of([-0.25, 0.75], "nats"), ("0.25 nats", "-6.103 to 6.603")),
        (contrasts.Measurement(-1.84, -7.73, 4.2, 112, "points"), ("-1.8 points", "-7.7 to 4.2")),
    ],
)
def test_what_was_not_sampled_has_no_interval(made, texts):
    assert made.texts() == texts


def test_answers_of_several_probes_are_never_measured_as_one():
    claim = CLAIMS["hier-fetched-over-generic"]
    one = records({arm: np.ones((9, 1)) for arm in ("fetched", "shared")})
    both = pd.concat([one, one])  # by options and free, as the store of 05 has them
    found = measured_table([claim], both, "laptop").iloc[0]
    assert (found["on"], found["measured"]) == ("not measured yet", "")


def test_claims_on_facts_name_their_probe_and_arms_that_their_profiles_train():
    asked = {"plain", "fetched", "fetched-late", "rag", "without subtree"}
    mine = [c for c in CLAIMS.values() if c.notebook == "05_parametric" and "measure" in c.contrast]
    assert len(mine) > 7
    for claim in mine:
        elements = claim.contrast.get("family") == "elements"
        assert claim.contrast["probe"] == ("free" if elements else "options"), claim.id
        for profile in claim.profiles:
            knobs = read_profile(profile)["05_parametric"]
            arms = asked | {*knobs["ARMS"]}
            if "scratch" in knobs["ANCHORS"]:
                arms |= {f"scratch {arm}" for arm in scratch.ARMS}
            assert {claim.contrast["arm"], claim.contrast["control"]} <= arms, (claim.id, profile)
