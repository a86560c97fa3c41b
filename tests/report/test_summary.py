"""What a run says before it starts, after each stage, and at its end."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kit import estimate
from kit.pipeline.stages import load_stages
from kit.report import summary

ROW = {"claim": "a", "published": "5 points", "measured": "4 points", "interval": "1 to 7",
       "on": "stand-in model", "verdict": "holds here"}  # fmt: skip
ROWS = [
    ROW | {"claim": "b", "on": "needs the laptop profile", "verdict": ""},
    ROW,
    ROW | {"claim": "c", "measured": "", "interval": "", "on": "audit", "verdict": "bears it"},
]


@pytest.fixture
def stages(tmp_path):
    return [replace(stage, folder=tmp_path) for stage in load_stages("quick")]


def found(profiles=("quick", "laptop", "workstation"), device="cpu") -> dict:
    """As `estimate.measure`: a stage takes as many minutes as its number says."""
    rows = {
        stage.name: {
            "seconds": 60 * int(stage.number),
            "decides": 1,
            "all": 9,
            "weak": [["one-claim", 28, 3.5]] if stage.number == "02" else [],
        }
        for stage in load_stages("quick")
    }
    speed = {"start": 5, "decoded": 120, "trained": 210, "device": device, "dtype": "float32"}
    return {"rates": speed, "profiles": dict.fromkeys(profiles, rows)}


def test_before_it_starts_a_run_says_minutes_and_claims(monkeypatch, tmp_path, capsys, stages):
    monkeypatch.setattr(summary, "run_dir", lambda profile: tmp_path)
    monkeypatch.setattr(estimate, "measure", lambda *profiles: found(profiles))
    times = summary.estimated("quick", stages[1:3])
    said = capsys.readouterr().out
    assert times["02_strategies"] == 120
    assert "about 3 minutes at 120 tokens a second decoded and 210 trained (float32, cpu)" in said
    assert "  02_strategies          2:00   decides 1 of 9 claims" in said and "03_dms" not in said
    assert said.count("too small for one-claim: 4% power at n = 28") == 1
    assert "GPU" not in said
    monkeypatch.setattr(estimate, "measure", lambda *profiles: found(profiles, "cuda"))
    summary.estimated("quick", stages)
    assert "PROFILE=workstation is the published size, about 50 hours" in capsys.readouterr().out
    summary.larger("quick")
    assert "PROFILE=workstation: about 50 hours on a GPU of 48 GB; decides" in (
        capsys.readouterr().out
    )


def test_a_model_is_chosen_once_and_not_where_one_is_named(monkeypatch, tmp_path, capsys):
    asked = []
    failed = SimpleNamespace(returncode=2)
    monkeypatch.setattr(summary, "run_dir", lambda profile: tmp_path)
    monkeypatch.setattr(summary.subprocess, "run", lambda c, **_: asked.append(c[-1]) or failed)
    summary.choose("quick")
    summary.choose("laptop")
    assert asked == ["laptop"] and "MODEL=NAME names another" in capsys.readouterr().out
    (tmp_path / "model.json").write_text('{"model": "m", "why": []}')
    summary.choose("laptop")
    assert "model.json has the model of some notebooks: m" in capsys.readouterr().out
    (tmp_path / "model.json").unlink()
    monkeypatch.setenv("KIT_MODEL", "m")
    summary.choose("laptop")
    assert asked == ["laptop"]


def test_no_run_waits_for_its_estimate(monkeypatch, tmp_path, capsys, stages):
    monkeypatch.setattr(summary, "run_dir", lambda profile: tmp_path)
    monkeypatch.setattr(estimate, "measure", lambda *profiles: {})
    assert summary.estimated("quick", stages) == {}
    assert "could not be estimated" in capsys.readouterr().out
    assert summary.estimated("quick", stages[-1:]) == {}, "07 decodes nothing"
    summary.larger("quick")
    assert capsys.readouterr().out == ""


def test_after_a_stage_its_verdicts_and_the_clock(capsys, stages):
    one = stages[1]
    one.results_file.parent.mkdir(parents=True)
    one.results_file.write_text(json.dumps({"verdicts": ROWS}))
    summary.after(stages, {"01_baseline": 125.0})(one)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "0:00 of about 2:05, 3 claims:"
    assert lines[1].split("  ")[0] == "holds here"
    assert lines[1].endswith("a: 4 points [1, 7], published 5 points (stand-in model)")
    assert lines[2] == "needs the laptop profile b: 4 points [1, 7], published 5 points"
    assert lines[3] == "not measured      1 that nothing here measures"
    summary.after([], {})(stages[0])
    assert capsys.readouterr().out.strip() == "0:00"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(10, "about a minute"), (600, "about 10 minutes"), (10_000, "about 2.8 hours"),
     (10**6, "about 12 days"), (10**8, "more than 100 days")],
)  # fmt: skip
def test_a_long_time_is_said_in_its_unit(seconds, text):
    assert summary.longer(seconds) == text
