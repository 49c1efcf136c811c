"""Whatever is written reads back the same through the lake, zarr-python, xarray and SQL."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from lakebed.lake import Lake, Unit, codec
from lakebed.lake.axis import publish
from lakebed.lake.errors import InputMismatch
from lakebed.lake.names import encode_name

DTYPES = ("float32", "float64", "int32", "int64", "uint8")
NAMES = ("a.weight", "step", "zarr.json", "a/b", ".hidden", "é", "x" * 300, "%41", "c")


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.lists(st.integers(0, 10**7), min_size=1, max_size=24, unique=True))
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(steps) - 1)), max_size=3)) | {len(steps)})
    starts = [0, *cuts[:-1]]
    return {
        "units": [steps[start:stop] for start, stop in zip(starts, cuts, strict=True) if stop > start],
        "shape": tuple(draw(st.lists(st.integers(0, 5), max_size=3))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "block_rows": draw(st.sampled_from([1, 2, 8])),
        "chunk_bytes": draw(st.sampled_from([16, 100, 4 << 20])),
        "name": draw(st.sampled_from(NAMES)),
        "seed": draw(st.integers(0, 999)),
    }


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    if dtype.startswith("float"):
        array = rng.standard_normal(shape).astype(dtype)
        array[rng.random(shape) < 0.1] = np.nan
        return array
    return rng.integers(0, 200, shape).astype(dtype)


@settings(max_examples=25, deadline=None)
@given(contents())
def test_what_is_written_reads_back_everywhere(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(case["seed"])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_CHUNK_BYTES", case["chunk_bytes"])
        with Lake.create(f"{folder}/x.lake") as lake:
            truth: dict[int, np.ndarray[Any, Any]] = {}
            for number, steps in enumerate(case["units"]):
                array = values(rng, (len(steps), *case["shape"]), case["dtype"])
                truth.update(zip(steps, array, strict=True))
                write_in_parts(lake, f"unit-{number}", steps, array, case)
            lake.tensor("gradients", case["name"], "ref")
            publish(lake)
            read_back(lake, case["name"], truth)
            if np.prod(case["shape"], dtype=int):
                read_with_zarr(Path(folder) / "x.lake", case["name"], truth)
            read_with_sql(lake, case["name"], truth)


def write_in_parts(
    lake: Lake, unit: str, steps: list[int], array: np.ndarray[Any, Any], case: dict[str, Any]
) -> None:
    with lake.unit(Unit("trace", "ref", unit, tuple(steps))) as writer:
        block = writer.tensor_rows("gradients", steps, case["block_rows"])
        rows = block.layout(case["name"], case["shape"], case["dtype"]).chunk_rows
        for at in range(0, len(steps), rows):
            block.write(case["name"], array[at : at + rows], at)


def read_back(lake: Lake, name: str, truth: dict[int, np.ndarray[Any, Any]]) -> None:
    tensor = lake.tensor("gradients", name, "ref")
    assert tensor.steps.tolist() == sorted(truth)
    np.testing.assert_array_equal(tensor.read(), np.stack([truth[step] for step in sorted(truth)]))
    shuffled = list(truth)
    found = tensor.read(shuffled)
    assert found.dtype == truth[shuffled[0]].dtype
    np.testing.assert_array_equal(found, np.stack(list(truth.values())))
    low, high = sorted(truth)[0], sorted(truth)[len(truth) // 2]
    np.testing.assert_array_equal(
        tensor.read(slice(low, high)), np.stack([truth[step] for step in sorted(truth) if step <= high])
    )


def read_with_zarr(root: Path, name: str, truth: dict[int, np.ndarray[Any, Any]]) -> None:
    folder, label = root / "tensors/ref/gradients", encode_name(name)
    array = zarr.open_array(folder / label, mode="r")
    steps = zarr.open_array(folder / "step", mode="r")[:]
    assert sorted(steps[steps >= 0].tolist()) == sorted(truth)
    assert len(np.unique(steps)) == len(steps)
    for row, step in enumerate(steps.tolist()):
        if step >= 0:
            np.testing.assert_array_equal(array[row], truth[step])
    assert array.attrs["name"] == name
    with xarray.open_zarr(folder, consolidated=False, chunks=None) as dataset:
        wanted = sorted(truth)
        found = dataset[label].sel(step=wanted)
        assert found.dims[0] == "step"
        np.testing.assert_array_equal(found.values, np.stack([truth[step] for step in wanted]))


def read_with_sql(lake: Lake, name: str, truth: dict[int, np.ndarray[Any, Any]]) -> None:
    rows = lake.session.execute(
        "SELECT step, row, values FROM gradients WHERE parameter = $name ORDER BY step, row", {"name": name}
    ).fetchall()
    expected = []
    for step in sorted(truth):
        cells = truth[step].astype(np.float32)
        matrix = (
            cells.reshape(-1, cells.shape[-1]) if cells.ndim > 1 and cells.shape[-1] else cells.reshape(1, -1)
        )
        if cells.ndim > 1 and not cells.shape[-1]:
            matrix = np.empty((int(np.prod(cells.shape[:-1])), 0), np.float32)
        expected += [(step, row, list_of.tolist()) for row, list_of in enumerate(matrix)]
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    for found, wanted in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(found[2], wanted[2])


def test_a_chunk_is_what_zarr_python_writes(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for shape, dtype in (((4, 5), "float32"), ((7,), "int64"), ((2, 3, 4), "float64")):
        array = rng.integers(0, 9, shape).astype(dtype)
        layout = codec.Layout(shape[1:], np.dtype(dtype), shape[0], shape[1:])
        metadata = codec.array_metadata(layout, shape[0], [f"d{axis}" for axis in range(len(shape))], {}, 0)
        folder = tmp_path / f"{dtype}.zarr"
        folder.mkdir()
        (folder / "zarr.json").write_bytes(metadata)
        zarr.open_array(folder, mode="r+")[:] = array
        chunk = "/".join(["c", *("0" for _ in shape)])
        theirs = (folder / chunk).read_bytes()
        np.testing.assert_array_equal(codec.decode(theirs, shape, np.dtype(dtype), chunk), array)
        (folder / chunk).write_bytes(codec.encode(array))
        np.testing.assert_array_equal(zarr.open_array(folder, mode="r")[:], array)


def test_a_chunk_put_together_in_place_is_the_encoded_one() -> None:
    rng = np.random.default_rng(1)
    for shape, dtype in (((), "float32"), ((3, 5), "float32"), ((400, 128), "float64"), ((9, 2), "int32")):
        array = rng.standard_normal(shape).astype(dtype)
        found = bytes(
            codec.scratch.stored(shape, array.dtype, lambda out, array=array: np.copyto(out, array))
        )
        assert found == codec.encode(array, compress=False)
        np.testing.assert_array_equal(codec.decode(found, shape, array.dtype, "c"), array)


@pytest.mark.parametrize(("shape", "block_rows"), [((12, 3), 1), ((3000, 3), 1), ((12, 3), 4), ((0, 3), 1)])
def test_a_row_that_is_filled_reads_back(lake: Lake, monkeypatch, shape, block_rows) -> None:
    monkeypatch.setattr(codec, "_CHUNK_BYTES", 4096)
    rows = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    for step, row in enumerate(rows):
        with lake.unit(Unit("trace", "ref", f"u{step}", (step,))) as writer:
            block = writer.tensor_rows("gradients", [step], block_rows)
            block.fill("w", shape, lambda out, row=row: np.copyto(out, row), ["row", "cell"])
    found = lake.tensor("gradients", "w")
    for step, row in enumerate(rows):
        np.testing.assert_array_equal(found.read([step])[0], row)


@pytest.mark.parametrize(
    ("row_shape", "block_rows"), [((), 8), ((3,), 4), ((50257, 768), 64), ((128, 128), 1)]
)
def test_chunks_divide_blocks_and_stay_near_their_size(row_shape, block_rows) -> None:
    layout = codec.choose_layout(row_shape, np.float32, block_rows)
    assert block_rows % layout.chunk_rows == 0
    cells = layout.chunk_rows * int(np.prod(layout.chunk_cells, dtype=int))
    assert cells * 4 <= 16 << 20
    covered = np.zeros(row_shape, int)
    for _, part in layout.keys(0):
        covered[part] += 1
    assert (covered == 1).all()


def test_rows_not_at_a_chunk_start_are_refused(lake: Lake) -> None:
    with pytest.raises(ValueError, match="row 3 is not the start of a chunk of 8 rows"):
        with lake.unit(Unit("trace", "ref", "u", (1, 2))) as writer:
            writer.tensor_rows("gradients", [1, 2], 8).write("w", np.zeros((1, 3), np.float32), 3)
    assert lake.runs() == []


def test_another_shape_or_type_of_the_same_array_is_refused(lake: Lake, write_unit) -> None:

    write_unit(lake, [1], {"w": np.zeros((1, 3), np.float32)})
    for array in (np.zeros((1, 4), np.float32), np.zeros((1, 3), np.float64)):
        with pytest.raises(InputMismatch, match=r"gradients 'w' of run 'ref' has rows of shape \(3,\)"):
            write_unit(lake, [2], {"w": array})
    assert lake.tensor("gradients", "w").steps.tolist() == [1]
