"""From prompts to records: nothing is computed twice, and a killed run ends as one that was not."""

import dataclasses
import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from kit import paths
from kit.data import prompts
from kit.data.prompts import FORMAT_INSTRUCTION
from kit.dms import evictor
from kit.evaluation import evaluate, grader
from kit.evaluation.evaluate import MemoryConfig, plan
from kit.evaluation.store import Store
from kit.inference import decode
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import DMS, H2O, TOVA, Full, Window
from kit.schema import Problem, Prompt, Sampling, digest

SUMS = [
    Problem(f"sum-{i}", f"What is {i} + {i + 1}?", str(2 * i + 1), "sum", 1 + i % 2, "test")
    for i in range(6)
]
PLAIN = prompts.build(prompts.plain, SUMS)
SHORT = Sampling(max_new_tokens=8)
WARM = Sampling(max_new_tokens=8, temperature=1.0, seed=5)
THICK = MemoryConfig()


@pytest.fixture
def decoded(monkeypatch) -> list[list[decode.Request]]:
    """The requests that reach the decode loop, one list per call."""
    calls, real = [], decode.decode

    def counted(model, requests, *rest, **options):
        calls.append(requests)
        return real(model, requests, *rest, **options)

    monkeypatch.setattr(decode, "decode", counted)
    return calls


def run(model, store: Store, asked=PLAIN, sampling: Sampling = SHORT, **options):
    said = []
    frame = evaluate.evaluate(model, asked, sampling, store, report=said.append, **options)
    return frame, said


def test_a_second_evaluation_decodes_nothing(bundled, tmp_path, decoded):
    store = Store(tmp_path)
    frame, said = run(bundled, store)
    assert [len(requests) for requests in decoded] == [6]
    assert said[0] == "6 samples, 0 already stored" and said[-1].startswith("6/6 samples")
    again, said = run(bundled, Store(tmp_path))
    assert len(decoded) == 1 and said == ["6 samples, 6 already stored"]
    assert again.equals(frame)
    assert frame["key"].is_unique and sorted(frame["problem_id"]) == [p.id for p in SUMS]


def test_a_record_says_what_was_asked_said_and_graded(tiny, tmp_path, decoded):
    asked = [prompts.format_only(p) for p in SUMS]
    frame, _ = run(tiny, Store(tmp_path), asked)
    (requests,) = decoded
    expected = {}
    for request, g in zip(requests, decode.decode(tiny, requests, SHORT, 64)):
        expected[request.problem_id] = g
    for row in frame.itertuples():
        (problem,) = (p for p in SUMS if p.id == row.problem_id)
        generation = expected[problem.id]
        assert (row.text, row.finish) == (generation.text, generation.finish)
        assert row.new_tokens == generation.new_tokens <= 8
        assert row.kv_reads_tokens == generation.kv_reads_tokens
        assert (row.question, row.answer, row.level) == (
            problem.question,
            problem.answer,
            problem.level,
        )
        assert (row.model, row.weights_hash) == (tiny.name, tiny.weights_hash)
        assert (row.arm, row.policy, row.source, row.sample) == ("format", "full", "test", 0)
        verdict = evaluate.grader.grade(row.text, problem.answer, prompts.FORM)
        assert dataclasses.asdict(verdict).items() <= row._asdict().items()


def test_samples_are_different_jobs_of_one_prompt(tiny, tmp_path, decoded):
    frame, _ = run(tiny, Store(tmp_path), PLAIN[:3], WARM, samples=4)
    assert sorted(zip(frame["problem_id"], frame["sample"])) == [
        (p.id, s) for p in SUMS[:3] for s in range(4)
    ]
    assert frame["text"].nunique() == 12
    more, _ = run(tiny, Store(tmp_path), PLAIN[:3], WARM, samples=5)
    assert [len(requests) for requests in decoded] == [12, 3]
    assert set(frame["key"]) < set(more["key"])


def test_a_new_grader_grades_what_is_stored(tiny, tmp_path, decoded, monkeypatch):
    store = Store(tmp_path)
    old, _ = run(tiny, store, sampling=WARM)
    decoded.clear()
    monkeypatch.setattr(grader, "GRADE_VERSION", grader.GRADE_VERSION + 1)
    new, _ = run(tiny, store, sampling=WARM)
    assert decoded == []
    assert set(old["key"]).isdisjoint(new["key"]) and len(store.table()) == 12
    same = ["generation_key", "problem_id", "text", "finish", "seconds", "kv_peak_bytes", "correct"]
    by_problem = [frame.sort_values("problem_id", ignore_index=True)[same] for frame in (old, new)]
    assert by_problem[0].equals(by_problem[1])


TOVA_16, H2O_16 = MemoryConfig(TOVA(16)), MemoryConfig(H2O(16), Quantized(4, 16))


@pytest.mark.parametrize(
    ("memory", "temperature"),
    [(THICK, 0.0), (TOVA_16, 0.0), (THICK, 1.0), (TOVA_16, 1.0), (H2O_16, 1.0)],
    ids=lambda value: value.name if isinstance(value, MemoryConfig) else f"at {value}",
)
def test_an_answer_that_ended_is_the_same_under_another_limit(
    tiny, tmp_path, decoded, monkeypatch, memory, temperature
):
    stops = [*range(0, tiny.weights.config.vocab_size, 15)]
    monkeypatch.setattr(tiny.weights.generation_config, "eos_token_id", stops)
    limits = {n: Sampling(n, temperature, seed=5) for n in (10, 30)}
    once, how = Store(tmp_path / "once"), dict(samples=3, memory=memory)
    fresh = {n: run(tiny, Store(tmp_path / f"{n}"), sampling=limits[n], **how)[0] for n in limits}
    ended = {n: (fresh[n]["finish"] == "stop").sum() for n in limits}
    within = (fresh[30][fresh[30]["finish"] == "stop"]["new_tokens"] <= 10).sum()
    assert 0 < ended[10] < ended[30] < 18, "of all kinds, else this shows nothing"
    decoded.clear()
    shorter, _ = run(tiny, once, sampling=limits[10], **how)
    longer, said = run(tiny, once, sampling=limits[30], **how)
    assert [len(requests) for requests in decoded] == [18, 18 - ended[10]]
    assert said[0] == (
        f"18 samples, {ended[10]} already stored, {ended[10]} of them under another limit of tokens"
    )
    back, _ = run(tiny, (other := Store(tmp_path / "back")), sampling=limits[30], **how)
    again, _ = run(tiny, other, sampling=limits[10], **how)
    assert len(decoded[-1]) == 18 - within
    for got, asked in ((shorter, 10), (longer, 30), (back, 30), (again, 10)):
        same = [name for name in got if name not in ("seconds", "joules")]
        assert got[same].equals(fresh[asked][same])


def test_part_of_a_job_says_what_the_whole_job_says(tiny, tmp_path, decoded):
    """A resumed run, or one at another batch size, makes the same records."""
    store, whole = Store(tmp_path / "one"), Store(tmp_path / "two")
    run(tiny, store, PLAIN[:2], WARM, batch_size=1)
    run(tiny, store, PLAIN, WARM, batch_size=3)
    assert [len(requests) for requests in decoded] == [2, 4]
    run(tiny, whole, PLAIN, WARM)
    assert store.logical_hash() == whole.logical_hash()


def test_each_sample_is_stored_as_it_ends_and_none_that_ended_is_lost(tiny, tmp_path, monkeypatch):
    store, said = Store(tmp_path), []
    monkeypatch.setattr(evaluate, "COMMIT_S", 0.0)
    evaluate.evaluate(tiny, PLAIN, WARM, store, batch_size=4, report=said.append)
    assert [line.split()[0] for line in said[1:]] == [f"{n}/6" for n in range(1, 7)]
    monkeypatch.undo()
    finish, count = decode._finish, []

    def fail(*args):
        count.append(1)
        if len(count) == 4:
            raise MemoryError("no room")
        return finish(*args)

    monkeypatch.setattr(decode, "_finish", fail)
    with pytest.raises(MemoryError):
        run(tiny, store, sampling=dataclasses.replace(WARM, seed=6), batch_size=2)
    assert len(store.keys()) == 6 + 2, "the two that ended together before"


def test_a_new_decoder_decodes_again(tiny, tmp_path, decoded, monkeypatch):
    run(tiny, Store(tmp_path))
    monkeypatch.setattr(decode, "DECODE_VERSION", decode.DECODE_VERSION + 1)
    run(tiny, Store(tmp_path))
    assert [len(requests) for requests in decoded] == [6, 6]
    monkeypatch.setattr(decode, "CUDA_VERSION", decode.CUDA_VERSION + 1)
    run(tiny, Store(tmp_path))
    assert [len(requests) for requests in decoded] == [6, 6], "a GPU's kernels are none of a CPU's"
    gpu = decode.versions(SimpleNamespace(device=torch.device("cuda")))
    assert gpu == [decode.DECODE_VERSION, decode.CUDA_VERSION]


def test_all_that_determines_the_tokens_is_in_both_keys(tiny):
    def keys(model=tiny, asked=PLAIN, sampling=WARM, memory=THICK) -> set[str]:
        jobs = plan(model, asked, sampling, 1, memory)
        return {key for job in jobs for key in (job.key, job.generation_key)}

    base = keys()
    assert len(base) == 12 and keys() == base
    assert keys(asked=PLAIN[::-1]) == base, "not on the order of prompts"
    settings = dict(max_new_tokens=9, temperature=0.9, top_p=0.9, top_k=9, seed=9)
    assert settings.keys() == {field.name for field in dataclasses.fields(Sampling)}
    for name, value in settings.items():
        assert keys(sampling=dataclasses.replace(WARM, **{name: value})).isdisjoint(base), name
    assert keys(model=dataclasses.replace(tiny, weights_hash="other")).isdisjoint(base)
    assert keys(asked=prompts.build(prompts.format_only, SUMS)).isdisjoint(base)
    assert keys(asked=prompts.build(prompts.plain, SUMS, thinking=True)).isdisjoint(base)
    assert keys(asked=[dataclasses.replace(p, arm="other") for p in PLAIN]).isdisjoint(base)
    moved = [dataclasses.replace(p, source="other") for p in SUMS]
    assert keys(asked=prompts.build(prompts.plain, moved)).isdisjoint(base)
    memories = [Window(kept_tokens=8), Window(kept_tokens=9), Window(kept_tokens=9, sinks=0)]
    memories = [MemoryConfig(policy) for policy in memories] + [
        MemoryConfig(quantized=Quantized(4, 16))
    ]
    found = [keys(memory=memory) for memory in memories]
    assert len(base.union(*found)) == 12 * 5 and keys(memory=MemoryConfig(Full())) == base


def test_the_chat_template_and_the_stop_tokens_are_in_the_keys(tiny, monkeypatch):
    base = {job.key for job in plan(tiny, PLAIN, WARM, 1)}
    with monkeypatch.context() as patch:
        patch.setattr(tiny.tokenizer, "chat_template", tiny.tokenizer.chat_template + " ")
        assert {job.key for job in plan(tiny, PLAIN, WARM, 1)}.isdisjoint(base)
    monkeypatch.setattr(tiny.weights.generation_config, "eos_token_id", [2, 3])
    assert {job.key for job in plan(tiny, PLAIN, WARM, 1)}.isdisjoint(base)


def test_the_gold_answer_is_in_the_key_of_the_grade_alone(tiny):
    (one,) = plan(tiny, PLAIN[:1], WARM, 1)
    other = prompts.plain(dataclasses.replace(SUMS[0], answer="7"))
    (two,) = plan(tiny, [other], WARM, 1)
    assert one.generation_key == two.generation_key and one.key != two.key


def test_records_say_what_the_cache_kept(tiny, tmp_path):
    store, thin = Store(tmp_path), MemoryConfig(Window(kept_tokens=8), Quantized(4, 16, 4))
    full, _ = run(tiny, store)
    kept = evaluate.evaluate(tiny, PLAIN, WARM, store, memory=thin, report=lambda line: None)
    assert set(full["policy"]) == {"full"}
    assert set(kept["policy"]) == {"window 8 + kv 4-bit g16 r4"}
    assert (kept["kv_peak_tokens"] <= 9).all() and (full["kv_peak_tokens"] > 9).all()
    assert (kept["kv_reads_tokens"] < full["kv_reads_tokens"].min()).all()


def test_derived_records_keep_their_costs_and_are_graded_anew(tiny, tmp_path):
    store = Store(tmp_path)
    first, _ = run(tiny, store)
    texts = [f"Answer: {answer}" for answer in first["answer"]]
    found = evaluate.derive(first, texts, "tool", store)
    assert found["correct"].all() and set(found["arm"]) == {"tool"} and found["compliant"].all()
    order = found.set_index("problem_id").loc[first["problem_id"]].reset_index()
    same = ["problem_id", "prompt_id", "new_tokens", "kv_reads_tokens", "seconds", "prompt_tokens"]
    assert order[same].equals(first[same]) and order["text"].tolist() == texts
    assert evaluate.derive(first, texts, "tool", store).equals(found)
    assert len(store.keys()) == 12 and run(tiny, store)[1] == ["6 samples, 6 already stored"]


def test_an_evictor_of_other_weights_is_refused(tiny, tmp_path):
    made = evictor.Evictor(tiny.weights, evictor.LAPTOP, "other")
    with pytest.raises(ValueError, match="was trained for weights other, tiny has"):
        evaluate.evaluate(tiny, PLAIN, WARM, Store(tmp_path), memory=MemoryConfig(DMS(made)))


def test_the_same_prompt_twice_is_refused(tiny, tmp_path):
    other_gold = prompts.plain(dataclasses.replace(SUMS[0], answer="7"))
    for twice in ([PLAIN[0], PLAIN[0]], [PLAIN[0], other_gold]):
        with pytest.raises(ValueError, match="same prompt occurs twice.*once per arm"):
            run(tiny, Store(tmp_path), twice)
    assert Store(tmp_path).keys() == set()


# Prompts and the hashes of the schema


def test_arms_ask_the_same_question():
    plain, form = prompts.plain(SUMS[0]), prompts.format_only(SUMS[0], thinking=True)
    assert plain.messages == (("user", SUMS[0].question),)
    assert form.messages == (("user", f"{SUMS[0].question}\n\n{FORMAT_INSTRUCTION}"),)
    assert (plain.arm, plain.thinking, form.arm, form.thinking) == ("plain", False, "format", True)
    answered = f"{SUMS[0].question}\n{FORMAT_INSTRUCTION.replace('<answer>', '1')}"
    assert evaluate.grader.grade(answered, "1", prompts.FORM).compliant


def test_a_prompt_is_known_by_what_the_model_sees():
    base = PLAIN[0]
    same = Prompt(dataclasses.replace(SUMS[0], answer="x", level=9), "other", base.messages)
    assert same.id == base.id
    others = [
        dataclasses.replace(base, messages=(("system", SUMS[0].question),)),
        dataclasses.replace(base, messages=(("user", SUMS[0].question + " "),)),
        dataclasses.replace(base, thinking=True),
        dataclasses.replace(base, problem=dataclasses.replace(SUMS[0], id="other")),
    ]
    assert len({base.id, *(other.id for other in others)}) == 5


def test_digest_is_the_hash_of_canonical_json():
    canonical = '{"a":[1,2.5,null,true],"é":"\\n"}'
    expected = evaluate.digest.__globals__["hashlib"].sha256(canonical.encode()).hexdigest()
    assert digest({"é": "\n", "a": (1, 2.5, None, True)}) == expected
    assert digest({"a": [1, 2.5, None, True], "é": "\n"}, 12) == expected[:12]


# Killed and resumed

WORKER = textwrap.dedent(
    """
    # Evaluates into the store named on each line of stdin, in a fork of its own that can be
    # killed: a fork starts at once where a fresh process imports for seconds. Nothing runs
    # in this process but imports, so there is no state that a fork could find half done.
    import os, sys
    from kit.data import prompts
    from kit.evaluation import evaluate
    from kit.models.load import load
    from kit.schema import Problem, Sampling
    from kit.evaluation.store import Store

    model = load(sys.argv[1], dtype="float32")
    problems = [Problem(f"p{i}", "say " * i, "1", "f", 1, "t") for i in range(1, 13)]
    asked = prompts.build(prompts.plain, problems)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_k=100, top_p=0.9, seed=1)
    evaluate.COMMIT_S = 0.0  # so that each sequence is stored as it ends
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            evaluate.evaluate(model, asked, sampling, Store(line.strip()), samples=2, batch_size=3,
                              report=lambda text: print(text, flush=True))
            os._exit(0)
        print("started", pid, flush=True)
        print("ended", os.waitpid(pid, 0)[1], flush=True)
    """
)


class Runs:
    """Evaluations in a process of their own, one after the other, each of which can be killed."""

    def __init__(self, model_folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(model_folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=paths.ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )

    def line(self, start: str) -> str:
        """The next line that starts so; an end of the output is an error."""
        for line in self.process.stdout:
            if line.startswith(start):
                return line.strip()
        raise AssertionError(f"the worker ended before it said {start!r}")

    def start(self, store) -> int:
        print(store, file=self.process.stdin, flush=True)
        return int(self.line("started").split()[1])

    def status(self) -> int:
        return int(self.line("ended").split()[1])


@pytest.fixture(scope="module", autouse=True)
def runs(tiny_folder):
    """Started with the first test of this file, so that it imports while others run."""
    runs = Runs(tiny_folder)
    kill = functools.partial(os.killpg, runs.process.pid, signal.SIGKILL)
    watchdog = threading.Timer(300, kill)  # a worker that hangs must not hang the tests
    watchdog.start()
    yield runs
    watchdog.cancel()
    kill()
    runs.process.communicate()


def test_a_run_killed_three_times_ends_as_one_that_was_not(runs, tmp_path):
    runs.start(tmp_path / "whole")
    started = time.monotonic()
    assert runs.line("1/24") and runs.status() == 0
    each_seconds = (time.monotonic() - started) / 24
    held, rng = [0], random.Random()
    for _ in range(3):
        pid = runs.start(tmp_path / "killed")
        assert runs.line(f"24 samples, {held[-1]} already stored")
        for ended in range(rng.randint(0, 3)):
            assert runs.line(f"{ended + 1}/")
        time.sleep(rng.random() * each_seconds)
        os.kill(pid, signal.SIGKILL)
        assert runs.status() == signal.SIGKILL
        held.append(len(Store(tmp_path / "killed").keys()))
    assert held == sorted(held) and held[-1] < 24
    runs.start(tmp_path / "killed")
    assert runs.line(f"24 samples, {held[-1]} already stored") and runs.status() == 0
    whole, killed = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    assert len(killed.table()) == 24 and killed.table()["key"].is_unique
    assert killed.logical_hash() == whole.logical_hash()
    assert whole.table()["text"].nunique() == 24
