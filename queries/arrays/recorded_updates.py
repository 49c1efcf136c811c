"""Recorded updates as arrays: slices of parameters, what the optimizer was set to, and the tensors themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .adam_fields import Hyperparameters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...lake import Lake

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

# The factors of a head's products, xᵀ W_Qᵀ W_K x and xᵀ W_Vᵀ W_Oᵀ.
PRODUCTS: dict[str, tuple[str, ...]] = {"W_QK": ("q_proj", "k_proj"), "W_OV": ("v_proj", "out_proj")}
_PRODUCT_OF = {factors: product for product, factors in PRODUCTS.items()}
_QUANTITIES = {
    "weight": ("weights", 0),
    "target": ("weights", 1),
    "gradient": ("gradients", 1),
    "exp_avg": ("exp_avg", 0),
    "exp_avg_sq": ("exp_avg_sq", 0),
}


@dataclass(frozen=True)
class Part:
    """Slices of one projection, of the same shape: of which parameter, and which of its rows and columns.

    `parameters` are the p different ones, all of `shape`; `place` Int[h] says whose each slice is, `rows` Int[h, r] and
    `columns` Int[h, c] where in it. `transposed`: stored input by output, as GPT-2's Conv1D is. `as_columns`: the factor of
    the product is the matrix's transpose (W_O). `targets` Int[h] numbers the slices in the report; -1 is not asked for.
    """

    parameters: tuple[str, ...]
    shape: tuple[int, int]
    place: Ints
    rows: Ints
    columns: Ints
    transposed: bool
    as_columns: bool
    targets: Ints


@dataclass(frozen=True)
class Family:
    """One projection, or the two factors of a head product with slices in one order; `targets` Int[h] are the products'."""

    parts: tuple[Part, ...]
    targets: Ints


@dataclass(frozen=True)
class Updates:
    """The source steps, Int[t] ascending, and how each parameter was updated there: Float64[t]."""

    sources: Ints
    hyperparameters: Mapping[str, Hyperparameters]

    def settings(self, part: Part, at: Ints, members: Ints) -> Hyperparameters:
        """Of n updates: those at places Int[n] of the sources, of the slices `members` Int[n] of a part."""
        owners = [self.hyperparameters[name] for name in part.parameters]
        return Hyperparameters.stacked(owners).take((part.place[members], at))


def families(slices: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> list[Family]:
    """What to read for targets by name -> number in the report. Slices of one shape are one family.

    `slices` are rows of `target`, `projection`, `layer`, `head`, `parameter`, `shape`, and the ends of rows and columns.
    """
    across = {row["layer"]: _is_transposed(row) for row in slices if row["projection"] == "q_proj"}
    units: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in slices:
        units.setdefault((row["layer"], row["head"]), {})[row["projection"]] = row
    groups: dict[tuple[Any, ...], list[dict[str, Mapping[str, Any]]]] = {}
    for (layer, head), held in units.items():
        label = f"L{layer}MLP" if head is None else f"L{layer}H{head}"
        together = [of for name, of in PRODUCTS.items() if f"{label}.{name}" in numbers]
        alone = [(name,) for name in held if not any(name in of for of in together)]
        for factors in (*together, *alone):
            rows = {name: {**held[name], "number": numbers.get(f"{label}.{name}", -1)} for name in factors}
            number = numbers.get(f"{label}.{_PRODUCT_OF.get(factors)}", -1)
            if number < 0 and all(row["number"] < 0 for row in rows.values()):
                continue
            # What differs in shape is no batch.
            shapes = tuple((name, tuple(row["shape"]), _size(row)) for name, row in rows.items())
            groups.setdefault((across.get(layer, False), shapes), []).append({**rows, "": {"number": number}})
    return [
        Family(
            tuple(_part(name, [rows[name] for rows in of], transposed) for name, *_ in shapes),
            np.array([rows[""]["number"] for rows in of]),
        )
        for (transposed, shapes), of in groups.items()
    ]


def _is_transposed(row: Mapping[str, Any]) -> bool:
    """Whether a head's part of W_Q is a range of columns: then weights are stored input by output."""
    return bool(row["column_stop"] - row["column_start"] < row["shape"][1])


def _size(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["row_stop"] - row["row_start"], row["column_stop"] - row["column_start"]


def _part(name: str, rows: Sequence[Mapping[str, Any]], transposed: bool) -> Part:
    parameters = tuple(dict.fromkeys(row["parameter"] for row in rows))
    height, width = _size(rows[0])
    starts = np.array([[row["row_start"], row["column_start"]] for row in rows])
    return Part(
        parameters,
        tuple(rows[0]["shape"]),
        np.array([parameters.index(row["parameter"]) for row in rows]),
        starts[:, :1] + np.arange(height),
        starts[:, 1:] + np.arange(width),
        transposed,
        name == "out_proj",
        np.array([row["number"] for row in rows]),
    )


def updates(
    sources: Iterable[int],
    recorded: Iterable[Mapping[str, Any]],
    counters: Iterable[Mapping[str, Any]],
    group_of: Mapping[str, int],
) -> Updates:
    """How the parameters of `group_of`, by name, were updated at the source steps.

    `recorded` rows hold `step`, `clip_coefficient` (None where no single factor was applied) and `optimizer_groups`, JSON,
    of the step an interval leads to; `counters` rows `step`, `parameter`, `optimizer_step` after it and `has_gradient`.
    """
    steps = np.array(list(sources), np.int64)
    rows = {row["step"]: row for row in recorded}
    texts = {row["optimizer_groups"] for row in rows.values()}
    groups = {text: json.loads(text) for text in texts}
    counts = {(row["step"], row["parameter"]): row for row in counters}
    found = {}
    for parameter, group in group_of.items():
        each = []
        for step in (steps + 1).tolist():
            row, count = rows[step], counts[step, parameter]
            of = groups[row["optimizer_groups"]][group]
            clip = 1.0 if row["clip_coefficient"] is None else row["clip_coefficient"]
            settings = [of[name] for name in Hyperparameters.OF_GROUP]
            each.append([*settings, clip, count["optimizer_step"], count["has_gradient"]])
        found[parameter] = Hyperparameters(*np.array(each, np.float64).T)
    return Updates(steps, found)


def read_part(lake: Lake, run: str, part: Part, sources: Ints) -> dict[str, NDArray[Any]]:
    """Float[p, t, R, C] as stored: `weight`, `exp_avg`, `exp_avg_sq` at t, `target` and `gradient` of the update to t + 1.

    Zero where nothing is stored: moments before the first update, and gradients of a frozen parameter.
    """
    found: dict[str, NDArray[Any]] = {}
    for name, (quantity, later) in _QUANTITIES.items():
        steps, names = sources + later, set(lake.axes.names(run, quantity))
        stacked: NDArray[Any] = np.zeros((len(part.parameters), len(steps), *part.shape), np.float32)
        for row, parameter in enumerate(part.parameters):
            if parameter not in names:
                continue
            tensor = lake.tensor(quantity, parameter, run)
            if stacked.dtype != tensor.dtype:
                stacked = stacked.astype(np.promote_types(stacked.dtype, tensor.dtype))
            held = np.flatnonzero(np.isin(steps, tensor.steps))
            if len(held):
                stacked[row, held] = tensor.read(steps[held])
        found[name] = stacked
    return found


def cut_slices(stored: NDArray[Any], part: Part, within: Ints, members: Ints) -> Floats:
    """Float64[n, r, c]: the slices `members` Int[n] of what `read_part` read, at the updates `within` it, Int[n]."""
    rows, columns = part.rows[members], part.columns[members]
    owner, at = part.place[members][:, None], within[:, None]
    if rows.shape[1] < part.shape[0]:
        cut = stored[owner, at, rows]
        if columns.shape[1] < part.shape[1]:
            cut = np.take_along_axis(cut, columns[:, None, :], axis=2)
    else:
        cut = stored.swapaxes(2, 3)[owner, at, columns].mT
    widened: Floats = (cut.mT if part.transposed else cut).astype(np.float64)
    return widened


__all__ = ["PRODUCTS", "Family", "Part", "Updates", "cut_slices", "families", "read_part", "updates"]
