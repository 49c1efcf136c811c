"""`--spec FILE.toml`: which interventions `lakebed extract interventions` makes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..lake.datasets import DEFAULT_PROBE, INTERVENTIONS, Need
from ..lake.interventions import ZERO_EACH, intervention_parameters

_KEYS = (
    "probe",
    "record_side",
    "pair_type",
    "split",
    "max_pairs_per_type",
    "query_mode",
    "components",
    "interventions",
)


def intervention_needs(options: Mapping[str, tuple[str, ...]]) -> list[Need]:
    """One need per --spec and probe; without one, every component zeroed in turn."""
    probes = options["probe"] or (DEFAULT_PROBE,)
    if not options["spec"]:
        return [Need(INTERVENTIONS, intervention_parameters(ZERO_EACH, probe=probe)) for probe in probes]
    return [Need(INTERVENTIONS, read_spec(Path(path), probe)) for path in options["spec"] for probe in probes]


def read_spec(path: Path, probe: str) -> dict[str, Any]:
    """Parameters of the dataset from a TOML file. Raises UsageError for a key it does not take."""
    try:
        given = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise click.UsageError(f"no spec {path}: it is a TOML file with [[interventions]]") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.UsageError(f"cannot read {path}: {error}") from error
    unknown = sorted(given.keys() - set(_KEYS))
    if unknown:
        raise click.UsageError(f"{path}: unknown key {unknown[0]!r}; a spec takes {', '.join(_KEYS)}")
    types = {"max_pairs_per_type": int, "components": bool, "pair_type": list, "split": list}
    for key, value in given.items():
        wanted = types.get(key, (str, list) if key == "interventions" else str)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise click.UsageError(f"{path}: {key} = {value!r} is of the wrong type")
    # What an intervention is, the extractor reads: it knows the edits, and fills in their defaults.
    listed = given.pop("interventions", ZERO_EACH)
    made = intervention_parameters(ZERO_EACH, **{"probe": probe, **given})
    return {**made, "interventions": listed}
