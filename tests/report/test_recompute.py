"""Tables and measurements made again from records: equal to a notebook's own, unless a record is
not what it was."""

import dataclasses
import json
from itertools import product

import numpy as np
import pandas as pd
import pytest

from kit import paths
from kit.analysis import claims, contrasts, effects, pareto, tables
from kit.report import bundle, exhibits, recompute
from kit.report.exhibits import as_table

FAMILIES = ["gcd", "sum"]
RNG = np.random.default_rng


def answers(arm: str, rate: float, seed: int = 0, samples: int = 1, n: int = 12) -> pd.DataFrame:
    """Records of `n` problems of three families, solved at `rate`."""
    rng = RNG([seed, *map(ord, arm)])
    rows = [
        dict(key=f"{arm}-{seed}-{number}-{sample}", source="laptop", problem_id=f"p{number:02}",
             family=(*FAMILIES, "lcm")[number % 3], level=1 + number % 3, arm=arm, seed=seed,
             sample=sample, model=f"m{seed}", weights_hash=f"h{seed}", policy="full",
             temperature=0.6, finish="stop", method="boxed", compliant=True, correct=correct,
             extracted="4" if correct else "5", answer="4", asks="any",
             prompt_tokens=20, new_tokens=5 + number, kv_reads_tokens=9.0, kv_peak_bytes=100,
             seconds=0.1)
        for number, sample in product(range(n), range(samples))
        for correct in [bool(rng.random() < rate)]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def trained(name: str, rate: float, seeds: int) -> pd.DataFrame:
    return contrasts.pooled(name, {s: answers(f"{name}-{s}", rate, s) for s in range(seeds)})


def stored(*frames: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """What a store would hold of `frames`, in an order of its own, and the keys."""
    whole = pd.concat(frames).drop_duplicates("key").sample(frac=1, random_state=0)
    return whole.assign(arm="plain", model="any"), sorted(whole["key"])


def through_json(found: dict) -> dict:
    return json.loads(json.dumps(found, sort_keys=True, default=float))


def same(made: pd.DataFrame | None, shown: pd.DataFrame) -> bool:
    return as_table("", made).rows == as_table("", shown).rows


def spoilt(records: pd.DataFrame) -> pd.DataFrame:
    return records.assign(correct=~records["correct"])


def test_frames_come_back_from_their_records_in_their_order():
    frames = {"z": trained("z", 0.5, 3), "a": trained("a", 0.5, 1)}
    records, keys = stored(*frames.values())
    found = through_json({"of": contrasts.index_records(frames, keys)})["of"]
    again = contrasts.restore_frames(found, keys, records)
    assert [*again] == ["z", "a"]
    for arm, frame in frames.items():
        assert again[arm].equals(frame)
    with pytest.raises(KeyError):
        contrasts.restore_frames(found, keys, records.iloc[1:])


def test_phase_2():
    frames = {"base": trained("base", 0.2, 1), "internalised": trained("internalised", 0.6, 3)}
    stored_frames, constants = dict(frames), {"gcd": "4", "sum": "5"}
    frames["constant"] = contrasts.constant(frames["base"], constants)
    ways = {"without the bank": trained("w", 0.3, 3), "with the bank": trained("v", 0.5, 3)}
    ways["with the bank"] = ways["with the bank"].query("family in @FAMILIES")
    records, keys = stored(*stored_frames.values(), *ways.values())
    parts = {"arms": stored_frames, "rounds": ways}
    found = through_json({
        "keys": keys, "families": FAMILIES, "constants": constants,
        "frames": {name: contrasts.index_records(part, keys) for name, part in parts.items()},
    })  # fmt: skip
    shown = {recompute.TRAINED: tables.trained(frames, FAMILIES),
             recompute.COMPOUNDING: tables.compounded(ways, FAMILIES),
             recompute.PHASE2_DIFFERENCES:
             recompute.phase2_differences(frames, FAMILIES)}  # fmt: skip
    for caption, table in shown.items():
        assert same(recompute.table("04_phase2", caption, found, records), table)
        spoiled = recompute.table("04_phase2", caption, found, spoilt(records))
        assert not same(spoiled, table)
    assert recompute.table("04_phase2", "another table", found, records) is None
    row = shown[recompute.TRAINED].set_index("arm").loc["internalised"]
    here = frames["internalised"].query("family in @FAMILIES")
    each = 100 * here.groupby("training")["correct"].mean()
    assert (row["least seed"], row["best seed"]) == (each.min(), each.max())
    assert row["accuracy"][0] == pytest.approx(each.mean())
    rounds = shown[recompute.COMPOUNDING]
    assert rounds.groupby("way")["round"].apply(list).to_dict() == {
        way: [0, 1, 2] for way in ("without the bank", "with the bank", "families held out")
    }
    assert [*shown[recompute.PHASE2_DIFFERENCES]["control"]] == ["base", "constant"]
    constant = shown[recompute.TRAINED].set_index("arm").loc["constant"]
    assert constant["accuracy"][0] == 50 and constant["one answer"] == 100
    assert constant["families held out"] is None


def test_the_contrasts_of_strategies_written_by_hand():
    rates = {"shipped": 0.9, "format-only": 0.3, "plain": 0.4, "retrieved": 0.5, "examples": 0.6}
    frames = {arm: answers(arm, rate).assign(prompt_id=arm) for arm, rate in rates.items()}
    records = pd.concat(frames.values(), ignore_index=True)
    made = recompute.table("02_strategies", recompute.HANDWRITTEN, {}, records)
    assert made["control"].tolist() == ["format-only", "plain", "retrieved"], "the declared first"
    for row in made.itertuples():
        gain = frames["shipped"]["correct"].mean() - frames[row.control]["correct"].mean()
        assert row.difference[0] == pytest.approx(100 * gain) and row.arm == "shipped"
    without = records[records["arm"] != "shipped"]
    assert recompute.table("02_strategies", recompute.HANDWRITTEN, {}, without).empty
    tools = answers("tools", 0.5).assign(prompt_id="t", text="2 + 2 = 4\nAnswer: 4")
    (row,) = recompute.table("02_strategies", recompute.TOOL_USE, {}, tools).to_dict("records")
    assert row == {"arm": "tools", "problems": 12, "calls": 12, "errors": 0, "answered": 12}


def test_thinned_caches():
    rng, frames = RNG(0), {}
    for name, x in (("full", 1), ("dms", 4), ("window", 4), ("dms", 8)):
        numbers = {column: rng.random(5) for column in ("kl", "nats", "kept_fraction")}
        frames[name, x] = pd.DataFrame(numbers | {"live_tokens": 9.5, "kv_bytes": 7.0})
    sequences = pd.concat(f.assign(policy=n, compression_x=x) for (n, x), f in frames.items())
    kl = {"delayed": [0.1, 0.2, 0.3], "immediate": [0.4, 0.7, 0.5]}
    found = through_json({"sequences": sequences.to_dict("records"), "kl": kl})
    records, published = answers("plain", 0.5), claims.load()
    shown = tables.quality(frames)
    assert same(recompute.table("03_dms", recompute.QUALITY, found, records), shown)
    texts = pd.concat(sequences.assign(text=text) for text in ("prose", "chats"))
    found["texts"] = through_json({"texts": texts.to_dict("records")})["texts"]
    by_text = recompute.table("03_dms", recompute.BY_TEXT, found, records)
    assert [*by_text["text"]] == ["prose"] * 4 + ["chats"] * 4
    for text, rows in by_text.groupby("text"):
        alone = shown.drop(columns="kv_bytes")
        assert same(rows.drop(columns="text").reset_index(drop=True), alone), text
    found["sequences"][7]["kl"] += 0.1
    assert not same(recompute.table("03_dms", recompute.QUALITY, found, records), shown)
    found["measurements"] = {"dms-delayed-eviction": {}}
    made = recompute.measured("03_dms", found, records, published)["dms-delayed-eviction"]
    assert made == contrasts.excess_of(kl["immediate"], kl["delayed"], "held-out sequences")
    assert (made.estimate, made.n) == (pytest.approx(100 * (1.6 / 0.6 - 1)), 3)
    assert recompute.on_sequences({"delayed": [0.1]}) == {}


def test_parametric_memory():
    arms = {"plain": 1, "fetched": 3, "wrong": 2, "shared": 3}
    options = {arm: trained(arm, 0.9 - 0.1 * len(arm), seeds) for arm, seeds in arms.items()}
    free = {arm: trained(f"{arm} free", 0.3, n).assign(arm=arm) for arm, n in arms.items()}
    records, keys = stored(*options.values(), *free.values())
    parts, buckets = {"options": options, "free": free}, ["head", "middle", "tail"]
    held = [{"arm": arm, "accuracy": tables.share(frame), "held_bytes": 9, "read_bytes": 1,
             "prompt_tokens": 20.0} for arm, frame in options.items()]  # fmt: skip
    for row in held:  # in the order of columns
        sizes = {"free": tables.share(free[row["arm"]]), "fetched": 3, "stored": 9, "trained": 7}
        rest = {name: row.pop(name) for name in ("held_bytes", "read_bytes", "prompt_tokens")}
        row |= sizes | rest
    nats = {"plain": [2.0, 3.0, 4.0], "fetched": [2.2, 3.5, 4.4]}
    published = claims.load()
    mine = [claim for claim in published if claim.notebook == "05_parametric"]
    given = recompute.on_facts(mine, options, free, "late")
    assert {*given} == {"hier-fetched-over-generic"}  # the others need families or arms not here
    given |= recompute.on_prose(nats)
    loss = given["hier-posthoc-common-loss"]
    assert loss == contrasts.excess_of(nats["fetched"], nats["plain"], loss.origin)
    assert loss.low > 0 and recompute.on_prose({"plain": [1.0]}) == {}
    found = through_json({
        "keys": keys, "buckets": buckets, "bytes": held, "where": "late", "nats": nats,
        "measurements": {name: dataclasses.asdict(value) for name, value in given.items()},
        "frames": {name: contrasts.index_records(part, keys) for name, part in parts.items()},
    })  # fmt: skip
    shown = {recompute.KNOWN: tables.recall_by_frequency(options, free, buckets),
             recompute.RECALL: tables.recall_by_frequency(free, {}, buckets).drop(columns="free"),
             recompute.FETCHED: recompute.fetched(options),
             recompute.RECALLED: recompute.fetched(free),
             recompute.BYTES: pd.DataFrame(held)}  # fmt: skip
    for caption, table in shown.items():
        assert same(recompute.table("05_parametric", caption, found, records), table)
        spoiled = recompute.table("05_parametric", caption, found, spoilt(records))
        assert not same(spoiled, table)
    assert shown[recompute.KNOWN]["free"].notna().all()
    assert recompute.measured("05_parametric", found, records, published) == given
    assert recompute.measured("05_parametric", found, spoilt(records), published) != given
    assert recompute.measured("05_parametric", {"keys": keys}, records, published) == {}


def swept() -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """Scenarios of one model as a sweep makes them, and the records of each run and budget."""
    rows, frames = [], []
    for bits, policy, kv_bits in product((16, 4), ("full", "window 8"), (16, 4)):
        for tokens in (8, 16):
            name = f"{bits} {policy} {kv_bits} {tokens}"
            frames.append(answers(name, 0.3 + tokens / 60 + bits / 80, samples=3))
            for width in (1, 3):
                size = 4000 * bits + tokens * width * kv_bits * (1 + (policy == "full"))
                rows.append(
                    dict(
                        model="m",
                        bits=bits,
                        policy=policy,
                        kv_bits=kv_bits,
                        memory=False,
                        tokens=tokens,
                        width=width,
                        bytes=size,
                        shared_bytes=size - 3500 * bits,
                        weight_bytes=4000 * bits,
                    )
                )
    return pd.DataFrame(rows), frames  # fmt: skip


def test_memory_budget():
    table, frames = swept()
    outcomes = np.array([pareto.votes(frames[i // 2], width)
                         for i, width in enumerate(table["width"])])  # fmt: skip
    places = table.assign(place=[effects.single_factor(row) for row in table.to_dict("records")])
    keep = (places["place"] != "").to_numpy()
    records, keys = stored(*frames)
    runs = dict(enumerate(frames))
    kept = {one: runs[one] for one in sorted({row // 2 for row in table.index[keep]})}
    published = claims.load()
    given = recompute.on_scenarios(published, table, outcomes)
    assert "nab-eviction-over-quantisation" in given and "nab-scale-threshold" in given
    found = through_json({
        "keys": keys, "generations": 99, "scenarios": table.to_dict("records"),
        "places": places[keep].to_dict("records"),
        "measurements": {name: dataclasses.asdict(value) for name, value in given.items()},
        "frames": {"scenarios": contrasts.index_records(runs, keys),
                   "places": contrasts.index_records(kept, keys)},
    })  # fmt: skip
    shown = {
        recompute.STEPS.format(len(table), 99): effects.marginal_effects(table, outcomes, RNG(0)),
        recompute.GAPS: effects.gap_rows(effects.gaps(table, outcomes, RNG(0))),
        recompute.PLACES: effects.places(places[keep], outcomes[keep], RNG(0))[1],
    }
    for caption, made in shown.items():
        assert same(recompute.table("06_memory_budget", caption, found, records), made)
        spoiled = records.assign(correct=records["key"].str.startswith("16"))
        again = recompute.table("06_memory_budget", caption, found, spoiled)
        assert not same(again, made)
    assert [*shown[recompute.PLACES]["place"]] and len(shown[recompute.GAPS]) == 4
    assert {*places["place"]} == {"as it is", "weights", "cache", ""}
    assert recompute.measured("06_memory_budget", found, records, published) == given


def test_the_gaps_that_claims_are_about():
    table, frames = swept()
    outcomes = np.array([pareto.votes(frames[i // 2], width)
                         for i, width in enumerate(table["width"])])  # fmt: skip
    gaps = effects.gaps(table, outcomes, RNG(0))
    evicted, quantized = ("window 8", 16), ("full", 4)
    assert {*gaps} == {
        (evicted, ("full", 16)), (quantized, ("full", 16)), (("window 8", 4), ("full", 16)),
        (evicted, quantized),
    }  # fmt: skip
    found = recompute.on_scenarios(claims.load(), table, outcomes)
    gap = gaps[evicted, ("full", 16)]
    assert found["nab-kv-compression-helps"].estimate == 100 * gap.estimate
    one = effects.gaps(table[table["kv_bits"] == 16], outcomes[table["kv_bits"] == 16], RNG(0))
    assert {*one} == {(evicted, ("full", 16))}
    only = (table["policy"] == "full") & (table["kv_bits"] == 16)
    assert effects.gap_rows(effects.gaps(table[only], outcomes[only], RNG(0))).empty


def test_the_published_run_follows_from_its_records():
    run = bundle.read(paths.PUBLISHED_RUNS / "laptop")
    stages = [stage for stage in run.results if stage != "07_verdicts"]
    left = []
    for stage in stages:
        found = run.results[stage], run.records[stage]
        for row in run.json(f"exhibits/{stage}/{exhibits.LIST}"):
            made = recompute.table(stage, row["caption"], *found) if "rows" in row else None
            if made is None:
                left += [row["caption"]] if "rows" in row else []
            else:
                assert as_table("", made).rows == row["rows"], row["caption"]
        made = recompute.measured(stage, *found, claims.load())
        for claim, number in made.items():
            said = run.results[stage]["measurements"][claim]
            assert number.texts() == contrasts.Measurement(**said).texts()
    banks = "Every bank in full"
    assert {*left} <= {"What to run here", "Ledger, by formula and allocated", banks}
