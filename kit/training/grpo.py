r"""Group relative policy optimisation on graded problems, by TRL.

    python -m kit.training.grpo FOLDER --recipe laptop
    accelerate launch --config_file data/launch/fsdp.yaml -m kit.training.grpo FOLDER \
        --recipe open-rs-2 --model hub:ORG/NAME --problems open-rs

Rollouts come from `kit.inference.decode` ("kit"), from transformers, or from vLLM where that is
installed: in the training processes ("vllm"), or from a server that `trl vllm-serve --model NAME`
runs on a GPU of its own ("vllm-server").
Weights are kept in float32, and trained under autocast where the device computes in bfloat16. Where
the sampler is not the model that is trained, the gap between their log-probabilities is logged, and
corrected by truncated importance weights as TRL does for vLLM.

Sources: GRPO, arXiv 2402.03300; Open-RS, arXiv 2503.16219 and its recipes/grpo.yaml at 2889c47.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial, update_wrapper
from pathlib import Path

from tqdm.auto import tqdm

from kit import paths
from kit.data import problems, prompts
from kit.dms import evictor
from kit.inference.policies import DMS, Full
from kit.models import load as models
from kit.schema import Problem, Prompt, digest
from kit.training import grpo_recipes, rewards, rollouts
from kit.training.callbacks import Watch
from kit.training.grpo_recipes import RECIPES, ROLLOUTS, Recipe, mixed
from kit.training.sft import VERSIONS, alone, common, computed, identity, lora, train

DDP = paths.DATA / "launch" / "ddp.yaml"


@alone
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
    data = digest([[p.id, p.problem.answer, p.problem.asks] for p in asked], 12)
    parts = ["grpo", model.weights_hash, data, identity(recipe), policy.key]
    parts += [computed(model), VERSIONS]
    place = Path(folder) / digest(parts, 12)
    if (place / "model" / "card.json").is_file():
        return place / "model"
    if not model.weights.config.architectures:
        _name_architecture(model, place / f"reference-{os.environ.get('RANK', 0)}")
    rows = [
        {"prompt": _chat(p, recipe.suffix), "gold": p.problem.answer, "asks": p.problem.asks}
        for p in asked
    ]
    sampler = rollouts.Sampler(model, recipe, policy)
    trainer = rollouts.trainer_class()(
        model.weights,
        [_reward(name, recipe.longest) for name in recipe.rewards],
        GRPOConfig(**_settings(recipe, model, place)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=model.tokenizer,
        peft_config=lora(recipe.lora_rank) if recipe.lora_rank else None,
        rollout_func=sampler if recipe.rollouts == "kit" else None,
        callbacks=[Watch(report, place)],
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
    count = int(os.environ.get("WORLD_SIZE", 1))  # of processes, set by accelerate
    mine, rest = divmod(recipe.groups * recipe.size, count)
    if rest:
        raise ValueError(
            f"A step has {recipe.groups * recipe.size} completions (groups x size), which {count} "
            f"processes cannot share evenly; start {grpo_recipes.processes(recipe, count)}, "
            f"or change groups."
        )
    at_once = max(n for n in range(1, recipe.micro_batch + 1) if mine % n == 0)
    return common(dataclasses.replace(recipe, micro_batch=at_once), model, place) | dict(
        gradient_accumulation_steps=mine // at_once,
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
        use_vllm=recipe.rollouts.startswith("vllm"),
        vllm_mode="server" if recipe.rollouts == "vllm-server" else "colocate",
    )


def _chat(prompt: Prompt, suffix: str) -> list[dict]:
    messages = prompt.chat
    if suffix:
        messages[-1]["content"] += f"\n{suffix}"
    return messages


def _reward(name: str, longest: int):
    """A function of kit.training.rewards under its own name, which TRL's log uses."""
    function = getattr(rewards, name)
    return update_wrapper(partial(function, longest=longest), function)


def launch(
    base: str,
    asked: Sequence[Prompt],
    recipe: Recipe,
    folder: Path,
    report: Callable[[dict], None] = lambda figures: None,
    processes: int = 2,
) -> Path:
    """What `grpo` does, in several processes of this machine by `accelerate launch`, followed here.

    As many of `processes` as can share the completions of a step evenly. RuntimeError with the file
    of its log where it fails; run again, it goes on.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    count = grpo_recipes.processes(recipe, processes)
    if count < processes:
        whole = recipe.groups * recipe.size
        print(f"{count} of {processes} processes: {whole} completions of a step divide by {count}")
    models.collect()  # the processes may need what is not in use here
    rows = [asdict(prompt) for prompt in asked]
    text = json.dumps({"base": base, "recipe": asdict(recipe), "asked": rows})
    job, log = folder / "job.json", folder / "job.log"
    job.write_text(text)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP)]
    command += [
        "--num_processes",
        str(count),
        "-m",
        "kit.training.grpo",
        str(folder),
        "--job",
        str(job),
    ]
    said = ""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=paths.ROOT
        ) as run,
    ):
        for said in run.stdout:
            if said.startswith("{"):
                report(json.loads(said))
    if run.returncode:
        raise RuntimeError(f"accelerate launch ended with {run.returncode}; see {log}.")
    return Path(said.strip())


def main() -> None:
    """Train a model on the training split of a problem set, from the command line."""
    parser = argparse.ArgumentParser(prog="python -m kit.training.grpo", description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder for checkpoints and the trained model")
    parser.add_argument("--model", default=models.BUNDLED)
    parser.add_argument("--recipe", default="laptop", choices=sorted(RECIPES))
    parser.add_argument("--problems", default="laptop", help="problem set, its train split")
    parser.add_argument("--mix", type=int, nargs=2, metavar=("EASY", "HARD"), help="problems")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--rollouts", choices=ROLLOUTS)
    parser.add_argument("--evictor", type=Path, help="DMS rollouts by this file of kit.dms.train")
    parser.add_argument("--job", type=Path, help="a file by grpo.launch, instead of all others")
    args = parser.parse_args()
    try:
        place = _job(args) if args.job else _asked_for(args)
    except ValueError as error:  # unknown names, bad sizes: one sentence says it
        parser.exit(2, f"{error}\n")
    if not int(os.environ.get("RANK", 0)):  # of several processes one speaks
        print(place)


def _asked_for(args) -> Path:
    """What the flags say, with a progress bar."""
    changes = {name: getattr(args, name) for name in ("steps", "seed", "rollouts")}
    changes = {name: value for name, value in changes.items() if value is not None}
    recipe = dataclasses.replace(RECIPES[args.recipe], **changes)
    found = problems.load(args.problems, "train").problems
    asked = prompts.build(prompts.format_only, mixed(found, *args.mix) if args.mix else found)
    steps = tqdm(total=recipe.steps, unit="step", disable=bool(int(os.environ.get("RANK", 0))))

    def show(figures: dict) -> None:
        steps.set_postfix(reward=f"{figures.get('reward', 0):.3f}")
        steps.update(figures["step"] - steps.n)

    policy = Full()
    if args.evictor:
        policy = DMS(evictor.load(args.evictor, models.load(args.model)))
    return grpo(args.model, asked, recipe, args.out, show, policy)


def _job(args) -> Path:
    """What a file by `launch` says, the figures of each step printed as JSON."""
    job = json.loads(args.job.read_text())
    asked = []
    for row in job["asked"]:
        messages = tuple((role, content) for role, content in row["messages"])
        asked.append(Prompt(Problem(**row["problem"]), row["arm"], messages, row["thinking"]))
    speaks = not int(os.environ.get("RANK", 0))
    report = partial(print, flush=True) if speaks else lambda line: None
    recipe = Recipe(**job["recipe"])
    return grpo(job["base"], asked, recipe, args.out, lambda row: report(json.dumps(row)))


if __name__ == "__main__":
    main()
