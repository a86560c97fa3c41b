r"""Finding boxed answers in LaTeX: one pass, linear time, braces matched as TeX does.

`\{` and `\}` are not groups, a box that is never closed is no box, a blank box holds no
answer. Used by `problems` (gold answers) and `grade` (model answers); it does not parse
mathematics.
"""

import re

# A run of backslashes with what may follow it, or a bare brace. Every quantifier is possessive:
# nothing is scanned twice, however hostile the text.
_TOKEN = re.compile(r"(\\++)(?:(boxed|fbox)(?![a-zA-Z])\s*+)?+([{}])?+|[{}]")
_UNBRACED = re.compile(r"[-+]?(?:[.\d]|\\[dt]?frac)[^\s$]{0,200}")


def last_boxed(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}` or `\fbox{...}`, or of a later `\boxed 2`.

    "Last" is by where the box starts, so of two nested boxes the inner one. None without a box.
    """
    stack: list[int] = []  # per open brace: where its content starts if it opens a box, else -1
    start, found = -1, None
    for token in _TOKEN.finditer(text):
        slashes, word, brace = token.groups()
        brace = brace or (token[0] if not slashes else None)
        if slashes and not word and len(slashes) % 2:
            continue  # \{ or \}: a character, not a group
        if brace == "{":
            stack.append(token.end() if word else -1)
        elif brace == "}" and stack:
            opened = stack.pop()
            if opened > start and not (content := text[opened : token.start()].strip()) == "":
                start, found = opened, content
        elif word and (bare := _UNBRACED.match(text, token.end())):
            start, found = token.end(), re.split(r"\\[)\]]", bare[0])[0].rstrip(".,;:")
    return found
