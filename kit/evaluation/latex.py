r"""LaTeX answers as strings: typographic normalization, plain numbers, lists.

Only linear passes and bounded patterns, because model text is untrusted. Algebra is left to
math-verify.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 2000  # characters of an answer that are compared at most

_SYMBOLS = {
    **dict.fromkeys("−–", "-"),
    **{
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "√": r"\sqrt ",
    },
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "≈": r"\approx ", "°": r"^\circ "},
    **{"<=": r"\le ", ">=": r"\ge ", "**": "^", "±": r"\pm ", "⁄": "/", "’": "'"},
    **{"、": ",", "或": " or ", "和": " and ", "。": ".", "⩽": r"\le ", "⩾": r"\ge "},
    **{"∛": r"\sqrt[3] ", r"\yen": "", r"\pounds": "", r"\euro": ""},
    **{r"\langle": "(", r"\rangle": ")", r"\varnothing": r"\emptyset", r"\{\}": r"\emptyset"},
}
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
_WIDE = {code: unicodedata.normalize("NFKC", chr(code)) for code in
         (*range(0xFF01, 0xFF5F), *range(0xFE50, 0xFE6C))}  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_VULGAR = {
    char: unicodedata.normalize("NFKD", char).split("\u2044") for char in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_UPRIGHT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it)|bm|boldsymbol|underline|num)\s*"
_TEXT = _UPRIGHT + r"\{([^{}]*)\}"
_NOT_UNITS = (
    r"(?:[ap]\.?m|and|or|\w*illion|thousand|hundred|dozen|hal(?:f|ves)|thirds?|fourths?|quarters?"
    r"|fifths?|tenths?|percent|times|plus|minus|over|squared|cubed|sqrt|root|base|mod|modulo"
    r"|choose|factorial|infinity)\b"
)
_UNIT = re.compile(  # \text{ cm}^2, \mathrm{m\,s^{-1}}
    rf"(?<=[0-9a-z}})%])\s*(?!\\[a-z]+\s*\{{\s*{_NOT_UNITS}){_UPRIGHT}"
    r"\{(?:[^{}]|\{[^{}]*\})*\}(?:\^\{?-?[0-9]\}?)?\.?$"
)
_CURRENCY = r"(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|Rs)"
_SHORT_UNITS = (
    r"(?:[cmkn]m|[mk]?g|ft|in|mi|yd|lbs?|oz|mph|hrs?|min|m?sec|[mn]s|days?|sq|[kMG]?Hz|mL|k?Pa"
    rf"|[kMG]?eV|mol|rad|k[JWN]|k?cal|(?-i:[JNWVL])|{_CURRENCY})\.?"
)
_NUMBER = (
    r"(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?"
    r"|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}"
    r"|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
)
_WORD_UNIT = re.compile(
    rf"(?<=[0-9}}])(?:\s+(?!(?:\w+ )*{_NOT_UNITS})(?:{_SHORT_UNITS}|[A-Za-z]{{4,}})"
    r"(?: [A-Za-z]{2,}\.?){0,6}(?:\^\{?-?[0-9]\}?)?|\s*(?:\\mu ?m|\\Omega))$",
    re.IGNORECASE,
)
_WORDED = r"\\(?:text|mathrm) ?\{[^{}]{1,9}\}"
_RATE = re.compile(  # 20 m/s, 9.8 m/s^2, 20 \frac{\text{m}}{\text{s}}
    r"(?<=[0-9])(?: (?:[cmk]?m|mi|ft|k?g|[LJNV])(?:\^?\{?[23]\}?)?"
    r"/(?:s|h|hr|min|sec|hour|[cmk]?m|k?g|L|C)(?:\^?\{?[23]\}?)?"
    rf"| ?\\frac\{{ ?{_WORDED} ?\}}\{{ ?{_WORDED}(?:\^\{{?[23]\}}?)? ?\}})$"
)
_CJK_UNIT = re.compile(
    r"(?<=[0-9]) ?(?:(?![万亿兆千百十만억])[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]){1,4}$"
)
_ENVIRONMENT = r"\\(?:begin|end) ?\{(?:aligned|align\*?|split|gathered|equation\*?)\}"
_CASES = re.compile(r"\\begin ?\{cases\}([^&]*)\\end ?\{cases\}")
_ARRAY = re.compile(r"[(\[] ?\\begin ?\{(array|matrix)\} ?(?:\{[^{}]*\})?(.*?)\\end ?\{\1\} ?[)\]]")
_LAST = re.compile(
    r"(?:\s|\\\\|\\(?:qed|blacksquare|square|checkmark)(?![a-z])|\\label ?\{[^{}]*\})+$"
)
_BEFORE = re.compile(
    rf"^\s*(?:(?:about|approximately|approx\.?|roughly|exactly)\s+(?=[-0-9.\\])"
    rf"|(?:US|AU|NZ|HK|[AC])(?=\\?\$ ?[0-9])|{_CURRENCY}\.?\s*(?=[0-9]))",
    re.IGNORECASE,
)
_FUNCTION = re.compile(r"(?<![a-zA-Z\\])\\?(sqrt|cbrt|abs) ?\(([^()]*)\)")
_WRITTEN = {"sqrt": r"\sqrt{%s}", "cbrt": r"\sqrt[3]{%s}", "abs": "|%s|"}
_TRIG = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")


def tidy(latex: str) -> str:
    r"""The answer without its typography; idempotent.

    Removed: dollar signs and math delimiters, `\left` `\right`, `\dfrac`, spacing commands, `\!`
    and `{,}` between thousands, degree signs (radians inside trigonometry), units after a number,
    `\text` wrappers, a final full stop. Decimal digits of any script become ASCII digits;
    superscripts and circled digits do not. Kept: percent signs, bases, brackets, a.m. and p.m.
    """
    text = _LAST.sub("", _BEFORE.sub("", ascii_signs(latex)))
    text = re.sub(r"(?<=[0-9])(?:, ?\\!|\{, ?\}|\\,) ?(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<=[0-9])\{, ?\}(?=[0-9])", ".", text)  # a decimal comma
    text = re.sub(r"\\(?:text)?color ?\{[^{}]*\}|\\tag\*? ?\{[^{}]*\}", "", text)
    text = re.sub(r"\\!|\\?\$|[£€¥₹₩¢]|(?<!\\)\\[()\[\]]|\\(?:display|text)style", "", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?:\.|(?![a-zA-Z]))", "", text)
    text = re.sub(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s", " ", text)
    text = _SYMBOL.sub(lambda m: _SYMBOLS[m[0]], text)
    text = re.sub(r"\\(?:[dtc]|nice|s)frac", r"\\frac", text)
    text = re.sub(r"\\operatorname\*? ?\{ ?(ln|log|exp|(?:arc)?(?:sin|cos|tan)) ?\}", r"\\\1 ",
                  text)  # fmt: skip
    text = re.sub(r"\\binom ?([0-9]) ?([0-9])", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\^ ?(-[0-9]+(?:\.[0-9]+)?|[0-9]+\.[0-9]+)", r"^{\1}", text)
    text = re.sub(r"(\\sqrt ?\[[0-9]\]) ?([0-9a-zA-Z])", r"\1{\2}", text)
    text = _FUNCTION.sub(lambda m: _WRITTEN[m[1]] % m[2], text)
    text = _structures(text) if r"\begin" in text or r"\choose" in text else text
    text = re.sub(r"\\frac ?(\\pi|[0-9a-zA-Z])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\}) ?(\\pi|[0-9a-zA-Z])", r"\1{\2}", text)
    text = re.sub(r"\\?%|\\text\s*\{\s*percent\s*\}|(?<=[0-9 ])percent\b", "%", text)
    degrees = r"\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degrees?(?![a-z])"
    if _TRIG.search(text):
        text = re.sub(rf"([0-9.]+) ?(?:{degrees})", r"{(\\frac{\1\\pi}{180})}", text)
    scale = r" ?(?:\\(?:text|mathrm) ?\{ ?[CF] ?\}|[CF](?![A-Za-z]))"
    text = re.sub(rf"(?<=[0-9]) ?(?:{degrees}){scale}", "", text)
    text = re.sub(degrees, "", text)
    text = re.sub(r" +", " ", text).rstrip(" .,;:").lstrip(" ,;:")
    while (unit := _UNIT.search(text)) and re.search(r"[0-9]|\\pi", text[: unit.start()]):
        text = re.sub(r"(?: |\\cdot|/)+$", "", text[: unit.start()])
    text = _RATE.sub("", text)
    text = re.sub(r" +(?=[_^])", "", re.sub(_TEXT, r" \1 ", text))
    text = re.sub(r"(?<=[0-9]) *([AaPp])\.? ?[Mm]\b\.?", lambda m: m[1].lower() + "m", text)
    text = re.sub(r"(?<![a-zA-Z\\])(pi|ln|log|exp)(?![a-zA-Z])", r"\\\1", text)
    text = re.sub(r" +", " ", text).rstrip(" .,;:").lstrip(" ,;:")
    if len(text) >= 100:
        return text
    return _WORD_UNIT.sub("", _CJK_UNIT.sub("", text))


def _structures(text: str) -> str:
    """Environments and infix commands in a canonical form: alignments and cases as lists, a
    bracketed array as a matrix, `n \\choose k` as a binomial."""
    text = re.sub(r"\{? ?([0-9a-z]{1,9}) ?\\choose ?([0-9a-z]{1,9}) ?\}?", r"\\binom{\1}{\2}", text)
    text = _ARRAY.sub(r"\\begin{pmatrix}\2\\end{pmatrix}", text)
    text = _CASES.sub(lambda m: m[1].replace(r"\\", ", "), text)
    plain = re.sub(_ENVIRONMENT, "", text)
    return plain.replace("&", "") if plain != text and r"\begin" not in plain else text


def ascii_signs(text: str) -> str:
    """The text with signs of other scripts in their ASCII or LaTeX form: digits, full-width
    punctuation, vulgar fractions, raised digits, narrow spaces between groups of three digits."""
    if text.isascii():
        return text
    text = ascii_digits(text).translate(_WIDE)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    for char in set(text) & _VULGAR.keys():
        top, bottom = _VULGAR[char]
        text = text.replace(char, rf" \frac{{{top}}}{{{bottom}}}")
    return re.sub(r"(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))", "", text)


def ascii_digits(text: str) -> str:
    """The text with decimal digits of other scripts (full width, Arabic-Indic) as 0 to 9."""
    if text.isascii():
        return text
    return "".join(str(int(c)) if c.isdecimal() else c for c in text)


def squeeze(text: str) -> str:
    """The text without spaces, except between two digits, to compare strings."""
    return re.sub(r"(?<![0-9]) +| +(?![0-9])", "", text)


@dataclass(frozen=True)
class Number:
    """A rational number: its exact value and how it was written."""

    value: Fraction
    percent: bool
    places: int  # decimals written, -1 for a fraction
    digits: int  # significant digits written, 0 for a fraction


_BRACED = rf"(?:\{{ ?([-+]?{_NUMBER}) ?\}}|([0-9]))"
_EXPONENT = r" ?\^ ?(?:\{ ?([-+]?[0-9]{1,3}) ?\}|([-+]?[0-9]{1,3}))(?![0-9])"
POWER_OF_TEN = (
    rf"(?:[eE]([-+]?[0-9]{{1,3}})(?![0-9A-Za-z])| ?(?:\\times|\\cdot|\*|[xX]) ?10{_EXPONENT})"
)
_REPEATED = r"(?:\\(?:overline|bar|dot) ?\{? ?([0-9]+) ?\}?|\(([0-9]+)\))"
_PLAIN = re.compile(rf"([-+]?) ?({_NUMBER})")
_FRACTION = re.compile(rf"([-+]?) ?(?:([0-9]+) ?)?\\frac ?{_BRACED} ?{_BRACED}")
_SLASH = re.compile(rf"([-+]?) ?(?:([0-9]+) )?({_NUMBER}) ?(?:[/:]|to) ?({_NUMBER})")
_SCIENTIFIC = re.compile(rf"([-+]?) ?({_NUMBER}){POWER_OF_TEN}")
_REPEATING = re.compile(rf"([-+]?) ?([0-9]*)\.([0-9]*){_REPEATED}")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = rf" ?({'|'.join(_SCALES)})"
_SCALED = re.compile(rf"([-+]?) ?({_NUMBER}){_SCALE}")


def number(text: str) -> Number | None:
    r"""Read a tidied integer, decimal, fraction, mixed number, ratio a:b, with or without `%`, a
    repeating decimal `0.\overline{3}`, `1.5e-4`, `1.5 \times 10^{-4}` or `5 million`.

    None for anything else, for a zero denominator and for more than 100 characters.
    """
    if len(text) > 100:
        return None
    percent = text.endswith("%")
    text = text.rstrip("% ")
    if match := _PLAIN.fullmatch(text):
        written = _ungrouped(match[2])
        places = len(written.partition(".")[2])
        digits = len(written.replace(".", "").lstrip("0"))
        value, whole = Fraction(written.rstrip(".")), 0
    elif match := _FRACTION.fullmatch(text) or _SLASH.fullmatch(text):
        over = [Fraction(_ungrouped(x).rstrip(".")) for x in match.groups()[2:] if x]
        if over[1] == 0:
            return None
        value, whole, places, digits = over[0] / over[1], int(match[2] or 0), -1, 0
    elif match := _SCIENTIFIC.fullmatch(text):
        power = int(next(filter(None, match.groups()[2:])))
        value = Fraction(_ungrouped(match[2]).rstrip(".")) * Fraction(10) ** power
        whole, places, digits = 0, -1, 0
    elif match := _SCALED.fullmatch(text):
        value = Fraction(_ungrouped(match[2]).rstrip(".")) * 10 ** _SCALES[match[3]]
        whole, places, digits = 0, -1, 0
    elif match := _REPEATING.fullmatch(text):
        fixed, cycle = match[3], match[4] or match[5]
        nines = 10 ** len(fixed) * (10 ** len(cycle) - 1)
        value = Fraction(int(fixed + cycle) - int(fixed or 0), nines)
        whole, places, digits = int(match[2] or 0), -1, 0
    else:
        return None
    return Number((whole + value) * (-1 if match[1] == "-" else 1), percent, places, digits)


def _ungrouped(digits: str) -> str:
    return digits.replace(",", "").replace(" ", "")


_COMMA = (  # 3,14 and 1.234,5 and 1.234.567, but not the end of 1,2,3
    r"(?<![0-9],)(?:[1-9][0-9]{0,2}(?:[. ][0-9]{3}){1,6}|[0-9]{1,99}),(?:[0-9]{1,2}|[0-9]{4,9})"
    r"(?![0-9]|,[0-9])|[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,6}(?![0-9]|[.,][0-9])"
)
_DECIMAL = rf"(?:{_COMMA}|{_NUMBER})(?![0-9])"
_WRITTEN_NUMBERS = "|".join(
    [
        rf"[0-9]{{0,99}}\.[0-9]{{0,99}}{_REPEATED}",
        rf"{_DECIMAL}{POWER_OF_TEN}",
        rf"(?:[0-9]{{1,99}} ?)?\\frac ?{_BRACED} ?{_BRACED}",
        rf"(?:[0-9]{{1,99}} )?{_NUMBER}/{_NUMBER}(?![0-9])",
        r"[0-9]{1,99}(?::[0-9]{1,99}){1,9}(?![0-9])",
        rf"[0-9]{{1,99}}(?:_(?:[0-9]{{1,3}}|\{{[0-9]{{1,3}}\}})|{_EXPONENT})",
        rf"{_DECIMAL}(?:{_SCALE}\b)?",
    ]
)
_RUNNING = re.compile(
    # Commands, words (H2O, e4, 0x3e5), the x of 2x3, indices and exponents: read over.
    r"\\(?!frac)[A-Za-z]++|0[xX][0-9A-Fa-f]++|(?<=[0-9])[xX](?=[0-9])|[A-Za-z][A-Za-z0-9]*+"
    r"|(?<=[A-Za-z0-9)}\]|])[_^] ?(?:\{[^{}]{0,99}\}|[-+]?[0-9]++)"
    r"|(?P<number>(?:(?<![\w)}\]!])-|(?<==)-\s|(?<==\s)-\s)?\$?(?<![0-9])(?<![0-9]\.)"
    rf"(?:{_WRITTEN_NUMBERS})(?:\s?\\?%)?)"
)


def numbers(text: str) -> list[tuple[str, str, str]]:
    r"""The numbers in running text in what `number` and `equal` read, each with the text before and
    after it (60 characters), in order: `6.02 \times 10^{23}`, `1 1/2` and `2^{10}` are one.

    Digits inside a word, an index and the exponent of a letter are none; "3 / 5" and "3 to 5" are
    two.
    """
    text = re.sub(r"(?<=[0-9])(?:, ?\\!|\{, ?\}|\\,) ?(?=[0-9]{3}(?![0-9]))", "", ascii_signs(text))
    text = re.sub(r"(?<=[0-9])\*\*(?=[-+]?[0-9{])", "^", text)
    text = re.sub(r"\\(?:[dtc]|nice|s)frac", r"\\frac", text)
    text = re.sub("[−–×·⋅]", lambda m: _SYMBOLS[m[0]], text)
    text = re.sub(r"(?:[ \t\u00a0\u2009\u202f]|\\[,;:! ])+", " ", text)
    matches = (match for match in _RUNNING.finditer(text) if match["number"])
    return [(m["number"].rstrip("."), text[max(m.start() - 60, 0) : m.start()],
             text[m.end() - m["number"].endswith(".") :][:60]) for m in matches]  # fmt: skip


_OPEN, _CLOSE = "([{", ")]}"


def split_top(text: str) -> list[str]:
    """Split at commas, semicolons, "and" and "or" outside all brackets."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(r"[()\[\]{}]|[,;]|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", text):
        if token[0] in _OPEN:
            depth += 1
        elif token[0] in _CLOSE:
            depth -= 1
        elif depth == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part] if len(parts) > 1 else parts


def terms(text: str) -> list[str]:
    """Split at plus and minus signs outside all brackets, except a leading one."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if char in "+-" and depth == 0 and text[start:place].strip():
            parts.append(text[start:place].strip())
            start = place
    return [*parts, text[start:].strip()]


def brackets(text: str) -> tuple[str, str] | None:
    r"""("(]", inside) if one pair of brackets spans the whole text; `\{` counts as `{`."""
    if text.startswith((r"\{", "{")):
        text = text.replace(r"\{", "{").replace(r"\}", "}")
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _CLOSE:
        return None
    depth = 0
    for place, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0 and place < len(text) - 1:
            return None
    return (text[0] + text[-1], text[1:-1].strip()) if depth == 0 else None
