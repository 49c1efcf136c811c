"""Scalars of answers, components' DLAs and zeroed components in torch float64, by autograd (definitions 4 §0.10, §0.12), and a
lake that has what the output-side reports need. It shares no code with engine, extractors or SQL."""

import json
import math
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from lakebed.extractors.plan import extract
from lakebed.lake import Lake, Unit
from lakebed.lake.datasets import INTERVENTIONS, WEIGHTS, Need
from lakebed.lake.names import spec_id
from lakebed.queries.registry import load_report
from lakebed.queries.run import run_report

from tests.trained_probe_lake import RUN, STEPS

from .float64_decoder import load_weights
from .route_reference import load_pairs

LAYERS, HEADS = 2, 4
TYPES, MOST = ("query_key", "support_value"), 4
SIDES = ("clean", "corrupted")
COMPONENTS = ("embedding", *(f"L{i}{of}" for i in range(LAYERS) for of in ("H0", "H1", "H2", "H3", "MLP")))
SCALARS = (
    "moving_answer_margin",
    "fixed_source_competitor_margin",
    "fixed_target_competitor_margin",
    "correct_value_logit",
    "source_best_wrong_logit",
    "target_best_wrong_logit",
    "negative_answer_loss",
)
CAUSAL = (SCALARS[6], SCALARS[3], SCALARS[1], SCALARS[2])
OPTIONS = {
    "run": RUN,
    "steps": ",".join(map(str, STEPS)),
    "pair_type": TYPES,
    "max_pairs_per_type": MOST,
    "margin_side": SIDES,
}
# float32 passes in the lake, float64 here.
CLOSE = {"rel": 2e-3, "abs": 2e-5}


def report(name, **options):
    """A report as the tests ask for it; None leaves an option out."""
    given = {**OPTIONS, **options}
    return load_report(name).parse({key: value for key, value in given.items() if value is not None})


def written(lake, asked, out):
    """(rows by key, the report's JSON, its Markdown)."""
    printed = run_report(lake, asked, out, chart_formats=[], overwrite=True)
    rows = {
        key: [json.loads(line) for line in Path(path).read_text().splitlines()]
        for key, path in printed.items()
        if key.endswith("_rows")
    }
    return rows, json.loads(Path(printed["report"]).read_text()), Path(printed["markdown"]).read_text()


def extracted(source, folder, *reports):
    """A copy of the probed lake with what these reports read, and its weights."""
    torch.set_num_threads(1)
    path = folder / "output.lake"
    shutil.copytree(source, path)
    with Lake.open(path) as lake:
        extract(
            lake, RUN, [Need(WEIGHTS), *(need for of in reports for need in of.needs())], OPTIONS["steps"]
        )
    return path


def rewritten(path, folder, parameters, change):
    """A copy in which somebody else wrote the runs of one spec: `change(table, row)` edits each row."""
    copy = folder / "changed.lake"
    shutil.copytree(path, copy)
    spec, held = spec_id(parameters), {}
    with Lake.open(copy) as lake:
        lake.refresh()
        tables = {
            name: lake.table(name, RUN).collect().to_dicts()
            for name in ("intervention_runs", "intervention_components")
        }
        for receipt in lake.receipts.all(RUN, INTERVENTIONS):
            if receipt.spec == spec:
                held[receipt.unit] = tuple(receipt.steps)
                lake.storage.remove(receipt.key)
    assert held
    with Lake.open(copy) as lake:
        for unit, steps in held.items():
            with lake.unit(Unit(INTERVENTIONS, RUN, unit, steps, parameters, {"made": "up"})) as writer:
                for name, rows in tables.items():
                    mine = [row for row in rows if row["spec"] == spec and row["step"] in steps]
                    for row in mine:
                        row.pop("run")
                        change(name, row)
                    writer.rows(name, mine)
    return copy


class Decoder:
    """One checkpoint."""

    def __init__(self, weights):
        self.w = {name: torch.from_numpy(of).double() for name, of in weights.items()}

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def run(self, tokens, position, zeroed=None):
        """(last residual at a position, what every part wrote there by name), with one component's output times 0."""
        w, count = self.w, len(tokens)
        x = w["token_embedding.weight"][list(tokens)] + w["position_embedding.weight"][:count]
        parts = {"embedding": x[position]}
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        for layer in range(LAYERS):
            block = f"blocks.{layer}"
            y = self.norm(f"{block}.ln_1", x)
            q, k, v = (
                self.linear(f"{block}.attn.{p}_proj", y).unflatten(-1, (HEADS, -1)).transpose(0, 1)
                for p in "qkv"
            )
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
            mixed = scores.softmax(-1) @ v
            columns = w[f"{block}.attn.out_proj.weight"].unflatten(1, (HEADS, -1)).unbind(1)
            for head in range(HEADS):
                name = f"L{layer}H{head}"
                write = mixed[head] @ columns[head].T * (name != zeroed)
                parts[name], x = write[position], x + write
            bias = w[f"{block}.attn.out_proj.bias"]
            parts[f"L{layer}.attention_bias"], x = bias, x + bias
            hidden = F.gelu(self.linear(f"{block}.ff.fc_in", self.norm(f"{block}.ln_2", x)))
            write = self.linear(f"{block}.ff.fc_out", hidden) * (f"L{layer}MLP" != zeroed)
            parts[f"L{layer}MLP"], x = write[position], x + write
        return x[position], parts

    def logits(self, residual):
        return self.norm("final_norm", residual) @ self.w["token_embedding.weight"].T


def scalar(name, logits, answer, source_wrong, target_wrong, kind):
    """Table of definitions 4 §0.10."""
    moving = source_wrong if kind == "source" else target_wrong
    return {
        "moving_answer_margin": lambda: logits[answer] - logits[moving],
        "fixed_source_competitor_margin": lambda: logits[answer] - logits[source_wrong],
        "fixed_target_competitor_margin": lambda: logits[answer] - logits[target_wrong],
        "correct_value_logit": lambda: logits[answer],
        "source_best_wrong_logit": lambda: logits[source_wrong],
        "target_best_wrong_logit": lambda: logits[target_wrong],
        "negative_answer_loss": lambda: logits.log_softmax(-1)[answer],
    }[name]()


class World:
    """Weights and pairs of the lake; runs and gradients are made once."""

    def __init__(self, lake):
        lake.refresh()
        self.decoders = {step: Decoder(load_weights(lake, RUN, step)) for step in STEPS}
        self.pairs = {of.pair_id: of for of in load_pairs(lake, RUN, "probe", TYPES, MOST)}
        self.run = cache(self._run)
        self.wrong = cache(self._wrong)
        self.measure = cache(self._measure)

    def _run(self, step, pair_id, side, zeroed=None):
        event = getattr(self.pairs[pair_id], side)
        return self.decoders[step].run(event.tokens, event.prediction, zeroed)

    def _wrong(self, step, pair_id, side):
        """The competitor with the largest logit in the untouched run."""
        event = getattr(self.pairs[pair_id], side)
        logits = self.decoders[step].logits(self.run(step, pair_id, side)[0])
        return max((of for of in event.competitors if of != event.answer), key=lambda of: float(logits[of]))

    def _measure(self, name, source, target, pair_id, side, kind, zeroed=None):
        """(scalar, DLA by part) at one end of an interval, the gradient by autograd."""
        step = source if kind == "source" else target
        residual, parts = self.run(step, pair_id, side, zeroed)
        leaf = residual.clone().requires_grad_()
        answer = getattr(self.pairs[pair_id], side).answer
        wrong = [self.wrong(of, pair_id, side) for of in (source, target)]
        value = scalar(name, self.decoders[step].logits(leaf), answer, *wrong, kind)
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), {part: float(write @ gradient) for part, write in parts.items()}

    def changes(self, name, sides=SIDES):
        """(source, target, pair, side, whether the competitor switches), interval by interval."""
        for source, target in pairwise(STEPS):
            for pair_id in sorted(self.pairs):
                for side in sides:
                    switched = self.wrong(source, pair_id, side) != self.wrong(target, pair_id, side)
                    yield source, target, pair_id, side, switched
