r"""Where a text says its answer: a box, an answer line, a heading or tag, else its last number.

The gold answer is never looked at, only what kind of answer is asked for (an option letter).
Every pattern is bounded or possessive, because the text comes from a model.
"""

import re
from dataclasses import dataclass

from kit.data import boxed
from kit.evaluation import latex

BELOW = 20  # lines below an open answer line that may still belong to it

_HEAD = r"(?:answer|antwort|réponse|respuesta|resposta|risposta|ответ|答案|答え|回答|정답)"
_COLON = re.compile(
    rf"[^\w\\]*+(?:(?:the|my|so,?|final|correct)\s++){{0,3}}+{_HEAD}\s*+[*_]*+\s*+[:：=]",
    re.IGNORECASE,
)
_HEADING = re.compile(
    rf"[^\w\\<]*+(?:(?:the|my|final|correct)\s++){{0,3}}+{_HEAD}[^\w\\$]*+$", re.IGNORECASE
)
_IS = re.compile(r"\banswer\s+is\b\s*:?", re.IGNORECASE)
_HASHES = re.compile(r"\s*+####\s*+(\S*[0-9]\S*)\s*$")
_TAG = re.compile(r"<answer>\s*+([^<]{1,2000}+)</answer>", re.IGNORECASE)
_JSON = re.compile(
    r'"(?:final[_ ]?)?answer"\s*+:\s*+(?:"((?:[^"\\]|\\.){1,2000}+)"|([^,}"\n\s]{1,200}+))',
    re.IGNORECASE,
)
_NEXT_TURN = re.compile(r"^[ \t]*+(?:question|problem|q|human|user)[ \t]*+:", re.I | re.M)
_LAST_NUMBER = re.compile(
    r"(?<![\w.)])-?+\\[dt]?frac\{-?[0-9]{1,99}\}\{[0-9]{1,99}\}"
    r"|(?:(?<![\w)])-)?+\$?+(?:[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++)?+|\.[0-9]++)"
    r"(?:/[0-9]++)?+(?:\s?\\?%)?+"
)
_LETTER = re.compile(
    r"(?:\b(?:option|choice|answer)\b(?:\s+is)?[\s:*$(]*+([A-J])\b(?!['’])"
    r"|\(([A-J])\)|^\W*+([A-J])[).]?\W*+$)",
    re.MULTILINE,
)
_OPTION = re.compile(r"[\W_]*+(?:\\text(?:bf|it|rm)?\{\W*+)?([A-J])(?:\W*+$|\)|[.:]\s)")
_SENTENCE_END = re.compile(r"[.!]\s+(?=[A-Z])")
_EXPLAINED = re.compile(
    r"(?:[,;]\s{1,9}|\s[-–—]\s|\s{1,9}\(?)(?:because|since|as|which|whereas|where|so|that|meaning"
    r"|i\.e\.|after|when|while|given|assuming)\b"
    r"|[,;]\s{1,9}(?:it|this|and\s(?:it|this|that))\b"
    r"|\s{1,9}\((?!mod)(?=[A-Za-z ,'’-]{1,80}\)\W*$)",
    re.IGNORECASE,
)
_MATH_FIRST = re.compile(r"(?:\$([^$]{1,200})\$|\\\((.{1,200}?)\\\))(?=\s*+[,.;(]|\s++[a-z])")
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}+(?![({])")
_COPULA = re.compile(r"\b(?:is|are|was|were|equals?|becomes?)\b:?\s++(?=\S)", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:the|an?|exactly|approximately|about|only|simply)\s++", re.IGNORECASE)
_ORDINAL = re.compile(r"([0-9]{1,99})(?:st|nd|rd|th)")
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|without|except|unlike|instead|rather)\b|n['’]t\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Found:
    """What a text gives as its answer."""

    answer: str  # "" where it gives none
    method: str  # "boxed", "answer line", "last number", "letter", "none"
    sentence: str = ""  # that the answer was taken from, where it is a sentence


def extract(text: str, letters: bool = False) -> Found:
    """The later of the last box and the last line that gives the answer, else the last number.

    After a closed `<think>` block only what follows it counts, unless that is blank; what follows
    the answer as a new question does not. A line "Answer: ..." ranks with a box by place; "the
    answer is ..." only where there is no box. With `letters` an option (A to J) is looked for.
    Linear in the length of the text.
    """
    text = first_turn(said(text))
    boxes = boxed.boxes(text)
    line = _answer_line(text)
    if boxes and (line is None or not line[2] or boxes[-1].start > line[1]):
        found = Found(boxes[-1].content, "boxed")
    elif line:
        answer = value(line[0])
        found = Found(answer, "answer line", "" if answer == line[0] else line[0])
    else:
        found = Found("", "none")
    if letters and (option := _option(text, found.answer)):
        return Found(option, found.method if found.answer else "letter", found.sentence)
    if found.answer:
        return found
    last = ""
    for match in _LAST_NUMBER.finditer(latex.ascii_digits(text).replace("\u2212", "-")):
        last = match[0]
    return Found(last, "last number") if last else found


def said(text: str) -> str:
    """What follows the last closed `<think>` block, the whole where nothing does."""
    _, closed, rest = text.rpartition("</think>")
    return rest if closed and rest.strip() else text


def first_turn(text: str) -> str:
    """The text without the questions that a model goes on to ask itself after its answer."""
    for turn in _NEXT_TURN.finditer(text):
        head = text[: turn.start()]
        if boxed.last_boxed(head) or _answer_line(head):
            return head
        break
    return text


def _answer_line(text: str) -> tuple[str, int, bool] | None:
    """(what the last answer line says, where it starts, whether it is one by its form).

    A line left open, or a heading, goes on below.
    """
    lines = text.splitlines(keepends=True)
    tagged = [m for pattern in (_TAG, _JSON) for m in pattern.finditer(text)]
    tag = max(tagged, key=lambda match: match.start(), default=None)
    end = len(text)
    for at in range(len(lines) - 1, -1, -1):
        line, start = lines[at], end - len(lines[at])
        end = start
        if tag and tag.start() >= start:
            return next(filter(None, tag.groups())).strip(), start, True
        if hashes := _HASHES.match(line):
            return hashes[1], start, True
        heads, form = [_COLON.match(line) or _HEADING.match(line)], True
        if not heads[0]:
            heads, form = ([*_IS.finditer(line)] if "answer" in line.lower() else []), False
        if not heads:
            continue
        told, below = line[heads[-1].end() :], at + 1
        while below < min(len(lines), at + BELOW) and (not strip(told) or _open(told)):
            told, below = told + lines[below], below + 1
        if told := strip(_SENTENCE_END.split(told, maxsplit=1)[0]):
            return told, start, form
    return None


def _open(told: str) -> bool:
    return told.count("{") > told.count("}") or told.count(r"\begin") > told.count(r"\end")


def strip(told: str) -> str:
    """Without markdown emphasis, quotation marks, one pair of math delimiters, the full stop."""
    told = told.strip(" \t\r\n*_`").removesuffix(".").strip(" \t\r\n*_`")
    for left, right in (('"', '"'), ("“", "”"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"),
                        (r"\[", r"\]")):  # fmt: skip
        inner = told[len(left) : -len(right)]
        if told.startswith(left) and told.endswith(right) and inner and left not in inner:
            return inner.strip().removesuffix(".") if left in '"“' else inner.strip()
    return told


def value(told: str) -> str:
    """What an answer line comes to: its value, without the explanation or the sentence around it.

    A line that is no sentence stays as it is.
    """
    told = told.replace("**", "").replace("`", "").strip()
    heads = [*_IS.finditer(told)]
    if heads and (rest := strip(told[heads[-1].end() :])):
        told = rest
    if len(told) > latex.LONGEST:
        return told
    if (math := _MATH_FIRST.match(told)) and _explains(told[math.end() :]):
        return (math[1] or math[2]).strip()
    if (cut := _EXPLAINED.search(told)) and (head := strip(told[: cut.start()])):
        if re.search(r"[0-9\\]", head) or len(head.split()) <= 3:
            told = head
    if ordinal := _ORDINAL.fullmatch(_ARTICLE.sub("", told, count=1)):
        return ordinal[1]
    return _predicate(told) if len(_WORD.findall(told)) >= 3 else told


def _explains(rest: str) -> bool:
    """Whether what follows a value only talks about it."""
    rest = rest.strip()
    return bool(_EXPLAINED.match(" " + rest)) or not re.search(r"[0-9$\\=]|\b(?:or|and)\b", rest)


def _predicate(sentence: str) -> str:
    """What a sentence says of its subject, its one number, or the sentence itself."""
    if _NEGATION.search(sentence):
        return sentence
    if heads := [*_COPULA.finditer(sentence)]:
        rest = _ARTICLE.sub("", strip(sentence[heads[-1].end() :]), count=1)
        if rest and len(_WORD.findall(rest)) <= 2:
            return strip(rest)
    numbers = [match[0] for match in _LAST_NUMBER.finditer(sentence)]
    return numbers[0] if len(numbers) == 1 and "\\" not in sentence else sentence


def _option(text: str, answer: str) -> str:
    """The option letter that an answer starts with, or else the last that the text names."""
    if match := _OPTION.match(answer):
        return match[1]
    named = [*_LETTER.finditer(text)] if not answer.strip() else []
    return next(filter(None, named[-1].groups())) if named else ""


def names(gold: str, sentence: str) -> bool:
    """Whether a sentence gives the worded `gold` as its answer: as a word of it that is neither
    denied nor one of several. Of three letters or fewer (a symbol), as its last word, case and all.
    """
    if _NEGATION.search(sentence) or re.search(r"\bor\b|\beither\b", sentence, re.IGNORECASE):
        return False
    words, wanted = re.findall(r"[^\W_]+", sentence), re.findall(r"[^\W_]+", gold)
    if not wanted or len(words) <= len(wanted):
        return False
    if len("".join(wanted)) <= 3 or gold.casefold() in ("true", "false"):
        return words[-len(wanted) :] == wanted
    folded, wanted = [w.casefold() for w in words], [w.casefold() for w in wanted]
    spans = range(len(folded) - len(wanted) + 1)
    return any(folded[at : at + len(wanted)] == wanted for at in spans)
