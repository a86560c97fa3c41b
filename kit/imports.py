"""Which files of the kit a piece of source imports, so that a change in another leaves it alone."""

import ast
from functools import cache
from pathlib import Path


def kit_modules(code: tuple[str, ...], kit: Path) -> list[Path]:
    """Files of the kit that these sources import, directly or through one another."""
    found: set[Path] = set()
    waiting = [name for text in code for name in imported(text)]
    while waiting:
        name = waiting.pop()
        file = kit / (f"{name.split('.')[1]}.py" if "." in name else "__init__.py")
        if file.is_file() and file not in found:  # "kit.paths.ROOT" leads to paths.py
            found.add(file)
            waiting += ["kit", *imported(file.read_text(encoding="utf-8"))]
    return sorted(found)


@cache
def imported(text: str) -> tuple[str, ...]:
    """Dotted names under `kit` that a source imports, anywhere in it."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("%", "!"))]
    names = []
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            base = f"kit.{base}".rstrip(".") if node.level else base
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(name for name in names if name.split(".")[0] == "kit")
