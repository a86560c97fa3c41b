"""DSPy over the kit's decoding: what it answers, in how many decodings, and whose error it is."""

import asyncio
import json
import threading
from functools import partial

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError

from kit.evaluation.evaluate import MemoryConfig
from kit.inference import decode
from kit.inference.policies import Window
from kit.reasoning_bank import build
from kit.reasoning_bank.dspy_backend import Engine, Lines, language_model
from kit.reasoning_bank.programs import Solver
from kit.schema import Problem, Prompt, Sampling

QUESTIONS = [f"What is {i} plus {i * i}?" for i in range(12)]


@pytest.fixture
def engine(tiny):
    return Engine(tiny, max_new_tokens=8, batch_size=16)


@pytest.fixture
def solver(engine):
    with dspy.context(lm=language_model(engine, temperature=0.8), adapter=Lines()):
        yield Solver()


def expected(tiny, question: str, sampling: Sampling, seed: int) -> str:
    """The same prompt through `decode`, without DSPy; a request is known by prompt and seed."""
    messages = build.solve_prompt(Problem("", question, "", "", 0, ""), "").messages
    asked = Prompt(Problem("", "", "", "", 0, "dspy"), "dspy", messages)
    request = decode.Request(decode.tokenize(tiny, asked), json.dumps([asked.id, seed]))
    return decode.decode(tiny, [request], sampling)[0].text.strip()


def test_an_answer_is_what_decoding_gives(engine, solver, tiny):
    sampling = Sampling(8, temperature=0.8)
    for seed in (0, 1):
        found = [solver(question=q, seed=seed).answer for q in QUESTIONS[:3]]
        assert found == [expected(tiny, q, sampling, seed) or None for q in QUESTIONS[:3]]
    assert solver(question=QUESTIONS[0], seed=0).answer != solver(QUESTIONS[0], seed=5).answer


def test_a_request_without_a_seed_draws_anew_each_time(tiny):
    def said(temperature: float, **how) -> list[str]:
        ask = dspy.Predict("question -> answer")
        lm = language_model(Engine(tiny, max_new_tokens=8), temperature=temperature)
        with dspy.context(lm=lm, adapter=Lines()):
            return [ask(question=QUESTIONS[0], **how).answer for _ in range(3)]

    assert len({*said(0.8)}) == 3 and said(0.8) == said(0.8)
    assert len({*said(0.0)}) == 1 == len({*said(0.8, config={"seed": 1})})


def test_rollouts_and_several_samples_differ(tiny):
    engine = Engine(tiny, max_new_tokens=8)
    lm, solver = language_model(engine, temperature=1.0), Solver()
    with dspy.context(lm=lm, adapter=Lines()):
        many = dspy.Predict("question -> answer", n=4)(question=QUESTIONS[0]).completions.answer
        given = dict(question=QUESTIONS[0], strategies="")
        rolled = [solver.solve(**given, config={"rollout_id": i}).answer for i in range(4)]
        best = dspy.BestOfN(solver, N=4, reward_fn=lambda *_: 0.0, threshold=1.0)
        calls = engine.calls
        best(question=QUESTIONS[0])
        awaited = asyncio.run(solver.acall(question=QUESTIONS[0])).answer
    assert len({*many}) == 4 == len({*rolled}) and engine.calls == calls + 5 and awaited


def test_programs_together_take_as_many_decodings_as_one_makes_calls(engine, solver):
    def twice(question):
        first = solver(question=question, seed=0).answer
        return first, solver(question=f"{question} {first}", seed=0).answer

    alone = [twice(q) for q in QUESTIONS]
    assert engine.rounds == 24
    both = engine.run_batched([partial(twice, q) for q in QUESTIONS])
    assert engine.rounds == 26 and engine.calls == 48
    assert both == alone
    assert engine.run_batched([]) == []
    assert engine.prompt_tokens > engine.new_tokens >= 48


def test_programs_that_end_early_do_not_hold_up_the_others(engine, solver):
    def some(count):
        return [solver(question=QUESTIONS[i]).answer for i in range(count)]

    found = engine.run_batched([partial(some, i) for i in (0, 1, 5, 2)])
    assert [len(each) for each in found] == [0, 1, 5, 2]
    assert engine.rounds == 5 and engine.calls == 8


def test_what_a_program_raises_is_its_own(engine, solver):
    def wrong():
        raise KeyError("mine")

    def much():
        return solver.solve(question="x", strategies="", config={"max_tokens": 10**6})

    first, second, third = engine.run_batched([wrong, much, partial(solver, question="Hello")])
    assert isinstance(first, KeyError) and "lower max_new_tokens" in str(second)
    assert third.answer is not None
    with pytest.raises(Exception, match="stop strings; leave it out"):
        solver.solve(question="x", strategies="", config={"stop": ["\n"]})


def test_calls_from_plain_threads_are_gathered_too(engine, solver):
    found, context = {}, dict(lm=dspy.settings.lm, adapter=dspy.settings.adapter)

    def ask(question):
        with dspy.context(**context):
            found[question] = solver(question=question, seed=0).answer

    threads = [threading.Thread(target=ask, args=(q,)) for q in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.rounds < 6 and len(found) == len(QUESTIONS)
    assert found == {q: solver(question=q, seed=0).answer for q in QUESTIONS}


def test_the_name_tells_weights_dtype_and_memory_apart(tiny):
    names = {
        Engine(tiny).name,
        Engine(tiny, memory=MemoryConfig(Window(kept_tokens=16))).name,
        Engine(tiny, memory=MemoryConfig(Window(kept_tokens=17))).name,
    }
    assert len(names) == 3 and all(tiny.weights_hash in name for name in names)


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("<think>Is there no error? I see none.</think>\nyes", True),
        ("No, yes would be too kind</think>\nno", False),
        ("<think>It says yes. So far", None),
        ("<think>yes</think>", None),
        ("Yes. <think>or is it no.", True),
    ],
)
def test_what_a_judge_thinks_is_no_verdict(completion, verdict):
    ask = dspy.Signature("question -> correct: bool")
    if verdict is None:
        with pytest.raises(AdapterParseError):
            Lines().parse(ask, completion)
    else:
        assert Lines().parse(ask, completion) == {"correct": verdict}
