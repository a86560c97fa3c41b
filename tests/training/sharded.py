"""One of several processes of a training by GRPO, for test_processes: on a CPU sharded by FSDP if
accelerate's launcher says so, which accelerate itself allows on GPUs only.

    accelerate launch --config_file FILE sharded.py MODEL FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import state
from accelerate.utils import DistributedType

from kit.data import prompts
from kit.schema import Problem
from kit.training import grpo, rewards

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    torch.distributed.init_process_group("gloo")
    state.PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
rewards.odd = lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids]
RECIPE = grpo.GRPOConfig(
    steps=4, groups=2, size=4, micro_batch=4, max_new_tokens=4, learning_rate=1e-3, save_every=2,
    rollouts="transformers", rewards=("odd",), weights=(1.0,),
)  # fmt: skip
ASKED = prompts.build(
    prompts.plain,
    [Problem(f"p{i}", f"What is {i} + {i}?", str(2 * i), "sums", 1, "t") for i in range(6)],
)


def report(figures: dict) -> None:
    if os.environ["RANK"] == "0":
        print(json.dumps(figures), flush=True)
    if str(figures["step"]) == os.environ.get("DIES_AT"):
        os._exit(9)


if __name__ == "__main__":
    place = grpo.grpo(sys.argv[1], ASKED, RECIPE, Path(sys.argv[2]), report)
    print(place, flush=True)
