"""The reader's own files: every kind and layout, splits, golds, options, what is rejected."""

import gzip
import json

import pandas as pd
import pytest

from kit import paths
from kit.data import own, problems
from kit.data.dedup import check_disjoint
from kit.data.problems import load

ROWS = [{"question": f"What is {k} plus {k}, please?", "answer": str(2 * k)} for k in range(1, 41)]


def shared(path) -> str:
    """A TOML beside a file that has it shared out."""
    (table := path.parent / "shared.toml").write_text(f'file = "{path.name}"')
    return str(table)


def all_of(path) -> dict[str, str]:
    """Question -> gold, of all splits."""
    name = shared(path)
    return {p.question: p.answer for split in problems.SPLITS for p in load(name, split).problems}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def one(tmp_path, row: dict | list[dict], name: str = "own_test.json"):
    """The problem of one row."""
    (tmp_path / name).write_text(json.dumps(row if isinstance(row, list) else [row]))
    return load(str(tmp_path / name)).problems[0]


# ---- kinds of file --------------------------------------------------------------------------

WRITERS = {
    "own.jsonl": lambda path: path.write_text(lines(ROWS)),
    "own.ndjson": lambda path: path.write_text(lines(ROWS)),
    "own.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(lines(ROWS)),
    "table.json": lambda path: path.write_text(json.dumps({"version": "1", "data": ROWS})),
    "own.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS).encode())),
    "own.csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    "OWN.CSV": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    "bom.csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False, encoding="utf-8-sig"),
    "semicolon.csv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False, sep=";"),
    "own.csv.gz": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False),
    "own.tsv": lambda path: pd.DataFrame(ROWS).to_csv(path, index=False, sep="\t"),
    "own.parquet": lambda path: pd.DataFrame(ROWS).to_parquet(path),
    "numbers.parquet": lambda path: pd.DataFrame(ROWS).astype({"answer": float}).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_problems(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert all_of(tmp_path / name) == {row["question"]: row["answer"] for row in ROWS}


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("own.xlsx", b"PK", "own.xlsx is none of .jsonl, .json"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a pointer of Git LFS, not",
        ),
        ("a.json", b'[{"question": "Q?",\n "answer" 3}]', "a.json, line 2: not JSON"),
        ("a.csv.gz", b"question,answer", "no readable gzip file"),
        ("a.parquet", b"PAR1", "no readable parquet file"),
        (
            "a.jsonl",
            b'{"text": "Q?"}',
            r"line 1: no column for the question \(question, .*has text",
        ),
        ("a.csv", b"question,answer\nQ?,\n", "line 2: column 'answer' is empty"),
        ("a.csv", b"question,answer\nQ, say?,3\n", "line 2: not as many fields as the header"),
        ("a.csv", b"question,answer\nQ\xe4?,3\n", "line 2: not UTF-8"),
        ("a.jsonl", b'{"question": "Q?", "solution": "So it is 3."}', "no box and no ####"),
        ("a.jsonl", b'{"question": "Q?", "answer": {"value": 3}}', "is dict, not text, number"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, name, raw, words):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("families", "asked"), [([], ["1 + 2?", "6 * 7?", "9 - 2?"]), (["minus"], ["9 - 2?"])]
)
def test_the_tour_takes_a_set_of_any_levels_and_families(tmp_path, capsys, families, asked):
    """Up to the problems that it selects."""
    (tmp_path / "own.csv").write_text(
        "question,answer,level,type\n8 - 1?,7,4,minus\n9 - 2?,7,3,minus\n6 * 7?,42,3,times\n"
        "1 + 2?,3,2,plus\n7 / 7?,1,5,over\n"
    )
    cells = json.loads((paths.ROOT / "notebooks" / "00_tour.ipynb").read_text())["cells"]
    names = {"PROBLEM_SET": str(tmp_path / "own.csv"), "FAMILIES": families}
    (cell,) = (c for c in cells if "selection = " in "".join(c["source"]))
    exec("".join(cell["source"]), names)
    assert sorted(problem.question for problem in names["selection"]) == asked
    assert capsys.readouterr().out.count(" -> ") == len(asked)


# ---- columns and golds ----------------------------------------------------------------------

OPTIONS = ["three", "four", "five"]
ASKED = "Q?\n\nA) three\nB) four\nC) five"


@pytest.mark.parametrize(
    ("row", "question", "gold"),
    [
        ({"Problem": " Q? ", "Answer": 9007199254740993}, "Q?", "9007199254740993"),
        ({"prompt": "Q?", "target": 43.0}, "Q?", "43"),
        ({"input": "Q?", "label": 0.5}, "Q?", "0.5"),
        ({"question": "Q?", "final_answer": ["$2$", "$3$"]}, "Q?", "2, 3"),
        ({"question": "Q?", "answer": "2 + 3 = <<2+3=5>>5\n#### 1,005"}, "Q?", "1005"),
        ({"problem": "Q?", "solution": r"So \boxed{\frac{1}{2}}."}, "Q?", r"\frac{1}{2}"),
        ({"problem": "Q?", "solution": "So 4.", "answer": "4"}, "Q?", "4"),
        ({"Body": "Two apples.", "Question": "How many?", "Answer": 2.0}, "Two apples. How many?",
         "2"),
        ({"body": "Q", "question": "Q? R?", "answer": "9 (apples)"}, "Q? R?", "9"),
        ({"question": "Q?", "options": OPTIONS, "answer": "B"}, ASKED, "B"),
        ({"question": "Q?", "options": ["A)three", "B)four", "C)five"], "correct": "B"}, ASKED,
         "B"),
        ({"question": "Q?", "choices": str(OPTIONS), "answer": 1}, ASKED, "B"),
        ({"question": "Q?", "choices": OPTIONS, "answer": "four"}, ASKED, "B"),
        ({"question": "Q?", "options": dict(zip("ABC", OPTIONS)), "label": "C", "answer": None},
         ASKED, "C"),
        ({"question": "Q?", "choices": {"text": OPTIONS, "label": [*"ABC"]}, "answerKey": "A"},
         ASKED, "A"),
        ({"question": "Q?", "A": "three", "B": "four", "C": "five", "answer": "C"}, ASKED, "C"),
        ({"question": "Q?", "options": "A) 1 B) 2", "Answer": "A"}, "Q?\n\nA) 1 B) 2", "A"),
    ],
)  # fmt: skip
def test_columns_are_found_by_their_usual_names(tmp_path, row, question, gold):
    found = one(tmp_path, row)
    assert (found.question, found.answer) == (question, gold)


def test_option_numbers_are_read_as_most_rows_have_them(tmp_path):
    """Numbers of options from 0 or from 1, or their texts, which are numbers too."""

    def golds(*answers, options=OPTIONS):  # fmt: skip
        rows = [
            {"question": f"Q{k}?", "options": options, "answer": a} for k, a in enumerate(answers)
        ]
        (tmp_path / "own_test.json").write_text(json.dumps(rows))
        found = load(str(tmp_path / "own_test.json"))
        said = {p.question.split("?")[0]: p.answer for p in found.problems}
        return [said.get(f"Q{k}") for k in range(len(answers))], found.rejects

    assert golds(0, 1, 2, 2) == (["A", "B", "C", "C"], ())
    assert golds(1, 3, 3, 2) == (["A", "C", "C", "B"], ())
    assert golds("3", "1", options=["1", "2", "3"]) == (["C", "A"], ())
    kept, (reject,) = golds("A", "AC", "C")
    assert kept == ["A", None, "C"] and "'AC' is not the letter of an option, of 3" in reject.reason


def test_levels_families_and_forms_come_from_their_columns(tmp_path):
    for level, number in (("Level 4", 4), (2, 2), ("3.0", 3), ("Hard", 3), ("?", 0), (None, 0)):
        row = {"question": "Q?", "answer": "1", "difficulty": level, "subject": "Number Theory"}
        found = one(tmp_path, row | {"asks": "simplified"})
        assert (found.level, found.family, found.asks) == (number, "number_theory", "simplified")
    assert one(tmp_path, {"question": "Q?", "answer": "1"}).family == "own_test"


def test_rows_with_contradicting_golds_are_all_left_out_and_reported(tmp_path):
    golds = ["1/2", "0.5", "3", "$4$", "4", "7"]
    asked = ["Q1?", "Q1?", "Q2?", "Q3?", "Q3?", "Q2?"]
    rows = [{"question": q, "answer": a} for q, a in zip(asked, golds)]
    (tmp_path / "own_test.jsonl").write_text(lines(rows))
    found = load(str(tmp_path / "own_test.jsonl"))
    assert {p.question: p.answer for p in found.problems} == {"Q1?": "1/2", "Q3?": "4"}
    assert {r.line: r.reason.split(" (")[0] for r in found.rejects} == {
        2: "repeats line 1", 3: "another gold than line 6: '3', not '7'",
        5: "repeats line 4", 6: "another gold than line 3: '7', not '3'"}  # fmt: skip


# ---- splits ---------------------------------------------------------------------------------


def test_one_file_is_shared_out_by_hash_and_rows_to_come_change_nothing(tmp_path):
    rows = [{"question": f"What is {k} plus {k + 3}?", "answer": k} for k in range(1000)]
    (tmp_path / "own.jsonl").write_text(lines(rows))
    name = shared(tmp_path / "own.jsonl")
    assert len(load(str(tmp_path / "own.jsonl"))) == 1000  # by itself it is for testing
    with pytest.raises(ValueError, match="own.jsonl has no train rows.*; write a TOML"):
        load(str(tmp_path / "own.jsonl"), "train")
    sets = {split: load(name, split) for split in problems.SPLITS}
    for split, share in own.SHARES.items():
        assert abs(len(sets[split]) / 1000 - share) < 0.05
    assert sum(map(len, sets.values())) == 1000
    (tmp_path / "own.jsonl").write_text(lines([{"question": "New?", "answer": 1}, *rows[::-1]]))
    for split in problems.SPLITS:
        again = {p.id for p in load(name, split).problems}
        assert {p.id for p in sets[split].problems} <= again


def test_near_duplicates_of_held_out_rows_leave_the_training_rows(tmp_path):
    """Each question twice, in other clothes: no copy stays on the other side of a split."""
    words = "If {} crates hold {} jars of plum jam each, how many jars do they hold together"
    rows = [{"question": words.format(k, k + 7) + end, "answer": k * (k + 7)}
            for k in range(100) for end in ("?", " in all?")]  # fmt: skip
    (tmp_path / "own.jsonl").write_text(lines(rows))
    train, held, test = (load(shared(tmp_path / "own.jsonl"), s) for s in problems.SPLITS)
    assert train.dropped > 10 and len(train) > 10
    for a, b in ((train, held), (train, test), (held, test)):
        check_disjoint(a, b)


def test_splits_come_from_a_column(tmp_path):
    words = ("train", "Training", "dev", "test", "eval", "fold 3")
    rows = [row | {"split": word} for row, word in zip(ROWS, words)]
    (tmp_path / "own.jsonl").write_text(lines(rows))
    sets = {split: load(str(tmp_path / "own.jsonl"), split) for split in problems.SPLITS}
    assert {split: len(found) for split, found in sets.items()} == {
        "train": 2, "validation": 1, "test": 2}  # fmt: skip
    assert [r.line for r in sets["test"].rejects] == [6]
    assert "split is 'fold 3'" in sets["test"].rejects[0].reason


def test_splits_come_from_the_names_of_files_in_a_folder(tmp_path):
    (tmp_path / "my_train.jsonl").write_text(lines(ROWS[:30]))
    (tmp_path / "my_test.csv").write_text("question,answer\n" + '"What is 1 plus 1, please?",3\n')
    (tmp_path / "notes.txt").write_text("no problems")
    train, held, test = (load(str(tmp_path), split) for split in problems.SPLITS)
    assert len(train) + len(held) == 29 and len(held) > 0 and len(test) == 1
    assert train.dropped + held.dropped == 1
    (reject,) = train.rejects + held.rejects
    assert (reject.file, reject.line) == ("my_train.jsonl", 1)
    assert reject.reason == "another gold than a held-out row: '2', not '3'"
    with pytest.raises(ValueError, match="my_test.csv has no train rows, only test in my_test.csv"):
        load(str(tmp_path / "my_test.csv"), "train")


def test_a_table_names_files_columns_and_shares(tmp_path):
    rows = [{"Frage": row["question"], "Lösung": row["answer"], "answer": "?"} for row in ROWS]
    (tmp_path / "a.csv").write_text(pd.DataFrame(rows).to_csv(index=False))
    table = tmp_path / "own.toml"
    columns = '[columns]\nquestion = "Frage"\nanswer = "Lösung"\n'
    shares = "[shares]\ntrain = 0\nvalidation = 0\ntest = 1\n"
    table.write_text(f'file = "a.csv"\n{columns}{shares}')
    found = load(str(table))
    assert {p.question: p.answer for p in found.problems} == {
        row["question"]: row["answer"] for row in ROWS}  # fmt: skip
    assert found.name == found.problems[0].source == "own.toml"
    for text, words in (
        ('file = "b.csv"', "names .*b.csv, which is not a file"),
        ('path = "a.csv"', "has the key 'path'; there are file, train"),
        ('file = "a.csv"\ntest = "a.csv"', "must name either file, or some of train"),
        (
            'file = "a.csv"\n[columns]\nquestoin = "Frage"',
            "has columns.questoin; there are question",
        ),
        (
            'file = "a.csv"\n[columns]\nquestion = "Fraage"',
            "has no column 'Fraage'; it has Frage, Lö",
        ),
        ('file = "a.csv"\n[shares]\ntrain = 1', "shares needs train, validation, test"),
        ("file = ", "is not valid TOML"),
    ):
        table.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load(str(table))


def test_another_seed_shares_out_otherwise(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "own.toml").write_text('file = "a.jsonl"\nseed = 1')
    one, other = (load(str(tmp_path / name)) for name in ("a.jsonl", "own.toml"))
    assert {p.id for p in one.problems} != {p.id for p in other.problems}
