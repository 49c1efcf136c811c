"""The value-code definitions by loops over events in float64, from a lake's facts: shares nothing with the reports."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np

from .float64_decoder import Decoder, load_weights

EPSILON = 1e-5


def facts(lake, run="ref", splits=(), max_records=None):
    """Events in order, each with `roles` {role: [(position, token), …]}; value tokens; texts."""

    def rows(query):
        return lake.sql(query).pl().to_dicts()

    examples = [
        row["example"]
        for row in rows(
            f"SELECT example, split FROM probe_examples WHERE run = '{run}' AND probe = 'probe' ORDER BY example"
        )
        if not splits or row["split"] in splits
    ][:max_records]
    events = [
        row
        for row in rows(f"SELECT * FROM events WHERE run = '{run}' AND probe = 'probe' ORDER BY event")
        if row["example"] in set(examples)
    ]
    roles = defaultdict(lambda: defaultdict(list))
    for row in rows(
        f"SELECT * FROM positions WHERE run = '{run}' AND probe = 'probe' AND kind = 'role' ORDER BY position"
    ):
        roles[row["event"]][row["role"]].append((row["position"], row["token"]))
    for event in events:
        event["roles"] = roles[event["event"]]
    (probe,) = rows(f"SELECT * FROM probes WHERE run = '{run}' AND probe = 'probe'")
    places = {
        (row["example"], row["position"]): row["row"]
        for row in rows(
            f"SELECT * FROM activation_rows WHERE run = '{run}' AND probe = 'probe' AND layout = 'roles'"
        )
    }
    finals = {
        (row["step"], row["event"]): row
        for row in rows(
            f"SELECT * FROM readouts WHERE run = '{run}' AND probe = 'probe' AND stage = 'logits'"
        )
    }
    return SimpleNamespace(
        lake=lake,
        run=run,
        weights={},
        events=events,
        values=probe["value_tokens"],
        text=probe["vocabulary"],
        places=places,
        finals=finals,
    )


def stored_state(of, step, stage):
    """(event, positions) -> mean of the stored vectors there."""
    array = of.lake.tensor("activations", f"probe/roles/{stage}", of.run).read(step).astype(np.float64)

    def at(event, positions):
        total = np.zeros(array.shape[1])
        for position in positions:
            total = total + array[of.places[event["example"], position]]
        return total / len(positions)

    return at


def weights(of, step, name):
    if (step, name) not in of.weights:
        of.weights[step, name] = of.lake.tensor("weights", name, of.run).read(step).astype(np.float64)
    return of.weights[step, name]


def lens(of, step, stage, event, x):
    """Value metrics of a vector at a stage, as the definitions name them."""
    if stage != "final_norm":
        mean = sum(x) / len(x)
        variance = sum((value - mean) ** 2 for value in x) / len(x)
        x = (x - mean) / math.sqrt(variance + EPSILON) * weights(of, step, "final_norm.weight")
        x = x + weights(of, step, "final_norm.bias")
    logits = weights(of, step, "token_embedding.weight") @ x
    answer = event["answer_token"]
    wrong = max((token for token in of.values if token != answer), key=lambda token: (logits[token], -token))
    best = max(of.values, key=lambda token: (logits[token], -token))
    return {
        "correct_value_logit": float(logits[answer]),
        "best_wrong_value_logit": float(logits[wrong]),
        "value_margin": float(logits[answer] - logits[wrong]),
        "best_value_token_id": best,
        "best_value_token": of.text[best],
        "value_accuracy": float(best == answer),
    }


def group_token(event, group_by, role):
    if group_by == "position_token":
        return event["roles"][role][0][1]
    return event["answer_token"] if group_by == "answer_value" else event["roles"][group_by][0][1]


def cosine(a, b):
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def token_means(vectors, tokens):
    """{token: mean vector}, tokens ascending."""
    return {
        token: np.mean([vector for vector, own in zip(vectors, tokens, strict=True) if own == token], axis=0)
        for token in sorted(set(tokens))
    }


def identity_basis(vectors, tokens, rank):
    """(basis with directions in columns, singular values, numerical rank) of the centred token means."""
    means = np.array(list(token_means(vectors, tokens).values()))
    return principal(means, rank)


def principal(rows, rank):
    """From the eigenvectors of the covariance of the rows, by size."""
    centered = rows - rows.mean(0)
    squares, directions = np.linalg.eigh(centered.T @ centered)
    values = np.sqrt(np.maximum(squares[::-1], 0))
    numerical = int(sum(values > values[0] * max(centered.shape) * np.finfo(np.float32).eps))
    return directions[:, ::-1][:, :rank], values[:rank], numerical


def classified(vector, own, centroids):
    """CENTROID columns from {token: centroid}; unscored when the own token has none."""
    if own not in centroids:
        return dict.fromkeys(CENTROID) | {"centroid_scored": False}
    cosines = {token: cosine(vector, centroid) for token, centroid in centroids.items()}
    prediction = min(token for token in cosines if cosines[token] >= max(cosines.values()) - 1e-12)
    wrong = max(value for token, value in cosines.items() if token != own)
    return {
        "centroid_scored": True,
        "centroid_prediction_token_id": prediction,
        "centroid_prediction_correct": prediction == own,
        "centroid_true_cosine": cosines[own],
        "centroid_best_wrong_cosine": wrong,
        "centroid_cosine_margin": cosines[own] - wrong,
    }


CENTROID = (
    "centroid_scored",
    "centroid_prediction_token_id",
    "centroid_prediction_correct",
    "centroid_true_cosine",
    "centroid_best_wrong_cosine",
    "centroid_cosine_margin",
)


def r_squared(actual, predicted):
    mean = sum(actual) / len(actual)
    total = sum((value - mean) ** 2 for value in actual)
    return (
        None
        if total <= 1e-12
        else 1 - sum((a - p) ** 2 for a, p in zip(actual, predicted, strict=True)) / total
    )


def forward_state(of, step, stage, heads=4):
    """As `stored_state`, from a forward pass in float64 over the tokens."""
    model = Decoder(load_weights(of.lake, of.run, step), heads)
    tokens = of.lake.sql(
        f"SELECT example, tokens FROM probe_examples WHERE run = '{of.run}' AND probe = 'probe'"
    ).fetchall()
    wanted = {event["example"] for event in of.events}
    states = {example: model.forward(ids).stages[stage] for example, ids in tokens if example in wanted}
    return lambda event, positions: np.mean(
        [states[event["example"]][position] for position in positions], axis=0
    )
