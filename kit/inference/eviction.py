"""Which token a new one replaces: rules on a block_table.BlockTable, one per kind of policy.

    Keep     no token is ever replaced
    PromptOnly   no token is ever replaced, but only the highest-ranked of a prompt are stored
    Ring     replaces the oldest token after the sinks, by arithmetic (windows)
    Lowest   replaces the token with the lowest score, by a search (policies that rank tokens)
    Rounds   no token is replaced; all but the highest-ranked are evicted together (R-KV)
    Delayed  replaces the token that DMS marked `window` steps ago, by a ring buffer of marks

Every rule has `prompt`, which tokens of a prompt to store; `admit`, which records their state;
`place`, where the next token of each unit goes; and `state`, the tensors per unit that are copied
with a sequence. A step adds one token to each unit and evicts at most one, so no slot of an evicted
token stays empty; after a round what is kept moves into the first slots of its unit. Policies with
their papers: `policies`.
"""

import torch

from kit.inference.block_table import BlockTable, StepIndex


class Keep:
    """Keeps every token."""

    def __init__(self, table: BlockTable):
        self.table, self.state = table, []

    def prompt(self, layer: int, query, key, evicted) -> tuple[torch.Tensor, None]:
        """Mask of the tokens to store [units of a sequence, T], and their scores (or None).

        query [H*G, T, D], scaled; key [H, T, D]; evicted [H, T] the decisions of DMS, else None.
        """
        return torch.ones(1, key.shape[1], dtype=torch.bool, device=key.device), None

    def most(self, length: int) -> int:
        """Tokens that a unit keeps at most of so many seen, while it decodes."""
        return length

    def admit(self, plane: int, units: torch.Tensor, slots, stored, score, evicted) -> None:
        """Record that the stored tokens of a prompt are in these slots, for each of the units."""

    def place(self, units: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Ordinal [P, u] that the token at `positions` [u] takes in each of `units` [u]."""
        return self.table.filled[:, units]


class Ring(Keep):
    """The first `sinks` tokens and the newest: `kept_tokens` of a prompt, `size` while decoding."""

    def __init__(self, table: BlockTable, sinks: int, kept_tokens: int, size: int):
        super().__init__(table)
        self.sinks, self.kept_tokens, self.size = sinks, kept_tokens, size
        # How many positions lie between the sinks and the first token stored after them.
        self.skipped = torch.zeros_like(table.filled)
        self.state = [self.skipped]

    def prompt(self, layer, query, key, evicted):
        stored, _ = super().prompt(layer, query, key, evicted)
        newest = key.shape[1] - self.kept_tokens + self.sinks
        stored[:, self.sinks : max(self.sinks, newest)] = False
        return stored, None

    def most(self, length):
        return min(length, self.size)

    def admit(self, plane, units, slots, stored, score, evicted):
        self.skipped[plane, units] = (~stored).sum()

    def place(self, units, positions):
        filled, ring = self.table.filled[:, units], self.size - self.sinks
        oldest = self.sinks + (positions - self.sinks - self.skipped[:, units]) % ring
        return torch.where(filled < self.size, filled, oldest)


class PromptOnly(Keep):
    """Reduces a prompt to the policy's budget, then keeps every token."""

    def __init__(self, table: BlockTable, policy):
        super().__init__(table)
        self.policy = policy

    def prompt(self, layer, query, key, evicted):
        score = self.policy.prompt_scores(layer, query, key)  # [units of a sequence, T]
        return self.highest(score, score.shape[1]), score

    def highest(self, score: torch.Tensor, seen: int) -> torch.Tensor:
        """Mask of the tokens with `score` [u, n] that the budget keeps after `seen` tokens."""
        budget, length = self.policy.budget(torch.tensor(seen)), score.shape[1]
        rank = score.clone()
        rank[:, length - int(self.policy.recent(budget)) :] = torch.inf
        best = rank.topk(min(int(budget), length), 1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)


class Lowest(PromptOnly):
    """Evicts the token with the lowest score when a unit exceeds the policy's budget."""

    def most(self, length):
        return min(length, int(self.policy.budget(torch.tensor(length))) + 1)

    def admit(self, plane, units, slots, stored, score, evicted):
        copies = len(units) // len(stored)
        self.table.score.flatten(1)[plane, slots] = score[stored].repeat(copies)

    def place(self, units, positions):
        table, budget = self.table, self.policy.budget(positions)
        filled = table.filled[:, units]
        score = table.score - table.bias  # the score of a free slot is 1e30
        old = torch.zeros_like(table.filled[0])
        old[units] = positions - self.policy.recent(budget)
        score.masked_fill_(table.position >= old[table.owner].unsqueeze(2), torch.inf)
        # The lowest of each block, then of each unit's blocks, then the slot in that block.
        blocks = table.blocks[:, units].long()
        lowest = score.amin(2).gather(1, blocks.flatten(1)).view_as(blocks)
        rank = torch.arange(blocks.shape[2], device=table.device)
        beyond = rank >= -(-filled // table.block).unsqueeze(2)
        rank = lowest.masked_fill_(beyond, torch.inf).argmin(2, keepdim=True)
        offset = score[table.planes, blocks.gather(2, rank).squeeze(2)].argmin(2)
        return torch.where(filled > budget, rank.squeeze(2) * table.block + offset, filled)

    def arrive(
        self, plane: int, layer: int, step: StepIndex, split: int, key: torch.Tensor
    ) -> None:
        """Score the new tokens of a layer with keys [u, Hs, D]; `split` units are a sequence."""
        score = self.policy.arrival(layer, step.units % split, step.positions, key)
        self.table.score.flatten(1)[plane, step.slots[plane]] = score

    def watch(self, plane: int, probability: torch.Tensor) -> None:
        """Update the scores from the attention of this step, [n, Hs, G, Z] over blocks in use."""
        score = self.table.score[plane, : len(probability)]
        score.copy_(self.policy.update(score, probability))


class Rounds(PromptOnly):
    """Evicts all tokens but the highest-ranked at every `policy.buffer`-th token of a sequence."""

    def __init__(self, table: BlockTable, policy, group: int, size: int, precise: torch.dtype):
        super().__init__(table, policy)
        shape = (*table.filled.shape, policy.window, group, size)
        # Scaled queries [P, U, window, G, D]: that of the token at position p is at p % window.
        self.queries = torch.zeros(shape, dtype=precise, device=table.device)
        self.state = [self.queries]

    def most(self, length):
        budget = int(self.policy.budget(torch.tensor(length)))
        return min(length, budget + self.policy.buffer)

    def due(self, unit: int, length: int) -> bool:
        """Whether this unit, of a sequence of so many tokens, has some to evict before the next."""
        if length % self.policy.buffer:
            return False
        return int(self.table.filled[0, unit]) > int(self.policy.budget(torch.tensor(length)))

    def remember(self, plane: int, units: torch.Tensor, end, query: torch.Tensor) -> None:
        """Store the newest of these queries: units [u], queries [rows, t, G, D], scaled, of the t
        tokens before position `end` (one number, or [u]); rows repeat to match the units."""
        window = self.policy.window
        ago = min(query.shape[1], window)
        at = torch.as_tensor(end, device=units.device).expand(len(units)).unsqueeze(1)
        at = at - torch.arange(ago, 0, -1, device=units.device)  # [u, ago]
        newest = query[:, -ago:].repeat(len(units) // len(query), 1, 1, 1)
        self.queries[plane, units.unsqueeze(1), at % window] = newest

    def keep(self, plane: int, layer: int, units: torch.Tensor, seen: int, key) -> torch.Tensor:
        """Ordinals [u, kept] of the tokens with keys [u, n, D] that stay after `seen` tokens."""
        query = self.queries[plane, units].permute(0, 2, 1, 3).flatten(0, 1)  # [u*G, window, D]
        score = self.policy.prompt_scores(layer, query, key)
        return self.highest(score, seen).nonzero()[:, 1].view(len(units), -1)


class Delayed(Keep):
    """DMS: a marked token is evicted once `window` later tokens have attended to it."""

    def __init__(self, table: BlockTable, window: int):
        super().__init__(table)
        self.window, self.length = window, window + 1
        shape = (*table.filled.shape, self.length)
        # At p % length: ordinal of the token at position p, and whether it is marked for eviction.
        self.ordinal = torch.zeros(shape, dtype=torch.int32, device=table.device)
        self.marked = torch.zeros(shape, dtype=torch.bool, device=table.device)
        self.state = [self.ordinal, self.marked]

    def prompt(self, layer, query, key, evicted):
        stored = ~evicted
        stored[:, max(0, stored.shape[1] - self.window) :] = True
        return stored, None

    def admit(self, plane, units, slots, stored, score, evicted):
        length, copies = stored.shape[1], len(units) // len(stored)
        recent = torch.arange(max(0, length - self.window), length, device=units.device)
        where = plane, units.unsqueeze(1), recent % self.length
        self.marked[plane, units] = False  # decisions on tokens older than the window are final
        self.marked[where] = evicted[:, recent].repeat(copies, 1)
        self.ordinal[where] = (stored.cumsum(1) - 1)[:, recent].repeat(copies, 1).int()

    def place(self, units, positions):
        where = slice(None), units, positions % self.length  # the token `window` + 1 ago
        self.before = (positions - 1) % self.length
        filled, old = self.table.filled[:, units], self.ordinal[where].long()
        ordinals = torch.where(self.marked[where], old, filled)
        self.ordinal[where] = ordinals.int()
        return ordinals

    def mark(self, plane: int, units: torch.Tensor, evicted: torch.Tensor) -> None:
        """Set the decision [u] on the token before the one of each of `units` [u] that `place` was
        asked for last."""
        self.marked[plane, units, self.before] = evicted
