"""Problem sets: real files, planted overlaps, malformed rows, a local hub, the frozen suite."""

import ast
import gzip
import io
import itertools
import json
import math
import operator
import os
import random
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from kit import hub, paths
from kit.data import generated
from kit.data.dedup import OverlapError, check_disjoint, near_duplicates
from kit.data.generated import FAMILIES
from kit.data.problems import ProblemSet, load
from kit.data.sources import SOURCES
from kit.schema import Problem
from tests.fake_hub import build_cache

DATA = Path(os.environ.get("KIT_DATA", paths.ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no published files (KIT_DATA)")
MATH_TRAIN, MATH_TEST = DATA / "math_train.jsonl", DATA / "math_test.jsonl"
COMMIT = "c0ffee" * 6 + "c0de"


def problem(question: str, own: str = "p", answer: str = "1", level: int = 1) -> Problem:
    return Problem(own, question, answer, "family", level, "test")


def problem_set(*questions: str) -> ProblemSet:
    made = tuple(problem(q, own=f"p{i}") for i, q in enumerate(questions))
    return ProblemSet("made", "test", made, (), 0, "here")


def math_row(problem="What is $1+1$?", solution=r"It is $\boxed{2}$.", **more) -> dict:
    return {"problem": problem, "level": "Level 1", "type": "Algebra", "solution": solution} | more


def one_row(name: str) -> tuple[dict, str]:
    """A row in the published columns of a set, and the gold answer it must give."""
    long = "one, two, three " * 5
    return {
        "math500": (
            {"problem": "Q?", "answer": r"\frac{1}{2}", "solution": "", "subject": "Geometry"}
            | {"level": 4, "unique_id": "test/geometry/1.json"},
            r"\frac{1}{2}",
        ),
        "aime24": ({"id": 60, "problem": long, "answer": "073", "solution": ""}, "73"),
        "aime25": ({"id": "0", "problem": long, "answer": "588"}, "588"),
        "amc23": ({"id": 0, "question": long, "answer": 27.0, "url": ""}, "27"),
        "minerva": ({"question": long, "answer": "4.5e33"}, "4.5e33"),
        "olympiad": ({"question": long, "final_answer": ["$2$", r"$\sqrt{3}$"]}, r"2, \sqrt{3}"),
    }[name]


def write_jsonl(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# ---- real files -----------------------------------------------------------------------------


@needs_data
def test_published_files_load_whole():
    rows = [json.loads(line) for line in MATH_TEST.open()]
    found = load("math", path=MATH_TEST)
    assert (len(found), found.rejects) == (5000, ())
    assert Counter(p.level for p in found.problems) == Counter(int(r["level"][-1]) for r in rows)
    assert len({p.family for p in found.problems}) == 7
    gsm = load("gsm8k", path=DATA / "gsm8k_test.jsonl")
    assert len(gsm) == 1319 and all(float(p.answer).is_integer() for p in gsm.problems)
    assert not any("," in p.answer or "#" in p.answer for p in gsm.problems)
    aime = load("aime24", path=DATA / "aime24.jsonl")
    assert len(aime) == 30 and all(0 <= int(p.answer) <= 999 for p in aime.problems)


@needs_data
def test_math_train_is_cut_and_cleaned_of_the_test_split():
    train = load("math", "train", path=MATH_TRAIN, test_path=MATH_TEST)
    held = load("math", "validation", path=MATH_TRAIN, test_path=MATH_TEST)
    # Two rows of unknown level, and two whose published solution boxes nothing.
    assert [r.line for r in train.rejects] == [2721, 2774, 5530, 5532]
    assert len(train) + len(held) + train.dropped + held.dropped + 4 == 7500
    assert (train.dropped, held.dropped) == (48, 3)
    assert 0.08 < len(held) / (len(train) + len(held)) < 0.12
    check_disjoint(train, load("math", path=MATH_TEST))
    check_disjoint(train, held)


@needs_data
def test_near_duplicates_equal_a_comparison_of_all_pairs():
    """Oracle: every pair, words by str methods alone, no blocking and no size filter."""
    drop = str.maketrans({c: " " for c in "$\\{}()[].,;:?!'\"_&|~%-+*/^=<>"})
    plain = re.compile(r"[a-z ]*\d*[a-z ?.,]*\d*[a-z ?.,]*")  # hardly any LaTeX to normalize

    def shingles(text: str) -> set:
        words = text.lower().translate(drop).split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    pool = [p for p in load("math", path=MATH_TEST).problems if plain.fullmatch(p.question.lower())]
    a = pool[:100]
    rng = random.Random(0)
    b = [problem(" ".join(p.question.split()[rng.randrange(4) :]), own=p.id) for p in a]
    expected = set()
    for one, other in itertools.product(a, b):
        left, right = shingles(one.question), shingles(other.question)
        same = re.findall(r"\d+", one.question) == re.findall(r"\d+", other.question)
        if same and len(left & right) / len(left | right) >= 0.8:
            expected.add((one.id, other.id))
    assert 20 < len(expected) < 100
    assert {(x.id, y.id) for x, y, _ in near_duplicates(a, b)} == expected


# ---- the guard ------------------------------------------------------------------------------

ORIGINAL = (
    r"Let $f(x) = \frac{1}{2}x^2 + 1,000x$, where $x$ is a positive integer less than 30. "
    r"What is the sum of all values of $f(x)$?"
)


@pytest.mark.parametrize(
    "copy",
    [
        ORIGINAL,
        ORIGINAL.upper().replace(r"\FRAC", r"\frac"),
        ORIGINAL.replace("$", "").replace("  ", " ").replace(" where", "\n\n where"),
        ORIGINAL.replace(r"\frac{1}{2}", r"\dfrac12").replace("1,000", r"1{,}000\,"),
        ORIGINAL.replace("1,000", "1000"),
        ORIGINAL + " Show your work.",
        ORIGINAL.replace("30", "３０"),
    ],
)
def test_a_copy_in_other_clothes_is_the_same_problem(copy):
    with pytest.raises(OverlapError, match=r"share 1 problems: p0 = p0"):
        check_disjoint(problem_set(ORIGINAL), problem_set(copy))


@pytest.mark.parametrize(
    "other",
    [
        ORIGINAL.replace("30", "31"),
        ORIGINAL.replace("1,000", "1.000"),
        ORIGINAL.replace(r"\frac{1}{2}", r"\frac{2}{1}"),
        "What is the sum of 1, 2, 2, 1000 and 30?",
        "",
    ],
)
def test_other_numbers_or_other_words_make_another_problem(other):
    check_disjoint(problem_set(ORIGINAL), problem_set(other))


def test_questions_that_differ_by_an_operator_differ():
    check_disjoint(problem_set("What is 7 + 5?", "What is 7 * 5?"), problem_set("What is 7 - 5?"))


# ---- malformed rows -------------------------------------------------------------------------


def test_each_malformed_row_is_named_and_the_rest_loads(tmp_path):
    good = [math_row(f"What is ${i}+1$?") for i in range(3)]
    rows = {
        2: (b"{not json", "not JSON: Expecting property name.* at column 2"),
        4: (b'{"problem": "caf\xe9"}', "not UTF-8"),
        5: (b"[1, 2]", "the row is list, not an object"),
        6: ({"problem": "x?"}, "field 'solution' is missing"),
        7: (math_row(problem=5), "field 'problem' is int, not text"),
        8: (math_row(problem=" \n"), "field 'problem' is empty"),
        9: (math_row(solution="It is 2."), "no boxed answer"),
        10: (math_row(level="Level ?"), r"level unknown: 'Level \?'"),
        11: (math_row(problem="lone \ud800"), "not UTF-8: surrogates"),
        12: (b"[" * 100_000, "nested too deep|not JSON"),
        13: (good[0], "repeats line 1"),
    }
    lines = [good[0], rows[2][0], good[1], *(rows[k][0] for k in range(4, 14)), b"", good[2]]
    found = load("math", path=write_jsonl(tmp_path / "rows.jsonl", lines))
    assert [p.answer for p in found.problems] == ["2"] * 3
    assert [r.line for r in found.rejects] == list(rows)
    for reject in found.rejects:
        assert reject.file == "rows.jsonl" and re.search(rows[reject.line][1], reject.reason)
    assert "11 rows rejected" in found.describe()
    assert "rows.jsonl, line 2: not JSON" in found.describe()


OWN = {  # name of the file -> what stands in it, and question, gold, family and level of its row
    "a.csv": ("question,answer\n\"What is 1, plus 2?\",3\n", "What is 1, plus 2?", "3", None, 0),
    "b.CSV": ("Question;Answer\nWhat?;3\n", "What?", "3", None, 0),
    "c.tsv": ("problem\tanswer\nWhat, now?\t3\n", "What, now?", "3", None, 0),
    "d.json": ('[\n {"problem": "What?", "answer": 3,\n  "subject": "Algebra", "level": 2}]',
               "What?", "3", "algebra", 2),
    "e.jsonl": ('{"prompt": "What?", "solution": "so \\\\boxed{3}"}', "What?", "3", None, 0),
    "f.jsonl": ('{"question": "What?", "answer": "1+2=3\\n#### 3"}', "What?", "3", None, 0),
    "g.jsonl": ('{"body": "One and two.", "question": "Sum?", "answer": "3 (apples)"}',
                "One and two. Sum?", "3", None, 0),
    "h.jsonl": ('{"content": "What?", "answer": ["1", "$2$"], "type": null}', "What?", "1, 2",
                None, 0),
    "i.jsonl": ('{"question": "Q?", "choices": ["x", "y"], "answer": 1}', "Q?\n\nA) x\nB) y", "B",
                None, 0),
    "j.jsonl": ('{"question": "Q?", "options": ["A)x", "B)y"], "correct": "B"}',
                "Q?\n\nA) x\nB) y", "B", None, 0),
    "k.jsonl": ('{"question": "Q?", "options": {"A": "x", "B": "y"}, "label": "B"}',
                "Q?\n\nA) x\nB) y", "B", None, 0),
    "l.jsonl": ('{"question": "Q?", "options": "A) x\\nB) y", "Answer": "(B)"}',
                "Q?\n\nA) x\nB) y", "B", None, 0),
    "m.jsonl": ('{"question": "Q?", "options": ["x", "y"], "answer": "y"}', "Q?\n\nA) x\nB) y",
                "B", None, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_file_of_ones_own_is_a_test_set(tmp_path, name):
    text, *expected = OWN[name]
    (tmp_path / name).write_text(text)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for file in (name, f"{name}.gz"):
        found = load(str(tmp_path / file), levels=[])
        (problem,) = found.problems
        expected[2] = (
            expected[2] or name[0]
        )  # the family, which without a column is the file's name
        assert [problem.question, problem.answer, problem.family, problem.level] == expected
        assert problem.source == found.name == file and not found.rejects
    assert load("mine", path=tmp_path / name).problems[0].source == "mine"


def test_a_folder_of_ones_own_has_a_training_half(tmp_path):
    rows = [{"question": f"What is {i} plus {i * i}?", "answer": i + i * i} for i in range(60)]
    write_jsonl(tmp_path / "train.jsonl", rows[:50] + rows[50:52])
    write_jsonl(tmp_path / "test.jsonl", rows[50:])
    parts = {split: load(str(tmp_path), split) for split in ("train", "validation", "test")}
    assert len(parts["test"]) == 10 and len(parts["validation"]) > 0
    assert sum(len(p) + p.dropped for p in parts.values()) == 62
    assert not {p.question for p in parts["train"].problems} & {r["question"] for r in rows[50:]}
    with pytest.raises(ValueError, match="test.jsonl has no train rows, only test in test.jsonl"):
        load(str(tmp_path / "test.jsonl"), "train")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"Frage": "What?", "answer": 3}', r"no column for the question \(.*has Frage, answer"),
        (
            '{"question": "What?", "antwort": 3}',
            r"no column for the answer \(.*has question, antwort",
        ),
        (
            '{"question": "Q?", "options": ["x", "y"], "answer": "z"}',
            "'z' is not the letter of an option",
        ),
        (
            "version https://git-lfs.github.com/spec/v1\noid",
            "is a pointer of Git LFS, not the data",
        ),
    ],
)
def test_what_a_file_of_ones_own_lacks_is_named(tmp_path, text, words):
    (tmp_path / "own.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path / "own.jsonl"))


def test_nothing_usable_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(
        ValueError, match="not one usable row in rows.jsonl .*line 1: field 'problem"
    ):
        load("math", path=path)
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="no readable parquet file"):
        load("math", path=broken)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"name": "mathematics"}, "no problem set 'mathematics'; there are laptop, school, math"),
        ({"name": "math", "split": "dev"}, "no split 'dev'"),
        ({"name": "aime24", "split": "train"}, "aime24 is published for testing only"),
        ({"name": "open-rs", "split": "test"}, "open-rs is published for training only"),
        ({"name": "laptop", "path": "x"}, "path is for published sets"),
        ({"name": "mine.csv"}, "there is no file mine.csv, here or in "),
        ({"name": "laptop", "levels": [1, 9]}, r"no level \[9\]; it has \[1, 2"),
        ({"name": "laptop", "families": ["sudoku"]}, r"no family \['sudoku'\]; it has \["),
        ({"name": "laptop", "n": 0}, "n=0"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load(**call)


def test_an_empty_choice_takes_all():
    assert load("laptop", levels=[], families=[]).fingerprint == load("laptop").fingerprint


@needs_data
def test_published_sets_are_read_from_the_readers_folder(monkeypatch):
    """Ids, golds and the guard as from the hub, in every layout that `local_files` names."""
    monkeypatch.setattr(paths, "READER", DATA)
    found = load("math", "train")
    assert (
        found.fingerprint == load("math", "train", path=MATH_TRAIN, test_path=MATH_TEST).fingerprint
    )
    assert (
        found.dropped == 48 and found.revision == "math_train.jsonl sha256 c33696e0cca7 (KIT_DATA)"
    )
    assert (len(load("gsm8k")), len(load("aime24"))) == (1319, 30)


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("math", "math/test.jsonl", [math_row()]),
        ("math500", "MATH-500/test.jsonl", [one_row("math500")[0]]),
        ("math500", "math500_test.json", [one_row("math500")[0]]),
        ("gsm8k", "gsm8k_test.jsonl", [{"question": "Q?", "answer": "#### 5"}]),
        ("aime24", "aime24.jsonl", [one_row("aime24")[0]]),
        ("aime25", "aime25/test.jsonl", [one_row("aime25")[0]]),
        ("olympiad", "olympiadbench/test.jsonl", [one_row("olympiad")[0]]),
        ("minerva", "minerva.jsonl", [one_row("minerva")[0]]),
        ("minerva", "minerva_math/test.jsonl", [math_row()]),
    ],
)
def test_sets_lie_in_the_readers_folder_as_others_name_them(
    tmp_path, monkeypatch, name, file, rows
):
    monkeypatch.setattr(paths, "READER", tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    write = (
        write_jsonl if file.endswith("l") else lambda path, all: path.write_text(json.dumps(all))
    )
    write(tmp_path / file, rows)
    found = load(name)
    assert (len(found), found.problems[0].source) == (1, name)
    assert found.revision.startswith(Path(file).name)


# ---- the hub, in a local cache --------------------------------------------------------------


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GPQA_CSV = (
    "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,"
    "High-level domain\n"
    + "".join(
        f'r{i},"Which, then, {i}?",right,wrong a,wrong b,"wrong\nc",Physics\n' for i in range(20)
    )
).encode()


@pytest.fixture
def cache(hub_cache, monkeypatch):
    """Put tiny files under the real names of one set into an otherwise empty hub cache."""
    monkeypatch.setattr(paths, "READER", None)

    def put(name: str, make: dict[str, bytes]) -> None:
        build_cache(hub_cache, "dataset", SOURCES[name].repo, make, COMMIT)

    return put


def test_a_row_with_a_bare_comma_is_rejected_and_not_shifted(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text('question,answer\n"What is 1, plus 2?",3\nWhat is 1, plus 2?,3\nWhat?\n')
    found = load("minerva", path=file)
    assert [(p.question, p.answer) for p in found.problems] == [("What is 1, plus 2?", "3")]
    assert [reject.line for reject in found.rejects] == [3, 4]
    assert all("quote texts with commas" in reject.reason for reject in found.rejects)


def test_large_integers_keep_their_digits(tmp_path):
    large = 2**63 + 1
    answers = (str(large), large, "073", 27.0)
    rows = [{"problem": f"Q{i}?", "answer": answer} for i, answer in enumerate(answers)]
    found = load("aime24", path=write_jsonl(tmp_path / "own.jsonl", rows))
    said = {p.question: p.answer for p in found.problems}
    assert list(dict(sorted(said.items())).values()) == [str(large), str(large), "73", "27"]


@pytest.mark.parametrize("name", ["math500", "aime24", "aime25", "amc23", "minerva", "olympiad"])
def test_test_sets_load_from_the_hub_cache(cache, name):
    row, gold = one_row(name)
    repo, (file,) = SOURCES[name].repo, SOURCES[name].files["test"]
    cache(name, {file: (parquet if file.endswith("parquet") else jsonl)([row])})
    found = load(name)
    assert [p.answer for p in found.problems] == [gold]
    assert found.revision == f"{repo}@{COMMIT[:12]}"
    assert hub.pinned_revision("dataset", repo) == COMMIT
    assert found.problems[0].level == (4 if name == "math500" else 0)


def test_training_sets_load_from_the_hub_cache(cache):
    """The answer where it is published apart, else what the solution boxes; two levels."""
    rows = [
        {"problem": "Q1?", "answer": "$7$", "solution": "", "level": "Easy"},
        {"problem": "Q2?", "answer": "", "solution": r"\boxed{\frac{1}{2}}", "level": "Hard"},
    ]
    (file,) = SOURCES["open-rs"].files["train"]
    cache("open-rs", {file: parquet(rows)})
    found = [*load("open-rs", "train").problems, *load_if_any("open-rs", "validation")]
    assert {(p.question, p.answer, p.level) for p in found} == {
        ("Q1?", "7", 1),
        ("Q2?", r"\frac{1}{2}", 2),
    }


def load_if_any(name: str, split: str) -> tuple:
    """Of two rows the validation split may have none."""
    try:
        return load(name, split).problems
    except ValueError:
        return ()


def test_math_from_the_hub_cache_equals_the_local_file(cache, tmp_path):
    """All seven subjects; ids do not depend on where the rows came from."""
    rows = {
        (half, subject): [
            math_row(f"In {half} {subject}, what is ${k}+{k}$?", type=subject.replace("_", " "))
            for k in range(12)
        ]
        for half in ("train", "test")
        for subject in ("algebra", "counting_and_probability", "geometry", "precalculus")
        + ("intermediate_algebra", "number_theory", "prealgebra")
    }
    rows["train", "algebra"].append(rows["test", "algebra"][0] | {"level": "Level 5"})
    cache("math", {f"{s}/{h}-00000-of-00001.parquet": parquet(r) for (h, s), r in rows.items()})
    local = {
        half: write_jsonl(
            tmp_path / f"{half}.jsonl",
            [row for (h, _), some in reversed(rows.items()) if h == half for row in some],
        )
        for half in ("train", "test")
    }
    assert load("math").fingerprint == load("math", path=local["test"]).fingerprint
    train, held = load("math", "train"), load("math", "validation")
    assert train.dropped + held.dropped == 1 and len(train) + len(held) == 84
    again = load("math", "train", path=local["train"], test_path=local["test"])
    assert again.fingerprint == train.fingerprint
    unguarded = (
        load("math", "train", path=local["train"]),
        load("math", "validation", path=local["train"]),
    )
    assert all("not checked against a test split" in one.revision for one in unguarded)
    assert sum(len(one) for one in unguarded) == 85


def test_gsm8k_gold_is_what_follows_the_marks(cache):
    row = {"question": "How many?", "answer": "He has #### 3 signs <<1+1=2>>.\n#### 1,234,567"}
    cache("gsm8k", {"main/test-00000-of-00001.parquet": parquet([row])})
    assert load("gsm8k").problems[0].answer == "1234567"


def test_without_a_hub_the_readers_folder_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(hub.HubError, match="or put minerva_test.jsonl into the folder KIT_DATA"):
        load("minerva")


def test_gpqa_is_gated_and_its_gold_letter_points_at_the_right_option(cache):
    with pytest.raises(hub.HubError, match="gpqa is gated: accept its terms at .*hf auth login"):
        load("gpqa")
    cache("gpqa", {"gpqa_diamond.csv": GPQA_CSV})
    found = load("gpqa")
    assert len(found) == 20 and {p.family for p in found.problems} == {"physics"}
    assert {p.answer for p in found.problems} == set("ABCD")
    for p in found.problems:
        options = dict(re.findall(r"^([A-D])\) (.*)$", p.question, re.MULTILINE))
        assert sorted(options) == list("ABCD") and options[p.answer] == "right"


# ---- sampling -------------------------------------------------------------------------------


def uneven_rows() -> list[dict]:
    sizes = {("Algebra", 1): 60, ("Algebra", 3): 25, ("Geometry", 1): 10, ("Geometry", 5): 5}
    return [
        math_row(f"{kind} {level}: what is ${k}+1$?", type=kind, level=f"Level {level}")
        for (kind, level), size in sizes.items()
        for k in range(size)
    ]


def test_a_sample_is_proportional_nested_and_blind_to_file_order(tmp_path):
    rows = uneven_rows()
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    random.Random(1).shuffle(rows)
    shuffled = write_jsonl(tmp_path / "b.jsonl", rows)
    for n in (4, 20, 50, 99):
        sample = load("math", path=path, n=n)
        assert len(sample) == n
        assert sample.fingerprint == load("math", path=shuffled, n=n).fingerprint
        assert {p.id for p in sample.problems} <= {
            p.id for p in load("math", path=path, n=n + 1).problems
        }
        counts = Counter((p.family, p.level) for p in sample.problems)
        for stratum, size in (("algebra", 1), 60), (("algebra", 3), 25), (("geometry", 5), 5):
            assert abs(counts[stratum] - n * size / 100) <= 1
    assert (
        load("math", path=path, n=20).fingerprint
        != load("math", path=path, n=20, seed=1).fingerprint
    )
    assert len(load("math", path=path, n=10_000)) == 100
    chosen = load("math", path=path, levels=[1, 3], families=["algebra"], n=30)
    assert {(p.family, p.level) for p in chosen.problems} == {("algebra", 1), ("algebra", 3)}


def test_the_fingerprint_follows_content_and_not_order():
    a, b = problem("Q1?", "a"), problem("Q2?", "b")
    one = ProblemSet("x", "test", (a, b), (), 0, "")
    assert one.fingerprint == ProblemSet("y", "train", (b, a), (), 3, "z").fingerprint
    for changed in (
        problem("Q1?", "a", answer="2"),
        problem("Q1!", "a"),
        problem("Q1?", "a", level=2),
    ):
        assert ProblemSet("x", "test", (changed, b), (), 0, "").fingerprint != one.fingerprint


# ---- the generated suite --------------------------------------------------------------------

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def exact(expression: str) -> Decimal:
    def value(node: ast.expr) -> Decimal:
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        return Decimal(ast.get_source_segment(expression, node))

    return value(ast.parse(expression, mode="eval").body)


def numbers(question: str) -> list[int]:
    return [int(x) for x in re.findall(r"-?\d+", question)]


def expression(question: str) -> Decimal:
    return exact(question.removeprefix("Calculate ").removesuffix("."))


ORACLES = {
    "chain_sum": lambda q, a: expression(q) == Decimal(a),
    "products": lambda q, a: expression(q) == Decimal(a),
    "gcd": lambda q, a: math.gcd(*numbers(q)) == int(a),
    "lcm": lambda q, a: math.lcm(*numbers(q)) == int(a),
    "fraction_simplification": lambda q, a: str(Fraction(*numbers(q))) == a,
    "simple_equations": lambda q, a: math.prod([numbers(q)[0], int(a)]) == numbers(q)[1],
    "letter_counting": lambda q, a: q.split('"')[3].lower().count(q.split('"')[1]) == int(a),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generated_golds_are_right_and_questions_plain(family):
    for level in range(1, len(FAMILIES[family].levels) + 1):
        for p in generated.generate(family, level, 25, seed=5):
            assert (p.family, p.level, p.source) == (family, level, "laptop")
            assert p.question == p.question.strip() and 0 < len(p.answer) <= 20
            assert not re.search(
                r"(?i)final answer|reply only|respond (only|with)|example:|your task", p.question
            )
            assert ORACLES[family](p.question, p.answer), (p.question, p.answer)


def test_the_frozen_suite_has_right_golds_and_disjoint_splits():
    sets = [load("laptop", split) for split in ("train", "validation", "test")]
    for one, other in itertools.combinations(sets, 2):
        check_disjoint(one, other)
    everything = [p for one in sets for p in one.problems]
    assert len({p.id for p in everything}) == len(everything)
    assert len({" ".join(sorted(p.question.split())) for p in everything}) == len(everything)
    for p in everything:
        assert ORACLES[p.family](p.question, p.answer), p
    families = {p.family for p in everything}
    assert len(families) >= 6
    for family, one in itertools.product(families, sets):
        assert len({p.level for p in one.problems if p.family == family}) >= 2


def test_the_frozen_suite_can_be_made_again_from_its_manifest():
    manifest = json.loads((paths.DATA / "problems" / "laptop.manifest.json").read_text())
    if manifest["generator"] != f"reasoning-gym {version('reasoning_gym')}":
        pytest.skip("frozen with another version of the generator")
    sizes = manifest["counts"]
    assert sizes == generated.SIZES["laptop"]
    made = generated.make("laptop", list(manifest["families"]), sizes, manifest["seed"])
    for one in made:
        assert one.fingerprint == load("laptop", one.split).fingerprint


def test_freezing_writes_what_load_reads_and_a_changed_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="laptop.jsonl is missing: run .*freeze.* laptop"):
        load("laptop")
    sizes = {"train": 16, "validation": 8, "test": 12}
    folder = tmp_path / "problems"
    manifest = generated.freeze("laptop", ["chain_sum", "gcd"], sizes, folder, seed=9)
    assert manifest["counts"] == sizes
    assert load("laptop", "train").fingerprint == manifest["fingerprints"]["train"]
    assert load("laptop").revision.startswith("reasoning-gym 0.1.25, seed 9")
    file = tmp_path / "problems" / "laptop.jsonl"
    file.write_text(file.read_text().replace('"answer": "', '"answer": "1', 1))
    with pytest.raises(ValueError, match="is not the file laptop.manifest.json describes"):
        load("laptop")


def test_neighbouring_seeds_share_no_problems_and_small_families_say_so():
    """reasoning-gym itself repeats 99 of 100 items between seeds 0 and 1."""
    one, other = (generated.generate("chain_sum", 2, 60, seed) for seed in (0, 1))
    assert not {p.question for p in one} & {p.question for p in other}
    assert generated.generate("chain_sum", 2, 60, 0) == one
    with pytest.raises(ValueError, match="chain_sum level 1 has [0-9]+ distinct problems"):
        generated.generate("chain_sum", 1, 120, seed=0)
    for family, level in (("sudoku", 1), ("gcd", 9)):
        with pytest.raises(ValueError, match="no family 'sudoku'|gcd has levels 1 to 2, not 9"):
            generated.generate(family, level, 1, seed=0)
