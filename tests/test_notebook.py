"""What a training shows while it runs in a notebook."""

import json

import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from kit import notebook
from kit.analysis import claims
from kit.analysis.plots import Picture
from kit.analysis.verdicts import measured_table
from kit.report import exhibits
from tests import shown


@pytest.fixture
def shell():
    """What a notebook has and a script has not."""
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_a_training_is_followed_by_one_line_and_one_figure(shell):
    drawn = []

    def draw(rows: list[dict]) -> Picture:
        drawn.append([row["step"] for row in rows])
        return Picture()

    with capture_output() as said:
        report = notebook.follow(7, draw, every=3)
        for step in range(1, 8):
            report({"step": step})
    assert drawn == [[1], [1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]
    lines = [o.data["text/plain"] for o in said.outputs if "step" in o.data.get("text/plain", "")]
    steps = [line.split(" step ")[1].split(",")[0] for line in lines]
    assert steps == ["1 of 7", *(f"{step} of 7" for step in range(1, 8))]
    assert lines[-1].startswith("█" * 20) and lines[0].count("░") == 18


def test_the_verdicts_of_a_notebook_are_saved_for_the_terminal(monkeypatch, tmp_path):
    for module in (exhibits, notebook):
        monkeypatch.setattr(module, "run_dir", lambda profile: tmp_path / profile)
    found = measured_table(claims.load()[:3], pd.DataFrame(), "tour")
    notebook.save_results("01_baseline", {"keys": []}, "tour", verdicts=found)
    saved = exhibits.load_results("tour")["01_baseline"]
    assert [row["claim"] for row in saved["verdicts"]] == list(found["claim"])
    assert {*saved["verdicts"][0]} == {*found} - {"n"}


def test_what_the_notebooks_show_is_the_source_of_today(subtests):
    for path in shown.NOTEBOOKS:
        with subtests.test(path.name):
            text = path.read_text()
            fresh = shown.renewed(text) == text
            assert fresh, f"{path.name} shows an older source: run `python -m tests.shown`"


def test_an_old_source_in_a_notebook_is_renewed(subtests):
    for path in (path for path in shown.NOTEBOOKS if "notebook.show(" in path.read_text()):
        with subtests.test(path.name):
            book = json.loads(path.read_text())
            for cell in book["cells"]:
                for output in cell.get("outputs", []) * ("notebook.show(" in str(cell["source"])):
                    if "text/html" in output.get("data", {}):
                        output["data"] |= {"text/plain": ["old"], "text/html": ["<b>old</b>"]}
            old = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
            assert old != path.read_text() and shown.renewed(old) == path.read_text()
