"""The parameters cell of a notebook, and whether a profile's values fit it."""

import ast
from datetime import date, datetime, time

from kit.pipeline import imports

DATES = (date, datetime, time)  # TOML has them, JSON and the notebooks do not


class Expression(str):
    """Source text of a default that is no literal, so that its type is not known."""


def assignments(source: str) -> dict:
    """Name -> value of each assignment in a cell, an Expression where that is no literal."""
    values = {}
    for node in imports.parsed(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and node.value is not None:
                try:
                    values[target.id] = ast.literal_eval(node.value)
                except ValueError:
                    values[target.id] = Expression(ast.unparse(node.value))
    return values


def misfit(value: object, default: object) -> str:
    """The reason why `value` cannot replace `default`: "" where its type is the same, or an
    integer stands for a float.

    The items of a list fit one of the default's items, those of a table the default's of that name.
    """
    if _holds_a_date(value):
        return "holds a date or time; write it as a text in quotes"
    kind = type(default)
    if default is None or kind is Expression:
        return ""
    if kind is list and type(value) is list:
        strange = [item for item in value if default and all(misfit(item, of) for of in default)]
        return (
            f"holds {strange[0]!r}, {_a(type(strange[0]))}; the notebook has {default!r}"
            if strange
            else ""
        )
    if kind is dict and type(value) is dict:
        wrong = {name: misfit(value[name], default[name]) for name in value if name in default}
        return next((f"has {name}, which {why}" for name, why in wrong.items() if why), "")
    if type(value) is kind:
        return ""
    if kind is float and type(value) is int:
        return ""
    return f"is {value!r}, {_a(type(value))}; the notebook has {_a(kind)}, {default!r}"


def _holds_a_date(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_a_date, value.values() if isinstance(value, dict) else value))
    return isinstance(value, DATES)


def _a(kind: type) -> str:
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return names.get(kind, {list: "a list", dict: "a table"}.get(kind, f"a {kind.__name__}"))
