"""What policies cost on given text, fed through the real cache, against masked sequences."""

import pytest
import torch

from kit import evictor, gates, models, policies, quality


def toy(shape: str = "llama") -> models.Model:
    return models.load(f"random:{shape}", dtype="float32")


def tokens(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(0))


def drawn(model) -> evictor.Evictor:
    made = evictor.Evictor(model.weights, evictor.LAPTOP, model.weights_hash)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for linear in made.linear:
            torch.nn.init.normal_(linear.weight, std=0.02)
            torch.nn.init.constant_(linear.bias, 0.17)
    return made.requires_grad_(False)


def test_full_attention_costs_nothing():
    found = quality.forced(toy(), tokens(3, 40), prompt=10)
    assert found["kl"].abs().max() < 1e-5 and (found["kept_fraction"] == 1).all()
    assert (found["nats"] - found["full_nats"]).abs().max() < 1e-4
    assert (found["live_tokens"] == sum(range(11, 40)) / 29).all()


def test_the_fed_cache_agrees_with_the_masked_sequence():
    """Prompt of one token, so that both see the same positions, the first apart."""
    model, ids = toy("qwen3"), tokens(3, 50)
    made = drawn(model)
    fed = quality.forced(model, ids, policies.DMS(made), prompt=1)
    whole = gates.measure(model, made, ids)
    kl = whole["kl"] * 49 / 48  # the first token sees only itself: its KL is 0
    torch.testing.assert_close(torch.tensor(fed["kl"]), torch.tensor(kl), rtol=1e-3, atol=1e-4)
    assert 0.3 < fed["kept_fraction"].mean() < 0.9


@pytest.mark.parametrize("kind", [policies.Window, policies.TOVA, policies.H2O, policies.Random])
@pytest.mark.parametrize("live", [12.3, 17.0, 25.1])
def test_matched_policies_take_as_much_memory_and_hardly_more(kind, live):
    model, ids = toy(), tokens(2, 60)
    chosen = quality.matched(kind(kept_tokens=8), live, 10, 60)
    found = quality.forced(model, ids, chosen, prompt=10)["live_tokens"]
    assert (live <= found).all() and (found < live + 1.1).all()


def test_kept_is_what_a_window_keeps():
    found = quality.kept(toy(), tokens(1, 30)[0], policies.Window(kept_tokens=8), prompt=10)
    assert {tuple(head.tolist()) for layer in found for head in layer} == {
        (0, 1, 2, 3, *range(25, 30))
    }


def test_a_prompt_longer_than_the_text_is_refused():
    with pytest.raises(ValueError, match="prompt is 29; the sequences have 30 tokens"):
        quality.forced(toy(), tokens(1, 30), prompt=29)
