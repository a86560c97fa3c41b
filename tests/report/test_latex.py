"""LaTeX of a run: macros that say what the tables say, and a paper that uses what there is."""

import re
import shutil
import subprocess

import pandas as pd
import pytest

from kit import notebook, paths
from kit.analysis import plots
from kit.report import exhibits
from kit.report import latex as paper

ARMS = pd.DataFrame(
    {
        "model": ["bundled:smollm2-135m"] * 2,
        "arm": ["50% & more_", "plain"],
        "accuracy": [None, (18.8, 12.8, 25.3)],
        "kv_peak_bytes": [1.0, 4.57 * 2**20],
        "n": [112, 112],
    }
)
VERDICTS = [
    dict(claim="nab-weights-4b-8bit", on="recomputed", verdict="agrees", measured="4.192 GiB",
         interval="4.192 to 4.192"),
    dict(claim="rb-webarena-flash", on="audit", verdict="bears it", measured="", interval=""),
]  # fmt: skip


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)
    rows = [("retrieved", "plain", (3.0, 1.0, 5.0), True)]
    table = pd.DataFrame(rows, columns=["arm", "control", "difference", "primary"])
    drawn = {"100% of it": plots.forest(table)}
    notebook.save_results("01_baseline", {}, "laptop", {exhibits.BASELINE: ARMS}, drawn)
    said = ["None.", "13\\% hold.", "Of 3 differences, 2.", "12 agree."]
    notebook.save_results("07_verdicts", {"verdicts": VERDICTS, "headline": said}, "laptop")
    return paper.write("laptop")


def test_every_number_has_a_name_of_letters_and_a_source(made):
    lines = made[0].read_text().splitlines()
    found = dict(re.fullmatch(r"\\newcommand\{\\(kit[A-Za-z]+)\}\{(.*)\}% .+", line).groups()
                 for line in lines)  # fmt: skip
    assert len(found) == len(lines)
    assert found["kitBaselineAcc"] == "18.8"
    assert found["kitBaselineAccInterval"] == "[12.8, 25.3]"
    name = "kitBaselineBundledSmollmTwoOneThreeFiveMPlain"
    assert found[f"{name}Accuracy"] == "18.8"
    assert found[f"{name}PeakKVMean"] == "4.57 MiB" and found[f"{name}N"] == "112"
    assert found["kitNabWeightsFourBEightBit"] == "4.192 GiB"
    assert found["kitNabWeightsFourBEightBitVerdict"] == "agrees"
    assert found["kitRbWebarenaFlashVerdict"] == "bears it"
    assert found["kitRbWebarenaFlashOn"] == "audit" and found["kitAudit"] == "Of 3 differences, 2."
    assert "kitRbWebarenaFlash" not in found
    assert any("01_baseline" in line and line.startswith(f"\\newcommand{{\\{name}N}}")
               for line in lines)  # fmt: skip


def test_the_paper_uses_what_is_there(made):
    text, macros = made[1].read_text(), made[0].read_text()
    for name in set(re.findall(r"\\(kit\w+)", text)):
        assert f"{{\\{name}}}" in macros, name
    read = re.findall(r"\\includegraphics\[.*?\]\{(.+?)\}", text)
    read += [f"{name}.tex" for name in re.findall(r"\\input\{(\.\..+?)\}", text)]
    assert len(read) == 2 and all((made[1].parent / name).is_file() for name in read)
    assert "100\\% of it." in text and text.count("\\begin") == text.count("\\end{")


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no LaTeX here")
def test_the_paper_compiles(made):
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"]
    done = subprocess.run(command, cwd=made[1].parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
