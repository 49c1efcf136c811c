"""Closure fits of a report, as columns: long features to a design, and each fit to a row that SQL takes apart again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..output import plain
from ..report import ReportFailed
from .columns import as_columns
from .least_squares import ClosureFit, fit_closure

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


class IncompleteFeatures(ReportFailed):
    """An observation without one of the features, or with one twice."""


@dataclass(frozen=True)
class Design:
    """Features of all observations: `values` Float64[observation, feature], `labels` in alphabetical order."""

    labels: tuple[str, ...]
    values: NDArray[np.float64]

    def fit(
        self,
        actual: NDArray[np.float64],
        *,
        fit_intercept: bool,
        what: str,
        labels: Sequence[str] | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> ClosureFit:
        """`fit_closure` of `actual`, Float64[row], on some features of some observations; by default on all of all."""
        chosen = self.values if rows is None else self.values[rows]
        columns = {label: chosen[:, self.labels.index(label)] for label in labels or self.labels}
        return fit_closure(columns, actual, fit_intercept=fit_intercept, what=what)


def read_design(features: pa.Table, count: int, what: str) -> Design:
    """From columns (observation, label, value), of `count` observations from 0. Raises IncompleteFeatures."""
    texts = features["label"].to_pylist()
    labels = tuple(sorted(set(texts)))
    place = {label: at for at, label in enumerate(labels)}
    row = features["observation"].to_numpy().astype(np.int64)
    column = np.array([place[text] for text in texts], np.int64)
    held = np.zeros((count, len(labels)), np.int64)
    np.add.at(held, (row, column), 1)
    if (held != 1).any():
        at, label = (int(of[0]) for of in (held != 1).nonzero())
        raise IncompleteFeatures(
            f"{what}: observation {at} has {held[at, label]} values of {labels[label]!r}; in "
            f"{int((held != 1).any(1).sum())} of {count} observations something is missing or doubled"
        )
    values = np.empty((count, len(labels)))
    values[row, column] = features["value"].to_numpy()
    return Design(labels, values)


def fit_columns(
    fits: Iterable[tuple[Mapping[str, Any], ClosureFit, NDArray[np.int64] | None]],
) -> dict[str, Any]:
    """Columns with a row per fit: its key, its numbers as columns and as JSON (`fit`), and lists.

    By feature: labels, coefficients, means, contributions; by observation: observations (all, where None), predicted.
    """
    return as_columns(
        [
            {
                **key,
                **{
                    name: value for name, value in fit.summary().items() if not isinstance(value, list | dict)
                },
                "fit": json.dumps(plain(fit.summary()), sort_keys=True),
                "labels": list(fit.labels),
                "coefficients": fit.coefficients,
                "means": fit.means,
                "contributions": fit.contributions,
                "observations": np.arange(len(fit.actual)) if rows is None else rows,
                "predicted": fit.predicted,
            }
            for key, fit, rows in fits
        ]
    )


__all__ = ["Design", "IncompleteFeatures", "fit_columns", "read_design"]
