"""The slot cache against slow references: a dictionary of tokens, and dense softmax attention."""

import copy
import random

import pytest
import torch

from kit.inference.block_table import MASKED, BlockTable
from kit.inference.kv_cache import SlotCache, layer_windows
from kit.models.load import RANDOM, load
from tests import rounding

SHAPES = sorted(RANDOM)  # query heads per KV head: gemma3 1, llama 3, qwen3 8


@pytest.fixture(scope="module")
def wide() -> dict:
    """One float64 model per family: only its shape is used."""
    return {shape: load(f"random:{shape}", dtype="float64").weights for shape in SHAPES}


class Walk:
    """A BlockTable under random operations, beside dictionaries of what it must hold."""

    PLANES, UNITS = 3, 8

    def __init__(self, block: int, seed: int):
        self.rng, self.block = random.Random(seed), block
        self.table = BlockTable(self.PLANES, self.UNITS, block, torch.device("cpu"), torch.float32)
        self.pool = torch.zeros(self.PLANES, 10_000 * block, dtype=torch.long)  # payload
        # (plane, unit) -> position -> payload; in the order of the unit's ordinals
        self.live: dict[tuple[int, int], dict[int, int]] = {}
        self.following: dict[int, int] = {}  # unit -> its next position
        self.stamps = 0

    def put(self, plane: int, unit: int, slot: int, position: int) -> None:
        self.stamps += 1
        self.pool[plane, slot] = self.stamps
        self.live[plane, unit][position] = self.stamps

    def allocate_prompt(self, units: list[int]) -> None:
        for unit in units:
            self.following[unit] = self.rng.randint(1, 30)
        for plane in range(self.PLANES):
            kept = {
                unit: self.rng.sample(range(end), self.rng.randint(0, end))
                for unit, end in self.following.items()
                if unit in units
            }
            kept = {unit: kept[unit] for unit in units}
            counts = torch.tensor([len(tokens) for tokens in kept.values()])
            every = [position for tokens in kept.values() for position in tokens]
            slots = self.table.allocate_prompt(
                plane, torch.tensor(units), counts, torch.tensor(every, dtype=torch.long)
            ).tolist()
            assert len(set(slots)) == len(slots) == len(every), "a slot is given twice"
            owners = [unit for unit, tokens in kept.items() for _ in tokens]
            for unit in units:
                self.live[plane, unit] = {}
            for unit, slot, position in zip(owners, slots, every):
                self.put(plane, unit, slot, position)

    def step(self) -> None:
        units = self.rng.sample(sorted(self.following), len(self.following))
        ordinals = torch.zeros(self.PLANES, len(units), dtype=torch.long)
        for plane in range(self.PLANES):
            for i, unit in enumerate(units):
                tokens = self.live[plane, unit]
                ordinals[plane, i] = self.rng.choice(
                    [len(tokens), self.rng.randint(0, len(tokens))]
                )
                if ordinals[plane, i] < len(tokens):
                    _, slots = self.table.live_slots(plane, torch.tensor([unit]))
                    stamp = int(self.pool[plane, slots[ordinals[plane, i]]])
                    self.live[plane, unit] = {p: s for p, s in tokens.items() if s != stamp}
        positions = torch.tensor([self.following[unit] for unit in units])
        slots = self.table.allocate_token(torch.tensor(units), ordinals, positions)
        for plane in range(self.PLANES):
            assert len(set(slots[plane].tolist())) == len(units), "two units share a slot"
            for i, unit in enumerate(units):
                self.put(plane, unit, int(slots[plane, i]), self.following[unit])
        for unit in units:
            self.following[unit] += 1

    def release(self) -> None:
        ended = self.rng.sample(sorted(self.following), self.rng.randint(1, len(self.following)))
        for plane, (to, source) in enumerate(self.table.release(torch.tensor(ended))):
            blocks = self.pool[plane].view(-1, self.block)
            blocks[to] = blocks[source]
        for unit in ended:
            del self.following[unit]
            for plane in range(self.PLANES):
                del self.live[plane, unit]

    def check(self) -> None:
        table = self.table
        for plane, used in enumerate(table.used):
            held: dict[int, dict[int, int]] = {}
            arrays = table.owner, table.position, table.bias, self.pool.view(3, -1, self.block)
            for owner, *slots in zip(*(x[plane, :used].tolist() for x in arrays)):
                tokens = held.setdefault(owner, {})
                for position, bias, stamp in zip(*slots):
                    assert bias == (0 if position >= 0 else torch.tensor(MASKED))
                    if position >= 0:
                        assert position not in tokens, "a token is held twice"
                        tokens[position] = stamp
            expected = {unit: self.live[plane, unit] for unit in self.following}
            assert held == {unit: tokens for unit, tokens in expected.items() if tokens}
            count = [len(expected.get(unit, ())) for unit in range(self.UNITS)]
            assert table.filled[plane].tolist() == count
            assert used == sum(-(-n // self.block) for n in count), "less than a block is wasted"


@pytest.mark.parametrize("block", [1, 4, 16])
def test_table_holds_what_a_dictionary_holds(block):
    for seed in range(3):
        walk = Walk(block, seed)
        released = 0
        for _ in range(80):
            free = [unit for unit in range(walk.UNITS) if unit not in walk.following]
            act = walk.rng.random()
            if free and (not walk.following or act < 0.2):
                walk.allocate_prompt(walk.rng.sample(free, walk.rng.randint(1, min(3, len(free)))))
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

    def attend(self, sequence: int, layer: int, query, key, value, scale: float) -> list:
        """One token: query [H*G, D], key and value [H, D]; returns [H*G, D] in their dtype, and
        in float64."""
        tokens = self.kept.setdefault((sequence, layer), [])
        tokens.append((key, value))
        window = self.windows[layer]
        seen = tokens if window is None else tokens[-window:]
        keys, values = (torch.stack([t[i] for t in seen], 1) for i in (0, 1))  # [H, t, D]
        query = query.unflatten(0, (len(key), -1))
        found = []
        for q, k, v in ((query, keys, values), (query.double(), keys.double(), values.double())):
            found.append((torch.softmax(q @ k.transpose(1, 2) * scale, -1) @ v).flatten(0, 1))
        return found

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
        size = size.to(cache.dtype)
        for layer in range(len(self.dense.windows)):
            query, key, value = (
                torch.randn(n, count, cache.head_dim, dtype=cache.dtype, generator=self.noise)
                for n in (self.heads, cache.heads, cache.heads)
            )
            query, key, value = query / size, key * size, value * size
            out = cache.attend(layer, query[None], key[None], value[None], self.SCALE)
            assert out.shape == (1, count, self.heads, cache.head_dim)
            for at, owner in enumerate(owners):
                token = query[:, at], key[:, at], value[:, at]
                plain, right = self.dense.attend(owner, layer, *token, self.SCALE)
                if cache.dtype == torch.float64:
                    torch.testing.assert_close(out[0, at], right, rtol=1e-9, atol=0)
                else:
                    rounding.assert_close(out[0, at], plain, right)

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


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_equals_dense_softmax_while_sequences_come_and_go(shape, dtype):
    crowd = Crowd(load(f"random:{shape}", dtype=dtype).weights, seed=1)
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


def feed(cache: SlotCache, tokens: int) -> None:
    """One forward pass of every layer over the announced tokens."""
    for layer in range(len(cache.pools)):
        key, value = torch.randn(2, 1, cache.heads, tokens, cache.head_dim, dtype=cache.dtype)
        cache.attend(layer, key, key, value, 1.0)


@pytest.mark.parametrize("shape", ["llama", "gemma3"])
def test_a_burst_is_paid_once(wide, shape):
    cache = SlotCache(wide[shape], 8, block=8)
    assert cache.nbytes() < 1000, "an empty cache has no blocks"
    lengths, sizes = [40, 8, 17, 3, 60, 25, 31, 9], []
    for _ in range(6):
        cache.prefill([[place] for place in range(8)], lengths)
        feed(cache, sum(lengths))
        for _ in range(10):
            cache.step(list(range(8)))
            feed(cache, 8)
        sizes.append(sum(pool.nbytes() for pool in cache.pools))
        cache.release([5, 0, 7])
        cache.release([1, 2, 3, 4, 6])
        assert cache.live_tokens().sum() == 0
    assert len(set(sizes)) == 1, "blocks that were handed back are used again"
    windows = layer_windows(wide[shape].config)
    ends = [min(length + 10, window or 10**9) for window in windows for length in lengths]
    block_bytes = 8 * cache.token_bytes / len(windows)
    needed = sum(-(-end // 8) for end in ends) * block_bytes
    assert needed <= sizes[0] <= 1.0625 * needed, "at most a sixteenth is spare"


def test_token_bytes_are_those_of_keys_and_values(wide):
    assert SlotCache(wide["llama"], 1).token_bytes == 2 * 4 * 2 * 16 * 8  # K and V, layers, heads
    half = load("random:llama", dtype="bfloat16").weights
    assert SlotCache(half, 1).token_bytes == 2 * 4 * 2 * 16 * 2


def test_layers_of_another_kind_are_refused(wide):
    config = wide["gemma3"].config
    assert layer_windows(config) == [24, None, 24, None]
    assert layer_windows(wide["llama"].config) == [None] * 4
    config = copy.copy(config)
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention.*not supported"):
        layer_windows(config)


def test_keys_in_another_dtype_than_the_weights_are_refused(wide):
    cache = SlotCache(wide["llama"], 1)
    cache.prefill([[0]], [3])
    key = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="hands over torch.bfloat16, .*cache are torch.float64"):
        cache.attend(1, key, key, key, 1.0)
