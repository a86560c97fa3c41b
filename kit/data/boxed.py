r"""Boxed answers in LaTeX, `\boxed{...}` and `\fbox{...}`, found in one linear pass.

Braces match as in TeX: `\{` and `\}` do not open groups, an unclosed box is ignored, and so is an
empty one. Problem sets read their gold answers this way, and the grader those of models.
"""

import re
from dataclasses import dataclass

# A run of backslashes with what may follow it, or a bare brace. Every quantifier is possessive:
# nothing is scanned twice, however hostile the text.
_TOKEN = re.compile(r"(\\++)(?:(boxed|fbox)(?![a-zA-Z])\s*+)?+([{}])?+|[{}]")
_UNBRACED = re.compile(r"[-+]?(?:[.0-9]|\\[dt]?frac)[^\s$]{0,200}")


@dataclass(frozen=True)
class Box:
    """A box in a text."""

    start: int  # of its content
    content: str
    command: str  # as written: with a brace, or bare before a number


def boxes(text: str) -> list[Box]:
    r"""The boxes of a text that are not empty, by their start; of two nested boxes the inner one.

    Unbraced boxes (`\boxed 2`) count when a number follows.
    """
    stack: list[tuple[int, str]] = []  # per open brace: where its content starts, box command
    found_boxes: list[Box] = []
    for token in _TOKEN.finditer(text):
        slashes, word, brace = token.groups()
        brace = brace or (token[0] if not slashes else None)
        if slashes and not word and len(slashes) % 2:
            continue  # \{ or \}: a character, not a group
        if brace == "{":
            stack.append((token.end(), word or ""))
        elif brace == "}" and stack:
            opened, command = stack.pop()
            later = (
                not found_boxes or opened > found_boxes[-1].start
            )  # else it contains the previous box
            if command and later and (content := text[opened : token.end() - 1].strip()):
                found_boxes.append(Box(opened, content, rf"\{command}{{"))
        elif word and not brace and (bare := _UNBRACED.match(text, token.end())):
            content = re.split(r"\\[)\]]", bare[0])[0].rstrip(".,;:")
            found_boxes.append(Box(token.end(), content, rf"\{word}"))
    return found_boxes


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, `\fbox{...}` or `\boxed 2`; None without a box."""
    every = boxes(text)
    return every[-1].content if every else None
