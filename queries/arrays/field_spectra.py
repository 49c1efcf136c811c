"""Spectra of the fields of recorded updates: computed and decomposed a few megabytes at a time, heads and layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...lake.imports import leave_pandas_alone
from ..report import ReportFailed
from .adam_fields import ACTUAL, UPDATE_FIELDS, Hyperparameters, multiples, update_fields
from .recorded_updates import Family, Updates, cut_slices, read_part
from .side_by_side import side_by_side
from .thin_svd import Spectra, first_order_factors, product_spectra, spectra

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...lake import Lake

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    # A matrix per update, Float64[n, rows, columns], or its two thin factors.
    Field = Floats | tuple[Floats, Floats]

_CELLS_READ = 16_000_000
_CELLS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Asked:
    """What is measured of a field: which ones, how many values and vectors are kept; `names` of targets are for errors."""

    fields: tuple[str, ...]
    top_k: int
    ranks: int
    names: Sequence[str]


@dataclass(frozen=True)
class Measured:
    """One field of n updates: its spectra, Frobenius norm, largest entry, and u₁ᵀ F v₁ along the update's top direction."""

    spectra: Spectra
    fro_norm: Floats
    max_abs: Floats
    along: Floats

    def scaled(self, factors: Floats) -> Measured:
        """Of the fields times Float64[n]."""
        size = np.abs(factors)
        return Measured(
            self.spectra.scaled(factors), self.fro_norm * size, self.max_abs * size, self.along * factors
        )


@dataclass(frozen=True)
class Batch:
    """Of which update and target each of n rows is: `steps` Int[n] they start from, `targets` Int[n]."""

    asked: Asked
    steps: Ints
    targets: Ints

    def require_finite(self, name: str, field: Floats) -> None:
        """Raises ReportFailed, naming the first update whose field Float64[n, rows, columns] is not."""
        bad = np.flatnonzero(~np.isfinite(field).all((1, 2)))
        if len(bad):
            step, target = self.steps[bad[0]], self.asked.names[self.targets[bad[0]]]
            raise ReportFailed(
                f"{name} of {target} holds NaN or infinite entries in the interval from step {step} to {step + 1}; leave "
                "that interval out with --steps, --start-step or --end-step"
            )


def field_spectra(
    lake: Lake, run: str, updates: Updates, families: Iterable[Family], asked: Asked
) -> Mapping[str, Any]:
    """Arrow columns, a row per update, target and field.

    `source_step`, `target` (its number), `field`; `fro_norm`, `max_abs`, `singular_value_count`, `singular_value_sum`,
    `singular_value_sq_sum` and `top3_sum` of the whole spectrum, the first `singular_values`, `left` and `right` vectors end
    to end, as long as `matrix_rows` and `matrix_columns`; `cosine` of the top direction uvᵀ with that of the actual update,
    and `share`, u₁ᵀ F v₁ / σ₁ with the latter's u₁, v₁ and σ₁; NaN where there is none.
    """
    jobs = (job for family in families for job in _jobs(lake, run, updates, family, asked))
    found = [rows for some in side_by_side(lambda job: job(), jobs) for rows in some]
    return _columns(found)


def _jobs(
    lake: Lake, run: str, updates: Updates, family: Family, asked: Asked
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Reads a block of updates, and cuts it into pieces that fit a cache."""
    first = family.parts[0]
    heads, cells = len(first.targets), len(family.parts) * first.rows.shape[1] * first.columns.shape[1]
    per_update = 5 * sum(len(part.parameters) * part.shape[0] * part.shape[1] for part in family.parts)
    block, piece = max(1, _CELLS_READ // per_update), max(1, _CELLS_AT_ONCE // cells)
    for start in range(0, len(updates.sources), block):
        places = np.arange(start, min(start + block, len(updates.sources)))
        read = [read_part(lake, run, part, updates.sources[places]) for part in family.parts]
        for begin in range(0, len(places) * heads, piece):
            items = np.arange(begin, min(begin + piece, len(places) * heads))
            within, members = items // heads, items % heads
            yield partial(_measure, updates, family, asked, read, places, within, members)


def _measure(
    updates: Updates,
    family: Family,
    asked: Asked,
    read: Sequence[Mapping[str, NDArray[Any]]],
    places: Ints,
    within: Ints,
    members: Ints,
) -> list[dict[str, Any]]:
    """Rows of n updates of one slice each, and of their products."""
    steps = updates.sources[places[within]]
    rows: list[dict[str, Any]] = []
    factors: list[dict[str, Floats]] = []
    settings: list[Hyperparameters] = []
    for part, stored in zip(family.parts, read, strict=True):
        of = updates.settings(part, places[within], members)
        fields = update_fields(
            of=of, **{name: cut_slices(array, part, within, members) for name, array in stored.items()}
        )
        targets = part.targets[members]
        chosen = np.flatnonzero(targets >= 0)
        if len(chosen):
            own = _chosen(fields, chosen)
            batch = Batch(asked, steps[chosen], targets[chosen])
            rows += _rows(_measured(own.__getitem__, multiples(of.take(chosen)), batch), batch)
        factors.append({name: field.mT for name, field in fields.items()} if part.as_columns else fields)
        settings.append(of)
    targets = family.targets[members]
    chosen = np.flatnonzero(targets >= 0)
    if len(chosen):
        first, second = (_chosen(fields, chosen) for fields in factors)

        def product(name: str) -> Field:
            if name == "weight":
                return first["weight"].mT, second["weight"]
            return first_order_factors(first["weight"], first[name], second["weight"], second[name])

        batch = Batch(asked, steps[chosen], targets[chosen])
        shared = multiples(*(of.take(chosen) for of in settings))
        rows += _rows(_measured(product, shared, batch), batch)
    return rows


def _chosen(fields: dict[str, Floats], chosen: Ints) -> dict[str, Floats]:
    """The updates Int[m] of n, without a copy where they are all."""
    if all(len(chosen) == len(field) for field in fields.values()):
        return fields
    return {name: field[chosen] for name, field in fields.items()}


def _measured(
    field_of: Callable[[str], Field], shared: Mapping[str, tuple[str, Floats]], batch: Batch
) -> dict[str, Measured]:
    """Every field asked for, and the actual update, whose top direction the others are held against."""
    found = {ACTUAL: _decompose(ACTUAL, field_of(ACTUAL), batch)}
    top = found[ACTUAL].spectra
    for name in batch.asked.fields:
        base = shared[name][0] if name in shared else name
        if base not in found:
            found[base] = _decompose(base, field_of(base), batch, (top.left[:, 0], top.right[:, 0]))
    for name, (base, scale) in shared.items():
        if name in batch.asked.fields:
            found[name] = found[base].scaled(scale)
    return found


def _decompose(
    name: str, field: Field, batch: Batch, direction: tuple[Floats, Floats] | None = None
) -> Measured:
    # A product is written out for its largest entry alone, which is in no factor.
    dense = field[0] @ field[1] if isinstance(field, tuple) else field
    batch.require_finite(name, dense)
    ranks = max(1, batch.asked.ranks)
    found = product_spectra(*field, ranks) if isinstance(field, tuple) else spectra(field, ranks)
    along = found.values[:, 0]
    if direction is not None:
        left, right = direction
        along = ((left[:, None, :] @ dense) @ right[:, :, None])[:, 0, 0]
    norm = np.sqrt(np.einsum("nij,nij->n", dense, dense))
    return Measured(found, norm, np.maximum(dense.max((1, 2)), -dense.min((1, 2))), along)


def _rows(measured: Mapping[str, Measured], batch: Batch) -> list[dict[str, Any]]:
    """Columns of n rows for every field."""
    top, asked, count = measured[ACTUAL].spectra, batch.asked, len(batch.steps)
    moved = np.where(top.values[:, 0] > 0, top.values[:, 0], np.nan)
    rows = []
    for name in asked.fields:
        of = measured[name]
        values, left, right = of.spectra.values, of.spectra.left, of.spectra.right
        cosine = (left[:, 0] * top.left[:, 0]).sum(-1) * (right[:, 0] * top.right[:, 0]).sum(-1)
        share = of.along / moved if name in UPDATE_FIELDS else np.full(count, np.nan)
        rows.append(
            {
                "source_step": batch.steps,
                "target": batch.targets,
                "field": name,
                "fro_norm": of.fro_norm,
                "max_abs": of.max_abs,
                "singular_value_count": np.full(count, values.shape[1]),
                "singular_value_sum": values.sum(-1),
                "singular_value_sq_sum": (values**2).sum(-1),
                "top3_sum": values[:, :3].sum(-1),
                "cosine": np.where((values[:, 0] > 0) & (moved > 0), np.clip(cosine, -1, 1), np.nan),
                "share": share,
                "matrix_rows": np.full(count, left.shape[-1]),
                "matrix_columns": np.full(count, right.shape[-1]),
                "singular_values": values[:, : asked.top_k],
                "left": left[:, : asked.ranks].reshape(count, -1).astype(np.float32),
                "right": right[:, : asked.ranks].reshape(count, -1).astype(np.float32),
            }
        )
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Blocks of rows as Arrow columns: Float64[n] or Int64[n] each, Float[n, k] as lists, a string for all n."""
    import pyarrow as pa

    leave_pandas_alone()
    columns: dict[str, Any] = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if isinstance(parts[0], str):
            columns[name] = pa.array([of for of, row in zip(parts, rows, strict=True) for _ in row["target"]])
        elif parts[0].ndim == 1:
            columns[name] = _plain(np.concatenate(parts))
        else:
            lengths = np.concatenate([np.full(len(part), part.shape[1]) for part in parts])
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            flat = _plain(np.concatenate([part.reshape(-1) for part in parts]))
            columns[name] = pa.LargeListArray.from_arrays(_plain(offsets), flat)
    return columns


def _plain(values: NDArray[Any]) -> Any:
    """From its memory: `pa.array` of a NumPy array would import numpy.ma."""
    import pyarrow as pa

    kinds = {"f8": pa.float64(), "f4": pa.float32(), "i8": pa.int64()}
    data = np.ascontiguousarray(values)
    return pa.Array.from_buffers(kinds[data.dtype.str[1:]], len(data), [None, pa.py_buffer(data)])


__all__ = ["Asked", "field_spectra"]
