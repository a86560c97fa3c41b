"""kit.inference.kv_quantization against numpy's bit packing, a slow scalar reference, and
published sizes."""

import numpy as np
import pytest
import torch

from kit.inference.kv_quantization import LARGEST, Quantized, pack, unpack

BITS = (8, 4, 2)


def heavy_tailed(rows: int = 500, size: int = 64, seed: int = 0) -> torch.Tensor:
    """Student's t with 3 degrees of freedom and a channel of outliers in 32, as keys have them."""
    draw = np.random.default_rng(seed)
    x = draw.standard_t(3, (rows, size))
    x[:, 5::32] = x[:, 5::32] * 6 + 8
    return torch.tensor(x, dtype=torch.float32)


def error(x: torch.Tensor, bits: int, group: int, iterations: int | None):
    """Absolute errors [n, group] of one round trip, and the scale [n, 1] of each group."""
    codes, scale, zero = pack(x, bits, group, iterations)
    wrong = (unpack(codes, scale, zero, bits) - x).abs()
    return wrong.view(-1, group), scale.float().view(-1, 1)


def lp(errors: torch.Tensor, p: float = 0.7) -> torch.Tensor:
    return errors.double().pow(p).sum(-1)


# ------------------------------------------------------------------ packing


@pytest.mark.parametrize("bits", BITS)
def test_bytes_hold_the_codes_as_numpy_packs_them(bits):
    draw = np.random.default_rng(bits)
    wanted = draw.integers(0, 2**bits, (7, 3, 64), dtype=np.uint8)
    wanted[..., ::16], wanted[..., 1::16] = 0, 2**bits - 1  # every group spans all codes
    codes, scale, zero = pack(torch.tensor(wanted).float(), bits, 16, iterations=0)
    assert (scale == 1).all() and (zero == 0).all()  # so the numbers are their own codes
    single = np.unpackbits(wanted[..., None], axis=-1, bitorder="little")[..., :bits]
    packed = np.packbits(single.reshape(7, 3, -1), axis=-1, bitorder="little")
    assert codes.dtype == torch.uint8 and codes.shape == (7, 3, 64 * bits // 8)
    np.testing.assert_array_equal(codes.numpy(), packed)
    np.testing.assert_array_equal(unpack(codes, scale, zero, bits).numpy(), wanted)


@pytest.mark.parametrize("bits", BITS)
def test_each_number_is_rounded_to_the_nearest_of_the_lattice(bits):
    x = heavy_tailed(20)
    codes, scale, zero = pack(x, bits, 32)
    found = unpack(codes, scale, zero, bits, torch.float64).view(-1, 32)
    steps = torch.arange(2**bits, dtype=torch.float64)
    lattice = zero.double().view(-1, 1) + scale.double().view(-1, 1) * steps  # [n, codes]
    nearest = (x.double().view(-1, 32, 1) - lattice[:, None]).abs().amin(-1)
    torch.testing.assert_close((found - x.view(-1, 32)).abs(), nearest, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_rows_do_not_know_of_each_other(bits):
    x = heavy_tailed(5000)  # more than one chunk
    together = pack(x, bits, 32)
    alone = [pack(row, bits, 32) for row in x[[0, 1, 2600, 4999]]]
    for place, part in enumerate(together):
        kept = part[[0, 1, 2600, 4999]]
        assert torch.equal(kept, torch.stack([one[place] for one in alone]))


def test_any_leading_axes_and_strides():
    x = heavy_tailed(24).view(2, 3, 4, 64).transpose(1, 2)
    codes, scale, zero = pack(x, 4, 32)
    assert codes.shape == (2, 4, 3, 32) and scale.shape == zero.shape == (2, 4, 3, 2)
    again = pack(x.contiguous().view(-1, 64), 4, 32)
    assert torch.equal(unpack(codes, scale, zero, 4).view(-1, 64), unpack(*again, 4))
    nothing = pack(torch.empty(0, 64), 2, 32)
    assert unpack(*nothing, 2).shape == (0, 64)


# ------------------------------------------------------------------ error bounds


@pytest.mark.parametrize("group", (16, 64))
@pytest.mark.parametrize("bits", BITS)
def test_error_without_hqq_is_at_most_half_a_step(bits, group):
    x = heavy_tailed()
    wrong, scale = error(x, bits, group, 0)
    assert (wrong <= scale * 0.501).all()
    # and the step is no wider than the range asks for, but for float16's last digit
    span = (x.view(-1, group).amax(-1) - x.view(-1, group).amin(-1)) / (2**bits - 1)
    assert (scale.squeeze(1) <= span * 1.01).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", (1e-6, 1e-3, 1.0, 1e3, 1e4))
def test_half_a_step_holds_at_any_size_and_offset(bits, size):
    x = heavy_tailed(200).clamp(-6, 6) * size
    for offset in (0.0, 1000.3, -0.07):
        wrong, scale = error(x + offset, bits, 32, 0)
        unit = np.spacing(np.float32(abs(offset) + 6 * size))
        assert (wrong <= scale * 0.501 + 4 * unit).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("iterations", (0, None))
def test_constants_come_back_within_a_rounding(bits, iterations):
    values = [0.0, 1.0, -3.7, 1e-9, -1e-9, 6e-8, 1234.567, -65504.0, 65504.0, 60001.5]
    x = torch.tensor(values).unsqueeze(1).repeat(1, 32)
    found = unpack(*pack(x, bits, 32, iterations), bits)
    # half a step of a scale that spans one unit of float16
    allowed = (x.abs() * 2**-10).clamp_min(6e-8) * 0.501
    assert ((found - x).abs() <= allowed).all()
    assert torch.equal(found[[0, 1, 7, 8]], x[[0, 1, 7, 8]])  # where float16 is exact, so are we


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_huge_tiny_and_infinite_numbers_stay_finite(bits, dtype):
    x = heavy_tailed(8, 32)
    x[0] *= 1e-30
    x[1] *= 1e30
    x[2, 0], x[2, 1] = torch.inf, -torch.inf
    x[3] = torch.inf
    x[4, :16], x[4, 16:] = LARGEST, -LARGEST
    x[5] = torch.linspace(-2e5, -1e5, 32)
    codes, scale, zero = pack(x, bits, 32)
    assert scale.isfinite().all() and zero.isfinite().all()
    found = unpack(codes, scale, zero, bits, dtype)
    assert found.dtype == dtype and found.isfinite().all()
    wanted = x.clamp(-LARGEST, LARGEST)
    reach = wanted.amax(1, keepdim=True) - wanted.amin(1, keepdim=True)
    allowed = reach / (2**bits - 1) + 0.01 * wanted.abs() + 6e-8
    assert ((found.float() - wanted).abs() <= allowed).all()


def test_nan_spoils_its_group_and_no_other():
    x = heavy_tailed(4)
    x[1, 3] = torch.nan
    spoilt = unpack(*pack(x, 4, 32), 4).isnan()
    assert spoilt[1, :32].all() and spoilt.sum() == 32


@pytest.mark.parametrize("bits", BITS)
def test_packing_twice_changes_nothing(bits):
    once = pack(heavy_tailed(), bits, 32)
    numbers = unpack(*once, bits)
    twice = pack(numbers, bits, 32)
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    assert torch.equal(unpack(*twice, bits), numbers)


# ------------------------------------------------------------------ HQQ


@pytest.mark.parametrize("bits", BITS)
def test_hqq_lowers_the_lp_error_of_every_group_or_leaves_it(bits):
    x = heavy_tailed()
    plain, _ = error(x, bits, 32, 0)
    before, least = lp(plain), None
    for iterations in (1, 3, 5, 10):
        after = lp(error(x, bits, 32, iterations)[0])
        assert (after <= before * (1 + 1e-4)).all()
        assert least is None or (after <= least * (1 + 1e-4)).all()  # more never hurts
        least = after
    assert least.sum() < 0.99 * before.sum()


def test_hqq_is_worth_it_at_two_bits_with_outliers():
    x = heavy_tailed(2000)
    plain, refined = error(x, 2, 32, 0)[0], error(x, 2, 32, None)[0]
    assert refined.square().mean() < 0.7 * plain.square().mean()
    assert refined.mean() < 0.85 * plain.mean()


@pytest.mark.parametrize("bits", (4, 2))
def test_hqq_nearly_finds_the_best_zero_of_a_brute_search(bits):
    x = heavy_tailed(100, 32)
    codes, scale, zero = pack(x, bits, 32, 20)
    found = lp((unpack(codes, scale, zero, bits) - x).abs())
    s, z = scale.float(), pack(x, bits, 32, 0)[2].float()
    trials = []
    for shift in np.linspace(-0.5, 2**bits - 1, 400):
        base = z + float(shift) * s
        code = ((x - base) / s).round().clamp(0, 2**bits - 1)
        trials.append(lp((base + code * s - x).abs()))
    plain, best = lp(error(x, bits, 32, 0)[0]), torch.stack(trials).amin(0)
    assert (best <= found * 1.01).all()  # the search is finer than what HQQ can find
    assert (plain - found).sum() > 0.5 * (plain - best).sum()


def test_hqq_does_not_depend_on_the_unit():
    x = heavy_tailed(300)
    codes, scale, _ = pack(x, 2, 32)
    wide, large, _ = pack(x * 64, 2, 32)
    assert torch.equal(codes, wide) and torch.equal(scale * 64, large)


@pytest.mark.parametrize("bits", BITS)
def test_defaults_refine_at_four_and_two_bits_only(bits):
    x = heavy_tailed()
    chosen, plain = pack(x, bits, 32)[2], pack(x, bits, 32, 0)[2]
    assert torch.equal(chosen, plain) == (bits == 8)


# ------------------------------------------------------------------ sizes, names, bad input


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", (16, 32, 64))
def test_bytes_per_token_are_the_bytes_of_the_tensors(bits, group):
    policy, (layers, heads, size) = Quantized(bits, group), (3, 5, 64)
    stored = [pack(torch.randn(2, layers, heads, size), bits, group)]
    assert sum(t.nbytes for t in stored[0]) == policy.bytes_per_token(size, heads, layers)
    assert policy.bytes_per_token(size, heads, layers) == (
        2 * layers * heads * size * policy.bits_per_value / 8
    )


def test_bits_per_value_are_the_published_ones():
    # HQQ with group 64: 8.5, 4.5, 2.5 bits, which is 1.9x, 3.6x, 6.4x against 16
    assert [Quantized(bits, 64).bits_per_value for bits in BITS] == [8.5, 4.5, 2.5]
    # Qwen3-8B: 147,456 bytes per token in bfloat16
    exact = 147_456 / Quantized(4, 64).bytes_per_token(128, 8, 36)
    assert exact == pytest.approx(3.56, abs=0.005)


def test_a_policy_says_its_name():
    assert Quantized(4).name == "kv 4-bit g32 r32"
    assert Quantized(2, 16, 0).name == "kv 2-bit g16 r0"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Quantized(3), "3 bits cannot be packed; choose 8, 4 or 2"),
        (lambda: Quantized(4, 0), "groups of 0"),
        (lambda: Quantized(2, 30), "multiple of 4"),
        (lambda: Quantized(4, residual=-1), "residual is -1"),
        (lambda: Quantized(4, 48).bytes_per_token(64, 1, 1), "groups of 48 .* head of 64"),
        (lambda: pack(torch.zeros(2, 64), 5, 32), "5 bits"),
        (lambda: pack(torch.zeros(2, 64), 4, 24), "groups of 24 .* head of 64"),
    ],
)
def test_bad_input_gets_one_sentence(call, says):
    with pytest.raises(ValueError, match=says):
        call()
