"""An executed notebook as one HTML page that loads nothing: its formulas are MathML, as a browser
shows it without a script, its figures are inside, its colours are dark where its reader's are, and
its code is whole on paper."""

import re

import nbformat

CSS = """
:root { --jp-mirror-editor-operator-color: #7a00c2; --jp-mirror-editor-comment-color: #2f6f6f;
  --jp-mirror-editor-number-color: #006d00; --jp-cell-prompt-not-active-opacity: 1 }
.jp-RenderedHTMLCommon a, .jp-RenderedHTMLCommon a:link { text-decoration: underline }
@media (prefers-color-scheme: dark) { %s
:root { color-scheme: dark; --jp-mirror-editor-operator-color: #c792ff;
  --jp-mirror-editor-comment-color: #7fc4c4; --jp-mirror-editor-number-color: #7fd07f }
.jp-RenderedHTML pre { background: #f8f8f8 !important; color: black !important }
.jp-OutputArea-output img { background: white } }
@media print {
.highlight pre, .jp-OutputArea-output pre { white-space: pre-wrap !important;
  overflow-wrap: anywhere }
.jp-InputPrompt, .jp-OutputPrompt { display: none }
.jp-OutputArea-child, .jp-Cell { break-inside: auto !important }
.jp-OutputArea-output table { font-size: 7.5pt }
.jp-OutputArea-output { overflow: visible !important } }
"""
LOADS_NOTHING = "".join(
    f"{{% block {name} %}}{{% endblock {name} %}}"
    for name in ("html_head_js", "jupyter_widgets", "html_head_js_mathjax",
                 "html_head_js_mermaidjs")
)  # fmt: skip
PLACE = "\ue000%s\ue001"  # of a formula, in characters that no text has
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\\w])\$(?!\s)([^$]+?)(?<!\s)\$(?!\w)", re.DOTALL)


def page(notebook: bytes, title: str) -> str:
    """The HTML of a notebook, named `title`."""
    from nbconvert import HTMLExporter  # takes a second

    exporter = HTMLExporter(embed_images=True)
    exporter.raw_template = "{% extends 'lab/index.html.j2' %}" + LOADS_NOTHING
    tree = nbformat.reads(notebook.decode(), as_version=4)
    formulas = []

    def held(formula: re.Match) -> str:  # nbconvert would close each tag of MathML on its own
        formulas.append(_mathml(formula))
        return PLACE % (len(formulas) - 1)

    for cell in tree.cells:
        if cell.cell_type == "markdown":
            cell.source = MATH.sub(held, cell.source)
    html, _ = exporter.from_notebook_node(tree, resources={"metadata": {"name": title}})
    html = re.sub(PLACE % r"(\d+)", lambda found: formulas[int(found[1])], html)
    loader, environment = exporter.environment.loader, exporter.environment
    dark, *_ = loader.get_source(environment, "static/theme-dark.css")
    return html.replace("</head>", f"<style>{CSS % dark}</style></head>", 1)


def _mathml(formula: re.Match) -> str:
    """The MathML of a formula in TeX, as a block between two dollar signs."""
    from latex2mathml.converter import convert

    block, inline = formula.groups()
    return convert(block or inline, display="block" if block else "inline")
