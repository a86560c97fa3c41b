"""Sentences packed into rows for training, along the path that they are fetched by.

Each sentence keeps to itself: its positions begin at 0, which transformers reads as a boundary that
attention does not cross. The loss is on completions only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kit.models.load import Model

IGNORED = -100  # targets without a loss


@dataclass(frozen=True)
class Row:
    """Sentences of one path: tokens, what is to be said after each, positions: [context] each."""

    path: tuple[int, ...]
    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor


def rows(
    model: Model,
    said: Sequence[tuple[str, str]],
    paths: Sequence[tuple[int, ...]],
    context: int,
) -> list[Row]:
    """Rows of (context, completion) texts, packed within a path in their order."""
    by_path: dict[tuple[int, ...], list] = {}
    for pair, path in zip(said, paths, strict=True):
        by_path.setdefault(tuple(path), []).append(pair)
    made = []
    for path, pairs in sorted(by_path.items()):
        open_row: list[tuple[list[int], int]] = []
        for before, after in pairs:
            ids, read = encode(model, before, after)
            if len(ids) > context:
                raise ValueError(
                    f"{before[:60]!r} has {len(ids)} tokens, a row {context}; use a longer context."
                )
            if sum(len(other) for other, _ in open_row) + len(ids) > context:
                made.append(_row(path, open_row, context, ids[-1]))
                open_row = []
            open_row.append((ids, read))
        made.append(_row(path, open_row, context, model.tokenizer.eos_token_id))
    return made


def encode(model: Model, before: str, after: str) -> tuple[list[int], int]:
    """Token ids of a sentence and its end, and how many of them are only read."""
    read, said = (
        model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)
    )
    return [*read, *said, model.tokenizer.eos_token_id], len(read)


def _row(path, sentences, context: int, end: int) -> Row:
    ids, targets, positions = [], [], []
    for tokens, read in sentences:
        ids += tokens
        targets += [IGNORED] * (read - 1) + tokens[read:] + [IGNORED]
        positions += range(len(tokens))
    rest = context - len(ids)
    ids, targets = ids + [end] * rest, targets + [IGNORED] * rest
    positions += range(rest)
    return Row(path, *(torch.tensor(values) for values in (ids, targets, positions)))
