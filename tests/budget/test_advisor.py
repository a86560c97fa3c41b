"""The advisor: what fits, what is recommended, and what cannot be said."""

import dataclasses
import json
import re
from itertools import product

import pytest
from transformers import LlamaConfig

from kit import cli, hub, paths
from kit.budget import advisor, ledger
from kit.budget.advisor import DoesNotFitError, Option
from kit.budget.ledger import GIB, QWEN3, Architecture, Configuration
from kit.models.load import BUNDLED, RANDOM


def test_sizes_and_lengths_as_people_write_them():
    assert advisor.size("24GiB") == 24 * 2**30 and advisor.size("24 GB") == 24 * 10**9
    assert advisor.size("1.5MiB") == 3 * 2**19
    assert advisor.tokens("32k") == 32_000 and advisor.tokens("900") == 900
    for wrong in ("24", "24G", "24gib", "lots"):
        with pytest.raises(ValueError, match="write a number and one of KiB"):
            advisor.size(wrong)
    for wrong in ("0", "32K", "-5", ""):
        with pytest.raises(ValueError, match="write tokens, for example 32k"):
            advisor.tokens(wrong)


def llama(layers: int, hidden: int, heads: int, inner: int, head: int = 128) -> Architecture:
    """Llama 3 by the numbers of its config.json."""
    return ledger.architecture(LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, head_dim=head,
        num_key_value_heads=8, intermediate_size=inner, vocab_size=128_256,
        max_position_embeddings=131_072, tie_word_embeddings=hidden == 2048,
    ))  # fmt: skip


MODELS = QWEN3 | {
    "Llama-3.2-1B": llama(16, 2048, 32, 8192, 64),
    "Llama-3.1-8B": llama(32, 4096, 32, 14_336),
    "Llama-3.3-70B": llama(80, 8192, 64, 28_672),
}


def test_what_is_advised_for_cards_and_models_that_people_have():
    """The table of docs/budget.md, which says why."""
    page = (paths.ROOT / "docs" / "budget.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (\d+) GiB \| (\d+)k \| (.+?) \| ([\d.]+) GiB \|", page, re.M)
    assert len(rows) == 18
    for name, card, context, advised, total in rows:
        memory, length = int(card) * GIB, int(context) * 1000
        option, why = advisor.choose(advisor.candidates(MODELS[name], length, []), memory)
        need = option.configuration.total()
        assert (option.name, f"{need / GIB:.1f}") == (advised, total), (name, card, context)
        assert need <= 0.9 * memory and why.startswith("not measured here; the cache is")


def test_a_whole_cache_of_few_bits_comes_before_an_evicted_one_and_before_votes():
    for name, card, context in product(MODELS, (4, 8, 12, 16, 24, 48, 80), (4, 32, 128)):
        found = advisor.options(MODELS[name], 1000 * context)
        try:
            best, _ = advisor.choose(found, card * GIB)
        except DoesNotFitError:
            continue
        c = best.configuration
        fits = [o.configuration for o in found if o.configuration.total() <= 0.9 * card * GIB]
        if c.kept < 1:
            assert not any(other.kept == 1 for other in fits) and c.width == 1
            assert best.name.count("by TOVA") == 1
        if c.width > 1:
            alone = [o for o in fits if (o.width, o.kept) == (1, 1)]
            assert c.packing.bits >= 8 or not any(o.packing.bits >= 8 for o in alone)
            assert c.kv_bits >= 8 or not any(o.kv_bits >= 8 for o in alone)


def test_a_reason_has_its_evidence():
    found = advisor.options(QWEN3["Qwen3-8B"], 32_000)
    best, why = advisor.choose(found, 24 * GIB)
    made = advisor.reasons(best, 24 * GIB)
    assert all(said in why for said, _ in made)
    kinds = ("inferred (measured", "published (arXiv 2510.10964", "computed", "assumed")
    assert {kind for _, said in made for kind in kinds if said.startswith(kind)} == {*kinds}
    (seen,) = advisor.measured(QWEN3["Qwen3-0.6B"], 600, [scenario(8, 64, 31.0)])
    assert advisor.reasons(seen, GIB)[0] == (
        "accuracy 31.0 percent [26.0, 36.0]",
        "measured here: notebook 06, answers of at most 64 tokens",
    )


def test_a_context_that_the_model_does_not_read_is_refused():
    small = ledger.architecture(LlamaConfig(max_position_embeddings=8192))
    with pytest.raises(ValueError, match="context is 30,000 tokens, and this model reads 8,192"):
        advisor.candidates(small, 30_000, [])
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    with pytest.raises(ValueError, match="this model reads 40,960 at most"):
        advisor.candidates(QWEN3["Qwen3-8B"], 100_000, [])
    stretched = LlamaConfig(max_position_embeddings=8192, rope_parameters=rope)
    assert advisor.candidates(ledger.architecture(stretched), 30_000, [])


def scenario(bits: int, tokens: int, accuracy: float, policy: str = "full", **more) -> dict:
    row = dict(bits=bits, policy=policy, kv_bits=16, memory=False, tokens=tokens, width=1, kept=1.0)
    row |= dict(kv_bytes=600 * 114_688)  # a question and an answer of 600 tokens, of Qwen3-0.6B
    return row | dict(accuracy=[accuracy, accuracy - 5, accuracy + 5]) | more


ROWS = [
    scenario(16, 64, 30.0), scenario(8, 64, 31.0), scenario(8, 16, 50.0), scenario(4, 64, 31.0),
    scenario(16, 64, 40.0, "window 64", kept=0.5), scenario(16, 64, 90.0, memory=True),
    scenario(16, 64, 40.0, "snapkv 64", kept=0.7), scenario(16, 64, 40.0, "rkv 64", kept=0.7),
]  # fmt: skip


def test_what_was_measured_decides_and_of_equals_the_smallest():
    a = QWEN3["Qwen3-0.6B"]
    found = advisor.measured(a, 1000, ROWS)
    assert len(found) == 6 and {o.configuration.tokens for o in found} == {1000}
    option, why = advisor.choose(found, 24 * GIB)
    assert option.name == "weights 8-bit, cache full at 16-bit" and option.accuracy[0] == 50
    assert "measured here with answers of at most 16 tokens" in why
    close = [scenario(16, 64, 52.0), scenario(8, 64, 49.6), scenario(4, 64, 49.4)]
    option, why = advisor.choose(advisor.measured(a, 1000, close), 24 * GIB)
    assert option.configuration.packing.bits == 8  # one standard error is 5 / 1.96 points
    assert "the smallest of 2 within one standard error of the most accurate of 3 that fit" in why
    (thin,) = (each for each in found if each.policy == "window 64")
    assert thin.configuration.kept == 0.064
    (prompt,) = (each for each in found if each.policy == "snapkv 64")
    assert prompt.configuration.kept == 0.7  # its answers are kept, however long
    (rounds,) = (each for each in found if each.policy == "rkv 64")
    assert rounds.configuration.kept == 0.192  # with its buffer of 128
    small = advisor.choose(found, round(0.7 * GIB / 0.9))[0]
    assert small.configuration.packing.bits == 4 and small.accuracy[0] == 31


def test_a_sweep_is_not_extrapolated():
    """Nor are prompts that examples made longer: what is advised has none."""
    a = QWEN3["Qwen3-0.6B"]
    rows = [*ROWS, scenario(16, 64, 30.0, memory=True) | {"kv_bytes": 900 * 114_688}]
    assert all(option.accuracy for option in advisor.candidates(a, 600, rows))
    assert not any(option.accuracy for option in advisor.candidates(a, 601, rows))


def test_a_misfit_says_how_much_is_missing():
    found = advisor.options(QWEN3["Qwen3-8B"], 32_000)
    with pytest.raises(
        advisor.DoesNotFitError,
        match=r"10% are reserved: .* needs .* GiB .*, 4\.\d+ GiB .* more; take a smaller",
    ):
        advisor.choose(found, advisor.size("2GB"))


def test_the_arithmetic_adds_up():
    option = Option(Configuration(QWEN3["Qwen3-4B"], tokens=30_000, width=2))
    lines = advisor.arithmetic(option)
    assert "2 x 30,000 tokens x 1 kept x 73,728 numbers x 16 bit" in "\n".join(lines)
    assert "8.24 GiB (8.85 GB)" in "\n".join(lines)
    assert lines[-1].split()[2:4] == [f"{option.configuration.total() / GIB:.3g}", "GiB"]


def test_a_model_is_known_by_its_config_alone(tmp_path, hub_cache):
    assert advisor.sizes("hub:Qwen/Qwen3-4B") == QWEN3["Qwen3-4B"]
    longer = advisor.sizes("hub:Qwen/Qwen3-4B-Instruct-2507")  # reads 262,144 tokens
    assert longer == dataclasses.replace(QWEN3["Qwen3-4B"], context=0)
    assert advisor.sizes(BUNDLED).parameters == 134_515_008
    RANDOM["qwen3"]().save_pretrained(tmp_path / "here")
    a = advisor.sizes(str(tmp_path / "here"))
    assert a == ledger.architecture(RANDOM["qwen3"]()) and a.context == 1024
    with pytest.raises(hub.HubError):
        advisor.sizes("hub:other/model")
    with pytest.raises(ValueError, match="no config.json in 'nowhere'"):
        advisor.sizes("nowhere")


def test_the_command_shows_what_fits_and_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)
    monkeypatch.setattr(cli, "run_dir", lambda profile: tmp_path / profile)
    ask = ["advise", "--profile", "laptop", "--model", "hub:Qwen/Qwen3-8B", "--context", "32k"]
    assert cli.main([*ask, "--memory", "24GiB"]) == 0
    said = capsys.readouterr().out
    assert "hub:Qwen/Qwen3-8B at 32,000 tokens in 24 GiB (25.8 GB)" in said
    assert "not measured here" in said and "GiB too much" in said and "in all" in said
    assert cli.main([*ask, "--memory", "24GiB", "--explain"]) == 0
    assert "- 4 votes. published (arXiv 2510.10964, finding 3)" in capsys.readouterr().out
    assert cli.main([*ask, "--memory", "24GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] in said and found["why"] in said
    assert "\n".join(found["arithmetic"]) in said and "4 votes" in found["evidence"]
    fits = {row["name"]: row["fits"] for row in found["configurations"]}
    assert fits[found["run"]] and {*fits.values()} == {True, False}
    assert cli.main([*ask, "--memory", "2GB"]) == 2
    assert "nothing fits into 1.86 GiB (2 GB)" in capsys.readouterr().err
    results = tmp_path / "laptop" / "results"
    results.mkdir(parents=True)
    long = {"model": "hub:Qwen/Qwen3-8B", "kv_bytes": 32_000 * 147_456}
    other = [row | long for row in ROWS]
    saved = {"scenarios": [*other, ROWS[0] | {"model": "another", "accuracy": [99, 99, 99]}]}
    (results / "06_memory_budget.json").write_text(json.dumps(saved))
    assert cli.main([*ask, "--memory", "24GiB"]) == 0
    said = capsys.readouterr().out
    assert "50.0 [45.0, 55.0]" in said and "measured here" in said
    assert cli.main([*ask, "--memory", "24GiB", "--explain"]) == 0
    assert "- accuracy 50.0 percent [45.0, 55.0]. measured here" in capsys.readouterr().out
