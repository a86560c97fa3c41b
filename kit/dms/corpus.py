"""Text to train evictors on, beside a model's own answers: published reasoning traces, traces of
one's own, and prose.

Which traces: NVIDIA/Model-Optimizer, experimental/dms at a2fbac7, takes of OpenR1-Math-220k the
last generation of a problem that math-verify accepted.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch

from kit import hub
from kit.data import rows
from kit.data.problems import load
from kit.dms.evictor import EvictorRecipe
from kit.dms.train import own_traces, pack_documents
from kit.evaluation.store import Store
from kit.models.load import Model

PUBLISHED = {
    "openr1-math": (
        "open-r1/OpenR1-Math-220k",
        [f"data/train-{n:05}-of-00010.parquet" for n in range(10)],
    )
}
PARAGRAPH = re.compile(r"[A-Z](?:[^\n]|\n(?! |[-=*+]{3}))*[.:]")  # of lines that are not indented


def training_text(
    model: Model,
    kind: str,
    recipe: EvictorRecipe,
    folder: Path,
    problems: str,
    count: int | None,
    max_new_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text to train on and text held out, each [S, context of the recipe].

    `kind` is "own": the model's answers, packed, of the splits train and validation of a problem
    set; "mixed": of train single answers and prose; or a source of `traces`, packed, of which every
    sixteenth chat is held out. Answers of at most `max_new_tokens` tokens are kept in `folder`.
    """
    if kind in ("own", "mixed"):
        chats, held_out = (
            own_traces(model, load(problems, split, n=count), Store(folder), max_new_tokens)
            for split in ("train", "validation")
        )
    else:
        tokens = recipe.steps * recipe.batch * recipe.context
        chats = traces(kind, model, tokens * 17 // 16)
        chats, held_out = [c for i, c in enumerate(chats) if i % 16], chats[::16]
    pack = mixed if kind == "mixed" else pack_documents
    return pack(model, chats, recipe.context), pack_documents(model, held_out, recipe.context)


def traces(source: str, model: Model, tokens: int) -> list[str]:
    """Chats of at least `tokens` tokens in all, or as many as there are, in the model's template.

    `source` is a name of PUBLISHED, hub:ORG/NAME/FILE for a file of a data set of the hub, or a
    local file; see `kit.data.rows` for its kinds and `chat` for its rows. ValueError where no row
    is of use, hub.HubError where the hub cannot deliver.
    """
    texts, held = [], 0
    for file in _files(source):
        for _, row in rows.read(file):
            if messages := chat(row):
                texts.append(model.tokenizer.apply_chat_template(messages, tokenize=False))
                ids = model.tokenizer(texts[-1], add_special_tokens=False)["input_ids"]
                held += len(ids)
            if held >= tokens:
                return texts
    if not texts:
        raise ValueError(
            f"{source} has no row with messages, with generations of which one was found correct, "
            f"or with a problem and its solution; give a file that has."
        )
    return texts


def _files(source: str):
    """The files of a source, each fetched when its turn comes."""
    if source in PUBLISHED:
        repo, names = PUBLISHED[source]
        yield from (hub.fetch(repo, name, "dataset")[0] for name in names)
    elif source.startswith("hub:"):
        organisation, repo, *place = source.removeprefix("hub:").split("/")
        yield hub.fetch(f"{organisation}/{repo}", "/".join(place), "dataset")[0]
    elif Path(source).is_file():
        yield Path(source)
    else:
        raise ValueError(
            f"No traces at {source!r}; give a file, hub:ORG/NAME/FILE or {', '.join(PUBLISHED)}."
        )


def chat(row) -> list[dict] | None:
    """The messages of a row, or None where it has none or no correct answer: those of a field
    `messages` or `conversation`; or a problem with the last of its `generations` that
    `correctness_math_verify` accepts; or with its `solution`, `response` or `text`."""
    if not isinstance(row, dict):
        return None
    for name in ("messages", "conversation"):
        if row.get(name) and "generations" not in row:
            return row[name]
    question = row.get("problem") or row.get("question") or row.get("prompt")
    if "generations" in row:
        graded = zip(row["generations"] or [], row["correctness_math_verify"] or [], strict=False)
        answers = [text for text, correct in graded if correct]
    else:
        answers = [row[name] for name in ("solution", "response", "text") if row.get(name)][:1]
    if not question or not answers:
        return None
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answers[-1]}]


def prose() -> list[str]:
    """English prose that every Python brings along: the topics of its language reference (PSF
    licence) without their examples, tables and grammar."""
    documents = (
        [part for part in topic.split("\n\n") if PARAGRAPH.fullmatch(part.strip())]
        for _, topic in sorted(topics.items())
    )
    return ["\n\n".join(paragraphs) for paragraphs in documents if paragraphs]


def unpacked(model: Model, documents: Sequence[str], context: int) -> torch.Tensor:
    """Each document in sequences of its own: [S, context].

    A shorter one is padded with end-of-sequence tokens, which training does not score; of a longer
    one as many whole sequences are taken as it has, and the rest is dropped.
    """
    sequences: list[list[int]] = []
    for document in documents:
        ids = model.tokenizer(document, add_special_tokens=False)["input_ids"]
        ids = ids[: max(1, len(ids) // context) * context]
        ids += [model.tokenizer.eos_token_id] * (-len(ids) % context)
        sequences += [ids[first : first + context] for first in range(0, len(ids), context)]
    return torch.tensor(sequences)


def mixed(model: Model, chats: Sequence[str], context: int) -> torch.Tensor:
    """As many sequences of single chats as of prose: [S, context]."""
    kinds = unpacked(model, chats, context), unpacked(model, prose(), context)
    count = min(map(len, kinds))
    return torch.cat([sequences[:count] for sequences in kinds])
