"""Tokens/s of vLLM: `python vllm_rate.py FOLDER BATCH PROMPT NEW`, a line of JSON.

FOLDER holds a config.json alone: weights are random, and prompts are ids without a tokenizer.
"""

import json
import sys
import time

import vllm


def main(folder: str, batch: int, prompt: int, new: int) -> dict:
    engine = vllm.LLM(folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16")
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    seconds = 0.0
    for turn in range(2):  # the first one warms up; no prefix is met twice
        asked = [
            {"prompt_token_ids": [3 + turn + 10 * i, *range(100, 99 + prompt)]}
            for i in range(batch)
        ]
        began = time.perf_counter()
        engine.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
    return {"tokens_s": batch * new / seconds, "version": vllm.__version__}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
