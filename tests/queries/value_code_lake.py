"""A lake of invented residual states: codes of keys and values that grow over the steps, on top of noise."""

from types import SimpleNamespace

import numpy as np
from lakebed.lake import Lake, Unit

STAGES = (
    "embedding",
    "layer_0_post_attn",
    "layer_0_post_mlp",
    "layer_1_post_attn",
    "layer_1_post_mlp",
    "final_norm",
)
EPSILON = 1e-5


def make_value_code_lake(
    path,
    steps=(10, 20, 30),
    records=40,
    queries=2,
    keys=5,
    values=8,
    d_model=12,
    stages=STAGES,
    seed=0,
    change=None,
    name="",
):
    """Each record writes four pairs and is asked `queries` times; returns what was written.

    Tokens: keys 0…, then values, then two others. Layout of a record: key value key value … then a read per query.
    `change(made)` edits the arrays and tables before they are written.
    """
    rng = np.random.default_rng(seed)
    vocabulary = [f"K{i}" for i in range(keys)] + [f"V{i}" for i in range(values)] + ["W", "R"]
    value_tokens = list(range(keys, keys + values))
    examples, events, positions = [], [], []
    for example in range(records):
        order = rng.permutation(keys)[:4]
        written = [(int(key), int(rng.integers(keys, keys + values))) for key in order]
        tokens = [token for pair in written for token in pair]
        # A read follows the third write, the last write follows the first read.
        tokens = tokens[:6]
        sample = f"s{example}"
        reads = []
        for query in range(queries):
            if query == 1:
                tokens += list(written[3])
            known = written[: 3 if query == 0 else 4]
            support = int(rng.integers(len(known)))
            tokens.append(known[support][0])
            reads.append((support, len(tokens) - 1))
            tokens.append(known[support][1])
        starts = {0: 0, 1: 2, 2: 4, 3: 8}
        for query, (support, at) in enumerate(reads):
            answer = written[support][1]
            event = len(events)
            events.append(
                {
                    "probe": "probe",
                    "event": event,
                    "example": example,
                    "sample_id": sample,
                    "split": "validation_iid" if example % 4 else "heldout_pairs",
                    "query_index": query,
                    "prediction_position": at,
                    "answer_token": answer,
                    "answer": vocabulary[answer],
                    "competitors": [token for token in value_tokens if token != answer],
                }
            )
            others = [starts[i] for i in range(4 if queries > 1 else 3) if i != support]
            roles = {
                "prediction": [at],
                "query_key": [at],
                "support_key": [starts[support]],
                "support_value": [starts[support] + 1],
                "all_query_relation": [starts[support], starts[support] + 1, at],
                "key_distractors": others,
                "value_distractors": [place + 1 for place in others],
            }
            for role, places in roles.items():
                positions += [
                    {
                        "probe": "probe", "event": event, "kind": "role", "role": role, "position": place,
                        "token": tokens[place], "text": vocabulary[tokens[place]],
                    }
                    for place in places
                ]  # fmt: skip
        examples.append(
            {
                "probe": "probe",
                "example": example,
                "sample_id": sample,
                "split": events[-1]["split"],
                "tokens": tokens,
            }
        )
    held = sorted({(events[row["event"]]["example"], row["position"]) for row in positions})
    rows = {place: row for row, place in enumerate(held)}
    weights = {
        "token_embedding.weight": rng.normal(size=(len(steps), len(vocabulary), d_model)),
        "final_norm.weight": 1 + 0.2 * rng.normal(size=(len(steps), d_model)),
        "final_norm.bias": 0.2 * rng.normal(size=(len(steps), d_model)),
    }
    activations = {stage: rng.normal(size=(len(steps), len(rows), d_model)) for stage in stages}
    codes = rng.normal(size=(len(vocabulary), d_model))
    answers = {
        rows[event["example"], event["prediction_position"]]: event["answer_token"] for event in events
    }
    for (example, position), row in rows.items():
        token = answers.get(row, examples[example]["tokens"][position])
        for depth, array in enumerate(activations.values()):
            for number in range(len(steps)):
                array[number, row] += codes[token] * 2.0 * depth * (number + 1) / len(stages) / len(steps)
    made = SimpleNamespace(
        run="ref", steps=list(steps), vocabulary=vocabulary, examples=examples, events=events, positions=positions,
        rows=rows, value_tokens=value_tokens, codes=codes, stages=stages,
        weights={name: array.astype(np.float32) for name, array in weights.items()},
        activations={stage: array.astype(np.float32) for stage, array in activations.items()},
        readouts=[], name=name, layer_norm_eps=EPSILON, modules=("token_embedding", "final_norm", "final_norm"),
    )  # fmt: skip
    if change:
        change(made)
    made.readouts = made.readouts or _readouts(made)
    made.lake = Lake.open_or_create(path)
    _write(made)
    return made


def _readouts(made):
    """Logits of the final states, by one loop per event."""
    found = []
    for number, step in enumerate(made.steps):
        unembedding = made.weights["token_embedding.weight"][number].astype(np.float64)
        for event in made.events:
            row = made.rows[event["example"], event["prediction_position"]]
            logits = unembedding @ made.activations["final_norm"][number, row].astype(np.float64)
            wrong = max(event["competitors"], key=lambda token, logits=logits: logits[token])
            answer = event["answer_token"]
            found.append(
                {
                    "probe": "probe", "step": step, "event": event["event"], "stage": "logits",
                    "answer_logit": logits[answer], "best_wrong_token": wrong, "best_wrong_logit": logits[wrong],
                    "value_margin": logits[answer] - logits[wrong], "best_token": int(logits.argmax()),
                    "answer_log_prob": logits[answer] - np.log(np.exp(logits).sum()),
                    "correct": bool(logits.argmax() == answer),
                }
            )  # fmt: skip
    return found


def _write(made):
    probe, layout = {"probe": "probe"}, {"probe": "probe", "layout": "roles"}
    steps = made.steps
    with made.lake.unit(Unit("run", made.run, "run")) as writer:
        writer.rows("runs", [{"source": "train", "historical_replay": "exact", "store": "full"}])
        writer.rows(
            "parameters",
            [
                {
                    "parameter": name, "position": i, "shape": list(array.shape[1:]), "numel": array[0].size,
                    "module": made.modules[i], "is_bias": name.endswith("bias"),
                }
                for i, (name, array) in enumerate(made.weights.items())
            ],
        )  # fmt: skip
        writer.rows(
            "stages",
            [
                {
                    "stage": stage,
                    "position": i,
                    "layer_norm_eps": made.layer_norm_eps if stage == "final_norm" else None,
                }
                for i, stage in enumerate(made.stages)
            ],
        )
    with made.lake.unit(Unit("weights", made.run, "weights", tuple(steps))) as writer:
        block = writer.tensor_rows("weights", steps, 1)
        for name, array in made.weights.items():
            block.write(name, array)
    splits = list(dict.fromkeys(example["split"] for example in made.examples))
    with made.lake.unit(Unit("probe", made.run, "probe", parameters=probe)) as writer:
        writer.rows(
            "probes",
            [
                {
                    "probe": "probe", "source": "symbolic_kv", "num_examples": len(made.examples),
                    "num_events": len(made.events), "splits": splits, "vocabulary": made.vocabulary,
                    "value_tokens": made.value_tokens,
                }
            ],
        )  # fmt: skip
        writer.rows("probe_examples", made.examples)
        writer.rows("events", made.events)
        writer.rows("positions", made.positions)
        writer.rows(
            "activation_rows",
            [
                {"probe": "probe", "layout": "roles", "row": row, "example": example, "position": position}
                for (example, position), row in made.rows.items()
            ],
        )
    with made.lake.unit(
        Unit("activations", made.run, "activations", tuple(steps), parameters=layout)
    ) as writer:
        block = writer.tensor_rows("activations", steps, 1)
        for stage, array in made.activations.items():
            block.write(f"probe/roles/{stage}", array)
    with made.lake.unit(Unit("readouts", made.run, "readouts", tuple(steps), parameters=probe)) as writer:
        writer.rows("readouts", made.readouts)
