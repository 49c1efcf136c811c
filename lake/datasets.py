"""What extractors make and reports need, as plain data, so that neither imports the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .steps import select_steps


@dataclass(frozen=True)
class Need:
    """A dataset a report reads, with the parameters it must have been made with.

    `steps` says which of the run's steps: "selected" (those of `--steps`), "any" (whatever there is), or, as `--steps`
    takes it, some of the selected ones ("last", "5250,8000"). Steps it names that are not selected are ignored. Datasets
    of intervals are needed between neighbouring selected steps.
    """

    dataset: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    steps: str = "selected"


def need_steps(need: Need, selected: Sequence[int]) -> list[int]:
    """Which of the selected steps a need is about, ascending."""
    if need.steps in ("selected", "any"):
        return sorted(selected)
    chosen = set(selected)
    return [step for step in select_steps(need.steps, selected) if step in chosen]


def need_intervals(selected: Sequence[int]) -> list[tuple[int, int]]:
    """The intervals between neighbouring selected steps: (source, target), ascending."""
    return list(pairwise(sorted(set(selected))))


# Made while training, by `lakebed train`, `lakebed trace` or a Recorder; the rest comes from `lakebed extract`.
TRACE = "trace"
CHECKPOINT = "checkpoint"
EVALUATION = "evaluation"
RUN = "run"
RECORDED = (TRACE, CHECKPOINT, EVALUATION, RUN)

SVD = "svd"
WEIGHTS = "weights"
MOMENTS = "moments"

# Made by `lakebed probe`; everything below it is made by forward passes over a probe, parameter {"probe": NAME, …}.
PROBE = "probe"
ACTIVATIONS = "activations"  # layout: roles or all
ATTENTION = "attention"  # query_role
READOUTS = "readouts"
HEAD_WRITES = "head_writes"  # query_role
COMPONENT_LOGITS = "component_logits"
QK_COORDINATES = "qk_coordinates"  # head (L2H1), stage, layernorm_mode
INTERVENTIONS = "interventions"  # see `interventions.intervention_parameters`
DEFAULT_PROBE = "probe"

# Made between two steps, source < target: gradient of a scalar times the update and its terms, and the update's norms.
ATTRIBUTIONS = "attributions"  # see `attribution_parameters`
UPDATE_NORMS = "update_norms"
SCALAR_CHANGES = "scalar_changes"  # see `scalar_change_parameters`
SCORE_CHANGES = "score_changes"  # see `score_change_parameters`
GRADIENT_PRODUCTS = "gradient_products"  # see `gradient_product_parameters`
OF_INTERVALS = (ATTRIBUTIONS, UPDATE_NORMS, SCALAR_CHANGES, SCORE_CHANGES, GRADIENT_PRODUCTS)
# Of a step: a scalar on pairs, and the whole gradient of its mean.
SCALAR_GRADIENTS = "scalar_gradients"  # see `scalar_gradient_parameters`

# Made by `lakebed pipeline cross-seed`: the scan of all heads of a seed's run, and what updates did to the chosen ones.
CROSS_SEED = "cross_seed"
CROSS_SEED_UPDATES = "cross_seed_updates"

# The corrupted records of a probe's pairs are a probe of that name.
CORRUPTED = ".corrupted"
PAIR_TYPES = ("query_key", "support_value", "recency", "distractor")

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


def _pairs(
    probe: str, pair_type: Sequence[str], split: Sequence[str], max_pairs_per_type: int
) -> dict[str, Any]:
    """A selection of pairs of a probe."""
    return {"probe": probe, **select(pair_type, split, max_pairs_per_type)}


def select(pair_type: Sequence[str], split: Sequence[str], max_pairs_per_type: int) -> dict[str, Any]:
    """Which pairs of a probe; the order in which types and splits are named does not matter."""
    return {
        "pair_type": sorted(set(pair_type)),
        "split": sorted(set(split)),
        "max_pairs_per_type": max_pairs_per_type,
    }


def attribution_parameters(
    scalar: str,
    parameters: Mapping[str, Any],
    *,
    pair_type: Sequence[str],
    probe: str = DEFAULT_PROBE,
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
    integrate: int = 0,
) -> dict[str, Any]:
    """Parameters of dataset attributions: which scalar, with every parameter it has, on which pairs.

    `integrate` is the number of points on the path at which the gradient is taken too; 0 for the source alone.
    """
    return {
        **_pairs(probe, pair_type, split, max_pairs_per_type),
        "integrate": integrate,
        "scalar": scalar,
        "parameters": dict(parameters),
    }


def scalar_change_parameters(
    scalar: str,
    parameters: Mapping[str, Any],
    *,
    pair_type: Sequence[str],
    probe: str = DEFAULT_PROBE,
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
) -> dict[str, Any]:
    """Parameters of dataset scalar_changes: those of attributions, without gradients, so that they are another spec."""
    return {
        **_pairs(probe, pair_type, split, max_pairs_per_type),
        "gradient": False,
        "scalar": scalar,
        "parameters": dict(parameters),
    }


def scalar_gradient_parameters(
    scalar: str,
    parameters: Mapping[str, Any],
    *,
    pair_type: Sequence[str],
    probe: str = DEFAULT_PROBE,
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
) -> dict[str, Any]:
    """Parameters of dataset scalar_gradients: those of attributions, without a path."""
    made = attribution_parameters(
        scalar,
        parameters,
        pair_type=pair_type,
        probe=probe,
        split=split,
        max_pairs_per_type=max_pairs_per_type,
    )
    return {name: value for name, value in made.items() if name != "integrate"}


def gradient_product_parameters(
    scalars: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    scalar_pair_type: str,
    data_group_field: Sequence[str],
    loss_side: str,
    pair_type: Sequence[str],
    probe: str = DEFAULT_PROBE,
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
) -> dict[str, Any]:
    """Parameters of dataset gradient_products: scalars (of the pairs of one type, or `__all__`), the fields by which all
    pairs are grouped, and the records (clean, corrupted, both) whose language-model loss each group has."""
    return {
        **_pairs(probe, pair_type, split, max_pairs_per_type),
        "scalars": [{"scalar": name, "parameters": dict(parameters)} for name, parameters in scalars],
        "scalar_pair_type": scalar_pair_type,
        "data_group_field": list(dict.fromkeys(data_group_field)),
        "loss_side": loss_side,
    }


def score_change_parameters(
    head: str,
    roles: Mapping[str, str],
    record_side: str,
    *,
    pair_type: Sequence[str],
    probe: str = DEFAULT_PROBE,
    split: Sequence[str] = (),
    max_pairs_per_type: int = 64,
) -> dict[str, Any]:
    """Parameters of dataset score_changes: a head (L2H1), its three roles, the record that is scored, the pairs."""
    return {
        **_pairs(probe, pair_type, split, max_pairs_per_type),
        "head": head,
        "record_side": record_side,
        **roles,
    }
