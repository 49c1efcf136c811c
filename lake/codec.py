"""Tensors as Zarr v3 chunks: how the lake lays arrays out, and a fast path for their bytes.

Arrays are plain Zarr v3 (bytes, blosc lz4 with bit shuffle, crc32c), created and documented through zarr-python, and
any Zarr reader opens them. Chunks are encoded and decoded here with the same numcodecs calls zarr makes, for two
reasons: the receipt needs the checksum of the very bytes that were written, and zarr's per-chunk scheduling costs a
millisecond where the work costs a tenth (tests/benchmarks/bench_tensors.py holds the comparison). A test reads every
layout back through zarr, and the other way round.
"""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from .errors import CorruptFile
from .storage import PAGE

if TYPE_CHECKING:
    from numcodecs.blosc import Blosc

_HEADER_BYTES = 16
# The CRC-32C of any bytes followed by their own CRC-32C.
WHOLE = 0x48674BC7
# A chunk near this size costs little to open and little to overread.
_CHUNK_BYTES = 4 << 20


@cache
def _blosc(level: int) -> Blosc:
    """lz4 of shuffled bits; level 0 leaves the bytes as they are.

    On recorded gradients, weights and moments as small as zstd, and two to three times faster both ways.
    """
    # Here, since it imports every codec there is: a tenth of what a report of tables alone imports.
    from numcodecs.blosc import BITSHUFFLE, Blosc

    return Blosc(cname="lz4", clevel=level, shuffle=BITSHUFFLE)


@dataclass(frozen=True)
class Layout:
    """Shape of one row (one step) of an array, and how rows and cells are cut into chunks."""

    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    chunk_cells: tuple[int, ...]

    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis of a row."""
        return tuple(
            math.ceil(size / chunk) for size, chunk in zip(self.row_shape, self.chunk_cells, strict=True)
        )

    def keys(self, row_chunk: int) -> list[tuple[str, tuple[slice, ...]]]:
        """Zarr keys of one block of rows, with the cells each covers."""
        found = []
        for index in np.ndindex(*self.grid()):
            cells = tuple(
                slice(i * chunk, min((i + 1) * chunk, size))
                for i, chunk, size in zip(index, self.chunk_cells, self.row_shape, strict=True)
            )
            found.append(("/".join(["c", str(row_chunk), *map(str, index)]), cells))
        return found


def choose_layout(row_shape: Sequence[int], dtype: Any, block_rows: int) -> Layout:
    """Chunks of about 4 MiB whose rows divide `block_rows`; a row larger than that is cut along its first axis.

    `block_rows` must be a power of two, so that every chunk lies in one unit's block.
    """
    shape, kind = tuple(int(size) for size in row_shape), np.dtype(dtype)
    row_bytes = max(1, math.prod(shape)) * kind.itemsize
    rows = block_rows
    while rows > 1 and rows * row_bytes > _CHUNK_BYTES:
        rows //= 2
    cells = tuple(max(1, size) for size in shape)
    if rows == 1 and row_bytes > 4 * _CHUNK_BYTES and cells:
        cells = (max(1, math.ceil(cells[0] * _CHUNK_BYTES / row_bytes)), *cells[1:])
    return Layout(shape, kind, rows, cells)


def fill_value(dtype: Any) -> float | int:
    """What a row that holds no step reads as: NaN, or 0 for integers."""
    return float("nan") if np.issubdtype(dtype, np.floating) else 0


def encode(array: np.ndarray[Any, Any], compress: bool = True) -> bytes:
    """Bytes of one chunk, exactly as zarr's codec chain would write them.

    Without `compress` the same container holds the bytes as they are, which any reader of the chain takes.
    """
    contiguous = np.ascontiguousarray(array)
    data = bytes(_blosc(5 if compress else 0).encode(contiguous.reshape(-1)))
    return data + struct.pack("<I", google_crc32c.value(data))


@cache
def _stored_header(size: int, itemsize: int) -> bytes:
    """What blosc puts before that many bytes that it leaves as they are."""
    return bytes(_blosc(0).encode(np.zeros(size // itemsize, f"V{itemsize}")))[:_HEADER_BYTES]


class _Scratch(threading.local):
    """Memory in which a thread puts one chunk after the other together: new memory costs more than the copy into it, and of
    memory that starts with a page `Storage` makes no copy."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def stored(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], fill: Callable[[np.ndarray[Any, Any]], None]
    ) -> memoryview:
        """Bytes of a chunk whose cells `fill` writes, as `encode` without `compress` makes them; until the next call."""
        size = math.prod(shape) * dtype.itemsize
        whole = _HEADER_BYTES + size + 4
        if len(self._memory) < whole:
            memory = np.empty(whole + PAGE, np.uint8)
            self._memory = memory[-memory.ctypes.data % PAGE :][:whole]
        chunk = self._memory[:whole]
        chunk[:_HEADER_BYTES] = np.frombuffer(_stored_header(size, dtype.itemsize), np.uint8)
        fill(chunk[_HEADER_BYTES:-4].view(dtype).reshape(shape))
        chunk[-4:] = np.frombuffer(struct.pack("<I", google_crc32c.value(chunk[:-4])), np.uint8)
        return chunk.data


scratch = _Scratch()


def chunk_checksum(data: bytes | memoryview) -> int:
    """The CRC-32C a chunk ends in. That of the chunk whole is the same for every chunk, and tells none from another."""
    return int.from_bytes(data[-4:], "little")


def decode(
    data: bytes | np.ndarray[Any, np.dtype[np.uint8]],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    name: str,
    out: np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """The chunk's cells, into `out` if given: a contiguous array of that shape and dtype.

    Without `out`, those of a chunk that blosc left as they are stay in `data` if that may be written. Raises CorruptFile
    naming `name` when the checksum or the size is wrong.
    """
    # A slice of bytes would be a copy, which takes almost as long as decoding.
    memory = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    body = memory[:-4]
    if len(memory) < 20 or google_crc32c.value(memory) != WHOLE:
        raise CorruptFile(
            f"{name} is damaged (checksum of its chunk does not match): run `lakebed verify` to list every damaged file"
        )
    if out is None:
        size = math.prod(shape) * dtype.itemsize
        if (
            memory.flags.writeable
            and len(body) == _HEADER_BYTES + size
            and body[:_HEADER_BYTES].tobytes() == _stored_header(size, dtype.itemsize)
        ):
            return body[_HEADER_BYTES:].view(dtype).reshape(shape)
        out = np.empty(shape, dtype)
    try:
        # Blosc's own header: decoded into a buffer of another size it would fill a part of it, or overrun.
        if struct.unpack_from("<I", body.data, 4)[0] != out.nbytes:
            raise ValueError("it holds another number of bytes than its shape asks for")
        _blosc(5).decode(body, out.reshape(-1))
    except (RuntimeError, ValueError) as error:
        raise CorruptFile(f"{name} cannot be decoded ({error}): run `lakebed verify`") from error
    return out


def array_metadata(
    layout: Layout, rows: int, dimension_names: Sequence[str], attributes: Mapping[str, Any], fill_value: Any
) -> bytes:
    """The `zarr.json` of an array, made by zarr-python itself."""
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.metadata.v3 import ArrayV3Metadata
    from zarr.dtype import parse_dtype

    metadata = ArrayV3Metadata(
        shape=(rows, *layout.row_shape),
        data_type=parse_dtype(layout.dtype, zarr_format=3),
        chunk_grid={
            "name": "regular",
            "configuration": {"chunk_shape": (layout.chunk_rows, *layout.chunk_cells)},
        },
        chunk_key_encoding={"name": "default", "configuration": {"separator": "/"}},
        fill_value=fill_value,
        codecs=(
            BytesCodec(),
            BloscCodec(
                typesize=layout.dtype.itemsize, cname="lz4", clevel=5, shuffle="bitshuffle", blocksize=0
            ),
            Crc32cCodec(),
        ),
        attributes=dict(attributes),
        dimension_names=tuple(dimension_names),
    )
    return metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a group."""
    return json.dumps(
        {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}, indent=2, sort_keys=True
    ).encode()


def with_rows(metadata: bytes, rows: int) -> bytes:
    """The same array metadata with another length of the step axis."""
    value = json.loads(metadata)
    value["shape"][0] = rows
    return json.dumps(value, indent=2).encode()


def layout_of(metadata: bytes, key: str) -> tuple[Layout, dict[str, Any]]:
    """Layout and attributes read back from an array's `zarr.json`."""
    try:
        value = json.loads(metadata)
        shape, chunks = value["shape"], value["chunk_grid"]["configuration"]["chunk_shape"]
        layout = Layout(tuple(shape[1:]), np.dtype(value["data_type"]), chunks[0], tuple(chunks[1:]))
        _require_format(value, layout)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CorruptFile(
            f"{key}/zarr.json is damaged ({error or type(error).__name__}): restore it from a copy of the lake; "
            "`lakebed verify` lists every damaged file"
        ) from error
    return layout, value.get("attributes", {})


def _require_format(value: Mapping[str, Any], layout: Layout) -> None:
    """Raises ValueError unless chunks are cut, named and encoded the one way this module reads."""
    if value["zarr_format"] != 3 or value["node_type"] != "array":
        raise ValueError("it is not a Zarr 3 array")
    sizes = (*value["shape"], layout.chunk_rows, *layout.chunk_cells)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError("a shape that is no list of sizes")
    if len(layout.chunk_cells) != len(layout.row_shape) or min(layout.chunk_rows, *layout.chunk_cells, 1) < 1:
        raise ValueError("its chunks do not fit its shape")
    keys = value["chunk_key_encoding"]
    if keys["name"] != "default" or keys["configuration"]["separator"] != "/":
        raise ValueError("its chunks are named another way")
    if value["chunk_grid"]["name"] != "regular":
        raise ValueError("its chunks are cut another way")
    order, compressor, _ = codecs = value["codecs"]
    if [codec["name"] for codec in codecs] != ["bytes", "blosc", "crc32c"]:
        raise ValueError("its chunks are encoded another way")
    settings = compressor["configuration"]
    if order.get("configuration", {}).get("endian", "little") != "little":
        raise ValueError("its bytes are in another order")
    if (settings["cname"], settings["shuffle"], settings["typesize"]) != (
        "lz4",
        "bitshuffle",
        layout.dtype.itemsize,
    ):
        raise ValueError("its chunks are compressed another way")
