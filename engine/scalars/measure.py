"""Values of scalars over batches of pairs, and the gradients of their sums, in as few passes as they need.

One forward pass per batch and record side serves every scalar, at the source of one interval and the target of another.
Gradients are linear in pairs: they are summed over the pairs of each batch, and cells of pairs are put together from those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..forward import Model
from . import Basis, Evaluation, PairPass, Pairs, Passes, Scalar, ScalarError


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one cell that go through the model together."""

    pairs: Pairs
    cell: int
    """Index of the finest cell they belong to."""


@dataclass
class Frozen:
    """What of a scalar stays as it was at the source."""

    basis: Basis
    per_batch: list[Mapping[str, Tensor]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether the scalar is the same whatever it was frozen at."""
        return not self.basis.tensors and not any(self.per_batch)


@dataclass
class Task:
    """One scalar to evaluate at some weights; `value` and `quantities` are `Float64[pair]`, batch after batch."""

    scalar: Scalar
    frozen: Frozen | None = None
    """Of the source; None: freeze it here."""
    cells: int = 0
    """Finest cells to differentiate over; 0: no gradient."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Name to `Float[cell, *parameter]`: of the weighted sum over the cell's pairs. Absent where nothing reaches."""
    value: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    weight: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    quantities: dict[str, Tensor] = field(default_factory=dict)

    def add(self, evaluation: Evaluation) -> None:
        """Notes the values of one more batch."""
        value = evaluation.value.detach()
        weight = torch.ones_like(value) if evaluation.weight is None else evaluation.weight
        self.value = torch.cat([self.value, value.double().cpu()])
        self.weight = torch.cat([self.weight, weight.double().cpu()])
        for name, of in evaluation.quantities.items():
            before = self.quantities.get(name, torch.empty(0, dtype=torch.float64))
            self.quantities[name] = torch.cat([before, of.detach().double().cpu()])

    def differentiate(
        self, evaluation: Evaluation, leaves: Mapping[str, Tensor], cell: int, keep_graph: bool
    ) -> None:
        """Adds the gradient of one more batch's weighted sum. Raises ScalarError if it reaches no weight."""
        value = evaluation.value
        total = (value if evaluation.weight is None else value * evaluation.weight).sum()
        found: Sequence[Tensor | None] = (
            torch.autograd.grad(total, list(leaves.values()), retain_graph=keep_graph, allow_unused=True)
            if total.requires_grad
            else []
        )
        if not any(of is not None for of in found):
            raise ScalarError(f"scalar {self.scalar.name} reaches no parameter: it has no gradient")
        for name, of in zip(leaves, found, strict=True):
            if of is None:
                continue
            if name not in self.gradients:
                self.gradients[name] = torch.zeros(self.cells, *of.shape)
            self.gradients[name][cell] += of.cpu()


def measure(
    model: Model,
    leaves: Mapping[str, Tensor],
    batches: Sequence[PairBatch],
    tasks: Sequence[Task],
    observers: Sequence[Callable[[Passes], None]] = (),
) -> None:
    """Fills `tasks`, and shows every batch's passes to `observers`, without gradients.

    `leaves` are the weights the model was loaded from, requiring gradients where a task wants them.
    """
    for task in tasks:
        task.scalar.check(model)
        if task.frozen is None:
            task.frozen = Frozen(task.scalar.basis(model, batches[0].pairs.token_classes))
    differentiating = [task for task in tasks if task.cells]
    for number, batch in enumerate(batches):
        with torch.set_grad_enabled(bool(differentiating)):
            passes = Passes(
                model,
                batch.pairs,
                {
                    side: PairPass(
                        model.forward(records.distinct, capture=("stages", "attention")), records.row
                    )
                    for side, records in batch.pairs.sides.items()
                },
            )
        with torch.no_grad():
            for observe in observers:
                observe(passes)
        for task in tasks:
            frozen = task.frozen
            assert frozen is not None
            if len(frozen.per_batch) == number:
                frozen.per_batch.append(
                    {name: of.detach() for name, of in task.scalar.freeze(passes, frozen.basis).items()}
                )
            with torch.set_grad_enabled(bool(task.cells)):
                evaluation = task.scalar.evaluate(passes, frozen.basis, frozen.per_batch[number])
            task.add(evaluation)
            if task.cells:
                task.differentiate(evaluation, leaves, batch.cell, task is not differentiating[-1])


def combine(gradients: Mapping[str, Tensor], members: Tensor) -> dict[str, Tensor]:
    """`Float[finest, *parameter]` by name, and `Float[cell, finest]`: the weighted sums `Float[cell, *parameter]`."""
    return {
        name: (members.to(of) @ of.reshape(len(of), -1)).reshape(-1, *of.shape[1:])
        for name, of in gradients.items()
    }
