"""The advisor: what fits, what is recommended, and what cannot be said."""

import json

import pytest

from kit import cli, hub, paths
from kit.budget import advisor, ledger
from kit.budget.advisor import Option
from kit.budget.ledger import GIB, QWEN3, Configuration
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


@pytest.mark.parametrize(
    "name, memory, chosen",
    [
        ("Qwen3-0.6B", 24, "weights 16-bit, cache whole at 16-bit"),
        ("Qwen3-0.6B", 2.4, "weights 16-bit, cache evicted to 25% at 16-bit"),
        ("Qwen3-4B", 24, "weights 8-bit, cache whole at 16-bit, 4 votes"),
        ("Qwen3-4B", 40, "weights 8-bit, cache whole at 16-bit, 8 votes"),
        ("Qwen3-4B", 6, "weights 8-bit, cache evicted to 25% at 16-bit"),
        ("Qwen3-4B", 3, "weights 4-bit, cache evicted to 25% at 4-bit"),
    ],
)
def test_the_published_findings_decide_where_nothing_was_measured(name, memory, chosen):
    found = advisor.options(QWEN3[name], 32_000)
    option, why = advisor.choose(found, round(memory * GIB))
    assert option.configuration.total() <= memory * GIB
    assert why.startswith("published, not measured here")
    assert ("8 bit are enough" in why) == (name == "Qwen3-4B")
    assert option.name == chosen


def scenario(bits: int, tokens: int, accuracy: float, policy: str = "full", **more) -> dict:
    row = dict(bits=bits, policy=policy, kv_bits=16, memory=False, tokens=tokens, width=1, kept=1.0)
    return row | dict(accuracy=[accuracy, accuracy - 5, accuracy + 5]) | more


ROWS = [
    scenario(16, 64, 30.0), scenario(8, 64, 31.0), scenario(8, 16, 50.0), scenario(4, 64, 31.0),
    scenario(16, 64, 40.0, "window 64", kept=0.5), scenario(16, 64, 90.0, memory=True),
]  # fmt: skip


def test_what_was_measured_decides_and_of_equals_the_smallest():
    a = QWEN3["Qwen3-0.6B"]
    found = advisor.measured(a, 1000, ROWS)
    assert len(found) == 4 and {o.configuration.tokens for o in found} == {1000}
    option, why = advisor.choose(found, 24 * GIB)
    assert option.name == "weights 8-bit, cache full at 16-bit" and option.accuracy[0] == 50
    assert "measured here with answers of at most 16 tokens" in why
    close = [scenario(16, 64, 52.0), scenario(8, 64, 49.6), scenario(4, 64, 49.4)]
    option, why = advisor.choose(advisor.measured(a, 1000, close), 24 * GIB)
    assert option.configuration.packing.bits == 8  # one standard error is 5 / 1.96 points
    assert "the smallest of 2 within one standard error of the most accurate of 3 that fit" in why
    (thin,) = (each for each in found if each.policy == "window 64")
    assert thin.configuration.kept == 0.064
    small = advisor.choose(found, round(0.7 * GIB))[0]
    assert small.configuration.packing.bits == 4 and small.accuracy[0] == 31


def test_a_misfit_says_how_much_is_missing():
    found = advisor.options(QWEN3["Qwen3-8B"], 32_000)
    with pytest.raises(
        advisor.DoesNotFitError, match=r"needs .* GiB .*, 4\.\d+ GiB .* more; take a smaller"
    ):
        advisor.choose(found, advisor.size("2GB"))


def test_the_arithmetic_adds_up():
    option = Option(Configuration(QWEN3["Qwen3-4B"], tokens=30_000, width=2))
    lines = advisor.arithmetic(option)
    assert "2 x 30,000 tokens x 1 kept x 73,728 numbers x 16 bit" in "\n".join(lines)
    assert "8.24 GiB (8.85 GB)" in "\n".join(lines)
    assert lines[-1].split()[2:4] == [f"{option.configuration.total() / GIB:.3g}", "GiB"]


def test_a_model_is_known_by_its_config_alone(tmp_path, hub_cache):
    assert advisor.sizes("hub:Qwen/Qwen3-4B-Instruct-2507") == QWEN3["Qwen3-4B"]
    assert advisor.sizes(BUNDLED).parameters == 134_515_008
    RANDOM["qwen3"]().save_pretrained(tmp_path / "here")
    a = advisor.sizes(str(tmp_path / "here"))
    assert a == ledger.architecture(RANDOM["qwen3"]())
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
    assert "published, not measured here" in said and "GiB too much" in said and "in all" in said
    assert cli.main([*ask, "--memory", "24GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"] in said and found["why"] in said
    fits = {row["name"]: row["fits"] for row in found["configurations"]}
    assert fits[found["run"]] and {*fits.values()} == {True, False}
    assert cli.main([*ask, "--memory", "2GB"]) == 2
    assert "nothing fits into 1.86 GiB (2 GB)" in capsys.readouterr().err
    results = tmp_path / "laptop" / "results"
    results.mkdir(parents=True)
    other = [row | {"model": "hub:Qwen/Qwen3-8B"} for row in ROWS]
    saved = {"scenarios": [*other, ROWS[0] | {"model": "another", "accuracy": [99, 99, 99]}]}
    (results / "06_memory_budget.json").write_text(json.dumps(saved))
    assert cli.main([*ask, "--memory", "24GiB"]) == 0
    said = capsys.readouterr().out
    assert "50.0 [45.0, 55.0]" in said and "measured here" in said
