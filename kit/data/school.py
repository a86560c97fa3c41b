"""Word problems and algebra of the school suite: ten families of three levels, made from templates.

A family draws the numbers, computes the answer exactly, and words the question in one of several
ways; in the manner of GSM-Symbolic (https://arxiv.org/abs/2410.05229), names and things are drawn
too. Level 3 has word problems with a sentence that does not matter. The levels were set by what
models solve, see LOG.md. `generated` draws, checks and freezes the suite.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from math import comb, lcm
from random import Random

NAMES = """Ada Amir Anika Bela Carlos Chloe Dmitri Elif Emeka Farah Felix Grace Hana Hugo Ines Ivan
Jamal Jun Kaia Keiko Leila Liam Lucia Malik Mei Milan Nadia Noor Olga Omar Petra Priya Quentin Rosa
Ruth Samir Sofia Tariq Uma Viktor Wanda Yusuf Zoe""".split()
THINGS = """notebooks candles mugs lamps scarves brushes plants baskets puzzles cushions kites
bowls ropes posters helmets ribbons tiles jars pencils ladders""".split()

Made = tuple[str, int | Fraction]  # a question and its answer
Family = Callable[[Random, int], Made]  # of a level from 1 to 3


def draw(family: str, level: int, r: Random) -> tuple[str, str, str]:
    """A question, the same without the sentence that does not matter, and its answer, which is not
    0 and not a number of the question: neither an echo nor "nothing" is ever right."""
    while True:
        core, answer = FAMILIES[family](r, level)
        wordy = level == LEVELS and family != "equations"
        text = _beside_the_point(r, core) if wordy else core
        if answer and str(abs(answer)) not in re.findall(r"[\d/]+", text):
            return text, core, str(answer)


def _beside_the_point(r: Random, text: str) -> str:
    """`text` with a sentence whose number does not matter, before it or after its first."""
    one, other = r.sample([name for name in NAMES if name not in text], 2)
    more = r.choice([
        f"{one} turned {r.randint(8, 60)} last week.",
        f"It is {r.randint(4, 35)} degrees outside.",
        f"{one} and {other} have been neighbours for {r.randint(2, 30)} years.",
        f"All of this happens in a town of {r.randint(11, 99)} streets.",
        f"The day before, {one} had slept for {r.randint(5, 11)} hours.",
        f"{one} heard of it {r.randint(12, 90)} minutes later.",
    ])  # fmt: skip
    first, mark, rest = text.partition(". ")
    return f"{first}. {more} {rest}" if mark and r.random() < 0.5 else f"{more} {text}"


def shopping(r: Random, level: int) -> Made:
    """A reduced bill; one of two kinds; things of which some are free."""
    who, (one, other) = r.choice(NAMES), r.sample(THINGS, 2)
    off, fee = r.choice((10, 15, 20, 25, 30, 35, 40)), r.randint(6, 40)
    if level == 1:
        while True:
            a, p = r.randint(13, 68), r.randint(23, 149)
            if a * p * off % 100 == 0 and p % 10:
                break
        text = r.choice([
            f"{who} orders {a} {one} at ${p} each. The price of the order is reduced by {off}%, "
            f"and then ${fee} is added for delivery. How many dollars does {who} pay?",
            f"For a school, {who} gets {a} {one}, which cost ${p} each, with a discount of "
            f"{off}%. Delivery costs another ${fee}. What is the total bill in dollars?",
        ])  # fmt: skip
        return text, Fraction(a * p * (100 - off), 100) + fee
    while True:
        a, b, p, q = r.randint(3, 14), r.randint(3, 14), r.randint(4, 29), r.randint(4, 29)
        if level == 3 or (a * p + b * q) * off % 100 == 0:
            break
    if level == 2:
        text = r.choice([
            f"{who} orders {a} {one} at ${p} each and {b} {other} at ${q} each. The whole order "
            f"is reduced by {off}%, and then ${fee} is added for delivery. How many dollars does "
            f"{who} pay?",
            f"For a school, {who} gets {a} {one} at ${p} apiece and {b} {other} at ${q} apiece, "
            f"all with a discount of {off}%. Delivery costs another ${fee}. What is the total "
            f"bill in dollars?",
        ])  # fmt: skip
        return text, Fraction((a * p + b * q) * (100 - off), 100) + fee
    each = r.randint(2, 5)
    n = (each + 1) * r.randint(3, 7)
    text = r.choice([
        f"For every {each} {one} that are paid for, a shop gives one more for free. The {one} cost "
        f"${p} each. {who} takes home {n} of them and also {b} {other} at ${q} each. What is the "
        f"least that {who} can pay, in dollars?",
        f"Whoever pays for {each} {one}, at ${p} apiece, gets another one free, as often as they "
        f"like. {who} needs {n} of them, and {b} {other} at ${q} each that are never free. How "
        f"many dollars does {who} pay at least?",
    ])  # fmt: skip
    return text, (n - n // (each + 1)) * p + b * q


def sharing(r: Random, level: int) -> Made:
    """Full bags; seats that stay empty; parts of a sum that are tied to each other."""
    who, thing = r.choice(NAMES), r.choice(THINGS)
    if level == 1:
        a, n, k = r.randint(13, 47), r.randint(23, 86), r.randint(13, 29)
        removed = r.randint(110, 240)
        text = r.choice([
            f"{who} unpacks {a} boxes with {n} {thing} in each. {removed} of the {thing} are "
            f"broken and thrown away, and the others are put into bags of {k}. How many bags "
            f"are full?",
            f"There are {a} crates, and every crate holds {n} {thing}. After {removed} {thing} "
            f"have been sold, {who} packs what is left in parcels of {k}. How many complete "
            f"parcels can be made?",
        ])  # fmt: skip
        return text, (a * n - removed) // k
    if level == 2:
        a, n, s, t = r.randint(4, 13), r.randint(17, 33), r.randint(38, 58), r.randint(3, 16)
        text = r.choice([
            f"{a} classes of {n} pupils each and {t} teachers go on a trip in buses of {s} "
            f"seats. As few buses as possible are hired. How many seats stay empty?",
            f"A hall is filled by {a} groups of {n} people and {t} guests, who sit in rows of "
            f"{s} chairs, using as few rows as possible. How many chairs in these rows are not "
            f"taken?",
        ])  # fmt: skip
        return text, -(a * n + t) % s
    other, third = r.sample([name for name in NAMES if name != who], 2)
    k, d, x = r.randint(2, 5), r.randint(5, 24), r.randint(12, 60)
    text = r.choice([
        f"{who} has {k} times as many {thing} as {other}, and {third} has {d} fewer than {who}. "
        f"Together the three have {x + k * x + k * x - d}. How many {thing} does {third} have?",
        f"{other} owns some {thing}. {who} owns {k} times that many, and {third} owns {d} fewer "
        f"than {who}. All three own {x + k * x + k * x - d} in total. How many belong to {third}?",
    ])  # fmt: skip
    return text, k * x - d


def equations(r: Random, level: int) -> Made:
    """One unknown: in two brackets; in two on both sides; in a bracket that is taken away."""
    x = r.choice([-1, 1]) * r.randint(2, 25)
    a, c = r.sample(range(2, 13), 2)
    b, d, e, f = (r.randint(2, top) for top in (19, 19, 9, 9))
    if level == 1:
        return _solve(r, f"{a}(x - {b}) + {c}(x + {d}) = {a * (x - b) + c * (x + d)}"), x
    if level == 2:
        return _solve(r, f"{a}(x - {b}) = {c}(x + {d}) {_signed(a * (x - b) - c * (x + d))}"), x
    if a + c * e == f:
        return equations(r, level)
    rest = a * (x - b) - c * (d - e * x) - f * x
    return _solve(r, f"{a}(x - {b}) - {c}({d} - {e}x) = {f}x {_signed(rest)}"), x


def _signed(value: int) -> str:
    """The last term of a sum; nothing for 0."""
    if not value:
        return ""
    return f"- {-value}" if value < 0 else f"+ {value}"


def _solve(r: Random, equation: str) -> str:
    equation = equation.strip()
    return r.choice([f"Solve for x: {equation}", f"Which number x satisfies {equation}?",
                     f"Find x if {equation}."])  # fmt: skip


def systems(r: Random, level: int) -> Made:
    """Two unknowns: from a count and a sum; from two purchases; from ages."""
    who, other = r.sample(NAMES, 2)
    one, two = r.sample(THINGS, 2)
    if level == 1:
        p, q = r.sample(range(7, 38), 2)
        a, b = r.randint(41, 260), r.randint(41, 260)
        text = r.choice([
            f"{a + b} tickets are sold, to adults for ${p} and to children for ${q}, and "
            f"${a * p + b * q} is taken. How many of the tickets are for adults?",
            f"{who} sells {a + b} {one}, in the morning for ${p} each and in the afternoon for "
            f"${q} each, and takes ${a * p + b * q}. How many were sold in the morning?",
        ])  # fmt: skip
        return text, a
    if level == 2:
        a, b, c, p, q = (r.randint(2, 9) for _ in range(5))
        p, q, c = p + r.randint(1, 19), q + r.randint(1, 19), b + c
        text = r.choice([
            f"{a} {one} and {b} {two} cost ${a * p + b * q} together, {a} {one} and {c} {two} "
            f"cost ${a * p + c * q}. What is the price in dollars of one of the {one}?",
            f"{who} pays ${a * p + b * q} for {a} {one} and {b} {two}; {other} pays "
            f"${a * p + c * q} for {a} {one} and {c} {two}. How many dollars is one of the {one}?",
        ])  # fmt: skip
        return text, p
    young, d, n = r.randint(4, 40), r.randint(2, 30), r.randint(3, 20)
    text = r.choice([
        f"{who} is {d} years older than {other}. In {n} years they will be "
        f"{2 * young + d + 2 * n} years old together. How old is {who} now?",
        f"Between {who} and {other}, who is younger, lie {d} years. {n} years from now the sum of "
        f"their ages will be {2 * young + d + 2 * n}. How old is {who} today?",
    ])  # fmt: skip
    return text, young + d


def fractions(r: Random, level: int) -> Made:
    """A sum; what is left of a whole; the whole from a part."""

    def part() -> Fraction:
        return Fraction(*sorted(r.sample(range(1, 10), 2)))

    who = r.choice(NAMES)
    while True:
        a, b, c = part(), part(), part()
        if len({each.denominator for each in (a, b, c)}) == 3 and a + b < 1 and c < a + b:
            break
    if level == 1:
        return f"Calculate {a} + {b} - {c} as a fraction in lowest terms.", a + b - c
    if level == 2:
        text = r.choice([
            f"{who} spends {a} of the savings on a bicycle, and then {b} of what is left on a "
            f"tent. What fraction of the savings remains, in lowest terms?",
            f"On the first day {a} of a field is mown, and on the second day {b} of the rest. "
            f"What fraction of the field is still not mown, in lowest terms?",
        ])  # fmt: skip
        return text, (1 - a) * (1 - b)
    whole = lcm(a.denominator, b.denominator) * r.randint(2, 12)
    text = r.choice([
        f"{who} reads {a} of a book on Monday and {b} of the book on Tuesday. On Wednesday {who} "
        f"reads the last {whole * (1 - a - b)} pages. How many pages has the book?",
        f"Of the water in a full tank, {a} is used in the morning and {b} in the afternoon. Then "
        f"{whole * (1 - a - b)} litres are left. How many litres does the tank hold?",
    ])  # fmt: skip
    return text, whole


def percentages(r: Random, level: int) -> Made:
    """Back from the reduced price; shares of shares; a mixture that is made thinner."""
    who, thing = r.choice(NAMES), r.choice(THINGS)
    if level == 1:
        p, q = (r.choice(range(5, 70, 5)) for _ in range(2))
        n = 400 * r.randint(2, 30)
        price = n * (100 - p) * (100 - q) // 10_000
        text = r.choice([
            f"The price of a machine was lowered by {p}%, and some weeks later the new price "
            f"was lowered by {q}%. Now it costs ${price}. How many dollars did it cost at first?",
            f"{who} spent {p}% of a prize, and later {q}% of what was left. ${price} remain. How "
            f"many dollars was the prize?",
        ])  # fmt: skip
        return text, n
    if level == 2:
        n = 500 * r.randint(2, 12)
        a, b, c = (r.choice(range(10, 90, 10)) for _ in range(3))
        text = r.choice([
            f"A school has {n} pupils, and {a}% of them are girls. Of the girls {b}% play an "
            f"instrument, and of the other pupils {c}% do. How many pupils play no instrument?",
            f"A shop stocks {n} {thing}, of which {a}% are red. {b}% of the red ones and {c}% of "
            f"the others are sold. How many {thing} are not sold?",
        ])  # fmt: skip
        red = n * a // 100
        return text, n - red * b // 100 - (n - red) * c // 100
    while True:
        a, b, c = r.randint(2, 30), r.randint(2, 30), r.randint(2, 20)
        p, q = 5 * r.randint(2, 12), 5 * r.randint(2, 12)
        if p != q and (a * p + b * q) % (a + b + c) == 0:
            break
    text = r.choice([
        f"{who} mixes {a} litres of a juice that is {p}% sugar with {b} litres of one that is "
        f"{q}% sugar, and pours in {c} litres of water. How many percent of the mixture are sugar?",
        f"A cook pours {a} litres of vinegar with {p}% acid, {b} litres of vinegar with {q}% acid "
        f"and {c} litres of water together. What percentage of the whole is acid?",
    ])  # fmt: skip
    return text, (a * p + b * q) // (a + b + c)


def geometry(r: Random, level: int) -> Made:
    """A rectangle from its perimeter; a path around one; cubes in a tank."""
    who, place = r.choice(NAMES), r.choice(("garden", "pool", "lawn", "yard"))
    if level == 1:
        w, d = r.randint(4, 30), r.randint(2, 17)
        text = r.choice([
            f"The perimeter of a rectangle is {4 * w + 2 * d} cm, and it is {d} cm longer than "
            f"it is wide. What is its area in square centimetres?",
            f"{who} bends a wire of {4 * w + 2 * d} cm into a rectangle whose length is {d} cm "
            f"more than its width. How many square centimetres does it enclose?",
        ])  # fmt: skip
        return text, w * (w + d)
    if level == 2:
        a, b, t = r.randint(9, 40), r.randint(6, 30), r.randint(1, 4)
        text = r.choice([
            f"A {place} of {a} m by {b} m is surrounded on all sides by a path that is {t} m "
            f"wide. What is the area of the path in square metres?",
            f"Around a rectangular {place}, {a} m long and {b} m wide, {who} lays a path {t} m "
            f"wide on all four sides, also at the corners. How many square metres is the path?",
        ])  # fmt: skip
        return text, (a + 2 * t) * (b + 2 * t) - a * b
    while True:
        s, i, j, n = 2 * r.randint(2, 5), r.randint(3, 8), r.randint(3, 8), r.randint(4, 20)
        a, b, h = s * i, s * j, r.randint(11, 30)
        if n <= i * j and 2 * n * s % (i * j) == 0:  # all on the ground, and a half at most
            break
    text = r.choice([
        f"A tank with a base of {a} cm by {b} cm holds water to a height of {h} cm. {n} solid "
        f"cubes with edges of {s} cm are sunk in it, and no water flows over. By how many "
        f"centimetres does the water rise?",
        f"{who} fills an aquarium, {a} cm long and {b} cm wide, with water to a height of {h} "
        f"cm, and then lays {n} stone cubes, {s} cm on each side, wholly under water. By how "
        f"many centimetres does the water rise, if nothing spills?",
    ])  # fmt: skip
    return text, Fraction(n * s**3, a * b)


def counting(r: Random, level: int) -> Made:
    """A committee; one of two kinds; one with a condition."""
    n, k = r.randint(6, 40), r.randint(2, 3)
    if level == 1:
        text = r.choice([
            f"A club of {n} people chooses a committee of {k}, in which all are equal. In how "
            f"many ways can this be done?",
            f"From {n} different cards {k} are drawn at once. How many different hands can this "
            f"give?",
        ])  # fmt: skip
        return text, comb(n, k)
    a, b, k, m = r.randint(4, 12), r.randint(4, 12), r.randint(1, 2), r.randint(2, 3)
    if level == 2:
        text = r.choice([
            f"From {a} women and {b} men a jury of {k} {'woman' if k == 1 else 'women'} and {m} "
            f"men is drawn. How many different juries are there?",
            f"There are {a} green and {b} blue marbles, all of different sizes. In how many ways "
            f"can {k} green and {m} blue ones be taken?",
        ])  # fmt: skip
        return text, comb(a, k) * comb(b, m)
    text = r.choice([
        f"From {a} women and {b} men a jury of {m} is drawn that has at least 1 woman. How many "
        f"different juries are there?",
        f"There are {a} green and {b} blue marbles, all of different sizes. In how many ways can "
        f"{m} of them be taken so that at least 1 is green?",
    ])  # fmt: skip
    return text, comb(a + b, m) - comb(b, m)


def rates(r: Random, level: int) -> Made:
    """A journey in two parts and back; one who catches up; two who meet."""
    who, other = r.sample(NAMES, 2)
    if level == 1:
        while True:
            a, b, u, v = r.randint(2, 7), r.randint(2, 7), r.randint(11, 58), r.randint(11, 58)
            w = r.randint(3, 16)
            if (a * u + b * v) % w == 0 and a * u + b * v < 70 * w:
                break
        text = r.choice([
            f"{who} drives for {a} hours at {u} km an hour and for {b} hours at {v} km an hour. "
            f"On the way back, by the same road, {who} needs {w} hours. How fast is that, in km "
            f"an hour?",
            f"A barge goes at {u} km an hour for {a} hours and at {v} km an hour for {b} hours. "
            f"It returns the whole way in {w} hours. What is its speed on the return, in km an "
            f"hour?",
        ])  # fmt: skip
        return text, (a * u + b * v) // w
    if level == 2:
        while True:
            u, v, t = r.randint(6, 40), r.randint(10, 90), r.randint(2, 9)
            if u < v < 3 * u and (u * t) % (v - u) == 0:
                break
        text = r.choice([
            f"{who} sets out at {u} km an hour. {t} hours later {other} follows on the same road "
            f"at {v} km an hour. How many hours does {other} need to catch up?",
            f"A goods train leaves a town at {u} km an hour, and {t} hours after it an express "
            f"leaves at {v} km an hour in the same direction. For how many hours does the "
            f"express run until it reaches the goods train?",
        ])  # fmt: skip
        return text, u * t // (v - u)
    u, v, t = r.randint(3, 60), r.randint(3, 60), r.randint(2, 9)
    text = r.choice([
        f"Two towns are {(u + v) * t} km apart. {who} leaves one of them at {u} km an hour, and "
        f"at the same time {other} leaves the other at {v} km an hour, on the same road. How many "
        f"km has {who} gone when they meet?",
        f"{(u + v) * t} km lie between {who} and {other}, who start towards each other together, "
        f"{who} at {u} km an hour and {other} at {v} km an hour. How many km does {who} travel "
        f"until they meet?",
    ])  # fmt: skip
    return text, u * t


def sequences(r: Random, level: int) -> Made:
    """A sum from the first and the last term; a term from two others; a sum from two terms."""
    who = r.choice(NAMES)
    if level == 1:
        a, d, n = r.randint(31, 190), r.randint(3, 19), r.randint(23, 60)
        last = a + d * (n - 1)
        text = r.choice([
            f"The rows of a theatre grow by the same number of seats from each to the next, from "
            f"{a} seats in the first to {last} in the last of {n} rows. How many seats are there?",
            f"Each day {who} saves more than on the day before, always by the same amount: ${a} "
            f"on the first and ${last} on the last of {n} days. How many dollars are saved in all?",
        ])  # fmt: skip
        return text, n * (a + last) // 2
    a, d, n = r.randint(5, 60), r.randint(2, 9), r.randint(6, 30)
    last = a + d * (n - 1)
    if level == 2:
        i, j, k = sorted(r.sample(range(3, 30), 3))
        first, second, third = (a + d * (m - 1) for m in (i, j, k))
        text = r.choice([
            f"Every row of a theatre has the same number of seats more than the row before it. Row "
            f"{i} has {first} seats and row {j} has {second}. How many seats has row {k}?",
            f"A plant of {who} grows by the same amount each day. On day {i} it is {first} mm "
            f"high, and on day {j} it is {second} mm high. How many mm high is it on day {k}?",
        ])  # fmt: skip
        return text, third
    i = r.randint(2, 5)
    text = r.choice([
        f"Every row of a theatre has the same number of seats more than the row before it. The "
        f"first row has {a} seats and row {i} has {a + d * (i - 1)}. How many seats are there in "
        f"the first {n} rows together?",
        f"{who} runs longer each day than the day before, always by the same time: {a} minutes on "
        f"the first day, and on day {i} it is {a + d * (i - 1)} minutes. How many minutes does "
        f"{who} run in the first {n} days altogether?",
    ])  # fmt: skip
    return text, n * (a + last) // 2


FAMILIES: dict[str, Family] = {
    function.__name__: function
    for function in (shopping, sharing, equations, systems, fractions, percentages, geometry,
                     counting, rates, sequences)
}  # fmt: skip
LEVELS = 3
