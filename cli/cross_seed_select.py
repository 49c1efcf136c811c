"""Stage select: the heads of every seed in order of growth, from their scan reports, as JSON, CSV and lake tables.

Growth is the rank-r QK separation at the window's last scanned checkpoint minus that at its first (definitions 3, H.4).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import LakebedError
from ..lake import Lake, Unit
from ..lake.datasets import CROSS_SEED
from ..lake.names import content_hash, spec_id
from ..queries.output import OutputExists
from .cross_seed_plan import LABELS, SCAN, CrossSeed
from .cross_seed_units import check_stamp, made_from

_GROWTH = "window_delta_qk_match_separation"
_ROWS = "bilinear_qk_match_separation_rows.jsonl"
# Columns of the guide's CSV.
_CSV = (
    "seed",
    "head_label",
    "head_layer",
    "head",
    "score",
    _GROWTH,
    "window_qk_match_separation_vs_qk_singular_value_top",
    "window_qk_match_separation_vs_answer_margin",
    "window_delta_support_beats_all_rate",
    "report",
)


class ScanNotFound(LakebedError):
    """A head without a scan report."""


class ScanRowMissing(LakebedError):
    """A scan report without the summary row, or the growth, that a head is judged by."""


class ScanRowAmbiguous(LakebedError):
    """A scan report with several such rows."""


class NoSuchCandidate(LakebedError):
    """A candidate's place beyond the last head."""


def read_scans(lake: Lake, plan: CrossSeed, seed: int) -> list[dict[str, Any]]:
    """The candidates of a seed, the one that grew most first; ties to the lower layer, then head.

    Raises ScanNotFound, ForeignReport, ScanRowMissing or ScanRowAmbiguous.
    """
    found = [_candidate(lake, plan, seed, layer, head) for layer, head in plan.all_heads]
    found.sort(key=lambda of: (-of["score"], of["head_layer"], of["head"]))
    return found


def _candidate(lake: Lake, plan: CrossSeed, seed: int, layer: int, head: int) -> dict[str, Any]:
    folder = plan.scan_folder(seed, layer, head)
    options = plan.scan_report(seed, layer, head)
    try:
        report = check_stamp(folder, made_from(lake, SCAN, options, plan.scan_steps))
    except FileNotFoundError as error:
        raise ScanNotFound(
            f"no scan report of L{layer}H{head} of seed {seed} in {folder}: add --stage scan, with the same options"
        ) from error
    row = _summary_row(plan, report, layer, folder)
    lines = (folder / _ROWS).read_text(encoding="utf-8").splitlines()
    return {
        "seed": seed,
        "run": plan.run(seed),
        "head_label": f"L{layer}H{head}",
        "head_layer": layer,
        "head": head,
        "context_stage": plan.stage_of(layer),
        "score": row[_GROWTH],
        **{name: row[name] for name in _CSV if name in row},
        "report": plan.relative(folder / f"{SCAN.replace('-', '_')}_report.json"),
        "summary": row,
        "chance_win_rate": report["chance_win_rate"],
        "trajectory": [of for of in map(json.loads, lines) if of["projection"] == row["projection"]],
    }


def _summary_row(plan: CrossSeed, report: Mapping[str, Any], layer: int, folder: Path) -> dict[str, Any]:
    stage, projection = plan.stage_of(layer), f"rank_{plan.rank}"
    rows: list[dict[str, Any]] = report["summary"]
    matching = [row for row in rows if (row["context_stage"], row["projection"]) == (stage, projection)]
    held = ", ".join(f"{row['projection']} at {row['context_stage']}" for row in rows) or "none"
    if not matching:
        raise ScanRowMissing(f"{folder} has no summary row of {projection} at {stage}; it has {held}")
    if len(matching) > 1:
        raise ScanRowAmbiguous(f"{folder} has {len(matching)} summary rows of {projection} at {stage}")
    if matching[0].get(_GROWTH) is None:
        raise ScanRowMissing(
            f"{folder} has no {_GROWTH}: fewer than two of its checkpoints lie in the window {plan.window_start} to "
            f"{plan.window_end}"
        )
    return matching[0]


def choose(candidates: Sequence[Mapping[str, Any]], labels: Iterable[str]) -> list[tuple[str, int, int]]:
    """(label, layer, head) of each label's place: first, second, middle, last. A place that is taken is left out.

    Raises NoSuchCandidate.
    """
    count = len(candidates)
    places = dict(zip(LABELS, (0, 1, count // 2, count - 1), strict=True))
    taken: dict[int, str] = {}
    for label in labels:
        place = places[label]
        if place >= count:
            raise NoSuchCandidate(
                f"--adam-candidate {label} is head number {place + 1}, and {count} are scanned"
            )
        taken.setdefault(place, label)
    return [(label, candidates[at]["head_layer"], candidates[at]["head"]) for at, label in taken.items()]


def write_selection(
    lake: Lake, plan: CrossSeed, found: Mapping[int, list[dict[str, Any]]], overwrite: bool
) -> None:
    """Writes JSON and CSV of every seed's candidates, and their rows into the lake. Raises OutputExists."""
    for seed, candidates in found.items():
        plain = [_plain(of) for of in candidates]
        text = _text({"seed": seed, "run": plan.run(seed), "winner": plain[0], "candidates": plain})
        write_output(plan.selection(seed), text, overwrite)
        _write_rows(lake, plan, seed, candidates)
    winners = {str(seed): _plain(candidates[0]) for seed, candidates in found.items()}
    every = list(merged(plan.winners, "winners", winners, overwrite).values())
    write_output(plan.winners, _text({"winners": every}), True)
    write_output(plan.winners.with_suffix(".csv"), _csv(every), True)


def _plain(candidate: Mapping[str, Any]) -> dict[str, Any]:
    return {name: of for name, of in candidate.items() if name not in ("summary", "trajectory")}


def _csv(winners: Iterable[Mapping[str, Any]]) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, _CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(winners)
    return sink.getvalue()


def _write_rows(lake: Lake, plan: CrossSeed, seed: int, candidates: Sequence[Mapping[str, Any]]) -> None:
    parameters = plan.scan_parameters()
    spec, run = spec_id(parameters), plan.run(seed)
    made = [
        made_from(lake, SCAN, plan.scan_report(seed, layer, head), plan.scan_steps)
        for layer, head in plan.all_heads
    ]
    inputs = {"scans": content_hash({"scans": made})}
    unit = Unit(CROSS_SEED, run, f"{CROSS_SEED}-{spec}", tuple(plan.scan_steps), parameters, inputs)
    if lake.find_receipt(unit) is not None:
        return
    labels = {(layer, head): label for label, layer, head in choose(candidates, _labels(len(candidates)))}
    with lake.unit(unit) as writer:
        writer.rows(
            "cross_seed_candidates",
            [_candidate_row(spec, of, place, labels) for place, of in enumerate(candidates, 1)],
        )
        writer.rows("cross_seed_scans", [row for of in candidates for row in _scan_rows(spec, of)])


def _labels(count: int) -> tuple[str, ...]:
    return LABELS if count > 1 else LABELS[:1]


def _candidate_row(
    spec: str, of: Mapping[str, Any], place: int, labels: Mapping[tuple[int, int], str]
) -> dict[str, Any]:
    row, last = of["summary"], of["trajectory"][-1]
    return {
        "spec": spec,
        "layer": of["head_layer"],
        "head": of["head"],
        "head_label": of["head_label"],
        "seed": of["seed"],
        "place": place,
        "label": labels.get((of["head_layer"], of["head"])),
        "stage": of["context_stage"],
        "window_start_step": row["window_start"],
        "window_end_step": row["window_end"],
        "growth": row[_GROWTH],
        "win_rate_growth": row["window_delta_support_beats_all_rate"],
        "growth_vs_singular_value": row["window_qk_match_separation_vs_qk_singular_value_top"],
        "growth_vs_answer_margin": row["window_qk_match_separation_vs_answer_margin"],
        "end_step": row["end_step"],
        "separation": row["end_qk_match_separation"],
        "win_rate": row["end_support_beats_all_rate"],
        "answer_margin": last["answer_margin_mean"],
        "answer_accuracy": last["answer_accuracy"],
        "chance_win_rate": of["chance_win_rate"],
        "num_events": last["num_events"],
    }


def _scan_rows(spec: str, of: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "spec": spec,
            "layer": of["head_layer"],
            "head": of["head"],
            "step": row["checkpoint_step"],
            "separation": row["qk_match_separation_mean"],
            "max_margin": row["qk_match_max_margin_mean"],
            "win_rate": row["support_beats_all_rate"],
            "answer_margin": row["answer_margin_mean"],
            "answer_accuracy": row["answer_accuracy"],
            "singular_value": row["qk_singular_value_top"],
        }
        for row in of["trajectory"]
    ]


# -- files that several invocations share --------------------------------------------------------------------


def merged(path: Path, key: str, mine: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """What a file holds by seed, with ours added. Raises OutputExists where it says something else of one of ours."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))[key]
        held = {str(row["seed"]): row for row in rows}
    except FileNotFoundError:
        held = {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not overwrite:
            raise OutputExists(
                f"{path} exists and cannot be read: add --overwrite or name another --out"
            ) from error
        held = {}
    differing = [seed for seed, of in mine.items() if held.get(seed, of) != of]
    if differing and not overwrite:
        raise OutputExists(
            f"{path} exists and says something else of seed {', '.join(differing)}: add --overwrite or name another --out"
        )
    every = {**held, **mine}
    return {seed: every[seed] for seed in sorted(every, key=int)}


def write_output(path: Path, text: str, overwrite: bool) -> None:
    """Writes a file, whole or not at all; raises OutputExists where another text stands."""
    if path.exists():
        if path.read_text(encoding="utf-8") == text:
            return
        if not overwrite:
            raise OutputExists(
                f"{path} exists and says something else: add --overwrite or name another --out"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
