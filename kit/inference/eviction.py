"""Which token a new one replaces: four small rules beside a slots.Table, one per kind of policy.

    Keep     nothing is ever replaced
    Ring     the oldest token after the sinks, by arithmetic (windows)
    Lowest   the token that ranks lowest, by a search over the scores (policies that rank)
    Delayed  the token that DMS marked `window` steps ago, by a ring of marks

Every rule answers the same four questions: `prompt`, which tokens of a prompt are stored;
`admit`, what to remember of them; `place`, where the next token of each unit goes; and `state`,
what belongs to a unit and is copied with it. A step adds one token to each unit and frees at
most one, so a replaced token's slot never stays empty. Policies with their papers: `policies`.
"""

import torch

from kit.inference.block_table import Step, Table


class Keep:
    """Every token stays."""

    def __init__(self, table: Table):
        self.table, self.state = table, []

    def prompt(self, layer: int, query, key, evicted) -> tuple[torch.Tensor, None]:
        """Which tokens are stored [units of a sequence, T], and what each is worth (or None).

        query [H*G, T, D], scaled; key [H, T, D]; evicted [H, T] as DMS decided, else None.
        """
        return torch.ones(1, key.shape[1], dtype=torch.bool, device=key.device), None

    def admit(self, plane: int, units: torch.Tensor, slots, stored, worth, evicted) -> None:
        """Hear that the stored tokens of a prompt are in these slots, for each of the units."""

    def place(self, units: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Ordinal [P, u] that the token at `positions` [u] takes in each of `units` [u]."""
        return self.table.filled[:, units]


class Ring(Keep):
    """The first `sinks` tokens and the newest: `kept` of a prompt, up to `size` while decoding."""

    def __init__(self, table: Table, sinks: int, kept: int, size: int):
        super().__init__(table)
        self.sinks, self.kept, self.size = sinks, kept, size
        # How many positions lie between the sinks and the first token stored after them.
        self.skipped = torch.zeros_like(table.filled)
        self.state = [self.skipped]

    def prompt(self, layer, query, key, evicted):
        stored, _ = super().prompt(layer, query, key, evicted)
        stored[:, self.sinks : max(self.sinks, key.shape[1] - self.kept + self.sinks)] = False
        return stored, None

    def admit(self, plane, units, slots, stored, worth, evicted):
        self.skipped[plane, units] = (~stored).sum()

    def place(self, units, positions):
        filled, ring = self.table.filled[:, units], self.size - self.sinks
        oldest = self.sinks + (positions - self.sinks - self.skipped[:, units]) % ring
        return torch.where(filled < self.size, filled, oldest)


class Lowest(Keep):
    """What the policy ranks lowest goes when a unit holds more than the policy's budget."""

    def __init__(self, table: Table, policy):
        super().__init__(table)
        self.policy = policy

    def prompt(self, layer, query, key, evicted):
        worth = self.policy.prompt_scores(layer, query, key)  # [units of a sequence, T]
        seen = torch.tensor(worth.shape[1], device=key.device)
        budget = self.policy.budget(seen)
        rank = worth.clone()
        rank[:, int(seen - self.policy.recent(budget)) :] = torch.inf
        best = rank.topk(int(torch.minimum(budget, seen)), 1).indices
        return torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True), worth

    def admit(self, plane, units, slots, stored, worth, evicted):
        copies = len(units) // len(stored)
        self.table.score.flatten(1)[plane, slots] = worth[stored].repeat(copies)

    def place(self, units, positions):
        table, filled, budget = (
            self.table,
            self.table.filled[:, units],
            self.policy.budget(positions),
        )
        worth = table.score - table.bias  # free slots are worth 1e30
        old = torch.zeros_like(table.filled[0])
        old[units] = positions - self.policy.recent(budget)
        worth.masked_fill_(table.position >= old[table.owner].unsqueeze(2), torch.inf)
        # The lowest of each block, then of each unit's blocks, then the slot in that block.
        blocks = table.blocks[:, units].long()
        lowest = worth.amin(2).gather(1, blocks.flatten(1)).view_as(blocks)
        rank = torch.arange(blocks.shape[2], device=table.device)
        beyond = rank >= -(-filled // table.block).unsqueeze(2)
        rank = lowest.masked_fill_(beyond, torch.inf).argmin(2, keepdim=True)
        offset = worth[table.planes, blocks.gather(2, rank).squeeze(2)].argmin(2)
        return torch.where(filled > budget, rank.squeeze(2) * table.block + offset, filled)

    def arrive(self, plane: int, layer: int, step: Step, split: int, key: torch.Tensor) -> None:
        """Score the new tokens of a layer with keys [u, Hs, D]; `split` units are a sequence."""
        score = self.policy.arrival(layer, step.units % split, step.positions, key)
        self.table.score.flatten(1)[plane, step.slots[plane]] = score

    def watch(self, plane: int, probability: torch.Tensor) -> None:
        """Update the scores from the attention of this step, [n, Hs, G, Z] over blocks in use."""
        score = self.table.score[plane, : len(probability)]
        score.copy_(self.policy.update(score, probability))


class Delayed(Keep):
    """DMS: a token that was marked goes once `window` later tokens have seen it."""

    def __init__(self, table: Table, window: int):
        super().__init__(table)
        self.window, self.length = window, window + 1
        shape = (*table.filled.shape, self.length)
        # Of the token at position p, at p % length: its ordinal and whether it is to go.
        self.ordinal = torch.zeros(shape, dtype=torch.int32, device=table.device)
        self.marked = torch.zeros(shape, dtype=torch.bool, device=table.device)
        self.state = [self.ordinal, self.marked]

    def prompt(self, layer, query, key, evicted):
        stored = ~evicted
        stored[:, max(0, stored.shape[1] - self.window) :] = True
        return stored, None

    def admit(self, plane, units, slots, stored, worth, evicted):
        length, copies = stored.shape[1], len(units) // len(stored)
        recent = torch.arange(max(0, length - self.window), length, device=units.device)
        where = plane, units.unsqueeze(1), recent % self.length
        self.marked[plane, units] = False  # what is older than the window was decided for good
        self.marked[where] = evicted[:, recent].repeat(copies, 1)
        self.ordinal[where] = (stored.cumsum(1) - 1)[:, recent].repeat(copies, 1).int()

    def place(self, units, positions):
        where = slice(None), units, positions % self.length  # the token `window` + 1 ago
        filled, old = self.table.filled[:, units], self.ordinal[where].long()
        ordinals = torch.where(self.marked[where], old, filled)
        self.ordinal[where] = ordinals.int()
        return ordinals

    def mark(self, plane: int, units: torch.Tensor, positions, evicted: torch.Tensor) -> None:
        """Take the decision [u] on the tokens before `positions` [u]."""
        self.marked[plane, units, (positions - 1) % self.length] = evicted
