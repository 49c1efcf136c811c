"""What extractors make and reports need, as plain data, so that neither imports the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Need:
    """A dataset a report reads, with the parameters it must have been made with.

    `steps` says which of the run's steps: "selected" (those of `--steps`), or "any" (whatever there is).
    """

    dataset: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    steps: str = "selected"


# Made while training, by `lakebed train`, `lakebed trace` or a Recorder; the rest comes from `lakebed extract`.
TRACE = "trace"
CHECKPOINT = "checkpoint"
EVALUATION = "evaluation"
RUN = "run"
RECORDED = (TRACE, CHECKPOINT, EVALUATION, RUN)

SVD = "svd"
WEIGHTS = "weights"

# The matrices of dataset svd, in report order. Products of two head projections have at most head-width ranks.
SVD_MATRICES = ("W_QK", "W_OV", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
VECTOR_LABELS = {
    "W_QK": ("query_residual_direction", "key_residual_direction"),
    "W_OV": ("input_residual_direction", "output_residual_direction"),
    "W_Q": ("head_query_direction", "input_residual_direction"),
    "W_K": ("head_key_direction", "input_residual_direction"),
    "W_V": ("head_value_direction", "input_residual_direction"),
    "W_O": ("output_residual_direction", "head_value_direction"),
    "W_in": ("mlp_hidden_direction", "input_residual_direction"),
    "W_out": ("output_residual_direction", "mlp_hidden_direction"),
}
