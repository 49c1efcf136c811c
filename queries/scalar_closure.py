"""What reports share that fit changes of scalars: which pairs are fitted together, and a fit for each scalar and bucket
(definitions 4 §0.10, §0.13)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from .report import ReportFailed
from .scalar_pairs import BUCKETS, ScalarChangeReport, SwitchBucket

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from .arrays.closures import Design


class EmptyBucket(ReportFailed):
    """A switch bucket that was asked for and has no rows."""


class ScalarClosureReport(ScalarChangeReport):
    """Base of reports with one least-squares fit per scalar and switch bucket, over all intervals and pairs."""

    switch_bucket: tuple[SwitchBucket, ...] = Field(
        (),
        description="pairs that are fitted together: all, or by whether their best wrong token changes; default all three "
        "as far as they can be fitted",
    )
    fit_intercept: bool = Field(False, description="add a constant to each fit")

    @field_validator("switch_bucket")
    @classmethod
    def _each_bucket_once(cls, values: tuple[SwitchBucket, ...]) -> tuple[SwitchBucket, ...]:
        return tuple(dict.fromkeys(values))

    @property
    def buckets(self) -> tuple[SwitchBucket, ...]:
        """Those of `--switch-bucket`, or all three."""
        return self.switch_bucket or BUCKETS

    def parameters(self) -> dict[str, Any]:
        """The buckets by name."""
        return {**super().parameters(), "switch_bucket": list(self.buckets)}

    def bucket_fits(
        self, changes: pa.Table, design: Design, places: np.ndarray[Any, np.dtype[np.int64]] | None = None
    ) -> Iterator[tuple[dict[str, Any], Any, Any]]:
        """Key, fit and observations of each scalar and bucket. Raises EmptyBucket and Underdetermined.

        `changes` has scalar_name, competitor_switched and delta, in the order of observations; `places` says which row of
        the design each is, None if they are the same.
        """
        import numpy as np

        names = np.array(changes["scalar_name"].to_pylist())
        switched = np.array(changes["competitor_switched"].to_pylist(), bool)
        deltas = changes["delta"].to_numpy()
        for scalar in self.scalar:
            for bucket in self.buckets:
                inside = {"all": np.ones_like(switched), "same_competitor": ~switched}.get(bucket, switched)
                rows = np.flatnonzero((names == scalar) & inside)
                if not self._is_fitted(bucket, len(rows), len(design.labels)):
                    continue
                fit = design.fit(
                    deltas[rows],
                    fit_intercept=self.fit_intercept,
                    what=f"{self.report_name()}: {scalar} in bucket {bucket}",
                    rows=rows if places is None else places[rows],
                )
                yield {"scalar_name": scalar, "switch_bucket": bucket}, fit, rows

    def _is_fitted(self, bucket: SwitchBucket, rows: int, features: int) -> bool:
        """One that nobody asked for is left out if it is too small. Raises EmptyBucket."""
        if bucket in self.switch_bucket and not rows:
            moved = "changes" if bucket == "competitor_switch" else "keeps"
            raise EmptyBucket(
                f"{self.report_name()}: bucket {bucket} has no rows: no pair {moved} its best wrong token in any interval; "
                "leave out --switch-bucket, or name others"
            )
        return bucket in self.switch_bucket or bucket == "all" or rows >= features + self.fit_intercept
