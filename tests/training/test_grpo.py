"""GRPO: its numbers by hand, a policy that converges, a killed run, and samplers that are not the
model which is trained: evicting, or in bfloat16 beside weights in float32.

Without a dtype of its own a test runs in that of the machine."""

import copy
import dataclasses
import json
import re

import pytest
import torch

from kit import paths
from kit.data import prompts
from kit.dms import evictor
from kit.inference.decode import Request, decode
from kit.inference.policies import DMS, TOVA, Full
from kit.models.load import load, twin
from kit.schema import Problem, Sampling
from kit.training import grpo, rewards, rollouts, sft
from kit.training.grpo import GRPOConfig
from kit.training.sft import history
from tests import rounding
from tests.toys import drawn, tokens, toy

QUICK = GRPOConfig(
    steps=4, groups=2, size=4, micro_batch=4, max_new_tokens=6, learning_rate=1e-3, save_every=2,
    beta=0.0,
)  # fmt: skip


def asked(count: int = 6):
    made = [
        Problem(f"p{i}", f"What is {i} + {i}?", str(2 * i), "sums", 1, "t") for i in range(count)
    ]
    return prompts.build(prompts.plain, made)


def odd(completion_ids, **_):
    """1 where the first token is odd: the two arms."""
    return [float(ids[0] % 2) for ids in completion_ids]


@pytest.fixture
def two_arms(monkeypatch):
    monkeypatch.setattr(rewards, "odd", odd, raising=False)
    return dataclasses.replace(QUICK, rewards=("odd",), weights=(1.0,))


def test_a_policy_of_two_arms_converges(tiny_folder, tmp_path, two_arms, dtype, monkeypatch):
    monkeypatch.setenv("KIT_DTYPE", dtype)
    recipe = dataclasses.replace(two_arms, steps=10, max_new_tokens=1, temperature=0.2)
    log = history(grpo.grpo(str(tiny_folder), asked(), recipe, tmp_path))
    assert log[0]["reward"] < 0.8 and all(row["reward"] == 1 for row in log[-3:])
    assert log[-1]["frac_reward_zero_std"] == 1


def test_equal_rewards_change_nothing(tiny, tiny_folder, tmp_path, capsys):
    """No answer of random weights is right: every group has zero variance."""
    recipe = dataclasses.replace(QUICK, rewards=("accuracy",), weights=(1.0,), steps=2)
    place = grpo.grpo(str(tiny_folder), asked(), recipe, tmp_path)
    assert "In 2 steps every group had equal rewards" in capsys.readouterr().out
    for row in history(place):
        assert row["frac_reward_zero_std"] == 1 and row["grad_norm"] == 0 and row["loss"] == 0
    trained = load(str(place), dtype="float32").weights.state_dict()
    for name, value in tiny.weights.state_dict().items():
        torch.testing.assert_close(trained[name], value.half().float())


def test_a_killed_run_goes_on_and_ends_the_same(tiny_folder, tmp_path, two_arms, monkeypatch):
    monkeypatch.setenv("KIT_DTYPE", "bfloat16")

    class Killed(Exception):
        pass

    whole = grpo.grpo(str(tiny_folder), asked(), two_arms, tmp_path / "whole")

    def die(figures):
        if figures["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        grpo.grpo(str(tiny_folder), asked(), two_arms, tmp_path / "cut", die)
    seen = []
    cut = grpo.grpo(str(tiny_folder), asked(), two_arms, tmp_path / "cut", seen.append)
    assert [figures["step"] for figures in seen] == [3, 4]
    curves = [
        [(row["loss"], row["reward"], row["grad_norm"]) for row in history(place)]
        for place in (whole, cut)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    wanted = {"rewards/odd/mean", "completions/mean_length", "completions/clipped_ratio"}
    wanted |= {"frac_reward_zero_std", "grad_norm", "seconds", "reward", "peak_memory_bytes"}
    assert wanted <= set(history(cut)[0])
    assert json.loads((cut / "card.json").read_text())["recipe"]["size"] == 4


def trainer(tiny, tmp_path, **settings):
    import trl
    from datasets import Dataset

    config = trl.GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], num_generations=2,
        per_device_train_batch_size=2, gradient_checkpointing=False, epsilon=0.2,
        use_bias_correction_kl=False, **settings,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    make = grpo.corrected_trainer()
    weights = copy.deepcopy(tiny.weights)  # accelerate leaves its own `forward` on what it prepares
    return make(weights, [odd], config, train_dataset=data, processing_class=tiny.tokenizer)


@pytest.mark.parametrize("loss", ["grpo", "bnpo"])
def test_loss_clipping_kl_and_mask_by_hand(tiny, tmp_path, loss):
    """DeepSeekMath, equations 3 and 4: per sequence and then the mean; or, as the TRL that Open-RS
    pins has it, over all tokens."""
    made = trainer(tiny, tmp_path, beta=0.04, loss_type=loss)
    made.current_gradient_accumulation_steps = 1
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4_000, (2, 9), generator=draw)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        logits = tiny.weights(ids).logits[:, 3:-1].log_softmax(-1)
    now = logits.gather(-1, ids[:, 4:, None])[..., 0]
    old = now + torch.randn(2, 5, generator=draw) * 0.4
    reference = now + torch.randn(2, 5, generator=draw) * 0.4
    advantage = torch.tensor([1.3, -0.7])
    inputs = dict(
        prompt_ids=ids[:, :4], prompt_mask=torch.ones(2, 4, dtype=torch.long),
        completion_ids=ids[:, 4:], completion_mask=mask, advantages=advantage,
        old_per_token_logps=old, ref_per_token_logps=reference,
    )  # fmt: skip
    found = made._compute_loss(made.model.train(), inputs)
    sequences = []
    for i in range(2):
        terms = []
        for t in range(int(mask[i].sum())):
            ratio = float((now[i, t] - old[i, t]).exp())
            a = float(advantage[i])
            gain = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            d = float(reference[i, t] - now[i, t])
            terms.append(gain - 0.04 * (torch.tensor(d).exp().item() - d - 1))
        sequences.append(terms)
    means = [sum(terms) / len(terms) for terms in sequences]
    wanted = {"grpo": sum(means) / 2, "bnpo": sum(map(sum, sequences)) / sum(map(len, sequences))}
    assert float(found) == pytest.approx(-wanted[loss], rel=1e-4)


def test_importance_weights_are_ratios_truncated_at_two():
    policy = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.9, 0.5]]))
    sampler = torch.log(torch.tensor([[0.2, 0.4, 0.2, 0.3, 0.1]]))
    found = grpo.importance_weight(policy, sampler, torch.tensor([[1, 1, 1, 1, 0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 1.0, 1.5, 2.0, 1.0]]))


def test_importance_weights_make_the_expectation_that_of_the_policy():
    """Over a vocabulary of 50: the mean under the sampler, weighted, is the mean under the policy
    where no ratio reaches the truncation."""
    draw = torch.Generator().manual_seed(0)
    logits, reward = torch.randn(2, 50, generator=draw, dtype=torch.float64).unbind()
    sampler = logits.log_softmax(-1)
    policy = (logits + 0.2 * torch.randn(50, generator=draw, dtype=torch.float64)).log_softmax(-1)
    weight = grpo.importance_weight(policy, sampler, torch.ones(50))
    assert weight.max() < grpo.MAX_WEIGHT
    torch.testing.assert_close((sampler.exp() * weight * reward).sum(), policy.exp() @ reward)


def test_a_trainer_weights_the_advantage_of_each_token(tiny, tmp_path, monkeypatch):
    import trl

    ids = torch.randint(3, 4_000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ratio = torch.tensor([[0.5, 1.0, 1.5, 2.0, 4.0], [3.0, 0.1, 1.0, 5.0, 5.0]])
    with torch.no_grad():
        logps = tiny.weights(ids).logits[:, 3:-1].log_softmax(-1)
    batch = dict(
        prompt_ids=ids[:, :4], prompt_mask=torch.ones(2, 4, dtype=torch.long),
        completion_ids=ids[:, 4:], completion_mask=mask, advantages=torch.tensor([1.3, -0.7]),
        sampling_per_token_logps=logps.gather(-1, ids[:, 4:, None])[..., 0] - ratio.log(),
    )  # fmt: skip
    name = "_generate_and_score_completions"
    monkeypatch.setattr(trl.GRPOTrainer, name, lambda self, inputs: dict(batch))
    made = trainer(tiny, tmp_path)
    found = made._generate_and_score_completions([])
    weight = torch.tensor([[0.5, 1.0, 1.5, 2.0, 2.0], [2.0, 0.1, 1.0, 1.0, 1.0]])
    expected = batch["advantages"][:, None] * weight
    torch.testing.assert_close(found["advantages"], expected, rtol=1e-4, atol=0)  # logps near -11
    gap = float((ratio.log().abs() * mask).sum() / mask.sum())
    assert made._metrics["train"]["sampling/logp_gap"] == [pytest.approx(gap, rel=1e-4)]
    monkeypatch.setattr(trl.GRPOTrainer, name, lambda self, inputs: {"advantages": "as they were"})
    assert made._generate_and_score_completions([]) == {"advantages": "as they were"}


def test_evicting_samples_know_their_probabilities():
    """Against the evicting cache itself: at temperature 0 each token is the most likely one."""
    model = toy()
    model = dataclasses.replace(model, tokenizer=Plain())
    policy = DMS(drawn(model, window=4))
    asked = [row.tolist() for row in tokens(3, 20)]
    chats = [[{"role": "user", "content": ids}] for ids in asked]
    made = rollouts.completions(model, chats, Sampling(30, 1.0), policy)
    assert made["prompt_ids"] == asked and [len(x) for x in made["completion_ids"]] == [30] * 3
    requests = [Request(tuple(a + b)) for a, b in zip(asked, made["completion_ids"], strict=True)]
    for cut in (5, 17, 29):  # what the cache says next after so many tokens, sampled again
        short = [Request(r.prompt_ids[: 20 + cut]) for r in requests]
        greedy = decode(model, short, Sampling(1), policy=policy)
        for i, done in enumerate(greedy):
            (best,) = done.token_ids
            said = [*made["completion_ids"][i][:cut], best]
            logps = rollouts.sampled_logps(model, policy, [asked[i]], [said], 1.0)[0]
            others = [
                rollouts.sampled_logps(model, policy, [asked[i]], [[*said[:-1], t]], 1.0)[0][-1]
                for t in range(0, 256, 17)
            ]
            assert logps[-1] >= max(others) - 1e-4
            assert logps[:cut] == pytest.approx(made["logprobs"][i][:cut], abs=1e-3)


def test_a_completion_ends_with_the_token_that_was_drawn():
    """Qwen3 and Llama 3 have several that end an answer; a trainer must not learn another."""
    model = dataclasses.replace(load("random:qwen3"), tokenizer=Plain())
    chats = [[{"role": "user", "content": row.tolist()}] for row in tokens(4, 12)]
    endless = rollouts.completions(model, chats, Sampling(30, 1.0), Full())["completion_ids"]
    ends = set(range(5, 256, 7))
    model.weights.generation_config.eos_token_id = sorted(ends)
    done = rollouts.completions(model, chats, Sampling(30, 1.0), Full())["completion_ids"]
    assert any(row[-1] in ends for row in done)
    for row, free in zip(done, endless, strict=True):
        stop = next((i for i, token in enumerate(free) if token in ends), len(free))
        assert row == free[: stop + 1]


def test_probabilities_of_what_a_full_cache_samples(dtype):
    model = load("random:qwen3", dtype=dtype)
    said = [row.tolist() for row in tokens(rollouts.AT_ONCE + 2, 30)]
    read = [row[: 4 + i] for i, row in enumerate(said)]
    found = rollouts.sampled_logps(model, Full(), read, said, 0.7)
    for before, after, logps in zip(read, said, found, strict=True):
        ids = torch.tensor([before + after])
        with torch.no_grad():
            plain, right = (
                (m.weights(ids).logits[0, len(before) - 1 : -1] / 0.7).log_softmax(-1)
                .gather(-1, torch.tensor(after)[:, None])[:, 0]
                for m in (model, rounding.exact(model))
            )  # fmt: skip
        rounding.assert_close(torch.tensor(logps), plain, right)


class Plain:
    """A tokenizer whose chats say token ids already."""

    eos_token_id = 0

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]

    def decode(self, ids, **_):
        return ""


def error(tiny, dtype: str) -> float:
    """What rounding to `dtype` may change in a log-probability of the tiny model, in nats."""
    model = dataclasses.replace(tiny, weights=twin(tiny.weights, getattr(torch, dtype)))
    ids = torch.randint(3, 4_000, (4, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, right = (
            m.weights(ids[:, :-1]).logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])
            for m in (model, rounding.exact(tiny))
        )
    return rounding.tolerance(plain, right)


def test_the_gap_of_a_sampler_is_logged_and_corrected(
    tiny, tiny_folder, tmp_path, two_arms, dtype, monkeypatch
):
    monkeypatch.setenv("KIT_DTYPE", dtype)
    made, rounded = drawn(tiny, window=2), error(tiny, dtype)
    recipe = dataclasses.replace(two_arms, max_new_tokens=12, steps=1)
    (dense,) = history(grpo.grpo(str(tiny_folder), asked(), recipe, tmp_path))
    (evicted,) = history(grpo.grpo(str(tiny_folder), asked(), recipe, tmp_path, policy=DMS(made)))
    none = evictor.Evictor(tiny.weights, evictor.LAPTOP, tiny.weights_hash)
    (same,) = history(grpo.grpo(str(tiny_folder), asked(), recipe, tmp_path, policy=DMS(none)))
    gap = "sampling/logp_gap"
    assert same[gap] < rounded < evicted[gap]
    if dtype == "float32":
        assert gap not in dense
        assert same["grad_norm"] == pytest.approx(dense["grad_norm"], rel=1e-3)
    else:
        assert 0 < dense[gap] < rounded, "a sampler in bfloat16 is not the trained model"


def test_a_sampler_in_bfloat16_is_one_copy_that_follows_the_training(
    tiny, tiny_folder, tmp_path, two_arms, monkeypatch
):
    monkeypatch.setenv("KIT_DTYPE", "bfloat16")
    seen, completions = [], rollouts.completions

    def watched(model, *how):
        seen.append((model.weights, model.weights.lm_head.weight.clone()))
        return completions(model, *how)

    monkeypatch.setattr(rollouts, "completions", watched)
    recipe = dataclasses.replace(two_arms, steps=2, keep_every=1)
    place = grpo.grpo(str(tiny_folder), asked(), recipe, tmp_path)
    (sampler, first), (again, second) = seen
    assert sampler is again and sampler.dtype == torch.bfloat16
    assert torch.equal(first, tiny.weights.lm_head.weight.bfloat16())
    kept = load(str(sft.saved_models(place)[1]), dtype="float32").weights.lm_head.weight
    assert not torch.equal(first, second)
    # Kept as float16, whose smallest step is 2^-24.
    torch.testing.assert_close(second.float(), kept, rtol=2**-8, atol=2**-24)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_reference_model_is_stored_as_the_device_computes(
    tiny_folder, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("KIT_DTYPE", name)
    made = []
    monkeypatch.setattr(grpo, "train", lambda trainer, *_: made.append(trainer) or tmp_path)
    grpo.grpo(str(tiny_folder), asked(), dataclasses.replace(QUICK, beta=0.04), tmp_path)
    (trainer,) = made
    assert {p.dtype for p in trainer.ref_model.parameters()} == {getattr(torch, name)}
    assert {b.dtype for b in trainer.ref_model.buffers()} == {torch.float32}, "of RoPE"
    assert trainer.model.dtype == torch.float32


def test_a_sampler_without_probabilities_is_refused(tiny):
    with pytest.raises(ValueError, match="Rollouts under tova 8 do not know .* take full"):
        rollouts.Sampler(tiny, QUICK, TOVA(8))


def test_wrong_recipes_and_problems_are_one_sentence(tiny_folder, tmp_path):
    for wrong in (dict(micro_batch=3), dict(size=1), dict(weights=(1.0,))):
        with pytest.raises(ValueError, match="must divide groups x size"):
            dataclasses.replace(QUICK, **wrong)
    for wrong in (dict(rollouts="magic"), dict(rewards=("accuracy", "luck"))):
        with pytest.raises(ValueError, match="rewards are functions of kit.training.rewards"):
            dataclasses.replace(QUICK, **wrong)
    with pytest.raises(ValueError, match="1 problems are fewer than the 2 of a step"):
        grpo.grpo(str(tiny_folder), asked(1), QUICK, tmp_path)
    blank = [dataclasses.replace(asked(1)[0], problem=Problem("p", "q", " ", "f", 1, "t"))] * 2
    with pytest.raises(ValueError, match="Problem p of t has the gold answer"):
        grpo.grpo(str(tiny_folder), blank, QUICK, tmp_path)


def test_a_step_that_processes_do_not_divide_is_one_sentence(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ValueError, match="8 completions .* which 3 processes cannot share evenly; start 2"
    ):
        grpo.grpo(str(tiny_folder), asked(), QUICK, tmp_path)


@pytest.mark.slow
def test_two_processes_by_accelerate_launch(tiny_folder, tmp_path):
    """A few steps on 2 CPU processes: as many completions in all, no two processes say the same."""
    recipe = dataclasses.replace(QUICK, steps=2, micro_batch=2)
    seen = []
    place = grpo.launch(str(tiny_folder), asked(), recipe, tmp_path, seen.append, processes=2)
    assert [row["step"] for row in seen] == [1, 2]
    log = history(place)
    assert [row["reward"] for row in log] == [row["reward"] for row in seen]
    assert load(str(place)).weights_hash != load(str(tiny_folder)).weights_hash
    again = []
    how = dict(report=again.append, processes=1)
    assert grpo.launch(str(tiny_folder), asked(), recipe, tmp_path, **how) == place
    assert not again, "trained before"
    wrong = str(tmp_path / "nothing")
    with pytest.raises(RuntimeError, match=r"accelerate launch ended with 1; see .*job.log"):
        grpo.launch(wrong, asked(), recipe, tmp_path, processes=1)
    assert "No model at" in (tmp_path / "job.log").read_text()


def test_accelerate_reads_both_configurations(monkeypatch):
    """Accelerate shards nothing on CPUs, so of FSDP this is what each process is told."""
    from accelerate.commands import launch
    from accelerate.utils import FullyShardedDataParallelPlugin

    def told(name: str) -> dict[str, str]:
        file = paths.DATA / "launch" / f"{name}.yaml"
        args = launch.launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
        args, _, _ = launch._validate_launch_command(args)
        return launch.prepare_multi_gpu_env(args)

    assert "ACCELERATE_USE_FSDP" not in told("ddp")
    for name, value in told("fsdp").items():
        monkeypatch.setenv(name, str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.cpu_ram_efficient_loading
    plugin.set_auto_wrap_policy(toy().weights)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {
        type(toy().weights.model.layers[0])
    }


def test_a_step_is_shared_by_any_number_of_gpus(monkeypatch, tmp_path):
    """72 completions a step, as published, on the 1 to 8 GPUs of a machine."""
    published, model, started = grpo.OPEN_RS_2, toy(), []
    for gpus in range(1, 9):
        started.append(grpo.usable_processes(published, gpus))
        monkeypatch.setenv("WORLD_SIZE", str(started[-1]))
        told = grpo._settings(published, model, tmp_path)
        at_once = told["per_device_train_batch_size"] * told["gradient_accumulation_steps"]
        assert at_once * started[-1] == 72 and told["per_device_train_batch_size"] <= 6
    assert started == [1, 2, 3, 4, 4, 6, 6, 8]
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(ValueError, match="which 7 processes cannot share evenly; start 6, or"):
        grpo._settings(published, model, tmp_path)


def test_nothing_of_a_training_is_left_when_the_next_begins(
    tiny_folder, tmp_path, one_at_a_time, monkeypatch
):
    monkeypatch.setenv("KIT_DTYPE", "float32")
    recipe = dataclasses.replace(QUICK, steps=1, save_every=9)
    for seed in range(2):
        one = dataclasses.replace(recipe, seed=seed)
        grpo.grpo(str(tiny_folder), asked(), one, tmp_path)
    assert len(one_at_a_time) == 2


def test_easy_and_hard_problems_are_mixed_in_the_numbers_asked_for():
    made = [Problem(f"p{i}", "q", "1", "f", 1 + i % 3, "t") for i in range(30)]
    found = grpo.mix_difficulties(made, 4, 9)
    assert [p.level == 1 for p in found] == [True] * 4 + [False] * 9
    assert len({p.id for p in found}) == 13 and grpo.mix_difficulties(made[::-1], 4, 9) == found
    assert grpo.mix_difficulties(made, 4, 9, seed=1) != found
    with pytest.raises(ValueError, match="easy is 11, but only 10 problems are easy"):
        grpo.mix_difficulties(made, 11, 0)


PUBLISHED = (grpo.OPEN_RS_1, grpo.OPEN_RS_2, grpo.OPEN_RS_3)


def test_the_table_of_settings_is_that_of_the_recipes():
    """docs/training.md, each row against each recipe; a setting that differs from the laptop's is
    in it."""
    page = (paths.ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.*) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    shown = {name: cells for name, *cells in rows if name in names}
    for name, cells in shown.items():
        values = [getattr(recipe, name) for recipe in PUBLISHED]
        assert cells == [f"`{value}`" for value in values], name
    for name in names - set(shown) - {"system", "seed", "save_every", "keep_every", "lora_rank"}:
        values = {getattr(recipe, name) for recipe in PUBLISHED}
        assert values == {getattr(GRPOConfig(), name)}, f"{name} is not in the table"
    assert {recipe.completions for recipe in PUBLISHED} == {36_000}
    assert grpo.OPEN_RS_3.system == grpo.OPEN_RS_2.system + grpo.ENGLISH


def test_open_rs_trains_as_the_code_that_it_pins(tiny_folder, tmp_path, monkeypatch):
    """Logits are not divided by the temperature, the schedule is of 500 steps, prompts are short
    ones behind the system prompt, and nothing is reweighted."""
    made = []
    monkeypatch.setattr(grpo, "train", lambda trainer, *_: made.append(trainer) or tmp_path)
    recipe = dataclasses.replace(
        grpo.OPEN_RS_3, steps=2, groups=2, size=2, micro_batch=2, rollouts="transformers"
    )
    long = Problem("long", "What is 1 + 1? " * 200, "2", "sums", 1, "t")
    problems = [*asked(3), prompts.plain(long)]
    grpo.grpo(str(tiny_folder), problems, recipe, tmp_path)
    (trainer,) = made
    chats = trainer.train_dataset["prompt"]
    assert [len(chats), {chat[0]["content"] for chat in chats}] == [3, {recipe.system}]
    assert [chat[-1] for chat in chats] == [prompt.chat[-1] for prompt in asked(3)]
    assert trainer.generation_config.temperature == 0.7

    trainer.create_optimizer()
    rates = trainer.create_scheduler(2)
    assert rates.lr_lambdas[0](50) == 1 and rates.lr_lambdas[0](500) == pytest.approx(0.1)
    assert rates.lr_lambdas[0](2) == pytest.approx(2 / 50)

    ids = torch.randint(3, 4_000, (2, 9), generator=torch.Generator().manual_seed(0))
    model = trainer.model.eval()
    with torch.no_grad():
        found, *_ = trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 5)
        logits = load(str(tiny_folder), dtype="float32").weights(ids).logits[:, 3:-1]
    wanted = logits.log_softmax(-1).gather(-1, ids[:, 4:, None])[..., 0]
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)  # under autocast


def test_uncorrected_rollouts_under_dms_are_refused(tiny, tiny_folder, tmp_path):
    evicting = DMS(evictor.Evictor(tiny.weights, evictor.LAPTOP, tiny.weights_hash))
    with pytest.raises(ValueError, match="set corrected and tempered to true"):
        grpo.grpo(str(tiny_folder), asked(), grpo.OPEN_RS_2, tmp_path, policy=evicting)
