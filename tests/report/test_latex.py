"""LaTeX of a run: macros that say what the tables say, and a paper that uses what there is."""

import json
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
         interval="4.192 to 4.192", published="4.19 GiB"),
    dict(claim="rb-webarena-flash", on="audit", verdict="bears it", measured="", interval="",
         published="+3.7 points"),
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


def test_every_number_has_a_name_a_source_and_a_link_to_its_cell(made):
    lines = [line for line in made[0].read_text().splitlines() if line.startswith("\\kitset")]
    found = [
        re.fullmatch(r"\\kitset\{(.+?)\}\{(.+?)\}\{(.*)\}% (.+)", line).groups() for line in lines
    ]
    named = {name: value for name, _, value, _ in found}
    assert len(named) == len(found)
    assert named["baseline/plain/accuracy"] == "\\num{18.8}"
    assert named["baseline/plain/accuracy/interval"] == "[\\num{12.8}, \\num{25.3}]"
    assert named["baseline/plain/peak-KV-mean"] == "\\num{4.57} MiB"
    assert named["baseline/50-more/n"] == "\\num{112}"
    assert named["claim/nab-weights-4b-8bit"] == "\\num{4.192} GiB"
    assert named["claim/nab-weights-4b-8bit/verdict"] == "agrees"
    assert named["claim/rb-webarena-flash/verdict"] == "bears it"
    assert named["claim/rb-webarena-flash/on"] == "audit"
    assert named["headline/audit"] == "Of 3 differences, 2."
    assert "claim/rb-webarena-flash" not in named
    links = {name: link for name, link, _, _ in found}
    page, _, cell = links["baseline/plain/accuracy"].partition("\\#cell-id=")
    assert page == "../notebooks/01_baseline.html"
    cells = json.loads((paths.NOTEBOOKS / "01_baseline.ipynb").read_text())["cells"]
    (saves,) = [each for each in cells if each["id"] == cell]
    assert "save_results(" in "".join(saves["source"])
    assert {name: source for name, _, _, source in found}["baseline/plain/n"].startswith(
        "01_baseline:"
    )


def test_numbers_are_for_siunitx_with_a_true_minus():
    assert exhibits.numeric("-0.8 [-16.3, 14.7]") == "\\num{-0.8} [\\num{-16.3}, \\num{14.7}]"
    assert exhibits.numeric("< 0.001") == "$<$ \\num{0.001}"
    assert exhibits.numeric("1,234") == "\\num{1234}" and exhibits.numeric("–") == "–"
    assert exhibits.numeric("dms-4x 50%") == "dms-4x \\num{50}\\%"


def test_a_wide_table_is_cut_into_parts_that_fit():
    columns = ["arm", *(f"a measure of number {i}, mean" for i in range(12))]
    rows = [["plain", *["18.8 [12.8, 25.3]"] * 12]] * 5
    text = exhibits.latex(exhibits.Table("Wide", columns, rows))
    parts = re.findall(r"\\begin\{tabular\}\{(l[r]+)\}", text)
    assert len(parts) > 1 and sum(len(form) - 1 for form in parts) == 12
    assert text.count("plain &") == 5 * len(parts)
    assert max(len(form) for form in parts) * 17 < exhibits.LINE + 17


def test_the_paper_uses_what_is_there(made):
    text, macros = made[1].read_text(), made[0].read_text()
    for name in set(re.findall(r"\\kit\{(.+?)\}", text)):
        assert f"\\kitset{{{name}}}" in macros, name
    assert "\\kit{claim/nab-weights-4b-8bit}" in text and "Not measured: 1 audit." in text
    read = re.findall(r"\\includegraphics\[.*?\]\{(.+?)\}", text)
    read += [f"{name}.tex" for name in re.findall(r"\\input\{(\.\..+?)\}", text)]
    assert len(read) == 2 and all((made[1].parent / name).is_file() for name in read)
    assert "100\\% of it." in text and text.count("\\begin") == text.count("\\end{")


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no LaTeX here")
def test_the_paper_compiles(made):
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"]
    done = subprocess.run(command, cwd=made[1].parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout and "Package kit Error" not in done.stdout
