"""The ReasoningBank: strategies extracted from problems, in an embedded LanceDB table.

Retrieval never returns a strategy that was extracted from the problem being solved or from a
near-duplicate of it, or whose text contains the answer; a result lists what this leakage guard
filtered. Every write is one commit, so a killed writer leaves whole additions, and the state of the
bank at a tag can be opened again. After a write small files are put together and new rows indexed,
so that no search has to wait for either.

Sources: ReasoningBank, https://arxiv.org/abs/2509.25140, Section 3.2: retrieval by past question;
reasoning-bank-slm: retrieval by the text of a strategy. Reciprocal rank fusion: Cormack et al.,
SIGIR 2009, https://doi.org/10.1145/1571941.1572114.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import lancedb
import pandas
import pyarrow
from lancedb.index import FTS, IvfHnswSq
from lancedb.query import MatchQuery
from lancedb.rerankers import Reranker, RRFReranker

from kit.reasoning_bank.strategy import (
    KINDS,
    RETIRED,
    RetrievalResult,
    Strategy,
    leak_reason,
    row_schema,
)
from kit.schema import Problem, digest

if TYPE_CHECKING:  # a process that only writes to a bank need not import torch
    from kit.models.embedder import Embedder

EXACT_ROWS = 10_000  # from this size on an approximate index is used
FUSION = 60  # the constant of reciprocal rank fusion
SEEN_AFTER = timedelta(seconds=5)  # until writes of another process are visible
FRAGMENTS = 16  # files of rows from which they are put together
UNTAGGED = timedelta(minutes=10)  # for which states without a tag are kept
NEIGHBOURS, QUERIES = 1000, 256  # of one strategy, and searched for together, when merging
SAME = 0.9  # cosine similarity from which two strategies count as the same
METHODS = ("vector", "text", "hybrid")


class ReasoningBank:
    """Strategies at `uri`: a folder, `s3://bucket/prefix` or whatever LanceDB opens.

    `storage_options` go to LanceDB (credentials, endpoint). What is embedded and searched of a
    strategy is its `text`, or its `summary`. Raises ValueError where the table there has other
    columns, or was made with another embedder or of something else.
    """

    def __init__(
        self, uri, embedder: "Embedder", storage_options: dict | None = None, embedded: str = "text"
    ):
        self.uri, self.embedder, self.embedded = str(uri), embedder, embedded
        self._options, self._read_only, self._indexed = storage_options, False, set()
        self.database = lancedb.connect(
            self.uri, storage_options=storage_options, read_consistency_interval=SEEN_AFTER
        )
        card = {"embedder": embedder.fingerprint, "embedder_name": embedder.name}
        card["embedded"] = embedded
        schema = row_schema(embedder.dimension)
        if "strategies" in self.database.list_tables().tables:
            self._table = self.database.open_table("strategies")
            self._check(schema, card)
        else:
            self._table = self.database.create_table(
                "strategies", schema=schema.with_metadata(card), exist_ok=True
            )

    def _check(self, schema: pyarrow.Schema, card: dict) -> None:
        stored_schema = self._table.schema
        meta = {k.decode(): v.decode() for k, v in (stored_schema.metadata or {}).items()}
        if meta.get("embedder") != card["embedder"]:
            raise ValueError(
                f"The bank {self.uri} was embedded by {meta.get('embedder_name', 'another model')} "
                f"({meta.get('embedder')}), not by {card['embedder_name']} ({card['embedder']}); "
                f"open it with that embedder or build a new bank."
            )
        if meta.get("embedded", "text") != self.embedded:
            raise ValueError(
                f"The bank {self.uri} has the {meta.get('embedded', 'text')} of its strategies "
                f"embedded; open it so, not with embedded={self.embedded!r}."
            )
        columns = pyarrow.schema([field for field in stored_schema if field.name not in RETIRED])
        if columns != schema:
            expected, stored = set(schema.names), set(columns.names)
            raise ValueError(
                f"The bank {self.uri} was written by another version of the kit (columns "
                f"{sorted(expected ^ stored) or 'of other types'} differ); build it again "
                f"elsewhere."
            )

    def _check_writable(self) -> None:
        if self._read_only:
            raise ValueError(
                f"This is the bank {self.uri} as it was at a tag, to read only; write to the bank."
            )

    def __len__(self) -> int:
        return self._table.count_rows()

    def add(self, strategies: Sequence[Strategy]) -> int:
        """Add the strategies that are not in the bank yet, in one commit; returns their number."""
        self._check_writable()
        unknown = {item.kind for item in strategies} - set(KINDS)
        if unknown:
            raise ValueError(f"Strategies of kind {sorted(unknown)}; kinds are {KINDS}.")
        fresh = {item.id: item for item in strategies}
        if not fresh:
            return 0
        rows = self._rows(list(fresh.values()))
        merge = self._table.merge_insert("id").when_not_matched_insert_all()
        added = merge.execute(rows).num_inserted_rows
        self._settle()
        return added

    def _settle(self) -> None:
        """Put small files together and index new rows, after a write; the content stays."""
        if len(self) >= EXACT_ROWS:
            self._index("vector", IvfHnswSq(distance_type="cosine"))
        files = self._table.stats()["fragment_stats"]["num_fragments"]
        names = [index.name for index in self._table.list_indices()]
        new = any(self._table.index_stats(name).num_unindexed_rows for name in names)
        if files <= FRAGMENTS and not new:
            return
        try:
            self._table.optimize(cleanup_older_than=self._age_of_the_oldest_kept())
        except (RuntimeError, OSError) as error:
            if "conflict" not in str(error):  # with another writer, who does the same
                raise

    def _age_of_the_oldest_kept(self) -> timedelta:
        """UNTAGGED, or more where there are tags: LanceDB refuses to delete any state as long as a
        tagged one is among those to be deleted."""
        versions = {tag["version"] for tag in self._table.tags.list().values()}
        states = self._table.list_versions()
        ages = [datetime.now() - s["timestamp"] for s in states if s["version"] in versions]
        return max([UNTAGGED, *(age + timedelta(minutes=1) for age in ages)])

    def _rows(self, items: list[Strategy]) -> pyarrow.Table:
        columns = {name: [getattr(item, name) for item in items] for name in _names()}
        columns |= {"id": [i.id for i in items], "text": [getattr(i, self.embedded) for i in items]}
        columns |= dict.fromkeys(RETIRED, [0] * len(items))  # where this table still has them
        schema = self._table.schema
        columns["vector"] = list(self.embedder.embed(columns["text"]))
        columns["question_vector"] = list(self.embedder.embed(columns["question"], query=True))
        return pyarrow.Table.from_pydict({name: columns[name] for name in schema.names}, schema)

    def retrieve(
        self,
        problem: Problem,
        k: int = 2,
        key: str = "text",
        method: str = "vector",
        kinds: Sequence[str] = KINDS,
        reranker: Reranker = RRFReranker(FUSION),  # noqa: B008 (has no state)
    ) -> RetrievalResult:
        """The `k` best strategies for `problem` that pass the leakage guard.

        key: what the question of `problem` is compared with. "text": the text of the strategies;
        "question": the questions they were extracted from, where `k` counts past problems and all
        strategies of each are returned, as in the paper. method: "vector" (cosine similarity),
        "text" (BM25) or "hybrid" (both, which `reranker` puts into one order: one of LanceDB's,
        or of your own; the guard filters after it). Ties are broken by id. An empty bank returns
        no strategies. ValueError where a parameter has no such value.
        """
        if key not in ("text", "question") or method not in METHODS or k < 0:
            raise ValueError(
                f"key is {key!r}, method {method!r}, k {k}; key is text or question, method one of "
                f"{METHODS}, k at least 0."
            )
        if method != "vector" and key == "question":
            raise ValueError('key="question" takes method="vector" only.')
        if not k:
            return RetrievalResult((), (), {})
        vector, limit = self.embedder.embed([problem.question], query=True)[0], k + 8
        every = set(kinds) >= set(KINDS)  # then no filter, which would cost as much as the search
        where = None if every else f"kind IN ({', '.join(map(repr, kinds)) or 'NULL'})"
        while True:
            ranked, complete = self._ranked(
                problem.question, vector, key, method, where, limit, reranker
            )
            result, enough = self._guarded(ranked, problem, vector, k, key)
            # A tie at the last place could hide a smaller id: fetch more rows until it is broken.
            if complete or (enough and result.scores[-1] > ranked[-1]["score"]):
                return result
            limit *= 4

    def _ranked(
        self, question, vector, key, method, where, limit, reranker
    ) -> tuple[list[dict], bool]:
        """The first `limit` rows, best first, with `score`, and whether there are no more."""
        parts = []
        if method in ("vector", "hybrid"):
            column = {"text": "vector", "question": "question_vector"}[key]
            parts.append(self._nearest(vector, column, where, limit))
        if method in ("text", "hybrid"):
            parts.append(self._matching(question, where, limit))
        complete = all(len(part) < limit for part in parts)
        if len(parts) == 1:
            return parts[0], complete
        return self._fused(question, *parts, reranker), complete

    def _fused(
        self, question: str, near: list[dict], matching: list[dict], reranker: Reranker
    ) -> list[dict]:
        """The rows of both searches, which come with ties broken, as `reranker` orders them."""
        rows = [*{row["id"]: row for row in (*near, *matching)}.values()]
        number = {row["id"]: place for place, row in enumerate(rows)}
        tables = []
        for part, column in ((near, "_distance"), (matching, "_score")):
            types = {"_rowid": pyarrow.uint64(), "text": pyarrow.string()}
            texts = [getattr(_strategy(row), self.embedded) for row in part]
            scores = [row["score"] if column == "_score" else 1 - row["score"] for row in part]
            most = max(scores, default=0) or 1  # rerankers expect scores from 0 to 1
            scaled = [score / most for score in scores]
            columns = [[number[row["id"]] for row in part], texts, scaled]
            schema = pyarrow.schema(types | {column: pyarrow.float32()})
            tables.append(pyarrow.table(columns, schema=schema))
        fused = reranker.rerank_hybrid(question, *tables).to_pylist() if rows else []
        ordered = ((rows[each["_rowid"]], each["_relevance_score"]) for each in fused)
        return _sorted([row | {"score": score} for row, score in ordered])

    def _nearest(self, vector, column: str, where: str | None, limit: int) -> list[dict]:
        exact = len(self) < EXACT_ROWS
        if not exact:
            self._index(column, IvfHnswSq(distance_type="cosine"))
        query = self._table.search(vector, vector_column_name=column).distance_type("cosine")
        query = query.where(where, prefilter=True) if where else query
        query = query.bypass_vector_index() if exact else query.nprobes(20).refine_factor(4)
        columns = [*_names(), "id", "question_vector", "_distance"]  # reading the rest takes longer
        rows = query.select(columns).limit(limit).to_list()
        return _sorted([row | {"score": 1 - row.pop("_distance")} for row in rows])

    def _matching(self, question: str, where: str | None, limit: int) -> list[dict]:
        self._index("text", FTS())
        query = self._table.search(MatchQuery(question, column="text"), query_type="fts")
        query = query.where(where, prefilter=True) if where else query
        rows = query.limit(limit).to_list()
        return _sorted([row | {"score": row.pop("_score")} for row in rows])

    def _index(self, column: str, config) -> None:
        """Build the index of `column` where there is none; `_settle` keeps it up to date."""
        if self._read_only or column in self._indexed:
            return
        if self._table.index_stats(f"{column}_idx") is None:
            self._table.create_index(column, config=config)
        self._indexed.add(column)

    def _guarded(self, ranked: list[dict], problem: Problem, vector, k: int, key: str):
        """The first `k` rows that pass the guard, and whether there are as many."""
        strategies, scores, filtered, past = [], [], {}, []
        for row in ranked:
            if key == "question" and row["problem_id"] not in past and len(past) == k:
                break
            item = _strategy(row)
            reason = leak_reason(item, problem, float(vector @ row["question_vector"]))
            if reason:
                filtered[row["id"]] = reason
                continue
            if item.problem_id not in past:
                past.append(item.problem_id)
            strategies.append(item)
            scores.append(row["score"])
            if key == "text" and len(strategies) == k:
                break
        enough = len(strategies if key == "text" else past) == k
        return RetrievalResult(tuple(strategies), tuple(scores), filtered), enough

    def delete(self, ids: Sequence[str]) -> None:
        """Remove strategies; tagged states keep them."""
        self._check_writable()
        if ids:
            self._table.delete(f"id IN ({_quoted(ids)})")
            self._settle()

    def merge(self) -> list[tuple[str, str]]:
        """Merge near-duplicates of one kind: pairs (kept id, dropped id).

        Texts whose cosine similarity reaches SAME count as the same; the one with the smaller step,
        then id, stays. One commit.
        """
        self._check_writable()
        frame = self.table().sort_values(["step", "id"], ignore_index=True)
        kind, survivors, pairs = dict(zip(frame["id"], frame["kind"], strict=True)), {}, []
        for start in range(0, len(frame), QUERIES):
            part = frame.iloc[start : start + QUERIES]
            for own, near in zip(part["id"], self._alike([*part["vector"]]), strict=True):
                alike = [(distance, survivors[other], other) for distance, other in near
                         if other in survivors and kind[other] == kind[own]]  # fmt: skip
                if alike:
                    pairs.append((min(alike)[2], own))
                else:
                    survivors[own] = len(survivors)
        self.delete([dropped for _, dropped in pairs])
        return pairs

    def _alike(self, vectors: list) -> list[list[tuple[float, str]]]:
        """For each vector distance and id of the NEIGHBOURS that are nearest to it, up to SAME."""
        query = self._table.search(vectors, vector_column_name="vector").distance_type("cosine")
        query = query.bypass_vector_index() if len(self) < EXACT_ROWS else query.nprobes(20)
        query = query.distance_range(upper_bound=1 - SAME).select(["id", "_distance"])
        neighbors: list[list[tuple[float, str]]] = [[] for _ in vectors]
        for row in query.limit(NEIGHBOURS).to_list():
            neighbors[row.get("query_index", 0)].append((row["_distance"], row["id"]))
        return neighbors

    def tag(self, name: str) -> None:
        """Name the present state; ValueError where the name is taken."""
        self._check_writable()
        if name in self.tags():
            raise ValueError(f"The bank {self.uri} has a tag {name!r} already; choose another.")
        if len(self):
            self._index("text", FTS())  # a tagged state cannot be indexed later
        self._table.tags.create(name, self._table.version)

    def tags(self) -> list[str]:
        return sorted(self._table.tags.list())

    def checkout(self, name: str) -> "ReasoningBank":
        """The bank as it was when tagged `name`, read-only."""
        if name not in self.tags():
            raise ValueError(f"The bank {self.uri} has no tag {name!r}; it has {self.tags()}.")
        bank = ReasoningBank(self.uri, self.embedder, self._options, self.embedded)
        bank._table.checkout(name)
        bank._read_only = True
        return bank

    def table(self) -> pandas.DataFrame:
        """All rows, sorted by id."""
        frame = self._table.search().limit(None).to_pandas()
        return frame.sort_values("id", ignore_index=True)

    def strategies(self) -> list[Strategy]:
        """All strategies, sorted by id."""
        return [_strategy(row) for row in self.table().to_dict("records")]

    def nbytes(self) -> int:
        """Bytes of the table in storage, without indices."""
        return self._table.stats()["total_bytes"]

    def logical_hash(self) -> str:
        """SHA-256 of the strategies without vectors, independent of the order of additions."""
        rows = sorted((item.id, asdict(item)) for item in self.strategies())
        return digest(rows)


def _names() -> list[str]:
    return [field.name for field in fields(Strategy)]


def _strategy(row: dict) -> Strategy:
    return Strategy(**{name: row[name] for name in _names()})


def _sorted(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: (-row["score"], row["id"]))


def _quoted(ids: Sequence[str]) -> str:
    bad = [i for i in ids if not re.fullmatch(r"[0-9a-f]{16}", i)]
    if bad:
        raise ValueError(f"{bad[0]!r} is no strategy id; ids are 16 hex digits.")
    return ", ".join(f"'{i}'" for i in sorted(ids))
