"""Stages, and whether their results on disk are fresh.

A stage is one notebook under one profile. It is fresh when everything that decides its
result is what it was at its last complete run: notebook source, the kit modules it imports,
data/, parameters and the files they name, requirements.lock and the results of earlier stages.
Reads and hashes only; running is `kit.pipeline.run`. Imports nothing heavy: a run with nothing to
do ends at once.
"""

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kit.paths import NOTEBOOKS, OUTPUTS, ROOT
from kit.pipeline import imports, parameters
from kit.pipeline.errors import UserError, file_in_the_way, read_json
from kit.pipeline.provenance import file_hash, files_hash
from kit.schema import DTYPES, digest

WEIGHTS = (".safetensors", ".gguf")
TOUR = "tour"  # the profile that is the parameters cells themselves
PREFLIGHT = "preflight"  # a table of a profile that is not a notebook's, as is
LARGER = "larger"  # what some stages run with on a larger model, see `choice`
INPUTS = {
    "notebook": "the notebook",
    "kit": "the kit modules it imports",
    "data": "data/",
    "parameters": "its parameters",
    "files": "a file that its parameters name",
    "lock": "requirements.lock",
    "upstream": "the results of an earlier stage",
}


@dataclass(frozen=True)
class Stage:
    """One notebook under one profile, and where everything about it lies."""

    notebook: Path
    profile: str
    folder: Path  # outputs/<profile>
    defaults: dict  # parameters cell: name -> value (its source text if not a literal)
    overrides: dict  # from the profile, and PROFILE and KIT_DTYPE where the cell names them
    cells: tuple[tuple[str, str, bool], ...]  # (type, source, tagged "parameters")
    why: str = ""  # it runs on this model, where a profile lets the machine decide

    @property
    def name(self) -> str:
        """The notebook's name without .ipynb."""
        return self.notebook.stem

    @property
    def root(self) -> Path:
        """The project: the folder of notebooks/, kit/ and data/."""
        return self.notebook.parent.parent

    @property
    def number(self) -> str:
        """The digits that FROM= and ONLY= take."""
        return self.name.split("_")[0]

    @property
    def executed(self) -> Path:
        """The executed notebook, present only after a complete run."""
        return self.folder / "notebooks" / f"{self.name}.ipynb"

    @property
    def failed(self) -> Path:
        """The notebook of the last run if that failed."""
        return self.folder / "notebooks" / f"{self.name}.failed.ipynb"

    @property
    def running(self) -> Path:
        """Saved after every cell while the stage runs."""
        return self.folder / "notebooks" / f"{self.name}.running.ipynb"

    @property
    def status_file(self) -> Path:
        """Our own record of a complete run; papermill's metadata lies after a kernel death."""
        return self.folder / "status" / f"{self.name}.json"

    @property
    def results_file(self) -> Path:
        """The results that the notebook wrote through `kit.notebook.save_results`."""
        return self.folder / "results" / f"{self.name}.json"

    @property
    def parameters(self) -> dict:
        """Every parameter with the value it runs with."""
        return self.defaults | self.overrides

    @property
    def models(self) -> list[str]:
        """Names of the models that it runs on, one after the other."""
        parameters = self.parameters
        return parameters.get("MODELS", [parameters["MODEL"]] if "MODEL" in parameters else [])

    @property
    def judges(self) -> bool:
        """Whether it reads the results of those before it; all other stages stand alone."""
        return any("load_results(" in source for source in _code(self.cells))

    @property
    def failure(self) -> str:
        """Why the last run failed, in a sentence; "" where it did not."""
        if not self.failed.is_file():
            return ""
        try:
            return read_json(self.failed)["metadata"]["kit"]["failure"]
        except (UserError, LookupError, TypeError):
            return f"{self.failed.name} is damaged"

    @property
    def state(self) -> str:
        """The state after its last run, whatever has changed since; see `freshness` for that."""
        if self.running.is_file():
            return "running"
        if self.failed.is_file():
            return "failed"
        return "done" if self.status_file.is_file() else "not run yet"

    def status(self) -> dict | None:
        """The record of the last complete run, None when there is none or it is damaged."""
        try:
            status = read_json(self.status_file) if self.status_file.is_file() else None
        except UserError:
            return None
        whole = isinstance(status, dict) and {"inputs", "wall_seconds"} <= status.keys()
        return status if whole else None


def profiles(notebooks: Path = NOTEBOOKS) -> list[str]:
    """Names that PROFILE= takes."""
    return sorted({TOUR, *(file.stem for file in (notebooks / "profiles").glob("*.toml"))})


def read_profile(profile: str, notebooks: Path = NOTEBOOKS) -> dict[str, dict]:
    """The tables of a profile file by name; empty for a tour without a file."""
    if profile not in profiles(notebooks):
        names = ", ".join(profiles(notebooks))
        raise UserError(f"there is no profile {profile!r}; take one of: {names}")
    file = notebooks / "profiles" / f"{profile}.toml"
    if not file.is_file():
        return {}
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file.name} is not valid TOML: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{file.name}: {name} stands outside a table; put it under a notebook")
    return tables


def load_stages(
    profile: str, notebooks: Path = NOTEBOOKS, outputs: Path = OUTPUTS, model: str | None = None
) -> list[Stage]:
    """All stages of a profile in running order, every key of the profile checked.

    `model` is that of the stages in the table [larger]; without it the one that was chosen.
    """
    tables = read_profile(profile, notebooks)
    if refusal := file_in_the_way(outputs / profile):
        raise refusal
    files = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    names = [file.stem for file in files]
    if not files:
        raise UserError(f"there is no notebook NN_*.ipynb in {notebooks}")
    larger = tables.pop(LARGER, {})
    chosen, why = (model, "") if model is not None else choice(profile, larger, outputs)
    by_model = larger_tables(larger)
    for table in [*tables, *(name for of_model in by_model.values() for name in of_model)]:
        if table not in [*names, PREFLIGHT]:
            raise UserError(f"{profile}.toml names the notebook {table}, which does not exist; "
                          f"there are: {', '.join(names) or 'none'}")  # fmt: skip
    taken = chosen if chosen in by_model else next(iter(by_model), "")
    stages, folder = [], outputs / profile
    for file in files:
        table = tables.get(file.stem, {})
        stage = _load(file, profile, table, folder)
        kind = {"MODELS": [chosen]} if "MODELS" in stage.defaults else {"MODEL": chosen}
        larger_stages = {  # all are loaded, which checks them
            name: _load(file, profile, table | of_model[file.stem] | kind, folder)
            for name, of_model in by_model.items()
            if file.stem in of_model
        }
        if taken in larger_stages:
            own = chosen in ("", *stage.models)
            stage = replace(stage if own else larger_stages[taken], why=why)
        stages.append(stage)
    return stages


def larger_tables(larger: dict) -> dict[str, dict[str, dict]]:
    """The tables of notebooks in the table [larger] of a profile, by the model that they are for,
    the first choice first. One that none is for runs with those of the first."""
    return {name: tables for name, tables in larger.items() if isinstance(tables, dict)}


def choice(profile: str, larger: dict, outputs: Path = OUTPUTS) -> tuple[str, str]:
    """On which model the stages in the table [larger] of a profile run, and why: the one that
    MODEL names (KIT_MODEL), or that was chosen before the first run; ("", "") where none is."""
    file = outputs / profile / "model.json"
    if larger and (model := os.environ.get("KIT_MODEL")):
        return model, f"MODEL={model}"
    choice = read_json(file) if larger and file.is_file() else {"model": "", "why": []}
    return choice["model"], "; ".join(choice["why"])


def select(stages: list[Stage], from_: str | None, only: str | None) -> list[Stage]:
    """The stages that FROM= or ONLY= ask for, by number, name or the word in it; ONLY= takes
    several, separated by spaces or commas, and they run in their order."""
    if from_ and only:
        raise UserError("FROM and ONLY exclude each other; give one")
    if only:
        names = {_find(stages, name).name for name in only.replace(",", " ").split()}
        return [stage for stage in stages if stage.name in names]
    return stages[stages.index(_find(stages, from_)) :] if from_ else stages


def _find(stages: list[Stage], name: str) -> Stage:
    matches = [stage for stage in stages if name.removesuffix(".ipynb") == stage.name]
    matches = matches or [stage for stage in stages if name.zfill(2) == stage.number]
    matches = matches or [stage for stage in stages if name == stage.name.partition("_")[2]]
    if len(matches) != 1:
        many = "there are several stages" if matches else "there is no stage"
        raise UserError(f"{many} {name}; take one of: {', '.join(s.name for s in stages)}")
    return matches[0]


def with_values(stages: list[Stage], chosen: list[Stage], values: Mapping[str, str]) -> list[Stage]:
    """`stages` where those of them that are `chosen` and have a parameter run with another value
    this time: TOML by name, as in a profile, or else a text."""
    read = {name: _toml(text) for name, text in values.items()}
    names = {name for stage in chosen for name in stage.defaults}
    for name, value in read.items():
        if name == "PROFILE" or name not in names:
            options = ", ".join(sorted(names - {"PROFILE"}))
            raise UserError(
                f"no notebook that is asked for has the parameter {name} to be set; they have: "
                f"{options}"
            )
        defaults = [stage.defaults[name] for stage in chosen if name in stage.defaults]
        if wrong := next(filter(None, (parameters.misfit(value, of) for of in defaults)), ""):
            raise UserError(f"{name}, as it was set, {wrong}")
    result = []
    for stage in stages:
        own = {name: value for name, value in read.items() if name in stage.defaults}
        is_chosen = stage.name in {each.name for each in chosen}
        result.append(
            replace(stage, overrides=stage.overrides | own) if own and is_chosen else stage
        )
    return result


def _toml(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def inputs(stage: Stage, earlier: list[Stage]) -> dict[str, str]:
    """A hash for each thing that decides the result of a stage; keys as in INPUTS."""
    root = stage.root if (stage.root / "kit").is_dir() else ROOT  # notebooks elsewhere run this kit
    data = [file for file in (root / "data").rglob("*") if file.is_file()]
    try:
        modules = imports.kit_modules(_code(stage.cells), root / "kit")
    except ModuleNotFoundError as error:
        raise UserError(f"{stage.notebook.name} imports, itself or through the kit, a module that "
                      f"does not exist: {error}") from error  # fmt: skip
    return {
        "notebook": digest(stage.cells),
        "kit": files_hash(root, modules),
        "data": files_hash(root, data),
        "parameters": digest(stage.overrides),
        "files": digest([_stamp(file) for file in named_files(stage.parameters, stage.root)]),
        "lock": file_hash(root / "requirements.lock"),
        "upstream": digest([[s.name, file_hash(s.results_file)] for s in earlier if stage.judges]),
    }


def named_files(value: object, root: Path) -> list[Path]:
    """Files of the reader's own that parameters name: a file, those of a folder, those that a TOML
    names. What lies in data/ and kit/ counts by itself, whatever word is also a folder's name."""
    if isinstance(value, dict | list):
        each = value.values() if isinstance(value, dict) else value
        return [file for one in each for file in named_files(one, root)]
    if not isinstance(value, str) or not value:
        return []
    places = [Path(value).expanduser(), root / value]
    try:
        files = [place.absolute() for place in places if place.exists()][:1]
    except OSError:  # a text that is too long for a name
        return []
    if files and files[0].is_dir():
        files = sorted(file for file in files[0].iterdir() if file.is_file())
    elif files and files[0].suffix == ".toml":
        try:
            table = tomllib.loads(files[0].read_text(encoding="utf-8"))
        except ValueError:  # what reads it says so
            table = {}
        files += [file for one in table.values() if isinstance(one, str)
                  if (file := files[0].parent / one).is_file()]  # fmt: skip
    folders = root / "data", root / "kit"
    return [file for file in files if not any(map(file.is_relative_to, folders))]


def _stamp(file: Path) -> list:
    """Name and content of a file; of weights, which take seconds a GB to read, size and time."""
    about = file.stat()
    if file.suffix in WEIGHTS:
        return [file.name, about.st_size, about.st_mtime_ns]
    return [file.name, file_hash(file)]


def freshness(stage: Stage, earlier: list[Stage]) -> tuple[str, str]:
    """("fresh" | "stale" | "missing" | "failed", why)."""
    if stage.failed.is_file():
        return "failed", stage.failure
    status = stage.status()
    if status is None:
        damaged = stage.status_file.is_file()
        return ("stale", "its status file is damaged") if damaged else ("missing", "not run yet")
    why = _staleness(stage, earlier, status)
    return ("stale", why) if why else ("fresh", "")


def _staleness(stage: Stage, earlier: list[Stage], status: dict) -> str:
    current = inputs(stage, earlier)
    changed = [text for key, text in INPUTS.items() if current[key] != status["inputs"].get(key)]
    if changed:
        return " and ".join(changed) + " changed"
    if file_hash(stage.executed) != status.get("notebook_sha256"):
        return "the executed notebook was edited or deleted"
    if file_hash(stage.results_file) != status.get("results_sha256"):
        return "its results file was edited or deleted"
    if missing := len({*status.get("store", [])} - {*store_files(stage)}):
        return f"store/ lost {missing} of its {len(status['store'])} files, and records with them"
    return ""


def store_files(stage: Stage) -> list[str]:
    """Files of the store, where the results of a stage name records; a store only ever grows."""
    results = read_json(stage.results_file) if stage.results_file.is_file() else {}
    data = stage.folder / "store" / "records.lance" / "data"
    return sorted(file.stem[-12:] for file in data.glob("*")) if results.get("keys") else []


def incomplete(stages: Sequence[Stage]) -> str:
    """Which stages failed, and why, or have not run, in a sentence; "" where all are done."""
    rest = [stage for stage in stages if stage.state != "done"]
    return "; ".join(
        f"{stage.name} {stage.state}" + f" ({stage.failure})" * (stage.state == "failed")
        for stage in rest
    )


def _load(file: Path, profile: str, table: dict, folder: Path) -> Stage:
    cells = _read_cells(file)
    for number, (kind, source, _) in enumerate(cells, 1):
        try:
            imports.imported(source if kind == "code" else "")
        except SyntaxError as error:
            raise UserError(f"{file.name}, cell {number} is not valid Python: {error}") from error
    sources = [source for _, source, is_tagged in cells if is_tagged]
    defaults = parameters.assignments(sources[0]) if sources else {}
    for key in table:
        if key not in defaults:
            raise UserError(f"{profile}.toml, table {file.stem}: the parameters cell does not name "
                          f"{key}; it names: {', '.join(defaults) or 'nothing'}")  # fmt: skip
        if wrong := parameters.misfit(table[key], defaults[key]):
            raise UserError(f"{profile}.toml, table {file.stem}: {key} {wrong}")
    if table.get("PROFILE", profile) != profile:
        raise UserError(
            f"{profile}.toml, table {file.stem}: PROFILE is {table['PROFILE']!r}; it is the "
            f"name of the file, {profile!r}"
        )
    own = {"PROFILE": profile, "DTYPE": _dtype()}
    own = {name: value for name, value in own.items() if name in defaults and value}
    return Stage(file, profile, folder, defaults, table | own, cells)


def _dtype() -> str:
    """The dtype that KIT_DTYPE sets for all notebooks: it outranks the profile. "" where it asks
    nothing."""
    name = os.environ.get("KIT_DTYPE", "").removeprefix("auto")
    if name and name not in DTYPES:
        raise UserError(f"DTYPE is {name!r}; take one of: auto, {', '.join(DTYPES)}")
    return name


def _read_cells(file: Path) -> tuple[tuple[str, str, bool], ...]:
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{file.name} is not a notebook (version 4): {error}") from error
    return tuple(
        (
            cell["cell_type"],
            "".join(cell["source"]),
            "parameters" in cell["metadata"].get("tags", []),
        )
        for cell in cells
    )


def _code(cells: tuple[tuple[str, str, bool], ...]) -> tuple[str, ...]:
    return tuple(source for kind, source, _ in cells if kind == "code")
