"""The advisor: which configurations of a model fit into a given memory, and which one to run.

Bytes come from the ledger (`kit.budget.ledger`), accuracies from notebook 06 on this machine. Where
it has not measured the model at such a length, the order is: the whole cache before an evicted one,
8 bit or more before 4, first of the weights and then of the cache, then votes, each with a whole
cache of its own, and 16 bit. `reasons` says what stands behind each step:
https://arxiv.org/abs/2510.10964 (findings 1 to 3), or what this kit measured.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from kit import hub
from kit.budget import ledger
from kit.budget.ledger import QWEN3, Architecture, Configuration, Packing
from kit.inference.policies import held_tokens
from kit.models import adapter, quantization
from kit.models.load import BUNDLED, local
from kit.pipeline.errors import read_json

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
UNITS |= {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
WIDTHS = (1, 4, 8, 16)
KV_BITS, KEPT = (16, 8, 4), (1.0, 0.5, 0.25)
SWITCH = sum(ledger.weights(QWEN3["Qwen3-4B"], Packing(8)).values())  # bytes: findings 1 and 3
VOTES = ((16.4e9, 4), (28.9e9, 8))  # from so many bytes on so many votes pay: finding 3
EVICTION = "TOVA"  # the policy meant by an evicted cache, `kit.inference.policies.TOVA`
RESERVE = 0.1  # of the memory: runtime, activations, logits; as much as vLLM leaves by default
PAPER = "published (arXiv 2510.10964, finding {})"
HERE = "inferred (measured on the bundled model)"


class DoesNotFitError(ValueError):
    """No configuration fits; the message states the shortfall."""


@dataclass(frozen=True)
class Option:
    """One configuration and, where it was measured, its accuracy (percent: estimate, low, high)."""

    configuration: Configuration
    accuracy: tuple[float, float, float] | None = None
    policy: str = ""
    answered: int = 0  # new tokens with which the accuracy was measured

    @property
    def name(self) -> str:
        """Human-readable."""
        c = self.configuration
        evicted = f"evicted to {100 * c.kept:.0f}% by {EVICTION}"
        cache = self.policy or ("whole" if c.kept == 1 else evicted)
        votes = f", {c.width} votes" if c.width > 1 else ""
        return f"weights {c.packing.bits}-bit, cache {cache} at {c.kv_bits}-bit{votes}"


def size(text: str) -> int:
    """Bytes of "24GiB" or "24 GB"; ValueError for a unit that could be either."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not match or match[2] not in UNITS:
        raise ValueError(
            f"memory is {text!r}; write a number and one of {', '.join(UNITS)}, for example "
            f"24GiB: a GiB is 7% more than a GB"
        )
    return round(float(match[1]) * UNITS[match[2]])


def tokens(text: str) -> int:
    """Tokens of "32k" or "32000"; k is a thousand."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(k?)\s*", text)
    if not match or not float(match[1]):
        raise ValueError(f"context is {text!r}; write tokens, for example 32k or 32000")
    return round(float(match[1]) * (1000 if match[2] else 1))


def sizes(name: str) -> Architecture:
    """The architecture of a model by name, from its config.json; of one on the hub without its
    weights, and that of Qwen3 models without a network. An adapter has that of its model."""
    if name.startswith("hub:"):
        repo, _, commit = name.removeprefix("hub:").partition("@")
        try:
            file, _ = hub.fetch(repo, "config.json", "model", commit or None)
        except hub.HubError:
            names = [key for key in QWEN3 if repo.startswith(f"Qwen/{key}")]
            if not names:
                raise
            known = QWEN3[max(names, key=len)]
            same = repo == f"Qwen/{max(names, key=len)}"  # else another context, such as of -2507
            return known if same else replace(known, context=0)
        folder = file.parent
    else:
        folder, _ = local(name)
    if (folder / "adapter_config.json").is_file():
        return sizes(adapter.base(folder))
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json in {name!r}; give a folder, hub:ORG/NAME or "
                         f"{BUNDLED}")  # fmt: skip
    return ledger.architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def options(a: Architecture, context: int) -> list[Option]:
    """All configurations at `context` tokens, without accuracies."""
    return [
        Option(
            Configuration(a, ledger.packing(bits), context, width, share, ledger.cache(a, kv_bits))
        )
        for bits in (16, *quantization.BITS)
        for kv_bits in KV_BITS
        for share in KEPT
        for width in WIDTHS
    ]


def measured(a: Architecture, context: int, rows: Sequence[dict]) -> list[Option]:
    """The scenarios that a sweep measured, with their bytes at `context` tokens; a policy with a
    budget keeps as many tokens as it did. Of those that differ in answer length only, the most
    accurate."""
    best: dict[tuple, dict] = {}
    for row in rows:
        if row["memory"]:
            continue
        key = row["bits"], row["policy"], row["kv_bits"], row["width"]
        if key not in best or best[key]["accuracy"][0] < row["accuracy"][0]:
            best[key] = row
    return [
        Option(
            Configuration(
                a, ledger.packing(row["bits"]), context, row["width"], _kept_fraction(row, context),
                ledger.cache(a, row["kv_bits"]),
            ),
            tuple(row["accuracy"]),
            row["policy"],
            row["tokens"],
        )
        for row in best.values()
    ]  # fmt: skip


def _kept_fraction(row: dict, context: int) -> float:
    tokens = held_tokens(row["policy"])
    return row["kept"] if tokens is None else min(1.0, tokens / context)


def candidates(a: Architecture, context: int, rows: Sequence[dict]) -> list[Option]:
    """The configurations that may be run at `context` tokens: what the sweep in `rows` measured, if
    it read sequences as long, else all configurations. ValueError where the model reads fewer
    tokens."""
    if 0 < a.context < context:
        raise ValueError(
            f"context is {context:,} tokens, and this model reads {a.context:,} at most by its "
            f"config.json; ask for a shorter one, or for another model"
        )
    each = ledger.keys_and_values(a, 1)
    whole = [row["kv_bytes"] / each / row["width"] for row in rows
             if row["kv_bits"] == 16 and row["kept"] == 1 and not row["memory"]]  # fmt: skip
    as_long = context <= max(whole, default=0)
    return measured(a, context, rows) if as_long else options(a, context)


def usable(memory: int) -> int:
    """Bytes of `memory` that weights and caches may take: all but the RESERVE."""
    return round((1 - RESERVE) * memory)


def choose(option_list: Sequence[Option], memory: int) -> tuple[Option, str]:
    """The option to run within the `usable` part of `memory` bytes, and why; DoesNotFitError where
    none fits.

    Where accuracy was measured, the smallest within one standard error of the most accurate: the
    best of many is so in part by chance (the one-standard-error rule, Breiman et al. 1984, section
    3.4.3). Else in the order that `reasons` gives reasons for.
    """
    available = usable(memory)
    fits = [option for option in option_list if option.configuration.total() <= available]
    if not fits:
        least = min(option_list, key=lambda option: option.configuration.total())
        need = least.configuration.total()
        raise DoesNotFitError(
            f"nothing fits into {ledger.text(memory)}, of which {100 * RESERVE:.0f}% are reserved: "
            f"the smallest, {least.name}, needs {ledger.text(need)}, "
            f"{ledger.text(need - available)} more; take a smaller model or a shorter context"
        )
    if all(option.accuracy for option in fits):
        top = max(fits, key=lambda option: option.accuracy[0])
        estimate, low, _ = top.accuracy
        enough = estimate - (estimate - low) / 1.96 - 1e-9
        close = [option for option in fits if option.accuracy[0] >= enough]
        best = min(close, key=lambda o: (o.configuration.total(), -o.accuracy[0]))
        return best, (
            f"measured here with answers of at most {best.answered} tokens; the smallest of "
            f"{len(close)} within one standard error of the most accurate of {len(fits)} that fit "
            f"({top.name}, {estimate:.1f} percent), whose lead is in part luck"
        )
    most = paying_votes(fits[0].configuration.architecture, memory)

    def preference(option: Option) -> tuple:
        c = option.configuration
        votes = c.width if c.width <= most and c.kept == 1 else -c.width
        return c.kept, c.packing.bits >= 8, c.kv_bits >= 8, votes, c.packing.bits, c.kv_bits

    best = max(fits, key=preference)
    return best, "not measured here; " + "; ".join(text for text, _ in reasons(best, memory))


def paying_votes(a: Architecture, memory: int) -> int:
    """Answers to vote over that pay, by finding 3: one below an 8-bit Qwen3-4B."""
    large = sum(ledger.weights(a, Packing(8)).values()) >= SWITCH
    return max([1, *(count for least, count in VOTES if large and memory >= least)])


def reasons(option: Option, memory: int) -> list[tuple[str, str]]:
    """Why an option is advised: sentences, each with its evidence, which is measured here,
    published, inferred, computed or assumed."""
    c = option.configuration
    most = paying_votes(c.architecture, memory)
    needs = [
        (f"{ledger.text(c.total())} in all",
         "computed: from config.json, within 5% of what is allocated"),
        (f"{ledger.text(memory - usable(memory))} are left free",
         "assumed: runtime, activations and logits"),
    ]  # fmt: skip
    if option.accuracy:
        accuracy = "{:.1f} percent [{:.1f}, {:.1f}]".format(*option.accuracy)
        how = f"measured here: notebook 06, answers of at most {option.answered} tokens"
        return [(f"accuracy {accuracy}", how), *needs]
    if c.kept == 1:
        cache = "the cache is whole, since bits cost less than tokens"
        why = "untrained eviction to 60% costs 0.24 nats a token, a 4-bit cache 0.01 (LOG.md)"
    else:
        cache = f"the cache is evicted to {100 * c.kept:.0f}% as even 4 bit do not fit whole"
        why = (f"{EVICTION} costs least of the untrained policies at a third of the cache; a "
               f"trained DMS evictor costs less still (notebook 03)")  # fmt: skip
    if c.packing.bits >= 8:
        weights = f"{c.packing.bits}-bit weights"
        bits = (f"{HERE}: 8 bit cost 0.001 nats a token, 4 bit 0.31; and {PAPER.format(2)}: "
                f"mathematics needs 8 bit")  # fmt: skip
    else:
        weights = "4-bit weights, since 8 bit do not fit beside this cache"
        bits = f"{PAPER.format(2)}: enough for knowledge, not for mathematics"
    return [
        (cache, f"{HERE}: {why}"),
        (weights, bits),
        (f"keys and values at {c.kv_bits} bit",
         f"{HERE}: 8 bit cost next to nothing, 4 bit 0.01 nats a token"),
        (f"{c.width} votes" if c.width > 1 else "one answer",
         f"{PAPER.format(3)}: votes pay from an 8-bit Qwen3-4B on, up to {most} in this memory; "
         f"each with a cache of its own"),
        *needs,
    ]  # fmt: skip


def load(folder: Path, model: str) -> list[dict]:
    """The scenarios that notebook 06 saved under the run folder for `model`; [] where none."""
    file = Path(folder) / "results" / "06_memory_budget.json"
    if not file.is_file():
        return []
    saved = read_json(file)["scenarios"]
    return [row for row in saved if row["model"] == model]


def arithmetic(option: Option) -> list[str]:
    """The computation of an option's bytes, one line per nonempty part."""
    c, a = option.configuration, option.configuration.architecture
    cache = c.quantized.bits_per_value if c.quantized else 16
    formulas = {
        "linear weights": f"{a.linear_parameters:,} x {c.packing.bits} bit",
        "scales and zeros": f"one of each, 16 bit, per {c.packing.group} weights",
        "embeddings": f"{a.embedding_parameters:,} x 16 bit" + ", also the head" * a.tied,
        "norms": f"{a.norms:,} x 16 bit",
        "keys and values": f"{c.width} x {c.tokens:,} tokens x {c.kept:.3g} kept x "
        f"{a.kv_numbers(1):,.0f} numbers x {cache:g} bit",
    }
    parts = {name: count for name, count in c.parts().items() if count}
    lines = [
        f"{name:17}{ledger.text(n):>24}  {formulas.get(name, '')}" for name, n in parts.items()
    ]
    return [*lines, f"{'in all':17}{ledger.text(c.total()):>24}"]


def table(option_list: Sequence[Option], memory: int) -> list[list]:
    """Rows for display: configuration, GiB, whether it fits into the `usable` part of `memory`,
    accuracy; smallest first."""
    rows, memory = [], usable(memory)
    for option in sorted(option_list, key=lambda option: option.configuration.total()):
        total = option.configuration.total()
        fits = "yes" if total <= memory else f"{(total - memory) / ledger.GIB:.2f} GiB too much"
        accuracy = option.accuracy and "{:.1f} [{:.1f}, {:.1f}]".format(*option.accuracy)
        rows.append([option.name, f"{total / ledger.GIB:.2f}", fits, accuracy or ""])
    return rows


def narrow(option_list: Sequence[Option], chosen: Option) -> list[Option]:
    """Options that differ from the chosen one in at most one respect, to keep a table short."""
    names = [field.name for field in dataclasses.fields(Configuration)]

    def differ(option: Option) -> int:
        pair = option.configuration, chosen.configuration
        return sum(getattr(pair[0], name) != getattr(pair[1], name) for name in names)

    return [option for option in option_list if differ(option) <= 1]
