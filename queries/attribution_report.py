"""What attribution reports share: their pairs, their intervals, how contributions are grouped, and what is said of "
"them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..lake.datasets import ATTRIBUTIONS, UPDATE_NORMS, Need, attribution_parameters
from ..lake.names import canonical_json, spec_id
from .attribution_sql import DECOMPOSITION, PRELUDE
from .markdown import percent
from .pair_selection import PairOptions, RecordSide
from .probe_report import HeadReport, ProbeReport, require_roles, require_stages
from .separation_sql import QK_RANKS, SEPARATIONS

if TYPE_CHECKING:
    from ..lake import Lake
    from .results import Results

Decomposition = Literal[
    "parameter_tensors", "module_blocks", "attention_projections", "attention_heads", "mlp_neurons"
]
_KINDS: Mapping[str, tuple[str, ...]] = {
    "parameter_tensors": ("parameter_tensor",),
    "module_blocks": ("module_block",),
    "attention_projections": ("attention_projection",),
    "attention_heads": ("attention_head_projection", "attention_head"),
    "mlp_neurons": ("mlp_neuron",),
}
ARITHMETIC = (
    "The terms say what the update is the sum of. That is arithmetic and not a counterfactual: without one of them "
    "the later gradients, and the denominator that all Adam terms share, would have been others."
)


class AttributionReport(PairOptions):
    """Base of reports on what updates did to scalars of causal patch pairs.

    Its SQL begins with the views of `attribution_sql`, then the `more_views` of each of its bases. `scalars` says what is
    attributed.
    """

    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "checkpoints"

    min_error_denominator: float = Field(1e-9, gt=0, description="smallest denominator of a relative error")

    def scalars(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """(scalar, every parameter of it), in the order of the report."""
        raise NotImplementedError

    def points(self) -> int:
        """Points on the path from source to target at which gradients are taken too; 0 for none."""
        return 0

    def group_kinds(self) -> Sequence[str]:
        """Kinds of parameter groups that contributions are summed over, beside the whole model."""
        return ()

    def group_ids(self) -> Sequence[str]:
        """Groups beside those of `group_kinds`."""
        return ()

    def attributions(self) -> list[dict[str, Any]]:
        """Dataset parameters, one for each of `scalars`."""
        return [
            attribution_parameters(
                scalar,
                parameters,
                pair_type=self.pair_type,
                probe=self.probe,
                split=self.split,
                max_pairs_per_type=self.max_pairs_per_type,
                integrate=self.points(),
            )
            for scalar, parameters in self.scalars()
        ]

    def needs(self) -> tuple[Need, ...]:
        """Attributions of every scalar, and the norms of the updates."""
        return (*(Need(ATTRIBUTIONS, of) for of in self.attributions()), Need(UPDATE_NORMS))

    def parameters(self) -> dict[str, Any]:
        """Adds the specs of the scalars and the groups."""
        held = self.attributions()
        return {
            **super().parameters(),
            "spec": [spec_id(of) for of in held],
            "spec_parameters": [canonical_json({"scalar": of["scalar"], **of["parameters"]}) for of in held],
            "group_kinds": ["global_all", *self.group_kinds()],
            "group_ids": list(self.group_ids()) or [""],
        }

    @classmethod
    def sql_text(cls) -> str:
        """The pairs' views, the shared ones, then those of the report."""
        own = super(ProbeReport, cls).sql_text()
        views = [vars(base)["more_views"] for base in reversed(cls.__mro__) if "more_views" in vars(base)]
        return "\n".join([f"{super().sql_text().removesuffix(own)}{PRELUDE}", *views, own])


class DecomposedReport(AttributionReport):
    """Base of those over any interval, with the contributions of parameter groups."""

    more_views: ClassVar[str] = DECOMPOSITION

    decompose: tuple[Decomposition, ...] = Field(
        ("parameter_tensors", "module_blocks", "attention_projections", "attention_heads", "mlp_neurons"),
        description="how contributions are grouped; default all five",
    )
    top_k_groups: int = Field(24, ge=1, description="groups in the summary, largest contribution first")
    integrate: int = Field(
        0,
        ge=0,
        le=64,
        description="points on the straight path from source to target at which the gradient is taken too "
        "(Gauss-Legendre), so that contributions add up to the actual change; 0: at the source alone",
    )

    @field_validator("decompose")
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    def points(self) -> int:
        """`--integrate`."""
        return self.integrate

    def warnings(self, results: Results) -> list[str]:
        """That the path was not followed closely enough for contributions to add up to the change."""
        worst = results.first(
            "SELECT source_step, target_step, integrated_relative_error AS error FROM metrics "
            "WHERE split = '__all__' AND pair_type = '__all__' AND integrated_relative_error > 0.01 "
            "AND absolute_error > $min_error_denominator ORDER BY error DESC LIMIT 1",
            min_error_denominator=self.min_error_denominator,
        )
        lines = super().warnings(results)
        if worst is None:
            return lines
        return [
            *lines,
            f"Integrated with {self.integrate} points, contributions are still {percent(worst['error'])} off the change "
            f"from step {worst['source_step']} to {worst['target_step']}: raise --integrate, or take shorter intervals.",
        ]

    def group_kinds(self) -> Sequence[str]:
        """Those of `--decompose`."""
        return [kind for mode in self.decompose for kind in _KINDS[mode]]


class SeparationOptions(HeadReport):
    """Options of reports on one head's query position, its support keys and its distractor keys."""

    score_query_role: str = Field(..., description="role of the attending position; must be one position")
    support_key_role: str = Field(..., description="role the head should attend to")
    distractor_key_role: str = Field(..., description="role it should not attend to")

    @model_validator(mode="after")
    def _has_two_roles(self) -> SeparationOptions:
        if self.support_key_role == self.distractor_key_role:
            raise ValueError(f"--support-key-role and --distractor-key-role are both {self.support_key_role}")
        return self

    def role_parameters(self) -> dict[str, Any]:
        """As a scalar takes them."""
        return {
            "score_query_role": self.score_query_role,
            "support_key_role": self.support_key_role,
            "distractor_key_role": self.distractor_key_role,
        }

    def require(self, lake: Lake, run: str) -> None:
        """The roles must be there."""
        super().require(lake, run)
        require_roles(
            lake, run, self.probe, self.score_query_role, self.support_key_role, self.distractor_key_role
        )


class QKRankOptions(SeparationOptions):
    """Options of reports on the rank-r QK separation of one head (definitions 3 §A), and the views they share."""

    more_views: ClassVar[str] = f"{QK_RANKS}\n{SEPARATIONS}"

    rank: tuple[int, ...] = Field(
        ..., min_length=1, description="singular directions of W_QK that the score is cut to"
    )
    context_stage: str = Field(..., description="residual stage that is scored")
    layernorm_mode: Literal["head_ln1", "none"] = Field(
        "head_ln1", description="through the head's own LayerNorm, or not"
    )

    @field_validator("rank")
    @classmethod
    def _positive_once(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(value < 1 for value in values):
            raise ValueError("must be at least 1")
        return tuple(dict.fromkeys(values))

    def qk_rank_scalars(self, sides: Sequence[RecordSide]) -> list[tuple[str, dict[str, Any]]]:
        """One scalar per record side and rank."""
        return [
            (
                "qk_rank_separation",
                {
                    **self.role_parameters(),
                    "head": self.head_label,
                    "rank": rank,
                    "stage": self.context_stage,
                    "layernorm_mode": self.layernorm_mode,
                    "record_side": side,
                },
            )
            for side in sides
            for rank in self.rank
        ]

    def require(self, lake: Lake, run: str) -> None:
        """The stage must be there, and the rank within the head's width."""
        super().require(lake, run)
        require_stages(lake, run, self.context_stage)
        require_rank(lake, run, self.report_name(), max(self.rank))


def require_rank(lake: Lake, run: str, report: str, rank: int) -> None:
    """Raises InvalidOption for more directions than a head is wide: W_QK and W_OV have no more."""
    from .report import InvalidOption

    (width,) = lake.session.execute(
        "SELECT max(row_stop - row_start) FROM slices WHERE run = ? AND slice_kind = 'head_projection' "
        "AND slice LIKE '%.q_proj' AND column_start = 0 AND column_stop > 1",
        [run],
        tables={"slices"},
    ).fetchall()[0]
    if width is not None and rank > width:
        raise InvalidOption(
            f"{report}: --rank {rank} exceeds the width of a head, {width}: W_QK has no more singular directions"
        )
