"""Bytes in and out of a lake, wherever it lies. Nothing outside this module knows a path from a URI.

Three promises the rest of the lake stands on: `write` is atomic (a reader sees the old bytes, the new bytes or
nothing), `create` succeeds for exactly one of many callers, and a missing key is `FileNotFoundError`.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np

from .errors import LakebedError, LakeNotFound, StorageFull, StorageRefused
from .object_store import CONNECTIONS, ObjectStore, Stat, open_store

_PIECE = 4 << 20
# Of an object: so much at a time.
_FETCH = 32 << 20
# Files that are written past the page cache.
_LARGE = 1 << 20
# Of Linux 6.14 and newer; Python has no name for it.
_RWF_DONTCACHE = 0x80
# Memory that begins at a multiple of this goes to disk without a copy.
PAGE = 4096
# Seconds per byte beyond which a disk is too slow to wait for: 500 MB/s.
_SLOW = 1 / 500e6
# What is meant for a URI, with a slash or two forgotten.
_SCHEME = re.compile(r"^(s3a?|gcs?|gs|abfss?|az|https?):(?!//)(.*)$")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Storage:
    """A folder on a file system that fsspec knows."""

    def __init__(self, uri: str | os.PathLike[str], **options: Any) -> None:
        if not os.fspath(uri):
            raise LakeNotFound("an empty path names no lake: give a folder or a URI")
        self.uri = os.fspath(uri).rstrip("/") or "/"
        self._direct = _DirectWrites()
        self._options = options
        # A plain path needs no fsspec, whose import takes longer than reading a small lake.
        self.local = _is_path(self.uri) and not options
        self.root = _absolute(self.uri) if self.local else self.objects.root
        self.local = self.local or _is_local(self.fs)

    @property
    def fs(self) -> Any:
        """The fsspec file system."""
        return self.objects.fs

    @cached_property
    def objects(self) -> ObjectStore:
        """The store of a lake that is no folder."""
        if (scheme := _SCHEME.match(self.uri)) and "://" not in self.uri:
            raise LakeNotFound(
                f"{self.uri} is neither a folder nor a URI: write {scheme[1]}://{scheme[2].strip('/') or 'BUCKET/NAME'}"
            )
        return open_store(self.uri, self._options)

    def path(self, key: str) -> str:
        """The path of `key` as DuckDB, Polars and pyarrow take it."""
        full = f"{self.root}/{key}" if key else self.root
        return full if self.local else str(self.fs.unstrip_protocol(full))

    def read(self, key: str) -> bytes:
        """All bytes of `key`."""
        if self.local:
            with open(f"{self.root}/{key}", "rb") as file:
                return file.read()
        return self.objects.read(key)

    def read_chunk(self, key: str) -> bytes | np.ndarray[Any, np.dtype[np.uint8]]:
        """All bytes of `key`; of a folder's, in memory that may be written, so that an array can be made of it."""
        if not self.local:
            return self.objects.read(key)
        with open(f"{self.root}/{key}", "rb", buffering=0) as file:
            data = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
            return data[: file.readinto(data.data)]

    def checksum(self, key: str, about: int) -> tuple[int, int, bytes]:
        """Length, CRC-32C and last four bytes of `key`, which should have `about` bytes, read in pieces."""
        length, checksum, end = 0, 0, b""
        for piece in self._pieces(key, about):
            length += len(piece)
            checksum = google_crc32c.extend(checksum, piece)
            end = (end + piece[-4:])[-4:]
        return length, checksum, end

    def _pieces(self, key: str, about: int) -> Iterator[bytes]:
        if self.local:
            with open(f"{self.root}/{key}", "rb", buffering=0) as file:
                while piece := file.read(_PIECE):
                    yield piece
            return
        if about <= _FETCH:
            yield self.objects.read(key)
            return
        size = self.objects.stat(key)[0]
        for start in range(0, size, _FETCH):
            yield self.objects.read(key, start, min(start + _FETCH, size))

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Puts `data` under `key`, replacing what was there, atomically."""
        if not self.local:
            self.objects.write(key, data)
            return
        temporary = self._write_temporary(key, data)
        try:
            os.replace(temporary, f"{self.root}/{key}")
        except OSError as error:
            os.unlink(temporary)
            raise self._refusal(key, error, len(data)) from error

    def write_soon(self, key: str, data: bytes | memoryview) -> Future[None] | None:
        """As `write`; in a store side by side with others, and then what tells how it went. Waits while there are many."""
        if self.local:
            self.write(key, data)
            return None
        return self._uploads.write(key, bytes(data))

    @cached_property
    def _uploads(self) -> _Uploads:
        return _Uploads(self.objects)

    def create(self, key: str, data: bytes) -> bool:
        """Puts `data` under `key` unless something is there; says whether this call did."""
        if not self.local:
            return self.objects.create(key, data)
        temporary = self._write_temporary(key, data)
        try:
            os.link(temporary, f"{self.root}/{key}")
        except FileExistsError:
            return False
        except OSError as error:
            raise self._refusal(key, error, len(data)) from error
        finally:
            os.unlink(temporary)
        return True

    def _write_temporary(self, key: str, data: bytes | memoryview) -> str:
        folder, name = os.path.split(f"{self.root}/{key}")
        temporary = f"{folder}/.{name[:60]}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            try:
                self._write_file(temporary, data)
            except FileNotFoundError:
                os.makedirs(folder, exist_ok=True)
                self._write_file(temporary, data)
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            raise self._refusal(key, error, len(data)) from error
        return temporary

    def _write_file(self, path: str, data: bytes | memoryview) -> None:
        with open(path, "wb", buffering=0) as file:
            view = memoryview(data)
            if len(view) >= _LARGE:
                written = self._direct.write(file.fileno(), view)
                view = view[file.seek(_write_uncached(file.fileno(), view, written)) :]
            while view:
                view = view[file.write(view) :]

    def _refusal(self, key: str, error: OSError, size: int) -> LakebedError:
        """What a failed write says to a person."""
        if error.errno in _FULL:
            return StorageFull(
                f"no space left while writing {key} ({size:,} bytes) to {self.uri}: free some space and run the same "
                "command again; everything finished so far is kept"
            )
        return StorageRefused(
            f"cannot write {key} in {self.uri}: {error.strerror or error}; check the path and its permissions"
        )

    def exists(self, key: str) -> bool:
        """Whether a file stands under `key`."""
        return bool(os.path.exists(f"{self.root}/{key}") if self.local else self.objects.exists(key))

    def size(self, key: str) -> int:
        """Bytes under `key`."""
        return int(os.path.getsize(f"{self.root}/{key}") if self.local else self.objects.stat(key)[0])

    def modified(self, key: str) -> float:
        """When `key` was written, in seconds since 1970, by the clock of the storage."""
        return os.path.getmtime(f"{self.root}/{key}") if self.local else self.objects.stat(key)[1]

    def names(self, key: str) -> list[str]:
        """Names of the entries directly below `key`, sorted, hidden ones left out; empty if there is no such folder."""
        if self.local:
            try:
                found = os.listdir(f"{self.root}/{key}")
            except (FileNotFoundError, NotADirectoryError):
                return []
        else:
            found = self.objects.names(key)
        return sorted(name for name in found if not name.startswith("."))

    def listing(self, key: str) -> Iterator[tuple[str, Stat]]:
        """(key, (bytes, when it was written)) of every file below `key`, hidden and temporary ones too."""
        if not self.local:
            yield from self.objects.listing(key)
            return
        for folder, _, files in os.walk(f"{self.root}/{key}" if key else self.root):
            for name in files:
                path = f"{folder.rstrip('/')}/{name}"
                # Gone since it was listed: renamed or removed by whoever is at work on it.
                with suppress(FileNotFoundError):
                    about = os.stat(path)
                    yield path[len(self.root) + 1 :], (about.st_size, about.st_mtime)

    def remove(self, key: str) -> None:
        """Removes one file; a missing one is no error."""
        if not self.local:
            self.objects.remove(key)
            return
        with suppress(FileNotFoundError):
            os.unlink(f"{self.root}/{key}")

    def remove_all(self, keys: Iterable[str]) -> Iterator[None]:
        """Removes files, in a store side by side; yields after each."""
        if self.local:
            for key in keys:
                self.remove(key)
                yield
            return
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            yield from pool.map(self.objects.remove, keys)


def _is_path(uri: str) -> bool:
    """Whether it can be nothing but a path: no protocol, no chain of file systems. Elsewhere fsspec reads drive letters."""
    return os.sep == "/" and ":" not in uri


def _absolute(path: str) -> str:
    """As fsspec reads a local path: `..` stays, since what is before it may be a link."""
    inside = "" if path == "." else os.path.expanduser(path).removeprefix("./")
    return os.path.join(os.getcwd(), inside).rstrip("/") or "/"


def _is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


class _Uploads:
    """Puts objects by some threads; no more wait in memory than are under way."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._pool = ThreadPoolExecutor(CONNECTIONS, "lakebed-upload")
        self._room = threading.BoundedSemaphore(2 * CONNECTIONS)

    def write(self, key: str, data: bytes) -> Future[None]:
        self._room.acquire()
        upload = self._pool.submit(self._objects.write, key, data)
        upload.add_done_callback(lambda _: self._room.release())
        return upload


class _DirectWrites:
    """Writes from memory straight to disk, while the disk keeps up: a third of writing a large file is its copy into the
    page cache. A slow disk is left to the system, which writes behind."""

    def __init__(self) -> None:
        self._pace = 0.0

    def write(self, file: int, view: memoryview) -> int:
        """Writes the whole pages from the start of a file, as far as the system lets it; how far.

        What went wrong here goes wrong again in the ordinary write that follows: so does memory that starts off a page.
        """
        whole, written = len(view) // PAGE * PAGE, 0
        if self._pace > _SLOW:
            return 0
        started = time.perf_counter()
        with suppress(OSError, AttributeError, ImportError):
            import fcntl

            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
            try:
                while written < whole:
                    written += os.pwrite(file, view[written:whole], written)
            finally:
                fcntl.fcntl(file, fcntl.F_SETFL, flags)
        if written:
            # A mean that forgets: one write may wait for something else.
            self._pace += ((time.perf_counter() - started) / written - self._pace) / 8
        return written


def _write_uncached(file: int, view: memoryview, written: int) -> int:
    """Writes on from `written` without leaving the bytes in the page cache, as far as the system lets it; how far.

    An extraction of many gigabytes would push out all that a reader of the lake has warm, and finding memory for every new
    file can cost several times the copy into it. What went wrong here goes wrong again in the ordinary write that follows.
    """
    with suppress(OSError, AttributeError):
        while written < len(view):
            written += os.pwritev(file, [view[written:]], written, _RWF_DONTCACHE)
    return written
