"""A pretended CUDA device: CPU tensors that say that they lie on cuda:0 and act like it.

They refuse to meet CPU tensors and to become arrays, and every kernel launch and every wait of the
host for the device is counted. So code that would fail or stall on a GPU does it here as well. A
CUDA graph is a list of operators with the tensors that they were asked of; it refuses to wait.

    with simcuda.device() as seen:
        model = simcuda.moved(model)  # whose weights are on the CPU until then
        ...
    seen.launches.total(), seen.waits.total()

Load models before: transformers' loading goes through the meta device. It cannot show what C++ or
the CUDA library do with a device (TRL and accelerate ask torch.cuda for theirs; packed HQQ
weights), other threads, Triton kernels (a plain one stands in for the kit's), streams, speed and
real memory.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kit.inference.kv_quantization import pack, unpack

CUDA = torch.device("cuda:0")
# What makes another view or reads sizes, and allocation without a value, launches nothing.
FREE = set(
    "view _unsafe_view slice select transpose expand unsqueeze squeeze permute split unbind detach "
    "split_with_sizes alias as_strided t unfold diagonal reshape _reshape_alias lift_fresh chunk "
    "narrow empty empty_strided new_empty new_empty_strided empty_like resize_ set_ "
    "_local_scalar_dense".split()
)
# What waits for the device, since a number or a size must be known on the host.
WAITS = set(
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim equal is_nonzero bincount "
    "argwhere".split()
)
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # CPU indices are copied there
COPIES = {"_to_copy", "copy_"}
MISMATCH = "Expected all tensors to be on the same device, but {} of {} got some of cuda:0 and cpu"


@dataclass
class Seen:
    """What the device was asked to do, by operator."""

    launches: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)

    def clear(self) -> None:
        """Count from zero again."""
        self.launches.clear()
        self.waits.clear()


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; its numbers lie in `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device="cpu",
        )  # fmt: skip
        made.inner = inner
        return made

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return OnDevice(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of simcuda.device()")

    def __repr__(self, **_):
        return f"OnDevice({self.inner})"

    def __deepcopy__(self, memo):
        made = OnDevice(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    @property
    def device(self):
        return CUDA

    @property
    def is_cuda(self):
        return True

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        self.inner = value.inner

    def get_device(self):
        return 0

    def cpu(self, *_, **__):
        return self.to("cpu")

    def cuda(self, *_, **__):
        return self

    def tolist(self):
        return self.cpu().tolist()

    def to(self, *args, **kwargs):
        """As Tensor.to: in C++ these tensors lie on the CPU already."""
        place, dtype, *_ = torch._C._nn._parse_to(*_without_tensor(args), **kwargs)
        if place is None or place.type == "cuda":
            return self if dtype in (None, self.dtype) else torch.Tensor.to(self, dtype)
        made = torch.ops.aten._to_copy.default(self, device=place)
        return made if dtype is None else made.to(dtype)

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use .cpu() first")

    def __array__(self, *_, **__):
        return self.numpy()


def _without_tensor(args: tuple) -> tuple:
    """Arguments of Tensor.to in which a tensor to be like is spelled out."""
    if args and isinstance(args[0], torch.Tensor):
        return (args[0].device, args[0].dtype, *args[1:])
    return args


def _inner(x):
    return x.inner if isinstance(x, OnDevice) else x


def _outer(x):
    return OnDevice(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) else x


def _mapped(function, x):
    """`x` with what it holds, at most in lists, replaced."""
    return type(x)(function(y) for y in x) if type(x) in (list, tuple) else function(x)


def _tensors(values) -> list[torch.Tensor]:
    """The tensors among arguments, and in lists among them."""
    each = (y for x in values for y in (x if isinstance(x, list | tuple) else (x,)))
    return [x for x in each if isinstance(x, torch.Tensor)]


class _Device(TorchDispatchMode):
    """Sees every operation on any tensor."""

    def __init__(self, seen: Seen):
        super().__init__()
        self.seen, self.graph = seen, None

    def capture(self, work):
        """For kit.inference.cuda_graphs.capture. What `work` has written is undone, since a graph
        does not run while it is captured."""
        self.graph = graph = []
        try:
            out = work()
        finally:
            self.graph = None
            for *_, written, before in reversed(graph):
                for tensor, value in zip(written, before):
                    tensor.copy_(value)

        def replay() -> None:
            self.seen.launches["graph"] += 1
            for function, args, kwargs, made, *_ in graph:
                again = function(*args, **kwargs)
                for mine, new in zip(_tensors([made]), _tensors([again])):
                    mine.copy_(new)

        return replay, out

    def call(self, function, args, kwargs, written=()):
        """What an operation on inner tensors returns."""
        if self.graph is None:
            return function(*args, **kwargs)
        before = [x.clone() for x in written]
        made = function(*args, **kwargs)
        returns = getattr(function, "_schema", None) and function._schema.returns
        if not any(r.alias_info and not r.alias_info.is_write for r in returns or ()):  # no view
            self.graph.append((function, args, kwargs, made, written, before))
        return made

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.split("::")[1]
        found = _tensors((*args, *kwargs.values()))
        there = [x for x in found if isinstance(x, OnDevice)]
        here = [x for x in found if not isinstance(x, OnDevice)]
        place = kwargs.get("device")
        place = torch.device(place).type if place is not None else ""
        if not there and place != "cuda":
            return function(*args, **kwargs)
        leaves = name == "_to_copy" and place == "cpu"  # other operators hear that of C++ alone
        crosses = leaves or (name in COPIES and bool(here))
        self._count(name, args, here, crosses)
        if not crosses:
            self._check(function, name, args, here)
        kwargs = {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs
        kwargs = {**kwargs, "device": torch.device("cpu")} if place else kwargs
        inner = {key: _mapped(_inner, value) for key, value in kwargs.items()}
        written = self._written(function, args, kwargs)
        args_ = [_mapped(_inner, value) for value in args]
        out = self.call(function, args_, inner, [*map(_inner, written)])
        if name == "copy_":
            return args[0]
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        return out if leaves else _mapped(_outer, out)

    def _count(self, name: str, args, here: list, crosses: bool) -> None:
        before = self.seen.waits.total()
        self._count_one(name, args, crosses)
        if self.graph is not None and self.seen.waits.total() > before:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")

    def _count_one(self, name: str, args, crosses: bool) -> None:
        if crosses:
            self.seen.waits["copy from or to the host"] += 1
        elif name in INDEXED and any(_is_mask(x) for x in args[1]):
            self.seen.waits[name] += 1
        elif name in INDEXED and len(args) > 2 and not isinstance(args[2], OnDevice):
            self.seen.waits["copy of a number to the device"] += 1
        elif name in WAITS:
            self.seen.waits[name] += 1
        elif name == "repeat_interleave" and len(args) == 1:  # how long it gets is not known
            self.seen.waits[name] += 1
        if name not in FREE and not crosses:
            self.seen.launches[name] += 1

    def _check(self, function, name: str, args, here: list) -> None:
        """Refuse CPU tensors that are no single numbers; in a backward pass the engine makes some
        of its own, which on a real device would lie there."""
        if torch._C._current_graph_task_id() != -1 or name.startswith("_fused_adam"):
            return
        wrong = [x for x in here if x.dim()]
        if name in INDEXED and isinstance(args[0], OnDevice):
            indices = [x for x in args[1] if x is not None]
            if any(not isinstance(x, OnDevice) for x in indices):
                self.seen.waits["index on the host"] += 1
            wrong = [x for x in wrong if not any(x is index for index in indices)]
        if wrong:
            shapes = [tuple(x.shape) for x in wrong]
            raise RuntimeError(MISMATCH.format(shapes, function))

    @staticmethod
    def _written(function, args, kwargs) -> list:
        """The arguments that an operation writes to and returns."""
        asked = function._schema.arguments
        known = dict(zip((a.name for a in asked), args)) | kwargs
        if not any(r.alias_info and r.alias_info.is_write for r in function._schema.returns):
            return []
        return [known[a.name] for a in asked if a.alias_info and a.alias_info.is_write]


def _is_mask(index) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _pad_sequence(rows, batch_first=False, padding_value=0.0, padding_side="right"):
    """As torch's, which in C++ asks the rows for their device."""
    out = rows[0].new_full((len(rows), max(map(len, rows)), *rows[0].shape[1:]), padding_value)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out if batch_first else out.transpose(0, 1)


def _paged_attention(device: _Device, *given, watch=False, scale=1.0, out=None):
    """What triton_attention.paged_attention says it returns; one launch."""
    query, _, _, _, table, count, codes = given
    assert {x.device for x in given[:6]} == {CUDA}
    assert table.dtype == count.dtype == torch.int32
    device.seen.launches["paged_attention"] += 1
    if codes:
        codes = type(codes)(*(_mapped(_inner, value) for value in codes))
    written = [] if out is None else [_inner(out)]
    asked = [*map(_inner, given[:6]), codes, scale, *written]
    made, scores, whole = map(OnDevice, device.call(_unit_by_unit, asked, {}, written))
    out = made if out is None else out
    return (out, scores, whole) if watch else out


def _unit_by_unit(query, keys, values, bias, table, count, codes, scale, out=None):
    query = query.float() * scale
    out = torch.empty_like(query) if out is None else out
    whole = out.zero_().new_zeros(2, *query.shape[:-1], dtype=torch.float32)
    scores_of = query.new_full((len(bias), *query.shape[1:-1], bias.shape[1]), torch.nan)
    if codes:
        arrays = zip((keys, values), codes.scales, codes.zeros)
        keys, values = (unpack(*three, codes.bits) for three in arrays)
    for unit, blocks in enumerate(count.tolist()):
        if not blocks:
            continue
        mine = table[unit, :blocks].long()
        k, v = (x[mine].transpose(0, 1).flatten(1, 2).float() for x in (keys, values))
        if codes:
            place = codes.position[mine].flatten()
            recent = place > codes.newest[unit]
            for x, exact in zip((k, v), codes.exact):
                at = place[recent].long() % max(1, exact.shape[1])
                x[:, recent] = exact[unit, at].transpose(0, 1).float()
        scores = query[unit] @ k.transpose(1, 2) + bias[mine].flatten()
        out[unit] = scores.softmax(-1) @ v
        scores_of[mine] = scores.unflatten(-1, (blocks, -1)).movedim(-2, 0)
        top = whole[0, unit] = scores.amax(-1)
        whole[1, unit] = (scores - top.unsqueeze(-1)).exp().sum(-1)
    return out, scores_of, whole


def _one_kernel(device: _Device, plain, *given):
    """A kernel of triton_layers, by one that stands for it; one launch."""
    assert {x.device for x in _tensors(given)} == {CUDA}
    device.seen.launches[plain.__name__] += 1
    written = {stored: given[3:], packed: given[3:4]}.get(plain, ())
    written = [_inner(x) for each in written for x in (each if plain is packed else [each])]
    made = device.call(plain, [_mapped(_inner, x) for x in given], {}, written)
    return None if made is None else _mapped(_outer, made)


def normed(x, weight, eps):
    x_ = x.float()
    return weight * (x_ * torch.rsqrt(x_.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotated(query, key, cos, sin, norms=None):
    if norms:
        query, key = normed(query, norms[0], norms[2]), normed(key, norms[1], norms[2])
    return apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)


def gated(gate, up):
    return torch.nn.functional.silu(gate) * up


def scored(hidden, norm, weight, bias, eps, scale, offset):
    out = torch.nn.functional.rms_norm(hidden.float(), norm.shape, norm, eps)
    return scale * torch.nn.functional.linear(out, weight, bias) + offset


def stored(slots, key, value, keys, values):
    block, offset = slots // keys.shape[2], slots % keys.shape[2]
    keys[block, :, offset], values[block, :, offset] = key, value


def packed(slots, key, value, arrays, bits, group):
    block, offset = slots // arrays[0].shape[2], slots % arrays[0].shape[2]
    for array, rows in zip(arrays, (*pack(key, bits, group), *pack(value, bits, group))):
        array[block, :, offset] = rows


PLAIN = {each.__name__: each for each in (normed, rotated, gated, scored, stored)}


def moved(model):
    """`model` (a kit.models.load.Model, or a module) with its weights on the device."""
    if not isinstance(model, torch.nn.Module):
        return replace(model, weights=moved(model.weights))
    known = {}
    for module in model.modules():
        for name, value in [*module._parameters.items()]:
            if value is not None and id(value) not in known:
                known[id(value)] = torch.nn.Parameter(OnDevice(value.data), value.requires_grad)
            module._parameters[name] = known.get(id(value))
        for name, value in [*module._buffers.items()]:
            module._buffers[name] = None if value is None else OnDevice(value)
    return model


@contextmanager
def device() -> Iterator[Seen]:
    """The device is there inside this block; what it is asked for."""
    module_to, tensor, generator = torch.nn.Module.to, torch.tensor, torch.Generator
    seen = Seen()
    mode = _Device(seen)

    def made(data, *, dtype=None, device=None, **how):
        """torch.tensor, which in C++ wants a CUDA build."""
        if isinstance(data, list) and data and isinstance(data[0], OnDevice):
            data = [x.item() for x in data]
        there = device is not None and torch.device(device).type == "cuda"
        found = tensor(data, dtype=dtype, device=None if there else device, **how)
        return found.to(CUDA) if there else found

    def like(data, dtype=None, device=None):
        if isinstance(data, torch.Tensor):
            return data.to(device=device, dtype=dtype)
        return made(data, dtype=dtype, device=device)

    def to(module, *args, **kwargs):
        place = torch._C._nn._parse_to(*_without_tensor(args), **kwargs)[0]
        if place is not None and place.type == "cuda":
            return moved(module)
        return module_to(module, *args, **kwargs)

    def inference(mode):  # inference tensors cannot be wrapped
        return torch.no_grad() if mode else torch.enable_grad()

    patches = [
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "mem_get_info", lambda device=None: (2**33, 2**33)),
        mock.patch.object(torch.cuda, "memory_reserved", lambda device=None: 0),
        mock.patch.object(torch.cuda, "memory_allocated", lambda device=None: 0),
        mock.patch.object(torch, "tensor", made),
        mock.patch.object(torch, "as_tensor", like),
        mock.patch.object(torch, "Generator", lambda device=None: generator()),
        mock.patch.object(torch._C, "_InferenceMode", inference),
        mock.patch.object(torch.nn.Module, "to", to),
        mock.patch.object(torch.nn.utils.rnn, "pad_sequence", _pad_sequence),
        mock.patch(
            "kit.inference.triton_attention.paged_attention", partial(_paged_attention, mode)
        ),
        *(
            mock.patch(f"kit.inference.triton_layers.{name}", partial(_one_kernel, mode, plain))
            for name, plain in PLAIN.items()
        ),
        mock.patch("kit.inference.triton_quantization.packed", partial(_one_kernel, mode, packed)),
        mock.patch("kit.inference.cuda_graphs.capture", mode.capture),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(mode)
        yield seen
