"""The run store: one LanceDB table of Records per profile.

Records are only appended, one group per commit, so a killed run leaves complete groups. Samples
whose key is stored are not computed again. `logical_hash` hashes the content of the table, not its
files, which LanceDB names at random.
"""

import errno
import hashlib
import os
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import lancedb
import pandas
import pyarrow

from kit.schema import Record

_ARROW = {
    str: pyarrow.string(),
    int: pyarrow.int64(),
    float: pyarrow.float64(),
    bool: pyarrow.bool_(),
}
_TYPES = typing.get_type_hints(Record)
# Record keys contain versions; in stores without this mark, hashes of the kit's sources.
KEYS = {"keys": "versions"}
SCHEMA = pyarrow.schema([(f.name, _ARROW[_TYPES[f.name]]) for f in fields(Record)], metadata=KEYS)
ADDED = {"joules": "cast(0 as double)", "dtype": "''", "asks": "'any'"}  # older stores lack some
ADDED |= {"grade_version": "cast(0 as bigint)"}
VOLATILE = ("seconds", "joules")  # differ between two runs of the same work


def _any(column: str, keys: Iterable[str]) -> str:
    """The condition that `column` is one of `keys`, which are hex digits."""
    values = ", ".join(f"'{key}'" for key in sorted(keys))
    return f"{column} IN ({values})" if values else "false"


class Store:
    """Records in `folder`, which is created if missing, or at a URI that LanceDB opens."""

    def __init__(self, folder: Path | str):
        self.folder = folder if "://" in str(folder) else Path(folder)
        database = lancedb.connect(self.folder)
        try:
            self._table = database.create_table("records", schema=SCHEMA, exist_ok=True)
        except ValueError as error:
            self._table = database.open_table("records")
            missing = {name: ADDED[name] for name in ADDED if name not in self._table.schema.names}
            if self._table.schema != pyarrow.schema([c for c in SCHEMA if c.name not in missing]):
                raise ValueError(
                    f"The store in {folder} was written by another version of the kit (its columns "
                    f"differ); move that folder away and run again."
                ) from error
            self._table.add_columns(missing)
            self._table.alter_columns(*({"path": name, "nullable": True} for name in missing))
        self._marked = bool(self._table.schema.metadata)

    def keys(self, among: Iterable[str] | None = None) -> set[str]:
        """Keys of all records, or those of `among` that are stored, where the others are to be
        computed; ValueError for a store with keys of an earlier kit."""
        if among is not None and not self._marked:
            raise ValueError(
                f"The store in {self.folder} was filled by an earlier kit, under keys that none of "
                f"its records would be found by; bundle that run if it is to be kept, move that "
                f"folder away and run again."
            )
        where = None if among is None else _any("key", among)
        return set(self._read(["key"], where)["key"])

    def append(self, records: list[Record]) -> None:
        """Add records in one commit; keys already stored are left out."""
        stored = self.keys(record.key for record in records)
        fresh = {record.key: record for record in records if record.key not in stored}
        rows = [asdict(record) for record in fresh.values()]
        if rows:
            with self._whole():
                self._table.add(pyarrow.Table.from_pylist(rows, schema=SCHEMA))

    def table(self, keys: set[str] | None = None) -> pandas.DataFrame:
        """All records, or those with the given keys, sorted by key."""
        frame = self._read(None, None if keys is None else _any("key", keys))
        return frame.sort_values("key", ignore_index=True)

    def generated(self, generation_keys: set[str]) -> pandas.DataFrame:
        """Records with these generation keys, whatever grader judged them, sorted by key."""
        frame = self._read(None, _any("generation_key", generation_keys))
        return frame.sort_values("key", ignore_index=True)

    def limits(self, weights_hash: str) -> set[int]:
        """Numbers of new tokens at which answers of a model were cut."""
        where = f"finish = 'length' AND {_any('weights_hash', [weights_hash])}"
        return set(self._read(["key", "new_tokens"], where)["new_tokens"].tolist())

    def _read(self, columns: list[str] | None, where: str | None = None) -> pandas.DataFrame:
        with self._whole():
            self._table.checkout_latest()
            query = self._table.search()
            if where:
                query = query.where(where)
            if columns:
                query = query.select(columns)
            # Writers at once may have stored the same key, which no commit of theirs could see.
            return query.limit(None).to_pandas().drop_duplicates("key", ignore_index=True)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Raise ValueError in place of Lance's error for a store that was deleted or lost files."""
        try:
            yield
        except RuntimeError as error:
            if "os error 28" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder)) from error
            why = str(error).partition(",")[0]  # then places in Lance's own sources
            raise ValueError(
                f"The store in {self.folder} is damaged ({why}); move that folder away and run "
                f"again, which computes its records anew."
            ) from error

    def logical_hash(self) -> str:
        """SHA-256 of the records sorted by key, timings left out."""
        names = [name for name in SCHEMA.names if name not in VOLATILE]
        frame = self._read(None).sort_values("key")[names]
        schema = pyarrow.schema([SCHEMA.field(name) for name in names])
        arrow = pyarrow.Table.from_pandas(frame, schema=schema, preserve_index=False)
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, schema) as writer:
            for batch in arrow.combine_chunks().to_batches(max_chunksize=1000):
                writer.write_batch(batch)
        return hashlib.sha256(sink.getvalue()).hexdigest()
