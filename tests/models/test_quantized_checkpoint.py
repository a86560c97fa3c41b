"""Checkpoints that packers of this file write, number by number, are read as what they mean."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.budget import ledger
from kit.models.load import load
from kit.models.quantization import rename

GROUP = 16
AWQ = {0: 0, 1: 2, 2: 4, 3: 6, 4: 1, 5: 3, 6: 5, 7: 7}  # place in an integer -> column


def put(where: np.ndarray, at: tuple, code: int, bits: int, place: int) -> None:
    where[at] |= np.uint32(code) << np.uint32(bits * place)


def pack_gptq(codes, zeros, bits: int, less: int):
    """AutoGPTQ: codes [inputs, outputs] along inputs, zeros [groups, outputs] along outputs."""
    each = 32 // bits
    weight = np.zeros((codes.shape[0] // each, codes.shape[1]), np.uint32)
    zero = np.zeros((zeros.shape[0], zeros.shape[1] // each), np.uint32)
    for (row, column), code in np.ndenumerate(codes):
        put(weight, (row // each, column), code, bits, row % each)
    for (row, column), code in np.ndenumerate(zeros):
        put(zero, (row, column // each), (code - less) % 2**bits, bits, column % each)
    return weight, zero


def pack_awq(codes, zeros):
    """AutoAWQ, GEMM: both along outputs, in the order of AWQ."""
    packed = []
    for table in (codes, zeros):
        made = np.zeros((table.shape[0], table.shape[1] // 8), np.uint32)
        for row in range(table.shape[0]):
            for column in range(made.shape[1]):
                for place, within in AWQ.items():
                    put(made, (row, column), table[row, 8 * column + within], 4, place)
        packed.append(made)
    return packed


def quantized(folder, target, stored: dict, shuffled: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint of drawn codes in `target`; the weights that they stand for, by name."""
    draw, expected = np.random.default_rng(0), {}
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    tensors, bits = load_file(target / "model.safetensors"), stored["bits"]
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        outputs, inputs = tensors.pop(name).shape
        group = np.arange(inputs) // GROUP
        if shuffled:
            group = draw.permutation(group)
        codes = draw.integers(0, 2**bits, (inputs, outputs))
        zeros = draw.integers(1, 2**bits, (group.max() + 1, outputs))
        scales = draw.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
        whole = scales.astype(np.float32)[group] * (codes - zeros[group]).astype(np.float32)
        expected[name] = torch.tensor(whole.T)
        if stored["quant_method"] == "awq":
            parts = pack_awq(codes, zeros)
        else:
            less = 0 if stored.get("checkpoint_format") == "gptq_v2" else 1
            parts = pack_gptq(codes, zeros, bits, less)
            tensors[name.replace("weight", "g_idx")] = torch.tensor(group, dtype=torch.int32)
        for part, table in zip(("qweight", "qzeros"), parts):
            tensors[name.replace("weight", part)] = torch.tensor(table.view(np.int32))
        tensors[name.replace("weight", "scales")] = torch.tensor(scales)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return expected


@pytest.mark.parametrize(
    "stored, shuffled",
    [
        ({"quant_method": "gptq", "bits": 4, "desc_act": False}, False),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, True),
        ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}, False),
        ({"quant_method": "awq", "bits": 4, "version": "GEMM", "zero_point": True}, False),
    ],
)
def test_weights_are_those_that_the_codes_stand_for(tiny_folder, tmp_path, stored, shuffled):
    stored = stored | {"group_size": GROUP}
    expected = quantized(tiny_folder, tmp_path / "made", stored, shuffled)
    model = load(str(tmp_path / "made"), dtype="float32")
    found = model.weights.state_dict()
    assert len(expected) == 14
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7)
    kept = load_file(tiny_folder / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], kept["model.embed_tokens.weight"])
    packing = ledger.packing(16, model.weights.config)
    assert (packing.bits, packing.group) == (stored["bits"], GROUP), "its bytes are counted so"
    with pytest.raises(ValueError, match="is a quantized checkpoint; use 16 bits"):
        rename(model, 4)
