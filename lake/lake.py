"""`Lake`: a folder or a bucket that holds runs, as tables and tensors."""

from __future__ import annotations

import datetime
import html
import json
import os
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .. import __version__
from . import codec
from .axis import claim_rows
from .compactions import COMPACTED
from .errors import (
    CorruptFile,
    InputMismatch,
    InvalidName,
    LakeExists,
    LakeNotFound,
    NewerFormat,
    UnknownName,
)
from .names import check_run_name, encode_name, spec_id
from .receipt_index import ReceiptIndex
from .receipts import FileEntry, Receipt, Unit
from .schema import FORMAT_VERSION, QUANTITIES, TABLES
from .steps import summarize_steps
from .storage import Storage
from .tensors import AxisIndex, Tensor
from .units import UnitWriter, mismatch_message

if TYPE_CHECKING:
    import duckdb
    import polars as pl

    from .session import Session

_MARKER = "lakebed.json"


class Lake:
    """A lake, opened. Use `Lake.open`, `Lake.create` or `Lake.open_or_create`.

    >>> lake = Lake.open("demo.lake")                                            # doctest: +SKIP
    >>> lake.sql("select run, max(step) from steps group by run").pl()           # doctest: +SKIP
    >>> lake.tensor("gradients", "blocks.1.attn.q_proj.weight", "demo").read([100, 101])   # doctest: +SKIP
    """

    def __init__(self, storage: Storage, marker: Mapping[str, Any]) -> None:
        self.storage = storage
        self.id = str(marker["id"])
        self.format = int(marker["format"])
        self.receipts = ReceiptIndex(storage)
        self.chunks_read = 0
        self._counting = threading.Lock()
        self._layouts: dict[str, codec.Layout] = {}
        self._axes: tuple[int, AxisIndex] | None = None
        self._session: Session | None = None
        self._pins = 0

    @classmethod
    def open(cls, uri: str | os.PathLike[str], **options: Any) -> Lake:
        """Opens an existing lake; `options` go to fsspec. Raises LakeNotFound, NewerFormat or CorruptFile."""
        return cls._of(Storage(uri, **options))

    @classmethod
    def _of(cls, storage: Storage) -> Lake:
        try:
            marker = json.loads(storage.read(_MARKER))
            version = int(marker["format"])
            str(marker["id"])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise LakeNotFound(
                f"no lake at {storage.uri}: make one with `lakebed demo --lake {storage.uri}`, `lakebed train` or "
                "`lakebed import`, or check the path"
            ) from error
        except OSError as error:
            raise LakeNotFound(f"cannot read {storage.uri}/{_MARKER}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(
                f"{storage.uri}/{_MARKER} is damaged: it must hold JSON with format and id; restore it from a copy"
            ) from error
        if version > FORMAT_VERSION:
            raise NewerFormat(
                f"{storage.uri} has lake format {version}; lakebed {__version__} reads up to {FORMAT_VERSION}: "
                "install a newer lakebed (`pip install -U lakebed`)"
            )
        return cls(storage, marker)

    @classmethod
    def create(cls, uri: str | os.PathLike[str], **options: Any) -> Lake:
        """Makes a new, empty lake; raises LakeExists when anything stands there already."""
        return cls._in(Storage(uri, **options))

    @classmethod
    def _in(cls, storage: Storage) -> Lake:
        if storage.names(""):
            raise LakeExists(f"{storage.uri} exists and is not empty: name a new folder for the lake")
        marker = {
            "format": FORMAT_VERSION,
            "id": uuid.uuid4().hex,
            "created_by": f"lakebed {__version__}",
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        storage.create(_MARKER, json.dumps(marker, indent=2, sort_keys=True).encode())
        return cls._of(storage)

    @classmethod
    def open_or_create(cls, uri: str | os.PathLike[str], **options: Any) -> Lake:
        """Opens the lake, or makes it when the place is empty."""
        storage = Storage(uri, **options)
        return cls._of(storage) if storage.exists(_MARKER) else cls._in(storage)

    @property
    def uri(self) -> str:
        """Where the lake lies, as it was opened."""
        return self.storage.uri

    # -- what exists -------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Takes in what was committed since, by this process or another; nothing inside `pinned`."""
        if not self._pins:
            self.receipts.refresh()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keeps to what is committed now: all queries inside see one state of the lake, whoever writes meanwhile."""
        self.refresh()
        self._pins += 1
        try:
            yield
        finally:
            self._pins -= 1

    def runs(self) -> list[str]:
        """Names of the runs."""
        self.refresh()
        return sorted({receipt.run for receipt in self.receipts.all()})

    def require_run(self, run: str) -> None:
        """Raises UnknownName, listing the runs there are, unless `run` is one."""
        found = self.runs()
        if run not in found:
            raise UnknownName(f"no run {run!r} in {self.uri}; it has {', '.join(found) or 'no runs yet'}")

    def find_receipt(self, unit: Unit) -> Receipt | None:
        """The receipt of this unit; raises InputMismatch if one stands that was made from other inputs."""
        receipt = self.receipts.get(unit.run, unit.name)
        if receipt is not None and receipt.content_hash != unit.content_hash:
            raise InputMismatch(mismatch_message(unit, receipt))
        return receipt

    def dataset_steps(self, run: str, dataset: str, parameters: Mapping[str, Any] | None = None) -> list[int]:
        """Steps a dataset was made for, ascending, over every unit of it with these parameters."""
        spec = spec_id(parameters or {})
        receipts = self.receipts.all(run, dataset)
        return sorted({step for receipt in receipts if receipt.spec == spec for step in receipt.steps})

    def dataset_intervals(
        self, run: str, dataset: str, parameters: Mapping[str, Any] | None = None
    ) -> set[tuple[int, int]]:
        """Intervals (source, target) that a dataset of intervals was made for with these parameters."""
        spec = spec_id(parameters or {})
        return {
            (receipt.steps[0], receipt.steps[-1])
            for receipt in self.receipts.all(run, dataset)
            if receipt.spec == spec
        }

    # -- writing -----------------------------------------------------------------------------------------------

    def unit(self, unit: Unit) -> UnitWriter:
        """A context manager that writes one unit of work; see UnitWriter."""
        check_run_name(unit.run)
        if unit.name.startswith(COMPACTED):
            raise InvalidName(
                f"unit name {unit.name!r} is not usable: {COMPACTED} is where compacted receipts lie"
            )
        return UnitWriter(self, unit)

    def claim_rows(self, run: str, quantity: str, count: int, block_rows: int) -> int:
        """Reserves rows of a quantity's step axis for one writer; returns the first, a multiple of `block_rows`."""
        return claim_rows(self.storage, self.id, run, quantity, count, block_rows)

    def block_rows(self, run: str, quantity: str) -> int | None:
        """Rows that units of a quantity claim at a time; None if nothing was written yet."""
        key = f"tensors/{run}/{quantity}/zarr.json"
        try:
            return int(json.loads(self.storage.read(key))["attributes"]["block_rows"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(
                f"{key} is damaged: it must hold a Zarr group with attribute block_rows"
            ) from error

    # -- tables ------------------------------------------------------------------------------------------------

    def table_files(self, name: str, run: str | None = None) -> list[FileEntry]:
        """Parquet files of a table that receipts name; the receipts themselves for `extractions`."""
        if name not in TABLES:
            raise UnknownName(f"no table {name!r}; there are {', '.join(sorted(TABLES))}")
        receipts = self.receipts.all(run)
        if name == "extractions":
            return [FileEntry(key, -1, -1) for key in dict.fromkeys(receipt.key for receipt in receipts)]
        prefix = f"tables/{name}/"
        # A compacted file is one of many units.
        found = {
            entry.path: entry
            for receipt in receipts
            for entry in receipt.files
            if entry.path.startswith(prefix)
        }
        return list(found.values())

    def table(self, name: str, run: str | None = None) -> pl.LazyFrame:
        """A Polars lazy frame over a table (or a tensor's SQL view, e.g. "gradients"), of one run or of all."""
        import polars as pl

        self.refresh()
        views = {quantity.view: quantity.name for quantity in QUANTITIES.values()}
        if name in views:
            from .polars_source import tensor_source

            source = tensor_source(self, views[name], name)
            return source if run is None else source.filter(pl.col("run") == run)
        files = self.table_files(name, run)
        if not files:
            empty = pl.from_arrow(TABLES[name].arrow_schema().empty_table())
            assert isinstance(empty, pl.DataFrame)
            return empty.lazy().with_columns(run=pl.lit(None, pl.String))
        paths = [self.storage.path(entry.path) for entry in files]
        if not self.storage.local:
            return self._table_of_objects(files, paths)
        if name != "extractions":
            self.session.check(files)
        return pl.scan_parquet(paths, hive_partitioning=True, hive_schema={"run": pl.String}, glob=False)

    def _table_of_objects(self, files: list[FileEntry], paths: list[str]) -> pl.LazyFrame:
        """Parquet files of a store, read as the session reads them: with the same credentials, and each once."""
        import polars as pl

        from .imports import without_pandas

        with without_pandas():
            import pyarrow.dataset as ds

        self.session.check(files)
        partitioning = ds.partitioning(pa.schema({"run": pa.string()}), flavor="hive")
        return pl.scan_pyarrow_dataset(
            ds.dataset(paths, format="parquet", filesystem=self.session.files, partitioning=partitioning)
        )

    @property
    def session(self) -> Session:
        """The lake's DuckDB session, made on first use."""
        if self._session is None:
            from .session import Session

            self._session = Session(self)
        return self._session

    def sql(
        self, query: str, parameters: Mapping[str, Any] | list[Any] | None = None
    ) -> duckdb.DuckDBPyRelation:
        """A DuckDB relation; `.pl()`, `.fetchall()`, `.show()`. Raises QueryError."""
        return self.session.relation(query, parameters)

    # -- tensors -----------------------------------------------------------------------------------------------

    @property
    def axes(self) -> AxisIndex:
        """Step axes of every array, up to the receipts read so far."""
        if self._axes is None or self._axes[0] != self.receipts.version:
            self._axes = (self.receipts.version, AxisIndex(self.receipts.all()))
        return self._axes[1]

    def count_chunk(self) -> None:
        """Counts a chunk that was opened, in `chunks_read`; chunks are read by several threads."""
        with self._counting:
            self.chunks_read += 1

    def array_layout(self, run: str, quantity: str, name: str) -> codec.Layout | None:
        """Layout of an array, or None if it does not exist yet."""
        folder = f"tensors/{run}/{quantity}/{encode_name(name)}"
        if folder not in self._layouts:
            try:
                metadata = self.storage.read(f"{folder}/zarr.json")
            except FileNotFoundError:
                return None
            self._layouts[folder] = codec.layout_of(metadata, folder)[0]
        return self._layouts[folder]

    def tensor(self, quantity: str, parameter: str, run: str | None = None) -> Tensor:
        """One array: `.steps`, `.shape`, `.read(steps)`. `run` may be left out when the lake has one run.

        Raises UnknownName, listing what exists, for a run, quantity or parameter the lake does not hold.
        """
        if run is None:
            runs = self.runs()
            if len(runs) != 1:
                raise UnknownName(f"which run? {self.uri} has {', '.join(runs) or 'no runs yet'}")
            run = runs[0]
        axis = self.axes.axis(run, quantity, parameter)
        if not len(axis.steps):
            self.require_run(run)
            axis = self.axes.axis(run, quantity, parameter)
        if not len(axis.steps):
            names = self.axes.names(run, quantity)
            held = sorted(of for name, of in self.axes.quantities() if name == run)
            if not names:
                raise UnknownName(
                    f"run {run!r} holds no {quantity}; it holds {', '.join(held) or 'no tensors'}"
                )
            raise UnknownName(f"run {run!r} holds no {quantity} {parameter!r}; it has {_shortened(names)}")
        return Tensor(self, run, quantity, parameter, axis)

    # -- closing and looking -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes the SQL session, if one was opened."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Lake:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def summary(self) -> list[dict[str, Any]]:
        """One row per run: its datasets with their steps, and bytes."""
        self.refresh()
        rows = []
        for run in sorted({receipt.run for receipt in self.receipts.all()}):
            receipts = self.receipts.all(run)
            steps: dict[str, set[int]] = {}
            for receipt in receipts:
                steps.setdefault(receipt.dataset, set()).update(receipt.steps)
            rows.append(
                {
                    "run": run,
                    "datasets": {
                        name: summarize_steps(sorted(of)) for name, of in sorted(steps.items()) if of
                    },
                    "units": len(receipts),
                    "rows": sum(receipt.rows for receipt in receipts),
                    "bytes": sum(receipt.bytes for receipt in receipts),
                }
            )
        return rows

    def __repr__(self) -> str:
        lines = [f"<Lake {self.uri} (format {self.format})>"]
        for row in self.summary():
            held = "; ".join(f"{name} {steps}" for name, steps in row["datasets"].items())
            lines.append(f"  run {row['run']}: {held} ({row['bytes'] / 1e6:,.1f} MB, {row['rows']:,} rows)")
        return "\n".join(lines if len(lines) > 1 else [*lines, "  no runs yet"])

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{html.escape(row['run'])}</td><td>{html.escape(name)}</td><td>{html.escape(steps)}</td>"
            f"<td style='text-align:right'>{row['bytes'] / 1e6:,.1f} MB</td></tr>"
            for row in self.summary()
            for name, steps in row["datasets"].items()
        )
        head = "<tr><th>run</th><th>dataset</th><th>steps</th><th>run size</th></tr>"
        return f"<b>lake {html.escape(self.uri)}</b><table>{head}{cells}</table>"


def _shortened(names: Iterable[str], limit: int = 12) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" … ({len(listed)} in all)" if len(listed) > limit else "")
