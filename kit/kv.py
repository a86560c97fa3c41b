"""The slot cache: keys and values in pooled blocks, one pool per layer.

A sequence owns blocks of `block` slots. A new token takes a free slot of its sequence,
else a fresh block; a finished or evicted block is handed back by moving the last block
into the hole, so what is allocated follows what is live. Slots carry the logical position
of their token, so RoPE never sees where a token is stored, and there is no padding:
prompts of any length stand packed in one row of tokens.

Layers that attend alike share one Table. Sliding-window layers have their own, from which
tokens are evicted as the window passes them; other eviction policies fit the same place.

Axes: N sequences in this step, T tokens of a prompt, n blocks in use, Z slots per block,
      H KV heads, G query heads per KV head, D head size.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

MASKED = -1e30  # finite, so that a fully masked block gets weight 0 and not nan


class Table:
    """Which slot of the pool holds which token of which sequence.

    position: [n, Z] logical position of the token in a slot, -1 where the slot is free
    owner:    [n] sequence that owns the block
    """

    def __init__(self, block: int, window: int | None, device):
        self.block, self.window, self.device = block, window, device
        self.position = torch.empty(0, block, dtype=torch.long, device=device)
        self.owner = torch.empty(0, dtype=torch.long, device=device)

    def _append(self, owner: torch.Tensor) -> None:
        fresh = torch.full((len(owner), self.block), -1, device=self.device)
        self.position = torch.cat([self.position, fresh])
        self.owner = torch.cat([self.owner, owner])

    def kept(self, length: int) -> int:
        """How many tokens of a prompt of `length` stay live."""
        return length if self.window is None else min(length, self.window)

    def extend(self, sequence: int, length: int) -> torch.Tensor:
        """Slots for the last tokens of a prompt of `length`: flat slots [kept]."""
        kept = self.kept(length)
        first = len(self.owner) * self.block
        blocks = -(-kept // self.block)
        self._append(torch.full((blocks,), sequence, device=self.device))
        slots = torch.arange(first, first + kept, device=self.device)
        self.position.view(-1)[slots] = torch.arange(length - kept, length, device=self.device)
        return slots

    def claim(self, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One free slot for the next token of each of the N live sequences: flat slots [N]."""
        room = (self.position < 0).any(1)
        count = int(sequences.max()) + 1
        where = torch.full((count,), len(self.owner), device=self.device)
        candidates = torch.arange(len(self.owner), device=self.device)[room]
        where.scatter_reduce_(0, self.owner[room], candidates, "amin")
        block = where[sequences]
        needy = block == len(self.owner)
        if needy.any():
            fresh = len(self.owner) + torch.arange(int(needy.sum()), device=self.device)
            self._append(sequences[needy])
            block[needy] = fresh
        slots = block * self.block + (self.position[block] < 0).int().argmax(1)
        self.position.view(-1)[slots] = positions
        return slots

    def slide(self, next_position: torch.Tensor) -> None:
        """Free the slots that the window has passed. next_position: [sequences]."""
        if self.window is not None and len(self.owner):
            oldest = next_position[self.owner] - self.window
            self.position[self.position <= oldest.unsqueeze(1)] = -1

    def compact(self, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drop the blocks where `keep` [n] is false: returns (to, from) block moves."""
        total = int(keep.sum())
        to = (~keep[:total]).nonzero().flatten()
        source = keep[total:].nonzero().flatten() + total
        self.owner[to], self.position[to] = self.owner[source], self.position[source]
        self.owner, self.position = self.owner[:total], self.position[:total]
        return to, source

    def live_tokens(self, count: int) -> torch.Tensor:
        """Valid slots of each of the sequences 0 .. count-1: [count]."""
        live = torch.zeros(count, dtype=torch.long, device=self.device)
        return live.index_add_(0, self.owner, (self.position >= 0).sum(1))


class Step:
    """What one decode step needs of one table, computed once for all of its layers."""

    def __init__(self, table: Table, sequences: torch.Tensor, slots: torch.Tensor, dtype):
        self.slots = slots  # [N] flat slot of each new token
        count, n = len(sequences), len(table.owner)
        row_of = torch.full((int(sequences.max()) + 1,), -1, device=table.device)
        row_of[sequences] = torch.arange(count, device=table.device)
        self.row = row_of[table.owner]  # [n] row of this step that a block answers to
        self.masked = max(MASKED, torch.finfo(dtype).min / 2)  # float16 ends at -65504
        bias = torch.zeros(n, table.block, dtype=dtype, device=table.device)
        self.bias = bias.masked_fill_(table.position < 0, self.masked)[:, None, None]  # [n,1,1,Z]
        # [N, M] blocks of each row, padded with n: the index of an empty partial result.
        order = torch.argsort(self.row, stable=True)
        per_row = torch.bincount(self.row, minlength=count)
        start = per_row.cumsum(0) - per_row
        rank = torch.arange(n, device=table.device) - start[self.row[order]]
        self.blocks = torch.full((count, int(per_row.max())), n, device=table.device)
        self.blocks[self.row[order], rank] = order


class SlotCache:
    """The KV cache of a batch of sequences numbered 0 .. capacity-1.

    `prefill` or `step` announces the tokens of the next forward pass; the model's attention
    layers then call `attend`, which stores their keys and values and attends to what is live.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, block: int = 32):
        config = model.config.get_text_config()
        self.dtype, self.device, self.capacity, self.block = (
            model.dtype,
            model.device,
            capacity,
            block,
        )
        self.heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        windows = layer_windows(config)
        kinds = sorted(set(windows), key=str)
        self.tables = [Table(block, window, self.device) for window in kinds]
        self.table_of = [kinds.index(window) for window in windows]  # layer -> table
        empty = torch.empty(
            0, self.heads, block, self.head_dim, dtype=self.dtype, device=self.device
        )
        self.keys = [empty for _ in windows]  # per layer [capacity of the pool, H, Z, D]
        self.values = [empty for _ in windows]
        self.next_position = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self._segments, self._steps, self._slots = None, None, None

    def prefill(self, groups: list[list[int]], lengths: list[int]) -> torch.Tensor:
        """Announce whole prompts, packed one after the other: position ids [1, sum T].

        Each prompt is read once for all the sequences of its group.
        """
        self._steps, self._segments = None, (groups, lengths)
        self._slots = [self._extend(table, groups, lengths) for table in self.tables]
        self._grow()
        return torch.cat([torch.arange(t, device=self.device) for t in lengths]).unsqueeze(0)

    def _extend(self, table: Table, groups, lengths) -> torch.Tensor:
        """Slots in one table for the prompts of all groups, sequence by sequence: flat."""
        slots = []
        for group, length in zip(groups, lengths):
            slots += [table.extend(sequence, length) for sequence in group]
            self.next_position[group] = length
        return torch.cat(slots)

    def read(self, sequence: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copy of the live keys and values of one sequence, per layer [H, kept, D]."""
        copies = []
        for layer, number in enumerate(self.table_of):
            table = self.tables[number]
            mine = (table.owner[:, None] == sequence) & (table.position >= 0)
            slots = mine.flatten().nonzero().flatten()
            slots = slots[table.position.view(-1)[slots].argsort()]
            block, offset = slots // self.block, slots % self.block
            pools = self.keys[layer], self.values[layer]
            copies.append(tuple(pool[block, :, offset].transpose(0, 1) for pool in pools))
        return copies

    def restore(self, group: list[int], length: int, copies) -> None:
        """Give every sequence of `group` the prompt of `length` tokens that `read` returned."""
        slots = [self._extend(table, [group], [length]) for table in self.tables]
        self._grow()
        for layer, (key, value) in enumerate(copies):
            repeated = (torch.cat([x] * len(group), 1) for x in (key, value))
            self._store(layer, slots[self.table_of[layer]], *repeated)

    def step(self, sequences: list[int]) -> torch.Tensor:
        """Announce one new token for each of the N live sequences: position ids [1, N]."""
        index = torch.tensor(sequences, device=self.device)
        positions = self.next_position[index]
        self._segments, self._steps = None, []
        for table in self.tables:
            table.slide(self.next_position)
            slots = table.claim(index, positions)
            self._steps.append(Step(table, index, slots, self.dtype))
        self.next_position[index] += 1
        self._grow()
        return positions.unsqueeze(0)

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Store the announced tokens of this layer and attend.

        query [1, H*G, N, D]; key, value [1, H, N, D]; returns [1, N, H*G, D].
        """
        if self._segments is not None:
            return self._attend_prompts(layer, query, key, value, scale)
        step = self._steps[self.table_of[layer]]
        self._store(layer, step.slots, key[0], value[0])
        n, (_, wide, count, _) = len(step.row), query.shape
        q = (query[0] * scale).view(self.heads, wide // self.heads, count, self.head_dim)
        q = q.permute(2, 0, 1, 3)[step.row]  # [n, H, G, D]
        keys, values = self.keys[layer][:n], self.values[layer][:n]
        scores = (q @ keys.transpose(-1, -2)).add_(step.bias)  # [n, H, G, Z]
        top = scores.amax(-1, keepdim=True)  # [n, H, G, 1]
        weight = scores.sub_(top).exp_()
        # Partial results of the blocks are joined per row with their softmax weights.
        part = torch.cat([weight @ values, weight.sum(-1, keepdim=True)], -1)  # [n, H, G, D+1]
        part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, 1))[step.blocks]  # [N, M, H, G, D+1]
        top = F.pad(top, (0, 0, 0, 0, 0, 0, 0, 1), value=step.masked)[step.blocks]
        joined = (part * (top - top.amax(1, keepdim=True)).exp_()).sum(1)  # [N, H, G, D+1]
        out = joined[..., :-1] / joined[..., -1:]
        return out.reshape(1, count, wide, self.head_dim)

    def _attend_prompts(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Causal attention inside each packed prompt; only what stays live is stored."""
        table = self.tables[self.table_of[layer]]
        out, stored, first = [], [], 0
        for group, length in zip(*self._segments):
            end = first + length
            q, k, v = (x[:, :, first:end] for x in (query, key, value))
            mask = None
            if table.kept(length) < length:
                at = torch.arange(length, device=self.device)
                ago = at[:, None] - at[None, :]
                mask = (ago >= 0) & (ago < table.window)
            out.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
            )
            stored += [slice(end - table.kept(length), end)] * len(group)
            first = end
        both = (torch.cat([x[0][:, s] for s in stored], 1) for x in (key, value))
        self._store(layer, self._slots[self.table_of[layer]], *both)
        return torch.cat(out, 2).transpose(1, 2)

    def _store(self, layer: int, slots: torch.Tensor, key, value) -> None:
        """Write key and value [H, N, D] into flat slots [N] of the layer's pool."""
        block, offset = slots // self.block, slots % self.block
        self.keys[layer][block, :, offset] = key.transpose(0, 1)
        self.values[layer][block, :, offset] = value.transpose(0, 1)

    def release(self, sequences: list[int]) -> None:
        """Forget finished sequences and hand their blocks back."""
        index = torch.tensor(sequences, device=self.device)
        for number, table in enumerate(self.tables):
            to, source = table.compact(~torch.isin(table.owner, index))
            for pool in self._pools(number):
                pool[to] = pool[source]

    def _pools(self, table: int):
        layers = [i for i, t in enumerate(self.table_of) if t == table]
        return [self.keys[i] for i in layers] + [self.values[i] for i in layers]

    def _grow(self) -> None:
        """Give every pool room for the blocks its table uses, an eighth more at a time."""
        for layer, number in enumerate(self.table_of):
            need, have = len(self.tables[number].owner), len(self.keys[layer])
            if need > have:
                more = max(need, have + have // 8) - have
                for pools in (self.keys, self.values):
                    # Fresh blocks are zeroed: a free slot has weight 0, and 0 x nan is nan.
                    pools[layer] = F.pad(pools[layer], (0, 0, 0, 0, 0, 0, 0, more))

    def live_tokens(self) -> torch.Tensor:
        """Live KV entries of each sequence, mean over layers and heads: [capacity] float64."""
        per_table = [table.live_tokens(self.capacity).double() for table in self.tables]
        return sum(per_table[number] for number in self.table_of) / len(self.table_of)

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token over all layers and heads."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        return 2 * len(self.table_of) * self.heads * self.head_dim * size

    def nbytes(self) -> int:
        """Allocated bytes of all pools, used or not."""
        return sum(pool.nbytes for pool in [*self.keys, *self.values])


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
