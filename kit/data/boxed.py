r"""The boxes of a LaTeX text, `\boxed{...}` and `\fbox{...}`, found in one linear pass.

Braces are matched as TeX does: `\{` and `\}` are not groups, a box that is never closed is no box,
and a blank box holds no answer. Problem sets read gold answers by it, the grader a model's.
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
    command: str  # as it was written: with a brace, or bare before a number


def boxes(text: str) -> list[Box]:
    r"""The boxes of a text that hold something, by where they start; of two nested the inner one.

    Unbraced boxes (`\boxed 2`) count when a number follows.
    """
    stack: list[tuple[int, str]] = []  # per open brace: where its content starts, box command
    found: list[Box] = []
    for token in _TOKEN.finditer(text):
        slashes, word, brace = token.groups()
        brace = brace or (token[0] if not slashes else None)
        if slashes and not word and len(slashes) % 2:
            continue  # \{ or \}: a character, not a group
        if brace == "{":
            stack.append((token.end(), word or ""))
        elif brace == "}" and stack:
            opened, command = stack.pop()
            later = not found or opened > found[-1].start  # else it holds a box that stands here
            if command and later and (content := text[opened : token.end() - 1].strip()):
                found.append(Box(opened, content, rf"\{command}{{"))
        elif word and not brace and (bare := _UNBRACED.match(text, token.end())):
            content = re.split(r"\\[)\]]", bare[0])[0].rstrip(".,;:")
            found.append(Box(token.end(), content, rf"\{word}"))
    return found


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, `\fbox{...}` or `\boxed 2`; None without a box."""
    found = boxes(text)
    return found[-1].content if found else None
