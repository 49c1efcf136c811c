"""Receipts: what exists in a lake. A unit without one does not exist for any reader."""

from __future__ import annotations

import builtins
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import CorruptFile
from .names import canonical_json, content_hash, spec_id
from .schema import TABLES

if TYPE_CHECKING:
    from .storage import Storage

FOLDER = "tables/extractions"
# In a receipt's footer: its row as canonical JSON, and the CRC-32C of all bytes before the footer followed by that text.
_ROW, _CHECKSUM = b"lakebed.receipt", b"lakebed.crc32c"
# The same of a compaction, with a list of rows.
_ROWS = b"lakebed.receipts"


@dataclass(frozen=True)
class Unit:
    """One unit of work: what is made, of which run and steps, from which inputs.

    `inputs` holds content hashes (of a checkpoint, a probe, a trace), so that a unit of the same name made from
    something else is recognised; `version` is the code version of the dataset.
    """

    dataset: str
    run: str
    name: str
    steps: tuple[int, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over everything that decides the unit's content."""
        return content_hash(
            {
                "dataset": self.dataset,
                "version": self.version,
                "parameters": dict(self.parameters),
                "inputs": dict(self.inputs),
                "steps": list(self.steps),
            }
        )


@dataclass(frozen=True)
class FileEntry:
    """A Parquet file or Zarr chunk of a unit: path from the lake's root, length in bytes, CRC-32C.

    A chunk ends in the CRC-32C of all that precedes it, and that is the one named here.
    """

    path: str
    bytes: int
    crc32c: int


@dataclass(frozen=True)
class TensorEntry:
    """Rows of a quantity's step axis: row `first_row + i` of each array in `names` holds step `steps[i]`."""

    quantity: str
    first_row: int
    steps: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Receipt:
    """A committed unit, as the row of `extractions` says it."""

    run: str
    unit: str
    dataset: str
    spec: str
    parameters: str
    version: int
    inputs: str
    content_hash: str
    steps: tuple[int, ...]
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    rows: int
    bytes: int
    seconds: float
    created_at: str
    # Where the row lies, if not in a file of its own: see compactions.py.
    kept_in: str | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        unit: Unit,
        files: Iterable[FileEntry],
        tensors: Iterable[TensorEntry],
        rows: int,
        seconds: float,
        created_at: str,
    ) -> Receipt:
        """The receipt of a unit whose files all stand."""
        listed = tuple(files)
        return cls(
            run=unit.run,
            unit=unit.name,
            dataset=unit.dataset,
            spec=spec_id(unit.parameters),
            parameters=canonical_json(dict(unit.parameters)),
            version=unit.version,
            inputs=canonical_json(dict(unit.inputs)),
            content_hash=unit.content_hash,
            steps=unit.steps,
            files=listed,
            tensors=tuple(tensors),
            rows=rows,
            bytes=sum(entry.bytes for entry in listed),
            seconds=seconds,
            created_at=created_at,
        )

    @property
    def key(self) -> str:
        """Where the receipt lies."""
        return self.kept_in or receipt_key(self.run, self.unit)

    def to_row(self) -> dict[str, Any]:
        """Its row of `extractions`, as plain data."""
        row = {name: getattr(self, name) for name in TABLES["extractions"].names()}
        row["steps"] = list(self.steps)
        row["files"] = [vars(entry) for entry in self.files]
        row["tensors"] = [
            {**vars(entry), "steps": list(entry.steps), "names": list(entry.names)} for entry in self.tensors
        ]
        return row

    def to_parquet(self) -> builtins.bytes:
        """The one-row Parquet file, its row once more as JSON in the footer."""
        return _rows_to_parquet([self.to_row()], _ROW)

    @classmethod
    def of_row(cls, run: str, row: dict[str, Any], kept_in: str | None = None) -> Receipt:
        """A receipt from its row; TypeError and KeyError for one that is none."""
        row["steps"] = tuple(row["steps"])
        row["files"] = tuple(FileEntry(**entry) for entry in row["files"])
        row["tensors"] = tuple(
            TensorEntry(entry["quantity"], entry["first_row"], tuple(entry["steps"]), tuple(entry["names"]))
            for entry in row["tensors"]
        )
        return cls(run=run, kept_in=kept_in, **row)

    @classmethod
    def from_parquet(cls, run: str, data: builtins.bytes, path: str, pages: bool = False) -> Receipt:
        """Reads a receipt back, checksums compared; raises CorruptFile naming `path`.

        The row is that of the footer, if there is one: to decode the pages of each column takes six times as long, and a
        lake may have a thousand receipts. With `pages` it is the one that other readers see.
        """
        with _damage(path, "remove it and run the same extraction again; what it covered will be made anew"):
            (row,) = _rows_of(data, _ROW, pages)
            return cls.of_row(run, row)


def receipts_to_parquet(receipts: Iterable[Receipt]) -> bytes:
    """A Parquet file of many receipts, their rows once more as JSON in the footer."""
    return _rows_to_parquet([receipt.to_row() for receipt in receipts], _ROWS)


def receipts_from_parquet(run: str, data: bytes, path: str, pages: bool = False) -> tuple[Receipt, ...]:
    """Reads such a file back, checksums compared; raises CorruptFile naming `path`."""
    remedy = (
        "restore it from a copy of the lake; or remove it and run the extractions of its units again, which makes anew "
        "those whose own receipts `lakebed gc` has removed"
    )
    with _damage(path, remedy):
        return tuple(Receipt.of_row(run, row, path) for row in _rows_of(data, _ROWS, pages))


@contextmanager
def _damage(path: str, remedy: str) -> Iterator[None]:
    """What a file that is no receipt, or not whole, says to a person."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CorruptFile(f"receipt {path} is damaged ({reason}): {remedy}") from error


def _rows_to_parquet(rows: list[dict[str, Any]], entry: bytes) -> bytes:
    table = pa.Table.from_pylist(rows, schema=TABLES["extractions"].arrow_schema())
    text, sink = canonical_json(rows if entry == _ROWS else rows[0]), io.BytesIO()
    # Without statistics: of so few rows they tell nothing, and unlike the pages they carry no checksum.
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", write_page_checksum=True, write_statistics=False
    ) as writer:
        writer.write_table(table)
        checksum = google_crc32c.value(sink.getvalue() + text.encode())
        writer.add_key_value_metadata({entry: text, _CHECKSUM: str(checksum)})
    return sink.getvalue()


def _rows_of(data: bytes, entry: bytes, pages: bool) -> list[dict[str, Any]]:
    """Rows of `extractions` in a file's bytes; ValueError and the like for damage."""
    # pyarrow does not look at the first bytes, other readers do.
    if data[:4] != b"PAR1":
        raise ValueError("it does not begin like a Parquet file")
    # Half the time of read_table, which sets up a dataset scan.
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    held = None if pages else _json_of_footer(file, data, entry)
    if held is None:
        return _rows_of_pages(file)
    return held if isinstance(held, list) else [held]


def _json_of_footer(file: pq.ParquetFile, data: bytes, entry: bytes) -> Any:
    """What an entry of the footer holds, None in a receipt of older versions; ValueError for damage."""
    held = file.metadata.metadata or {}
    if not {entry, _CHECKSUM} <= held.keys():
        return None
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if google_crc32c.value(data[:start] + held[entry]) != int(held[_CHECKSUM]):
        raise ValueError("its checksum does not match")
    return json.loads(held[entry])


def _rows_of_pages(file: pq.ParquetFile) -> list[dict[str, Any]]:
    table = file.read(use_threads=False)
    if table.schema.remove_metadata() != TABLES["extractions"].arrow_schema():
        raise ValueError("its columns are not those of a receipt")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def receipt_key(run: str, unit: str) -> str:
    """Where the receipt of a unit lies."""
    return f"{FOLDER}/run={run}/{unit}.parquet"


def read_checked(storage: Storage, entry: FileEntry) -> bytes:
    """The bytes of a Parquet file; raises CorruptFile unless they have the length and checksum of its receipt."""
    data = storage.read(entry.path)
    if len(data) != entry.bytes:
        raise CorruptFile(
            f"{entry.path} is damaged ({len(data):,} bytes, its receipt says {entry.bytes:,}): run `lakebed verify`"
        )
    if google_crc32c.value(data) != entry.crc32c:
        raise CorruptFile(
            f"{entry.path} is damaged (its checksum is not the receipt's): run `lakebed verify`"
        )
    return data


def parquet_bytes(table: pa.Table, row_group_size: int | None = None) -> bytes:
    """zstd Parquet with page checksums."""
    sink = pa.BufferOutputStream()
    # A dictionary of measured numbers would hold each of them: half of the time, and a fifth of the bytes. Nor does a
    # query filter on them, so that their extremes are not worth finding.
    keys = [field.name for field in table.schema if not _is_measured(field.type)]
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_size,
        compression="zstd",
        use_dictionary=keys or False,
        write_page_checksum=True,
        write_statistics=keys or False,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _is_measured(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_nested(kind))
