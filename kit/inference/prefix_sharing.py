"""Prefix sharing: the order of prompts, and which common beginnings are read once for several."""

PREFIX_TOKENS = 32  # least length of a common prefix that is read once
ROWS = 8  # a multiple of these is read of each prompt, see `kit.inference.decode`


def padded(count: int, rows: int = ROWS) -> int:
    """`count`, or the next multiple of `rows`."""
    return -(-count // rows) * rows


def queue(prompts: list[tuple[int, ...]]) -> list[int]:
    """Indices of the prompts in descending order of their ids, so that the next one is last.

    So equal prompts are adjacent, each read once for all of its samples, and prompts with a common
    prefix are, too.
    """
    return sorted(range(len(prompts)), key=lambda i: (prompts[i], -i))


def prefixes(prompts: list[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Length of the prefix that each prompt shares with its neighbours, 0 for none.

    Sorted prompts are split into runs: a run continues while its common prefix has PREFIX_TOKENS
    and a further prompt does not shorten it by more than a fifth.
    """
    prompts = sorted(set(prompts), reverse=True)  # as they are admitted
    shared, first = dict.fromkeys(prompts, 0), 0
    while first < len(prompts):
        last, common = first + 1, len(prompts[first]) - 1
        while last < len(prompts):
            less = min(common, _common(prompts[first], prompts[last]))
            if less < PREFIX_TOKENS or (last > first + 1 and less < 0.8 * common):
                break
            last, common = last + 1, less
        if last > first + 1:
            shared |= dict.fromkeys(prompts[first:last], common)
        first = last
    return shared


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix of `a` and `b` in whole ROWS, short of the last token of each."""
    both = min(len(a), len(b)) - 1
    return next((i for i in range(both) if a[i] != b[i]), both) // ROWS * ROWS


def packs(groups: list, prefixes: dict, most: int) -> list[tuple[tuple[int, ...], list]]:
    """Groups split into packs with one prefix and at most so many other tokens, padding included;
    a longer prompt is alone."""
    packed, size = [], 0
    for ids, group in groups:
        prefix = ids[: prefixes.get(ids, 0)]
        size += padded(len(ids) - len(prefix))
        if not packed or prefix != packed[-1][0] or size > most:
            packed.append((prefix, []))
            size = padded(len(ids) - len(prefix))
        packed[-1][1].append((ids, group))
    return packed
