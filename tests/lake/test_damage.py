"""Truncated and bit-flipped files: a reader refuses with one clear line, verify names the path, its unit and the remedy."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.lake import Lake, LakebedError
from lakebed.lake.axis import publish
from lakebed.lake.codec import encode
from lakebed.lake.errors import CorruptFile, NewerFormat, QueryError
from lakebed.lake.receipts import Receipt
from lakebed.lake.verify import verify

CHUNK = "tensors/ref/gradients/a.w/c/1/0/0"
ARRAY = "tensors/ref/gradients/a.w/zarr.json"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def flip_in_page(path: Path) -> None:
    """Flips a bit of a Parquet file where values lie; elsewhere a flip may be without any effect."""
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size - 2] ^= 4
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


DAMAGE = {"truncated": truncate, "flipped": flip, "removed": remove}


def reopened(lake: Lake) -> Lake:
    return Lake.open(lake.uri)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_chunk(filled: Lake, kind: str) -> None:
    DAMAGE[kind](Path(filled.uri, CHUNK))
    with reopened(filled) as lake:
        # What lies elsewhere is still read.
        assert len(lake.tensor("gradients", "a.w", "ref").read(slice(0, 7))) == 8
        for read in (
            lambda: lake.tensor("gradients", "a.w", "ref").read(9),
            lambda: lake.session.execute("SELECT sum(values[1]) FROM gradients").fetchall(),
            lambda: lake.table("gradients").collect(),
        ):
            with pytest.raises(CorruptFile, match=f"^{CHUNK} is (damaged|missing).*lakebed verify") as caught:
                read()
            one_line(caught.value)
        (found,) = verify(lake).damaged
    assert (found.path, found.run, found.unit, found.dataset) == (CHUNK, "ref", "trace-00000008", "trace")
    wording = {"truncated": "its receipt says", "flipped": "checksum", "removed": "missing"}
    assert wording[kind] in found.reason
    assert "recorded again under another run name" in found.remedy


def test_a_chunk_in_another_ones_place(filled: Lake) -> None:
    """Each is whole and they are of one length; only the receipts tell that they were swapped."""
    root = Path(filled.uri)
    chunks = sorted(root.glob("tensors/ref/gradients/*/c/*/**/*"))
    by_size: dict[int, list[Path]] = {}
    for path in chunks:
        if path.is_file():
            by_size.setdefault(path.stat().st_size, []).append(path)
    one, other, *_ = next(paths for paths in by_size.values() if len(paths) > 1)
    left, right = one.read_bytes(), other.read_bytes()
    one.write_bytes(right)
    other.write_bytes(left)
    found = {damage.path: damage.reason for damage in verify(filled).damaged}
    assert found == dict.fromkeys(
        (path.relative_to(root).as_posix() for path in (one, other)), "its checksum is not the receipt's"
    )


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_table_file(filled: Lake, kind: str) -> None:
    path = next(Path(filled.uri, "tables/training_steps/run=ref").glob("trace-00000016-*.parquet"))
    DAMAGE[kind](path)
    with reopened(filled) as lake:
        for read in (
            lambda: lake.sql("SELECT * FROM training_steps").fetchall(),
            lambda: lake.table("training_steps").collect(),
        ):
            with pytest.raises(
                CorruptFile, match=r"trace-00000016-\w+\.parquet is (damaged|missing)"
            ) as caught:
                read()
            one_line(caught.value)
        (found,) = verify(lake).damaged
        assert found.path == path.relative_to(lake.uri).as_posix()
        assert found.unit == "trace-00000016"


def test_a_damaged_unit_that_can_be_made_again_says_how(lake: Lake) -> None:
    from lakebed.lake import Unit

    with lake.unit(Unit("svd", "ref", "svd-1", (1,))) as writer:
        writer.rows("singular_values", [{"step": 1, "matrix": "W_Q", "layer": 0, "head": 0, "rank": 1}])
    flip(next(Path(lake.uri, "tables/singular_values/run=ref").iterdir()))
    (found,) = verify(lake).damaged
    assert found.remedy == (
        "remove tables/extractions/run=ref/svd-1.parquet, then run `lakebed extract svd --run ref` again: it makes what "
        "is missing"
    )


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_a_damaged_receipt(filled: Lake, kind: str) -> None:
    path = Path(filled.uri, "tables/extractions/run=ref/trace-00000008.parquet")
    truncate(path) if kind == "truncated" else flip_in_page(path)
    with reopened(filled) as lake:
        for read in (lake.runs, lambda: lake.sql("SELECT * FROM extractions")):
            with pytest.raises(
                CorruptFile, match=r"receipt .*trace-00000008\.parquet is damaged .*: remove it"
            ) as caught:
                read()
            one_line(caught.value)
        found = verify(lake).damaged
        assert [damage.path for damage in found] == [path.relative_to(lake.uri).as_posix()]
        assert (found[0].run, found[0].unit) == ("ref", "trace-00000008")
        # The remedy holds: without it the unit does not exist, and what it wrote is reported as nobody's.
        path.unlink()
        lake.refresh()
        assert 8 not in lake.tensor("gradients", "b", "ref").steps
        result = verify(lake)
        assert result.ok
        assert result.unreferenced_files == 4


@settings(max_examples=150, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_receipt_is_believed(position: float, bit: int) -> None:
    receipt = Receipt(
        run="ref", unit="u", dataset="trace", spec="", parameters="{}", version=1, inputs='{"a":1}',
        content_hash="c" * 64, steps=tuple(range(40)), files=(), tensors=(), rows=3, bytes=0, seconds=0.5,
        created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    data = bytearray(receipt.to_parquet())
    data[int(position * len(data))] ^= 1 << bit
    try:
        assert Receipt.from_parquet("ref", bytes(data), "x") == receipt
    except CorruptFile as error:
        one_line(error)


def test_a_receipt_whose_footer_holds_no_row_is_read_from_its_columns(filled: Lake) -> None:
    """As all were that lakebed wrote before."""
    for receipt in filled.receipts.all():
        path = Path(filled.uri, receipt.key)
        table = pq.ParquetFile(path).read().replace_schema_metadata(None)
        pq.write_table(table, path, compression="zstd", write_page_checksum=True, write_statistics=False)
        assert Receipt.from_parquet(receipt.run, path.read_bytes(), receipt.key) == receipt
    assert verify(filled).ok
    flip_in_page(path)
    with reopened(filled) as lake, pytest.raises(CorruptFile, match="is damaged"):
        lake.runs()


def test_a_receipt_whose_columns_and_footer_differ_is_named(filled: Lake) -> None:
    receipt, other = filled.receipts.all("ref")[:2]
    path, sink = Path(filled.uri, receipt.key), io.BytesIO()
    table = pq.ParquetFile(path).read().replace_schema_metadata(None)
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        text = pq.ParquetFile(Path(filled.uri, other.key)).metadata.metadata[b"lakebed.receipt"]
        checksum = str(google_crc32c.value(sink.getvalue() + text))
        writer.add_key_value_metadata({"lakebed.receipt": text, "lakebed.crc32c": checksum})
    path.write_bytes(sink.getvalue())
    assert "the receipt's columns say something else than its footer" in [
        damage.reason for damage in verify(filled).damaged
    ]


def test_a_receipt_that_was_renamed_or_rewritten_is_named(filled: Lake) -> None:
    folder = Path(filled.uri, "tables/extractions/run=ref")
    shutil.copy(folder / "trace-00000008.parquet", folder / "copy.parquet")
    reasons = " ".join(damage.reason for damage in verify(filled).damaged)
    assert "the receipt is of unit 'trace-00000008': it was renamed or copied" in reasons
    assert "step 8 of run ref is held twice" in reasons
    assert "keys stand more than once" in reasons
    (folder / "copy.parquet").unlink()
    receipt = filled.receipts.get("ref", "trace-00000008")
    assert receipt is not None
    changed = Receipt(**{**vars(receipt), "inputs": '{"checkpoint":"another"}'})
    (folder / "trace-00000008.parquet").write_bytes(changed.to_parquet())
    (found,) = verify(filled).damaged
    assert "content hash" in found.reason


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": "x", "id": 1}', b'{"format": 1}', b"\xff\xfe"]
)
def test_a_damaged_marker(filled: Lake, content: bytes) -> None:
    Path(filled.uri, "lakebed.json").write_bytes(content)
    with pytest.raises(
        CorruptFile, match=r"lakebed\.json is damaged: it must hold JSON with format and id"
    ) as caught:
        Lake.open(filled.uri)
    one_line(caught.value)


def test_a_newer_format_is_refused(filled: Lake) -> None:
    marker = Path(filled.uri, "lakebed.json")
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 2}))
    with pytest.raises(
        NewerFormat, match=r"lake format 2; lakebed .* reads up to 1: install a newer lakebed"
    ):
        Lake.open(filled.uri)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


EDITS = {
    "not JSON": lambda path: truncate(path),
    "another type": lambda path: _edit(path, data_type="float64"),
    "another shape": lambda path: _edit(path, shape=[32, 9, 3]),
    "no shape": lambda path: _edit(path, shape="x"),
    "other chunks": lambda path: _edit(
        path, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [4, 4, 3]}}
    ),
    "no chunks": lambda path: _edit(
        path, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0, 4, 3]}}
    ),
    "other keys": lambda path: _edit(
        path, chunk_key_encoding={"name": "default", "configuration": {"separator": "."}}
    ),
    "other codecs": lambda path: _edit(
        path, codecs=[{"name": "bytes", "configuration": {"endian": "little"}}]
    ),
    "a group": lambda path: _edit(path, node_type="group"),
    "another name": lambda path: _edit(path, attributes={"name": "b"}),
    "no step axis": lambda path: _edit(path, dimension_names=["row", "step", "size_3"]),
    "too long": lambda path: _edit(path, shape=[9999, 4, 3]),
    "removed": remove,
}


@pytest.mark.parametrize("edit", EDITS)
def test_damaged_array_metadata(filled: Lake, edit: str) -> None:
    EDITS[edit](Path(filled.uri, ARRAY))
    with reopened(filled) as lake:
        found = [damage for damage in verify(lake).damaged if damage.path == ARRAY]
        assert found, "verify did not name it"
        assert all(damage.run == "ref" for damage in found)
        tensor = lake.tensor("gradients", "a.w", "ref")
        if edit in ("another name", "no step axis", "too long"):
            assert tensor.read(3).shape == (4, 3)  # what the lake itself reads does not depend on it
            return
        with pytest.raises(CorruptFile) as caught:
            tensor.read(3)
        one_line(caught.value)
        assert "tensors/ref/gradients/a.w" in str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_of_array_metadata_is_refused_or_without_effect(filled: Lake, seed: int) -> None:
    path = Path(filled.uri, ARRAY)
    whole, truth = path.read_bytes(), filled.tensor("gradients", "a.w", "ref").read()
    rng = np.random.default_rng(seed)
    for _ in range(25):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        with reopened(filled) as lake:
            try:
                np.testing.assert_array_equal(lake.tensor("gradients", "a.w", "ref").read(), truth)
            except LakebedError as error:
                one_line(error)


def test_damaged_claims_groups_and_coordinates(filled: Lake) -> None:
    publish(filled)
    assert verify(filled).ok
    root = Path(filled.uri)
    claim = max((root / "rows/ref/gradients").iterdir())
    claim.write_text("x")
    truncate(root / "tensors/ref/gradients/zarr.json")
    (root / "tensors/other/gradients/step/c/0").write_bytes(encode(np.arange(65536)[::-1].copy()))
    found = {damage.path: damage for damage in verify(filled).damaged}
    assert f"{claim.relative_to(root)} is damaged" in found["rows/ref/gradients"].reason
    assert "must hold a Zarr group" in found["tensors/ref/gradients/zarr.json"].reason
    coordinate = found["tensors/other/gradients/step/c/0"]
    assert "row 0 says step 65535, the receipts say step 0" in coordinate.reason
    publish(filled, "other")
    assert "tensors/other/gradients/step/c/0" not in {damage.path for damage in verify(filled).damaged}
    with pytest.raises(CorruptFile, match="is damaged: a claim is named after its first row"):
        publish(filled, "ref")


def test_an_error_while_rows_are_fetched_is_a_query_error(filled: Lake) -> None:
    with pytest.raises(QueryError, match=r"^Conversion Error: Could not convert string 'other'") as caught:
        filled.session.execute("SELECT run::INTEGER FROM training_steps").fetchall()
    one_line(caught.value)
