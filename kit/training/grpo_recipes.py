"""How GRPO is done: parameter sets, and the mix of problems.

Sources: Open-RS (arXiv 2503.16219), its recipes/grpo.yaml at 2889c47.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from kit.schema import Problem, digest
from kit.training import rewards

ROLLOUTS = ("kit", "transformers", "vllm", "vllm-server")
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
    rewards: tuple[str, ...] = ("accuracy", "compliance")  # functions of kit.training.rewards
    weights: tuple[float, ...] = (1.0, 0.2)
    longest: int = 64  # of the cosine reward: tokens, or characters as published
    suffix: str = ""  # added to the instruction
    lora_rank: int = 0
    rollouts: str = "kit"
    save_every: int = 10
    keep_every: int = 10  # steps between two models that are kept, see tune.Recipe
    seed: int = 0

    @property
    def completions(self) -> int:
        """Of the whole training."""
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


# 12 problems x 6 completions a step: 3 processes x 6 x 4 accumulated, as published.
OPEN_RS_1 = Recipe(
    steps=500, groups=12, size=6, micro_batch=6, max_new_tokens=4096, temperature=0.7,
    learning_rate=1e-6, schedule="cosine_with_min_lr", rewards=("accuracy", "think"),
    weights=(1.0, 1.0), longest=4096, rollouts="vllm", save_every=50, keep_every=50, seed=42,
)  # fmt: skip
OPEN_RS_2 = dataclasses.replace(OPEN_RS_1, max_new_tokens=3584, longest=3584)
OPEN_RS_3 = dataclasses.replace(
    OPEN_RS_2, rewards=("cosine_published", "think"), weights=(2.0, 1.0), suffix=ENGLISH
)
RECIPES = {"laptop": Recipe(), "open-rs-1": OPEN_RS_1}
RECIPES |= {"open-rs-2": OPEN_RS_2, "open-rs-3": OPEN_RS_3}


def runnable(recipe: Recipe) -> Recipe:
    """`recipe` with rollouts by `kit.inference.decode` where it asks for a vLLM that is not
    installed."""
    if recipe.rollouts == "vllm" and find_spec("vllm") is None:
        return dataclasses.replace(recipe, rollouts="kit")
    return recipe


def processes(recipe: Recipe, most: int) -> int:
    """As many processes, at most `most`, as can share the completions of a step evenly."""
    return max(n for n in range(1, most + 1) if recipe.groups * recipe.size % n == 0)


def mixed(problems: Sequence[Problem], easy: int, hard: int, seed: int = 0) -> list[Problem]:
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
