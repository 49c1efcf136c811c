"""A small made-up lake for reports on rescue: two steps, a query per pair, and any logits one likes in every run."""

import json

from lakebed.lake import Lake, Unit
from lakebed.lake.datasets import INTERVENTIONS, READOUTS

RUN, STEPS = "m", (10, 20)
ANSWER, COMPETITORS = 5, [6, 7]
STAGES = (
    "embedding",
    "layer_0_post_attn",
    "layer_0_post_mlp",
    "layer_1_post_attn",
    "layer_1_post_mlp",
    "final_norm",
)


def _answer(logit, event, step):
    return {
        "probe": "probe",
        "step": step,
        "event": event,
        "answer_logit": logit,
        "best_wrong_token": COMPETITORS[0],
        "best_wrong_logit": 1.0,
        "value_margin": logit - 1.0,
        "best_token": ANSWER,
        "answer_log_prob": -0.1,
        "correct": True,
    }


def make_lake(path, report, logits, readout_shift=0.0):
    """`logits[run]` lists the answer's logit in that run, pair by pair, None for none; the same at both steps.

    Runs are named as the report's interventions are, and `clean`.
    """
    lake = Lake.open_or_create(path)
    count = len(logits["clean"])
    with lake.unit(Unit("run", RUN, "run")) as writer:
        writer.rows("runs", [{"source": "train"}])
        writer.rows("stages", [{"stage": of, "position": at} for at, of in enumerate(STAGES)])
        heads = [
            {
                "slice_kind": "head",
                "slice": f"L{layer}H{head}",
                "parameter": "w",
                "layer": layer,
                "head": head,
            }
            for layer in range(2)
            for head in range(2)
        ]
        writer.rows("slices", [{**of, "row_start": 0, "column_start": 0} for of in heads])
    with lake.unit(Unit("probe", RUN, "probe", parameters={"probe": "probe"})) as writer:
        metadata = json.dumps({"examples_per_split": 1, "seed": 1, "splits": ["iid"]})
        writer.rows(
            "probes",
            [
                {
                    "probe": "probe",
                    "source": "symbolic_kv",
                    "splits": ["iid"],
                    "max_pairs_per_type": count,
                    "metadata": metadata,
                }
            ],
        )
        shared = [{"probe": "probe", "split": "iid", "sample_id": f"iid_{event}"} for event in range(count)]
        writer.rows(
            "events",
            [
                {
                    **of,
                    "event": at,
                    "example": at,
                    "query_index": 0,
                    "answer_token": ANSWER,
                    "competitors": COMPETITORS,
                }
                for at, of in enumerate(shared)
            ],
        )
        writer.rows(
            "pairs",
            [
                {
                    "probe": "probe", "clean_event": at, "pair_type": "support_value", "split": "iid", "pair_id": f"pair{at}",
                    "corrupted_event": at, "source_sample_id": f"iid_{at}", "source_query_index": 0,
                }
                for at in range(count)
            ],
        )  # fmt: skip
    (parameters,) = report.answer_parameters()
    spec = report.parameters()["answer_spec"][0]
    for step in STEPS:
        rows = [
            {
                **_answer(logit, event, step),
                "spec": spec,
                "intervention": name,
                "competitor_logits": [1.0, 0.5],
            }
            for name, of in logits.items()
            for event, logit in enumerate(of)
            if logit is not None
        ]
        with lake.unit(
            Unit(INTERVENTIONS, RUN, f"runs-{step}", (step,), parameters, {"made": "up"})
        ) as writer:
            writer.rows("intervention_runs", rows)
        read = [
            {**_answer(logit + readout_shift, event, step), "stage": "logits"}
            for event, logit in enumerate(logits["clean"])
        ]
        made = Unit(READOUTS, RUN, f"readouts-{step}", (step,), {"probe": "probe"}, {"made": "up"})
        with lake.unit(made) as writer:
            writer.rows("readouts", read)
    return lake
