r"""Answer extraction: a box, an answer line, a heading or a tag, else the last number of a text.

The gold answer is not used, only the kind of answer that is required (an option letter). Every
pattern is bounded or possessive, because model text is untrusted.
"""

import re
from dataclasses import dataclass

from kit.data import boxed
from kit.evaluation import latex

TAIL = 100_000  # characters in which a last number is looked for
BELOW = 20  # lines after an unfinished answer line that may belong to it

_HEAD = (
    r"(?:answer|ans\.?|antwort|réponse|respuesta|resposta|risposta|ответ|答案|答え|回答|答|정답|답"
    r"|उत्तर|जवाब|الجواب|الإجابة)"
)
_LEAD = r"(?:[^\w\\<]|_|[0-9]{1,2}[.)]\s|\\(?:text|math)(?:bf|it|rm)?\{)*+"
_ADJECTIVES = r"(?:(?:the|my|so,?|final|correct)\s++){0,3}+"
_COLON = re.compile(rf"{_LEAD}{_ADJECTIVES}{_HEAD}\s*+[*_]*+\s*+(?:[:：=]|[-–—]\s)", re.IGNORECASE)
_HEADING = re.compile(rf"{_LEAD}{_ADJECTIVES}{_HEAD}[^\w\\$]*+$", re.IGNORECASE)
_IS = re.compile(
    r"\banswer(?:\s+to\s[^.:\n]{1,80}?)?\s+(?:is|equals"
    r"|(?:(?:would|must|should|will)\s+be|comes\s+to)(?=[^\n]{0,80}[0-9$\\]))\b\s*:?|\bréponse\s+est\b|\brespuesta\s+es\b|\bresposta\s+é\b|\brisposta\s+è\b"
    r"|\bantwort\s+(?:ist|lautet)\b:?|答案(?:是|为|為)[:：]?|答えは",
    re.IGNORECASE,
)
_SAYS = re.compile(r"answer|réponse|respuesta|resposta|risposta|antwort|答", re.IGNORECASE)
_HASHES = re.compile(r"\s*+####\s*+(\S*[0-9]\S*)\s*$")
_TAG = re.compile(r"<(?:final[_ ]?)?answer>\s*+([^<]{1,2000}+)</", re.IGNORECASE)
_JSON = re.compile(
    r"""["'](?:final[_ ]?)?answer["']\s*+:\s*+"""
    r"""(?:"((?:[^"\\]|\\.){1,2000}+)"|'([^'\n]{1,200}+)'|([^,}"'\n\s]{1,200}+))""",
    re.IGNORECASE,
)
_NEXT_TURN = re.compile(r"^[ \t]*+(?:question|problem|q|human|user)[ \t]*+:", re.I | re.M)
_DENIED = re.compile(
    r"(?:(?:\bnot|n['’]t|\brather than|\binstead of)(?: be)?(?: equal(?: to|s)?)?[ $(]{1,3}"
    r"|(?:\\neq?|\\not ?=|≠|!=) ?)$",
    re.IGNORECASE,
)
_CORRECTED = re.compile(  # No wait, it is 7.
    r"\b(?:no,?\s+wait|wait,?\s+no|correction|scratch\s+that|sorry)\b\W{1,5}"
    r"(?:(?:it|that|this|the\s+answer)(?:['’]s|\s+is|\s+(?:should|must)\s+be|\s+equals)\s+|(?=[-$0-9]))"
    r"([^\s\n]{1,80}?(?:\s?[A-Za-z]{1,20})?)(?:[.!]*\s*$|[.!,;]\s)",
    re.IGNORECASE | re.MULTILINE,
)
_LETTER = re.compile(
    r"(?:\b(?i:option|choice|answer)\b(?:\s+is)?[\s:*$(]*+([A-J])\b(?!['’])"
    r"|\b(?i:choose|pick|select|think|go\s+with)\b(?:\s+it\s+is)?[\s:*$(]*+([A-HJ])\b"
    r"(?!['’]|\s+(?!because\b|since\b)[a-z])"
    r"|(?<!\w)([A-J])\)?\**\s(?i:is|seems|must\s+be)\s(?:the\s)?(?:(?:correct|right|best)\b|answer\b)"
    r"|\b(?i:so|thus|hence|therefore|it['’]s|it\s+is)\b,?\s[\s:*$(]*+([A-J])(?:\W*+$|[.!]\s)"
    r"|\(([A-J])\)|^\W*+([A-J])[).]?\W*+$)",
    re.MULTILINE,
)
_OPTION = re.compile(
    r"[^\w\\]*+_?(?:\\(?:text|math)(?:bf|it|rm)?\{\W*+)?([A-J])(?:\W*+$|\)|[.:]\s|\s[-–—]\s)"
)
_SENTENCE_END = re.compile(r"[.!]\s+(?=[A-Z]|[0-9]{1,9}\s[A-Za-zé]{3})|。")
_EXPLAINED = re.compile(
    r"(?:[,;]\s{1,9}|\s[-–—]\s|\s{1,9}\(?)(?:because|since|as|which|whereas|where|so|that|meaning"
    r"|i\.e\.|after|when|while|given|assuming)\b"
    r"|[,;]\s{1,9}(?:it|this|the|an?|and\s(?:it|this|that))\s"
    r"|\s{1,9}\((?!mod)(?=[A-Za-z ,'’-]{1,80}\)\W*$)",
    re.IGNORECASE,
)
_MEASURED = re.compile(
    r"([-0-9.,/$]{1,40} [A-Za-z]{3,20}) \((?<!mod \()[^()]{1,80}\)\W*"
)  # 12 apples (3 + 9)
_MATH_FIRST = re.compile(r"(?:\$([^$]{1,200})\$|\\\((.{1,200}?)\\\))(?=\s*+[,.;(]|\s++[a-z])")
_WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}+(?![({])")
_COPULA = re.compile(r"\b(?:is|are|was|were|equals?|becomes?)\b:?\s++(?=\S)", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:the|an?|exactly|approximately|about|only|simply)\s++", re.IGNORECASE)
_NOUN = re.compile(
    r"(?:the\s)?(?:set|pair|ordered\spair|point|interval|value|number)\s(?=\W*[-0-9(\[{\\])", re.I
)
_NOT_BUT = re.compile(r"\bnot\s[^,;.]{1,60}?,?\sbut\s", re.IGNORECASE)
_NOT_OTHER = re.compile(r"(?:,\s?(?:and\s)?not|\srather\sthan|\sinstead\sof)\s[^,;.]{1,60}$", re.I)
_ORDINAL = re.compile(r"([0-9]{1,99})(?:st|nd|rd|th)")
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|without|except|unlike|instead|rather)\b|n['’]t\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Extraction:
    """The answer extracted from a text."""

    answer: str  # "" if there is none
    method: str  # "boxed", "answer line", "last number", "letter", "none"
    sentence: str = ""  # the sentence that the answer was taken from, if any


def extract(text: str, letters: bool = False) -> Extraction:
    """The later of the last box and the last answer line, else the last number.

    Only text after a closed `<think>` block counts, unless it is blank; a new question after the
    answer does not. Of a box and a line "Answer: ..." the later one counts; "the answer is ..."
    counts only without a box; "No wait, it is 7." after it takes its place. A number that the text
    denies ("not 5") is not the last. With `letters` an option (A to J) is extracted. Linear in the
    length of the text.
    """
    text = first_turn(after_thinking(text))
    boxes = boxed.boxes(text)
    line = _answer_line(text)
    if boxes and (line is None or not line[2] or boxes[-1].start > line[1]):
        result, start = Extraction(boxes[-1].content, "boxed"), boxes[-1].start
    elif line:
        start = line[1]
        answer = value(line[0])
        result = Extraction(answer, "answer line", "" if answer == line[0] else line[0])
    else:
        result, start = Extraction("", "none"), len(text)
    if corrections := _CORRECTED.findall(text, start):
        result = Extraction(strip(corrections[-1]), "answer line")
    if letters and (option := _option(text, result.answer)):
        return Extraction(option, result.method if result.answer else "letter", result.sentence)
    if result.answer:
        return result
    numbers = latex.numbers(text[-TAIL:])
    candidates = (number for number, before, _ in numbers[::-1] if not _DENIED.search(before))
    last = next(candidates, "")
    return Extraction(last, "last number") if last else result


def after_thinking(text: str) -> str:
    """The text after the last closed `<think>` block, or all of it if nothing follows."""
    _, closed, rest = text.rpartition("</think>")
    return rest if closed and rest.strip() else text


def first_turn(text: str) -> str:
    """The text without further questions that a model asks itself after its answer."""
    for turn in _NEXT_TURN.finditer(text):
        head = text[: turn.start()]
        if boxed.last_boxed(head) or _answer_line(head):
            return head
        break
    return text


def _answer_line(text: str) -> tuple[str, int, bool] | None:
    """The last answer line: (its text, where it starts, whether it has the form of one).

    An unfinished line, or a heading, continues on the next lines.
    """
    lines = text.splitlines(keepends=True)
    matches = [m for pattern in (_TAG, _JSON) for m in pattern.finditer(text)]
    tag = max(matches, key=lambda match: match.start(), default=None)
    end = len(text)
    for at in range(len(lines) - 1, -1, -1):
        line, start = lines[at], end - len(lines[at])
        end = start
        if tag and tag.start() >= start:
            return strip(next(filter(None, tag.groups()))), start, True
        if hashes := _HASHES.match(line):
            return hashes[1], start, True
        heads, form = [_COLON.match(line) or _HEADING.match(line)], True
        if not heads[0]:
            heads, form = ([*_IS.finditer(line)] if _SAYS.search(line) else []), False
        if not heads:
            continue
        content, below = line[heads[-1].end() :], at + 1
        if "{" in heads[-1][0]:
            content = content.lstrip(" }")  # \textbf{Answer: } 5
        while below < min(len(lines), at + BELOW) and (not strip(content) or _open(content)):
            content, below = content + lines[below], below + 1
        if content := strip(_SENTENCE_END.split(content, maxsplit=1)[0]):
            return content, start, form
    return None


def _open(content: str) -> bool:
    pairs = ("{", "}"), (r"\begin", r"\end"), (r"\[", r"\]")
    return any(content.count(left) > content.count(right) for left, right in pairs)


def strip(content: str) -> str:
    """The text without markdown emphasis, quotation marks, math delimiters and full stop."""
    content = content.strip(" \t\r\n*_`").removesuffix(".").strip(" \t\r\n*_`")
    for left, right in (('"', '"'), ("“", "”"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"),
                        (r"\[", r"\]")):  # fmt: skip
        inner = content[len(left) : -len(right)]
        if content.startswith(left) and content.endswith(right) and inner and left not in inner:
            return inner.strip().removesuffix(".") if left in '"“' else inner.strip()
    return content


def value(content: str) -> str:
    """The value in an answer line, without the explanation or the sentence around it.

    A line that is not a sentence is returned unchanged.
    """
    content = content.replace("**", "").replace("`", "").strip()
    heads = [*_IS.finditer(content)]
    if heads and (rest := strip(content[heads[-1].end() :])):
        content = rest
    if len(content) > latex.LONGEST:
        return content
    content = _NOUN.sub("", asserted(content), count=1)
    if measured := _MEASURED.fullmatch(content):
        content = measured[1]
    if (math := _MATH_FIRST.match(content)) and _explains(content[math.end() :]):
        return (math[1] or math[2]).strip()
    if (cut := _EXPLAINED.search(content)) and (head := strip(content[: cut.start()])):
        if re.search(r"[0-9\\]", head) or len(head.split()) <= 3:
            content = head
    if ordinal := _ORDINAL.fullmatch(_ARTICLE.sub("", content, count=1)):
        return ordinal[1]
    return _predicate(content) if len(_WORD.findall(content)) >= 3 else content


def asserted(sentence: str) -> str:
    """The sentence without what it denies beside what it says: "not 5 but 6", "Ti, not Tin"."""
    return _NOT_OTHER.sub("", _NOT_BUT.sub("", sentence, count=1), count=1)


def _explains(rest: str) -> bool:
    """Whether the text after a value only explains it."""
    rest = rest.strip()
    return bool(_EXPLAINED.match(" " + rest)) or not re.search(r"[0-9$\\=]|\b(?:or|and)\b", rest)


def _predicate(sentence: str) -> str:
    """The predicate of a sentence, or its only number, or the sentence itself."""
    if _NEGATION.search(sentence):
        return sentence
    if heads := [*_COPULA.finditer(sentence)]:
        rest = _ARTICLE.sub("", strip(sentence[heads[-1].end() :]), count=1)
        if rest and len(_WORD.findall(rest)) <= 2:
            return strip(rest)
    numbers = latex.numbers(sentence)
    return numbers[0][0] if len(numbers) == 1 and "\\" not in sentence else sentence


def _option(text: str, answer: str) -> str:
    """The option letter that an answer starts with, else the last one in the text."""
    if match := _OPTION.match(answer):
        return match[1]
    if answer.strip():
        return ""
    if matches := [*_LETTER.finditer(text)]:
        return next(filter(None, matches[-1].groups()))
    whole = _OPTION.match(text) if "\n" not in text.strip() else None  # "C) 25 J"
    return whole[1] if whole else ""


def names(gold: str, sentence: str) -> bool:
    """Whether a sentence gives the worded `gold` as its answer: it contains the words and neither a
    negation, unless the gold is one, nor alternatives. Up to three letters (a symbol) must be its
    last word, case included.
    """
    sentence = asserted(sentence)
    if _NEGATION.search(sentence) and not _NEGATION.search(gold):
        return False
    if re.search(r"\bor\b|\beither\b", sentence, re.IGNORECASE):
        return False
    words, target = re.findall(r"[^\W_]+", sentence), re.findall(r"[^\W_]+", gold)
    if not target or len(words) <= len(target):
        return False
    if len("".join(target)) <= 3 or gold.casefold() in ("true", "false"):
        return words[-len(target) :] == target
    folded, target = [w.casefold() for w in words], [w.casefold() for w in target]
    spans = range(len(folded) - len(target) + 1)
    matches = [at for at in spans if folded[at : at + len(target)] == target]
    return bool(matches) and not any(_listed(words, at, at + len(target)) for at in matches)


def _listed(words: list[str], start: int, end: int) -> bool:
    """Whether words[start:end] is one of several names: "Paris and Lyon"."""
    before, after = words[max(start - 2, 0) : start], words[end : end + 2]
    return any(
        len(pair) == 2 and pair[joint].casefold() == "and" and pair[1 - joint][0].isupper()
        for pair, joint in ((before, 1), (after, 0))
    )
