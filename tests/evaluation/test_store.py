"""The run store: what is appended is read back, once, and its hash speaks of content alone."""

import dataclasses
import random
import shutil
import threading
import typing
from concurrent.futures import ThreadPoolExecutor

import lancedb
import pyarrow
import pytest

from kit.evaluation.store import SCHEMA, VOLATILE, Store
from kit.schema import Record

TYPES = typing.get_type_hints(Record)
EXAMPLE = {str: "text", int: 7, float: 0.1, bool: True}
HARD_TEXTS = (
    "",
    "é ∑ 漢字 😀 \u202e right to left",
    "nul \0 in the middle, \x1b escape, \r\n, \ufffd, \ufeff",
    '\'; drop table records; -- "quoted" \\ back',
    "NaN",
    "None",
    " leading and trailing \n\n",
    "long " * 1_000_000,
)


def record(key: str, **changes) -> Record:
    values = {name: EXAMPLE[kind] for name, kind in TYPES.items()}
    return dataclasses.replace(Record(**values | {"key": key}), **changes)


def back(frame) -> list[Record]:
    return [Record(**row) for row in frame.to_dict("records")]


def test_records_come_back_as_they_were(tmp_path):
    records = [
        record(
            f"k{i}",
            text=text,
            question=text,
            level=-i,
            seed=2**62,
            seconds=1 / 3,
            correct=i % 2 == 0,
        )
        for i, text in enumerate(HARD_TEXTS)
    ]
    Store(tmp_path / "a" / "store").append(records)
    again = back(Store(tmp_path / "a" / "store").table())
    assert again == records
    for one in again:
        assert {name: type(value) for name, value in dataclasses.asdict(one).items()} == TYPES


def test_an_empty_store_has_every_column_and_a_hash(tmp_path):
    store = Store(tmp_path)
    store.append([])
    assert store.keys() == set() and len(store.table()) == 0
    assert list(store.table().columns) == [field.name for field in dataclasses.fields(Record)]
    assert store.logical_hash() == Store(tmp_path / "other").logical_hash()


def test_a_key_is_stored_once_and_the_first_record_stays(tmp_path):
    store = Store(tmp_path)
    store.append([record("a", text="first"), record("b"), record("a", text="first")])
    store.append([record("b", text="second"), record("c")])
    table = store.table()
    assert table["key"].tolist() == ["a", "b", "c"]
    assert table["text"].tolist() == ["first", "text", "text"]
    before = store.logical_hash()
    store.append([record("c"), record("a")])
    assert store.logical_hash() == before


def test_the_table_is_sorted_and_can_be_limited_to_keys(tmp_path):
    store = Store(tmp_path)
    store.append([record("b"), record("d")])
    store.append([record("c"), record("a")])
    assert store.table()["key"].tolist() == ["a", "b", "c", "d"]
    assert store.table({"d", "b", "unknown"})["key"].tolist() == ["b", "d"]
    assert store.table(set()).empty
    assert store.keys() == {"a", "b", "c", "d"}


def test_more_records_than_a_query_returns_by_default(tmp_path):
    store = Store(tmp_path)
    store.append([record(f"{i:05}") for i in range(2500)])
    assert len(store.keys()) == len(store.table()) == 2500


def test_the_hash_does_not_depend_on_order_groups_or_seconds(tmp_path):
    records = [record(f"k{i:04}", text=f"text {i}" * (i % 50), level=i) for i in range(1500)]
    whole = Store(tmp_path / "whole")
    whole.append(records)
    parts = Store(tmp_path / "parts")
    shuffled = random.Random(0).sample(records, len(records))
    cuts = [0, 1, 3, 700, 1500]
    for first, end in zip(cuts, cuts[1:]):
        timed = [dataclasses.replace(r, seconds=r.seconds + first) for r in shuffled[first:end]]
        Store(tmp_path / "parts").append(timed)
    assert parts.logical_hash() == whole.logical_hash()
    assert not parts.table().equals(whole.table()), "the seconds do differ"


def test_the_hash_changes_with_every_other_column(tmp_path):
    base = Store(tmp_path / "base")
    base.append([record("a"), record("b")])
    hashes = {base.logical_hash()}
    other = {str: "text ", int: 8, float: 0.1 + 1e-16, bool: False}
    names = [name for name in TYPES if name not in VOLATILE]
    for name in names:
        store = Store(tmp_path / name)
        changed = dataclasses.replace(record("b"), **{name: other[TYPES[name]]})
        store.append([record("a"), changed])
        hashes.add(store.logical_hash())
    assert len(hashes) == 1 + len(names)


def test_text_cannot_move_between_columns_unseen(tmp_path):
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    one.append([record("a", text="xy", finish="")])
    two.append([record("a", text="x", finish="y")])
    assert one.logical_hash() != two.logical_hash()


def test_two_stores_on_one_folder_see_each_other(tmp_path):
    one, two = Store(tmp_path), Store(tmp_path)
    one.append([record("a")])
    assert two.keys() == {"a"}
    two.append([record("a"), record("b")])
    one.append([record("b"), record("c")])
    assert one.table().equals(two.table()) and len(one.table()) == 3
    assert one.logical_hash() == two.logical_hash() == Store(tmp_path).logical_hash()


@pytest.mark.parametrize(
    "fields",
    [
        [pyarrow.field("key", pyarrow.string())],
        [*SCHEMA, pyarrow.field("more", pyarrow.string())],
        [pyarrow.field(f.name, pyarrow.float32()) if f.name == "level" else f for f in SCHEMA],
    ],
)
def test_a_store_with_other_columns_is_refused_in_one_sentence(tmp_path, fields):
    lancedb.connect(tmp_path).create_table("records", schema=pyarrow.schema(fields))
    with pytest.raises(ValueError, match="another version of the kit.*move that folder") as caught:
        Store(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_store_at_a_uri_and_keys_among_some(tmp_path):
    store = Store(f"file://{tmp_path}/there")
    store.append([record(f"{i}") for i in range(3)])
    store.append([record("2"), record("3")])
    known = store.keys()
    assert len(known) == 4 and Store(tmp_path / "there").keys() == known
    some = {min(known), "0" * 64}
    assert store.keys(some) == {min(known)} and store.keys([]) == set()
    assert store.table(some)["key"].tolist() == [min(known)] and store.table(set()).empty


@pytest.mark.parametrize("lacking", [["grade_version"], ["dtype", "asks", "grade_version"],
                                     ["joules", "dtype", "asks", "grade_version"]])  # fmt: skip
def test_a_store_from_before_a_column_was_kept_goes_on(tmp_path, lacking):
    kept = [column for column in SCHEMA if column.name not in lacking]
    old = pyarrow.schema(kept, metadata=SCHEMA.metadata)
    row = dataclasses.asdict(record("a", joules=0.0, dtype="", asks="any", grade_version=0))
    row = {name: value for name, value in row.items() if name not in lacking}
    table = lancedb.connect(tmp_path).create_table("records", schema=old)
    table.add(pyarrow.Table.from_pylist([row], schema=old))
    store = Store(tmp_path)
    store.append([record("b", joules=3.0, dtype="bfloat16")])
    first, second = (
        record("a", joules=0.0, dtype="", asks="any", grade_version=0),
        record("b", joules=3.0, dtype="bfloat16"),
    )
    assert back(store.table()) == [first, second]
    assert Store(tmp_path).keys() == {"a", "b"}


def test_a_store_whose_keys_hashed_the_sources_is_read_and_takes_no_more(tmp_path):
    old = SCHEMA.remove_metadata()
    table = lancedb.connect(tmp_path).create_table("records", schema=old)
    table.add(pyarrow.Table.from_pylist([dataclasses.asdict(record("a"))], schema=old))
    store = Store(tmp_path)
    for write in (lambda: store.append([record("b")]), lambda: store.keys(["a", "b"])):
        with pytest.raises(ValueError, match=f"The store in {tmp_path} was filled by an earlier"):
            write()
    assert back(store.table()) == [record("a")] and store.keys() == {"a"}


def test_a_store_that_lost_files_is_named_in_one_sentence(tmp_path):
    store = Store(tmp_path)
    for key in "ab":
        store.append([record(key)])
    next((tmp_path / "records.lance" / "data").iterdir()).unlink()
    for read in (store.keys, Store(tmp_path).table):
        with pytest.raises(ValueError, match=r"damaged \(lance error: Not found: .*lance\); move"):
            read()
    shutil.rmtree(tmp_path / "records.lance")
    with pytest.raises(ValueError, match=f"The store in {tmp_path} is damaged") as caught:
        store.append([record("c")])
    assert "\n" not in str(caught.value) and "registry" not in str(caught.value)


def test_writers_at_once_store_a_record_once(tmp_path):
    Store(tmp_path)
    records, together = [record(f"k{i}") for i in range(40)], threading.Barrier(4)

    def write(_) -> None:
        store = Store(tmp_path)
        together.wait()
        store.append(records)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(Store(tmp_path).table()) == 40
