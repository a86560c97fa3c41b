"""Rollouts by vLLM through TRL, colocated and from a server, where vLLM is not installed: stand-ins
with the interface that TRL calls, whose own model follows the training only if weights are sent."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kit.models.load import load
from kit.training import grpo, rewards
from kit.training.sft import history
from tests.training.test_grpo import QUICK, asked, odd

STEPS = 3


@pytest.fixture
def two_arms(monkeypatch):
    monkeypatch.setattr(rewards, "odd", odd, raising=False)
    return dataclasses.replace(QUICK, steps=STEPS, rewards=("odd",), weights=(1.0,))


class Weights:
    """A model that samples, by transformers, and is updated parameter by parameter."""

    def __init__(self, folder: str):
        self.model = load(folder, dtype="float32").weights
        self.updates, self.resets, self.temperatures = 0, 0, set()
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def load_weights(self, named) -> None:
        own = dict(self.model.named_parameters())
        for name, value in named:
            own[name].copy_(value)
            self.updates += 1

    @torch.no_grad()
    def sample(self, prompt: list[int], count: int, temperature: float):
        """Token ids and their log-probabilities, in nats."""
        self.temperatures.add(temperature)
        ids, logps = list(prompt), []
        for _ in range(count):
            logp = (self.model(torch.tensor([ids])).logits[0, -1] / temperature).log_softmax(-1)
            token = int(torch.multinomial(logp.exp(), 1, generator=self.generator))
            ids, logps = [*ids, token], [*logps, float(logp[token])]
        return ids[len(prompt) :], logps


class LLM:
    """vllm.LLM, as TRL calls it in the processes of a training."""

    made: list[Weights]

    def __init__(self, model, **_):
        self.weights = Weights(model)
        runner = SimpleNamespace(model=self.weights)
        driver = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=driver))
        LLM.made.append(self.weights)

    def reset_prefix_cache(self):
        self.weights.resets += 1

    def generate(self, prompts, sampling_params, use_tqdm):
        outputs = []
        for prompt in prompts:
            how = sampling_params.max_tokens, sampling_params.temperature
            ids, logps = self.weights.sample(prompt["prompt_token_ids"], *how)
            scores = [{token: SimpleNamespace(rank=1, logprob=logp)}
                      for token, logp in zip(ids, logps, strict=True)]  # fmt: skip
            completion = SimpleNamespace(token_ids=ids, logprobs=scores)
            outputs.append(SimpleNamespace(outputs=[completion], **prompt))
        return outputs


class Client:
    """TRL's client of a vLLM server."""

    folder: str

    def __init__(self, base_url, group_port, connection_timeout):
        assert base_url == "http://0.0.0.0:8000"
        self.weights = Weights(self.folder)
        LLM.made.append(self.weights)

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named):
        named = [*named]
        for (name, dtype, shape), (its_name, value) in zip(metadata, named, strict=True):
            assert (name, dtype, shape) == (its_name, "float32", [*value.shape])
        self.weights.load_weights(named)

    def reset_prefix_cache(self):
        self.weights.resets += 1

    def generate(self, prompts, n, temperature, max_tokens, **_):
        made = [self.weights.sample(prompt, max_tokens, temperature)
                for prompt in prompts for _ in range(n)]  # fmt: skip
        return {"prompt_ids": prompts, "completion_ids": [ids for ids, _ in made],
                "logprobs": [[[logp] for logp in logps] for _, logps in made]}  # fmt: skip


@pytest.fixture
def stand_ins(tiny_folder, monkeypatch) -> list[Weights]:
    from trl.generation import vllm_generation

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # TRL sets them for vLLM; as they were at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("KIT_DTYPE", "float32")
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    for name, value in (("LLM", LLM), ("SamplingParams", SimpleNamespace), ("VLLMClient", Client)):
        monkeypatch.setattr(vllm_generation, name, value, raising=False)
    monkeypatch.setattr(Client, "folder", str(tiny_folder), raising=False)
    monkeypatch.setattr(LLM, "made", [], raising=False)
    return LLM.made


@pytest.mark.parametrize("rollouts", ["vllm", "vllm-server"])
def test_a_sampler_beside_the_training_follows_it(
    tiny,
    tiny_folder,
    tmp_path,
    two_arms,
    stand_ins,
    rollouts,
):
    recipe = dataclasses.replace(two_arms, rollouts=rollouts, temperature=0.7)
    place = grpo.grpo(str(tiny_folder), asked(), recipe, tmp_path)
    (sampler,) = stand_ins
    log = history(place)
    gaps = [row["sampling/sampling_logp_difference/max"] for row in log]
    assert len(log) == STEPS and max(gaps) < 1e-3, "its log-probabilities are those of the training"
    parameters = dict(tiny.weights.named_parameters())
    assert sampler.updates == STEPS * len(parameters) and sampler.resets == STEPS
    moved = dict(sampler.model.named_parameters())
    assert any(not torch.equal(moved[name], value) for name, value in parameters.items())
    assert sampler.temperatures == {0.7}
    assert all(0 <= row["reward"] <= 1 for row in log)


def test_a_sampler_that_does_not_follow_is_seen(
    tiny_folder,
    tmp_path,
    two_arms,
    stand_ins,
    monkeypatch,
):
    monkeypatch.setattr(Weights, "load_weights", lambda self, named: [*named])
    recipe = dataclasses.replace(two_arms, rollouts="vllm", learning_rate=1e-2)
    log = history(grpo.grpo(str(tiny_folder), asked(), recipe, tmp_path))
    gaps = [row["sampling/sampling_logp_difference/max"] for row in log]
    assert gaps[0] < 1e-3 < gaps[-1]


def test_open_rs_samples_at_its_temperature_and_corrects_nothing(tiny_folder, tmp_path, stand_ins):
    recipe = dataclasses.replace(
        grpo.OPEN_RS_3, steps=1, groups=2, size=2, micro_batch=2, max_new_tokens=4, keep_every=0
    )
    (row,) = history(grpo.grpo(str(tiny_folder), asked(), recipe, tmp_path))
    assert stand_ins[0].temperatures == {0.7}
    assert not [name for name in row if name.startswith("sampling/")]


def test_without_vllm_the_decode_loop_samples_where_it_would_be_colocated():
    recipes = [dataclasses.replace(QUICK, rollouts=name) for name in ("vllm", "vllm-server")]
    assert [grpo.with_available_rollouts(recipe).rollouts for recipe in recipes] == [
        "kit", "vllm-server",
    ]  # fmt: skip
