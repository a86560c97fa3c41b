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

from kit.slots import MASKED, Step, Table


class SlotCache:
    """The KV cache of a batch of sequences numbered 0 .. capacity-1.

    `prefill` or `step` announces the tokens of the next forward pass; the model's attention
    layers then call `attend`, which stores their keys and values and attends to what is live.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, block: int = 32):
        config = model.config.get_text_config()
        self.dtype, self.device = model.dtype, model.device
        self.capacity, self.block = capacity, block
        # Scores and sums are at least float32, as in fused attention kernels.
        self.precise = torch.promote_types(self.dtype, torch.float32)
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
            self._steps.append(Step(table, index, slots))
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
        q = (query[0].to(self.precise) * scale).view(
            self.heads, wide // self.heads, count, self.head_dim
        )
        q = q.permute(2, 0, 1, 3)[step.row]  # [n, H, G, D]
        keys, values = (pool[layer][:n].to(self.precise) for pool in (self.keys, self.values))
        scores = (q @ keys.transpose(-1, -2)).add_(step.bias)  # [n, H, G, Z]
        top = scores.amax(-1, keepdim=True)  # [n, H, G, 1]
        weight = scores.sub_(top).exp_()
        # Partial results of the blocks are joined per row with their softmax weights.
        part = torch.cat([weight @ values, weight.sum(-1, keepdim=True)], -1)  # [n, H, G, D+1]
        part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, 1))[step.blocks]  # [N, M, H, G, D+1]
        top = F.pad(top, (0, 0, 0, 0, 0, 0, 0, 1), value=MASKED)[step.blocks]
        joined = (part * (top - top.amax(1, keepdim=True)).exp_()).sum(1)  # [N, H, G, D+1]
        out = joined[..., :-1] / joined[..., -1:]
        return out.reshape(1, count, wide, self.head_dim).to(query.dtype)

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
