"""A lake with an imported probe: roles of its own, no key or value tokens, invented patterns over random-walk weights."""

import numpy as np
from lakebed.lake import Unit

from .conftest import make_svd_lake

ROLES = ("subject", "indirect_object", "other")
LAYERS, HEADS, EVENTS, LENGTH, VOCABULARY = 2, 2, 5, 7, 30


def make_imported_lake(path, steps=(1, 2), change=None, off_by=0.0):
    """Facts of a probe named "probe" at `steps`; `change` edits the SVDs, `off_by` is added to the model's margins."""
    made = make_svd_lake(path, list(steps), heads=HEADS, layers=LAYERS, change=change)
    rng = np.random.default_rng(5)
    lake, run, probe = made.lake, made.run, {"probe": "probe"}
    width = made.matrices["W_QK"].shape[-1]
    with lake.unit(Unit("run", run, "run")) as writer:
        writer.rows("runs", [{"source": "import"}])
        writer.rows("stages", [{"stage": "embedding", "position": 0}, {"stage": "final_norm", "position": 1}])
        writer.rows(
            "parameters",
            [
                {
                    "parameter": "wte.weight",
                    "position": 0,
                    "numel": VOCABULARY * width,
                    "shape": [VOCABULARY, width],
                    "module": "token_embedding",
                }
            ],
        )
    events = [
        {
            "probe": "probe",
            "event": event,
            "example": event,
            "sample_id": f"sample_{event}",
            "split": "test",
            "query_index": 0,
            "prediction_position": LENGTH - 1,
            "answer_token": 3,
            "competitors": [4, 5],
        }
        for event in range(EVENTS)
    ]
    positions = [
        {
            "probe": "probe",
            "event": event,
            "kind": kind,
            "role": ROLES[min(at, 2)],
            "position": at,
            "token": at,
        }
        for event in range(EVENTS)
        for kind in ("role", "partition")
        for at in range(LENGTH)
    ]
    with lake.unit(Unit("probe", run, "probe-probe", parameters=probe)) as writer:
        facts = {
            "source": "jsonl",
            "sha256": "x",
            "num_examples": EVENTS,
            "num_events": EVENTS,
            "splits": ["test"],
        }
        writer.rows("probes", [{"probe": "probe", **facts}])
        writer.rows("events", events)
        writer.rows("positions", positions)
    for step in steps:
        _write_step(lake, run, int(step), probe, rng, width, off_by)
    return made


def _write_step(lake, run, step, probe, rng, width, off_by):
    keyed = {"probe": "probe", "step": step}
    heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    at_heads = [
        {**keyed, "event": event, "layer": layer, "head": head, "query_role": "prediction"}
        for event in range(EVENTS)
        for layer, head in heads
    ]
    query = {**probe, "query_role": "prediction"}
    with lake.unit(Unit("attention", run, f"attention-{step}", (step,), query)) as writer:
        scores = rng.normal(size=(len(at_heads), LENGTH))
        attention = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        writer.rows(
            "attention_patterns",
            [
                {**row, "query_position": LENGTH - 1, "scores": s.tolist(), "probabilities": a.tolist()}
                for row, s, a in zip(at_heads, scores, attention, strict=True)
            ],
        )
    with lake.unit(Unit("head_writes", run, f"head_writes-{step}", (step,), query)) as writer:
        writer.rows(
            "head_writes",
            [{**row, "role": "write", "answer_logit": 1.0, "value_margin": 0.5} for row in at_heads],
        )
    components = [(f"L{layer}H{head}", "attention_head", layer, head) for layer, head in heads]
    components += [("L0MLP", "mlp_block", 0, None), ("embedding", "embedding", None, None)]
    frozen = rng.normal(size=(EVENTS, len(components)))
    with lake.unit(Unit("component_logits", run, f"component_logits-{step}", (step,), probe)) as writer:
        names = ("component", "component_type", "layer", "head")
        writer.rows(
            "component_logits",
            [
                {
                    **keyed,
                    "event": event,
                    **dict(zip(names, component, strict=True)),
                    "margin_dla": frozen[event, place] / 2,
                    "margin_dla_frozen": frozen[event, place],
                }
                for event in range(EVENTS)
                for place, component in enumerate(components)
            ],
        )
    with lake.unit(Unit("readouts", run, f"readouts-{step}", (step,), probe)) as writer:
        writer.rows(
            "readouts",
            [
                {
                    **keyed,
                    "event": event,
                    "stage": stage,
                    "value_margin": frozen[event].sum() + off_by,
                    "correct": event % 2 == 0,
                }
                for event in range(EVENTS)
                for stage in ("embedding", "final_norm", "logits")
            ],
        )
    with lake.unit(Unit("weights", run, f"weights-{step}", (step,))) as writer:
        block = writer.tensor_rows("weights", [step], 1)
        block.write("wte.weight", rng.normal(size=(1, VOCABULARY, width)).astype(np.float32))
