"""Writing: a unit of work gathers rows and tensor blocks and appears whole, or not at all.

Order of a commit: Zarr chunks, Parquet files (each under a name no other attempt uses, renamed into place or put as one
object), then the receipt, created exclusively. Whoever creates the receipt first owns the unit; a second process that did
the same work finds it there, removes its own files and goes on. A process that is killed leaves files that no receipt names.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import pyarrow as pa

from . import codec
from .errors import InputMismatch, SchemaMismatch, UnknownName
from .names import encode_name
from .receipts import FileEntry, Receipt, TensorEntry, Unit, parquet_bytes
from .schema import QUANTITIES, TABLES

if TYPE_CHECKING:
    from .lake import Lake


class RowBlock:
    """Rows of a quantity's step axis claimed for one unit: `steps[i]` lies in row `first_row + i`."""

    def __init__(
        self, writer: UnitWriter, quantity: str, steps: Sequence[int], first_row: int, block_rows: int
    ) -> None:
        self.quantity = quantity
        self.steps = tuple(int(step) for step in steps)
        self.first_row = first_row
        self.block_rows = block_rows
        self.names: list[str] = []
        self._writer = writer

    def layout(self, name: str, row_shape: Sequence[int], dtype: Any = np.float32) -> codec.Layout:
        """How an array of this quantity is chunked; `chunk_rows` tells how many rows to hand over at once."""
        return codec.choose_layout(row_shape, dtype, self.block_rows)

    def write(
        self,
        name: str,
        array: np.ndarray[Any, Any],
        at: int = 0,
        dimension_names: Sequence[str] | None = None,
        attributes: Mapping[str, Any] | None = None,
        compress: bool = True,
    ) -> None:
        """Writes rows `at … at + len(array)` of array `name`: Float[rows, *row_shape].

        Without `compress` chunks hold their numbers as they are: for those that hardly shrink, twice as fast.
        `at` must be a multiple of the layout's `chunk_rows`, and only the last call for a name may hand over rows
        that do not fill a chunk (they are padded with NaN).
        """
        layout = self.layout(name, array.shape[1:], array.dtype)
        self._ensure(name, layout, dimension_names, attributes)
        if at % layout.chunk_rows:
            raise ValueError(f"{name}: row {at} is not the start of a chunk of {layout.chunk_rows} rows")
        folder = self._writer.array_key(self.quantity, name)
        for start in range(0, len(array), layout.chunk_rows):
            rows = array[start : start + layout.chunk_rows]
            for key, cells in layout.keys((self.first_row + at + start) // layout.chunk_rows):
                self._writer.put(
                    f"{folder}/{key}", codec.encode(_padded(rows[(slice(None), *cells)], layout), compress)
                )

    def fill(
        self,
        name: str,
        row_shape: Sequence[int],
        fill: Callable[[np.ndarray[Any, Any]], None],
        dimension_names: Sequence[str] | None = None,
    ) -> None:
        """Writes the first row of array `name` uncompressed: `fill` puts its Float32[*row_shape] where it is asked to.

        For rows that are joined from parts, which are then copied once.
        """
        layout = self.layout(name, row_shape)
        if (layout.chunk_rows, *layout.chunk_cells) != (1, *layout.row_shape):
            row = np.empty(layout.row_shape, layout.dtype)
            fill(row)
            self.write(name, row[None], dimension_names=dimension_names, compress=False)
            return
        self._ensure(name, layout, dimension_names, None)
        ((key, _),) = layout.keys(self.first_row)
        folder = self._writer.array_key(self.quantity, name)
        self._writer.put(f"{folder}/{key}", codec.scratch.stored(layout.row_shape, layout.dtype, fill))

    def _ensure(
        self,
        name: str,
        layout: codec.Layout,
        dimension_names: Sequence[str] | None,
        attributes: Mapping[str, Any] | None,
    ) -> None:
        if name not in self.names:
            self._writer.ensure_array(self.quantity, name, layout, dimension_names, attributes or {})
            self.names.append(name)


def _padded(cells: np.ndarray[Any, Any], layout: codec.Layout) -> np.ndarray[Any, Any]:
    full = (layout.chunk_rows, *layout.chunk_cells)
    if cells.shape == full:
        return cells
    out = np.full(full, codec.fill_value(layout.dtype), layout.dtype)
    out[tuple(slice(size) for size in cells.shape)] = cells
    return out


class UnitWriter:
    """Context manager that writes one unit. Leaving it normally commits; an exception leaves nothing visible.

    `committed` tells afterwards whether this process's work is the one that counts.
    """

    def __init__(self, lake: Lake, unit: Unit) -> None:
        self.unit = unit
        self.committed = False
        self._lake = lake
        self._storage = lake.storage
        self._attempt = uuid.uuid4().hex[:8]
        self._started = time.perf_counter()
        self._tables: dict[str, list[pa.Table]] = {}
        self._unordered: set[str] = set()
        self._blocks: list[RowBlock] = []
        self._files: list[FileEntry] = []
        self._uploads: deque[Future[None]] = deque()

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def rows(self, table: str, data: Any, in_order: bool = False) -> None:
        """Adds rows to `table`: an Arrow table, a Polars frame, a mapping of columns or a list of row mappings.

        `in_order` promises that they come sorted by the table's key, after those added before; others are sorted.
        Raises SchemaMismatch when a column is missing, unknown or of another kind; nullable columns may be left out.
        """
        self._tables.setdefault(table, []).append(conform(table, data))
        if not in_order:
            self._unordered.add(table)

    def tensor_rows(self, quantity: str, steps: Sequence[int], block_rows: int = 1) -> RowBlock:
        """Claims rows of a quantity for `steps`, in blocks of a power of two.

        The first unit of a (run, quantity) decides `block_rows`; later ones get what it chose.
        """
        block_rows = self._ensure_group(quantity, block_rows)
        first_row = self._lake.claim_rows(self.unit.run, quantity, len(steps), block_rows)
        block = RowBlock(self, quantity, steps, first_row, block_rows)
        self._blocks.append(block)
        return block

    def _ensure_group(self, quantity: str, block_rows: int) -> int:
        about = (
            QUANTITIES[quantity].about
            if quantity in QUANTITIES
            else f"optimizer state {quantity}, by parameter"
        )
        attributes = {"quantity": quantity, "about": about, "block_rows": block_rows}
        key = f"tensors/{self.unit.run}/{quantity}/zarr.json"
        standing = self._lake.block_rows(self.unit.run, quantity)
        if standing is None and not self._storage.create(key, codec.group_metadata(attributes)):
            standing = self._lake.block_rows(self.unit.run, quantity)
        return standing or block_rows

    def array_key(self, quantity: str, name: str) -> str:
        """Folder of an array."""
        return f"tensors/{self.unit.run}/{quantity}/{encode_name(name)}"

    def ensure_array(
        self,
        quantity: str,
        name: str,
        layout: codec.Layout,
        dimension_names: Sequence[str] | None,
        attributes: Mapping[str, Any],
    ) -> None:
        """Creates the array's metadata unless it stands; raises InputMismatch if it stands with another shape."""
        existing = self._lake.array_layout(self.unit.run, quantity, name)
        if existing is not None:
            if existing != layout:
                raise InputMismatch(
                    f"{quantity} {name!r} of run {self.unit.run!r} has rows of shape {existing.row_shape} "
                    f"({existing.dtype}, {existing.chunk_rows} per chunk), not {layout.row_shape} "
                    f"({layout.dtype}, {layout.chunk_rows} per chunk): use another run name"
                )
            return
        names = dimension_names or [f"size_{size}" for size in layout.row_shape]
        unique = [f"{label}_{axis}" if label in names[:axis] else label for axis, label in enumerate(names)]
        metadata = codec.array_metadata(
            layout,
            0,
            ["step", *unique],
            {"name": name, "quantity": quantity, **attributes},
            codec.fill_value(layout.dtype),
        )
        if not self._storage.create(f"{self.array_key(quantity, name)}/zarr.json", metadata):
            # Another process made it since we looked: it counts, and ours must fit it.
            self.ensure_array(quantity, name, layout, dimension_names, attributes)

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Writes one file of the unit and notes its checksum for the receipt."""
        upload = self._storage.write_soon(key, data)
        if upload is not None:
            self._uploads.append(upload)
        checksum = codec.chunk_checksum(data) if key.startswith("tensors/") else google_crc32c.value(data)
        self._files.append(FileEntry(key, len(data), int(checksum)))
        while self._uploads and self._uploads[0].done():
            self._uploads.popleft().result()

    def commit(self) -> Receipt:
        """Makes the unit visible; returns its receipt, or the one another process wrote first from the same inputs."""
        rows = 0
        try:
            for table, parts in self._tables.items():
                whole = pa.concat_tables(parts)
                keys = [(name, "ascending") for name in TABLES[table].key if name != "run"]
                sort = keys and len(whole) > 1 and table in self._unordered
                ordered = whole.sort_by(keys) if sort else whole
                rows += len(ordered)
                key = f"tables/{table}/run={self.unit.run}/{self.unit.name}-{self._attempt}.parquet"
                self.put(key, parquet_bytes(ordered))
            while self._uploads:
                self._uploads.popleft().result()
            receipt = self._receipt(rows)
        except BaseException:
            self.discard()
            raise
        try:
            created = self._lake.receipts.create(receipt)
        except BaseException:
            # An interrupt, or a store that lost its answer: the receipt may stand all the same, and then so must its
            # files. Where that cannot be told they stay, for no harm.
            with suppress(Exception):
                if not self._is_committed():
                    self.discard()
            raise
        if not created and not self._is_committed():
            return self._yield_to_other()
        self.committed = True
        self._lake.receipts.add(receipt)
        return receipt

    def _is_committed(self) -> bool:
        """Whether the receipt that stands is of this very attempt."""
        standing = self._lake.receipts.get(self.unit.run, self.unit.name)
        return standing is not None and list(standing.files) == self._files

    def _receipt(self, rows: int) -> Receipt:
        tensors = [
            TensorEntry(block.quantity, block.first_row, block.steps, tuple(block.names))
            for block in self._blocks
        ]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        seconds = time.perf_counter() - self._started
        return Receipt.of(self.unit, self._files, tensors, rows, seconds, now)

    def _yield_to_other(self) -> Receipt:
        self.discard()
        other = self._lake.receipts.get(self.unit.run, self.unit.name)
        if other is None or other.content_hash != self.unit.content_hash:
            raise InputMismatch(mismatch_message(self.unit, other))
        return other

    def discard(self) -> None:
        """Removes what was written; nothing of it was ever visible."""
        wait(self._uploads)  # or it would come to stand after it was removed
        self._uploads.clear()
        for _ in self._storage.remove_all([entry.path for entry in self._files]):
            pass
        self._files.clear()
        self._tables.clear()


def mismatch_message(unit: Unit, receipt: Receipt | None) -> str:
    """Says in one line which input of a committed unit differs."""
    if receipt is None:
        return f"unit {unit.name!r} of run {unit.run!r} was removed while it was being written: run the command again"
    mine, theirs = dict(unit.inputs), json.loads(receipt.inputs)
    differing = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    if unit.version != receipt.version:
        differing.append(f"code version {receipt.version} in the lake, {unit.version} now")
    what = ", ".join(differing) or "its steps or parameters"
    return (
        f"{unit.dataset} unit {unit.name!r} of run {unit.run!r} stands in the lake, made from other inputs ({what}): "
        "use another run name, or remove the run's data first"
    )


def conform(table: str, data: Any) -> pa.Table:
    """`data` as an Arrow table with exactly the declared columns of `table`."""
    if table not in TABLES:
        raise UnknownName(f"no table {table!r}; there are {', '.join(sorted(TABLES))}")
    schema = TABLES[table].arrow_schema()
    if hasattr(data, "to_arrow"):
        data = data.to_arrow()
    if isinstance(data, Sequence):
        data = {
            name: [row.get(name) for row in data]
            for name in dict.fromkeys(key for row in data for key in row)
        }
    columns = {name: data[name] for name in (data.column_names if isinstance(data, pa.Table) else data)}
    unknown = sorted(columns.keys() - set(schema.names))
    if unknown:
        raise SchemaMismatch(
            f"table {table!r} has no column {', '.join(unknown)}; it has {', '.join(schema.names)}"
        )
    length = max((len(values) for values in columns.values()), default=0)
    arrays = []
    for column in schema:
        values = columns.get(column.name)
        if values is None:
            if column.name in TABLES[table].key and length:
                raise SchemaMismatch(f"rows of table {table!r} lack their key column {column.name!r}")
            arrays.append(pa.nulls(length, column.type))
            continue
        try:
            array = (
                values
                if isinstance(values, pa.ChunkedArray | pa.Array)
                else pa.array(values, from_pandas=False)
            )
            arrays.append(array.cast(column.type))
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise SchemaMismatch(
                f"column {column.name!r} of table {table!r} does not fit {column.type}: {error}"
            ) from error
    try:
        return pa.Table.from_arrays(arrays, schema=schema)
    except pa.ArrowException as error:
        raise SchemaMismatch(f"rows of table {table!r} have columns of unequal length: {error}") from error
