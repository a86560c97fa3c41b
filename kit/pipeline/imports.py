"""Which files of the kit a piece of source imports, so that a change in another leaves it alone."""

import ast
import symtable
from functools import cache
from pathlib import Path


def kit_modules(code: tuple[str, ...], kit: Path) -> list[Path]:
    """Files of the kit that these sources import, directly or through one another, and the
    __init__ of each package on the way. ModuleNotFoundError for a module that has no file."""
    modules: set[Path] = set()
    waiting = {name for text in code for name in imported(text)}
    while waiting:
        for file in {*_files(waiting.pop(), kit)} - modules:
            modules.add(file)
            package = ".".join(("kit", *file.parent.relative_to(kit).parts))
            waiting.update(imported(file.read_text(encoding="utf-8"), package))
    return sorted(modules)


def _files(name: str, kit: Path) -> list[Path]:
    """Files that the import of a dotted name runs; "kit.paths.ROOT" leads to paths.py."""
    place, files = kit, [kit / "__init__.py"]
    for part in name.split(".")[1:]:
        package, module = place / part / "__init__.py", place / f"{part}.py"
        if package.is_file():
            files.append(package)
            place /= part
        elif module.is_file():
            return [*files, module]
        elif part in ("*", *_names(files[-1])):
            return files
        else:
            raise ModuleNotFoundError(f"{name} has no file {module.relative_to(kit.parent)}")
    return files


def _names(file: Path) -> tuple[str, ...]:
    """Names that the body of a module reads or sets."""
    table = symtable.symtable(file.read_text(encoding="utf-8"), str(file), "exec")
    return tuple(table.get_identifiers())


@cache
def imported(text: str, package: str = "kit") -> tuple[str, ...]:
    """Dotted names under `kit` that a source of `package` imports, anywhere in it."""
    names = []
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(name for name in names if name.split(".")[0] == "kit")


def parsed(text: str) -> ast.Module:
    """The syntax tree of a cell; magics, `!` and `?` of IPython become calls, as in a notebook."""
    try:
        return ast.parse(text)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        return ast.parse(TransformerManager().transform_cell(text))
