"""A lake's Parquet files in an object store, as DuckDB and pyarrow read them: through a file system that asks for little.

The receipts tell how long a file is, so none is asked for its size; a file never changes once it is named, so what was
fetched is kept. A small file is one request, a large one is one for its footer and one for each span that is read.
"""

from __future__ import annotations

import datetime
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fsspec import AbstractFileSystem

from .errors import CorruptFile, LakebedError

if TYPE_CHECKING:
    from .receipts import FileEntry
    from .storage import Storage

# Files up to this size are fetched whole: a request costs as much as a megabyte.
_WHOLE = 1 << 20
# What is fetched of a larger one at least, and of its end, where the footer is.
_SPAN, _FOOTER = 256 << 10, 64 << 10
# Bytes that are kept.
_KEPT = 64 << 20
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class ObjectFiles(AbstractFileSystem):  # type: ignore[misc]
    """Stands before the file system of `storage`: takes what lies in the lake itself, and passes on the rest."""

    cachable = False

    def __init__(self, storage: Storage, missing: Callable[[str], str], failures: list[LakebedError]) -> None:
        """`missing` says what it means that a file is gone. `failures` takes what stops a read: DuckDB tells a text."""
        super().__init__()
        self.protocol = storage.fs.protocol
        self._storage = storage
        self._root = storage.path("").rstrip("/") + "/"
        self._missing = missing
        self._failures = failures
        self._sizes: dict[str, int] = {}
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def note(self, files: Iterable[FileEntry]) -> None:
        """Notes the sizes that receipts name."""
        self._sizes.update({entry.path: entry.bytes for entry in files if entry.bytes >= 0})

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def _key(self, path: str) -> str | None:
        """The key of a path below the lake's root; DuckDB and pyarrow give it with the protocol."""
        return path.removeprefix(self._root) if path.startswith(self._root) and "*" not in path else None

    def size(self, path: str) -> int:
        """Bytes of a file."""
        key = self._key(path)
        if key is None:
            return int(self._storage.fs.size(path))
        return self._sizes[key] if key in self._sizes else len(self.span(key, 0, -1))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        """Name, size and kind."""
        if self._key(path) is None:
            found: dict[str, Any] = self._storage.fs.info(path, **options)
            return found
        return {"name": path, "size": self.size(path), "type": "file"}

    def exists(self, path: str, **options: Any) -> bool:
        """Whether there is such a file: what a receipt names is taken to be."""
        return self._key(path) in self._sizes or bool(self._storage.fs.exists(path, **options))

    def glob(self, path: str, **options: Any) -> list[str]:
        """The path itself, or what it matches."""
        if self._key(path) is not None:
            return [path]
        return [str(self._storage.fs.unstrip_protocol(found)) for found in self._storage.fs.glob(path)]

    def modified(self, path: str) -> datetime.datetime:
        """Files of a lake never change."""
        return _EPOCH if self._key(path) is not None else self._storage.fs.modified(path)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """A file to read."""
        key = self._key(path)
        if key is None or mode != "rb":
            return self._storage.fs.open(path, mode, **options)
        return io.BufferedReader(_ObjectFile(self, key, self.size(path)), 1)

    def span(self, key: str, start: int, stop: int) -> bytes:
        """Bytes start … stop of a file, all of it if `stop` is negative; kept as they are for the next time."""
        with self._lock:
            if (key, start) in self._kept and 0 <= stop <= start + len(self._kept[key, start]):
                self._kept.move_to_end((key, start))
                return self._kept[key, start]
        try:
            data = (
                self._storage.objects.read(key) if stop < 0 else self._storage.objects.read(key, start, stop)
            )
        except FileNotFoundError:
            self._failures.append(CorruptFile(self._missing(key)))
            raise self._failures[-1] from None
        except LakebedError as error:
            self._failures.append(error)
            raise
        with self._lock:
            self._held += len(data) - len(self._kept.pop((key, start), b""))
            self._kept[key, start] = data
            while self._held > _KEPT and len(self._kept) > 1:
                self._held -= len(self._kept.popitem(last=False)[1])
        if stop < 0:
            self._sizes[key] = len(data)
        return data


class _ObjectFile(io.RawIOBase):
    """One file, read through `ObjectFiles.span`."""

    def __init__(self, files: ObjectFiles, key: str, size: int) -> None:
        self._files = files
        self._key = key
        self._at = 0
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)
        if stop <= self._at:
            return 0
        start, end = self._span_of(self._at, stop)
        data = self._files.span(self._key, start, end)
        part = data[self._at - start : stop - start]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _span_of(self, start: int, stop: int) -> tuple[int, int]:
        """What to fetch for these bytes: all of a small file, the whole end of a large one, or some more than asked."""
        if self._size <= _WHOLE:
            return 0, self._size
        footer = self._size - _FOOTER
        if start >= footer:
            return footer, self._size
        return start, min(max(stop, start + _SPAN), self._size)
