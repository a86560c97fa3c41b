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

import psutil
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from kit.inference import paged_attention
from kit.inference.block_table import BlockTable, StepIndex
from kit.inference.eviction import Delayed, Keep, Lowest, PromptOnly, Ring, Rounds
from kit.inference.kv_quantization import Quantized
from kit.inference.policies import DMS, RKV, Budgeted, Full, Window
from kit.inference.prefill_attention import prompt_attention
from kit.inference.prefix_sharing import padded
from kit.models.attention import layer_windows


@dataclass(frozen=True)
class SequenceCopy:
    """Copy of one sequence of a SlotCache: its tokens, and the policy's state of them."""

    attended: torch.Tensor
    tables: list  # per group: per plane (slots, counts, positions, scores), and the rule's state
    rows: dict  # per layer: contents of the slots, and the pool's exact newest tokens


@dataclass
class UndoLog:
    """The data with which `SlotCache.rewind` undoes steps of one sequence: no copy of its cache,
    unless a round of evictions came."""

    length: int
    attended: torch.Tensor
    tables: list  # as in SequenceCopy
    exact: list  # per layer: the pool's exact newest tokens
    # Per step and layer: layer, ordinals, slot contents before the step, of several sequences, and
    # this one's number among them.
    overwritten: list[tuple] = field(default_factory=list)
    copy: SequenceCopy | None = None  # from before a round of evictions


@dataclass
class LayerGroup:
    """Layers that are tracked in one block table: one plane for all of them, or one each."""

    layers: list[int]
    table: BlockTable
    rule: Keep
    split: int = 1  # units per sequence: 1, or one per KV head
    window: int | None = None  # of sliding attention
    step: StepIndex | None = None  # of the tokens announced last
    ordinals: torch.Tensor | None = None  # [P, u] where those are put
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

    def announce(self, sequences, positions, active=None, longest: int | None = None) -> None:
        """Find slots for one token of each sequence [N] at `positions` [N]: sets `step`.

        With `active` [N] nothing waits for the device: see `BlockTable.allocate_token`, and
        `StepIndex` for sequences of at most `longest` tokens.
        """
        units, each = self.units(sequences), positions.repeat_interleave(self.split)
        self.ordinals = self.rule.place(units, each)
        mask, width = active, None
        if active is not None:
            mask, width = active.repeat_interleave(self.split), self.width(longest)
        slots = self.table.allocate_token(units, self.ordinals, each, mask)
        self.step = StepIndex(self.table, units, each, slots, width)

    def width(self, length: int) -> int:
        """Blocks that a unit of so many tokens takes at most in a plane."""
        return -(-self.rule.most(length) // self.table.block)

    def blocks(self, length: int) -> int:
        """Blocks that a sequence of so many tokens takes at most in a plane."""
        return self.split * self.width(length)

    def keep(self, layer: int, sequences: torch.Tensor, query, key, evicted) -> None:
        """Allocate slots for what one layer stores of a prompt, for each of `sequences` [N].

        Adds to `stored` the tokens as an index into [units of a sequence, T], and their flat slots.
        Other arguments as in `eviction`.
        """
        units, plane, copies = self.units(sequences), self.plane(layer), len(sequences)
        which, score = self.rule.prompt(layer, query, key, evicted)
        tokens = which.nonzero(as_tuple=True)
        counts, positions = which.sum(1).repeat(copies), tokens[1].repeat(copies)
        slots = self.table.allocate_prompt(plane, units, counts, positions)
        self.rule.admit(plane, units, slots, which, score, evicted)
        self.stored.append((tokens, slots))

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
        for target, source in zip(self.rule.state, tables[1]):
            target[:, units] = source.repeat(1, copies, *[1] * (source.dim() - 2))
        return places

    def rewind(self, sequence: torch.Tensor, tables: tuple[list, list]) -> list[tuple]:
        """Take back the tokens of one sequence [1] since it was `read`: moves as of `release`."""
        units, (planes, state) = self.units(sequence), tables
        filled = torch.stack([counts for _, counts, *_ in planes])
        moves = self.table.release(units, filled)
        for plane, (_, _, positions, *score) in enumerate(planes):
            _, slots = self.table.live_slots(plane, units)
            self.table.position.flatten(1)[plane, slots] = positions
            if score:
                self.table.score.flatten(1)[plane, slots] = score[0]
        for target, source in zip(self.rule.state, state):
            target[:, units] = source
        return moves

    def live_positions(self, plane: int, sequence: torch.Tensor) -> list[torch.Tensor]:
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
    layers: list[int], policy: Full, heads: int, capacity: int, block: int | None, device, precise,
    query: tuple[int, int],
) -> LayerGroup:  # fmt: skip
    """Layers of full attention under `policy`; scores have the dtype `precise`, and the queries of
    a KV head the shape `query` (G, D)."""
    split = heads if policy.spread == "head" else 1
    planes = 1 if policy.spread == "model" else len(layers)
    ring = isinstance(policy, Window) and policy.kept_tokens is not None
    rounds = isinstance(policy, RKV)
    ranks = isinstance(policy, Budgeted) and policy.decoding and not ring and not rounds
    size = block or (
        32 if split == 1 else 16
    )  # half-empty blocks cost more where each head has its own
    table = BlockTable(planes, capacity * split, size, device, score=precise if ranks else None)
    if ring:
        rule = Ring(table, policy.sinks, policy.kept_tokens, policy.kept_tokens + 1)
    elif ranks:
        rule = Lowest(table, policy)
    elif rounds:
        rule = Rounds(table, policy, *query, precise)
    elif isinstance(policy, DMS):
        rule = Delayed(table, policy.evictor.window)
    elif isinstance(policy, Budgeted):
        rule = PromptOnly(table, policy)
    else:
        rule = Keep(table)
    return LayerGroup(layers, table, rule, split)


FREE = 0.9  # of free memory that pools take at most; the rest is for what a pass computes


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, with what torch keeps for later."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


class SlotCache:
    """The KV cache of a batch of sequences numbered 0 .. capacity-1.

    `prefill` or `step` announces the tokens of the next forward pass; the model's attention
    layers then call `attend`, which stores their keys and values and attends to the live ones.
    Rows that follow the announced ones pad the pass: they are ignored and get zeros.
    `block` is the number of slots in a block; None chooses 32, or 16 where heads keep tokens of
    their own. Pools hold `capacity` sequences of at most `tokens` tokens (by default the
    model's context), or where memory is short for as many as fit into FREE of what is free, one at
    least; see `fits`. `attended` [capacity] float64: entries that the last query of each sequence
    attended to, mean over layers and heads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        policy: Full = Full(),  # noqa: B008 (frozen)
        block: int | None = None,
        quantized: Quantized | None = None,
        tokens: int | None = None,
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
            query = config.num_attention_heads // self.heads, self.head_dim
            self.layer_groups.append(
                full_layers(list(full), policy, self.heads, *shape, self.precise, query)
            )
        layers = range(len(windows))
        self.group_of = [next(g for g in self.layer_groups if i in g.layers) for i in layers]
        self.pools = [self._pool(group) for group in self.group_of]
        self.next_position = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.attended = torch.zeros(capacity, dtype=torch.float64, device=self.device)
        self.tokens = min(tokens or config.max_position_embeddings, config.max_position_embeddings)
        self.length = [0] * capacity  # tokens of each sequence, dropped ones included
        self._undo_logs: dict[int, UndoLog] = {}
        # Undo logs of this step, and their rows.
        self._step_logs: tuple[list, torch.Tensor] | None = None
        self._allocate()
        self._segments = self._evicted = self._prefix = None
        self.places = torch.arange(capacity, device=self.device)
        self._step_sequences: list[int] = []  # sequences of the last step
        self.announced = None  # sequences of the announced tokens, and how many of each: [N], [N]

    def _pool(self, group: LayerGroup) -> paged_attention.Pool:
        heads, units = self.heads // group.split, group.table.filled.shape[1]
        shape = heads, group.table.block, self.head_dim, self.dtype, self.device
        if self.quantized is None:
            return paged_attention.Pool(*shape)
        return paged_attention.QuantizedPool(*shape, self.quantized, units)

    def _allocate(self) -> None:
        """Allocate the pools, and set `limit`, the blocks of each group: None for enough."""
        need = [self.capacity * group.blocks(self.tokens) for group in self.layer_groups]
        blocks = dict(zip(map(id, self.layer_groups), need))
        pairs = [*zip(self.group_of, self.pools)]
        total = sum(blocks[id(group)] * pool.block_bytes for group, pool in pairs)
        share, self.limit = min(1.0, FREE * free_bytes(self.device) / max(1, total)), None
        if share < 1.0:
            least = [group.blocks(self.tokens) for group in self.layer_groups]
            self.limit = [max(one, int(share * all_)) for one, all_ in zip(least, need)]
            blocks = dict(zip(map(id, self.layer_groups), self.limit))
        extra = self.device.type == "cuda"  # a last block that nobody uses, see step_active
        for group, pool in pairs:
            pool.allocate(blocks[id(group)] + extra)
        for group in self.layer_groups if extra else ():
            group.table.reserve(blocks[id(group)] + 1, group.width(self.tokens))

    def fits(self, prompts: list[int], sequences: list[int]) -> bool:
        """Whether `sequences` can go on, and prompts of these lengths be read beside them.

        A sequence may begin a block for each of its units in each step, and is expected to grow by
        half of what it may, where prompts are to be read.
        """
        for group, limit in zip(self.layer_groups, self.limit or ()):
            used, most = max(group.table.used), group.blocks(self.tokens)
            current = [group.blocks(self.length[s]) for s in sequences]
            ratio = used / max(
                1, sum(current)
            )  # blocks in use over those of caches that evict nothing
            growth = ratio * sum(most - blocks for blocks in current) / 2 if prompts else 0
            need = sum(group.blocks(length) for length in prompts)
            fresh = group.split * (len(sequences) + len(prompts))
            if used + need + growth + fresh > limit:
                return False
        return True

    def prefill(
        self, samples: list[list[int]], lengths: list[int], prefix=None, rows: int = 1
    ) -> torch.Tensor:
        """Announce prompts, packed one after the other: position ids [1, sum T].

        Each prompt is read once for all sequences in its entry of `samples`. `prefix` is the result
        of `read_prefix`: all prompts begin with its P tokens, which are not read again, so only the
        other T - P tokens of each prompt are announced; each is padded to a multiple of `rows`.
        """
        sequences = [torch.tensor(each, device=self.device) for each in samples]
        self._prefix, prefix_length = prefix, prefix[0][0].shape[1] if prefix else 0
        wide = [padded(length - prefix_length, rows) for length in lengths]
        self._segments = [*zip(sequences, lengths, wide)]
        for group in self.layer_groups:
            group.stored = []
        for each, length, _ in self._segments:
            self.next_position[each], self.attended[each] = length, 0.0
        for each, length in zip(samples, lengths):
            for sequence in each:
                self.length[sequence] = length
        first = torch.stack([each[0] for each in sequences])
        self.announced = first, torch.tensor(wide, device=self.device)
        return torch.cat([torch.arange(n, device=self.device) for n in wide])[None] + prefix_length

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
        self.evict(sequences)
        if self._segments is not None or sequences != self._step_sequences:
            self._segments, self._step_sequences = None, sequences
            index = torch.tensor(sequences, device=self.device)
            self.announced = index, torch.ones_like(index)
        index, _ = self.announced
        positions = self.next_position[index]
        for group in self.layer_groups:
            group.announce(index, positions)
        self.next_position[index] += 1
        for sequence in sequences:
            self.length[sequence] += 1
        self._step_logs = None
        logged = {sequence for sequence, log in self._undo_logs.items() if not log.copy}
        if rows := [row for row, sequence in enumerate(sequences) if sequence in logged]:
            logs = [self._undo_logs[sequences[row]] for row in rows]
            self._step_logs = logs, torch.tensor(rows, device=self.device)
        self.attended.copy_(self.live_tokens())
        return positions.unsqueeze(0)

    @property
    def steps_without_sync(self) -> bool:
        """Whether `step_active` may replace `step`: on a device that the host should not wait for,
        where a kernel reads the blocks in place and no step is logged for `rewind`."""
        logs = self._undo_logs and any(type(group.rule) is not Keep for group in self.layer_groups)
        return self.device.type == "cuda" and self.precise == torch.float32 and not logs

    def evict(self, sequences: list[int]) -> None:
        """Evict what is evicted together of those of `sequences` that are due before their next
        step; waits for the device. `step` does it by itself, `step_active` does not."""
        for group in self.layer_groups:
            if not isinstance(group.rule, Rounds):
                continue
            due = [s for s in sequences if group.rule.due(s * group.split, self.length[s])]
            for sequence in due:
                if (log := self._undo_logs.get(sequence)) and not log.copy:
                    log.copy = self.read(sequence)
            if due:
                kept = torch.cat([self._evict(group, sequence) for sequence in due], 1)
                units = group.units(torch.tensor(due, device=self.device))
                self._move(group, group.table.release(units, kept))

    def _evict(self, group: LayerGroup, sequence: int) -> torch.Tensor:
        """Move what is kept of a sequence to the first slots of its units: their tokens [P, u]."""
        table, units = group.table, group.units(torch.tensor([sequence], device=self.device))
        filled = table.filled[:, units].clone()
        for layer in group.layers:
            pool, plane, length = self.pools[layer], group.plane(layer), self.length[sequence]
            counts, slots = table.live_slots(plane, units)  # all units have as many tokens
            positions = table.position.flatten(1)[plane, slots].long()
            owners = units.repeat_interleave(counts)
            key = pool.keys(slots, owners, positions, length, self.precise)
            slots, positions = (x.view(len(units), -1) for x in (slots, positions))
            key = key.view(*slots.shape, -1)
            kept = group.rule.keep(plane, layer, units, length, key)
            filled[plane] = kept.shape[1]
            to, source = slots[:, : kept.shape[1]].flatten(), slots.gather(1, kept).flatten()
            pool.put(to, pool.rows(source))
            table.position.flatten(1)[plane, to] = positions.gather(1, kept).flatten().int()
        return filled

    def step_active(self, active: torch.Tensor, longest: int) -> torch.Tensor:
        """`step` for those of all sequences for which `active` [capacity] is set, none longer than
        `longest` tokens afterwards: position ids [1, capacity].

        Nothing waits for the device, no shape and no address depends on which sequences they are,
        and `attend` gives the others anything. The host counts their `length` and calls
        `load_counters`.
        """
        self._segments, self._step_logs, self._step_sequences = None, None, []
        self.announced = self.places, None
        positions = self.next_position.clone()
        for group in self.layer_groups:
            group.announce(self.places, positions, active, longest)
        self.next_position += active
        self.attended.copy_(self.live_tokens())
        return positions.unsqueeze(0)

    def counters(self) -> torch.Tensor:
        """Counters of a step, on the device, for `load_counters`: `attended`, the live tokens of
        each sequence, and the blocks in use of each plane, in float64."""
        ends = [group.table.ends.flatten().double() for group in self.layer_groups]
        return torch.cat([self.attended, self.live_tokens(), *ends])

    def load_counters(self, counters: list[float]) -> None:
        """Set the host's counts of blocks from the values of `counters`."""
        first = 2 * self.capacity
        for group in self.layer_groups:
            group.table.set_used(counters[first : first + len(group.table.used)])
            first += len(group.table.used)
        for layer, (group, pool) in enumerate(zip(self.group_of, self.pools)):
            pool.reserve(group.table.used[group.plane(layer)])

    def set_eviction_logits(self, layer: int, logits: torch.Tensor) -> None:
        """Receive an evictor's logits [1, tokens, H] for the announced tokens, before `attend`.

        The logit of token t+1 decides about token t; above 0 evicts it.
        """
        self._evicted = logits[0] > 0
        if self._segments is None:
            group = self.group_of[layer]
            evicted = self._evicted[: len(self.announced[0])].flatten()
            group.rule.mark(group.plane(layer), group.step.units, evicted)

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Store the announced tokens of this layer and attend.

        query [1, H*G, N, D]; key, value [1, H, N, D]; returns [1, N, H*G, D].
        """
        if self._segments is not None:
            return self._attend_prompts(layer, query[0], key[0], value[0], scale)
        group, pool, step = self.group_of[layer], self.pools[layer], self.group_of[layer].step
        plane, count, rows = group.plane(layer), len(self.announced[0]), query.shape[2]
        query, key, value = (x[:, :, :count] for x in (query, key, value))
        shape = len(step.units), self.heads // group.split, -1, self.head_dim  # u, Hs, G, D
        key, value = (x[0].transpose(0, 1).reshape(shape).squeeze(2) for x in (key, value))
        slots = step.slots[plane]
        pool.reserve(group.table.used[plane])
        if self._step_logs and type(group.rule) is not Keep:
            logs, at = self._step_logs[0], group.units(self._step_logs[1])
            before = layer, group.ordinals[plane, at], pool.rows(slots[at])
            for number, one in enumerate(logs):
                one.overwritten.append((*before, number))
        pool.write(slots, key, value)
        if self.quantized is not None:
            pool.remember(step.units, step.positions + 1, key[:, None], value[:, None])
        ranks = isinstance(group.rule, Lowest)
        if ranks:
            group.rule.arrive(plane, layer, step, group.split, key.to(self.precise))
        query = query[0].transpose(0, 1).reshape(shape)
        watch = ranks and self.policy.watches
        wide = shape[1] * query.shape[2] * group.split, self.head_dim  # H*G, D
        if isinstance(group.rule, Rounds):
            scaled = query.to(self.precise) * scale
            group.rule.remember(plane, step.units, step.positions + 1, scaled)
        out = torch.zeros(rows, *wide, dtype=self.dtype, device=self.device)
        to = out[:count].view(query.shape)
        _, probability = paged_attention.attend(query, pool, step, plane, watch, scale, to)
        if watch:
            group.rule.watch(plane, probability)
        return out.unsqueeze(0)

    def _attend_prompts(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Attention inside each packed prompt; only what the policy keeps is stored.

        query [H*G, rows, D]; key, value [H, rows, D]; returns [1, rows, H*G, D].
        """
        group, pool, out, rows, first = self.group_of[layer], self.pools[layer], [], [], 0
        shared = len(group.table.used) == 1 and group.stored
        group.stored = shared or []
        for number, (sequences, length, wide) in enumerate(self._segments):
            prefix_length = self._prefix[layer][0].shape[1] if self._prefix else 0
            last, padding = first + wide, prefix_length + wide - length
            q, k, v = (x[:, first:last] for x in (query, key, value))
            if prefix_length:
                k, v = (torch.cat(pair, 1) for pair in zip(self._prefix[layer], (k, v)))
            evicted = None
            if isinstance(group.rule, Delayed):
                # Token t+1 decides about t; the next step decides about the last token.
                evicted = self._evicted[first:last].T.roll(-1, 1)
            delay = getattr(group.rule, "window", 0)
            read, attended = prompt_attention(q, k, v, scale, group.window, evicted, delay, padding)
            self.attended[sequences] += attended / len(self.pools)
            out.append(read)
            q, k, v = q[:, : wide - padding], k[:, :length], v[:, :length]
            if not shared:
                scaled = q.to(self.precise) * scale
                evicted = None if evicted is None else evicted[:, :length]
                group.keep(layer, sequences, scaled, k.to(self.precise), evicted)
            if isinstance(group.rule, Rounds):
                asked = scaled.unflatten(0, (group.split, -1)).transpose(1, 2)  # [H, T, G, D]
                group.rule.remember(group.plane(layer), group.units(sequences), length, asked)
            # [units of a sequence, T, Hs, D]; stored tokens are repeated for each sequence
            k, v = (x.unflatten(0, (group.split, -1)).transpose(1, 2) for x in (k, v))
            stored, copies = group.stored[number][0], len(sequences)
            rows.append([x[stored].repeat(copies, 1, 1) for x in (k, v)])
            if self.quantized is not None:
                pool.remember(group.units(sequences), length, k, v)
            first = last
        pool.reserve(group.table.used[group.plane(layer)])
        pool.write(torch.cat([slots for _, slots in group.stored]), *map(torch.cat, zip(*rows)))
        out = torch.cat(out, 1).transpose(0, 1).contiguous().unsqueeze(0)
        return F.pad(out, (0, 0, 0, 0, 0, query.shape[1] - first))

    def read(self, sequence: int) -> SequenceCopy:
        """Copy of one sequence, for `restore`."""
        index, rows, tables = torch.tensor([sequence], device=self.device), {}, []
        for group in self.layer_groups:
            tables.append(group.read(index))
            for plane, (slots, *_) in enumerate(tables[-1][0]):
                for layer in group.layers_of(plane):
                    pool = self.pools[layer]
                    rows[layer] = pool.rows(slots), [x[group.units(index)] for x in pool.state]
        return SequenceCopy(self.attended[sequence].clone(), tables, rows)

    def restore(self, sequences: list[int], length: int, copy: SequenceCopy) -> None:
        """Give each of `sequences` the `length` tokens of the sequence that was `read`."""
        index, copies = torch.tensor(sequences, device=self.device), len(sequences)
        self.next_position[index], self.attended[index] = length, copy.attended
        for sequence in sequences:
            self.length[sequence] = length
        for group, tables in zip(self.layer_groups, copy.tables):
            for plane, slots in enumerate(group.restore(index, tables)):
                for layer in group.layers_of(plane):
                    pool, (rows, exact) = self.pools[layer], copy.rows[layer]
                    pool.reserve(group.table.used[plane])
                    pool.put(slots, [x.repeat(copies, *[1] * (x.dim() - 1)) for x in rows])
                    for target, source in zip(pool.state, exact):
                        target[group.units(index)] = source.repeat(copies, 1, 1, 1)

    def start_undo_log(self, sequence: int) -> None:
        """From now on log what steps of this sequence overwrite, for `rewind`."""
        index = torch.tensor([sequence], device=self.device)
        exact = [[x[g.units(index)] for x in p.state] for g, p in zip(self.group_of, self.pools)]
        tables = [group.read(index) for group in self.layer_groups]
        attended = self.attended[sequence].clone()
        self._undo_logs[sequence] = UndoLog(self.length[sequence], attended, tables, exact)

    def rewind(self, sequence: int) -> None:
        """Take back all steps of this sequence since `start_undo_log`."""
        log, index = self._undo_logs.pop(sequence), torch.tensor([sequence], device=self.device)
        if log.copy:
            self.release([sequence])
            self.restore([sequence], log.length, log.copy)
        for layer, ordinals, rows, number in reversed(log.overwritten):
            group, units = self.group_of[layer], self.group_of[layer].units(index)
            part = slice(number * group.split, (number + 1) * group.split)
            slots = group.table.slots(group.plane(layer), units, ordinals[part])
            self.pools[layer].put(slots, [row[part] for row in rows])
        for group, tables in zip(self.layer_groups, log.tables):
            self._move(group, group.rewind(index, tables))
        for group, pool, exact in zip(self.group_of, self.pools, log.exact):
            for target, source in zip(pool.state, exact):
                target[group.units(index)] = source
        self.next_position[index], self.attended[index] = log.length, log.attended
        self.length[sequence] = log.length

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
        self.attended.copy_(self.live_tokens())

    def release(self, sequences: list[int]) -> None:
        """Free the blocks of finished sequences."""
        index = torch.tensor(sequences, device=self.device)
        self.attended[index] = 0.0
        for sequence in sequences:
            self._undo_logs.pop(sequence, None)
            self.length[sequence] = 0
        for group in self.layer_groups:
            self._move(group, group.table.release(group.units(index)))

    def _move(self, group: LayerGroup, moves: list[tuple]) -> None:
        """Copy blocks as the table of a group has moved them."""
        for plane, each in enumerate(moves):
            for layer in group.layers_of(plane):
                self.pools[layer].move(*each)

    def live_positions(self, sequence: int) -> list[list[torch.Tensor]]:
        """Positions of the live tokens of one sequence, ascending, per layer and KV head, on the
        CPU."""
        index, positions = torch.tensor([sequence], device=self.device), []
        for layer, group in enumerate(self.group_of):
            positions.append(
                group.live_positions(group.plane(layer), index) * (self.heads // group.split)
            )
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
        """Bytes of all blocks that were ever used, and of the block tables."""
        return sum(x.nbytes() for x in [*self.pools, *self.layer_groups])


def forward(
    weights: PreTrainedModel, cache: SlotCache, tokens: torch.Tensor, positions, keep=0
) -> torch.Tensor:
    """Logits after the announced tokens, or after those at `keep`: [rows, V].

    tokens [1, rows]; position ids [1, n] of the announced ones, which padding follows.
    """
    return weights(
        input_ids=tokens,
        position_ids=F.pad(positions, (0, tokens.shape[1] - positions.shape[1])),
        use_cache=False,
        logits_to_keep=keep,
        slots=cache,
    ).logits[0]


def slot_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention function of transformers' models, computed by the SlotCache passed as `slots`."""
    if kwargs.get("softcap") is not None:
        raise ValueError(f"{type(module).__name__} caps its scores; the slot cache does not.")
    return kwargs["slots"].attend(module.layer_idx, query, key, value, scaling), None


# transformers builds no mask, since no mask function has this name; the cache masks by itself.
AttentionInterface.register("kit_slots", slot_attention)
