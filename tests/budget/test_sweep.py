"""The sweep: scenarios derived from few generations, against generations of their own."""

import copy
import dataclasses
import json
import weakref

import numpy as np
import pytest
import torch

from kit import paths
from kit.budget import ledger, sweep
from kit.budget.sweep import Grid, SweepRun
from kit.data import problems, prompts
from kit.evaluation import evaluate, grader
from kit.evaluation.store import Store
from kit.inference import decode
from kit.pipeline import stages
from tests.conftest import loaded
from tests.toys import drawn

SUMS = problems.load("laptop", "test", families=["chain_sum"], levels=[1]).problems[:4]
PLAIN = prompts.build(prompts.plain, SUMS)
GRID = Grid(policies=("full", "window 12"), bits=(16,), tokens=(3, 6, 10), widths=(1, 2, 3))


def quiet(line: str) -> None:
    pass


def swept(model, grid: Grid, folder, **how):
    asked = {False: PLAIN, True: PLAIN}
    return sweep.sweep(model, grid, asked, Store(folder), 3, quiet, batch_size=4, **how)


def test_a_grid_counts_its_scenarios_and_refuses_none_and_too_many():
    grid = Grid(policies=("full", "tova 8"), kv_bits=(16, 4), memory=(False, True), widths=(1, 4))
    assert len(grid.runs) == 3 * 2 * 2 * 2 and len(grid) == 24 * 1 * 2
    with pytest.raises(ValueError, match="the grid is empty: widths has no value"):
        Grid(widths=())
    with pytest.raises(ValueError, match=r"6,000 scenarios \(3 runs x 1 budgets x 2000 widths\)"):
        Grid(widths=tuple(range(1, 2001)))


def test_a_precision_that_there_is_not_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match=r"bits has 3, which cannot be made; use \(16, 8, 4\)"):
        Grid(bits=(16, 3))
    with pytest.raises(ValueError, match="kv_bits has 5, which cannot be made"):
        Grid(kv_bits=(16, 5))


def test_the_profiles_sweep_as_much_as_they_should():
    sizes = {}
    for profile in ("laptop", "workstation"):
        knobs = stages.read_profile(profile)["06_memory_budget"]
        grid = Grid(**{k: tuple(v) if isinstance(v, list) else v for k, v in knobs["GRID"].items()})
        sizes[profile] = len(grid) * len(knobs.get("MODELS", [1]))
        assert max(grid.widths) <= knobs["SAMPLES"]
    assert sizes["laptop"] >= 200 and sizes["workstation"] >= 1_700


def test_every_shorter_budget_is_what_a_run_of_its_own_would_say(tiny, tmp_path):
    for run in GRID.runs:
        found = sweep.generate(tiny, run, GRID, PLAIN, Store(tmp_path / "a"), 2, report=quiet)
        assert len(found) == 4 * 2 * 3
        for cut in GRID.tokens:
            alone = dataclasses.replace(GRID, tokens=(cut,))
            other = sweep.generate(tiny, run, alone, PLAIN, Store(tmp_path / "b"), 2, report=quiet)
            mine = found[found["arm"] == f"plain at {cut}"]
            order = ["problem_id", "sample"]
            mine, other = (x.sort_values(order).reset_index(drop=True) for x in (mine, other))
            same = ["text", "correct", "extracted", "new_tokens", "kv_reads_tokens", "finish"]
            assert mine[same].equals(other[same])
            assert (mine["key"] != other["key"]).all()


def test_what_is_stored_is_not_generated_again_and_order_does_not_matter(
    tiny, tmp_path, monkeypatch
):
    table, outcomes, *_ = swept(tiny, GRID, tmp_path / "a")
    assert len(table) == len(GRID) == 18 and outcomes.shape == (18, 4)
    turned = dataclasses.replace(GRID, policies=GRID.policies[::-1])
    swept(tiny, turned, tmp_path / "b")
    hashes = {Store(tmp_path / name).logical_hash() for name in "ab"}
    assert len(hashes) == 1
    monkeypatch.setattr(decode, "decode", lambda *_, **__: pytest.fail("decoded again"))
    again, same, *_ = swept(tiny, GRID, tmp_path / "a")
    assert again.equals(table) and np.array_equal(same, outcomes)


def test_a_new_grader_grades_what_a_sweep_stored(tiny, tmp_path, monkeypatch):
    """As another version or another gold answer would, without decoding or quantizing."""
    store, grid = Store(tmp_path), Grid(bits=(8,), tokens=(3, 9))
    old = sweep.generate(tiny, SweepRun(8), grid, PLAIN, store, 2, report=quiet)
    monkeypatch.setattr(decode, "decode", lambda *_, **__: pytest.fail("decoded again"))
    monkeypatch.setattr(sweep, "quantized", lambda *_: pytest.fail("quantized again"))
    monkeypatch.setattr(grader, "GRADE_VERSION", grader.GRADE_VERSION + 1)
    gold = {row.problem_id: row.extracted or "none" for row in old.itertuples()}
    asked = [dataclasses.replace(each, problem=dataclasses.replace(
        each.problem, answer=gold[each.problem.id])) for each in PLAIN]  # fmt: skip
    new = sweep.generate(tiny, SweepRun(8), grid, asked, store, 2, report=quiet)
    assert set(new["key"]).isdisjoint(old["key"]) and len(new) == len(old) == 16
    assert set(new["grade_version"]) == {grader.GRADE_VERSION}
    chosen = new["extracted"] == new["answer"]
    assert chosen.any() and new.loc[chosen, "correct"].all()
    order, same = ["problem_id", "sample", "arm"], ["generation_key", "text", "seconds", "arm"]
    both = [frame.sort_values(order, ignore_index=True)[same] for frame in (old, new)]
    assert both[0].equals(both[1])


def test_an_interrupted_sweep_ends_as_one_that_was_not(tiny, tmp_path, monkeypatch):
    """What had been stored when it ended is not made again, nor otherwise."""
    monkeypatch.setattr(evaluate, "COMMIT_S", 0.0)

    def stop(line: str) -> None:
        said.append(line)
        if "2 of 12" in line:
            raise KeyboardInterrupt

    said, asked = [], (tiny, SweepRun(), GRID, PLAIN)
    with pytest.raises(KeyboardInterrupt):
        sweep.generate(*asked, Store(tmp_path / "a"), 3, report=stop, batch_size=4)
    stored = len(Store(tmp_path / "a").keys()) // 3
    assert 2 <= stored < 12
    sweep.generate(*asked, Store(tmp_path / "a"), 3, report=said.append, batch_size=4)
    sweep.generate(*asked, Store(tmp_path / "b"), 3, report=quiet, batch_size=4)
    assert said == [
        f"weights 16-bit, full, kv 16-bit: {n} of {whole} generations"
        for whole, last in ((12, 2), (12 - stored, 12 - stored)) for n in range(1, last + 1)
    ]  # fmt: skip
    assert len({Store(tmp_path / name).logical_hash() for name in "ab"}) == 1


def test_a_scenario_costs_what_the_ledger_says(tiny_folder, dtype, tmp_path):
    tiny = loaded(tiny_folder, dtype)
    grid = Grid(bits=(16, 8), kv_bits=(16, 4), tokens=(4, 8), widths=(1, 3))
    table, *_ = swept(tiny, grid, tmp_path)
    a = ledger.architecture(tiny.weights.config)
    by = table.set_index(["bits", "kv_bits", "tokens", "width"])
    weights = sum(ledger.weights(a).values())
    assert by.loc[(16, 16, 8, 1), "bytes"] - by.loc[(16, 16, 8, 1), "kv_bytes"] == weights
    one, three = by.loc[(16, 16, 8, 1)], by.loc[(16, 16, 8, 3)]
    assert three["kv_bytes"] == pytest.approx(3 * one["kv_bytes"])
    assert three["reads"] == pytest.approx(3 * one["reads"])
    assert (table.groupby("bits")["bytes"].min().diff().dropna() > 0).all()
    assert by.loc[(8, 16, 8, 1), "reads"] > by.loc[(8, 16, 4, 1), "reads"]


def test_votes_need_samples_and_policies_names(tiny, tmp_path):
    with pytest.raises(ValueError, match="3 samples do not make a vote of 4"):
        swept(tiny, Grid(widths=(4,)), tmp_path)
    for wrong in ("dms 3x", "window", "ring 4"):
        with pytest.raises(ValueError, match=f"no policy '{wrong}'; use full, window N"):
            sweep.memory_of(SweepRun(policy=wrong), tiny)


def test_an_evictor_is_opened_by_what_the_caller_hands_over(tiny):
    run, opened = SweepRun(policy="dms 4x", kv_bits=4), []
    with pytest.raises(ValueError, match="'dms 4x' needs an evictor; pass load_evictor"):
        sweep.memory_of(run, tiny)

    def load_evictor(file, model):
        opened.append((file.name, model))
        return drawn(model)

    memory = sweep.memory_of(run, tiny, load_evictor)
    assert opened == [("smollm2-135m-seed0-4x.safetensors", tiny)]
    assert memory.policy.evictor.base_hash == tiny.weights_hash and memory.quantized.bits == 4


def test_a_run_without_room_is_recorded_and_the_rest_goes_on(tiny, tmp_path, monkeypatch):
    said, decoded = [], decode.decode

    def full(model, *args, **how):
        if how["policy"].name != "full":
            raise MemoryError("No memory for 12 slots of keys and values in a layer")
        return decoded(model, *args, **how)

    monkeypatch.setattr(decode, "decode", full)
    asked = {False: PLAIN, True: PLAIN}
    table, outcomes, failed, _ = sweep.sweep(tiny, GRID, asked, Store(tmp_path), 3, said.append)
    assert set(table["policy"]) == {"full"} and len(table) == len(outcomes) == 9
    assert failed == {
        SweepRun(
            policy="window 12"
        ): "out of memory: No memory for 12 slots of keys and values in a layer"
    }
    assert "window 12" in said[-1] and "out of memory" in said[-1]


def test_asking_the_store_quantizes_nothing(tiny, tmp_path, monkeypatch):
    grid = Grid(bits=(4,), tokens=(3,))
    table, *_ = swept(tiny, grid, tmp_path)
    sweep.quantized.cache_clear()
    monkeypatch.setattr(sweep, "quantized", lambda *_: pytest.fail("quantized again"))
    assert swept(tiny, grid, tmp_path)[0].equals(table)


def test_runs_without_room_are_refused_before_anything_is_loaded(tiny):
    a = ledger.QWEN3["Qwen3-4B"]
    grid = Grid(bits=(16, 4), policies=("full", "window 1024"), kv_bits=(16, 2), tokens=(30_000,))
    found = sweep.refused(a, grid, 500, available_bytes=20 * 10**9)
    # Two copies of the weights and one whole cache do not fit; a window does, and 2 bits.
    assert set(found) == {SweepRun(4)}
    assert (
        "out of memory: it needs 19" in found[SweepRun(4)]
        and "more than there is" in found[SweepRun(4)]
    )
    grown = dataclasses.replace(grid, policies=("snapkv 1024",), kv_bits=(16,))
    assert set(sweep.refused(a, grown, 500, 20 * 10**9)) == {SweepRun(4, "snapkv 1024")}
    bounded = dataclasses.replace(grown, policies=("rkv 1024",))
    assert not sweep.refused(a, bounded, 500, 20 * 10**9)
    need = sum(ledger.weights(a).values()) + 30_516 * 147_456
    short = sweep.refused(a, grid, 500, need)
    assert SweepRun(16) not in short and SweepRun(16) in sweep.refused(a, grid, 500, need - 2**20)
    assert not sweep.refused(ledger.architecture(tiny.weights.config), GRID, 100)
    assert 0 < sweep.available() < 2**50


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch):
    """What was freed, and what only circles of references hold, counts as used until asked for."""
    used = {"cached": 30, "circle": 20}

    class Circle:
        def __init__(self):
            self.me = self
            weakref.finalize(self, used.update, cached=50, circle=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: used.update(cached=0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 - sum(used.values()), 80))
    Circle()
    assert sweep.available() == 80


def test_a_refused_run_is_told_and_left_out(tiny, tmp_path):
    said, run = [], SweepRun(policy="window 12")
    asked = {False: PLAIN, True: PLAIN}
    found = sweep.sweep(
        tiny, GRID, asked, Store(tmp_path), 3, said.append, {run: "too large"}, batch_size=4
    )
    assert set(found.table["policy"]) == {"full"} and found.failed == {run: "too large"}
    assert f"{run.name}: too large" in said
    assert {key for each in found.keys for key in each} == Store(tmp_path).keys()


def test_the_notebook_ends_where_the_whole_cache_has_no_room(tiny_folder, tmp_path, monkeypatch):
    """Its cells on a tiny model, with every full cache in 16 bit refused, as on most GPUs."""
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)
    monkeypatch.setattr(sweep, "refused", lambda a, grid, *_: {
        run: f"{sweep.OUT}: it needs 168 GiB" for run in grid.runs
        if (run.policy, run.kv_bits) == ("full", 16)
    })  # fmt: skip
    grid = {"bits": [16, 8], "policies": ["full", "window 48"], "kv_bits": [16, 4]}
    small = {"MODELS": [str(tiny_folder)], "PROBLEMS": ["laptop", 2], "SAMPLES": 1}
    small["GRID"] = grid | {"memory": [False], "tokens": [2, 4], "widths": [1]}
    names = {"__name__": "__main__"}
    notebook = json.loads((paths.ROOT / "notebooks" / "06_memory_budget.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            names |= small if "parameters" in cell["metadata"].get("tags", ()) else {}
    (file,) = tmp_path.glob("tour/results/06_memory_budget.json")
    said = json.loads(file.read_text())
    assert len(said["missing"]) == 2 and len(said["scenarios"]) == 2 * 3 * 2
    against = [row["difference"] for row in said["gaps"] if row["against"] == "full, 16 bit"]
    assert against == [None] * 3
    assert {row["place"] for row in said["places"]} == {"cache"}, "no blocks, and not trained"


def test_weights_are_shared_and_a_bank_is_counted(tiny, tmp_path):
    grid = Grid(bits=(16,), tokens=(4, 8), widths=(1, 2))
    records = sweep.generate(tiny, SweepRun(), grid, PLAIN, Store(tmp_path), 2, report=quiet)
    plain, _ = sweep.scenarios(tiny, SweepRun(), grid, records, batch=8)
    held, _ = sweep.scenarios(tiny, SweepRun(), grid, records, batch=8, fetched=100, resident=8000)
    shared = plain["bytes"] - plain["weight_bytes"] * 7 / 8
    assert plain["shared_bytes"].to_numpy() == pytest.approx(shared.to_numpy())
    more = held["bytes"] - plain["bytes"]
    assert more.to_numpy() == pytest.approx((100 * plain["width"] + 8000).to_numpy())
    more = held["shared_bytes"] - plain["shared_bytes"]
    assert more.to_numpy() == pytest.approx((100 * plain["width"] + 1000).to_numpy())
    assert set(plain["model"]) == {tiny.name}


def test_an_answer_is_asked_for_in_thoughts_by_ending_them(tiny):
    knows = dataclasses.replace(tiny, tokenizer=copy.deepcopy(tiny.tokenizer))
    knows.tokenizer.add_tokens(["</think>"])
    (end,) = knows.tokenizer("</think>", add_special_tokens=False)["input_ids"]
    waiting = dataclasses.replace(GRID, waits=2)
    for model, thinking in ((tiny, False), (tiny, True), (knows, False), (knows, True)):
        forcing = sweep._forcing(model, waiting, thinking)
        asked = [model.tokenizer.decode(forcing.prompt(ids)) for ids in ((1, 2), (1, end, 2))]
        knows_thoughts = model is knows and thinking
        assert asked == ["\n</think>\n\nAnswer:" if knows_thoughts else "\nAnswer:", "\nAnswer:"]
        assert forcing.end_of_thinking == (end if knows_thoughts else None)
        assert model.tokenizer.decode(forcing.wait_tokens) == " Wait," and forcing.max_waits == 2


def test_a_scenario_is_charged_its_forced_answers_and_no_more_than_was_used(tiny, tmp_path):
    """A whole cache at the end of each sequence, as measured."""
    records = sweep.generate(tiny, SweepRun(), GRID, PLAIN, Store(tmp_path), 3, report=quiet)
    ended = sweep.at(records, 10).index[0]  # as if it had ended of its own accord
    records.loc[ended, "new_tokens"] = 4
    records.loc[ended, "kv_peak_tokens"] = records.loc[ended, "prompt_tokens"] + 3
    table, _ = sweep.scenarios(tiny, SweepRun(), GRID, records)
    each = ledger.keys_and_values(ledger.architecture(tiny.weights.config), 1)
    for cut, rows in table[table["width"] == 1].groupby("tokens"):
        peak = sweep.at(records, cut)["kv_peak_tokens"].mean()
        assert rows["kv_bytes"].item() / each == pytest.approx(peak, abs=0.5)
