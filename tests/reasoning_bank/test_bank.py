"""The strategy bank: what a search gives, what it must never give, what a killed writer leaves."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from datetime import timedelta

import lancedb
import numpy
import pyarrow
import pytest
from lancedb.rerankers import LinearCombinationReranker

from kit import paths
from kit.data import problems
from kit.models import embedder
from kit.reasoning_bank import strategy
from kit.reasoning_bank.bank import FRAGMENTS, METHODS, ReasoningBank
from kit.reasoning_bank.strategy import Strategy, leaks_answer
from kit.schema import Problem
from tests.reasoning_bank.hash_embedder import HashEmbedder

ANSWERS = [  # text, answer, whether it is given away
    ("The answer is 7.", "7", True),
    ("There are 7 steps.", "7", False),
    ("3 + 4 = 7", "7", True),
    ("x = 7.5", "7", False),
    ("x = 17", "7", False),
    ("use 125 often", "125", True),
    ("1250 and 0.125", "125", False),
    (r"you get \frac {3} {4}", r"\frac{3}{4}", True),
    ("it is a list", "A", False),
    ("answer: A", "A", True),
    (r"result \boxed{12}", "12", True),
    ("the sum is **42**", "42", True),
    ("page 42 of it", "42", False),
    ("anything", "", False),
    (r"you get \frac{3}{4}", r"\frac {3} {4}", True),  # spaces in the gold answer
    ("the set is {1,2}", "{1, 2}", True),
    ("so total = 1,234", "1234", True),  # the same number, written otherwise
    (r"it equals \frac{1}{2}", "1/2", True),
    ("it equals 0.5 of that", r"\frac{1}{2}", True),
    (r"so we get \dfrac{\sqrt3}{2} there", r"\frac{\sqrt{3}}{2}", True),  # the same formula
    ("the area is 25π square feet", r"25\pi", True),
    ("the area is 125π square feet", r"25\pi", False),
    ("it was Evelyn who won", r"\text{Evelyn}", True),
    ("it is New York, as before", "New York", True),
    ("so it is new  york", r"\text{New York}", True),
    ("a new city near York", "New York", False),
    ("steps 1, 2 and 3", "123", False),
    ("the sum is 7.0", "7", True),
    ("use 7.0 litres", "7", False),
]


@pytest.fixture(scope="session")
def minilm():
    return embedder.load()


@pytest.fixture(scope="session")
def train():
    return problems.load("laptop", "train").problems


def lesson(problem: Problem, title: str = "", **changes) -> Strategy:
    """What might be learnt from `problem`."""
    family = problem.family.replace("_", " ")
    values = dict(
        title=title or f"How to do {family}",
        description=f"For problems on {family}.",
        content=f"Write the parts of {problem.family} down one by one and check each.",
        kind="success",
        model="tests",
        extractor="tests",
    )
    return dataclasses.replace(Strategy.of(problem, **values), **changes)


def asked(problem: Problem, **changes) -> Problem:
    """`problem` under another id, as a test problem would be."""
    return dataclasses.replace(problem, id="another", **changes)


@pytest.fixture
def bank(tmp_path, minilm, train):
    """60 strategies from as many training problems of all families."""
    made = ReasoningBank(tmp_path / "bank", minilm)
    assert made.add([lesson(p) for p in train[::7]]) == 60 == len(made)
    return made


def test_what_was_added_comes_back_and_only_once(bank, train):
    again = [lesson(p) for p in train[::7]]
    assert bank.add(again) == 0 and bank.add([]) == 0
    assert bank.strategies() == sorted(again, key=lambda item: item.id)
    rows = bank.table()
    for column in ("vector", "question_vector"):
        lengths = numpy.linalg.norm(numpy.stack(rows[column]), axis=1)
        assert numpy.allclose(lengths, 1, atol=1e-5)


@pytest.mark.parametrize("key, method", [("question", "vector"), ("text", "vector")])
def test_vector_search_ranks_as_plain_cosines_do(bank, minilm, key, method):
    for problem in problems.load("laptop", "test").problems[::25]:
        found = bank.retrieve(problem, k=5, key=key, method=method)
        rows = bank.table()
        query = minilm.embed([problem.question], query=True)[0]
        column = "vector" if key == "text" else "question_vector"
        rows["cosine"] = numpy.stack(rows[column]) @ query
        rows = rows[~rows["id"].isin(found.filtered)]
        best = rows.sort_values(["cosine", "id"], ascending=[False, True])["id"].tolist()[:5]
        assert [s.id for s in found.strategies] == best
        assert found.scores == pytest.approx(sorted(found.scores, reverse=True))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_query_has_the_same_result(bank, tmp_path, minilm, train, method):
    """Whatever order things were added in, and opened again."""
    other = ReasoningBank(tmp_path / "other", minilm)
    for part in (train[::7][::-2], train[::7][::-1]):
        other.add([lesson(p) for p in part])
    assert other.logical_hash() == bank.logical_hash()
    for problem in problems.load("laptop", "test").problems[::35]:
        first = bank.retrieve(problem, k=4, method=method)
        assert len(first.strategies) == 4 or method == "text", "words may match nothing"
        assert bank.retrieve(problem, k=4, method=method) == first
        found = ReasoningBank(tmp_path / "other", minilm).retrieve(problem, k=4, method=method)
        assert found.strategies == first.strategies
        assert found.scores == pytest.approx(first.scores)


def test_equal_scores_are_ordered_by_id(tmp_path, minilm, train):
    made = ReasoningBank(tmp_path, minilm)
    twins = [lesson(p, content="The same.", family="x") for p in train[:30]]
    twins = [dataclasses.replace(t, title="Same", description="Same.") for t in twins]
    made.add(twins)
    found = made.retrieve(asked(train[100], answer="none"), k=3)
    expected = sorted(t.id for t in twins)[:3]
    assert [s.id for s in found.strategies] == expected, "a tie hid a smaller id"


@pytest.fixture
def zygote(tmp_path, minilm, train):
    """A bank, the one strategy in it with a rare word, and a problem that asks for this word."""
    made = ReasoningBank(tmp_path, minilm)
    made.add([lesson(p) for p in train[:40]])
    rare = lesson(train[41], content="Remember the zygote rule.")
    made.add([rare])
    return made, rare, asked(train[300], question="What does zygote say?", answer="none")


def test_words_find_what_vectors_may_miss(zygote, train):
    made, rare, problem = zygote
    for method in ("text", "hybrid"):
        assert made.retrieve(problem, k=1, method=method).strategies == (rare,)
    operators = asked(train[300], question='zygote) AND -"rule" ^~* (', answer="none")
    assert made.retrieve(operators, k=1, method="text").strategies == (rare,), "words, not a query"


def test_a_hybrid_search_fuses_reciprocal_ranks(bank):
    problem, whole = problems.load("laptop", "test").problems[7], len(bank)
    ranks = {s.id: 0.0 for s in bank.strategies()}
    for method in ("vector", "text"):
        for rank, s in enumerate(bank.retrieve(problem, whole, method=method).strategies, 1):
            ranks[s.id] += 1 / (60 + rank)
    fused = bank.retrieve(problem, whole, method="hybrid")
    assert not fused.filtered, "else ranks would count what the guard took out"
    assert [*fused.scores] == pytest.approx([ranks[s.id] for s in fused.strategies])
    assert [*fused.scores] == sorted(fused.scores, reverse=True) and len(fused.scores) == whole


def test_a_hybrid_search_is_ordered_by_any_reranker_before_the_guard(zygote):
    made, rare, problem = zygote
    by_words, by_vectors = (LinearCombinationReranker(weight=weight) for weight in (0.0, 1.0))

    def found(problem, reranker):
        return made.retrieve(problem, 3, method="hybrid", reranker=reranker)

    words, vectors = found(problem, by_words), found(problem, by_vectors)
    assert words.strategies[0] == rare and words.scores[0] == 1
    assert vectors.strategies == made.retrieve(problem, 3).strategies
    assert 0 < vectors.scores[0] < 1, "a distance, not a rank or a count of words"
    own = found(dataclasses.replace(problem, id=rare.problem_id), by_words)
    assert own.filtered == {rare.id: "same problem"} and rare not in own.strategies


def test_by_question_gives_all_strategies_of_the_nearest_past_problems(tmp_path, minilm, train):
    made = ReasoningBank(tmp_path, minilm)
    made.add([lesson(p, title) for p in train[::30] for title in ("One", "Two", "Three")])
    query = asked(train[31])
    for k in (1, 2):
        found = made.retrieve(query, k=k, key="question").strategies
        assert len(found) == 3 * k and len({s.problem_id for s in found}) == k


def test_kinds_can_be_left_out(tmp_path, minilm, train):
    made = ReasoningBank(tmp_path, minilm)
    made.add([lesson(p, kind=("success", "failure")[i % 2]) for i, p in enumerate(train[::20])])
    query = asked(train[5], answer="none")
    for kinds in (("success",), ("failure",)):
        found = made.retrieve(query, k=8, kinds=kinds).strategies
        assert len(found) == 8 and {s.kind for s in found} == set(kinds)
    with pytest.raises(ValueError, match=r"kind \['maybe'\]; kinds are"):
        made.add([lesson(train[0], kind="maybe")])


# What must never be shown


def test_nothing_from_the_problem_itself_nor_its_double(bank, train):
    """Also the test that fails when the guard is removed: see the next one."""
    for problem in train[::7][::5]:
        found = bank.retrieve(problem, k=3)
        assert problem.id not in {s.problem_id for s in found.strategies}
        by_question = bank.retrieve(problem, k=3, key="question")
        assert "same problem" in by_question.filtered.values()
        double = asked(problem, question=problem.question.upper().replace(" ", "  "))
        by_question = bank.retrieve(double, k=3, key="question")
        assert "near-duplicate" in by_question.filtered.values()
        assert problem.id not in {s.problem_id for s in by_question.strategies}


def test_without_the_guard_a_problem_finds_itself(bank, train, monkeypatch):
    monkeypatch.setattr("kit.reasoning_bank.bank.leak_reason", lambda *_: "")
    own = [
        problem.id == bank.retrieve(problem, k=1, key="question").strategies[0].problem_id
        for problem in train[::7]
    ]
    assert all(own)


@pytest.mark.parametrize(
    "theirs, ours, same",
    [
        ("Tom has 12 apples and eats 5. How many are left?",
         "Of his 12 apples Tom eats 5; how many does he have left?", True),
        ("Tom has 12 apples and eats 5. How many are left?",
         "Tom has 13 apples and eats 5. How many are left?", False),
        ("What is the sum of 3 and 9?", "Calculate the sum of 9 and 3.", True),
        ("What is the sum of 3 and 9?", "Divide a class of 9 children into 3 teams.", False),
    ],
)  # fmt: skip
def test_paraphrases_are_the_same_problem_and_other_numbers_another(
    tmp_path, minilm, train, theirs, ours, same
):
    made = ReasoningBank(tmp_path, minilm)
    made.add([lesson(dataclasses.replace(train[0], question=theirs))])
    problem = asked(train[0], question=ours, answer="none")
    assert (made.retrieve(problem, key="question").filtered != {}) == same


@pytest.mark.parametrize("key", ["text", "question"])
@pytest.mark.parametrize("allowed", [0, 1])
def test_a_search_goes_on_behind_what_the_guard_keeps_back(tmp_path, minilm, train, key, allowed):
    """Twelve that give the answer away are nearer than all but `allowed` of the others."""
    made, rule = ReasoningBank(tmp_path, minilm), "Think of the zygote rule."
    near = [
        lesson(dataclasses.replace(p, question=f"{rule} Number {i}!"), rule, content="It is 125.")
        for i, p in enumerate(train[:12])
    ]
    same = dataclasses.replace(train[12], question=f"{rule} Number 99!")
    made.add([*near, *(lesson(p) for p in train[100:140])])
    made.add([lesson(same, rule, content=rule, description=rule)] * allowed)
    found = made.retrieve(asked(train[0], question=rule, answer="125"), k=2, key=key)
    assert len(found.strategies) == 2 and len(found.filtered) == 12
    assert (found.strategies[0].content == rule) == bool(allowed)


def test_test_problems_are_not_refused_wholesale(bank):
    """The guard keeps back what repeats a problem, not its family."""
    tests = problems.load("laptop", "test").problems[::10]
    refused = [len(bank.retrieve(p, k=1, key="question").filtered) for p in tests]
    assert numpy.mean(refused) < 0.5


@pytest.mark.parametrize("text, answer, given", ANSWERS)
def test_answers_are_not_given_away(tmp_path, minilm, train, text, answer, given):
    assert leaks_answer(text, answer) == given
    made = ReasoningBank(tmp_path, minilm)
    made.add([item := lesson(train[0], content=text, title="T", description="D.")])
    found = made.retrieve(Problem("p", "How do I count?", answer, "f", 1, "s"), k=1)
    assert (found.filtered == {item.id: "gives the answer away"}) == given
    assert (found.strategies == (item,)) != given


# What a bank lives through


def test_tagged_states_can_be_opened_again(bank, train, minilm):
    bank.tag("built")
    before, problem = bank.logical_hash(), asked(train[3])
    results = [bank.retrieve(problem, k=3, method=method) for method in METHODS]
    ids = [item.id for item in bank.strategies()]
    bank.delete(ids[:50])
    bank.add([lesson(train[1])])
    bank.merge()
    then = bank.checkout("built")
    assert then.logical_hash() == before != bank.logical_hash() and len(then) == 60 > len(bank)
    assert [then.retrieve(problem, k=3, method=method) for method in METHODS] == results
    assert bank.tags() == ["built"]
    with pytest.raises(ValueError, match="has a tag 'built' already"):
        bank.tag("built")
    with pytest.raises(ValueError, match=r"no tag 'later'; it has \['built'\]"):
        bank.checkout("later")
    with pytest.raises(ValueError, match="as it was at a tag, to read only"):
        then.add([lesson(train[2])])


def test_tagged_states_outlive_the_age_at_which_others_are_deleted(tmp_path, train, monkeypatch):
    """A bank that is added to long after it was tagged, as in rounds of hours."""
    monkeypatch.setattr("kit.reasoning_bank.bank.UNTAGGED", timedelta(0))
    made = ReasoningBank(tmp_path, HashEmbedder())
    made.add([lesson(train[0])])
    made.tag("round-0")
    for i, problem in enumerate(train[1:30]):
        made.add([lesson(problem, f"Lesson {i}")])
        made.retrieve(train[100], method="text")
    assert len(made.checkout("round-0")) == 1 and len(made) == 30


def test_many_small_writes_leave_few_files(tmp_path, train):
    made = ReasoningBank(tmp_path, HashEmbedder())
    for i, problem in enumerate(train[:60]):
        made.add([lesson(problem, f"Lesson {i}")])
        made.retrieve(train[100], method="text")
    assert made._table.stats()["fragment_stats"]["num_fragments"] <= FRAGMENTS + 1
    assert len(made) == 60 == len({item.id for item in made.strategies()})
    assert not any(made._table.index_stats(index.name).num_unindexed_rows
                   for index in made._table.list_indices())  # fmt: skip
    (found,) = made.retrieve(train[100], k=1, method="text", key="text").strategies
    assert found in made.strategies()


def test_what_says_the_same_is_merged(tmp_path, minilm, train):
    made = ReasoningBank(tmp_path, minilm)
    first = lesson(train[0], content="Add the tens first, then add the ones.", step=1)
    twin = lesson(train[1], content="First add the tens, then add the ones.", step=2)
    opposite = lesson(train[2], content="Add the tens first, then add the ones.", kind="failure")
    other = lesson(train[400], "Turn the fraction around", content="Multiply by the inverse.")
    made.add([first, twin, opposite, other])
    assert made.merge() == [(first.id, twin.id)]
    kept = {item.id: item for item in made.strategies()}
    assert set(kept) == {first.id, opposite.id, other.id}
    assert made.merge() == [] and made.nbytes() > 0


def test_an_empty_bank_finds_nothing(tmp_path, minilm, train):
    made = ReasoningBank(tmp_path, minilm)
    for method in METHODS:
        assert made.retrieve(train[0], method=method) == strategy.RetrievalResult((), (), {})
    assert made.merge() == [] and made.strategies() == [] and len(made) == 0
    made.tag("empty")
    made.add([lesson(train[0])])
    assert made.checkout("empty").retrieve(train[5], method="hybrid").strategies == ()


def test_a_bank_with_the_columns_of_earlier_versions_is_read_and_added_to(tmp_path, minilm, train):
    """Banks built before had the columns uses and wins, between step and text."""
    schema = strategy.row_schema(minilm.dimension)
    for name in strategy.RETIRED:
        schema = schema.insert(schema.get_field_index("text"), pyarrow.field(name, pyarrow.int64()))
    meta = {"embedder": minilm.fingerprint, "embedder_name": minilm.name}
    table = lancedb.connect(tmp_path).create_table("strategies", schema=schema.with_metadata(meta))
    old = lesson(train[0])
    row = dataclasses.asdict(old) | {"id": old.id, "text": old.text, "uses": 3, "wins": 1}
    row |= {"vector": minilm.embed([old.text])[0]}
    table.add([row | {"question_vector": minilm.embed([old.question], query=True)[0]}])
    bank = ReasoningBank(tmp_path, minilm)
    assert bank.strategies() == [old] and bank.add([old, lesson(train[1])]) == 1
    assert bank.table()[["uses", "wins"]].sum().tolist() == [3, 1]
    bank.tag("two")
    assert len(bank.retrieve(train[2], k=2).strategies) == 2
    assert len(bank.merge()) == 1 == len(bank), "both say the same"
    plain = ReasoningBank(tmp_path / "new", minilm)
    plain.add(bank.checkout("two").strategies())
    assert plain.logical_hash() == bank.checkout("two").logical_hash()


def test_wrong_questions_are_one_sentence(bank, train):
    for wrong in (dict(key="title"), dict(method="fast"), dict(k=-1)):
        with pytest.raises(ValueError, match="k at least 0"):
            bank.retrieve(train[0], **wrong)
    with pytest.raises(ValueError, match="is no strategy id"):
        bank.delete(["' OR 1=1"])
    with pytest.raises(ValueError, match='takes method="vector" only'):
        bank.retrieve(train[0], key="question", method="hybrid")
    assert bank.retrieve(train[0], k=0).strategies == ()


def test_a_reader_sees_what_another_writes_but_not_at_a_tag(tmp_path, minilm, train, monkeypatch):
    monkeypatch.setattr("kit.reasoning_bank.bank.SEEN_AFTER", timedelta(0))
    writer = ReasoningBank(tmp_path, minilm)
    writer.add([lesson(train[0])])
    writer.tag("one")
    reader, then = ReasoningBank(tmp_path, minilm), writer.checkout("one")
    writer.add([lesson(train[1])])
    assert (len(reader), len(then)) == (2, 1)
    assert len(reader.retrieve(train[2], k=2).strategies) == 2


def test_another_embedder_or_schema_is_refused(bank, minilm, tmp_path):
    other = dataclasses.replace(minilm, max_tokens=128, name="short")
    with pytest.raises(ValueError, match=r"embedded by bundled:gt-all.*, not by short"):
        ReasoningBank(bank.uri, other)
    meta = {"embedder": minilm.fingerprint, "embedder_name": minilm.name}
    schema = strategy.row_schema(7).with_metadata(meta)
    lancedb.connect(tmp_path / "old").create_table("strategies", schema=schema)
    with pytest.raises(ValueError, match="another version of the kit .*other types"):
        ReasoningBank(tmp_path / "old", minilm)


WRITER = """
import sys
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.strategy import Strategy
from tests.reasoning_bank.hash_embedder import HashEmbedder

bank = ReasoningBank(sys.argv[1], HashEmbedder())
print("ready", flush=True)
for i in range(40):
    fields = dict(description="", content="Count.", kind="success", family="f", level=1)
    fields |= dict(problem_id=f"p{i}", question=f"What is {i}?", model="m", extractor="x")
    bank.add([Strategy(title=title, **fields) for title in ("One", "Two", "Three")])
    print(i, flush=True)
"""


def writer(folder) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=paths.ROOT)


def test_a_killed_writer_leaves_whole_additions_and_ends_the_same(tmp_path, monkeypatch):
    for at in (3, 11, 20):
        process = writer(tmp_path / "killed")
        while process.stdout.readline().strip() != str(at):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        bank = ReasoningBank(tmp_path / "killed", HashEmbedder())
        assert len(bank) % 3 == 0 and 3 * (at + 1) <= len(bank) < 120
    assert writer(tmp_path / "killed").communicate()[0].endswith("39\n")
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "whole")])
    exec(WRITER, {})
    whole = ReasoningBank(tmp_path / "whole", HashEmbedder())
    assert ReasoningBank(tmp_path / "killed", HashEmbedder()).logical_hash() == whole.logical_hash()
    assert len(whole) == 120


def test_two_writers_at_once_lose_nothing(tmp_path):
    both = [writer(tmp_path), writer(tmp_path)]
    for process in both:
        assert process.communicate()[0].endswith("39\n")
    assert len(ReasoningBank(tmp_path, HashEmbedder())) == 120, "a strategy is lost or there twice"


def write(strategies, file, **more) -> None:
    """JSON lines, as a person or another program would hand them in."""
    rows = [json.dumps(dataclasses.asdict(item) | more) + "\n" for item in strategies]
    file.write_text("".join(rows))


def test_a_bank_goes_through_a_table(bank, tmp_path, minilm):
    write(bank.strategies(), tmp_path / "t.jsonl")
    other = ReasoningBank(tmp_path / "other", minilm)
    other.add(strategy.read(tmp_path / "t.jsonl"))
    assert other.logical_hash() == bank.logical_hash()
    write(bank.strategies(), tmp_path / "old.jsonl", uses=2, wins=1)
    assert strategy.read(tmp_path / "old.jsonl") == bank.strategies()


def test_a_bad_row_of_a_table_is_named(tmp_path, train):
    file = tmp_path / "t.jsonl"
    write([lesson(train[0]), lesson(train[1])], file)
    good = file.read_text().splitlines()
    for bad in ("{", "[1]", '{"title": "x"}', good[1].replace('"success"', '"maybe"')):
        file.write_text(f"{good[0]}\n{bad}\n")
        with pytest.raises(ValueError, match="t.jsonl, row 2"):
            strategy.read(file)


def test_the_shipped_strategies_are_one_per_family_and_say_who_wrote_them(minilm, tmp_path):
    items = strategy.read(paths.DATA / "strategies" / "laptop.jsonl")
    tests = problems.load("laptop", "test").problems
    assert sorted(item.family for item in items) == sorted({p.family for p in tests})
    assert {item.model for item in items} == {"the authors of this kit"}
    made = ReasoningBank(tmp_path, minilm)
    made.add(items)
    found = [made.retrieve(p, k=1, key="question").strategies for p in tests[::5]]
    right = [f[0].family == p.family for f, p in zip(found, tests[::5], strict=True) if f]
    assert len(right) > 60 and sum(right) / len(right) > 0.9
