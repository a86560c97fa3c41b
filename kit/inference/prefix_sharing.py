"""In which order prompts are read, and what of them is read once for several."""

PREFILL_TOKENS = 4096  # prompts are read in packs of at most so many tokens, or one by one
PREFIX_TOKENS = 32  # of equal beginning from which prompts share the reading of it


def queue(prompts: list[tuple[int, ...]]) -> list[int]:
    """Indices of the prompts, the next one last.

    In the order of their ids: equal prompts stand together, so that each is read once for all of
    its samples, and so do prompts that begin alike.
    """
    return sorted(range(len(prompts)), key=lambda i: (prompts[i], -i))


def prefixes(prompts: list[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """For each prompt the length of the beginning that is read once for several, 0 for none.

    Runs of sorted prompts: a run goes on while what its prompts share stays PREFIX_TOKENS long and
    does not shrink by more than a fifth.
    """
    prompts = sorted(set(prompts), reverse=True)  # as they are admitted
    found, first = dict.fromkeys(prompts, 0), 0
    while first < len(prompts):
        last, common = first + 1, len(prompts[first]) - 1
        while last < len(prompts):
            less = min(common, _common(prompts[first], prompts[last]))
            if less < PREFIX_TOKENS or (last > first + 1 and less < 0.8 * common):
                break
            last, common = last + 1, less
        if last > first + 1:
            found |= dict.fromkeys(prompts[first:last], common)
        first = last
    return found


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that `a` and `b` begin with alike; at least one token of each is left over."""
    both = min(len(a), len(b)) - 1
    return next((i for i in range(both) if a[i] != b[i]), both)


def packs(groups: list, prefixes: dict) -> list[tuple[tuple[int, ...], list]]:
    """Groups cut into packs of one prefix whose other tokens are at most PREFILL_TOKENS."""
    found, size = [], 0
    for ids, group in groups:
        prefix = ids[: prefixes.get(ids, 0)]
        size += len(ids) - len(prefix)
        if not found or prefix != found[-1][0] or size > PREFILL_TOKENS:
            found.append((prefix, []))
            size = len(ids) - len(prefix)
        found[-1][1].append((ids, group))
    return found
