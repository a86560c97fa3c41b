"""Filling a bank: what is learnt from whom, and that a killed build ends with the same bank."""

import dataclasses
import itertools
import json

import dspy
import pytest
from dspy.lm15 import Message, Response, TextPart, Usage

from kit.data import problems
from kit.evaluation.store import Store
from kit.models import embedder
from kit.reasoning_bank import build
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.build import BankBuildConfig
from kit.reasoning_bank.dspy_backend import Engine, Lines
from kit.schema import digest
from tests.fake_openai import served
from tests.scripted import Scripted

QUICK = BankBuildConfig(solve_tokens=8, extract_tokens=8, group=6)


class Teacher(Engine):
    """Decodes nothing: answers each request with a lesson, or a yes or no, that depends on it."""

    told: list[str]

    def _answer(self, part):
        for request, future in part:
            system = request.system if isinstance(request.system, str) else request.system[0].text
            mark = digest([system, *(m.text for m in request.messages)], 6)
            judging = "yes or no" in system
            text = f"Title: Lesson {mark}\nWhen: Always.\nLesson: Think of the rule called {mark}."
            if judging:
                text = ("yes", "no", "unsure")[int(mark, 16) % 3]
            self.told.append("judge" if judging else "extract")
            said = Message.assistant([TextPart(text)])
            future.set_result(
                Response(id=None, model="m", message=said, finish_reason="stop", usage=Usage())
            )
        self.rounds += bool(part)


@pytest.fixture(scope="module")
def minilm():
    return embedder.load()


@pytest.fixture
def teacher(tiny):
    made = Teacher(tiny, batch_size=8)
    made.told = []
    return made


@pytest.fixture(scope="module")
def group():
    return problems.load("laptop", "train").problems[::23]  # 19 of all families


def built(folder, minilm, teacher, group, recipe=QUICK):
    bank = ReasoningBank(folder / "bank", minilm)
    frame = build.fill_bank(
        bank, teacher, group, Store(folder / "store"), recipe, lambda line: None
    )
    return bank, frame


def test_every_problem_teaches_a_lesson_that_knows_where_it_is_from(
    tmp_path, minilm, teacher, group
):
    bank, frame = built(tmp_path, minilm, teacher, group)
    assert len(bank) == len(frame) == 19 and teacher.rounds == 4, "one decoding per group"
    by_id = {p.id: p for p in group}
    correct = dict(zip(frame["problem_id"], frame["correct"], strict=True))
    for item in bank.strategies():
        problem = by_id[item.problem_id]
        assert (item.question, item.family, item.level) == (
            problem.question, problem.family, problem.level,
        )  # fmt: skip
        assert item.kind == ("success" if correct[problem.id] else "failure")
        assert item.step == [p.id for p in group].index(problem.id) // 6
        assert item.model.startswith("tiny@") and len(item.extractor) == 12
    assert bank.tags() == ["start", "step-0000", "step-0001", "step-0002", "step-0003"]
    assert [len(bank.checkout(tag)) for tag in bank.tags()] == [0, 6, 12, 18, 19]


@pytest.mark.parametrize("judge, k", [("gold", 0), ("self", 1)])
def test_a_killed_build_ends_with_the_same_bank(tmp_path, minilm, teacher, group, judge, k):
    recipe = dataclasses.replace(QUICK, judge=judge, k=k)
    whole, records = built(tmp_path / "whole", minilm, teacher, group, recipe)

    class Killed(Exception):
        pass

    for stop in (1, 2, 3):

        def die(line, stop=stop):
            if line.startswith(f"step {stop}/"):
                raise Killed

        bank = ReasoningBank(tmp_path / "cut" / "bank", minilm)
        with pytest.raises(Killed):
            build.fill_bank(bank, teacher, group, Store(tmp_path / "cut" / "store"), recipe, die)
    done, again = built(tmp_path / "cut", minilm, teacher, group, recipe)
    assert done.logical_hash() == whole.logical_hash() and len(done) > 0
    columns = ["problem_id", "text", "judged", "retrieved", "prompt_tokens"]
    assert again[columns].equals(records[columns])
    noted = build.steps(done)
    assert noted["step"].tolist() == [0, 1, 2, 3] and noted["lessons"].sum() == len(done)
    assert (noted["seconds"] > 0).all()
    asked = len(teacher.told)
    built(tmp_path / "cut", minilm, teacher, group, recipe)
    assert len(teacher.told) == asked, "what was judged is not judged again"


def test_streaming_solves_each_group_with_what_came_before(tmp_path, minilm, teacher, group):
    recipe = dataclasses.replace(QUICK, judge="self", k=1)
    bank, frame = built(tmp_path, minilm, teacher, group, recipe)
    step = {p.id: i // 6 for i, p in enumerate(group)}
    made = {item.id: item.step for item in bank.strategies()}
    first = frame[frame["problem_id"].map(step) == 0]
    assert (first["retrieved"] == "").all(), "nothing is known before the first group"
    later = frame[frame["problem_id"].map(step) > 0]
    assert (later["retrieved"] != "").any()
    for row in later.itertuples():
        assert all(made[i] < step[row.problem_id] for i in row.retrieved.split())
    unread = frame[frame["judged"].isna()]["problem_id"]
    assert len(unread) and not set(unread) & {item.problem_id for item in bank.strategies()}
    assert teacher.told.count("judge") == 19


def test_what_was_learnt_is_appended_after_every_task(tmp_path, minilm, teacher, group):
    recipe = dataclasses.replace(QUICK, judge="self", k=1, group=1)
    bank, frame = built(tmp_path, minilm, teacher, group[:8], recipe)
    taught = frame["judged"].notna().tolist()
    assert [len(bank.checkout(tag)) for tag in bank.tags()[1:]] == [*itertools.accumulate(taught)]
    assert (frame["retrieved"][: taught.index(True) + 1] == "").all()
    assert frame["retrieved"].iloc[-1], "the last task sees what those before it taught"


def test_another_seed_draws_another_bank(tmp_path, minilm, tiny, group):
    """Its attempts and its lessons; a bank that is there is not drawn again."""
    seeds, replies = [], []

    class Counted(Engine):
        def _response(self, request, generation):
            seeds.append(request.config.seed)
            return super()._response(request, generation)

    for seed in (0, 1, 0):
        recipe = dataclasses.replace(QUICK, seed=seed)
        given = Counted(tiny, batch_size=8), minilm, group[:6], Store(tmp_path / "store"), recipe
        replies.append(build.build_bank(tmp_path, *given)[1]["text"].tolist())
    assert replies[0] == replies[2] != replies[1]
    assert len(seeds) == 12 and len({*seeds}) == 2


def test_who_learns_from_a_failure_may_be_told_the_answer(tmp_path, minilm, tiny, group):
    def shown(corrected: bool) -> str:
        scripted = Scripted(["nothing"] * 6)
        server = dspy.LM("kit/scripted", engine=scripted, cache=False, num_retries=0)
        recipe = dataclasses.replace(QUICK, corrected=corrected)
        bank = ReasoningBank(tmp_path / str(corrected), minilm)
        store = Store(tmp_path / "store")
        with dspy.context(adapter=Lines()):
            build.fill_bank(bank, Engine(tiny), group[:1], store, recipe, print, server)
        return scripted.asked[0][-1][1]

    told = f"The correct answer is {group[0].answer}."
    assert told in shown(True) and told not in shown(False)


def test_several_trajectories_are_contrasted(tmp_path, minilm, teacher, group):
    recipe = dataclasses.replace(QUICK, width=3)
    bank, frame = built(tmp_path, minilm, teacher, group[:6], recipe)
    assert len(frame) == 18 and len(bank) == 6 and teacher.told == ["extract"] * 6


def test_another_model_writes_what_this_one_reads(tmp_path, minilm, tiny, group):
    """Any dspy.LM judges and extracts, here by JSON: the solver is asked for attempts only."""
    said = json.dumps({"lessons": [
        {"title": "Count", "description": "Always.", "content": "Go through the word once again."},
        {"title": "Count", "description": "Always.", "content": "Use 7."},
    ]})  # fmt: skip

    def reply(messages):
        judging = "final answer is correct" in messages[0][1]
        return json.dumps({"correct": True}) if judging else said

    server = dspy.LM("kit/scripted", engine=Scripted(reply), cache=False, num_retries=0)
    recipe, engine = dataclasses.replace(QUICK, judge="self"), Engine(tiny, batch_size=8)
    bank = ReasoningBank(tmp_path / "bank", minilm)
    with dspy.context(adapter=dspy.JSONAdapter()):
        frame = build.fill_bank(
            bank, engine, group[:6], Store(tmp_path / "store"), recipe, print, server
        )
    assert engine.calls == 0 and frame["judged"].all() and len(bank) == 6
    (model,) = {item.model for item in bank.strategies()}
    assert model == "kit/scripted" and {item.kind for item in bank.strategies()} == {"success"}
    (noted,) = build.steps(bank)["rejected"]
    assert [*noted] == ["too few words"] * 6


def test_a_server_writes_the_bank(tmp_path, minilm, tiny, group, monkeypatch):
    """An OpenAI-compatible one, by DSPy's default adapter; its tokens are counted."""
    lesson = {"title": "T", "description": "D.", "content": "Go through the word once again."}
    said = f"[[ ## lessons ## ]]\n{json.dumps([lesson])}\n\n[[ ## completed ## ]]"
    with served(lambda messages: said) as (address, asked):
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        monkeypatch.setenv("OPENAI_API_BASE", address)
        teacher = build.teacher("openai/large")
        teacher.cache = False
        bank = ReasoningBank(tmp_path / "bank", minilm)
        store = Store(tmp_path / "store")
        build.fill_bank(bank, Engine(tiny, batch_size=8), group[:3], store, QUICK, print, teacher)
    assert len(asked) == 3 == len(bank) and {body["model"] for body in asked} == {"large"}
    assert asked[0]["max_tokens"] == QUICK.extract_tokens
    noted = build.steps(bank)
    assert (noted["prompt_tokens"].sum(), noted["new_tokens"].sum()) == (21, 9)


def test_banks_of_other_recipes_and_problems_stand_apart(tmp_path, minilm, teacher, group):
    store = Store(tmp_path / "store")

    def uri(problems=group[:6], recipe=QUICK):
        bank, frame = build.build_bank(tmp_path, teacher, minilm, problems, store, recipe)
        assert len(bank) == len(frame) == len(problems)
        return bank.uri

    other = dataclasses.replace(QUICK, temperature=0.2)
    assert uri() == uri() and len({uri(), uri(group[:5]), uri(recipe=other)}) == 3


def test_nothing_to_learn_from_and_wrong_recipes(tmp_path, minilm, teacher):
    bank, frame = built(tmp_path, minilm, teacher, [])
    assert len(bank) == len(frame) == 0
    for wrong in (dict(judge="other"), dict(width=0), dict(group=0), dict(k=-1)):
        with pytest.raises(ValueError, match="judge is one of"):
            BankBuildConfig(**wrong)
