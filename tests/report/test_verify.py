"""Judging a run again: what was changed, lost or damaged is named; a report; no model."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest

from kit import cli, paths
from kit.analysis import claims
from kit.report import bundle, exhibits, verify
from tests.runs import CAPTION, FIGURE, bundled, published, tampered

NAMED = ["notebooks/01_baseline.ipynb", "exhibits/01_baseline/format-against-plain.svg",
         "claims.toml", "records.parquet", "results/01_baseline.json", "LICENSE"]  # fmt: skip


def test_what_was_changed_or_added_is_named():
    changed = tampered(bundled(), "extra.txt", lambda data: b"new")
    assert verify.check(changed).differences == ["extra.txt is not in SHA256SUMS"]
    for name in NAMED:
        changed = tampered(changed, name, lambda data: data + b" ")
    differences = verify.check(changed).differences
    for name in NAMED:
        assert f"{name} is not what SHA256SUMS says: it was changed" in differences


@pytest.mark.parametrize("name", NAMED)
def test_what_is_missing_is_named(name):
    assert f"{name} is missing" in verify.check(tampered(bundled(), name, None)).differences


def test_records_that_do_not_bear_the_results_are_found_though_the_hashes_are_made_anew():
    made = bundled()

    def better(data: bytes) -> bytes:
        frame, buffer = pd.read_parquet(io.BytesIO(data)), io.BytesIO()
        frame.loc[frame["arm"] == "plain", "correct"] = True
        frame.to_parquet(buffer, index=False)
        return buffer.getvalue()

    wrong = verify.check(tampered(made, "records.parquet", better)).differences
    assert any(line.startswith("rbslm-format-") and "from the records" in line for line in wrong)
    assert any(
        "answers are graded otherwise from their texts, such as '1234567'" in w for w in wrong
    )
    assert f"01_baseline, table {CAPTION!r} is not what the records say" in wrong

    def reproduced(data: bytes) -> bytes:
        results = json.loads(data)
        for row in results["verdicts"]:
            row["verdict"] = "reproduced"
        return json.dumps(results).encode()

    wrong = verify.check(tampered(made, "results/07_verdicts.json", reproduced)).differences
    assert any("rbslm-memory-gain: verdict is 'reproduced' in the results" in w for w in wrong)


def _json(change):
    """A change of bytes that are JSON, whose value `change` alters."""

    def changed(data: bytes) -> bytes:
        change(value := json.loads(data))
        return json.dumps(value).encode()

    return changed


def _records(**columns):
    """A change of records: values of the first row."""

    def changed(data: bytes) -> bytes:
        frame, buffer = pd.read_parquet(io.BytesIO(data)), io.BytesIO()
        for name, value in columns.items():
            frame.loc[0, name] = value
        frame.to_parquet(buffer, index=False)
        return buffer.getvalue()

    return changed


TABLE, DRAWN = (exhibits.slug(caption) for caption in (CAPTION, FIGURE))
AT = "exhibits/01_baseline"
FOLLOWS = [  # in a bundle whose sums are made anew: what was changed, and words of who names it
    ("records.parquet", _records(text="Answer: 3 and 1/7"), "answers are graded otherwise"),
    ("records.parquet", _records(correct=True, reason="equal"), "answers are graded otherwise"),
    ("records.parquet", _records(answer="3"), "gold answer of 1 records is not that of data/"),
    ("results/01_baseline.json", _json(lambda of: of["keys"].pop()), "table"),
    ("results/07_verdicts.json", _json(lambda of: of["verdicts"][0].update(verdict="reproduced")),
     "verdict is 'reproduced' in the results"),
    ("results/07_verdicts.json", _json(lambda of: of.update(headline=["All is well."])),
     "'headline' is not what the verdicts say"),
    (f"{AT}/exhibits.json", _json(lambda of: of[2]["rows"][0].__setitem__(4, "99.0")),
     f"table {CAPTION!r} is not what the records say"),
    (f"{AT}/exhibits.json", _json(lambda of: of[0].update(alt="It helps.")),
     f"figure {FIGURE!r}: its words"),
    (f"{AT}/{TABLE}.csv", lambda data: data.replace(b",112,", b",113,", 1), f"{TABLE}.csv is not"),
    (f"{AT}/{TABLE}.tex", lambda data: data.replace(b"112", b"113", 1), f"{TABLE}.tex is not"),
    (f"{AT}/{DRAWN}.svg", lambda data: data.replace(b"0072b2", b"d55e00", 1), f"{DRAWN}.svg is"),
    (f"{AT}/{DRAWN}.pdf", lambda data: data.replace(b"/Count 1", b"/Count 2"), f"{DRAWN}.pdf is"),
    (f"{AT}/{DRAWN}.png", lambda data: b"", f"{DRAWN}.png is not"),
    ("paper/macros.tex", lambda data: data.replace(b"112", b"113", 1), "macros.tex is not"),
    ("paper/paper.tex", lambda data: data + b"%", "paper.tex is not"),
    ("claims.toml", lambda data: data.replace(b"margin = ", b"margin = 9", 1), "own claims.toml"),
]  # fmt: skip
OWN = {"LICENSE", "requirements.lock", "evictors/smollm2-135m-seed0-4x.safetensors"}
ALONE = [*OWN, "README.md", "report.html",
         "notebooks/01_baseline.ipynb", "notebooks/01_baseline.html", "status/01_baseline.json",
         "ro-crate-metadata.json", f"{AT}/format-against-plain.png",
]  # fmt: skip


def test_what_follows_from_records_is_named_though_the_sums_are_made_anew():
    made, told = bundled(), []
    for names in ({"records.parquet", "claims.toml"}, {name for name, *_ in FOLLOWS}):
        changed = made
        for name, change, _ in FOLLOWS:
            if name in names:
                changed = tampered(changed, name, change, sign=True)
        checked = verify.check(changed)
        told += checked.differences + [line for line in checked.unchecked if "claims.toml" in line]
    assert not [line for line in told if bundle.SUMS in line]
    assert [name for name, _, words in FOLLOWS if not any(words in line for line in told)] == []


def test_what_only_a_hash_vouches_for_is_listed_whole():
    made = changed = bundled()
    for name in ALONE:
        changed = tampered(changed, name, lambda data: data + b" ", sign=True)
    assert verify.check(changed).differences == []  # none of them is made again
    for place, rest in ((changed, set()), (made, OWN)):
        lines = verify.check(place).unchecked
        (line,) = [line for line in lines if line.startswith(verify.BY_HASH)]
        told = {*line.removeprefix(f"{verify.BY_HASH}: ").split(", ")}
        assert {*ALONE} - rest <= told
    followed = {name for name, *_ in FOLLOWS} | {bundle.SUMS, "results/01_baseline.json"}
    followed |= {"exhibits/07_verdicts/exhibits.json"}  # which is empty
    followed -= {f"{AT}/exhibits.json"}  # it has a figure that no record holds
    of_the_kit = {*bundle.BESIDE, *bundle.evictors()}
    assert told == {*bundle.read(made).files} - followed - of_the_kit


def test_records_that_are_gone_are_counted():
    def fewer(data: bytes) -> bytes:
        buffer = io.BytesIO()
        pd.read_parquet(io.BytesIO(data)).head(200).to_parquet(buffer, index=False)
        return buffer.getvalue()

    wrong = verify.check(tampered(bundled(), "records.parquet", fewer)).differences
    assert "01_baseline: records.parquet lacks 24 of the 224 records it reports" in wrong


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [("results/01_baseline.json", lambda data: data[:-9], "results/01_baseline.json is damaged"),
     ("results/01_baseline.json", lambda data: b"[]", "results/01_baseline.json"),
     ("results/07_verdicts.json", lambda data: b'{"verdicts": [1]}', "verdicts cannot be made"),
     ("exhibits/01_baseline/exhibits.json", lambda data: b"[1]", "01_baseline/exhibits.json"),
     ("exhibits/01_baseline/format-against-plain.svg", None, "against-plain.svg is missing"),
     ("notebooks/07_verdicts.ipynb", lambda data: b"\xff", "07_verdicts.ipynb is damaged"),
     ("notebooks/07_verdicts.ipynb", None, "notebooks/07_verdicts.ipynb is missing"),
     ("claims.toml", lambda data: b"=", "claims.toml"),
     ("records.parquet", lambda data: data[:99], "records.parquet is damaged"),
     ("records.parquet", None, "records.parquet is missing")],
)  # fmt: skip
def test_a_damaged_file_is_named(name, change, words, capsys):
    made = tampered(bundled(), name, change)
    assert cli.main(["verify", str(made)]) == 1
    said = capsys.readouterr()
    assert words in said.out and said.err == ""


def test_other_claims_than_those_of_the_kit_are_told():
    claim = next(claim for claim in claims.load() if claim.rule == "arithmetic")
    made = bundled()
    lax = f"tolerance = {claim.tolerance:g}\n".encode()
    with_lax = tampered(made, "claims.toml", lambda data: data.replace(lax, b"tolerance = 9.0\n"))
    (told,) = [line for line in verify.check(with_lax).unchecked if "claims.toml" in line]
    assert f"{claim.id} (tolerance)" in told
    assert not [line for line in verify.check(made).unchecked if "claims.toml" in line]


def test_a_published_run_is_judged_by_its_records(tmp_path, capsys, monkeypatch):
    made = bundled()
    place = published(made, tmp_path / "published" / "laptop")
    (tmp_path / "published" / "gpu").mkdir()
    (tmp_path / "published" / "gpu" / "gpu.json").write_text("{}")  # figures, no run
    before = {f: f.read_bytes() for f in place.rglob("*") if f.is_file()}
    monkeypatch.setattr(paths, "PUBLISHED_RUNS", tmp_path / "published")
    assert cli.main(["verify"]) == 0
    said = capsys.readouterr().out
    assert "published differences with known counts" in said
    assert "Nothing differs" in said and verify.UNVOUCHED in said
    verdicts, _, paths_ = said.partition("claim ")[2].partition("Report:")
    assert "rbslm-format-accuracy" in verdicts
    assert paths_.strip().endswith("verified/laptop/report.html")
    assert {f: f.read_bytes() for f in place.rglob("*") if f.is_file()} == before
    results = json.loads((place / "results/01_baseline.json").read_text())
    (place / "results/01_baseline.json").write_text(
        json.dumps(results | {"keys": results["keys"][:150]})
    )
    assert cli.main(["verify", str(place)]) == 1
    assert "Differs: 01_baseline, table" in capsys.readouterr().out
    with pytest.raises(bundle.BundleError, match="has no records.parquet: pack the run"):
        verify.check(tmp_path / "laptop")
    monkeypatch.setattr(paths, "PUBLISHED_RUNS", tmp_path / "nothing")
    assert cli.main(["verify"]) == 2


def test_the_report_shows_the_verdicts_made_again(tmp_path):
    made = bundled()
    page = verify.write_report(verify.check(made))
    assert page == tmp_path / "verified" / "laptop" / "report.html"
    text = page.read_text()
    assert "Judged again without a model: nothing differs." in text
    assert "A run of the laptop profile, judged again from its records" in text
    assert "a CPU, 2 cores" in text and re.search(r"commit</dt>\s*<dd>c0</dd>", text)  # not of here
    assert (page.parent / "results/01_baseline.json").is_file()  # which the page links to
    run = bundle.read(made)
    run.stamps["01_baseline"]["commit"] = "c1"
    text = verify.page(run, verify.rejudged(run), page.parent).read_text()
    assert "01_baseline c1; 07_verdicts c0" in text

    def reproduced(data: bytes) -> bytes:
        rows = json.loads(data)["verdicts"]
        return json.dumps({"verdicts": [row | {"verdict": "reproduced"} for row in rows]}).encode()

    checked = verify.check(tampered(made, "results/07_verdicts.json", reproduced))
    text = verify.write_report(checked).read_text()
    assert f"{len(checked.differences)} things differ" in text
    assert "rbslm-memory-gain: verdict is &#39;reproduced&#39; in the results" in text
    assert text.count('class="badge reproduced">') < 9  # made again, not as told


def test_a_bundle_writes_nowhere_else(tmp_path):
    made = bundled()
    evil = tampered(made, "notebooks/../../../evil.ipynb", lambda data: b"{}")
    verify.write_report(judgement := verify.check(evil))
    assert not [*tmp_path.rglob("evil*")]
    for name in ("../elsewhere", "", "a/b", "..", None):

        def renamed(data: bytes, name=name) -> bytes:
            notebook = json.loads(data)
            notebook["metadata"]["kit"]["profile"] = name
            return json.dumps(notebook).encode()

        other = tampered(made, "notebooks/07_verdicts.ipynb", renamed)
        judgement = verify.check(other) if not name else replace(judgement, run=bundle.read(other))
        with pytest.raises(bundle.BundleError, match="is no name"):
            verify.write_report(judgement)


def test_the_commands(tmp_path, capsys):
    assert cli.main(["bundle", "--profile", "laptop"]) == 2
    assert "laptop has no verdicts yet; `make reproduce PROFILE=laptop`" in capsys.readouterr().err
    made = bundled()
    assert cli.main(["verify", str(made)]) == 0 and "Nothing differs" in capsys.readouterr().out
    broken = tampered(made, "LICENSE", lambda data: b"")
    assert cli.main(["verify", str(broken), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differs"] == [
        "LICENSE is not what SHA256SUMS says: it was changed"
    ]
    (tmp_path / "note.txt").write_text("no zip")
    assert cli.main(["verify", str(tmp_path / "note.txt")]) == 2
    assert "is no bundle" in capsys.readouterr().err
    assert cli.main(["diff", str(made), str(tmp_path / "laptop")]) == 0
    assert "numbers: 0 differ" in capsys.readouterr().out


def test_it_needs_no_models(tmp_path):
    made, heavy = bundled(), ("torch", "transformers", "dspy", "trl", "lancedb", "papermill")
    code = "\n".join([
        "import sys", "class Absent:", "    def find_spec(self, name, *rest):",
        f"        if name.split('.')[0] in {heavy}: raise ImportError(name)",
        "sys.meta_path.insert(0, Absent())", "from kit import cli",
        f"sys.exit(cli.main(['verify', {str(made)!r}]))",
    ])  # fmt: skip
    environment = {**os.environ, "KIT_OUTPUTS": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Nothing differs" in done.stdout, done.stderr[-2000:]
    assert (tmp_path / "verified" / "laptop" / "report.html").is_file()
