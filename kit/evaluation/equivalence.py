r"""Equivalence of two answers: by rules, and by math-verify where no rule applies.

`equal` takes two answers tidied by `latex.tidy`. It decides identical, numeric, listed, worded and
assigned answers itself, as well as plain algebra of other values, and passes all others to `leaf`.
In a worker this is `symbolic`, which uses math-verify and sympy; `sandbox` bounds its time and
memory. The rules, case by case, are the table in tests/evaluation/test_grader.py.
"""

import functools
import re
from collections.abc import Callable
from fractions import Fraction

from kit.evaluation import latex, numeric

Leaf = Callable[[str, str], bool | None]
_PART = r"\\[a-zA-Z]++|[a-zA-Z]\([^()=]{1,40}\)|[a-zA-Z]|_(?:\w|\{[^{}]{1,20}\})|[(){},:' ]"
_NAME = re.compile(rf"(?:{_PART})++")  # x, f(2), AB, \angle ABC, (x, y)
_QUANTITY = re.compile(rf"(?:{_PART}|[+\-/])++")  # a + b
_BASE = re.compile(r"(-?[0-9A-Z.]*[0-9][0-9A-Z.]*)_(?:([0-9]+)|\{ ?([0-9]+) ?\})")
_CLOCK = re.compile(r":[0-9]{2} ?[ap]m$")
_WORDS = re.compile(r"\(?([A-Za-z][A-Za-z .'\-]*)\)?")
_SET_LIKE = re.compile(r"[<>]|\\(?:le|leq|lt|ge|geq|gt|in|cup|cap|setminus|mathbb)(?![a-z])")
_COMMA = re.compile(
    r"(-?(?:[0-9]{1,3}(?:[. ][0-9]{3})+|[0-9]+)),([0-9]{1,2}|[0-9]{4,9})"
    rf"({latex.POWER_OF_TEN})?"
)
_DOTS = re.compile(r"-?[0-9]{1,3}(?:\.[0-9]{3}){2,6}")
_RATIO = re.compile(r"[0-9]{1,9}(?: ?: ?[0-9]{1,9}){2,8}")
_BUILDER = re.compile(
    r"\\\{ ?[a-z] ?(?:\\in ?\\mathbb ?\{? ?R ?\}? ?)?(?:\\mid|\\vert|\||:) ?(.*?) ?\\\}"
)
_MEMBER = re.compile(r"[a-zA-Z] ?\\in ?(.*)")
_END = r"((?:\\(?:frac|sqrt|pi)(?![a-z])|[^<>=,a-z\\]){1,40}?)"
_RELATION = r" ?(<|>|\\[lg]e(?:q|qslant)?(?![a-z])) ?"
_HALF = re.compile(rf"[a-z]{_RELATION}{_END}|{_END}{_RELATION}[a-z]")
_EVERY = re.compile(r"(?:x is )?(?:all|any|every) reals?(?: numbers?)?|all reals", re.IGNORECASE)
_NONE = re.compile(r"no (?:real )?solutions?|(?:the )?empty set", re.IGNORECASE)
_FRENCH = re.compile(r"([\[\]]) ?([^\[\]]*,[^\[\]]*?) ?([\[\]])")
_ROWS = re.compile(r"\[ ?(\[[^\[\]]*\](?: ?, ?\[[^\[\]]*\])*) ?\]")
_EQUALS = re.compile(r"(?<![\\<>!:])=")


def equal(gold: str, answer: str, leaf: Leaf, depth: int = 0) -> bool | None:
    """Whether two tidied answers are equal; `leaf` decides where strings and numbers cannot.

    None if `leaf` returns None and nothing else decides.
    """
    if latex.squeeze(gold) == latex.squeeze(answer):
        return True
    if depth > 8:
        return False  # no real answer is nested so deep
    numbers = latex.number(gold), latex.number(answer)
    if all(numbers):
        return _equal_numbers(*numbers)
    if numbers[0] and (other := latex.number(_decimal_point(answer))):
        return _equal_numbers(numbers[0], other)
    if all(ratios := (_RATIO.fullmatch(gold), _RATIO.fullmatch(answer))):
        return _equal_ratios(*(match[0].split(":") for match in ratios))
    gold, answer = _upwards(gold), _upwards(answer)
    if latex.squeeze(gold) == latex.squeeze(answer):
        return True
    if _BASE.fullmatch(gold) or _BASE.fullmatch(answer):
        return _based(gold) == _based(answer)
    if _CLOCK.search(gold) or _CLOCK.search(answer):
        return False  # a time of day is a string
    words = _WORDS.fullmatch(gold), _WORDS.fullmatch(answer)
    if all(words) and not all(len(word[1]) <= 3 and word[1].islower() for word in words):
        return _letters(words[0][1]) == _letters(words[1][1])
    for settle in (_equal_lists, _equal_relations):
        if (verdict := settle(gold, answer, leaf, depth + 1)) is not NotImplemented:
            return verdict
    return False if numeric.apart(gold, answer) else leaf(gold, answer)


def _equal_numbers(gold: latex.Number, answer: latex.Number) -> bool:
    """Exact, with two allowances: 20% is 20 or 0.2, and a decimal may stand for a fraction.

    For the latter it needs six significant digits, and may be rounded or cut.
    """
    if gold.percent != answer.percent:
        plain, percent = (answer, gold) if gold.percent else (gold, answer)
        return plain.value in (percent.value, percent.value / 100)
    if gold.value == answer.value:
        return True
    decimals = [number for number in (gold, answer) if number.places > 0 and number.digits >= 6]
    if len(decimals) != 1 or -1 not in (gold.places, answer.places):
        return False
    return abs(gold.value - answer.value) < Fraction(1, 10 ** decimals[0].places)


def _decimal_point(text: str) -> str:
    """`3,14`, `1.234,5` and `1.234.567` with a decimal point: the notation of many languages."""
    if _DOTS.fullmatch(text):
        return text.replace(".", "")
    match = _COMMA.fullmatch(text)
    return f"{re.sub('[. ]', '', match[1])}.{match[2]}{match[3] or ''}" if match else ""


def _equal_ratios(gold: list[str], answer: list[str]) -> bool:
    """a:b:c equals its multiples."""
    if len(gold) != len(answer):
        return False
    golds, answers = [Fraction(x) for x in gold], [Fraction(x) for x in answer]
    return all(g * answers[0] == a * golds[0] for g, a in zip(golds, answers)) and any(answers)


def _upwards(text: str) -> str:
    r"""Sets and relations in one notation: a chain of inequalities from small to large, the
    condition of `\{x \mid ...\}` and the set of `x \in ...` by themselves, `x < a or x > b` as a
    union, `a < x and x < b` and `]a, b[` as an interval, `[[1, 2], [3, 4]]` as a matrix."""
    if _EVERY.fullmatch(text):
        return r"\mathbb{R}"
    if _NONE.fullmatch(text):
        return r"\emptyset"
    if match := _ROWS.fullmatch(text):
        rows = [row.replace(",", " & ") for row in re.findall(r"\[([^\[\]]*)\]", match[1])]
        return r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}"
    if (match := _MEMBER.fullmatch(text)) and match[1][0] in "\\{[(]":
        text = match[1]
    if (match := _FRENCH.fullmatch(text)) and (match[1], match[3]) != ("[", "]"):
        return f"{'(' if match[1] == ']' else '['}{match[2]}{')' if match[3] == '[' else ']'}"
    if not _SET_LIKE.search(text):
        return text
    if match := _BUILDER.fullmatch(text):
        return _upwards(match[1])
    for word in ("or", "and"):
        parts = [part.strip() for part in re.split(rf"(?<![a-z\\]){word}(?![a-z])", text)]
        if 1 < len(parts) <= 8 and all(bounds := [_bound(part) for part in parts]):
            if word == "or":
                return r" \cup ".join(f"{left}, {right}" for left, right in bounds)
            lefts = [left for left, _ in bounds if "infty" not in left]
            rights = [right for _, right in bounds if "infty" not in right]
            if len(lefts) == len(rights) == 1:
                return f"{lefts[0]}, {rights[0]}"
    sides = re.split(r" ?(>|\\ge(?:q|qslant)?(?![a-z])) ?", text)
    if len(sides) >= 5 and not re.search(r"<|\\l(?:e|eq|t)(?![a-z])", text):
        return " ".join({">": "<"}.get(x, r"\le" if i % 2 else x) for i, x in
                        [*enumerate(sides)][::-1])  # fmt: skip
    return text


def _bound(part: str) -> tuple[str, str] | None:
    r"""Both ends of the interval of `x < 2` or `2 > x`: `(-\infty` and `2)`."""
    if not (match := _HALF.fullmatch(part)):
        return None
    relation, end = (match[1], match[2]) if match[1] else (match[4], match[3])
    upper, closed = (relation[:2] in ("<", r"\l")) == bool(match[1]), relation not in "<>"
    if upper:
        return r"(-\infty", f"{end}{']' if closed else ')'}"
    return f"{'[' if closed else '('}{end}", r"\infty)"


def _based(text: str) -> tuple[str, int] | None:
    """Digits and base of `2516_8`: notation, so `2516` alone and its decimal value differ."""
    match = _BASE.fullmatch(text)
    return match and (match[1], int(match[2] or match[3]))


def _letters(words: str) -> str:
    letters = re.sub(r"[^A-Za-z]", "", words)
    return letters.casefold() if len(letters) > 1 else letters


def _elements(text: str) -> tuple[str, list[str]]:
    r"""Kind of bracket ("" for none, a set or a lone parenthesis) and what stands inside.

    `2 \pm \sqrt 3` stands for two elements.
    """
    kind, inside = latex.brackets(text) or ("", text)
    whole = not kind and latex.number(inside) is not None  # (3,100) is a pair, 3,100 a number
    parts = [inside] if whole else latex.split_top(inside)
    if kind == "{}" or (kind == "()" and len(parts) == 1):
        kind = ""
    if kind == "" and r"\pm" in inside:
        pairs = [(p.replace(r"\pm", "+").replace(r"\mp", "-"), p) for p in parts]
        minus = [p.replace(r"\pm", "-").replace(r"\mp", "+") for _, p in pairs if r"\pm" in p]
        parts = [plus for plus, _ in pairs] + minus
    return kind, parts


def _equal_lists(gold: str, answer: str, leaf: Leaf, depth: int) -> bool | None:
    """Lists and sets in any order, tuples and intervals in order with the same brackets."""
    if latex.number(gold) and (inside := latex.brackets(answer)) and latex.number(inside[1]):
        return equal(gold, inside[1], leaf, depth)
    (gold_kind, golds), (kind, answers) = _elements(gold), _elements(answer)
    if gold_kind == "()" and not kind:  # (1,2) answered by x=1, y=2, or by (x,y)=(1,2)
        values = _by_name(answers) or (answer.rpartition("=")[2].strip(),)
        whole = f"({', '.join(values)})" if len(values) > 1 else values[0]
        if whole != answer and latex.brackets(whole):
            return equal(gold, whole, leaf, depth)
    if len(golds) == len(answers) == 1 and not gold_kind and not kind:
        same = (golds[0], answers[0]) == (gold, answer)
        return NotImplemented if same else equal(golds[0], answers[0], leaf, depth)
    many = len(golds) > 1, len(answers) > 1
    if not all(many):
        single, bracket = (answer, gold_kind) if many[0] else (gold, kind)
        return NotImplemented if bracket and _SET_LIKE.search(single) else False
    if len(golds) != len(answers) or gold_kind != kind or len(golds) > 64:
        return False
    remaining = list(answers)
    for gold_part in golds:
        candidates = remaining[:1] if kind else remaining
        verdicts = [equal(gold_part, candidate, leaf, depth) for candidate in candidates]
        if True not in verdicts:
            return None if None in verdicts else False
        del remaining[verdicts.index(True)]
    return True


def _by_name(parts: list[str]) -> tuple[str, ...]:
    """The values of `y=2, x=1` in the order of their names; () for what is no such list."""
    sides = [re.split(r" ?= ?", part) for part in parts]
    if len(parts) < 2 or any(len(s) != 2 or not re.fullmatch("[a-z]", s[0]) for s in sides):
        return ()
    return tuple(value for _, value in sorted(sides)) if len(dict(sides)) == len(sides) else ()


def _equal_relations(gold: str, answer: str, leaf: Leaf, depth: int) -> bool | None:
    r"""`x = 5` answers `5` and the reverse; `2x + 3 = 5` does not. `A \approx B` is A or B."""
    sides = re.split(r"\\approx(?![a-z])", gold), re.split(r"\\approx(?![a-z])", answer)
    if len(sides[0]) + len(sides[1]) > 2:
        pairs = [(g.strip(), a.strip()) for g in sides[0][:2] for a in sides[1][:2]]
        verdicts = [equal(g, a, leaf, depth) for g, a in pairs if g and a]
        return True if True in verdicts else None if None in verdicts else False
    golds, answers = _EQUALS.split(gold), _EQUALS.split(answer)
    golds, answers = [p.strip() for p in golds], [p.strip() for p in answers]
    if len(golds) == len(answers) == 1:
        return NotImplemented
    gold_value, value = _value(golds, _NAME), _value(answers, _QUANTITY)
    several = len(golds) > 1 and len(answers) > 1
    if gold_value is None or value is None:
        return leaf(gold, answer) if several else False
    if several and latex.squeeze(golds[0]) != latex.squeeze(answers[0]):
        return leaf(gold, answer)
    return equal(gold_value, value, leaf, depth)


def _value(sides: list[str], name: re.Pattern) -> str | None:
    """Value of an assignment to a name, or of a chain of equal numbers; None for an equation."""
    first, last = sides[0], sides[-1]
    if len(sides) == 1 or _NAME.fullmatch(first):
        return last
    if _NAME.fullmatch(last):
        return first
    numbers = [n.value for n in map(latex.number, sides) if n and not n.percent]
    if len(set(numbers)) > 1:
        return None  # 41 = 5
    quantity = name.fullmatch(first) and last != "0"  # a + b = 5 answers 5; x + y = 0 is a line
    return last if quantity or not re.search(r"[a-zA-Z]", first) else None


def symbolic(gold: str, answer: str) -> bool:
    """Whether math-verify finds two expressions equal; unreadable ones are different."""
    from math_verify import verify
    from sympy import Expr, Symbol, simplify

    first, second = _parse(gold), _parse(answer)
    if first is None or second is None or _far(first, second):
        return False
    if verify(first, second, allow_set_relation_comp=True, timeout_seconds=None):
        return True
    # math-verify compares a lone symbol by name: x differs from (2x)/2.
    lone = isinstance(first, Symbol) or isinstance(second, Symbol)
    return lone and isinstance(second, Expr) and simplify(first - second) == 0


@functools.lru_cache(maxsize=1024)
def _parse(text: str):
    """A sympy object, with i as the imaginary unit; None if the text is not parsed as a whole."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import I, Rational

    plain = latex.number(text)
    if plain and not plain.percent:  # spares the slow LaTeX parser
        value = Rational(plain.value.numerator, plain.value.denominator)
        return value.evalf() if plain.places > 0 else value
    # No units (they take the `m` off `5m`) and no fallback to "some number in the text".
    reading = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    config = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=reading)
    expressions = parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)
    if not expressions:
        return None
    units = [symbol for symbol in expressions[0].free_symbols if symbol.name == "i"]
    return expressions[0].xreplace(dict.fromkeys(units, I)) if units else expressions[0]


def _far(gold, answer) -> bool:
    """Whether two expressions differ at a point, which avoids a slow `simplify`.

    It is also stricter than math-verify, which compares to 6 (decimals) or 15 absolute
    decimals, so that 2^-98 would equal 2^-99: here the difference is relative.
    """
    from sympy import Expr, Float, MatrixBase, Rational

    for kind in (MatrixBase, Expr):  # a matrix is no scalar, a set or an inequality no expression
        if isinstance(gold, kind) != isinstance(answer, kind):
            return True
    if isinstance(gold, MatrixBase) or not isinstance(gold, Expr):
        return False
    names = sorted(gold.free_symbols | answer.free_symbols, key=str)
    at = {name: Rational(7 * k + 5, 11 * k + 13) for k, name in enumerate(names)}
    first, second = gold.subs(at).evalf(25), answer.subs(at).evalf(25)
    if not (first.is_number and second.is_number and first.is_finite and second.is_finite):
        return False
    tolerance = 1e-6 if gold.has(Float) or answer.has(Float) else 1e-9
    return bool(abs(first - second) > tolerance * max(abs(first), abs(second)))
