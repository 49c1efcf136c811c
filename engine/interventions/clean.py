"""The untouched run, from which every intervention departs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..forward import Attended, Model
from ..scalars import Records


@dataclass(frozen=True)
class Clean:
    """The untouched run over distinct records; what follows the last attention is there at the predictions alone."""

    stages: list[Tensor]
    """`Float[record, position, d_model]`, the last two and final_norm `Float[event, d_model]`."""
    attended: list[Attended]
    """A layer each, `Float[record, position, head, d_head]`."""
    mlp: list[Tensor]
    """What each MLP writes, shaped as the stage it makes."""


def clean_run(model: Model, records: Records, *, everywhere: bool = False) -> Clean:
    """Runs the distinct records; `everywhere`: all positions also after the last attention."""
    h = model.embed(records.distinct)
    found = Clean([h], [], [])
    for layer in range(model.n_layers):
        attended = model.attend(layer, h)
        mixed = attended.mixed
        if layer == model.n_layers - 1 and not everywhere:
            h, mixed = (of[records.row, records.prediction] for of in (h, mixed))
        h = h + model.attention_write(layer, mixed)
        write = model.mlp_write(layer, model.neurons(layer, h))
        found.attended.append(attended)
        found.mlp.append(write)
        found.stages.append(h)
        h = h + write
        found.stages.append(h)
    found.stages.append(model.final_norm(h))
    return found
