"""The terminal: `python -m kit reproduce | status | advise | report | bundle | verify | diff`.

Turns flags into calls and results into plain text. `make reproduce` hands PROFILE, FROM, ONLY
and FORCE on as flags. Decides nothing about results: verdicts come from
results/07_verdicts.json as notebook 07 left them.
"""

import argparse
import functools
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

from kit.paths import PUBLISHED, run_dir
from kit.pipeline import refusals, stages
from kit.pipeline import run as pipeline
from kit.pipeline.preflight import preflight
from kit.pipeline.provenance import unusable_gpu
from kit.pipeline.refusals import Refused
from kit.report import summary

UNMEASURED = "not measured yet"  # as in kit.analysis.claims, whose import takes a second
KEEP_GOING = "go on after a failed notebook: none needs another but 07, which judges what there is"
EXIT_CODES = """exit status:
  0    everything asked for is up to date
  1    a stage failed, the disk is full, or preflight found too little disk
  2    a flag, profile, notebook or folder is wrong; the sentence says what to change
  3    another run works in the same outputs folder
  130  interrupted; the same command goes on from there"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status that --help documents."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit is like Ctrl-C
    try:
        profile = args.profile or default_profile()
        code = args.command(profile, args)
        sys.stdout.flush()
        return code
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return refusal.code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        refusal = refusals.of_system(error)
        if refusal is None:
            raise
        print(refusal, file=sys.stderr)
        return refusal.code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def default_profile() -> str:
    """quick, whatever the machine; a GPU that torch cannot use is refused, not passed over."""
    if why := unusable_gpu():
        raise Refused(why, 2)
    return "quick"


def _reproduce(profile: str, args: argparse.Namespace) -> int:
    pipeline.say(f"profile {profile}")
    every = stages.load_stages(profile)
    chosen = stages.select(every, args.from_, args.only)
    forced = chosen if args.force else chosen[:1] if args.from_ else []
    todo = [stage for stage in chosen if stage in forced
            or stages.freshness(stage, every[: every.index(stage)])[0] != "fresh"]  # fmt: skip
    times = {}
    if todo:
        preflight(profile, force=args.force)
        times = summary.estimated(profile, todo)
    how = dict(from_=args.from_, only=args.only, force=args.force, keep_going=args.keep_going)
    code = pipeline.run(profile, **how, expected=times, after=summary.after(todo, times))
    if code == 0 or (code == pipeline.FAILED and args.keep_going):
        if chosen[-1].judges:
            print_verdicts(saved_verdicts(profile))
            print_reference(profile)
        print_paths(profile)
        summary.larger(profile)
    return code


def _status(profile: str, args: argparse.Namespace) -> int:
    from tabulate import tabulate

    rows, earlier = [], []
    for stage in stages.load_stages(profile):
        word, why = stages.freshness(stage, earlier)
        if now := pipeline.running(stage):
            word, why = "running", now
        done = stage.status() or {}
        wall = pipeline.clock(done["wall_seconds"]) if done else ""
        rows.append([stage.name, word, why, wall, done.get("finished", "")])
        earlier.append(stage)
    heads = ["stage", "state", "why", "wall time", "finished (UTC)"]
    if args.json:
        print(json.dumps([dict(zip(heads, row)) for row in rows], indent=1))
        return 0
    print(f"profile {profile}")
    print(tabulate(rows, heads))
    return 0


def _advise(profile: str, args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from kit import hub
    from kit.budget import advisor as advise
    from kit.budget import ledger

    try:
        memory, context = advise.size(args.memory), advise.tokens(args.context)
        sizes = advise.sizes(args.model)
        rows = advise.load(run_dir(profile), args.model)
        found = advise.measured(sizes, context, rows) if rows else advise.options(sizes, context)
        chosen, why = advise.choose(found, memory)
    except (ValueError, hub.HubError) as error:
        raise Refused(str(error), 2) from error
    if args.json:
        totals = {each: each.configuration.total() for each in found}
        rows = [
            {"name": each.name, "bytes": total, "fits": total <= memory, "accuracy": each.accuracy}
            for each, total in totals.items()
        ]
        print(json.dumps({"run": chosen.name, "why": why, "configurations": rows}, indent=1))
        return 0
    print(f"{args.model} at {context:,} tokens in {ledger.text(memory)}\n")
    shown = advise.table(found if rows else advise.narrow(found, chosen), memory)
    print(
        tabulate(
            shown, ["configuration", "GiB", "fits", "accuracy, percent"], disable_numparse=True
        )
    )
    print(f"\nRun: {chosen.name}\nWhy: {why}\n")
    print("\n".join(advise.arithmetic(chosen)))
    return 0


def _report(profile: str, _: argparse.Namespace) -> int:
    """Bring notebook 07, which writes the page, up to date."""
    code = pipeline.run(profile, only="07")
    if code == 0:
        print_paths(profile)
    return code


def _bundle(profile: str, _: argparse.Namespace) -> int:
    from kit.report import bundle

    try:
        made = bundle.write(profile)
    except ValueError as error:
        raise Refused(str(error), 2) from error
    print(f"{pipeline.short(made)}, {made.stat().st_size / 1e6:.1f} MB")
    if left := stages.incomplete(stages.load_stages(profile, outputs=made.parent.parent)):
        print(f"INCOMPLETE: {left}")
    return 0


def _verify(_: str, args: argparse.Namespace) -> int:
    from kit.report import bundle, verify

    differs, tell = False, (lambda _: None) if args.json else functools.partial(print, flush=True)
    for place in args.file or verify.published():
        tell(pipeline.short(place.resolve()))
        try:
            checked = verify.check(place, lambda line: tell(f"  {line}"))
            tell("\n".join(verify.summary(checked)))
            if checked.verdicts is not None and not args.json:
                print_verdicts(checked.verdicts.to_dict("records"))
            page = verify.write_report(checked)
        except bundle.Damaged as error:
            raise Refused(str(error), 2) from error
        tell(f"\nReport:    {pipeline.short(page) if page else 'none, see what is damaged'}\n")
        if args.json:
            print(json.dumps({"differs": checked.wrong, "not_recomputed": checked.left}))
        differs |= bool(checked.wrong)
    return int(differs)


def _diff(_: str, args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from kit.report import bundle
    from kit.report import published as reference

    try:
        runs = [bundle.read(place if place.exists() else run_dir(str(place)))
                for place in (args.one, args.other)]  # fmt: skip
    except ValueError as error:  # Damaged is one, and so is a profile that there is not
        raise Refused(str(error), 2) from error
    found = reference.diff(*runs)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    names = [str(place) for place in (args.one, args.other)]
    heads = {"numbers": ["claim", *names, "moved"], "verdicts": ["claim", *names]}
    heads["environment"] = ["what", *names]
    for part, rows in found.items():
        print(f"{part}: {len(rows)} differ")
        if rows:
            wide = [34] * len(heads[part])
            print(tabulate(rows, heads[part], maxcolwidths=wide, disable_numparse=True))
    return 0


def saved_verdicts(profile: str) -> list[dict]:
    """What notebook 07 saved, a row per claim; [] where it has not run."""
    file = run_dir(profile) / "results" / "07_verdicts.json"
    return refusals.read_json(file)["verdicts"] if file.is_file() else []


def print_verdicts(verdicts: list[dict]) -> None:
    """The measured claims in full, the others counted; nothing where there are none."""
    if not verdicts:
        return
    from tabulate import tabulate

    columns = ["claim", "system", "published", "measured", "verdict", "reason"]
    measured = [row for row in verdicts if row["measured"] not in (None, "")]
    others = [row for row in verdicts if row["measured"] in (None, "")]
    counts = Counter(row["verdict"] or UNMEASURED for row in verdicts)
    print("\nVerdicts: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    rows = [[row[column] for column in columns] for row in measured]
    if rows:
        print(tabulate(rows, columns, maxcolwidths=[30, 16, 16, 16, 16, 36], disable_numparse=True))
    for verdict, n in Counter(row["verdict"] or UNMEASURED for row in others).most_common():
        alike = [row["system"] for row in others if (row["verdict"] or UNMEASURED) == verdict]
        each = ", ".join(f"{system} {k}" for system, k in sorted(Counter(alike).items()))
        print(f"{verdict}: {n} ({each})")


def print_reference(profile: str, published: Path = PUBLISHED) -> None:
    """How this run differs from the published one of its profile, where there is one."""
    if not (published / profile).is_dir():
        return
    from kit.report import bundle
    from kit.report import published as reference

    runs = bundle.read(published / profile), bundle.read(run_dir(profile))
    print("\n" + "\n".join(reference.against(*runs)))


def print_paths(profile: str) -> None:
    """Where the report and the executed notebooks lie."""
    report = run_dir(profile) / "report.html"
    print()
    if report.is_file():
        print(f"Report:    {pipeline.short(report)}")
    print(f"Notebooks: {pipeline.short(run_dir(profile) / 'notebooks')}")


COMMANDS = {  # name: function, what it does, an example, what its exit status means
    "reproduce": (_reproduce, "run every notebook whose result is not up to date, then print the "
                  "verdicts", "reproduce --profile laptop --only 05", EXIT_CODES),
    "status": (_status, "say which notebooks are up to date, and why not", "status --json", ""),
    "advise": (_advise, "say what of a model fits into a memory, and why", "advise --memory 24GiB "
               "--model hub:Qwen/Qwen3-4B-Instruct-2507 --context 32k", ""),
    "report": (_report, "write the page again from what has been measured", "report", ""),
    "bundle": (_bundle, "pack a run into one zip for a paper", "bundle --profile laptop", ""),
    "verify": (_verify, "judge runs again without a model: hashes, verdicts, tables; all that is "
               "published where no file is given", "verify bundle.zip",
               "exit status: 0 nothing differs, 1 something does, 2 no bundle"),
    "diff": (_diff, "say where two runs differ: numbers beyond noise, verdicts, environment",
             "diff laptop theirs.zip", ""),
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m kit",
        description="What does memory buy a small language model, per byte?",
        epilog=EXIT_CODES,
        formatter_class=raw,
    )
    commands, made = parser.add_subparsers(required=True, metavar="command"), {}
    for name, (command, does, example, ends) in COMMANDS.items():
        epilog = f"example: python -m kit {example}\n\n{ends}"
        made[name] = commands.add_parser(name, help=does, epilog=epilog, formatter_class=raw)
        made[name].set_defaults(command=command)
        if name in ("verify", "diff"):
            made[name].set_defaults(profile="laptop")
        else:
            made[name].add_argument("--profile", help="tour, laptop, ... (default: quick)")
        if name in ("status", "advise", "verify", "diff"):
            made[name].add_argument("--json", action="store_true", help="for a script")
    reproduce, advise = made["reproduce"], made["advise"]
    reproduce.add_argument("--from", dest="from_", metavar="NN", help="run again from here on")
    reproduce.add_argument("--only", metavar="NN", help="bring only this notebook up to date")
    reproduce.add_argument("--force", action="store_true", help="run again what is up to date")
    reproduce.add_argument("--keep-going", action="store_true", help=KEEP_GOING)
    advise.add_argument("--memory", required=True, help="of the device: 24GiB, or 24GB")
    advise.add_argument("--model", required=True, help="hub:ORG/NAME, a folder, or the bundled one")
    advise.add_argument("--context", required=True, help="tokens of a question and its answer: 32k")
    made["verify"].add_argument(
        "file", type=Path, nargs="*", help="a bundle, zipped or unpacked, or a published folder"
    )
    for name in ("one", "other"):
        made["diff"].add_argument(
            name, type=Path, help="a bundle, a folder of outputs, or a profile"
        )
    return parser
