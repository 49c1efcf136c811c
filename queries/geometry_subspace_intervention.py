"""geometry-subspace-intervention: what the answer loses without a subspace, or with nothing else (definitions 2 §H)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ..lake.datasets import INTERVENTIONS, Need
from ..lake.interventions import RANDOM_SUBSPACE, edit_stage, intervention, intervention_parameters
from ..lake.names import spec_id
from ..lake.subspaces import Subspace
from .chart import Histogram, Trajectory
from .markdown import number, percent
from .probe_report import ProbeReport
from .report import ReportFailed, RowFile, TextTable
from .route_options import Route, make_route
from .subspace_checks import require_causal_role, require_subspace

if TYPE_CHECKING:
    from ..lake import Lake
    from .results import Results

_CALCULATION = {
    "remove": "z <- z - z B B^T at the role's positions",
    "keep": "z <- z B B^T at the role's positions; all else is zero, the mean too",
    "margin": "answer's logit - largest logit among its competitors, each run with its own best wrong token",
    "margin_drop": "baseline_margin - intervened_margin",
    "accuracy_drop_indicator": "baseline_correct - intervened_correct; correct: the answer has the largest logit of the "
    "whole vocabulary",
    "random_margin_drop_mean": "the same operation with a random subspace of the same rank, mean over the control's seeds",
    "excess_margin_drop_mean": "margin_drop_mean - random_margin_drop_mean",
}
_QUERIES = {
    "query": "query_id",
    "key": "query_key",
    "answer": "answer_value",
    "margin": "baseline_margin",
    "with the intervention": "intervened_margin",
    "margin drop": "margin_drop",
    "random control": "random_margin_drop_mean",
}


class GeometrySubspaceIntervention(ProbeReport):
    """Does the answer need a subspace: what does removing it cost, or keeping nothing else, beside a random one?"""

    stage: str = Field(..., description="residual stage that is changed")
    subspace: Subspace = Field(..., description="subspace of it that is removed, or kept alone")
    rank: PositiveInt = Field(..., description="directions of the subspace, and of its random control")
    head_layer: int | None = Field(None, ge=0, description="layer of the head, for head_… subspaces")
    head: str | None = Field(None, description="head, or both as L2H1, for head_… subspaces")
    operation: Literal["remove", "keep"] = Field(..., description="what is done with the subspace")
    position_role: str = Field(..., description="role whose positions are changed")
    query_mode: Literal["single_query", "batch_union"] = Field(
        ..., description="a run per query, or one per record with the positions of all its queries changed"
    )
    control_seed: NonNegativeInt = Field(0, description="seed of the first random control")
    num_controls: NonNegativeInt = Field(1, le=64, description="random controls of the same rank; 0 for none")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "aggregate_rows": RowFile("geometry_subspace_intervention_aggregate_rows", "aggregate_rows"),
        "query_rows": RowFile("geometry_subspace_intervention_query_rows", "query_rows"),
        "control_rows": RowFile("geometry_subspace_intervention_control_rows", "control_rows"),
    }
    tables = (
        TextTable(
            "final_by_split",
            "At the last step, by split",
            {
                "split": "split",
                "margin": "baseline_margin_mean",
                "with the intervention": "intervened_margin_mean",
                "margin drop": "margin_drop_mean",
                "random control": "random_margin_drop_mean",
                "margin falls for": "margin_drop_positive_fraction",
                "accuracy": "baseline_accuracy",
                "with the intervention ": "intervened_accuracy",
                "random control ": "random_accuracy",
                "queries": "num_query_events",
            },
            "Means over query events. Every margin is of its run's own best wrong token.",
        ),
        TextTable("top_final_positive_margin_drop_queries", "Queries that lose most", _QUERIES),
        TextTable("top_final_negative_margin_drop_queries", "Queries that gain most", _QUERIES),
    )
    charts = (
        Trajectory(
            "margin_drop",
            "drop_chart",
            "What the intervention takes from the answer's margin",
            about="mean over query events of the margin without the intervention less that with it",
            y="margin_drop_mean",
            y_title="margin drop (logits)",
            series="series",
            rank_by="last_abs",
        ),
        Trajectory(
            "accuracy_drop",
            "drop_chart",
            "What the intervention takes from the accuracy",
            about="share of query events answered right without the intervention less that with it",
            y="accuracy_drop",
            y_title="accuracy drop",
            series="series",
            rank_by="last_abs",
        ),
        Histogram(
            "query_margin_drop_histogram",
            "histogram",
            "Margin drop, query by query, at the last step",
            about="query events per bin; of the random controls the mean over seeds",
            x_title="margin drop (logits)",
            y="queries",
            y_title="query events",
            series="series",
        ),
    )
    how_to_read = (
        "`remove` projects the subspace out of the stage at the role's positions; `keep` leaves nothing but "
        "the subspace there, the mean and every other direction are zero. Everything after the stage is "
        "computed anew. Bases are those of each step's own weights.",
        "Compare with the random control: the same operation with a random subspace of the same rank. "
        "Removing any r of d directions costs something, and keeping any r of d costs nearly everything; "
        "what counts is `excess_margin_drop_mean`, for `remove` above zero (needed), for `keep` below "
        "(sufficient). The LayerNorms after it stretch what little is kept, so that a wrong answer may stand far "
        "ahead: read margins beside accuracy.",
        "`single_query` changes only the positions of the query that is measured. `batch_union` changes "
        "those of every query of the record in one run, so that a query also feels what is done for the "
        "others; `patched_positions` lists its own.",
        "A head's subspace has at most as many directions as the head is wide, an identity subspace one less "
        "than tokens of its class. The reference lists d_model of them for a head: those past its width are "
        "arbitrary.",
        "`control_rows` has the aggregates of every seed; `random_…` columns are means over seeds.",
    )
    next_queries = (
        (
            "Which answers depend on the subspace, and which do not?",
            "SELECT s.subspace, s.rank, answer, count(*) AS queries, avg(baseline - intervened) AS margin_drop FROM "
            "interventions AS i JOIN intervention_subspaces AS s USING (run, probe, spec, step, intervention) JOIN "
            "events USING (run, probe, event) WHERE run = $run AND scalar = 'value_margin' AND s.subspace <> 'random' AND "
            "step = (SELECT max(step) FROM intervention_subspaces WHERE run = $run) GROUP BY ALL ORDER BY margin_drop DESC",
        ),
        (
            "How fast does the spectrum of the subspaces fall?",
            "SELECT step, subspace, rank, available_rank, list_sum(list_transform(singular_values[:rank], "
            "lambda s: s * s)) / list_sum(list_transform(singular_values, lambda s: s * s)) AS share FROM "
            "intervention_subspaces WHERE run = $run AND subspace <> 'random' ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (9, 4)
    example: ClassVar[str] = (
        "lakebed query geometry-subspace-intervention --lake demo.lake --run demo --steps 0:1300:130 --stage "
        "layer_1_post_mlp --subspace embedding_value_identity --rank 8 --operation remove --position-role "
        "prediction --query-mode single_query --out removed"
    )
    demo_steps: ClassVar[Literal["states", "checkpoints", "window"]] = "checkpoints"
    demo_options: ClassVar[Mapping[str, Any]] = {
        "stage": "layer_1_post_mlp",
        "subspace": "embedding_value_identity",
        "rank": 8,
        "operation": "remove",
        "position_role": "prediction",
        "query_mode": "single_query",
        "num_controls": 3,
    }

    @model_validator(mode="after")
    def _is_possible(self) -> GeometrySubspaceIntervention:
        if self.subspace == "full_residual":
            raise ValueError(
                f"--operation {self.operation} needs a subspace: full_residual is the whole vector, for patches between the "
                "records of pairs (checkpoint-update-attribution, route-competition-report)"
            )
        self._route()
        return self

    def _route(self) -> Route:
        values = self.model_dump(include={"stage", "subspace", "position_role", "rank", "head_layer", "head"})
        return make_route({"label": self.subspace, **values})

    @property
    def _control_seeds(self) -> list[int]:
        return list(range(self.control_seed, self.control_seed + self.num_controls))

    def _edit(self, subspace: str, head: str | None, seed: int | None) -> dict[str, Any]:
        return edit_stage(
            self.stage,
            self.operation,
            subspace=subspace,
            rank=self.rank,
            head=head,
            position_role=self.position_role,
            seed=seed,
        )

    def _interventions(self) -> dict[str, Any]:
        """Parameters of the dataset: the subspace, and its controls."""
        asked = [intervention(self.subspace, [self._edit(self.subspace, self._route().head_label, None)])]
        asked += [
            intervention(_control(seed), [self._edit(RANDOM_SUBSPACE, None, seed)])
            for seed in self._control_seeds
        ]
        return intervention_parameters(asked, probe=self.probe, query_mode=self.query_mode)

    def needs(self) -> tuple[Need, ...]:
        """One dataset holds the subspace and its controls."""
        return (Need(INTERVENTIONS, self._interventions()),)

    def parameters(self) -> dict[str, Any]:
        """Adds the specification of the interventions, names and seeds of the controls, and what the subspace is of."""
        route = self._route()
        seeds = self._control_seeds
        return {
            **super().parameters(),
            "intervention_spec": spec_id(self._interventions()),
            "control_names": [_control(seed) for seed in seeds] or [""],
            "control_seeds": seeds or [-1],
            "head_label": route.head_label,
            "head_layer": route.head_layer,
            "head": route.head,
        }

    def require(self, lake: Lake, run: str) -> None:
        """Stage, role, head and rank must be there, and the role within the causal prefix."""
        super().require(lake, run)
        require_subspace(lake, run, self.report_name(), self.probe, self._route())
        require_causal_role(lake, run, self.report_name(), self.probe, self.position_role)

    def check(self, results: Results) -> None:
        """Every query is measured in every run, at every step."""
        name = self.report_name()
        wanted = results.value("SELECT count(*) FROM chosen_events")
        if not wanted:
            raise ReportFailed(f"{name}: no event of probe {self.probe!r} is left to measure")
        off = results.first(
            "SELECT step, intervention, count(*) AS held FROM outcomes GROUP BY ALL HAVING held <> $wanted "
            "ORDER BY ALL",
            wanted=wanted,
        )
        if off is not None:
            raise ReportFailed(
                f"{name}: {off['intervention']} has {off['held']} of {wanted} query events at step {off['step']}; the "
                f"probe is not the one it was made with"
            )

    def warnings(self, results: Results) -> list[str]:
        """A missing control, and a model that has no margin to lose."""
        last = results.first("FROM final_all")
        assert last is not None
        said = []
        if not self.num_controls:
            said.append(
                "Without a control (`--num-controls 0`) nobody knows what any subspace of this rank would cost."
            )
        if last["baseline_margin_mean"] <= 0:
            said.append(
                f"At step {last['step']} the untouched mean margin is {number(last['baseline_margin_mean'], 3)}: there is "
                "no answer yet that an intervention could take away."
            )
        return said

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary, and what the basis was cut from at the last step."""
        basis = results.first("FROM bases ORDER BY step DESC LIMIT 1") or {}
        return {
            "calculation": _CALCULATION,
            "subspace": {
                name: value for name, value in basis.items() if name != "step" and value is not None
            },
            "summary": {
                "final_step": results.steps[-1],
                "final_all": results.first("FROM final_all"),
                **{
                    name: results.rows(f"FROM {name}")
                    for name in (
                        "final_by_split",
                        "top_final_positive_margin_drop_queries",
                        "top_final_negative_margin_drop_queries",
                    )
                },
            },
        }

    def findings(self, results: Results) -> list[str]:
        """What it costs at the last step, what a random subspace costs, when that began, and where it differs."""
        last = results.first("FROM final_all")
        assert last is not None
        route = self._route()
        name = self.subspace if route.head_label is None else f"{self.subspace} of {route.head_label}"
        done = "Without" if self.operation == "remove" else "With nothing but"
        lines = [
            f"{done} rank {self.rank} of **{name}** at `{self.stage}` ({self.position_role}) the mean margin at step "
            f"{last['step']} goes from {number(last['baseline_margin_mean'], 3)} to "
            f"**{number(last['intervened_margin_mean'], 3)}** logits, accuracy from {percent(last['baseline_accuracy'])} to "
            f"**{percent(last['intervened_accuracy'])}** of {last['num_query_events']:,} query events; "
            f"{percent(last['margin_drop_positive_fraction'])} of them lose margin."
        ]
        if self.num_controls:
            lines.append(_beside_random(last, self.num_controls, self.operation))
        if len(results.steps) > 1:
            lines.append(_over_training(results))
        return [*lines, *_by_split(results)]


def _control(seed: int) -> str:
    """Name of a control's intervention."""
    return f"{RANDOM_SUBSPACE}_seed_{seed}"


def _beside_random(last: Mapping[str, Any], count: int, operation: str) -> str:
    excess = last["excess_margin_drop_mean"]
    spread = f" (± {number(last['random_margin_drop_std'], 2)} over {count} seeds)" if count > 1 else ""
    compared = (
        f"A random subspace of the same rank takes {number(last['random_margin_drop_mean'], 3)} logits{spread} and leaves "
        f"{percent(last['random_accuracy'])} right: the subspace itself takes {number(abs(excess), 3)} "
        f"{'more' if excess >= 0 else 'less'}"
    )
    if count == 1:
        return f"{compared}. How far random subspaces differ among themselves, `--num-controls 8` tells."
    if abs(excess) <= 2 * last["random_margin_drop_std"]:
        return f"{compared}, which is within what random subspaces differ by."
    if excess * (last["accuracy_drop"] - last["random_accuracy_drop"]) < 0:
        return f"{compared}. In accuracy it is the other way round: read both."
    meaning = {
        ("remove", True): "the answer needs what lies in it",
        ("remove", False): "the answer needs it less than others",
        ("keep", True): "it carries less of the answer than others",
        ("keep", False): "it carries more of the answer than others",
    }[operation, excess >= 0]
    return f"{compared}; {meaning}."


def _over_training(results: Results) -> str:
    first, top = (
        results.first(
            f"SELECT step, margin_drop_mean FROM aggregate_rows WHERE split = '__all__' ORDER BY {order}"
        )
        for order in ("step", "margin_drop_mean DESC, step")
    )
    assert first is not None
    assert top is not None
    return (
        f"The margin drop is {number(first['margin_drop_mean'], 3)} at step {first['step']} and largest, "
        f"{number(top['margin_drop_mean'], 3)}, at step {top['step']}."
    )


def _by_split(results: Results) -> list[str]:
    rows = results.rows(
        "SELECT split, margin_drop_mean FROM final_by_split WHERE split <> '__all__' ORDER BY "
        "margin_drop_mean DESC, split"
    )
    if len(rows) < 2:
        return []
    return [
        f"It takes most in {rows[0]['split']} ({number(rows[0]['margin_drop_mean'], 3)}) and least in {rows[-1]['split']} "
        f"({number(rows[-1]['margin_drop_mean'], 3)})."
    ]
