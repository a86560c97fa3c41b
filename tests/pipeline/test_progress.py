"""Lines of progress, in a notebook and in a log."""

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from kit.pipeline import progress


def test_in_a_notebook_a_line_takes_the_place_of_the_one_before():
    InteractiveShell.instance()
    try:
        with capture_output() as said:
            first, second = progress.in_place(), progress.in_place()
            first("1 of 2")
            first("2 of 2")
            second("other work")
    finally:
        InteractiveShell.clear_instance()
    shown = [(each.data["text/plain"], each.update) for each in said.outputs]
    assert shown == [("1 of 2", False), ("2 of 2", True), ("other work", False)]
    places = [each.transient["display_id"] for each in said.outputs]
    assert places[0] == places[1] != places[2]


def test_in_a_log_every_line_stands(capsys):
    report = progress.in_place()
    report("1 of 2")
    report("2 of 2")
    assert capsys.readouterr().out == "1 of 2\n2 of 2\n"
