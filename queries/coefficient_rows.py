"""Which components a file of output-route-closure's coefficients puts first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import InvalidOption

if TYPE_CHECKING:
    from ..lake import Lake

_COLUMNS = ("scalar_name", "switch_bucket", "component", "mean_contribution")
_ORIGIN = ("lake_id", "run", "probe")


class CoefficientRows(InvalidOption):
    """A file of coefficients that is not there or not one, or of which nothing is left."""


class OtherOrigin(InvalidOption):
    """A file of coefficients that were fitted in another lake, run or probe."""


def top_components(
    path: str, scalars: Sequence[str], buckets: Sequence[str], most: int, name: str
) -> tuple[str, ...]:
    """The first `most` components by |mean_contribution|, over the rows of these scalars and buckets.

    `name` is the report that asks. Raises CoefficientRows.
    """
    rows = read_coefficients(path, name)
    kept = [row for row in rows if row["scalar_name"] in scalars and row["switch_bucket"] in buckets]
    if not kept:
        has = sorted({f"{row['scalar_name']} in {row['switch_bucket']}" for row in rows})
        raise CoefficientRows(
            f"{name}: no coefficient row of {path} is left for --scalar {', '.join(scalars)} and "
            f"--coefficient-switch-bucket {', '.join(buckets)}; it has {', '.join(has) or 'no rows'}"
        )
    ranked = sorted(kept, key=lambda row: (-abs(row["mean_contribution"]), row["component"]))
    return tuple(dict.fromkeys(row["component"] for row in ranked))[:most]


def require_origin(path: str, name: str, lake: Lake, run: str, probe: str) -> None:
    """Raises OtherOrigin where a row says that it is of another lake, run or probe."""
    here = {"lake_id": lake.id, "run": run, "probe": probe}
    for row in read_coefficients(path, name):
        for column, value in here.items():
            if row[column] not in (None, value):
                raise OtherOrigin(
                    f"{name}: the coefficients of {path} are of {column.replace('_', ' ')} {row[column]}, and this is "
                    f"{value}: fit them here, or name what you want with --component"
                )


def read_coefficients(path: str, name: str) -> list[dict[str, Any]]:
    """Rows of a JSONL or Parquet file, the columns that are needed. Raises CoefficientRows."""
    file = Path(path)
    if not file.is_file():
        raise CoefficientRows(
            f"{name}: no file {path}: --coefficient-rows takes output_route_closure_coefficients.jsonl or .parquet, which "
            "lakebed query output-route-closure writes"
        )
    found: list[dict[str, Any]] = []
    for place, row in enumerate(_rows(file, name), 1):
        found.append(_checked(row, f"{name}: {path}, row {place}"))
    return found


def _rows(file: Path, name: str) -> list[Any]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            rows: list[Any] = pyarrow.parquet.read_table(file).to_pylist()
            return rows
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (ValueError, OSError) as error:
        raise CoefficientRows(
            f"{name}: cannot read coefficient rows from {file}: {str(error).splitlines()[0]}"
        ) from error


def _checked(row: Any, where: str) -> dict[str, Any]:
    lacking = [column for column in _COLUMNS if not isinstance(row, Mapping) or column not in row]
    if lacking:
        raise CoefficientRows(
            f"{where} has no {', '.join(lacking)}: this is no coefficient row of output-route-closure"
        )
    held = {column: row.get(column) for column in (*_COLUMNS, *_ORIGIN)}
    value = held["mean_contribution"]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise CoefficientRows(f"{where} has mean_contribution {value!r}, and that is no number to rank by")
    return held


__all__ = ["CoefficientRows", "OtherOrigin", "read_coefficients", "require_origin", "top_components"]
