"""Retrieval-augmented generation, the baseline of parametric memory: passages in LanceDB."""

from collections.abc import Sequence
from pathlib import Path

import lancedb
import pyarrow

from kit.models.embedder import Embedder
from kit.schema import digest


class Passages:
    """A vector index of `texts` under `folder`. Equal texts are stored once."""

    def __init__(self, folder: Path, texts: Sequence[str], embedder: Embedder):
        self.texts, self.embedder = list(dict.fromkeys(texts)), embedder
        database = lancedb.connect(Path(folder))
        name = f"passages-{digest([self.texts, embedder.fingerprint], 12)}"
        if name in database.list_tables().tables:
            self._table = database.open_table(name)
            return
        vectors = embedder.embed(self.texts)
        flat = pyarrow.FixedSizeListArray.from_arrays(vectors.ravel(), embedder.dimension)
        rows = pyarrow.table({"text": self.texts, "vector": flat})
        self._table = database.create_table(name, rows)

    def search(self, questions: Sequence[str], k: int) -> list[list[str]]:
        """The `k` nearest texts of each question by cosine similarity, the nearest last."""
        passages = []
        for vector in self.embedder.embed(list(questions), query=True):
            rows = self._table.search(vector).distance_type("cosine").limit(k).to_list()
            passages.append([row["text"] for row in reversed(rows)])
        return passages

    def nbytes(self) -> dict[str, int]:
        """Bytes of `texts` and of `vectors`, all of which an exact search reads."""
        texts = sum(len(text.encode()) for text in self.texts)
        return {"texts": texts, "vectors": 4 * self.embedder.dimension * len(self.texts)}
