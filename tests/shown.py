"""What `notebook.show` left in the notebooks, made again from the sources of today.

python -m tests.shown      after a change of a function that a notebook shows
"""

import ast
import json
import pkgutil

from kit import notebook, paths

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def renewed(text: str) -> str:
    """The JSON of a notebook with each output of `notebook.show` as it would be today."""
    book = json.loads(text)
    names = {}  # in the notebook -> dotted
    for cell in (cell for cell in book["cells"] if cell["cell_type"] == "code"):
        nodes = [*ast.walk(ast.parse("".join(cell["source"])))]
        for node in (node for node in nodes if isinstance(node, ast.ImportFrom)):
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        shown = [call.args[0] for call in calls if ast.unparse(call.func) == "notebook.show"]
        outputs = [output["data"] for output in cell["outputs"] if output.get("data")]
        outputs = [data for data in outputs if shown and "text/html" in data]
        for argument, data in zip(shown, outputs, strict=True):
            first, _, rest = ast.unparse(argument).partition(".")
            function = pkgutil.resolve_name(f"{names[first]}.{rest}".rstrip("."))
            source = notebook.highlighted(function)
            data |= {mime: value.splitlines(keepends=True) for mime, value in source.items()}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in NOTEBOOKS:
        file.write_text(renewed(file.read_text(encoding="utf-8")), encoding="utf-8")
