"""Receipts: what exists in a lake. A unit without one does not exist for any reader."""

from __future__ import annotations

import builtins
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import CorruptFile
from .names import canonical_json, content_hash, spec_id
from .schema import TABLES
from .storage import Storage

FOLDER = "tables/extractions"
# In a receipt's footer: its row as canonical JSON, and the CRC-32C of all bytes before the footer followed by that text.
_ROW, _CHECKSUM = b"lakebed.receipt", b"lakebed.crc32c"


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
        return receipt_key(self.run, self.unit)

    def to_parquet(self) -> builtins.bytes:
        """The one-row Parquet file, its row once more as JSON in the footer."""
        row = {name: getattr(self, name) for name in TABLES["extractions"].names()}
        row["steps"] = list(self.steps)
        row["files"] = [vars(entry) for entry in self.files]
        row["tensors"] = [
            {**vars(entry), "steps": list(entry.steps), "names": list(entry.names)} for entry in self.tensors
        ]
        table = pa.Table.from_pylist([row], schema=TABLES["extractions"].arrow_schema())
        text, sink = canonical_json(row), io.BytesIO()
        # Without statistics: of one row they tell nothing, and unlike its pages they carry no checksum.
        with pq.ParquetWriter(
            sink, table.schema, compression="zstd", write_page_checksum=True, write_statistics=False
        ) as writer:
            writer.write_table(table)
            checksum = google_crc32c.value(sink.getvalue() + text.encode())
            writer.add_key_value_metadata({_ROW: text, _CHECKSUM: str(checksum)})
        return sink.getvalue()

    @classmethod
    def from_parquet(cls, run: str, data: builtins.bytes, path: str, pages: bool = False) -> Receipt:
        """Reads a receipt back, checksums compared; raises CorruptFile naming `path`.

        The row is that of the footer, if there is one: to decode the pages of each column takes six times as long, and a
        lake may have a thousand receipts. With `pages` it is the one that other readers see.
        """
        try:
            # pyarrow does not look at the first bytes, other readers do.
            if data[:4] != b"PAR1":
                raise ValueError("it does not begin like a Parquet file")
            # Half the time of read_table, which sets up a dataset scan.
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            row = (not pages and _row_of_footer(file, data)) or _row_of_pages(file)
            row["steps"] = tuple(row["steps"])
            row["files"] = tuple(FileEntry(**entry) for entry in row["files"])
            row["tensors"] = tuple(
                TensorEntry(
                    entry["quantity"], entry["first_row"], tuple(entry["steps"]), tuple(entry["names"])
                )
                for entry in row["tensors"]
            )
            return cls(run=run, **row)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CorruptFile(
                f"receipt {path} is damaged ({reason}): remove it and run the same extraction again; what it "
                "covered will be made anew"
            ) from error


def _row_of_footer(file: pq.ParquetFile, data: bytes) -> dict[str, Any] | None:
    """The row in the footer of a receipt's bytes, None in a receipt of older versions; ValueError for damage."""
    held = file.metadata.metadata or {}
    if not {_ROW, _CHECKSUM} <= held.keys():
        return None
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if google_crc32c.value(data[:start] + held[_ROW]) != int(held[_CHECKSUM]):
        raise ValueError("its checksum does not match")
    row: dict[str, Any] = json.loads(held[_ROW])
    return row


def _row_of_pages(file: pq.ParquetFile) -> dict[str, Any]:
    table = file.read(use_threads=False)
    if table.schema.remove_metadata() != TABLES["extractions"].arrow_schema():
        raise ValueError("its columns are not those of a receipt")
    row: dict[str, Any]
    (row,) = table.to_pylist()
    return row


def receipt_key(run: str, unit: str) -> str:
    """Where the receipt of a unit lies."""
    return f"{FOLDER}/run={run}/{unit}.parquet"


def parquet_bytes(table: pa.Table) -> bytes:
    """zstd Parquet with page checksums."""
    sink = pa.BufferOutputStream()
    # A dictionary of measured numbers would hold each of them: half of the time, and a fifth of the bytes. Nor does a
    # query filter on them, so that their extremes are not worth finding.
    keys = [field.name for field in table.schema if not _is_measured(field.type)]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=keys or False,
        write_page_checksum=True,
        write_statistics=keys or False,
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _is_measured(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_nested(kind))


class ReceiptIndex:
    """All receipts of a lake. They never change once written, so each is read once per process."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[tuple[str, str], Receipt] = {}
        # Grows with every change, so that whatever is derived from the receipts knows when it is out of date.
        self.version = 0

    def refresh(self, run: str | None = None) -> None:
        """Reads the receipts written since the last call, of one run or of all."""
        folders = [f"run={run}"] if run is not None else self._storage.names(FOLDER)
        found: set[tuple[str, str]] = set()
        for folder in folders:
            name = folder.removeprefix("run=")
            files = self._storage.names(f"{FOLDER}/{folder}")
            found.update((name, file.removesuffix(".parquet")) for file in files if file.endswith(".parquet"))
        for gone in [key for key in self._known if key not in found and run in (None, key[0])]:
            del self._known[gone]
            self.version += 1
        missing = sorted(found - self._known.keys())
        if len(missing) > 8 and not self._storage.local:
            with ThreadPoolExecutor(16) as pool:
                receipts: Sequence[Receipt | None] = list(pool.map(self._read, missing))
        else:
            receipts = [self._read(key) for key in missing]
        for receipt in receipts:
            if receipt is not None:
                self.add(receipt)

    def _read(self, key: tuple[str, str]) -> Receipt | None:
        path = receipt_key(*key)
        try:
            return Receipt.from_parquet(key[0], self._storage.read(path), path)
        except FileNotFoundError:
            return None

    def get(self, run: str, unit: str) -> Receipt | None:
        """The receipt of one unit, read from storage if need be."""
        if (run, unit) not in self._known:
            receipt = self._read((run, unit))
            if receipt is None:
                return None
            self.add(receipt)
        return self._known[run, unit]

    def all(self, run: str | None = None, dataset: str | None = None) -> list[Receipt]:
        """Receipts known so far, by run and unit name."""
        return [
            receipt
            for (of_run, _), receipt in sorted(self._known.items())
            if run in (None, of_run) and dataset in (None, receipt.dataset)
        ]

    def add(self, receipt: Receipt) -> None:
        """Notes a receipt."""
        self._known[receipt.run, receipt.unit] = receipt
        self.version += 1
