"""`make bench`: run every bench_*.py beside this file, print a table, write outputs/bench.json.

`python -m tests.bench NAME` runs only the file or the figure of that name. A bench is a module
with `run() -> {figure: {value, unit, against, n, spread}}`; a figure that cannot be measured here
has the reason under `skipped`. Figures of earlier runs stay in the file until measured again.
"""

import importlib
import json
import sys
from pathlib import Path

from kit import paths
from kit.pipeline import provenance

FIGURES = {
    "bench_decode": ("decode_vs_transformers", "decode_vs_llamacpp"),
    "bench_grade": ("grade_per_s",),
    "bench_dms": (
        "dms8_decode_vs_full_8000",
        "dms8_decode_vs_transformers_8000",
        "dms8_kv_bytes_vs_full",
        "dms_train_s_per_step",
    ),
    "bench_engine": ("dspy_batching",),
    "bench_bank": (
        "bank_search_p50_ms",
        "bank_recall_at_5",
        "bank_add_10k_s",
        "bank_small_writes_search_ms",
    ),
    "bench_tune": ("sft_s_per_step", "grpo_s_per_step", "grpo_kit_vs_transformers"),
    "bench_parametric": (
        "bank_fetch_p99_ms_cold",
        "bank_fetch_p99_ms_warm",
        "bank_resident_mib",
        "parametric_decode_overhead",
        "parametric_token_p99_ms",
        "bank_two_processes_mib",
    ),
    "bench_clusters": ("assign_1m_s",),
    "bench_sweep": ("sweep_overhead_ms",),
    "bench_kernels": ("gpu_attention_bandwidth_share", "gpu_dms8_decode_vs_sdpa_32k"),
}


def main(only: str | None) -> int:
    chosen = [name for name, figures in FIGURES.items() if only in (None, name, *figures)]
    if not chosen:
        known = ", ".join(figure for figures in FIGURES.values() for figure in figures)
        print(f"No bench called {only!r}; known: {known}.")
        return 2
    file = paths.OUTPUTS / "bench.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    here = provenance.collect()
    machine = f"{here['hardware']['cpu']}, {here['hardware']['cores']} cores"
    for name in chosen:
        for figure, found in importlib.import_module(f"tests.bench.{name}").run().items():
            results[figure] = {**found, "machine": machine, "commit": here["commit"][:10]}
            print(_line(figure, results[figure]), flush=True)
            provenance.write_json(file, results)
    return 0


def _line(figure: str, found: dict) -> str:
    if "skipped" in found:
        return f"{figure:32} skipped: {found['skipped']}"
    low, high = found["spread"]
    value = f"{found['value']:.3g} {found['unit']} [{low:.3g}, {high:.3g}]"
    return f"{figure:32} {value:28} against {found['against']}, n = {found['n']}"


if __name__ == "__main__":
    Path(paths.OUTPUTS).mkdir(exist_ok=True)
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
