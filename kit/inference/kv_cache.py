"""The slot cache: the live keys and values of a batch of sequences, and attention over them.

Keys and values lie in pooled blocks (`blocks`); `slots` books which slot holds which token,
`eviction` which token a new one replaces, as the policy (`policies`) ranks them. Memory that is
evicted is used again at once, memory that is not needed is not allocated. Slots carry the
logical position of their token, so RoPE never sees where a token is stored, and there is no
padding: prompts of any length stand packed in one row of tokens.

Layers with sliding-window attention keep their window and are no affair of the policy.

Axes: N sequences in this step, T tokens of a prompt, H KV heads, G query heads per KV head,
      D head size; u units, Hs heads per unit (see `slots`; u * Hs = N * H).
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, PreTrainedModel

from kit.inference import layer_groups, paged_attention
from kit.inference.eviction import Delayed, Keep, Lowest
from kit.inference.kv_quantization import Quantised
from kit.inference.layer_groups import Part
from kit.inference.policies import Full
from kit.inference.prefill_attention import prompt_attention


@dataclass(frozen=True)
class Saved:
    """Copy of one sequence of a SlotCache: its tokens and what the policy knows of them."""

    attended: torch.Tensor
    booked: list  # per part: per plane [counts, positions, scores], and the rule's state
    rows: dict  # per layer: what the slots hold, and the pool's exact newest tokens


class SlotCache:
    """The KV cache of a batch of sequences numbered 0 .. capacity-1.

    `prefill` or `step` announces the tokens of the next forward pass; the model's attention
    layers then call `attend`, which stores their keys and values and attends to what is live.
    `block` is the number of slots in a block; None chooses by what the policy keeps apart.
    `attended` [capacity] float64: entries that the last query of each sequence attended to,
    mean over layers and heads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        policy: Full = Full(),  # noqa: B008 (frozen)
        block: int | None = None,
        quantised: Quantised | None = None,
    ):
        config = model.config.get_text_config()
        self.dtype, self.device, self.policy = model.dtype, model.device, policy
        self.capacity, self.quantised = capacity, quantised
        # Scores and sums are at least float32, as in fused attention kernels.
        self.precise = torch.promote_types(self.dtype, torch.float32)
        self.heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        windows = layer_windows(config)
        full = tuple(i for i, window in enumerate(windows) if window is None)
        policy.check(config.max_position_embeddings, full)
        shape = capacity, block, self.device
        self.parts = [
            layer_groups.sliding([i for i, w in enumerate(windows) if w == window], window, *shape)
            for window in sorted({window for window in windows if window is not None})
        ]
        if full:
            self.parts.append(
                layer_groups.full(list(full), policy, self.heads, *shape, self.precise)
            )
        self.part_of = [next(p for p in self.parts if i in p.layers) for i in range(len(windows))]
        self.pools = [self._pool(part) for part in self.part_of]
        self.next_position = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.attended = torch.zeros(capacity, dtype=torch.float64, device=self.device)
        self._segments = self._evicted = self._prefix = None
        self.announced = None  # whose tokens come, and how many of each: [N], [N]

    def _pool(self, part: Part) -> paged_attention.Pool:
        heads, units = self.heads // part.split, part.table.filled.shape[1]
        shape = heads, part.table.block, self.head_dim, self.dtype, self.device
        if self.quantised is None:
            return paged_attention.Pool(*shape)
        return paged_attention.QuantisedPool(*shape, self.quantised, units)

    def prefill(self, groups: list[list[int]], lengths: list[int], prefix=None) -> torch.Tensor:
        """Announce prompts, packed one after the other: position ids [1, sum T].

        Each prompt is read once for all the sequences of its group. `prefix` is what
        `read_prefix` gave: all prompts begin with its P tokens, which are not read again, so that
        only the T - P others of each prompt are announced.
        """
        self._segments = [
            (torch.tensor(group, device=self.device), t) for group, t in zip(groups, lengths)
        ]
        self._prefix, known = prefix, prefix[0][0].shape[1] if prefix else 0
        for part in self.parts:
            part.stored = []
        for group, length in self._segments:
            self.next_position[group], self.attended[group] = length, 0.0
        first = torch.stack([group[0] for group, _ in self._segments])
        self.announced = first, torch.tensor(lengths, device=self.device) - known
        return torch.cat([torch.arange(known, t, device=self.device) for t in lengths])[None]

    @property
    def shares_prefixes(self) -> bool:
        """Whether prompts may be read after a prefix: where all tokens are kept as they are."""
        plain = all(type(part.rule) is Keep and part.split == 1 for part in self.parts)
        return plain and self.quantised is None

    def read_prefix(self, sequence: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [H, P, D] of each layer of one sequence, for `prefill`."""
        _, slots = self.parts[0].table.held(0, torch.tensor([sequence], device=self.device))
        return [tuple(x.transpose(0, 1) for x in pool.rows(slots)) for pool in self.pools]

    def step(self, sequences: list[int]) -> torch.Tensor:
        """Announce one new token for each of the N live sequences: position ids [1, N]."""
        self._segments, index = None, torch.tensor(sequences, device=self.device)
        self.announced = index, torch.ones_like(index)
        positions = self.next_position[index]
        for part in self.parts:
            part.announce(index, positions)
        self.next_position[index] += 1
        self.attended = self.live_tokens()
        return positions.unsqueeze(0)

    def decide(self, layer: int, logits: torch.Tensor) -> None:
        """Hear an evictor's logits [1, tokens, H] on the announced tokens, before `attend`.

        Token t+1 decides for token t; above 0 evicts.
        """
        self._evicted = logits[0] > 0
        if self._segments is None:
            part = self.part_of[layer]
            units, positions = part.step.units, part.step.positions
            part.rule.mark(part.plane(layer), units, positions, self._evicted.flatten())

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Store the announced tokens of this layer and attend.

        query [1, H*G, N, D]; key, value [1, H, N, D]; returns [1, N, H*G, D].
        """
        if self._segments is not None:
            return self._attend_prompts(layer, query[0], key[0], value[0], scale)
        part, pool, step = self.part_of[layer], self.pools[layer], self.part_of[layer].step
        plane, count = part.plane(layer), query.shape[2]
        shape = len(step.units), self.heads // part.split, -1, self.head_dim  # u, Hs, G, D
        key, value = (x[0].transpose(0, 1).reshape(shape).squeeze(2) for x in (key, value))
        slots = step.slots[plane]
        pool.reserve(part.table.used[plane])
        pool.write(slots, key, value)
        if self.quantised is not None:
            pool.remember(step.units, step.positions + 1, key[:, None], value[:, None])
        ranks = isinstance(part.rule, Lowest)
        if ranks:
            part.rule.arrive(plane, layer, step, part.split, key.to(self.precise))
        query = (query[0].to(self.precise) * scale).transpose(0, 1).reshape(shape)
        watch = ranks and self.policy.watches
        out, probability = paged_attention.attend(query, pool, step, plane, watch)
        if watch:
            part.rule.watch(plane, probability)
        return out.reshape(1, count, -1, self.head_dim).to(self.dtype)

    def _attend_prompts(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Attention inside each packed prompt; only what the policy keeps is stored.

        query [H*G, sum T, D]; key, value [H, sum T, D]; returns [1, sum T, H*G, D].
        """
        part, pool, out, rows, first = self.part_of[layer], self.pools[layer], [], [], 0
        shared = len(part.table.used) == 1 and part.stored
        part.stored = shared or []
        for number, (group, length) in enumerate(self._segments):
            known = self._prefix[layer][0].shape[1] if self._prefix else 0
            last = first + length - known
            q, k, v = (x[:, first:last] for x in (query, key, value))
            if known:
                k, v = (torch.cat(pair, 1) for pair in zip(self._prefix[layer], (k, v)))
            evicted = None
            if isinstance(part.rule, Delayed):
                # Token t+1 decides for t; on the last token the next step has the word.
                evicted = self._evicted[first : first + length].T.roll(-1, 1)
            delay = getattr(part.rule, "window", 0)
            read, seen = prompt_attention(q, k, v, scale, part.window, evicted, delay)
            self.attended[group] += seen / len(self.pools)
            out.append(read)
            if not shared:
                part.keep(layer, group, q.to(self.precise) * scale, k.to(self.precise), evicted)
            # [units of a sequence, T, Hs, D], of which the stored ones are taken for each copy
            k, v = (x.unflatten(0, (part.split, -1)).transpose(1, 2) for x in (k, v))
            stored, copies = part.stored[number][0], len(group)
            rows.append([x[stored].repeat(copies, 1, 1) for x in (k, v)])
            if self.quantised is not None:
                pool.remember(part.units(group), length, k, v)
            first = last
        pool.reserve(part.table.used[part.plane(layer)])
        pool.write(torch.cat([slots for _, slots in part.stored]), *map(torch.cat, zip(*rows)))
        return torch.cat(out, 1).transpose(0, 1).unsqueeze(0)

    def read(self, sequence: int) -> Saved:
        """Copy of one sequence, for `restore`."""
        index, rows, booked = torch.tensor([sequence], device=self.device), {}, []
        for part in self.parts:
            booked.append(part.read(index))
            for plane, (slots, *_) in enumerate(booked[-1][0]):
                for layer in part.layers_of(plane):
                    pool = self.pools[layer]
                    rows[layer] = pool.rows(slots), [x[part.units(index)] for x in pool.state]
        return Saved(self.attended[sequence].clone(), booked, rows)

    def restore(self, group: list[int], length: int, saved: Saved) -> None:
        """Give every sequence of `group` the `length` tokens of the sequence that was `read`."""
        index, copies = torch.tensor(group, device=self.device), len(group)
        self.next_position[index], self.attended[index] = length, saved.attended
        for part, booked in zip(self.parts, saved.booked):
            for plane, slots in enumerate(part.restore(index, booked)):
                for layer in part.layers_of(plane):
                    pool, (rows, exact) = self.pools[layer], saved.rows[layer]
                    pool.reserve(part.table.used[plane])
                    pool.put(slots, [x.repeat(copies, *[1] * (x.dim() - 1)) for x in rows])
                    for mine, theirs in zip(pool.state, exact):
                        mine[part.units(index)] = theirs.repeat(copies, 1, 1, 1)

    def fill(self, count: int, length: int, live_per_unit: int | None = None) -> None:
        """Random keys and values instead of `count` prompts of `length` tokens, for measurements;
        of the full-attention layers each unit keeps `live_per_unit` tokens at random."""
        index = torch.arange(count, device=self.device)
        for part in self.parts:
            units = part.units(index)
            live = min(length, part.window or live_per_unit or length)
            random = torch.rand(len(units), length, device=self.device)
            positions = random.topk(live).indices.sort().values.flatten()
            counts = torch.full_like(units, live)
            for plane in range(len(part.table.used)):
                slots = part.table.extend(plane, units, counts, positions)
                for layer in part.layers_of(plane):
                    pool, shape = self.pools[layer], (len(slots), self.heads // part.split)
                    pool.reserve(part.table.used[plane])
                    kind = dict(dtype=self.dtype, device=self.device)
                    pool.write(slots, *torch.randn(2, *shape, self.head_dim, **kind))
        self.next_position[index] = length
        self.attended = self.live_tokens()

    def release(self, sequences: list[int]) -> None:
        """Forget finished sequences and hand their blocks back."""
        index = torch.tensor(sequences, device=self.device)
        self.attended[index] = 0.0
        for part in self.parts:
            for plane, moves in enumerate(part.table.release(part.units(index))):
                for layer in part.layers_of(plane):
                    self.pools[layer].move(*moves)

    def kept(self, sequence: int) -> list[list[torch.Tensor]]:
        """Positions of the live tokens of one sequence, ascending, per layer and KV head; they lie
        on the CPU."""
        index, found = torch.tensor([sequence], device=self.device), []
        for layer, part in enumerate(self.part_of):
            found.append(part.kept(part.plane(layer), index) * (self.heads // part.split))
        return found

    def live_tokens(self) -> torch.Tensor:
        """Live KV entries of each sequence, mean over layers and heads: [capacity] float64."""
        total = torch.zeros(self.capacity, dtype=torch.float64, device=self.device)
        for part in self.parts:
            filled = part.table.filled.double().unflatten(1, (self.capacity, part.split)).mean(2)
            total += filled.mean(0) * len(part.layers)
        return total / len(self.pools)

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers and heads."""
        if self.quantised is not None:
            return self.quantised.bytes_per_token(self.head_dim, self.heads, len(self.pools))
        return 2 * len(self.pools) * self.heads * self.head_dim * self.dtype.itemsize

    def nbytes(self) -> int:
        """Allocated bytes of all pools, used or not, and of the bookkeeping."""
        return sum(x.nbytes() for x in [*self.pools, *self.parts])


def layer_windows(config) -> list[int | None]:
    """Sliding window of each layer, None for full attention."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"{config.model_type} has layers of kind {sorted(unknown)}; not supported."
        )
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def slot_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of transformers' models, answered by the SlotCache passed as `slots`."""
    if kwargs.get("softcap") is not None:
        raise ValueError(f"{type(module).__name__} caps its scores; the slot cache does not.")
    return kwargs["slots"].attend(module.layer_idx, query, key, value, scaling), None


# Without a mask function of the same name transformers builds no mask: the cache masks itself.
AttentionInterface.register("kit_slots", slot_attention)
