r"""Group relative policy optimization (GRPO) on graded problems, by TRL.

    python -m kit grpo FOLDER --recipe laptop
    accelerate launch --config_file data/launch/fsdp.yaml -m kit grpo FOLDER \
        --recipe open-rs-2 --model hub:ORG/NAME --problems open-rs

Rollouts come from `kit.inference.decode` ("kit"), from transformers, or from vLLM where that is
installed: in the training processes ("vllm"), or from a server that `trl vllm-serve --model NAME`
runs on a GPU of its own ("vllm-server").
Weights are stored in float32, and trained under autocast where the device computes in bfloat16.
Where the sampler is not the policy that is trained, the gap between their log-probabilities is
logged and corrected by truncated importance weights, see `importance_weight`.

Sources: GRPO, Section 4.1 of https://arxiv.org/abs/2402.03300; Open-RS,
https://arxiv.org/abs/2503.16219 and https://github.com/knoveleng/open-rs, recipes/grpo.yaml at
2889c47.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial, update_wrapper
from importlib.util import find_spec
from pathlib import Path

import torch

from kit import paths
from kit.data import prompts
from kit.inference.decode import tokenize
from kit.inference.policies import Full
from kit.models.load import Model, collect, default_dtype, load, twin
from kit.schema import Problem, Prompt, digest
from kit.training import memory, rewards, rollouts
from kit.training.callbacks import MetricsCallback
from kit.training.sft import (
    VERSIONS,
    check_optimizer,
    compute_dtype,
    identity,
    lora_config,
    releases_memory,
    train,
    trainer_settings,
)

DDP = paths.DATA / "launch" / "ddp.yaml"
MAX_WEIGHT = 2.0  # truncates an importance weight, as TRL 0.23 did
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
ROLLOUTS = ("kit", "transformers", "vllm", "vllm-server")
# The system prompt of recipes/grpo.yaml, whose last sentence is what experiment 3 adds.
OPEN_RS_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer, and put your final answer within \\boxed{{}} . The reasoning process "
    "and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
ENGLISH = " Note that respond by English, NOT use other languages."


@dataclass(frozen=True)
class GRPOConfig:
    """Hyperparameters of GRPO; the defaults suit a laptop."""

    steps: int = 40
    groups: int = 4  # problems per step
    size: int = 8  # completions per problem
    micro_batch: int = 8  # completions per forward pass of the update
    max_new_tokens: int = 64
    temperature: float = 1.0
    learning_rate: float = 1e-5
    warmup: float = 0.1  # fraction of the steps
    schedule: str = "constant_with_warmup"
    schedule_steps: int = 0  # after which the schedule would end; 0: steps
    loss: str = "grpo"  # mean of the means of sequences; "bnpo": of a micro_batch's tokens
    tempered: bool = True  # the loss is of the distribution that is sampled, logits / temperature
    corrected: bool = True  # by importance weights, where the sampler is not the trained policy
    beta: float = 0.04  # weight of the KL divergence from the initial model
    rewards: tuple[str, ...] = ("accuracy", "compliance")  # functions of kit.training.rewards
    weights: tuple[float, ...] = (1.0, 0.2)
    longest: int = 64  # length limit of the cosine reward: tokens, or characters as published
    system: str = ""  # system message of every prompt
    max_prompt_tokens: int = 0  # longer prompts are left out; 0: none
    lora_rank: int = 0
    optimizer: str = "adamw"  # of sft.OPTIMIZERS
    rollouts: str = "kit"
    save_every: int = 10
    keep_every: int = 10  # steps between two saved models, see sft.SFTConfig
    seed: int = 0

    @property
    def arm(self) -> Callable[..., Prompt]:
        """The prompt of a problem: with the format instruction if the format is rewarded."""
        return prompts.format_only if "compliance" in self.rewards else prompts.plain

    @property
    def completions(self) -> int:
        """Number of completions of the whole training."""
        return self.steps * self.groups * self.size

    def __post_init__(self):
        per_step = self.groups * self.size
        if per_step % self.micro_batch or self.size < 2 or len(self.rewards) != len(self.weights):
            raise ValueError(
                f"groups x size is {per_step}, micro_batch {self.micro_batch}, size {self.size}, "
                f"rewards {len(self.rewards)}, weights {len(self.weights)}: micro_batch must "
                f"divide groups x size, size be at least 2, and each reward have a weight."
            )
        if self.rollouts not in ROLLOUTS or not all(hasattr(rewards, r) for r in self.rewards):
            raise ValueError(
                f"rollouts is {self.rollouts!r}, rewards {self.rewards}: rollouts is one of "
                f"{ROLLOUTS}, rewards are functions of kit.training.rewards."
            )
        if self.loss not in LOSSES or 0 < self.schedule_steps < self.steps:
            raise ValueError(
                f"loss is {self.loss!r}, steps {self.steps}, schedule_steps {self.schedule_steps}: "
                f"loss is one of {LOSSES}, and a schedule is not shorter than the training."
            )
        check_optimizer(self.optimizer)


# As the code that Open-RS pins ran: see the table of docs/training.md. A step has 12 problems x 6
# completions, by 3 processes x 6 x 4 accumulated; its loss is over the tokens of each six.
OPEN_RS_1 = GRPOConfig(
    steps=500, groups=12, size=6, micro_batch=6, max_new_tokens=4096, temperature=0.7,
    learning_rate=1e-6, schedule="cosine_with_min_lr", schedule_steps=500, loss="bnpo",
    tempered=False, corrected=False, rewards=("anchored", "think"), weights=(1.0, 1.0),
    longest=4096, system=OPEN_RS_SYSTEM, max_prompt_tokens=512, rollouts="vllm", save_every=50,
    keep_every=50, seed=42,
)  # fmt: skip
OPEN_RS_2 = dataclasses.replace(OPEN_RS_1, max_new_tokens=3584, longest=3584)
OPEN_RS_3 = dataclasses.replace(
    OPEN_RS_2, rewards=("cosine_published", "think"), weights=(2.0, 1.0),
    system=OPEN_RS_SYSTEM + ENGLISH,
)  # fmt: skip
RECIPES = {"laptop": GRPOConfig(), "open-rs-1": OPEN_RS_1}
RECIPES |= {"open-rs-2": OPEN_RS_2, "open-rs-3": OPEN_RS_3}


def with_available_rollouts(config: GRPOConfig) -> GRPOConfig:
    """`config` with rollouts by `kit.inference.decode` where it asks for a vLLM that is not
    installed."""
    if config.rollouts == "vllm" and find_spec("vllm") is None:
        return dataclasses.replace(config, rollouts="kit")
    return config


def usable_processes(config: GRPOConfig, most: int) -> int:
    """The largest number of processes, at most `most`, that share a step's completions evenly."""
    return max(n for n in range(1, most + 1) if config.groups * config.size % n == 0)


def mix_difficulties(
    problems: Sequence[Problem], easy: int, hard: int, seed: int = 0
) -> list[Problem]:
    """`easy` problems of the lowest level and `hard` of the others, drawn by hash of `seed`.

    Open-RS has 1,000 easy and 6,000 hard ones.
    """
    lowest = min(problem.level for problem in problems)
    order = sorted(problems, key=lambda problem: digest([seed, problem.id]))
    parts = [p for p in order if p.level == lowest], [p for p in order if p.level > lowest]
    for name, part, count in zip(("easy", "hard"), parts, (easy, hard), strict=True):
        if len(part) < count:
            raise ValueError(f"{name} is {count}, but only {len(part)} problems are {name}.")
    return parts[0][:easy] + parts[1][:hard]


def importance_weight(
    policy_logps: torch.Tensor, sampler_logps: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Truncated importance weights of sampled tokens, min(pi(o_t) / mu(o_t), MAX_WEIGHT).

    pi is the policy that is trained, mu the sampler that drew the token o_t. Both log-probabilities
    in nats, the mask (1 for tokens of the completion, 0 for padding) and the weights are of shape
    (sequences, tokens); padding has weight 1. Multiplied with the advantage of its token, a weight
    removes the bias of sampling from mu instead of pi, up to the truncation that bounds its
    variance.

    Sources: truncated importance sampling, https://fengyao.notion.site/off-policy-rl; TRL computes
    the same for vLLM (`vllm_importance_sampling_mode="token_truncate"`),
    https://huggingface.co/docs/trl/grpo_trainer. That rounding alone makes a sampler differ:
    https://arxiv.org/abs/2510.26788.
    """
    return ((policy_logps - sampler_logps) * mask).exp().clamp(max=MAX_WEIGHT)


def corrected_trainer() -> type:
    """TRL's GRPOTrainer, whose advantages are multiplied with `importance_weight` where the sampler
    is not the trained policy, and whose schedule may be longer than the training. Defined in a
    function since importing TRL takes seconds."""
    from trl import GRPOTrainer

    class CorrectedTrainer(GRPOTrainer):
        schedule_steps = 0

        def create_scheduler(self, num_training_steps, optimizer=None):
            return super().create_scheduler(self.schedule_steps or num_training_steps, optimizer)

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            if self.use_vllm or "sampling_per_token_logps" not in batch:
                return batch
            mask, count = batch["completion_mask"], batch["completion_ids"].size(1)
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            masks = torch.cat([batch["prompt_mask"], mask], dim=1)
            with torch.no_grad():
                policy_logps, *_ = self._get_per_token_logps_and_entropies(
                    self.model, ids, masks, count, self.args.per_device_train_batch_size
                )
            sampler_logps = batch["sampling_per_token_logps"]
            gap = ((policy_logps - sampler_logps) * mask).abs().sum() / mask.sum()
            self._metrics["train"]["sampling/logp_gap"].append(float(gap))
            # The clipped objective is linear in the advantage, so weighting one weights the other.
            weight = importance_weight(policy_logps, sampler_logps, mask)
            batch["advantages"] = batch["advantages"][:, None] * weight
            return batch

    return CorrectedTrainer


@releases_memory
def grpo(
    base: str,
    questions: Sequence[Prompt],
    config: GRPOConfig,
    folder: Path,
    report: Callable[[dict], None] = lambda figures: None,
    policy: Full = Full(),  # noqa: B008 (frozen)
    device: str = "auto",
) -> Path:
    """Train `base` on the problems of `questions`; the folder of the trained model, see `sft.sft`.

    `report` receives the metrics of each step, which `history.json` stores: reward and its
    components, length, fraction finished, fraction of groups with equal rewards, KL, gradient norm,
    seconds, peak memory. A finished training is returned as it is; a killed one continues.
    ValueError for fewer problems than groups, for a gold answer that the grader cannot read, and
    for rollouts under DMS that the recipe leaves uncorrected.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # `rollout_func` is pinned with TRL
    import datasets  # these take seconds to import
    import trl

    rewards.check_golds([prompt.problem for prompt in questions])
    _check_policy(policy, config)
    model = load(base, dtype="float32", device=device)
    questions = _short_enough(model, [_with_system(p, config.system) for p in questions], config)
    if len(questions) < config.groups:
        raise ValueError(f"{len(questions)} problems are fewer than the {config.groups} of a step.")
    data = digest([[p.id, p.problem.answer, p.problem.asks] for p in questions], 12)
    parts = [
        "grpo",
        "reference in the compute dtype",
        model.weights_hash,
        data,
        identity(config),
        policy.key,
    ]
    parts += [config.micro_batch] if config.loss == "bnpo" else []  # over whose tokens it averages
    parts += [compute_dtype(model), VERSIONS]
    place = Path(folder) / digest(parts, 12)
    if (place / "model" / "card.json").is_file():
        return place / "model"
    if not model.weights.config.architectures:
        _name_architecture(model, place / f"reference-{os.environ.get('RANK', 0)}")
    rows = [{"prompt": p.chat, "gold": p.problem.answer, "asks": p.problem.asks} for p in questions]
    sampler = rollouts.Sampler(model, config, policy)
    longest = max(len(tokenize(model, prompt)) for prompt in questions) + config.max_new_tokens
    checkpointing = memory.checkpoints_layers(model, config, longest)
    trainer = corrected_trainer()(
        model.weights,
        [_reward(name, config.longest) for name in config.rewards],
        trl.GRPOConfig(gradient_checkpointing=checkpointing, **_settings(config, model, place)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=model.tokenizer,
        peft_config=lora_config(config.lora_rank) if config.lora_rank else None,
        rollout_func=sampler if config.rollouts == "kit" else None,
        callbacks=[MetricsCallback(report, place)],
    )
    _set_beyond_trl(trainer, config, model)
    card = {"base": base, "data": data, "problems": len(questions)}
    return train(trainer, model, place, config, card)


def _check_policy(policy: Full, config: GRPOConfig) -> None:
    if type(policy) is not Full and not (config.corrected and config.tempered):
        raise ValueError(
            f"Rollouts under {policy.name} are not of the policy that is trained; set corrected "
            f"and tempered to true, or take full attention."
        )


def _name_architecture(model: Model, folder: Path) -> None:
    """A folder of the same weights whose config says what they are, as that of a converted GGUF
    does not: TRL reads the reference model anew from where the config came from."""
    source, config = Path(model.weights.config._name_or_path), model.weights.config
    config.architectures = [type(model.weights).__name__]
    config.save_pretrained(folder)
    for file in source.glob("*.safetensors"):
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file.resolve())
    config._name_or_path = str(folder)


def _set_beyond_trl(trainer, config: GRPOConfig, model: Model) -> None:
    """What TRL has no setting for: a longer schedule, a sampler's temperature that is not that of
    the loss, and a reference model that is stored as the device computes, not as the trained one;
    its shards, which are small, stay as they are."""
    trainer.schedule_steps = config.schedule_steps
    if not config.tempered:  # the loss took the trainer's temperature, 1, when it was made
        kind = "vllm_generation" if config.rollouts.startswith("vllm") else "generation_config"
        getattr(trainer, kind).temperature = config.temperature
    if trainer.ref_model is not None and not trainer.is_fsdp_enabled:
        for parameter in trainer.ref_model.parameters():
            parameter.data = parameter.data.to(default_dtype(model.device))


def _settings(config: GRPOConfig, model: Model, place: Path) -> dict:
    """TRL's settings for `config`."""
    count = int(os.environ.get("WORLD_SIZE", 1))  # of processes, set by accelerate
    per_process, rest = divmod(config.groups * config.size, count)
    if rest:
        raise ValueError(
            f"A step has {config.groups * config.size} completions (groups x size), which {count} "
            f"processes cannot share evenly; start {usable_processes(config, count)}, "
            f"or change groups."
        )
    at_once = max(n for n in range(1, config.micro_batch + 1) if per_process % n == 0)
    return trainer_settings(dataclasses.replace(config, micro_batch=at_once), model, place) | dict(
        gradient_accumulation_steps=per_process // at_once,
        num_generations=config.size,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature if config.tempered else 1.0,
        lr_scheduler_type=config.schedule,
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if "min_lr" in config.schedule else {},
        warmup_steps=round(config.warmup * (config.schedule_steps or config.steps)),
        beta=config.beta,
        loss_type=config.loss,
        use_bias_correction_kl=False,  # off as in Open-RS; TRL's default weights the KL term
        reward_weights=list(config.weights),
        use_vllm=config.rollouts.startswith("vllm"),
        vllm_importance_sampling_correction=config.corrected,
        vllm_mode="server" if config.rollouts == "vllm-server" else "colocate",
    )


def _with_system(prompt: Prompt, system: str) -> Prompt:
    messages = (("system", system), *prompt.messages) if system else prompt.messages
    return dataclasses.replace(prompt, messages=messages)


def _short_enough(model: Model, questions: list[Prompt], config: GRPOConfig) -> list[Prompt]:
    """The prompts of at most `max_prompt_tokens` tokens. TRL cut the beginning off longer ones at
    the commit that Open-RS pins, and no longer does."""
    if not config.max_prompt_tokens:
        return questions
    return [p for p in questions if len(tokenize(model, p)) <= config.max_prompt_tokens]


def _reward(name: str, longest: int):
    """A function of kit.training.rewards under its own name, which TRL's log uses."""
    function = getattr(rewards, name)
    return update_wrapper(partial(function, longest=longest), function)


def group_losses(model: Model, prompt: Prompt, texts: Sequence[str], advantages) -> dict:
    """The loss of one group of answers in the first step, by the way its tokens are averaged (of
    LOSSES): by hand, and by TRL's trainer.

    Nothing has been trained, so that every ratio is 1 and the KL divergence 0, and what is left of
    the loss of a token is minus the advantage of its answer.
    """
    import datasets
    import trl

    end = [model.tokenizer.eos_token_id]  # all there is of an empty answer
    answers = [model.tokenizer(text)["input_ids"] or end for text in texts]
    counts, advantages = [len(ids) for ids in answers], [float(a) for a in advantages]
    per_token = -sum(a * n for a, n in zip(advantages, counts)) / sum(counts)
    by_hand = {"grpo": -sum(advantages) / len(advantages), "bnpo": per_token}

    size = len(texts)
    config = GRPOConfig(groups=1, size=size, micro_batch=size, beta=0.0, rollouts="transformers",
                        rewards=("accuracy",), weights=(1.0,))  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        trainer = corrected_trainer()(
            twin(model.weights, torch.float32),  # accelerate leaves its own `forward` on it
            [_reward("accuracy", config.longest)],
            trl.GRPOConfig(**_settings(config, model, Path(place))),
            train_dataset=datasets.Dataset.from_list([{"prompt": "-"}]),
            processing_class=model.tokenizer,
        )
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in answers], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(counts)[:, None]
    asked = torch.tensor([tokenize(model, prompt)] * size)
    batch = {"prompt_ids": asked, "prompt_mask": torch.ones_like(asked)}
    batch |= {"completion_ids": ids, "completion_mask": mask.long()}
    batch["advantages"] = torch.tensor(advantages)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    trainer.current_gradient_accumulation_steps, losses = 1, {}
    for kind, expected in by_hand.items():
        trainer.loss_type = kind
        with torch.no_grad():
            losses[kind] = expected, float(trainer.compute_loss(trainer.model.train(), batch))
    return losses


def launch(
    base: str,
    questions: Sequence[Prompt],
    config: GRPOConfig,
    folder: Path,
    report: Callable[[dict], None] = lambda figures: None,
    processes: int = 2,
) -> Path:
    """`grpo` in several processes of this machine by `accelerate launch`; `report` as there.

    Starts as many of `processes` as share the completions of a step evenly. RuntimeError naming the
    log file where it fails; run again, it continues.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    count = usable_processes(config, processes)
    if count < processes:
        whole = config.groups * config.size
        print(f"{count} of {processes} processes: {whole} completions of a step divide by {count}")
    collect()  # the processes may need what is not in use here
    rows = [asdict(prompt) for prompt in questions]
    text = json.dumps({"base": base, "recipe": asdict(config), "asked": rows})
    job, log = folder / "job.json", folder / "job.log"
    job.write_text(text)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP)]
    command += [
        "--num_processes",
        str(count),
        "-m",
        "kit",
        "grpo",
        str(folder),
        "--job",
        str(job),
    ]
    message = ""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=paths.ROOT
        ) as run,
    ):
        for message in run.stdout:
            if message.startswith("{"):
                report(json.loads(message))
    if run.returncode:
        raise RuntimeError(f"accelerate launch ended with {run.returncode}; see {log}.")
    return Path(message.strip())


def run_job(file: Path, folder: Path, verbose: bool) -> Path:
    """One process of `launch`: trains as `file` says; `verbose` prints the metrics of each step as
    JSON. The folder of the trained model."""
    job = json.loads(file.read_text())
    prompts_ = []
    for row in job["asked"]:
        messages = tuple((role, content) for role, content in row["messages"])
        prompts_.append(Prompt(Problem(**row["problem"]), row["arm"], messages, row["thinking"]))
    report = partial(print, flush=True) if verbose else lambda line: None
    config = GRPOConfig(**job["recipe"])
    return grpo(job["base"], prompts_, config, folder, lambda row: report(json.dumps(row)))
