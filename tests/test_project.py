"""What the files of the project promise each other: versions, sizes, notebooks, profiles."""

import ast
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from kit.analysis import claims
from kit.models import bundled
from kit.pipeline.stages import larger_tables

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.toml"))
KIT = sorted((ROOT / "kit").rglob("*.py"))
NOT_A_NOTEBOOK = "preflight"  # the table of a profile that says what it will need
LARGER = "larger"  # that of what some notebooks run with on a larger model
HEADINGS = "Claim, Question, Parameters, Inputs, One example, Run, Table, Figure, Verdict, Limits"


def pins(requirements) -> dict[str, str]:
    """Package name -> version of requirements, each of which must pin exactly one."""
    found = {}
    for requirement in map(Requirement, requirements):
        (only,) = requirement.specifier
        assert only.operator == "==" and "*" not in only.version, f"{requirement} is not pinned"
        key = canonicalize_name(requirement.name)
        assert key not in found, f"{key} is named twice"
        found[key] = only.version
    return found


# Versions

PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
BUILDS = ("cuda-", "nvidia-", "triton")  # what only some builds of torch require


def locked(file: str) -> list[tuple[Requirement, list[str]]]:
    """The requirements of a lock, each with its hashes."""
    text = (ROOT / file).read_text().replace("\\\n", "")
    split = [line.split(" --hash=") for line in text.splitlines()]
    return [(Requirement(first), [each.strip() for each in hashes]) for first, *hashes in split]


def needed(names: list[str], place: dict[str, str]) -> dict[str, list[Requirement]]:
    """Package -> what is required of it, by requirements and by all that these require in `place`
    (values of markers). Of a package that is not installed here, what it requires is not known."""
    found, queue = {}, [(Requirement(name), "") for name in names]
    while queue:
        requirement, owner = queue.pop()
        key = canonicalize_name(requirement.name)
        if owner == "torch" and key.startswith(BUILDS):
            continue
        if requirement in found.setdefault(key, []):
            continue
        found[key].append(requirement)
        with contextlib.suppress(metadata.PackageNotFoundError):
            for extra in ("", *requirement.extras):
                for text in metadata.requires(key) or []:
                    further = Requirement(text)
                    if further.marker is None or further.marker.evaluate({**place, "extra": extra}):
                        queue.append((further, key))
    return found


def place(python: str, system: str, machine: str) -> dict[str, str]:
    """Values of markers."""
    full = {"python_version": python, "python_full_version": f"{python}.1"}
    names = {"linux": "Linux", "darwin": "Darwin"}
    return {**full, "sys_platform": system, "platform_system": names[system],
            "platform_machine": machine, "os_name": "posix",
            "platform_python_implementation": "CPython", "implementation_name": "cpython",
            "implementation_version": f"{python}.1"}  # fmt: skip


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def direct(project) -> list[str]:
    return project["project"]["dependencies"] + project["dependency-groups"]["dev"]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES, ids="-".join)
def test_the_lock_has_with_a_hash_all_that_a_python_needs_but_torch(direct, python, machine):
    here = place(python, *machine)
    main = [text for text in direct if not (m := Requirement(text).marker) or m.evaluate(here)]
    lock = {
        canonicalize_name(requirement.name): (requirement, hashes)
        for requirement, hashes in locked("requirements.lock")
        if requirement.marker is None or requirement.marker.evaluate(here)
    }
    wanted = needed(main, here)
    assert len(wanted) > 200 and "torch" in wanted
    for name in wanted.keys() - {"torch"}:
        assert name in lock, f"{name} is not locked for Python {python} on {machine}"
        requirement, hashes = lock[name]
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), name
        (pin,) = requirement.specifier
        for required in wanted[name]:
            assert required.specifier.contains(pin.version, prereleases=True), f"{required}, {pin}"


def test_the_lock_and_pyproject_agree_on_every_direct_dependency(direct):
    said, lock = (
        pins(direct),
        pins(str(requirement) for requirement, _ in locked("requirements.lock")),
    )
    torch = said.pop("torch")
    assert said.items() <= lock.items()
    assert f"$(INSTALL) torch=={torch}\n" in (ROOT / "Makefile").read_text()


def test_the_lock_of_the_cluster_has_ray_and_agrees_with_the_other(project):
    lock = {
        requirement.name: str(requirement.specifier)
        for requirement, _ in locked("requirements.lock")
    }
    rows = locked("cluster.lock")
    ray = {requirement.name: str(requirement.specifier) for requirement, _ in rows}
    assert all(hashes for _, hashes in rows)
    assert [f"ray{ray['ray']}"] == project["dependency-groups"]["cluster"]
    assert all(lock[name] == ray[name] for name in lock.keys() & ray.keys())


def test_the_project_agrees_on_the_pythons(project):
    span = project["project"]["requires-python"]
    assert [p for p in ("3.10", *PYTHONS, "3.14") if p in SpecifierSet(span)] == list(PYTHONS)
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert conda["dependencies"] == [f"python{span}", "pip"]
    makefile = (ROOT / "Makefile").read_text()
    assert (
        f"SPAN := {span}\n" in makefile and "(3, 11) <= sys.version_info[:2] <= (3, 13)" in makefile
    )
    assert project["tool"]["ruff"]["target-version"] == "py311"


def test_the_lock_serves_machines_with_and_without_a_gpu():
    lock = pins(str(requirement) for requirement, _ in locked("requirements.lock"))
    assert not any("+" in version for version in lock.values()), "no +cpu or +cu build"
    assert "torch" not in lock, "its builds differ"
    assert [package for package in lock if package.startswith(("nvidia-", "cuda-"))] == [
        "nvidia-ml-py"
    ], "pure Python; the libraries come with the CUDA build"
    assert lock["triton"] == "3.7.1", "required by the CUDA build of torch 2.13.0"


def test_each_dependency_says_what_needs_it():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    packages = [line for line in lines if re.match(r'    "[\w.-]+==', line)]
    assert len(packages) > 20 and all(",  # " in line for line in packages)


# Makefile


def make(folder: Path, tools: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """The project's Makefile in `folder`, where PATH has the shell's tools and, as scripts,
    `tools`."""
    path = folder / "bin"
    path.mkdir(parents=True)
    for name in ("bash", "awk", "env", "mkdir", "chmod", "cat", "touch", "cp"):
        (path / name).symlink_to(shutil.which(name))
    for name, script in tools.items():
        (path / name).write_text(f"#!/bin/bash\n{script}\n")
        (path / name).chmod(0o755)
    for name in ("Makefile", "requirements.lock", "environment.yml"):
        shutil.copy(ROOT / name, folder)
    return subprocess.run(
        [shutil.which("make"), *arguments], cwd=folder, env={"PATH": str(path)},
        capture_output=True, text=True,
    )  # fmt: skip


ENVIRONMENT = (
    "mkdir -p .venv/bin; echo 'echo \"$*\" >> said' > .venv/bin/python; chmod +x .venv/bin/python"
)
RUNS = f'echo "$0 $*" >> said; [ "$1" = -c ] || {{ {ENVIRONMENT}; }}'
SHIM = "echo 'pyenv: command not found' >&2; exit 127"


@pytest.mark.parametrize(
    "tools, arguments, chosen",
    [
        ({"python3": SHIM, "python3.13": "exit 1", "python3.12": RUNS}, [], "python3.12 -m venv"),
        ({"python3": RUNS, "python3.13": RUNS}, [], "python3 -m venv"),
        ({"python3": RUNS, "uv": RUNS}, [], "uv venv"),
        ({"python3": RUNS, "uv": RUNS}, ["UV="], "python3 -m venv"),
    ],
    ids=["the first that runs", "the one in use", "uv", "pip though there is uv"],
)
def test_make_env_takes_a_python_that_runs_in_a_path_with_spaces(
    tmp_path, tools, arguments, chosen
):
    folder = tmp_path / "a path with spaces"
    done = make(folder, tools, "env", *arguments)
    assert done.returncode == 0, done.stderr
    said = (folder / "said").read_text()
    assert chosen in said and (folder / ".venv" / "ready").exists()
    install = "uv pip install" if chosen.startswith("uv") else "-m pip install"
    assert said.count(install) == 2
    assert said.index("--require-hashes -r requirements.lock") < said.index("torch==")


@pytest.mark.parametrize(
    "arguments", [[], ["PYTHON=/opt/my pythons/python3.10"]], ids=["", "given"]
)
def test_make_env_without_a_python_is_one_sentence(tmp_path, arguments):
    done = make(tmp_path / "a", {"python3": "exit 1", "python3.13": SHIM}, "env", *arguments)
    assert done.returncode == 2
    (sentence, end) = (done.stdout + done.stderr).strip().splitlines()
    assert sentence.startswith("The kit needs Python 3.11, 3.12 or 3.13") and "uv" in sentence
    assert all(argument.removeprefix("PYTHON=") in sentence for argument in arguments)


def test_make_env_tells_a_python_that_uv_takes_and_the_kit_does_not(tmp_path):
    old = RUNS.replace("chmod", "echo exit 1 >> .venv/bin/python; chmod")
    done = make(tmp_path / "a", {"uv": old}, "env", "PYTHON=3.10")
    assert done.returncode == 2 and "3.12 or 3.13, and 3.10 is none" in done.stdout
    assert "pip install" not in done.stdout


def test_make_env_says_when_it_cannot_compile(tmp_path):
    lacks = RUNS.replace("chmod", "echo exit 1 >> .venv/bin/python; chmod")
    done = make(tmp_path / "a", {"python3": lacks}, "env")
    assert done.returncode == 2 and "a C compiler and Python's headers" in done.stdout
    assert "pip install" not in done.stdout


def test_make_lab_opens_copies_and_keeps_those_that_were_changed(tmp_path):
    (folder := tmp_path / "a path with spaces").mkdir()
    for name in ("notebooks", "outputs/lab", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    for name in ("00_tour", "01_baseline"):
        (folder / "notebooks" / f"{name}.ipynb").write_text("as shipped")
    changed = folder / "outputs" / "lab" / "01_baseline.ipynb"
    changed.write_text("a parameter changed")
    jupyter = folder / ".venv" / "bin" / "jupyter"
    jupyter.write_text('#!/bin/bash\necho "jupyter $*" >> said\n')
    jupyter.chmod(0o755)
    done = make(folder, {"python3": RUNS}, "lab")
    assert done.returncode == 0, done.stderr
    assert changed.read_text() == "a parameter changed"
    assert (folder / "outputs" / "lab" / "00_tour.ipynb").read_text() == "as shipped"
    last = (folder / "said").read_text().splitlines()[-1]
    assert last == "jupyter lab --ServerApp.root_dir=. outputs/lab/00_tour.ipynb"
    assert "ipykernel install --sys-prefix --name kit" in (folder / "said").read_text()


def test_an_editor_finds_the_environment_and_the_folder_of_the_notebooks():
    settings = json.loads((ROOT / ".vscode" / "settings.json").read_text())
    assert settings["python.defaultInterpreterPath"] == "${workspaceFolder}/.venv/bin/python"
    box = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert box["image"].rsplit(":", 1)[1] in PYTHONS and box["postCreateCommand"] == "make env"
    binder = yaml.safe_load((ROOT / ".binder" / "environment.yml").read_text())
    assert binder["dependencies"][0].partition("=")[2] in PYTHONS


def test_binder_makes_the_environment_and_takes_its_kernel(tmp_path):
    folder = tmp_path / "a path with spaces"
    tools = {"python3": RUNS, "make": f'PATH="$PATH" exec {shutil.which("make")} "$@"'}
    assert make(folder, tools, "help").returncode == 0
    script = ROOT / ".binder" / "postBuild"
    assert script.stat().st_mode & 0o111, "Binder runs it"
    done = subprocess.run([shutil.which("bash"), script], cwd=folder, capture_output=True,
                          text=True, env={"PATH": str(folder / "bin")})  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (folder / "said").read_text().splitlines()
    assert "--require-hashes -r requirements.lock" in "\n".join(lines)
    assert lines[-1].startswith("-m ipykernel install --user --name python3 ")


def test_make_warns_of_a_variable_that_nothing_reads(tmp_path):
    done = make(
        tmp_path / "a", {}, "help", "PROFLE=tour", "profile=tour", "DTYPE=float32", "KIT_X=1"
    )
    assert done.returncode == 0
    first, second = sorted(done.stderr.splitlines())
    assert "nothing reads PROFLE" in first and "nothing reads profile" in second
    assert "PROFILE" in first


def test_make_knows_each_variable_that_it_reads():
    makefile = (ROOT / "Makefile").read_text()
    set_here = set(re.findall(r"^(?:export )?([A-Z_]+) [:?]?=", makefile, re.MULTILINE))
    read = set(re.findall(r"\$\((?:or )?([A-Z][A-Z_]+)\b", makefile)) - set_here - {"MAKEFILE_LIST"}
    known = re.search(r"^READ := (.+)$", makefile, re.MULTILINE)[1].split()
    assert {name for name in read if not name.startswith("KIT_")} <= set(known)
    assert {"PROFILE", "ONLY"} <= read


# Sizes and names


def test_a_module_of_the_kit_says_what_it_is_and_its_functions_are_short(subtests):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for path in KIT:
        with subtests.test(path.relative_to(ROOT).as_posix()):
            tree = ast.parse(path.read_text())
            for node in (node for node in ast.walk(tree) if isinstance(node, functions)):
                assert node.end_lineno - node.lineno + 1 <= 60, node.name
            if path.stem != "__main__":
                assert ast.get_docstring(tree), "a module says what it is"


def test_every_name_in_the_kit_and_its_tests_says_something():
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "core", "base", "lib"}
    files = [*KIT, *(ROOT / "tests").rglob("*.py")]
    named = {part for file in files for part in file.relative_to(ROOT).with_suffix("").parts}
    assert {"kit", "decode"} <= named and not named & empty


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


@pytest.fixture(scope="module")
def books() -> dict[str, Book]:
    return {path.stem: Book(path) for path in NOTEBOOKS}


def test_a_notebook_is_valid(books, subtests):
    for name, book in books.items():
        with subtests.test(name):
            nbformat.validate(book.nb)
            assert book.nb.nbformat == 4


def test_a_notebook_has_the_ten_headings_in_order(books, subtests):
    for name, book in books.items():
        with subtests.test(name):
            source = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
            assert re.findall(r"^## (.+)$", source, re.MULTILINE) == HEADINGS.split(", ")
            assert len(re.findall(r"^# .+$", source, re.MULTILINE)) == 1
            assert book.cells[0].source.startswith("# ")


def test_the_cells_of_a_notebook_are_short(books, subtests):
    for name, book in books.items():
        with subtests.test(name):
            for cell in book.code:
                lines = [
                    x for x in cell.source.splitlines() if not x.startswith(("from ", "import "))
                ]
                assert len(lines) <= 25 and cell.source


def test_parameters_are_few_upper_case_explained_and_used(books, subtests):
    for name, book in books.items():
        with subtests.test(name):
            knobs, lines = book.knobs(), book.parameters().source.splitlines()
            assert len(knobs.keys() - {"PROFILE"}) <= 12  # PROFILE is the pipeline's
            after = book.code[book.code.index(book.parameters()) + 1 :]
            read = {
                n.id for cell in after for n in ast.walk(plain(cell)) if isinstance(n, ast.Name)
            }
            for knob, line in knobs.items():
                assert re.fullmatch(r"[A-Z][A-Z0-9_]*", knob)
                assert re.search(r"  # \S+", lines[line - 1]), f"{knob} has no comment"
                assert knob in read, f"{knob} is not used"


def test_nothing_but_the_parameters_cell_sets_a_parameter(books, subtests):
    for name, book in books.items():
        with subtests.test(name):
            others = [cell for cell in book.code if cell is not book.parameters()]
            nodes = itertools.chain.from_iterable(ast.walk(plain(cell)) for cell in others)
            stored = {
                n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            assert not stored & book.knobs().keys()


def test_a_notebook_was_run_from_top_to_bottom_or_not_at_all(books, subtests):
    for name, book in books.items():
        with subtests.test(name):
            counts = [cell.execution_count for cell in book.code]
            assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
            failed = [o for cell in book.code for o in cell.outputs if o.output_type == "error"]
            assert not failed


def test_a_notebook_names_no_folder_of_a_machine(books, subtests):
    for name, book in books.items():
        with subtests.test(name):
            for text in book.text():
                found = re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt)\b", text)
                assert not found, text[max(0, found.start() - 40) : found.end() + 40]


def test_a_notebook_asks_nothing_and_installs_nothing(books, subtests):
    for name, book in books.items():
        with subtests.test(name):
            calls = [
                n for cell in book.code for n in ast.walk(plain(cell)) if isinstance(n, ast.Call)
            ]
            called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
            assert not called & {"input", "eval", "exec", "get_ipython"}
            assert not any(re.search(r"\bpip\d? install\b", cell.source) for cell in book.code)


def test_a_notebook_defines_no_function_that_another_defines(books):
    defined = [
        node.name
        for book in books.values()
        for cell in book.code
        for node in ast.walk(plain(cell))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(defined) == len(set(defined))


# Profiles


def test_a_profile_names_only_notebooks_and_their_parameters(books, subtests):
    knobs = {name: book.knobs().keys() for name, book in books.items()}
    for path in PROFILES:
        with subtests.test(path.name):
            tables = tomllib.loads(path.read_text())
            tables.pop(NOT_A_NOTEBOOK, None)
            larger = tables.pop(LARGER, {})
            by_model = larger_tables(larger)
            assert {*larger} - {*by_model} <= {"hours"} and {*by_model} <= {*bundled.MODELS}
            own = [each for of_model in by_model.values() for each in of_model.items()]
            for table, values in [*tables.items(), *own]:
                assert table in knobs, f"there is no notebook {table}"
                assert values.keys() <= knobs[table], f"{table}: {values.keys() - knobs[table]}"
                assert values.get("PROFILE", path.stem) == path.stem


def test_there_are_notebooks_and_profiles_to_look_at():
    assert {"00_tour", "01_baseline", "07_verdicts"} <= {path.stem for path in NOTEBOOKS}
    assert {path.stem for path in PROFILES} | {"any"} == {*claims.PROFILES}
