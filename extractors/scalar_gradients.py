"""Dataset scalar_gradients: a scalar's value on every pair, and the gradient of their mean, whole, as tensors.

For SQL over gradients: cosines between scalars, projections, products with any update. Reports that need products alone take
attributions or gradient_products, a thousandth of the size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..engine.scalars import Scalar, build_scalar
from ..engine.scalars.measure import PairBatch, Task, combine, measure
from ..lake import UnitWriter
from ..lake.datasets import DEFAULT_PROBE, SCALAR_GRADIENTS, scalar_gradient_parameters
from ..lake.names import spec_id
from . import dataset
from .forward import probe_of
from .pair_sets import PairSelection, load_pairs, select_pairs, side_probe
from .probe_batches import ProbeData
from .states import State


class ScalarGradientsExtractor(dataset.Extractor):
    """Table scalars, and quantity scalar_gradients with an array SPEC/PARAMETER each."""

    name = SCALAR_GRADIENTS
    version = 1
    needs_moments = False

    def __init__(self, selection: PairSelection, scalar: Scalar) -> None:
        self.selection, self.scalar = selection, scalar

    def parameters(self) -> Mapping[str, Any]:
        """Scalar and pairs."""
        return scalar_gradient_parameters(
            self.scalar.name,
            self.scalar.model_dump(),
            pair_type=self.selection.pair_type,
            probe=self.selection.probe,
            split=self.selection.split,
            max_pairs_per_type=self.selection.max_pairs_per_type,
        )

    def inputs(self, context: dataset.Context) -> Mapping[str, Any]:
        """Identities of the probes whose records are read."""
        probe = self.selection.probe
        return {side: probe_of(context, side_probe(probe, side)).sha256 for side in self.scalar.sides}

    def extract(self, context: dataset.Context, state: State, writer: UnitWriter) -> None:
        """Writes one step. What the scalar does not reach has a gradient of zeros."""
        spec = spec_id(dict(self.parameters()))
        weights = {name: of.detach().float().clone().requires_grad_() for name, of in state.weights.items()}
        pairs = load_pairs(context, self.selection, self.scalar.sides)
        probes: dict[str, ProbeData] = {
            side: probe_of(context, side_probe(self.selection.probe, side)) for side in self.scalar.sides
        }
        model = context.adapter().load_model(weights, context.device)
        for data in probes.values():
            data.require_fit(model)
        task = Task(self.scalar, cells=1)
        batches = [PairBatch(batch.pairs, 0) for batch in pairs.batches(probes, context.device)]
        measure(model, weights, batches, [task])
        gradients = combine(task.gradients, torch.ones(1, 1, dtype=torch.float64) / task.weight.sum())
        for name, weight in weights.items():
            of = gradients[name][0] if name in gradients else torch.zeros_like(weight)
            context.write_tensor(
                writer, SCALAR_GRADIENTS, f"{spec}/{name}", state.step, of.detach().float().cpu().numpy()
            )
        named = {"value": task.value, **task.quantities}
        head = self.scalar.head_of
        side = self.scalar.sides[0] if len(self.scalar.sides) == 1 else None
        pair = np.repeat(np.arange(pairs.count), len(named))
        writer.rows(
            "scalars",
            {
                "spec": [spec] * len(pair),
                "scalar": [self.scalar.name] * len(pair),
                "scalar_head": [None if head is None else f"L{head[0]}H{head[1]}"] * len(pair),
                "record_side": [side] * len(pair),
                "step": np.full(len(pair), state.step),
                "split": np.array(pairs.split, object)[pair],
                "pair_type": np.array(pairs.pair_type, object)[pair],
                "pair_id": np.array(pairs.pair_id, object)[pair],
                "quantity": np.tile(np.array(list(named), object), pairs.count),
                "value": torch.stack(list(named.values()), 1).reshape(-1).numpy(),
                "weight": task.weight.numpy()[pair],
            },
        )


def build(
    scalar: str = "",
    parameters: Mapping[str, Any] | None = None,
    probe: str = DEFAULT_PROBE,
    pair_type: Sequence[str] = (),
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
) -> ScalarGradientsExtractor:
    """The extractor, for the registry. Raises ScalarError or UnknownName, naming what there is."""
    return ScalarGradientsExtractor(
        select_pairs(probe, pair_type, split, max_pairs_per_type), build_scalar(scalar, parameters or {})
    )
