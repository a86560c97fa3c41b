"""Key tables and figures as files: what is read back is what was shown."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from kit.analysis import contrasts, plots
from kit.analysis.plots import WIDTH
from kit.report import exhibits

FRAME = pd.DataFrame(
    {
        "arm": ["plain", "100% & <b>_more_</b> {x} $y$ #1 \\ ~ ^"],
        "accuracy": [(np.float64(18.8), 12.8, 25.3), None],
        "kv_peak_bytes": [2.5 * 2**20, np.nan],
        "n": [1234, 5],
    }
)


def forest():
    rows = [("retrieved", control, (3.0, 1.0, 5.0), control == "b") for control in "abc"]
    return plots.forest(pd.DataFrame(rows, columns=["arm", "control", "difference", "primary"]))


def test_what_is_saved_is_read_back(tmp_path):
    folder = tmp_path / "02"
    files = exhibits.save(folder, {"Arms, all of them": FRAME}, {"Against controls": forest()})
    names = {"exhibits.json", "arms-all-of-them.csv", "arms-all-of-them.tex"}
    names |= {f"against-controls.{kind}" for kind in ("pdf", "svg", "png")}
    assert {file.name for file in files} == names
    figure, table = exhibits.load(folder)
    assert figure.alt == forest().alt and figure.file.read_text().startswith("<?xml")
    assert table == exhibits.as_table("Arms, all of them", FRAME)
    assert table.rows[0] == ["plain", "18.8 [12.8, 25.3]", "2.50 MiB", "1,234"]
    assert table.words == (0,) and table.rows[1][1:] == ["–", "–", "5"]
    back = pd.read_csv(folder / "arms-all-of-them.csv")
    assert back["n"].tolist() == [1234, 5] and back["kv_peak_bytes"][0] == 2.5 * 2**20
    ends = ["accuracy", "accuracy_low", "accuracy_high"]
    assert back[ends].iloc[0].tolist() == [18.8, 12.8, 25.3] and back[ends].iloc[1].isna().all()
    assert exhibits.as_table("Arms, all of them", exhibits.gathered(back)).rows == table.rows
    assert exhibits.load(tmp_path / "none") == []


def test_no_sign_of_a_text_is_a_command_of_latex():
    assert exhibits.escaped(r"a_b 5% \x ~ ^ {q}") == (
        r"a\_b 5\% \textbackslash{}x \textasciitilde{} \textasciicircum{} \{q\}"
    )


def test_a_table_for_latex_is_escaped_and_ruled(tmp_path):
    exhibits.save(tmp_path / "x", {"Arms": FRAME.rename(columns={"n": "n_needed"})}, {})
    text = (tmp_path / "x" / "arms.tex").read_text()
    for part in ("\\begin{tabular}{lrrr}", "\\toprule", "\\midrule", "\\bottomrule", "100\\% \\&"):
        assert part in text, part
    assert "\\_more\\_" in text and "\\$y\\$" in text and "\\textbackslash" in text
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len(rows) == 3 and all(line.replace("\\&", "").count("&") == 3 for line in rows)


def test_a_wide_table_of_few_rows_stands_upright_in_latex(tmp_path):
    wide = FRAME.assign(**{f"x{i}": [i, -i] for i in range(9)})
    exhibits.save(tmp_path / "x", {"Arms": wide}, {})
    text = (tmp_path / "x" / "arms.tex").read_text()
    assert "\\begin{tabular}{lrr}" in text and " & plain & \\shortstack[r]{100\\% \\&" in text
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert len(rows) == 1 + 12 and rows[-1].startswith("x8 & \\num{8} & \\num{-8}")
    assert len(exhibits.load(tmp_path / "x")[0].rows) == 2  # the report shows it as it is


def test_a_figure_repeats_embeds_its_letters_and_has_the_width_of_a_column(tmp_path):
    for name in "ab":
        exhibits.save(tmp_path / name, {}, {"Against controls": forest()})
    for kind in ("pdf", "svg", "png"):
        one, other = ((tmp_path / name / f"against-controls.{kind}").read_bytes() for name in "ab")
        assert one == other, kind
    assert b"/FontFile2" in (tmp_path / "a" / "against-controls.pdf").read_bytes()
    assert imread(tmp_path / "a" / "against-controls.png").shape[1] == round(300 * WIDTH)


def test_a_new_run_leaves_nothing_old_and_captions_are_told_apart(tmp_path):
    exhibits.save(tmp_path / "x", {"One": FRAME}, {})
    exhibits.save(tmp_path / "x", {"Two": FRAME}, {})
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == [
        "exhibits.json", "two.csv", "two.tex",
    ]  # fmt: skip
    assert [row["caption"] for row in json.loads((tmp_path / "x" / "exhibits.json").read_text())]
    with pytest.raises(ValueError, match=r"equal file names: \['a-b', 'a-b'\]"):
        exhibits.save(tmp_path / "x", {"A b": FRAME, "a: B": FRAME}, {})


ROWS = pd.DataFrame({"a": [1, 2], "b": [0.5, np.nan]})
SIZE = contrasts.exact(4.0, "GiB", "ledger")


@pytest.mark.parametrize(
    "value, stored",
    [
        (float("nan"), None),
        ((1, 2), [1, 2]),
        (0.1, 0.1),
        (ROWS, [{"a": 1, "b": 0.5}, {"a": 2, "b": None}]),
        ({"size": SIZE}, {"size": json.loads(json.dumps(dataclasses.asdict(SIZE)))}),
    ],
)
def test_numbers_that_json_has_not_become_null(value, stored):
    assert exhibits.plain(value, "here") == stored
