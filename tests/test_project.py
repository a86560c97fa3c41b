"""What the files of the project promise each other: versions, sizes, notebooks, README."""

import ast
import itertools
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.toml"))
KIT = sorted((ROOT / "kit").glob("*.py"))
NOT_A_NOTEBOOK = "preflight"  # the table of a profile that says what it will need
HEADINGS = "Claim, Question, Parameters, Inputs, One example, Run, Table, Figure, Verdict, Limits"


def name(path: Path) -> str:
    return path.stem


def pins(lines) -> dict[str, str]:
    """Package name -> version of requirement lines, each of which must pin exactly one."""
    found = {}
    for requirement in map(Requirement, lines):
        (only,) = requirement.specifier
        assert only.operator == "==" and "*" not in only.version, f"{requirement} is not pinned"
        key = canonicalize_name(requirement.name)
        assert key not in found, f"{key} is named twice"
        found[key] = only.version
    return found


# Versions


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def conda() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    return pins((ROOT / "requirements.lock").read_text().splitlines())


def test_pyproject_environment_and_lock_agree_on_every_direct_dependency(project, conda, lock):
    direct = pins(project["project"]["dependencies"] + project["dependency-groups"]["dev"])
    (pip,) = (entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    assert "-c requirements.lock" in pip, "the conda way constrains what is not direct"
    assert pins(line for line in pip if not line.startswith("-")) == direct
    assert direct.items() <= lock.items()


def test_the_three_agree_on_python(project, conda):
    (python,) = (e for e in conda["dependencies"] if isinstance(e, str) and "python" in e)
    version = python.removeprefix("python=")
    allowed = SpecifierSet(project["project"]["requires-python"])
    assert version in allowed and "3.10" not in allowed and "3.12" not in allowed
    assert f"version_info[:2] != ({version.replace('.', ', ')})" in (ROOT / "Makefile").read_text()
    assert project["tool"]["ruff"]["target-version"] == f"py{version.replace('.', '')}"


def test_the_lock_serves_machines_with_and_without_a_gpu(lock):
    assert not any("+" in version for version in lock.values()), "no +cpu or +cu build"
    nvidia = [package for package in lock if package.startswith("nvidia-")]
    assert nvidia == ["nvidia-ml-py"], "pure Python; the libraries come with the CUDA build"
    with_cuda = "triton==3.7.1"  # required by the CUDA build of torch 2.13.0
    assert lock["torch"] == "2.13.0" and with_cuda == f"triton=={lock['triton']}"


def test_each_line_of_the_environment_says_what_needs_it():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    packages = [line for line in lines if re.match(r"\s+- \w", line) and "pip:" not in line]
    assert len(packages) > 20 and all("  # " in line for line in packages)


# Sizes and names


@pytest.mark.parametrize("path", KIT, ids=name)
def test_a_module_of_the_kit_says_what_it_is_and_its_functions_are_short(path):
    tree = ast.parse(path.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in (node for node in ast.walk(tree) if isinstance(node, functions)):
        assert node.end_lineno - node.lineno + 1 <= 60, node.name
    if path.stem != "__main__":
        assert ast.get_docstring(tree), "a module says what it is"


def test_the_kit_is_flat_and_every_name_says_something():
    assert [child.name for child in (ROOT / "kit").iterdir() if child.is_dir()] in (
        [],
        ["__pycache__"],
    )
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "core", "base", "lib"}
    named = {path.stem for folder in ("kit", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert not named & empty


# Notebooks


class Book:
    """A notebook in pieces."""

    def __init__(self, path: Path):
        self.nb = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        self.cells = self.nb.cells
        self.code = [cell for cell in self.cells if cell.cell_type == "code"]

    def parameters(self):
        """The one cell tagged so."""
        tagged = [c for c in self.cells if "parameters" in c.metadata.get("tags", [])]
        assert len(tagged) == 1 and tagged[0].cell_type == "code"
        return tagged[0]

    def knobs(self) -> dict[str, int]:
        """Parameter -> its line, in a cell of nothing else."""
        knobs = {}
        for node in ast.parse(self.parameters().source).body:
            assert isinstance(node, ast.Assign), f"not an assignment: {ast.unparse(node)}"
            (target,) = node.targets
            knobs[target.id] = node.end_lineno
        return knobs

    def text(self):
        """Sources and outputs, pictures left out: base64 can spell anything."""
        for cell in self.cells:
            yield cell.source
            for output in cell.get("outputs", []):
                yield from (output.get("text", ""), *output.get("traceback", []))
                data = output.get("data", {})
                yield from (str(data[kind]) for kind in data if not kind.startswith("image/"))


def plain(cell) -> ast.Module:
    """Syntax tree of a code cell, which has no magic and no shell line."""
    assert not re.search(r"^\s*[%!]", cell.source, re.MULTILINE), "a magic or a shell line"
    return ast.parse(cell.source)


@pytest.fixture(params=NOTEBOOKS, ids=name)
def book(request) -> Book:
    return Book(request.param)


def test_a_notebook_is_valid(book):
    nbformat.validate(book.nb)
    assert book.nb.nbformat == 4


def test_a_notebook_has_the_ten_headings_in_order(book):
    source = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.+)$", source, re.MULTILINE) == HEADINGS.split(", ")
    assert len(re.findall(r"^# .+$", source, re.MULTILINE)) == 1
    assert book.cells[0].source.startswith("# ")


def test_the_cells_of_a_notebook_are_short(book):
    assert all(0 < len(cell.source.splitlines()) <= 25 for cell in book.code)


def test_parameters_are_few_upper_case_explained_and_used(book):
    knobs, lines = book.knobs(), book.parameters().source.splitlines()
    assert len(knobs.keys() - {"PROFILE"}) <= 12  # PROFILE is the pipeline's
    after = book.code[book.code.index(book.parameters()) + 1 :]
    read = {n.id for cell in after for n in ast.walk(plain(cell)) if isinstance(n, ast.Name)}
    for knob, line in knobs.items():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", knob)
        assert re.search(r"  # \S+", lines[line - 1]), f"{knob} has no comment"
        assert knob in read, f"{knob} is not used"


def test_nothing_but_the_parameters_cell_sets_a_parameter(book):
    others = [cell for cell in book.code if cell is not book.parameters()]
    nodes = itertools.chain.from_iterable(ast.walk(plain(cell)) for cell in others)
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert not stored & book.knobs().keys()


def test_a_notebook_was_run_from_top_to_bottom_or_not_at_all(book):
    counts = [cell.execution_count for cell in book.code]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
    failed = [o for cell in book.code for o in cell.outputs if o.output_type == "error"]
    assert not failed


def test_a_notebook_names_no_folder_of_a_machine(book):
    for text in book.text():
        found = re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt)\b", text)
        assert not found, text[max(0, found.start() - 40) : found.end() + 40]


def test_a_notebook_asks_nothing_and_installs_nothing(book):
    calls = [n for cell in book.code for n in ast.walk(plain(cell)) if isinstance(n, ast.Call)]
    called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    assert not called & {"input", "eval", "exec", "get_ipython"}
    assert not any(re.search(r"\bpip\d? install\b", cell.source) for cell in book.code)


def test_a_notebook_defines_no_function_that_another_defines():
    defined = [
        node.name
        for path in NOTEBOOKS
        for cell in Book(path).code
        for node in ast.walk(plain(cell))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(defined) == len(set(defined))


# Profiles and README


@pytest.mark.parametrize("path", PROFILES, ids=name)
def test_a_profile_names_only_notebooks_and_their_parameters(path):
    tables = tomllib.loads(path.read_text())
    tables.pop(NOT_A_NOTEBOOK, None)
    knobs = {notebook.stem: Book(notebook).knobs().keys() for notebook in NOTEBOOKS}
    for table, values in tables.items():
        assert table in knobs, f"there is no notebook {table}"
        assert values.keys() <= knobs[table], f"{table}: {values.keys() - knobs[table]}"
        assert values.get("PROFILE", path.stem) == path.stem


def test_there_are_notebooks_and_profiles_to_look_at():
    assert {"00_tour", "01_baseline", "07_verdicts"} <= {path.stem for path in NOTEBOOKS}
    assert {"laptop", "workstation"} <= {path.stem for path in PROFILES}


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="there is no README yet")
def test_the_tree_of_the_readme_names_every_file_of_the_kit_and_no_other():
    tree = re.search(r"```\n\.\n.*?```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    kit = re.search(r"── kit/.*?\n(?=[├└])", tree, re.DOTALL)[0]
    named = re.findall(r"^│\s+[├└]── (\S+)\s+\S", kit, re.MULTILINE)
    rooms = [path.name for path in KIT if not path.stem.startswith("__")]
    assert sorted(named) == rooms
    books = re.findall(r"[├└]── (\d\d_\w+\.ipynb)\s+\S", tree)
    assert books == [path.name for path in NOTEBOOKS]
    for other in (path.name for path in (ROOT / "kit").glob("*.j2")):
        assert other in kit
