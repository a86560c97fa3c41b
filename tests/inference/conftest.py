"""Triton without a GPU: its interpreter in one process for all tests, and its compiler."""

import multiprocessing
import subprocess
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch


@pytest.fixture(scope="session")
def interpreter():
    """`call(function, ...)` in a process whose Triton interprets: TRITON_INTERPRET counts when
    triton is first imported, and must not reach the other tests."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(start_interpreter).result()
        yield lambda *call, **changes: pool.submit(*call, **changes).result()


def start_interpreter() -> None:
    """Teach the interpreter bfloat16 products: it multiplies their bit patterns as integers
    (triton-lang/triton, issue 11584)."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    torch.set_num_threads(1)
    dot = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(
        self, widened(a), widened(b), *rest
    )


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Shared memory, PTX and resource usage of a kernel built for one compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def build_for(capability: int, kernel, types: dict, **constants):
        types = types | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        whole = [p for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
        whole = [p.num for p in whole if not p.do_not_specialize_on_alignment]
        whole = [number for number in whole if signature[kernel.arg_names[number]] != "fp32"]
        aligned = {(number,): [["tt.divisibility", 16]] for number in whole}
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        cubin = tmp_path / "cubin"
        cubin.write_bytes(built.asm["cubin"])
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        return built.metadata.shared, built.asm["ptx"], usage

    return build_for
