"""Group relative policy optimisation on graded problems, by TRL.

    python -m kit.grpo FOLDER --recipe laptop
    accelerate launch -m kit.grpo FOLDER --recipe open-rs-2 --model hub:ORG/NAME

Rollouts come from `kit.decode` ("kit"), from transformers, or from vLLM where that is installed.
Under an eviction policy the sampler is not the model that is trained: the gap between their
log-probabilities is logged, and corrected by truncated importance weights as TRL does for vLLM.

Sources: GRPO, arXiv 2402.03300; Open-RS, arXiv 2503.16219 and its recipes/grpo.yaml at 2889c47.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial, update_wrapper
from pathlib import Path

import torch
from tqdm.auto import tqdm

from kit import models, problems, prompts, rewards, rollouts
from kit.policies import Full
from kit.schema import Prompt, Sampling, digest
from kit.tune import VERSIONS, Watch, common, lora, train

ROLLOUTS = ("kit", "transformers", "vllm")
CLIP = 2.0  # most that an importance weight of the sampler's tokens may be, TRL's default
ENGLISH = "Reply in English only, do not use other languages"  # the prompt of experiment 3


@dataclass(frozen=True)
class Recipe:
    """One way to train. The defaults are those of the laptop."""

    steps: int = 40
    groups: int = 4  # problems per step
    size: int = 8  # completions per problem
    micro_batch: int = 8  # completions read at once in the update
    max_new_tokens: int = 64
    temperature: float = 1.0
    learning_rate: float = 1e-5
    warmup: float = 0.1  # share of the steps
    schedule: str = "constant_with_warmup"
    beta: float = 0.04  # weight of the KL to the start
    rewards: tuple[str, ...] = ("accuracy", "compliance")  # functions of kit.rewards
    weights: tuple[float, ...] = (1.0, 0.2)
    longest: int = 64  # of the cosine reward: tokens, or characters as published
    suffix: str = ""  # added to the instruction
    lora_rank: int = 0
    rollouts: str = "kit"
    save_every: int = 10
    seed: int = 0

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
                f"{ROLLOUTS}, rewards are functions of kit.rewards."
            )


# 12 problems x 6 completions a step: 3 processes x 6 x 4 accumulated, as published.
OPEN_RS_1 = Recipe(
    steps=500, groups=12, size=6, micro_batch=6, max_new_tokens=4096, temperature=0.7,
    learning_rate=1e-6, schedule="cosine_with_min_lr", rewards=("accuracy", "think"),
    weights=(1.0, 1.0), longest=4096, rollouts="vllm", save_every=50, seed=42,
)  # fmt: skip
OPEN_RS_2 = dataclasses.replace(OPEN_RS_1, max_new_tokens=3584, longest=3584)
OPEN_RS_3 = dataclasses.replace(
    OPEN_RS_2, rewards=("cosine_published", "think"), weights=(2.0, 1.0), suffix=ENGLISH
)
RECIPES = {"laptop": Recipe(), "open-rs-1": OPEN_RS_1}
RECIPES |= {"open-rs-2": OPEN_RS_2, "open-rs-3": OPEN_RS_3}


def grpo(
    base: str,
    asked: Sequence[Prompt],
    recipe: Recipe,
    folder: Path,
    report: Callable[[dict], None] = lambda figures: None,
    policy: Full = Full(),  # noqa: B008 (frozen)
    device: str = "auto",
) -> Path:
    """Train `base` on the problems of `asked`; the folder of the trained model, see `tune.sft`.

    `report` gets the figures of each step, which `history.json` keeps: reward and its components,
    length, share finished, share of groups whose rewards are all equal, KL, gradient norm,
    seconds, peak memory. Trained before, it is returned; killed before, it goes on.
    """
    import datasets  # these take seconds to import
    from trl import GRPOConfig

    rewards.check_golds([prompt.problem for prompt in asked])
    if len(asked) < recipe.groups:
        raise ValueError(f"{len(asked)} problems are fewer than the {recipe.groups} of a step.")
    model = models.load(base, dtype="float32", device=device)
    data = digest([[p.id, p.problem.answer] for p in asked], 12)
    parts = ["grpo", model.weights_hash, data, asdict(recipe), policy.key, VERSIONS]
    place = Path(folder) / digest(parts, 12)
    if (place / "model" / "card.json").is_file():
        return place / "model"
    if not model.weights.config.architectures:
        _name_architecture(model, place / "reference")
    rows = [{"prompt": _chat(p, recipe.suffix), "gold": p.problem.answer} for p in asked]
    sampler = partial(_rollouts, model, recipe, policy)
    trainer = trainer_class()(
        model.weights,
        [_reward(name, recipe.longest) for name in recipe.rewards],
        GRPOConfig(**_settings(recipe, model, place)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=model.tokenizer,
        peft_config=lora(recipe.lora_rank) if recipe.lora_rank else None,
        rollout_func=sampler if recipe.rollouts == "kit" else None,
        callbacks=[Figures(report, place)],
    )
    card = {"base": base, "data": data, "problems": len(asked)}
    return train(trainer, model, place, recipe, card)


def _name_architecture(model: models.Model, folder: Path) -> None:
    """A folder of the same weights whose config says what they are, as that of a converted GGUF
    does not: TRL reads the reference model anew from where the config came from."""
    source, config = Path(model.weights.config._name_or_path), model.weights.config
    config.architectures = [type(model.weights).__name__]
    config.save_pretrained(folder)
    for file in source.glob("*.safetensors"):
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file.resolve())
    config._name_or_path = str(folder)


def _settings(recipe: Recipe, model: models.Model, place: Path) -> dict:
    """What TRL is told."""
    at_once = recipe.micro_batch * int(os.environ.get("WORLD_SIZE", 1))  # set by accelerate
    return common(recipe, model, place) | dict(
        gradient_accumulation_steps=max(1, recipe.groups * recipe.size // at_once),
        num_generations=recipe.size,
        max_completion_length=recipe.max_new_tokens,
        temperature=recipe.temperature,
        lr_scheduler_type=recipe.schedule,
        lr_scheduler_kwargs={"min_lr_rate": 0.1} if "min_lr" in recipe.schedule else {},
        warmup_steps=round(recipe.warmup * recipe.steps),
        beta=recipe.beta,
        loss_type="grpo",
        use_bias_correction_kl=False,  # TRL weighs the KL otherwise, the published ones did not
        reward_weights=list(recipe.weights),
        use_vllm=recipe.rollouts == "vllm",
    )


def _chat(prompt: Prompt, suffix: str) -> list[dict]:
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    if suffix:
        messages[-1]["content"] += f"\n{suffix}"
    return messages


def _reward(name: str, longest: int):
    """A function of kit.rewards under its own name, which TRL's log uses."""
    function = getattr(rewards, name)
    return update_wrapper(partial(function, longest=longest), function)


class Figures(Watch):
    """Adds seconds and peak memory to each step's figures, and stops a loss that is no number."""

    def __init__(self, report: Callable[[dict], None], place: Path):
        super().__init__(report, place)
        self._began = time.perf_counter()

    def on_step_begin(self, args, state, control, **_):
        self._began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **rest):
        if "loss" in logs:
            logs["seconds"] = time.perf_counter() - self._began
            if torch.cuda.is_available():
                logs["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
            state.log_history[-1].update(logs)
        super().on_log(args, state, control, logs, **rest)


def _rollouts(model: models.Model, recipe: Recipe, policy: Full, asked: list, trainer) -> dict:
    """What TRL asks of a rollout function, by `kit.decode` with the weights as they are now."""
    weights = trainer.accelerator.unwrap_model(trainer.model)
    weights = weights.get_base_model() if recipe.lora_rank else weights
    seed = int(digest([recipe.seed, trainer.state.global_step], 7), 16)
    sampling = Sampling(recipe.max_new_tokens, recipe.temperature, seed=seed)
    return rollouts.completions(
        dataclasses.replace(model, weights=weights), asked, sampling, policy
    )


def trainer_class():
    """GRPOTrainer, corrected for a sampler that is not the model: made here, since importing TRL
    takes seconds."""
    from trl import GRPOTrainer

    class Corrected(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            if self.use_vllm or "sampling_per_token_logps" not in made:
                return made
            mask, count = made["completion_mask"], made["completion_ids"].size(1)
            whole = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
            masks = torch.cat([made["prompt_mask"], mask], dim=1)
            with torch.no_grad():
                ours = self._get_per_token_logps_and_entropies(self.model, whole, masks, count)[0]
            gap = (ours - made["sampling_per_token_logps"]) * mask
            self._metrics["train"]["sampling/logp_gap"].append(float(gap.abs().sum() / mask.sum()))
            # The clipped objective is linear in the advantage, so weighing one weighs the other.
            made["advantages"] = made["advantages"][:, None] * gap.exp().clamp(max=CLIP)
            return made

    return Corrected


def main() -> None:
    """Train a model on the training split of a problem set, from the command line."""
    parser = argparse.ArgumentParser(prog="python -m kit.grpo", description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder for checkpoints and the trained model")
    parser.add_argument("--model", default=models.BUNDLED)
    parser.add_argument("--recipe", default="laptop", choices=sorted(RECIPES))
    parser.add_argument("--problems", default="laptop", help="problem set, its train split")
    parser.add_argument("--count", type=int, help="training problems (default: all)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    changes = {k: getattr(args, k) for k in ("steps", "seed") if getattr(args, k) is not None}
    recipe = dataclasses.replace(RECIPES[args.recipe], **changes)
    steps = tqdm(total=recipe.steps, unit="step")

    def show(figures: dict) -> None:
        steps.set_postfix(reward=f"{figures.get('reward', 0):.3f}")
        steps.update(figures["step"] - steps.n)

    try:
        given = problems.load(args.problems, "train", n=args.count).problems
        asked = prompts.build(prompts.format_only, given)
        print(grpo(args.model, asked, recipe, args.out, show))
    except ValueError as error:  # unknown names, bad sizes: one sentence says it
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
