"""The ledger: table 1 of the paper, and formulas against allocated bytes."""

import pandas as pd
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from kit.analysis import claims
from kit.budget import ledger, sweep
from kit.budget.ledger import GIB, QWEN3, Configuration, Packing
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import Window
from kit.models.load import RANDOM, AutoConfig, AutoModelForCausalLM, load

# arXiv 2510.10964, table 1: GiB of weights at 4, 8 and 16 bit, of a 30,000 token cache, and of 16
TABLE_1 = {
    "Qwen3-0.6B": (0.50, 0.71, 1.40, 3.20, 51.27),
    "Qwen3-4B": (2.49, 4.19, 7.49, 4.12, 65.91),
    "Qwen3-8B": (5.68, 8.94, 15.26, 4.12, 65.91),
    "Qwen3-32B": (18.01, 32.66, 61.02, 7.32, 117.19),
}
TWICE = ("Qwen3-0.6B", 16)  # its cell counts the tied embedding twice, its neighbours once


def gib(name: str, bits: int) -> float:
    return sum(ledger.weights(QWEN3[name], Packing(bits)).values()) / GIB


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1_of_the_paper(name):
    for bits, published in zip((4, 8, 16), TABLE_1[name]):
        if (name, bits) != TWICE:
            assert gib(name, bits) == pytest.approx(published, abs=0.011), bits
    for width, published in ((1, TABLE_1[name][3]), (16, TABLE_1[name][4])):
        found = Configuration(QWEN3[name], tokens=30_000, width=width).parts()["keys and values"]
        assert found / GIB == pytest.approx(published, abs=0.011)


def test_the_claims_about_bytes_are_those_of_the_ledger():
    told = {claim.id: (claim, ledger.reported_bytes(claim.contrast)) for claim in claims.load()}
    told = {name: (claim, number) for name, (claim, number) in told.items() if number}
    assert len(told) == 12 and all(name.startswith("nab-") for name in told)
    for name, (claim, (found, unit)) in told.items():
        assert unit == claim.unit
        off = abs(found - claim.value)
        assert off <= claim.tolerance or name == "nab-weights-0.6b-16bit" and off > 0.28
    assert ledger.reported_bytes({"value": "scale_threshold_gib"}) is None


def test_a_cache_in_groups_of_64_with_16_bit_scale_and_zero_takes_half_a_bit_more():
    assert [Quantized(bits, 64).bits_per_value for bits in (2, 4, 8)] == [2.5, 4.5, 8.5]


def test_one_published_cell_counts_a_tied_table_twice():
    a = QWEN3["Qwen3-0.6B"]
    once, published = gib(*TWICE), TABLE_1[TWICE[0]][2]
    assert published - once > 0.28
    twice = once + 2 * a.embedding_parameters / GIB
    assert twice == pytest.approx(published, abs=0.011)


@pytest.mark.parametrize(
    "kind, tied", [(LlamaConfig, True), (Qwen2Config, False), (Qwen3Config, True),
                   (Gemma3TextConfig, True)]
)  # fmt: skip
def test_every_parameter_of_a_family_is_counted(kind, tied):
    config = kind(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config)
    a = ledger.architecture(config)
    assert a.parameters == weights.num_parameters()
    linear = {id(m): m for m in weights.base_model.layers.modules() if type(m) is torch.nn.Linear}
    assert a.linear_parameters == sum(m.weight.numel() for m in linear.values())


def test_an_unknown_family_is_told():
    with pytest.raises(ValueError, match="no ledger for models of type 'gpt2'"):
        ledger.architecture(AutoConfig.for_model("gpt2"))
    with pytest.raises(ValueError, match="weights of 5 bit"):
        Packing(5)


def near(formula: float, measured: float) -> None:
    assert measured == pytest.approx(formula, rel=0.05)


def test_weights_of_the_bundled_model_as_allocated(bundled):
    a = ledger.architecture(bundled.weights.config)
    native = 8 * bundled.dtype.itemsize
    formula = ledger.weights(a, Packing(bits=native, native_bits=native))
    measured = ledger.measured_weights(bundled.weights)
    for part, count in measured.items():
        near(formula[part], count)
    assert a.parameters == 134_515_008


@pytest.mark.parametrize("quantized", [None, *(Quantized(bits) for bits in (8, 4, 2))])
def test_the_cache_as_allocated(bundled, quantized):
    a, native = ledger.architecture(bundled.weights.config), 8 * bundled.dtype.itemsize
    one = ledger.keys_and_values(a, 700, quantized, native)
    near(4 * one, ledger.measured_cache(bundled.weights, 4, 700, quantized=quantized))


def test_a_thinned_cache_and_one_of_random_qwen3_weights(tmp_path):
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = load(f"random:{tmp_path}", dtype="bfloat16").weights
    a = ledger.architecture(config)
    near(sum(ledger.weights(a).values()), sum(ledger.measured_weights(model).values()))
    near(3 * ledger.keys_and_values(a, 1000), ledger.measured_cache(model, 3, 1000))
    thinned = ledger.measured_cache(model, 3, 1000, Window(256), kept=0.256)
    near(3 * ledger.keys_and_values(a, 256), thinned)


def test_sliding_layers_hold_their_window():
    a = ledger.architecture(RANDOM["gemma3"]())
    model = load("random:gemma3")
    native = 8 * model.dtype.itemsize
    found = ledger.measured_cache(model.weights, 2, 480)
    near(2 * ledger.keys_and_values(a, 480, native_bits=native), found)
    thinned = ledger.measured_cache(model.weights, 2, 4800, Window(480), kept=0.1)
    near(2 * ledger.keys_and_values(a, 4800, native_bits=native, kept=0.1), thinned)
    c = ledger.Configuration(a, ledger.Packing(native_bits=native), tokens=4800, kept=0.1)
    near(2 * c.parts()["keys and values"], thinned)


def test_what_a_sweep_measured_is_kept_of_the_layers_that_a_policy_thins():
    """Two layers of four slide over 24 tokens; the others hold a tenth of 480."""
    a = ledger.architecture(RANDOM["gemma3"]())
    frame = pd.DataFrame({"prompt_tokens": [81], "new_tokens": [400], "kv_peak_tokens": [36.0]})
    assert sweep._kept_fraction(frame, a) == pytest.approx(0.1)


def test_where_keys_and_values_weigh_as_much_as_the_weights(bundled):
    a = ledger.architecture(bundled.weights.config)
    assert ledger.crossover(a) == pytest.approx(11_677, abs=5)
    at = Configuration(a, tokens=round(ledger.crossover(a))).parts()
    weights = sum(count for name, count in at.items() if name != "keys and values")
    assert at["keys and values"] == pytest.approx(weights, rel=1e-3)


def test_what_shares_the_weights_pays_for_a_part_of_them():
    spent = Configuration(QWEN3["Qwen3-4B"], Packing(8), 8000, 4, 0.5, strategies=300, evictor=1000)
    alone, many = spent.parts(), spent.parts(batch=16)
    assert many["linear weights"] == alone["linear weights"] / 16
    assert many["keys and values"] == alone["keys and values"]
    assert spent.total(16) == sum(many.values()) < spent.total()
    full = Configuration(QWEN3["Qwen3-4B"], tokens=8000, width=4).parts()["keys and values"]
    assert alone["keys and values"] == full / 2
    assert alone["strategies"] == pytest.approx(full / 2 * 300 / 8000)


def test_a_quantized_checkpoint_is_counted_as_it_is():
    config = Qwen3Config(quantization_config={"quant_method": "gptq", "bits": 8, "group_size": 64})
    assert ledger.packing(16, config) == Packing(8, 64)
    assert not ledger.packing(16, Qwen3Config()).quantized and ledger.packing(4).group == 64


def test_bytes_are_said_in_both_units():
    assert ledger.text(30_000 * 147_456) == "4.12 GiB (4.42 GB)"
    assert ledger.text(70_272) == "68.6 KiB (70.3 kB)" and ledger.text(0) == "0 KiB (0 kB)"
    assert ledger.text(2**20) == "1 MiB (1.05 MB)"


def test_tokens_fill_what_weights_leave():
    a, packing = QWEN3["Qwen3-4B"], Packing(8)
    count = ledger.affordable_tokens(a, 6 * 2**30, packing)
    whole = [Configuration(a, packing, tokens=count + more).total() for more in (0, 1)]
    assert whole[0] <= 6 * 2**30 < whole[1]
    assert ledger.affordable_tokens(a, 2**30, packing) == 0, "not even the weights"
    weights = sum(ledger.weights(a, packing).values())
    assert ledger.affordable_tokens(a, 2 * weights, packing) == int(ledger.crossover(a, packing))
