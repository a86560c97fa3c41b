"""The slot cache: the live keys and values of a batch of sequences, and attention over them.

Keys and values are stored in pooled blocks (`paged_attention`). `block_table` tracks which slot
holds which token, `eviction` which token a new one replaces, as the policy (`policies`) ranks
them. The slot of an evicted token is reused by the next token, and blocks are allocated only when
needed. Each slot carries the logical position of its token, so RoPE does not depend on where a
token is stored. There is no padding: prompts of any length are packed into one row of tokens.

A model has one LayerGroup for its full-attention layers, to which the policy applies, and one for
each size of sliding window, to which it does not.

Axes: N sequences in this step, T tokens of a prompt, H KV heads, G query heads per KV head,
      D head size; u units, Hs heads per unit (see `block_table`; u * Hs = N * H).
"""

from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, PreTrainedModel

from kit.inference import paged_attention
from kit.inference.block_table import BlockTable, StepIndex
from kit.inference.eviction import Delayed, Keep, Lowest, Ring
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import DMS, Budgeted, Full, Window
from kit.inference.prefill_attention import prompt_attention
from kit.models.attention import layer_windows


@dataclass(frozen=True)
class Saved:
    """Copy of one sequence of a SlotCache: its tokens, and the policy's state of them."""

    attended: torch.Tensor
    tables: list  # per group: per plane (slots, counts, positions, scores), and the rule's state
    rows: dict  # per layer: contents of the slots, and the pool's exact newest tokens


@dataclass
class LayerGroup:
    """Layers that are tracked in one block table: one plane for all of them, or one each."""

    layers: list[int]
    table: BlockTable
    rule: Keep
    split: int = 1  # units per sequence: 1, or one per KV head
    window: int | None = None  # of sliding attention
    step: StepIndex | None = None  # of the tokens announced last
    stored: list = field(default_factory=list)  # per prompt being read: stored tokens, their slots

    def plane(self, layer: int) -> int:
        """The plane of the table that tracks `layer`."""
        return self.layers.index(layer) if len(self.table.used) > 1 else 0

    def layers_of(self, plane: int) -> list[int]:
        """The layers that a plane tracks."""
        return [self.layers[plane]] if len(self.table.used) > 1 else self.layers

    def units(self, sequences: torch.Tensor) -> torch.Tensor:
        """Units of these sequences, sequence by sequence: [N * split]."""
        heads = torch.arange(self.split, device=sequences.device)
        return (sequences.unsqueeze(1) * self.split + heads).flatten()

    def announce(self, sequences: torch.Tensor, positions: torch.Tensor) -> None:
        """Find slots for one token of each sequence [N] at `positions` [N]: sets `step`."""
        units, each = self.units(sequences), positions.repeat_interleave(self.split)
        slots = self.table.allocate_token(units, self.rule.place(units, each), each)
        self.step = StepIndex(self.table, units, each, slots)

    def keep(self, layer: int, sequences: torch.Tensor, query, key, evicted) -> None:
        """Allocate slots for what one layer stores of a prompt, for each of `sequences` [N].

        Adds to `stored` a mask of the tokens [units of a sequence, T] and their flat slots. Other
        arguments as in `eviction`.
        """
        units, plane, copies = self.units(sequences), self.plane(layer), len(sequences)
        which, score = self.rule.prompt(layer, query, key, evicted)
        counts, positions = which.sum(1).repeat(copies), which.nonzero()[:, 1].repeat(copies)
        slots = self.table.allocate_prompt(plane, units, counts, positions)
        self.rule.admit(plane, units, slots, which, score, evicted)
        self.stored.append((which, slots))

    def read(self, sequence: torch.Tensor) -> tuple[list, list]:
        """Table entries of one sequence [1], per plane (slots, counts, positions, scores), and
        the state of the rule."""
        table, units, planes = self.table, self.units(sequence), []
        for plane in range(len(table.used)):
            counts, slots = table.live_slots(plane, units)
            arrays = [x for x in (table.position, table.score) if x is not None]
            planes.append((slots, counts, *(x.flatten(1)[plane, slots] for x in arrays)))
        return planes, [x[:, units] for x in self.rule.state]

    def restore(self, sequences: torch.Tensor, tables: tuple[list, list]) -> list[torch.Tensor]:
        """Allocate what was `read` for each of `sequences` [N]: flat slots of each plane."""
        units, copies, places = self.units(sequences), len(sequences), []
        for plane, (_, counts, positions, *score) in enumerate(tables[0]):
            slots = self.table.allocate_prompt(
                plane, units, counts.repeat(copies), positions.repeat(copies)
            )
            if score:
                self.table.score.flatten(1)[plane, slots] = score[0].repeat(copies)
            places.append(slots)
        for mine, theirs in zip(self.rule.state, tables[1]):
            mine[:, units] = theirs.repeat(1, copies, *[1] * (theirs.dim() - 2))
        return places

    def kept(self, plane: int, sequence: torch.Tensor) -> list[torch.Tensor]:
        """Positions of the live tokens of each unit of one sequence [1], ascending, on the CPU."""
        counts, slots = self.table.live_slots(plane, self.units(sequence))
        positions = self.table.position.flatten(1)[plane, slots].long().cpu()
        return [x.sort().values for x in positions.split(counts.tolist())]

    def nbytes(self) -> int:
        """Allocated bytes of the table and of the rule's state."""
        return self.table.nbytes() + sum(x.nbytes for x in self.rule.state)


def sliding_layers(
    layers: list[int], window: int, capacity: int, block: int | None, device
) -> LayerGroup:
    """Layers of sliding-window attention; a token sees `window` tokens, itself included."""
    table = BlockTable(1, capacity, block or 32, device)
    return LayerGroup(layers, table, Ring(table, 0, window, window), window=window)


def full_layers(
    layers: list[int], policy: Full, heads: int, capacity: int, block: int | None, device, precise
) -> LayerGroup:
    """Layers of full attention under `policy`; scores have the dtype `precise`."""
    split = heads if policy.spread == "head" else 1
    planes = 1 if policy.spread == "model" else len(layers)
    ring = isinstance(policy, Window) and policy.kept_tokens is not None
    ranks = isinstance(policy, Budgeted) and not ring
    size = block or (
        32 if split == 1 else 16
    )  # half-empty blocks cost more where each head has its own
    table = BlockTable(planes, capacity * split, size, device, score=precise if ranks else None)
    if ring:
        rule = Ring(table, policy.sinks, policy.kept_tokens, policy.kept_tokens + 1)
    elif ranks:
        rule = Lowest(table, policy)
    elif isinstance(policy, DMS):
        rule = Delayed(table, policy.evictor.window)
    else:
        rule = Keep(table)
    return LayerGroup(layers, table, rule, split)


class SlotCache:
    """The KV cache of a batch of sequences numbered 0 .. capacity-1.

    `prefill` or `step` announces the tokens of the next forward pass; the model's attention
    layers then call `attend`, which stores their keys and values and attends to the live ones.
    `block` is the number of slots in a block; None chooses 32, or 16 where heads keep tokens of
    their own. `attended` [capacity] float64: entries that the last query of each sequence attended
    to, mean over layers and heads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        policy: Full = Full(),  # noqa: B008 (frozen)
        block: int | None = None,
        quantized: Quantized | None = None,
    ):
        config = model.config.get_text_config()
        self.dtype, self.device, self.policy = model.dtype, model.device, policy
        self.capacity, self.quantized = capacity, quantized
        # Scores and sums are at least float32, as in fused attention kernels.
        self.precise = torch.promote_types(self.dtype, torch.float32)
        if not hasattr(config, "num_key_value_heads"):  # GPT-2, GPT-NeoX, OPT, Falcon
            raise ValueError(
                f"{type(model).__name__} is not supported: its config names no key-value heads "
                f"(num_key_value_heads); take a model that is built as Llama or Qwen is"
            )
        self.heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        windows = layer_windows(config)
        full = tuple(i for i, window in enumerate(windows) if window is None)
        policy.check(config.max_position_embeddings, full)
        shape = capacity, block, self.device
        self.layer_groups = [
            sliding_layers([i for i, w in enumerate(windows) if w == window], window, *shape)
            for window in sorted({window for window in windows if window is not None})
        ]
        if full:
            self.layer_groups.append(
                full_layers(list(full), policy, self.heads, *shape, self.precise)
            )
        layers = range(len(windows))
        self.group_of = [next(g for g in self.layer_groups if i in g.layers) for i in layers]
        self.pools = [self._pool(group) for group in self.group_of]
        self.next_position = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.attended = torch.zeros(capacity, dtype=torch.float64, device=self.device)
        self._segments = self._evicted = self._prefix = None
        self.announced = None  # sequences of the announced tokens, and how many of each: [N], [N]

    def _pool(self, group: LayerGroup) -> paged_attention.Pool:
        heads, units = self.heads // group.split, group.table.filled.shape[1]
        shape = heads, group.table.block, self.head_dim, self.dtype, self.device
        if self.quantized is None:
            return paged_attention.Pool(*shape)
        return paged_attention.QuantizedPool(*shape, self.quantized, units)

    def prefill(self, samples: list[list[int]], lengths: list[int], prefix=None) -> torch.Tensor:
        """Announce prompts, packed one after the other: position ids [1, sum T].

        Each prompt is read once for all sequences in its entry of `samples`. `prefix` is the result
        of `read_prefix`: all prompts begin with its P tokens, which are not read again, so only the
        other T - P tokens of each prompt are announced.
        """
        sequences = [torch.tensor(each, device=self.device) for each in samples]
        self._segments = [*zip(sequences, lengths)]
        self._prefix, known = prefix, prefix[0][0].shape[1] if prefix else 0
        for group in self.layer_groups:
            group.stored = []
        for each, length in self._segments:
            self.next_position[each], self.attended[each] = length, 0.0
        first = torch.stack([each[0] for each in sequences])
        self.announced = first, torch.tensor(lengths, device=self.device) - known
        return torch.cat([torch.arange(known, t, device=self.device) for t in lengths])[None]

    @property
    def shares_prefixes(self) -> bool:
        """Whether prompts can be read after a shared prefix: only if all tokens are kept exact."""
        plain = all(type(group.rule) is Keep and group.split == 1 for group in self.layer_groups)
        return plain and self.quantized is None

    def read_prefix(self, sequence: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [H, P, D] of each layer of one sequence, for `prefill`."""
        _, slots = self.layer_groups[0].table.live_slots(
            0, torch.tensor([sequence], device=self.device)
        )
        return [tuple(x.transpose(0, 1) for x in pool.rows(slots)) for pool in self.pools]

    def step(self, sequences: list[int]) -> torch.Tensor:
        """Announce one new token for each of the N live sequences: position ids [1, N]."""
        self._segments, index = None, torch.tensor(sequences, device=self.device)
        self.announced = index, torch.ones_like(index)
        positions = self.next_position[index]
        for group in self.layer_groups:
            group.announce(index, positions)
        self.next_position[index] += 1
        self.attended = self.live_tokens()
        return positions.unsqueeze(0)

    def set_eviction_logits(self, layer: int, logits: torch.Tensor) -> None:
        """Receive an evictor's logits [1, tokens, H] for the announced tokens, before `attend`.

        The logit of token t+1 decides about token t; above 0 evicts it.
        """
        self._evicted = logits[0] > 0
        if self._segments is None:
            group = self.group_of[layer]
            units, positions = group.step.units, group.step.positions
            group.rule.mark(group.plane(layer), units, positions, self._evicted.flatten())

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Store the announced tokens of this layer and attend.

        query [1, H*G, N, D]; key, value [1, H, N, D]; returns [1, N, H*G, D].
        """
        if self._segments is not None:
            return self._attend_prompts(layer, query[0], key[0], value[0], scale)
        group, pool, step = self.group_of[layer], self.pools[layer], self.group_of[layer].step
        plane, count = group.plane(layer), query.shape[2]
        shape = len(step.units), self.heads // group.split, -1, self.head_dim  # u, Hs, G, D
        key, value = (x[0].transpose(0, 1).reshape(shape).squeeze(2) for x in (key, value))
        slots = step.slots[plane]
        pool.reserve(group.table.used[plane])
        pool.write(slots, key, value)
        if self.quantized is not None:
            pool.remember(step.units, step.positions + 1, key[:, None], value[:, None])
        ranks = isinstance(group.rule, Lowest)
        if ranks:
            group.rule.arrive(plane, layer, step, group.split, key.to(self.precise))
        query = (query[0].to(self.precise) * scale).transpose(0, 1).reshape(shape)
        watch = ranks and self.policy.watches
        out, probability = paged_attention.attend(query, pool, step, plane, watch)
        if watch:
            group.rule.watch(plane, probability)
        return out.reshape(1, count, -1, self.head_dim).to(self.dtype)

    def _attend_prompts(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Attention inside each packed prompt; only what the policy keeps is stored.

        query [H*G, sum T, D]; key, value [H, sum T, D]; returns [1, sum T, H*G, D].
        """
        group, pool, out, rows, first = self.group_of[layer], self.pools[layer], [], [], 0
        shared = len(group.table.used) == 1 and group.stored
        group.stored = shared or []
        for number, (sequences, length) in enumerate(self._segments):
            known = self._prefix[layer][0].shape[1] if self._prefix else 0
            last = first + length - known
            q, k, v = (x[:, first:last] for x in (query, key, value))
            if known:
                k, v = (torch.cat(pair, 1) for pair in zip(self._prefix[layer], (k, v)))
            evicted = None
            if isinstance(group.rule, Delayed):
                # Token t+1 decides about t; the next step decides about the last token.
                evicted = self._evicted[first : first + length].T.roll(-1, 1)
            delay = getattr(group.rule, "window", 0)
            read, seen = prompt_attention(q, k, v, scale, group.window, evicted, delay)
            self.attended[sequences] += seen / len(self.pools)
            out.append(read)
            if not shared:
                scaled = q.to(self.precise) * scale
                group.keep(layer, sequences, scaled, k.to(self.precise), evicted)
            # [units of a sequence, T, Hs, D]; stored tokens are repeated for each sequence
            k, v = (x.unflatten(0, (group.split, -1)).transpose(1, 2) for x in (k, v))
            stored, copies = group.stored[number][0], len(sequences)
            rows.append([x[stored].repeat(copies, 1, 1) for x in (k, v)])
            if self.quantized is not None:
                pool.remember(group.units(sequences), length, k, v)
            first = last
        pool.reserve(group.table.used[group.plane(layer)])
        pool.write(torch.cat([slots for _, slots in group.stored]), *map(torch.cat, zip(*rows)))
        return torch.cat(out, 1).transpose(0, 1).contiguous().unsqueeze(0)

    def read(self, sequence: int) -> Saved:
        """Copy of one sequence, for `restore`."""
        index, rows, tables = torch.tensor([sequence], device=self.device), {}, []
        for group in self.layer_groups:
            tables.append(group.read(index))
            for plane, (slots, *_) in enumerate(tables[-1][0]):
                for layer in group.layers_of(plane):
                    pool = self.pools[layer]
                    rows[layer] = pool.rows(slots), [x[group.units(index)] for x in pool.state]
        return Saved(self.attended[sequence].clone(), tables, rows)

    def restore(self, sequences: list[int], length: int, saved: Saved) -> None:
        """Give each of `sequences` the `length` tokens of the sequence that was `read`."""
        index, copies = torch.tensor(sequences, device=self.device), len(sequences)
        self.next_position[index], self.attended[index] = length, saved.attended
        for group, tables in zip(self.layer_groups, saved.tables):
            for plane, slots in enumerate(group.restore(index, tables)):
                for layer in group.layers_of(plane):
                    pool, (rows, exact) = self.pools[layer], saved.rows[layer]
                    pool.reserve(group.table.used[plane])
                    pool.put(slots, [x.repeat(copies, *[1] * (x.dim() - 1)) for x in rows])
                    for mine, theirs in zip(pool.state, exact):
                        mine[group.units(index)] = theirs.repeat(copies, 1, 1, 1)

    def fill(self, count: int, length: int, live_per_unit: int | None = None) -> None:
        """Fill in random keys and values for `count` prompts of `length` tokens, for benchmarks; in
        full-attention layers each unit keeps `live_per_unit` random tokens."""
        index = torch.arange(count, device=self.device)
        for group in self.layer_groups:
            units = group.units(index)
            live = min(length, group.window or live_per_unit or length)
            random = torch.rand(len(units), length, device=self.device)
            positions = random.topk(live).indices.sort().values.flatten()
            counts = torch.full_like(units, live)
            for plane in range(len(group.table.used)):
                slots = group.table.allocate_prompt(plane, units, counts, positions)
                for layer in group.layers_of(plane):
                    pool, shape = self.pools[layer], (len(slots), self.heads // group.split)
                    pool.reserve(group.table.used[plane])
                    kind = dict(dtype=self.dtype, device=self.device)
                    pool.write(slots, *torch.randn(2, *shape, self.head_dim, **kind))
        self.next_position[index] = length
        self.attended = self.live_tokens()

    def release(self, sequences: list[int]) -> None:
        """Free the blocks of finished sequences."""
        index = torch.tensor(sequences, device=self.device)
        self.attended[index] = 0.0
        for group in self.layer_groups:
            for plane, moves in enumerate(group.table.release(group.units(index))):
                for layer in group.layers_of(plane):
                    self.pools[layer].move(*moves)

    def kept(self, sequence: int) -> list[list[torch.Tensor]]:
        """Positions of the live tokens of one sequence, ascending, per layer and KV head, on the
        CPU."""
        index, positions = torch.tensor([sequence], device=self.device), []
        for layer, group in enumerate(self.group_of):
            positions.append(group.kept(group.plane(layer), index) * (self.heads // group.split))
        return positions

    def live_tokens(self) -> torch.Tensor:
        """Live KV entries of each sequence, mean over layers and heads: [capacity] float64."""
        total = torch.zeros(self.capacity, dtype=torch.float64, device=self.device)
        for group in self.layer_groups:
            filled = group.table.filled.double().unflatten(1, (self.capacity, group.split)).mean(2)
            total += filled.mean(0) * len(group.layers)
        return total / len(self.pools)

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers and heads."""
        if self.quantized is not None:
            return self.quantized.bytes_per_token(self.head_dim, self.heads, len(self.pools))
        return 2 * len(self.pools) * self.heads * self.head_dim * self.dtype.itemsize

    def nbytes(self) -> int:
        """Allocated bytes of all pools, used or not, and of the block tables."""
        return sum(x.nbytes() for x in [*self.pools, *self.layer_groups])


def slot_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention function of transformers' models, computed by the SlotCache passed as `slots`."""
    if kwargs.get("softcap") is not None:
        raise ValueError(f"{type(module).__name__} caps its scores; the slot cache does not.")
    return kwargs["slots"].attend(module.layer_idx, query, key, value, scaling), None


# transformers builds no mask, since no mask function has this name; the cache masks by itself.
AttentionInterface.register("kit_slots", slot_attention)
