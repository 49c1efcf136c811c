"""Dataset gradient_products: the language-model loss of groups of pairs, its gradient times those of scalars, and times the
update (definitions 2 §D).

Gradients of losses and scalars are taken at the source, in the same passes. They are multiplied parameter by parameter, a
tied one once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine.scalars import SIDES, Scalar, ScalarError, build_scalar
from ..engine.scalars.lm_loss import LanguageModelLoss
from ..engine.scalars.measure import Task, combine, measure
from ..lake import UnitWriter
from ..lake.data_groups import ALL, group_id, group_pairs, group_values
from ..lake.datasets import (
    DEFAULT_PROBE,
    GRADIENT_PRODUCTS,
    attribution_parameters,
    gradient_product_parameters,
)
from ..lake.names import spec_id
from . import dataset
from .forward import probe_of
from .interval import Interval, IntervalExtractor, Source
from .pair_sets import PairSelection, PairSet, load_pairs, select_pairs, side_probe
from .probe_batches import Integers, ProbeData


@dataclass(frozen=True)
class _Groups:
    """Pairs of a selection by data group, cut so finely that a cell is of one group and one pair type."""

    pairs: PairSet
    values: Mapping[str, Mapping[str, Any]]
    """By data group, in report order."""
    cells: Integers
    """`Int[pair]`."""
    members: Tensor
    """`Float64[group, cell]`: 1 where a group holds a cell."""
    scored: Tensor
    """`Bool[cell]`: whether the scalars are of these pairs."""
    of_type: Integers
    """`Bool[pair]`: whether the scalars are of this pair."""

    def mean(self, gradients: Mapping[str, Tensor], cells: Integers) -> dict[str, Tensor]:
        """`Float[cell, *parameter]` by name, sums over the pairs of `cells` (`Int[pair]`): the mean over those that the
        scalars are of, `Float[1, *parameter]`."""
        members = torch.zeros(1, int(cells.max()) + 1, dtype=torch.float64)
        members[0, cells[self.of_type]] = 1 / float(self.of_type.sum())
        return combine(gradients, members)


@dataclass(frozen=True)
class Taken:
    """What a source step gives."""

    losses: Mapping[str, Mapping[str, Any]]
    """By data group: loss, num_pairs, num_records, num_tokens."""
    loss_gradients: Mapping[str, Tensor]
    """`Float[group, *parameter]` by name."""
    scalar_gradients: Mapping[str, Mapping[str, Tensor]]
    """By spec of the scalar's attributions: `Float[1, *parameter]` by name; absent where nothing reaches."""


class GradientProductsExtractor(IntervalExtractor):
    """Tables data_group_losses and gradient_products."""

    name = GRADIENT_PRODUCTS
    version = 1
    needs_moments = False

    def __init__(
        self,
        selection: PairSelection,
        scalars: Sequence[Scalar],
        scalar_pair_type: str,
        data_group_field: Sequence[str],
        loss: LanguageModelLoss,
    ) -> None:
        self.selection, self.scalars, self.scalar_pair_type = selection, tuple(scalars), scalar_pair_type
        self.data_group_field, self.loss = tuple(data_group_field), loss
        self._groups: _Groups | None = None

    def parameters(self) -> Mapping[str, Any]:
        """Scalars, pairs, groups and the side of the loss."""
        return gradient_product_parameters(
            [(scalar.name, scalar.model_dump()) for scalar in self.scalars],
            scalar_pair_type=self.scalar_pair_type,
            data_group_field=self.data_group_field,
            loss_side=self.loss.loss_side,
            **self._selected(),
        )

    def _selected(self) -> dict[str, Any]:
        selection = self.selection
        return {
            "pair_type": selection.pair_type,
            "probe": selection.probe,
            "split": selection.split,
            "max_pairs_per_type": selection.max_pairs_per_type,
        }

    @property
    def key(self) -> str:
        """Identity of all that."""
        return spec_id(dict(self.parameters()))

    @property
    def sides(self) -> list[str]:
        """Records that go through the model."""
        wanted = {*self.loss.sides, *(side for scalar in self.scalars for side in scalar.sides)}
        return [side for side in SIDES if side in wanted]

    def inputs(self, context: dataset.Context) -> Mapping[str, Any]:
        """Identities of the probes whose records are read."""
        return {side: probe_of(context, side_probe(self.selection.probe, side)).sha256 for side in self.sides}

    def open(self, context: dataset.Context, source: Source, device: str) -> None:
        """Losses and gradients at a source; they are found again in `Source.taken`.

        Gradients of scalars that were just taken there for their attributions are not taken again.
        """
        if self._groups is None:
            self._groups = self._group(context)
        groups, count = self._groups, self._groups.members.shape[1]
        loss = Task(self.loss, cells=count)
        tasks = {
            self._spec(scalar): Task(scalar, cells=count)
            for scalar in self.scalars
            if self._spec(scalar) not in source.tasks
        }
        wanted = {*self.loss.sides, *(side for task in tasks.values() for side in task.scalar.sides)}
        probes: dict[str, ProbeData] = {
            side: probe_of(context, side_probe(self.selection.probe, side))
            for side in SIDES
            if side in wanted
        }
        model = context.adapter().load_model(source.weights, device)
        for data in probes.values():
            data.require_fit(model)
        batches = groups.pairs.batches(probes, device, groups.cells)
        first = [batch for batch in batches if groups.scored[batch.cell]]
        rest = [batch for batch in batches if not groups.scored[batch.cell]]
        measure(model, source.weights, first, [*tasks.values(), loss])
        if rest:
            measure(model, source.weights, rest, [loss])
        for name in source.weights:
            if name not in loss.gradients:
                raise ScalarError(
                    f"the language-model loss does not reach parameter {name}: it has no gradient"
                )
        in_order = [
            np.flatnonzero(groups.cells == cell) for cell in dict.fromkeys(of.cell for of in [*first, *rest])
        ]
        cell = torch.from_numpy(groups.cells[np.concatenate(in_order)])
        gradients = {spec: groups.mean(task.gradients, groups.cells) for spec, task in tasks.items()}
        for spec in map(self._spec, self.scalars):
            if spec in source.tasks:
                gradients[spec] = groups.mean(source.tasks[spec].gradients, groups.pairs.finest)
        source.taken[self.key] = self._take(groups, loss, gradients, cell)

    @staticmethod
    def _take(
        groups: _Groups, loss: Task, gradients: Mapping[str, Mapping[str, Tensor]], cell: Tensor
    ) -> Taken:
        """Groups put together from cells; `cell` is that of each pair, in the order they were measured."""
        count = groups.members.shape[1]

        def summed(values: Tensor) -> Tensor:
            return groups.members @ torch.zeros(count, dtype=torch.float64).index_add_(0, cell, values)

        tokens = summed(loss.weight)
        columns = {
            "loss": summed(loss.value * loss.weight) / tokens,
            "num_tokens": tokens,
            "num_records": summed(loss.quantities["num_records"]),
            "num_pairs": summed(torch.ones_like(loss.value)),
        }
        losses = {
            group: {name: of[at].item() for name, of in columns.items()}
            for at, group in enumerate(groups.values)
        }
        return Taken(losses, combine(loss.gradients, groups.members / tokens[:, None]), gradients)

    def _spec(self, scalar: Scalar) -> str:
        return spec_id(attribution_parameters(scalar.name, scalar.model_dump(), **self._selected()))

    def _group(self, context: dataset.Context) -> _Groups:
        pairs = load_pairs(context, self.selection, self.sides)
        values = group_pairs(pairs.rows, self.data_group_field)
        names = [group_id(group_values(row, self.data_group_field)) for row in pairs.rows]
        finest = sorted(set(zip(names, pairs.pair_type, strict=True)))
        place = {of: at for at, of in enumerate(finest)}
        members = torch.tensor(
            [[group in (ALL, name) for name, _ in finest] for group in values], dtype=torch.float64
        )
        scored = torch.tensor([self.scalar_pair_type in (ALL, kind) for _, kind in finest])
        if not bool(scored.any()):
            raise ScalarError(
                f"no pair is of type {self.scalar_pair_type}, which the scalars are of; there are "
                + ", ".join(sorted(set(pairs.pair_type)))
            )
        cells = np.array([place[of] for of in zip(names, pairs.pair_type, strict=True)])
        of_type = np.array([self.scalar_pair_type in (ALL, kind) for kind in pairs.pair_type])
        return _Groups(pairs, values, cells, members, scored, of_type)

    def write(self, context: dataset.Context, writer: UnitWriter, *, interval: Interval) -> None:
        """Writes one interval."""
        taken: Taken = interval.source.taken[self.key]
        assert self._groups is not None
        steps = {"source_step": interval.source_step, "target_step": interval.target_step}
        groups = [
            {
                "spec": self.key,
                **steps,
                "data_group": group,
                "data_group_values": json.dumps(self._groups.values[group]),
                "loss_side": self.loss.loss_side,
                "loss": of["loss"],
                **{name: int(of[name]) for name in ("num_pairs", "num_records", "num_tokens")},
            }
            for group, of in taken.losses.items()
        ]
        writer.rows("data_group_losses", groups)
        writer.rows("gradient_products", list(self._products(taken, interval, steps)))

    def _products(self, taken: Taken, interval: Interval, steps: Mapping[str, int]) -> list[dict[str, Any]]:
        """A row per group, factor and parameter."""
        factors = ["loss", "update", *taken.scalar_gradients]
        rows = []
        for name, before in interval.source.weights.items():
            of_losses = taken.loss_gradients[name].double().flatten(1)
            update = interval.target_weights[name].double() - before.detach().double()
            others = [update.reshape(1, -1)]
            for of in taken.scalar_gradients.values():
                others.append(of[name].double().flatten(1) if name in of else torch.zeros_like(others[0]))
            products = torch.cat(
                [of_losses.square().sum(-1, keepdim=True), of_losses @ torch.cat(others).T], 1
            )
            rows += [
                {
                    "spec": self.key,
                    **steps,
                    "data_group": group,
                    "factor": factor,
                    "parameter": name,
                    "product": product,
                }
                for group, line in zip(taken.losses, products.tolist(), strict=True)
                for factor, product in zip(factors, line, strict=True)
            ]
        return rows


def build(
    scalars: Sequence[Mapping[str, Any]] = (),
    scalar_pair_type: str = ALL,
    data_group_field: Sequence[str] = (),
    loss_side: str = "clean",
    probe: str = DEFAULT_PROBE,
    pair_type: Sequence[str] = (),
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
) -> GradientProductsExtractor:
    """The extractor, for the registry. Raises ScalarError or UnknownName, naming what there is."""
    loss = build_scalar(LanguageModelLoss.name, {"loss_side": loss_side})
    assert isinstance(loss, LanguageModelLoss)
    return GradientProductsExtractor(
        select_pairs(probe, pair_type, split, max_pairs_per_type),
        [build_scalar(of["scalar"], of["parameters"]) for of in scalars],
        scalar_pair_type,
        data_group_field,
        loss,
    )
