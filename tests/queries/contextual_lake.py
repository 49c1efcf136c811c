"""A lake with residual vectors invented so that keys come apart over training, and the SVDs of random-walk weights."""

from types import SimpleNamespace

import numpy as np
from lakebed.lake import Unit

from .conftest import make_svd_lake

STAGES = ("embedding", "layer_0_post_attn", "layer_0_post_mlp", "final_norm")
SPLITS = ("validation_iid", "train")
KEYS, VALUES = (5, 6, 7, 8), (20, 21, 22)
_TEXT = {
    **{key: f"K{key - 5:02d}" for key in KEYS},
    **{value: f"V{value - 20:03d}" for value in VALUES},
    1: "W",
    2: "R",
}


def make_records(examples, rng, keys=KEYS, values=VALUES):
    """Records W k v W k v R k W k v R k: two queries each, the second after one more write."""
    for example in range(examples):
        writes = [(int(rng.choice(keys)), int(rng.choice(values))) for _ in range(3)]
        first, second = writes[rng.integers(2)], writes[rng.integers(3)]
        tokens = [1, *writes[0], 1, *writes[1], 2, first[0], 1, *writes[2], 2, second[0]]
        starts = (0, 3, 8)
        for query, (prediction, asked) in enumerate(((7, first), (12, second))):
            seen = [i for i, start in enumerate(starts) if start < prediction and writes[i][0] == asked[0]]
            support = starts[seen[-1]]
            others = [start for start in starts if start != support]
            yield {
                "example": example,
                "sample_id": f"sample_{example:03d}",
                "split": SPLITS[example % 4 == 3],
                "query_index": query,
                "tokens": tokens,
                "prediction": prediction,
                "answer": tokens[support + 2],
                "roles": {
                    "prediction": [prediction],
                    "query_key": [prediction],
                    "support_key": [support + 1],
                    "support_value": [support + 2],
                    "support_write": [support, support + 1, support + 2],
                    "value_distractors": [start + 2 for start in others],
                    "all_query_relation": [support + 1, support + 2, prediction],
                },
            }


def make_contextual_lake(
    path, steps, d_model=12, examples=24, seed=5, change=None, change_svd=None, layouts=("roles",), **records
):
    """The lake with what it holds beside it: `events` (dicts), `residuals[step, stage]` Float32[example, position, d].

    `change(events, residuals)` edits them first, and `change_svd` what `make_svd_lake` decomposed.
    """
    made = make_svd_lake(path, steps, d_model=d_model, seed=seed, change=change_svd)
    rng = np.random.default_rng(seed)
    events = list(make_records(examples, rng, **records))
    number = 1 + events[-1]["example"]
    length = len(events[0]["tokens"])
    names = rng.normal(size=(40, d_model))
    where = 0.4 * rng.normal(size=(length, d_model))
    residuals = {}
    for place, step in enumerate(steps):
        for stage in STAGES:
            noise = rng.normal(size=(number, length, d_model)) * (1.5 - place / len(steps))
            tokens = np.array([next(e["tokens"] for e in events if e["example"] == i) for i in range(number)])
            residuals[step, stage] = (names[tokens] * (0.3 + 0.2 * place) + where + noise).astype(np.float32)
    if change:
        change(events, residuals)
    readouts = {
        (step, event): (float(rng.normal() + place), bool(rng.random() < 0.5))
        for place, step in enumerate(steps)
        for event in range(len(events))
    }
    _write(made.lake, made.run, steps, events, residuals, readouts, layouts)
    return SimpleNamespace(**vars(made), events=events, residuals=residuals, readouts=readouts)


def _write(lake, run, steps, events, residuals, readouts, layouts):
    stored = {
        "roles": sorted({(e["example"], p) for e in events for held in e["roles"].values() for p in held}),
        "all": [(i, p) for i in range(1 + events[-1]["example"]) for p in range(len(events[0]["tokens"]))],
    }
    with lake.unit(Unit("run", run, "run")) as writer:
        writer.rows("stages", [{"stage": stage, "position": i} for i, stage in enumerate(STAGES)])
        writer.rows(
            "slices",
            [
                {
                    "slice_kind": "head",
                    "slice": f"L{layer}H{head}.qkvo",
                    "parameter": f"blocks.{layer}.q",
                    "layer": layer,
                    "head": head,
                    "row_start": 0,
                    "row_stop": 1,
                    "column_start": 0,
                    "column_stop": 1,
                }
                for layer in range(2)
                for head in range(2)
            ],
        )
    with lake.unit(Unit("probe", run, "probe", parameters={"probe": "probe"})) as writer:
        writer.rows(
            "probes",
            [
                {
                    "probe": "probe",
                    "source": "jsonl",
                    "sha256": "0",
                    "num_examples": 1 + events[-1]["example"],
                    "num_events": len(events),
                    "splits": list(SPLITS),
                    "metadata": "{}",
                }
            ],
        )
        writer.rows(
            "events",
            [
                {
                    "probe": "probe",
                    "event": i,
                    "example": e["example"],
                    "sample_id": e["sample_id"],
                    "split": e["split"],
                    "query_index": e["query_index"],
                    "prediction_position": e["prediction"],
                    "answer_token": e["answer"],
                    "answer": _TEXT[e["answer"]],
                    "competitors": [v for v in VALUES if v != e["answer"]],
                }
                for i, e in enumerate(events)
            ],
        )
        kinds = [
            *(
                (i, "role", role, p)
                for i, e in enumerate(events)
                for role, held in e["roles"].items()
                for p in held
            ),
            *((i, "partition", "other", p) for i, e in enumerate(events) for p in range(e["prediction"] + 1)),
        ]
        writer.rows(
            "positions",
            [
                {
                    "probe": "probe",
                    "event": i,
                    "kind": kind,
                    "role": role,
                    "position": p,
                    "token": events[i]["tokens"][p],
                    "text": _TEXT[events[i]["tokens"][p]],
                }
                for i, kind, role, p in kinds
            ],
        )
        writer.rows(
            "activation_rows",
            [
                {"probe": "probe", "layout": layout, "row": row, "example": i, "position": p}
                for layout, places in stored.items()
                for row, (i, p) in enumerate(places)
            ],
        )
    for step in steps:
        for layout in layouts:
            examples, positions = np.array(stored[layout]).T
            unit = Unit("activations", run, f"{layout}-{step}", (step,), {"probe": "probe", "layout": layout})
            with lake.unit(unit) as writer:
                block = writer.tensor_rows("activations", [step])
                for stage in STAGES:
                    block.write(f"probe/{layout}/{stage}", residuals[step, stage][examples, positions][None])
        with lake.unit(Unit("readouts", run, f"readouts-{step}", (step,), {"probe": "probe"})) as writer:
            rows = []
            for event in range(len(events)):
                margin, correct = readouts[step, event]
                shared = {
                    "probe": "probe",
                    "step": step,
                    "event": event,
                    "best_wrong_token": 20,
                    "best_wrong_logit": 0.0,
                    "best_token": 20,
                    "answer_log_prob": -1.0,
                }
                rows.append(
                    {
                        **shared,
                        "stage": "logits",
                        "answer_logit": margin,
                        "value_margin": margin,
                        "correct": correct,
                    }
                )
                # A stage that is not the model's own answer, and must not be taken for it.
                rows.append(
                    {
                        **shared,
                        "stage": "embedding",
                        "answer_logit": 99.0,
                        "value_margin": 99.0,
                        "correct": True,
                    }
                )
            writer.rows("readouts", rows)


def vectors_of(made, step, stage, role, splits=SPLITS):
    """[(event, position, vector)] of a role, by loops over events, in event and position order."""
    found = []
    for number, event in enumerate(made.events):
        if event["split"] in splits:
            held = range(event["prediction"] + 1) if role == "causal_prefix" else event["roles"][role]
            for position in held:
                vector = made.residuals[step, stage][event["example"], position].astype(np.float64)
                found.append((number, position, vector))
    return found


def group_of(made, number, position, group_by):
    """Token id by which the vector of event `number` at `position` is grouped."""
    event = made.events[number]
    if group_by == "position_token":
        return event["tokens"][position]
    if group_by == "answer_value":
        return event["answer"]
    return event["tokens"][event["roles"][group_by][0]]
