"""Dataset probe: a probe of a run as tables, sampled from the run's benchmark or read from JSON lines.

One unit holds a probe and, for the symbolic-KV task, its causal patch pairs with the corrupted records as probe
NAME.corrupted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import LakebedError
from ..engine.config import RunConfig
from ..engine.probe import Probe, read_probe_jsonl, symbolic_probe
from ..engine.symbolic_kv import Benchmark, Record, Vocabulary, generate_benchmark
from ..engine.symbolic_kv.pairs import PAIR_TYPES, Pair, PairTask, Skip, corrupt, find_pair
from ..engine.symbolic_kv.probes import (
    DEFAULT_EXAMPLES_PER_SPLIT,
    DEFAULT_SEED,
    DEFAULT_SPLITS,
    sample_probe,
)
from ..lake import Lake, Unit, UnitWriter
from ..lake.datasets import CORRUPTED, DEFAULT_PROBE, PROBE
from ..lake.errors import InputMismatch, InvalidName
from ..lake.names import canonical_json, spec_id
from .probe_rows import write_probe
from .runs import run_row
from .training import ADAPTER

VERSION = 1
DEFAULT_MAX_PAIRS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,79}")


class ProbeError(LakebedError):
    """A probe that cannot be made for this run as asked."""


@dataclass(frozen=True)
class ProbeResult:
    """A probe of a run: whether it was made now, its hash, and what it holds."""

    run: str
    probe: str
    made: bool
    sha256: str
    num_examples: int
    num_events: int
    num_corrupted: int


@dataclass
class _Pairs:
    """Rows of table pairs, and the records of the corrupted probe, in the order of their events."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    corrupted: list[Record] = field(default_factory=list)


def build_probe(
    lake: Lake,
    run: str,
    name: str = DEFAULT_PROBE,
    splits: Sequence[str] = DEFAULT_SPLITS,
    examples_per_split: int = DEFAULT_EXAMPLES_PER_SPLIT,
    seed: int = DEFAULT_SEED,
    max_pairs_per_type: int = DEFAULT_MAX_PAIRS,
    benchmark: Benchmark | None = None,
) -> ProbeResult:
    """Samples a probe from the benchmark of a symbolic-KV run, with the causal patch pairs of its events.

    The benchmark is drawn anew from the run's configuration unless the caller has it. Nothing is done when the probe
    stands. Raises ProbeError, ProbeSamplingError, or InputMismatch for a probe of this name made in another way.
    """
    _check_name(name)
    if max_pairs_per_type < 1:
        raise ProbeError(f"max pairs per type is {max_pairs_per_type}; it must be at least 1")
    info = run_row(lake, run)
    if info["adapter"] != ADAPTER or info["config"] is None:
        raise ProbeError(
            f"run {run!r} has no symbolic-KV benchmark to sample from: bring a probe of your own with "
            f"`lakebed probe import FILE.jsonl --lake {lake.uri} --run {run} --probe NAME`"
        )
    recipe = {
        "examples_per_split": examples_per_split,
        "seed": seed,
        "splits": list(splits),
        "max_pairs_per_type": max_pairs_per_type,
    }
    unit = _unit(run, name, {"source": "symbolic_kv", "config": info["config_hash"], **recipe})
    standing = _standing(lake, unit, name)
    if standing is not None:
        return standing
    made = (
        generate_benchmark(RunConfig.from_json(info["config"]).benchmark) if benchmark is None else benchmark
    )
    records = sample_probe(made.splits, splits, examples_per_split, seed)
    probe = symbolic_probe(records, made.vocabulary)
    pairs = _pairs(PairTask(made.vocabulary, made.held_out), name, records, max_pairs_per_type)
    split_counts = {split: sum(record["split"] == split for record in records) for split in splits}
    metadata = {**recipe, "split_counts": split_counts}
    with lake.unit(unit) as writer:
        write_probe(
            writer, name, probe, "symbolic_kv", metadata=metadata, max_pairs_per_type=max_pairs_per_type
        )
        writer.rows("pairs", pairs.rows)
        if pairs.corrupted:
            corrupted = symbolic_probe(pairs.corrupted, made.vocabulary)
            write_probe(writer, f"{name}{CORRUPTED}", corrupted, "corrupted", parent=name)
    return _result(run, name, writer, probe, len(pairs.corrupted))


def import_probe(lake: Lake, run: str, path: str, name: str) -> ProbeResult:
    """Reads a probe from JSON lines (see `engine.probe`) into a run. Nothing is done when the same probe stands.

    Raises ProbeFormatError naming the line, VocabularyMismatch for tokens the run's model has not, or InputMismatch.
    """
    _check_name(name)
    info = run_row(lake, run)
    probe = read_probe_jsonl(path)
    probe = _fitted(lake, run, info, probe)
    unit = _unit(run, name, {"source": "jsonl", "sha256": probe.sha256})
    standing = _standing(lake, unit, name)
    if standing is not None:
        return standing
    with lake.unit(unit) as writer:
        write_probe(writer, name, probe, "jsonl", metadata={"file": Path(path).name})
    return _result(run, name, writer, probe, 0)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"probe name {name!r} is not usable: 1 to 80 letters, digits or . _ + @ -, starting with a letter or digit"
        )
    if name.endswith(CORRUPTED):
        raise InvalidName(
            f"probe name {name!r} is taken: {CORRUPTED} marks the corrupted records of a probe's pairs; choose "
            f"--probe {name.removesuffix(CORRUPTED) or DEFAULT_PROBE}"
        )


def _unit(run: str, name: str, inputs: Mapping[str, Any]) -> Unit:
    parameters = {"probe": name}
    return Unit(PROBE, run, f"{PROBE}-{spec_id(parameters)}", (), parameters, inputs, VERSION)


def _standing(lake: Lake, unit: Unit, name: str) -> ProbeResult | None:
    """What stands under this unit's name, None if nothing does; raises InputMismatch if it was made otherwise."""
    receipt = lake.receipts.get(unit.run, unit.name)
    if receipt is None:
        return None
    if receipt.content_hash != unit.content_hash:
        raise InputMismatch(
            f"probe {name!r} of run {unit.run!r} stands in the lake with other content "
            f"({_difference(json.loads(receipt.inputs), unit.inputs)}): choose another name with --probe"
        )
    rows = {
        row["probe"]: row
        for row in lake.table("probes", unit.run).collect().to_dicts()
        if name in (row["probe"], row["parent_probe"])
    }
    held, corrupted = rows[name], rows.get(f"{name}{CORRUPTED}")
    return ProbeResult(
        run=unit.run,
        probe=name,
        made=False,
        sha256=held["sha256"],
        num_examples=held["num_examples"],
        num_events=held["num_events"],
        num_corrupted=corrupted["num_events"] if corrupted else 0,
    )


def _difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    if theirs.get("source") != mine["source"]:
        return f"made from {theirs.get('source')}, now {mine['source']}"
    if mine["source"] == "jsonl":
        return "its file had other records"
    named = [
        f"{key} {_shown(theirs.get(key))}, now {_shown(value)}"
        for key, value in mine.items()
        if theirs.get(key) != value
    ]
    return "; ".join(named) or "made by another version"


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def _result(run: str, name: str, writer: UnitWriter, probe: Probe, num_corrupted: int) -> ProbeResult:
    return ProbeResult(
        run, name, writer.committed, probe.sha256, len(probe.records), probe.num_events, num_corrupted
    )


# -- pairs ---------------------------------------------------------------------------------------------------


def _pairs(task: PairTask, name: str, records: Sequence[Record], limit: int) -> _Pairs:
    """A pair, or the reason for none, per event and type; corrupted records for the first `limit` per type and split."""
    found = _Pairs()
    taken: dict[tuple[str, str], int] = {}
    event_number = 0
    for record in records:
        for event in record["query_events"]:
            for pair_type in PAIR_TYPES:
                pair = find_pair(task, record, event, pair_type)
                row: dict[str, Any] = {
                    "probe": name,
                    "clean_event": event_number,
                    "pair_type": pair_type,
                    "split": record["split"],
                    "source_sample_id": record["sample_id"],
                    "source_query_index": event["query_index"],
                    "clean_answer_value": event["answer_value"],
                }
                if isinstance(pair, Skip):
                    found.rows.append({**row, "skip_reason": pair.reason})
                    continue
                row |= _pair_columns(pair)
                at = (pair_type, record["split"])
                if taken.get(at, 0) < limit:
                    taken[at] = taken.get(at, 0) + 1
                    row["corrupted_event"] = len(found.corrupted)
                    found.corrupted.append(corrupt(task, record, pair))
                found.rows.append(row)
            event_number += 1
    return found


def _pair_columns(pair: Pair) -> dict[str, Any]:
    return {**vars(pair), "mutation": canonical_json(dict(pair.mutation))}


# -- does an imported probe fit the run's model --------------------------------------------------------------


def _fitted(lake: Lake, run: str, info: Mapping[str, Any], probe: Probe) -> Probe:
    """The probe, checked against the run's model; with the run's own vocabulary where its configuration tells it."""
    sizes = {
        row["module"]: row["shape"][0]
        for row in lake.table("parameters", run).collect().to_dicts()
        if row["module"] in ("token_embedding", "position_embedding")
    }
    if "position_embedding" in sizes:
        probe.require_length(sizes["position_embedding"])
    if info["adapter"] == ADAPTER and info["config"] is not None:
        config = RunConfig.from_json(info["config"]).benchmark
        vocabulary = Vocabulary(config.num_keys, config.num_values)
        probe.require_vocabulary(len(vocabulary), vocabulary.tokens)
        return replace(
            probe,
            vocabulary=vocabulary.tokens,
            key_tokens=tuple(vocabulary.key_ids),
            value_tokens=tuple(vocabulary.value_ids),
        )
    if "token_embedding" in sizes:
        probe.require_vocabulary(sizes["token_embedding"])
    return probe
