"""A notebook's page: formulas that a browser shows without a script, and nothing that it loads."""

import re

import nbformat

from kit.report import notebook_page

STATE = "application/vnd.jupyter.widget-state+json"


def test_formulas_are_mathml_and_prices_are_not():
    text = "Energy $E = m c^2$ costs $42, or $43, and $$\\sum_l B_l$$ is a sum of $x_1$."
    code = "print(f'${price}', \"$x_1$\")"
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(code)]
    page = notebook_page.page(nbformat.writes(nbformat.v4.new_notebook(cells=cells)).encode(), "t")
    assert "<title>t</title>" in page and "costs $42, or $43, and " in page
    inline, block, last = re.findall(r"<math.*?</math>", page)
    assert "<msup>" in inline and 'display="block"' in block and "<mo>&#x02211;</mo>" in block
    assert "<msub><mi>x</mi><mn>1</mn></msub>" in last and "$x_1$" in page  # the code's


def test_it_loads_nothing_and_code_is_whole_on_paper():
    figure = nbformat.v4.new_output("display_data", {"image/png": "AAAA"})
    cell = nbformat.v4.new_code_cell("1", outputs=[figure])
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {STATE: {"state": {}}}})
    page = notebook_page.page(nbformat.writes(notebook).encode(), "t")
    assert not re.findall(r"""(?:src|href)="(?!data:|#)|import\(|url\(["']?http""", page)
    assert "white-space: pre-wrap !important" in page.split("@media print")[-1]
    assert "prefers-color-scheme: dark" in page
