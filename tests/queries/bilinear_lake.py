"""What the tests of bilinear-qk-match-separation share: the report asked for, what it writes, a lake to count by hand."""

import json
from pathlib import Path

from lakebed.lake import Lake, Unit
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report

from tests.trained_probe_lake import HEAD, STAGE

STAGES = (STAGE, "embedding")
OPTIONS = {
    "head": HEAD,
    "context_stage": STAGES,
    "support_role": "support_value",
    "distractor_role": "value_distractors",
    "score_mode": ("weight_full", "full_with_bias"),
    "rank": (4, 1, 8),
}


def report(**options):
    """The report, with OPTIONS where nothing else is said."""
    return load_report("bilinear-qk-match-separation").parse({**OPTIONS, **options})


def written(lake, out, **options):
    """What is printed, the row sets, and the report's JSON."""
    printed = run_report(lake, report(**options), out, chart_formats=[], overwrite=True)
    rows = {
        key: [json.loads(line) for line in Path(printed[key]).read_text().splitlines()]
        for key in ("event_rows", "metric_rows", "group_rows")
    }
    return printed, rows, json.loads(Path(printed["report"]).read_text())


def hand_lake(path, sigma=(2.0, 1.0), distractors=(1, 5), query=(3,), support=(2,)):
    """Two ranks, one event: query (1, 2) at position 3, keys (p, 1) at every position p, bias terms 10 and 100·p."""
    lake = Lake.create(path)
    roles = {"prediction": (3,), "asked": query, "query_key": (3,), "good": support, "bad": distractors}
    with lake.unit(Unit("probe", "r", "probe", parameters={"probe": "probe"})) as writer:
        named = {"probe": "probe", "event": 0}
        writer.rows("probes", [{"probe": "probe", "source": "jsonl", "splits": ["all"], "num_events": 1}])
        about = {"example": 0, "sample_id": "one", "split": "all", "query_index": 0, "prediction_position": 3}
        writer.rows("events", [{**named, **about, "answer_token": 7, "answer": "yes", "competitors": [8]}])
        writer.rows(
            "positions",
            [
                {**named, "kind": "role", "role": role, "position": p, "token": p, "text": f"t{p}"}
                for role, positions in roles.items()
                for p in positions
            ],
        )
    form = {"probe": "probe", "head": "L0H0", "stage": "embedding", "layernorm_mode": "head_ln1"}
    with lake.unit(Unit("qk_coordinates", "r", "qk", (4,), parameters=form)) as writer:
        row = {"probe": "probe", "step": 4, "example": 0, "layer": 0, "head": 0, "stage": "embedding"}
        row |= {"layernorm_mode": "head_ln1", "query": [1.0, 2.0], "query_bias": 10.0}
        positions = range(1, 6)
        writer.rows(
            "qk_coordinates",
            [{**row, "position": p, "key": [float(p), 1.0], "key_bias": 100.0 * p} for p in positions],
        )
    with lake.unit(Unit("svd", "r", "svd", (4,))) as writer:
        matrix = {"step": 4, "matrix": "W_QK", "layer": 0, "head": 0, "matrix_rows": 9, "matrix_columns": 9}
        writer.rows(
            "singular_values",
            [{**matrix, "rank": rank, "singular_value": value} for rank, value in enumerate(sigma, 1)],
        )
    with lake.unit(Unit("readouts", "r", "readouts", (4,), parameters={"probe": "probe"})) as writer:
        row = {
            "probe": "probe",
            "step": 4,
            "event": 0,
            "stage": "logits",
            "answer_logit": 1.0,
            "best_wrong_token": 8,
        }
        row |= {"best_wrong_logit": 0.5, "value_margin": 0.5, "best_token": 7, "answer_log_prob": -0.1}
        writer.rows("readouts", [{**row, "correct": True}])
    return lake
