"""The closure fit: a response as a sum of features times coefficients, by plain least squares (definitions 4 §0.13)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report import ReportFailed

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# At most this much sum of squares about the mean is no variation: R² has no meaning.
NO_VARIATION = 1e-12
# Of columns brought to unit length: from about here on, coefficients trade off against each other (Belsley, Kuh, Welsch).
COLLINEAR = 30.0


class Unfittable(ReportFailed):
    """A fit without features or observations, of lists of unequal length, or of numbers that are not finite."""


class Underdetermined(Unfittable):
    """Fewer observations than parameters."""


@dataclass(frozen=True)
class ClosureFit:
    """ŷ = intercept + Σ_f coefficient_f · x_f, and how close it comes."""

    labels: tuple[str, ...]
    """The features, in alphabetical order."""
    fit_intercept: bool
    intercept: float
    """0 where none was fitted."""
    coefficients: NDArray[np.float64]
    """Float64[feature]"""
    means: NDArray[np.float64]
    """Float64[feature]: mean of each."""
    matrix_rank: int
    condition_number: float
    """Largest singular value of the columns, each brought to unit length, over the smallest; infinite without full rank."""
    actual: NDArray[np.float64]
    """Float64[observation]"""
    predicted: NDArray[np.float64]
    """Float64[observation]"""

    @property
    def residual(self) -> NDArray[np.float64]:
        """actual − predicted, Float64[observation]."""
        return self.actual - self.predicted

    @property
    def num_parameters(self) -> int:
        """Features, and the intercept if there is one."""
        return len(self.labels) + self.fit_intercept

    @property
    def rank_deficient(self) -> bool:
        """Whether other coefficients fit as well; these are the smallest."""
        return self.matrix_rank < self.num_parameters

    @property
    def sse(self) -> float:
        """Σ (actual − predicted)²"""
        return float(np.square(self.residual).sum())

    @property
    def sst(self) -> float:
        """Σ (actual − mean)², also where there is no intercept."""
        return float(np.square(self.actual - self.actual.mean()).sum())

    @property
    def r_squared(self) -> float | None:
        """1 − sse / sst: without an intercept it may be negative. None where the response does not vary."""
        return None if self.sst <= NO_VARIATION else 1.0 - self.sse / self.sst

    @property
    def contributions(self) -> NDArray[np.float64]:
        """coefficient × mean, Float64[feature]: with the intercept they add up to the mean prediction."""
        contributions: NDArray[np.float64] = self.coefficients * self.means
        return contributions

    def summary(self) -> dict[str, Any]:
        """The contract's `fit`."""
        return {
            "route_labels": list(self.labels),
            "fit_intercept": self.fit_intercept,
            "intercept": self.intercept,
            "coefficients": dict(zip(self.labels, self.coefficients.tolist(), strict=True)),
            "num_observations": len(self.actual),
            "num_parameters": self.num_parameters,
            "matrix_rank": self.matrix_rank,
            "rank_deficient": self.rank_deficient,
            "condition_number": self.condition_number,
            "sse": self.sse,
            "sst": self.sst,
            "r_squared": self.r_squared,
            "mean_actual_margin_delta": float(self.actual.mean()),
            "mean_predicted_margin_delta": float(self.predicted.mean()),
            "mean_residual": float(self.residual.mean()),
            "mean_abs_residual": float(np.abs(self.residual).mean()),
        }


def fit_closure(
    features: Mapping[str, ArrayLike],
    actual: ArrayLike,
    *,
    fit_intercept: bool = False,
    what: str = "the fit",
) -> ClosureFit:
    """Least squares of `actual`, Float[observation], on features by label, Float[observation] each.

    No ridge, weights or scaling; a ones column stands first with `fit_intercept`. Of several answers that are as good, the
    one of minimum norm. Raises Underdetermined and Unfittable; `what` says there what was to be fitted.
    """
    labels = tuple(sorted(features))
    response = np.asarray(actual, np.float64)
    if not labels:
        raise Unfittable(f"{what} has no features to fit with")
    columns = [np.asarray(features[label], np.float64) for label in labels]
    for label, column in zip(labels, columns, strict=True):
        if column.shape != response.shape or column.ndim != 1:
            raise Unfittable(f"{what} has {column.size} values of {label!r} for {response.size} observations")
        _require_finite(column, f"of {label!r}", what)
    _require_finite(response, "of the response", what)
    if not len(response):
        raise Unfittable(f"{what} has no observations")
    design = np.stack([*([np.ones_like(response)] if fit_intercept else []), *columns], 1)
    if len(design) < design.shape[1]:
        raise Underdetermined(
            f"{what} is underdetermined: {len(design)} observations for {design.shape[1]} parameters"
            + (", the intercept among them" if fit_intercept else "")
            + "; take fewer features, more pairs or more steps"
        )
    found, _, rank, _ = np.linalg.lstsq(design, response, rcond=None)
    solved = found.astype(np.float64, copy=False)
    return ClosureFit(
        labels=labels,
        fit_intercept=fit_intercept,
        intercept=float(solved[0]) if fit_intercept else 0.0,
        coefficients=solved[int(fit_intercept) :],
        means=np.array([column.mean() for column in columns]),
        matrix_rank=int(rank),
        condition_number=_condition(design, int(rank)),
        actual=response,
        predicted=design @ solved,
    )


def _condition(design: NDArray[np.float64], rank: int) -> float:
    lengths = np.linalg.norm(design, axis=0)
    if rank < design.shape[1] or not lengths.all():
        return float("inf")
    values = np.linalg.svd(design / lengths, compute_uv=False)
    return float(values[0] / values[-1]) if values[-1] > 0 else float("inf")


def _require_finite(values: NDArray[np.float64], of: str, what: str) -> None:
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise Unfittable(f"{what} has {wrong} values {of} that are NaN, infinite or missing")


__all__ = ["COLLINEAR", "NO_VARIATION", "ClosureFit", "Underdetermined", "Unfittable", "fit_closure"]
