"""The slot cache against slow references: a dictionary of tokens, and dense softmax attention."""

import copy
import random

import pytest
import torch

from kit import models
from kit.kv import SlotCache, Table, layer_windows

SHAPES = sorted(models.RANDOM)  # query heads per KV head: gemma3 1, llama 3, qwen3 8


@pytest.fixture(scope="module")
def wide() -> dict:
    """One float64 model per family: only its shape is used."""
    return {shape: models.load(f"random:{shape}", dtype="float64").weights for shape in SHAPES}


class Walk:
    """A Table under random operations, next to a dictionary that says what it must hold."""

    def __init__(self, block: int, window: int | None, seed: int):
        self.rng, self.window = random.Random(seed), window
        self.table = Table(block, window, torch.device("cpu"))
        self.pool = torch.zeros(10_000, block, dtype=torch.long)  # payload, as the cache keeps it
        self.live: dict[int, dict[int, int]] = {}  # sequence -> position -> payload
        self.following: dict[int, int] = {}  # sequence -> its next position
        self.stamps = 0

    def put(self, sequence: int, slots: torch.Tensor, positions: list[int]) -> None:
        assert len(set(slots.tolist())) == len(slots) == len(positions), "a slot is given twice"
        for slot, position in zip(slots.tolist(), positions):
            self.stamps += 1
            self.pool.view(-1)[slot] = self.stamps
            self.live[sequence][position] = self.stamps

    def extend(self, sequence: int) -> None:
        length = self.rng.randint(1, 30)
        slots, kept = self.table.extend(sequence, length), min(length, self.window or length)
        assert len(slots) == self.table.kept(length) == kept
        self.live[sequence], self.following[sequence] = {}, length
        self.put(sequence, slots, list(range(length - kept, length)))

    def step(self) -> None:
        following = torch.zeros(10, dtype=torch.long)
        for sequence, position in self.following.items():
            following[sequence] = position
        self.table.slide(following)
        for sequence, tokens in self.live.items():
            oldest = self.following[sequence] - (self.window or 10**9)
            self.live[sequence] = {p: stamp for p, stamp in tokens.items() if p > oldest}
        chosen = self.rng.sample(sorted(self.live), len(self.live))
        before = self.occupied()
        slots = self.table.claim(torch.tensor(chosen), following[chosen])
        assert len(set(slots.tolist())) == len(chosen), "two sequences share a slot"
        assert not before & set(slots.tolist()), "a live slot is given away"
        for sequence, slot in zip(chosen, slots):
            self.put(sequence, slot[None], [self.following[sequence]])
            self.following[sequence] += 1

    def release(self) -> None:
        ended = self.rng.sample(sorted(self.live), self.rng.randint(1, len(self.live)))
        to, source = self.table.compact(~torch.isin(self.table.owner, torch.tensor(ended)))
        self.pool[to] = self.pool[source]
        for sequence in ended:
            del self.live[sequence], self.following[sequence]

    def occupied(self) -> set[int]:
        return set((self.table.position.view(-1) >= 0).nonzero().flatten().tolist())

    def check(self) -> None:
        held: dict[int, dict[int, int]] = {}
        used = self.table.owner, self.table.position, self.pool[: len(self.table.owner)]
        for owner, positions, payload in zip(*(x.tolist() for x in used)):
            tokens = held.setdefault(owner, {})
            for position, stamp in zip(positions, payload):
                if position >= 0:
                    assert position not in tokens, "a token is held twice"
                    tokens[position] = stamp
        assert held == self.live
        counts = [len(self.live.get(sequence, ())) for sequence in range(10)]
        assert self.table.live_tokens(10).tolist() == counts
        blocks = torch.bincount(self.table.owner, minlength=10).tolist()
        for sequence, tokens in self.live.items():
            # Full attention wastes less than a block; a window never needs more than it spans.
            need = len(tokens) if self.window is None else self.window
            assert blocks[sequence] <= -(-need // self.table.block)


@pytest.mark.parametrize("block, window", [(4, None), (32, None), (4, 10), (8, 8), (1, 3), (16, 5)])
def test_table_holds_what_a_dictionary_holds(block, window):
    for seed in range(4):
        walk = Walk(block, window, seed)
        released = 0
        for _ in range(120):
            free = [sequence for sequence in range(10) if sequence not in walk.live]
            act = walk.rng.random()
            if free and (not walk.live or act < 0.2):
                for sequence in walk.rng.sample(free, walk.rng.randint(1, min(3, len(free)))):
                    walk.extend(sequence)
            elif act < 0.3:
                walk.release()
                released += 1
            else:
                walk.step()
            walk.check()
        assert released > 3 and walk.stamps > 300  # the walk did something


class Dense:
    """What attention must give: every key and value kept, softmax over those in sight."""

    def __init__(self, windows: list[int | None]):
        self.windows = windows
        self.kept: dict[tuple[int, int], list] = {}  # (sequence, layer) -> [(key, value)] [H, D]

    def attend(self, sequence: int, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """One token: query [H*G, D], key and value [H, D]; returns [H*G, D]."""
        tokens = self.kept.setdefault((sequence, layer), [])
        tokens.append((key, value))
        window = self.windows[layer]
        seen = tokens if window is None else tokens[-window:]
        group = len(query) // len(key)
        heads = []
        for head, q in enumerate(query):
            keys, values = (torch.stack([t[i][head // group] for t in seen]) for i in (0, 1))
            heads.append(torch.softmax(keys @ q * scale, 0) @ values)
        return torch.stack(heads)

    def copy(self, sequence: int, to: int) -> None:
        for layer in range(len(self.windows)):
            self.kept[to, layer] = list(self.kept[sequence, layer])

    def forget(self, sequence: int) -> None:
        self.kept = {k: v for k, v in self.kept.items() if k[0] != sequence}


class Crowd:
    """A SlotCache and Dense fed the same random tokens: SAVED is a prompt that was set aside."""

    PLACES, SAVED, SCALE = 5, 99, 0.3

    def __init__(self, weights, seed: int):
        self.rng, self.noise = random.Random(seed), torch.Generator().manual_seed(seed)
        self.cache = SlotCache(weights, self.PLACES, block=4)
        self.dense = Dense(layer_windows(weights.config))
        self.heads = weights.config.num_attention_heads
        self.lengths: dict[int, int] = {}  # running place -> tokens so far
        self.saved = None  # length of the set-aside prompt, and what the cache says of it
        self.restored = 0

    def feed(self, owners: list[int]) -> None:
        """One forward pass of every layer over packed tokens; `owners` names their sequences."""
        cache, count = self.cache, len(owners)
        # Sequences of very different size: a key or value read from a neighbour cannot hide.
        size = 10.0 ** torch.tensor(owners, dtype=torch.float64)[:, None]
        for layer in range(len(self.dense.windows)):
            query, key, value = (
                torch.randn(n, count, cache.head_dim, dtype=torch.float64, generator=self.noise)
                for n in (self.heads, cache.heads, cache.heads)
            )
            query, key, value = query / size, key * size, value * size
            out = cache.attend(layer, query[None], key[None], value[None], self.SCALE)
            assert out.shape == (1, count, self.heads, cache.head_dim)
            for at, owner in enumerate(owners):
                token = query[:, at], key[:, at], value[:, at]
                expected = self.dense.attend(owner, layer, *token, self.SCALE)
                torch.testing.assert_close(out[0, at], expected, rtol=1e-9, atol=0)

    def some_free(self) -> list[int]:
        free = [place for place in range(self.PLACES) if place not in self.lengths]
        return self.rng.sample(free, self.rng.randint(1, len(free)))

    def prefill(self) -> None:
        places = self.some_free()
        cut = self.rng.randint(0, len(places) - 1)
        groups = [group for group in (places[:cut], places[cut:]) if group]
        lengths = [self.rng.randint(1, 40) for _ in groups]
        positions = self.cache.prefill(groups, lengths)
        assert positions[0].tolist() == [p for length in lengths for p in range(length)]
        self.feed([group[0] for group, n in zip(groups, lengths) for _ in range(n)])
        for group, length in zip(groups, lengths):
            for place in group:
                self.dense.copy(group[0], place)
                self.lengths[place] = length
        self.save(groups[-1][-1])

    def save(self, place: int) -> None:
        self.dense.copy(place, self.SAVED)
        self.saved = self.lengths[place], self.cache.read(place)

    def restore(self) -> None:
        places = self.some_free()
        self.cache.restore(places, *self.saved)
        for place in places:
            self.dense.copy(self.SAVED, place)
            self.lengths[place] = self.saved[0]
        self.restored += 1

    def step(self) -> None:
        places = self.rng.sample(sorted(self.lengths), len(self.lengths))  # in any order
        positions = self.cache.step(places)
        assert positions[0].tolist() == [self.lengths[place] for place in places]
        self.feed(places)
        for place in places:
            self.lengths[place] += 1
        if self.rng.random() < 0.2:
            self.save(places[0])

    def release(self) -> None:
        ended = self.rng.sample(sorted(self.lengths), self.rng.randint(1, len(self.lengths)))
        self.cache.release(ended)
        for place in ended:
            self.dense.forget(place)
            del self.lengths[place]

    def live(self) -> list[float]:
        """Live entries of each place, mean over layers, from the lengths alone."""
        ends = [self.lengths.get(place, 0) for place in range(self.PLACES)]
        windows = [window or 10**9 for window in self.dense.windows]
        return [sum(min(end, window) for window in windows) / len(windows) for end in ends]


@pytest.mark.parametrize("shape", SHAPES)
def test_attend_equals_dense_softmax_while_sequences_come_and_go(wide, shape):
    crowd = Crowd(wide[shape], seed=1)
    for _ in range(45):
        act, room = crowd.rng.random(), len(crowd.lengths) < crowd.PLACES
        if not crowd.lengths or (room and act < 0.15):
            crowd.prefill()
        elif room and act < 0.3:
            crowd.restore()
        elif act < 0.4:
            crowd.release()
        else:
            crowd.step()
        assert crowd.cache.live_tokens().tolist() == crowd.live()
    assert crowd.restored > 1


@pytest.mark.parametrize("shape", ["llama", "gemma3"])
def test_a_burst_is_paid_once(wide, shape):
    cache = SlotCache(wide[shape], 8, block=8)
    assert cache.nbytes() == 0
    lengths, sizes = [40, 8, 17, 3, 60, 25, 31, 9], []
    for _ in range(6):
        cache.prefill([[place] for place in range(8)], lengths)
        for _ in range(10):
            cache.step(list(range(8)))
        sizes.append(cache.nbytes())
        cache.release([5, 0, 7])
        cache.release([1, 2, 3, 4, 6])
        assert cache.live_tokens().sum() == 0
    assert len(set(sizes)) == 1, "blocks that were handed back are used again"
    windows = layer_windows(wide[shape].config)
    ends = [min(length + 10, window or 10**9) for window in windows for length in lengths]
    block_bytes = 8 * cache.token_bytes / len(windows)
    needed = sum(-(-end // 8) for end in ends) * block_bytes
    assert needed <= sizes[0] <= 1.125 * needed, "at most an eighth is spare"


def test_token_bytes_are_those_of_keys_and_values(wide):
    assert SlotCache(wide["llama"], 1).token_bytes == 2 * 4 * 2 * 16 * 8  # K and V, layers, heads
    half = models.load("random:llama", dtype="bfloat16").weights
    assert SlotCache(half, 1).token_bytes == 2 * 4 * 2 * 16 * 2


def test_layers_of_another_kind_are_refused(wide):
    config = wide["gemma3"].config
    assert layer_windows(config) == [24, None, 24, None]
    assert layer_windows(wide["llama"].config) == [None] * 4
    config = copy.copy(config)
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention.*not supported"):
        layer_windows(config)
