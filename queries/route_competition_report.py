"""route-competition-report: which of several routes does descent on the data support, and which did training grow?

Definitions 2 §D.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..lake.data_groups import PAIR_FIELDS, group_pairs
from ..lake.datasets import GRADIENT_PRODUCTS, Need, attribution_parameters, gradient_product_parameters
from ..lake.errors import MissingData
from ..lake.names import spec_id
from ..lake.pairs import CHOSEN
from .chart import Bars, Scatter
from .markdown import number, percent
from .pair_selection import PairType
from .report import ReportFailed, RowFile, TextTable
from .results import Results
from .route_options import SeveralRoutes, last_bases

if TYPE_CHECKING:
    from ..lake import Lake

LossSide = Literal["clean", "corrupted", "both"]
_STEM = "route_competition"
_OF_DOMAIN = {
    "source_route_score": "source_route_score",
    "target_route_score": "target_route_score",
    "actual_delta": "actual_route_delta",
    "predicted_delta": "actual_update_predicted_route_delta",
    "relative_error": "actual_update_route_relative_error",
    "sign_match": "actual_update_route_sign_match",
    "route_support": "negative_loss_dot_route_gradient",
    "actual_update_loss_reduction": "loss_reduction_under_actual_update_linearized",
}
_COMBINED = ",\n  ".join(
    f"any_value({column}) FILTER (domain = '{domain}') AS {domain}_{name}"
    for domain in ("eval", "train")
    for name, column in _OF_DOMAIN.items()
)


class RouteCompetitionReport(SeveralRoutes):
    """Which of several routes does descent on the data support, and which did the updates grow?

    A route's subspace is that of each interval's source, frozen there.
    """

    route_pair_type: str = Field(
        ..., description="type of the pairs that routes are scored on; __all__ pools them"
    )
    train_probe: str = Field(
        "", description="probe of training records: lakebed probe build --split train --probe train-probe"
    )
    train_pair_type: tuple[PairType, ...] = Field(
        ..., min_length=1, description="type of causal patch pair of the training records"
    )
    data_group_field: tuple[str, ...] = Field(
        ...,
        min_length=1,
        description="field of a pair by which losses are grouped: pair_type, split, mutation.changed_role, …",
    )
    eval_split: tuple[str, ...] = Field((), description="the same as --split")
    train_split: tuple[str, ...] = Field((), description="split of the training probe; default all of them")
    eval_loss_side: LossSide = Field("both", description="records of --probe whose loss is taken")
    train_loss_side: LossSide = Field("clean", description="records of --train-probe whose loss is taken")

    row_files: ClassVar[Mapping[str, RowFile]] = {
        name: RowFile(f"{_STEM}_{name}", name) for name in ("route_rows", "data_rows", "pair_rows")
    }
    tables = (
        TextTable(
            "combined_rows",
            "The routes, by what training records support",
            {
                "route": "route_label",
                "train support −∇ℓ·∇R": "train_route_support",
                "eval support": "eval_route_support",
                "train change": "train_actual_delta",
                "eval change": "eval_actual_delta",
                "eval first order": "eval_predicted_delta",
                "train score": "train_source_route_score",
                "eval score": "eval_source_route_score",
            },
            about="The last interval, all pairs of each domain. ∇ℓ is the gradient of the records' language-model loss, ∇R "
            "that of the route's score, both at the source. Scores of different subspaces are not normalised.",
        ),
        TextTable(
            "route_sums",
            "Over all intervals",
            {
                "domain": "domain",
                "route": "route_label",
                "intervals": "num_intervals",
                "Σ support": "sum_support",
                "intervals in support": "supporting_intervals",
                "mean cosine of −∇ℓ and ∇R": "mean_support_cosine",
                "Σ actual change": "sum_actual_delta",
                "Σ first order": "sum_predicted_delta",
            },
        ),
    )
    charts = (
        Bars(
            "train_support",
            "combined_rows",
            "Which route does descent on training records support?",
            about="at the last interval's source: what a small step of plain SGD does to the route, per unit of step size",
            value="train_route_support",
            value_title="support: minus loss gradient · route gradient",
            label="route_label",
        ),
        Bars(
            "eval_actual_delta",
            "eval_deltas",
            "Which route grew on held-out records?",
            about="change of the route score over the last interval",
            value="eval_actual_delta",
            value_title="actual change of the route score",
            label="route_label",
        ),
        Scatter(
            "eval_predicted_vs_actual",
            "eval_changes",
            "Does the first order explain how routes changed?",
            about="a point is a route and an interval, on held-out records; on the diagonal it is the whole of it",
            x_title="first order: gradient · update",
            y_title="actual change of the route score",
            label="label",
            color="series",
            diagonal=True,
            highlight=4,
        ),
    )
    how_to_read = (
        "A route's score is what the corrupted run's margin (clean token less corrupted one) gains when the clean record's "
        "state is put into one subspace, at one stage and role. It is scored on the pairs of `--route-pair-type`.",
        "Support is −∇ℓ·∇R, where ℓ is the loss over every next token of a data group's records (all reads and writes, not "
        "the one query): positive where descent on them raises the score. `local_sgd_route_delta_linearized` is that "
        "times the learning rate: plain SGD, without clipping or Adam.",
        "Support says what the data ask for at the source, the change what the updates between source and target did; over "
        "long intervals, and under Adam, they may disagree.",
        "Nothing is normalised across routes: a subspace of high rank, or at a late stage, carries more.",
        "The tied embedding is one tensor and counts once in every product; the reference toolkit counts it twice.",
    )
    next_queries = (
        (
            "Through which parameters does a group's loss support a route?",
            "SELECT s.parameters->>'$.parameters.stage' AS stage, data_group, parameter, -sum(product) AS support FROM "
            "gradient_products AS p JOIN specs AS s ON s.run = p.run AND s.spec = p.factor WHERE p.run = $run GROUP BY ALL "
            "ORDER BY abs(support) DESC LIMIT 20",
        ),
    )
    place: ClassVar[tuple[int, int]] = (2, 1)
    example: ClassVar[str] = (
        "lakebed query route-competition-report --lake demo.lake --run demo --train-probe train-probe --route "
        "'label=L1H1_qk_query,stage=layer_0_post_mlp,subspace=head_qk_query,rank=4,head=L1H1,position_role=query_key' "
        "--route 'label=L0H1_qk_query,stage=embedding,subspace=head_qk_query,rank=4,head=L0H1,position_role=query_key' "
        "--route-pair-type query_key --pair-type query_key --train-pair-type query_key --data-group-field pair_type "
        "--out routes"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "train_probe": "train-probe",
        "route": (
            "label=L1H1_qk_query,stage=layer_0_post_mlp,subspace=head_qk_query,rank=4,head=L1H1,position_role=query_key",
            "label=L1H0_qk_query,stage=layer_0_post_mlp,subspace=head_qk_query,rank=4,head=L1H0,position_role=query_key",
            "label=L0H1_qk_query,stage=embedding,subspace=head_qk_query,rank=4,head=L0H1,position_role=query_key",
        ),
        "route_pair_type": "query_key",
        "pair_type": ("query_key", "distractor"),
        "train_pair_type": ("query_key",),
        "data_group_field": ("pair_type",),
    }

    @model_validator(mode="before")
    @classmethod
    def _other_name(cls, values: Any) -> Any:
        found = dict(values)
        given = found.pop("eval_split", None)
        if given:
            if found.get("split") and tuple(found["split"]) != tuple(given):
                raise ValueError("--eval-split and --split disagree")
            found["split"] = given
        return found

    @field_validator("train_pair_type", "data_group_field")
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _has_domains(self) -> RouteCompetitionReport:
        if not self.train_probe:
            raise ValueError(
                "--train-probe is required: a probe of training records. Make one: lakebed probe build --lake LAKE --run "
                "RUN --probe train-probe --split train"
            )
        for option, types in (("--pair-type", self.pair_type), ("--train-pair-type", self.train_pair_type)):
            if self.route_pair_type not in ("__all__", *types):
                raise ValueError(
                    f"--route-pair-type {self.route_pair_type} is none of {option}, {', '.join(types)}: routes are scored "
                    "on pairs of both domains"
                )
        return self

    @classmethod
    def sql_text(cls) -> str:
        """With the pairs of the second domain, and the columns of both."""
        chosen = CHOSEN
        for name in ("probe", "pair_type", "split", "all_splits"):
            chosen = chosen.replace(f"${name}", f"$train_{name}")
        return super().sql_text().replace("@TRAIN_PAIRS@", chosen).replace("@COMBINED@", _COMBINED)

    def of_domain(self, domain: str) -> RouteCompetitionReport:
        """The report as if the domain's probe, splits and pair types were those of the first."""
        if domain == "eval":
            return self
        changed = {"probe": self.train_probe, "split": self.train_split, "pair_type": self.train_pair_type}
        return self.model_copy(update=changed)

    def _selections(self) -> dict[str, dict[str, Any]]:
        return {
            domain: {
                "pair_type": of.pair_type,
                "probe": of.probe,
                "split": of.split,
                "max_pairs_per_type": of.max_pairs_per_type,
            }
            for domain, of in (("eval", self), ("train", self.of_domain("train")))
        }

    def attributions(self) -> list[dict[str, Any]]:
        """Every route on held-out records, then on training records."""
        return [
            attribution_parameters(scalar, parameters, **selection)
            for selection in self._selections().values()
            for scalar, parameters in self.scalars()
        ]

    def products(self) -> list[dict[str, Any]]:
        """Dataset parameters of the products, by domain."""
        sides = {"eval": self.eval_loss_side, "train": self.train_loss_side}
        return [
            gradient_product_parameters(
                self.scalars(),
                scalar_pair_type=self.route_pair_type,
                data_group_field=self.data_group_field,
                loss_side=sides[domain],
                **selection,
            )
            for domain, selection in self._selections().items()
        ]

    def needs(self) -> tuple[Need, ...]:
        """Adds the products of the losses' gradients with those of the routes."""
        return (*super().needs(), *(Need(GRADIENT_PRODUCTS, of) for of in self.products()))

    def parameters(self) -> dict[str, Any]:
        """Both domains, one after the other."""
        labels = [route.label for route in self.routes]
        return {
            **super().parameters(),
            "route_label": [*labels, *labels],
            "route_domain": [*(["eval"] * len(labels)), *(["train"] * len(labels))],
            "product_spec": [spec_id(of) for of in self.products()],
            "train_split": list(self.train_split) or [""],
            "train_all_splits": not self.train_split,
        }

    def require(self, lake: Lake, run: str) -> None:
        """Both domains must have their probe, pairs, roles, and values of the groups' fields."""
        held = lake.session.execute(
            "SELECT probe FROM probes WHERE run = ?", [run], tables={"probes"}
        ).fetchall()
        if (self.train_probe,) not in held:
            raise MissingData(
                f"Probe-set not found: run {run!r} has no probe {self.train_probe!r} of training records. Run: "
                f"lakebed probe build --lake {shlex.quote(lake.uri)} --run {run} --probe {self.train_probe} --split train"
            )
        for domain in ("eval", "train"):
            of = self.of_domain(domain)
            super(RouteCompetitionReport, of).require(lake, run)
            asked = {"run": run, **of.parameters()}
            names = ("run", "probe", "pair_type", "split", "all_splits", "max_pairs_per_type")
            found = lake.session.execute(CHOSEN, {name: asked[name] for name in names}, tables={"pairs"})
            columns = [column[0] for column in found.description or ()]
            rows = [dict(zip(columns, row, strict=True)) for row in found.fetchall()]
            group_pairs([{name: row[name] for name in PAIR_FIELDS} for row in rows], self.data_group_field)

    def check(self, results: Results) -> None:
        """A group must mean the same in every interval."""
        changed = results.first(
            "SELECT domain, data_group, list(DISTINCT data_group_values ORDER BY data_group_values) AS held "
            "FROM group_losses GROUP BY ALL HAVING len(held) > 1 ORDER BY ALL LIMIT 1"
        )
        if changed:
            raise ReportFailed(
                f"{self.report_name()}: Data group values changed across intervals: {changed['data_group']} of domain "
                f"{changed['domain']} is {' and '.join(changed['held'])}"
            )
        super().check(results)

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The contract's summary."""
        rows = results.rows("FROM combined_rows")

        def ranked(column: str) -> list[dict[str, Any]]:
            return sorted(rows, key=lambda row: (-row[column], row["route_label"]))

        bases = last_bases(results)
        return {
            **super().facts(lake, results),
            "basis_mode": "source_checkpoint_per_interval",
            "subspaces": {f"{of['label']}:{of['domain']}": of for of in bases},
            "ranked_by_train_route_support": ranked("train_route_support"),
            "ranked_by_eval_actual_delta": ranked("eval_actual_delta"),
            "ranked_by_train_actual_delta": ranked("train_actual_delta"),
            "calculation": {
                "route_score": "mean over pairs of margin(corrupted run, patched) - margin(corrupted run)",
                "negative_loss_dot_route_gradient": "-(gradient of a group's language-model loss) . (gradient of the route "
                "score), both at the source",
                "local_sgd_route_delta_linearized": "learning rate at the source times that",
                "loss_dot_actual_update": "(gradient of the group's loss) . (target - source weights)",
            },
        }

    def findings(self, results: Results) -> list[str]:
        """Which route training records support, which one grew, and whether that is the same."""
        rows = results.rows("FROM combined_rows")
        first, grown = rows[0], max(rows, key=lambda row: row["eval_actual_delta"])
        source, target = results.steps[-2:]
        return [
            _supported(rows, source),
            f"From there to step {target}, `{grown['route_label']}` grew most on held-out records: "
            f"{number(grown['eval_actual_delta'], 3)} ({number(grown['eval_predicted_delta'], 3)} to first order, "
            f"{percent(grown['eval_relative_error'])} off). "
            + (
                "It is the route that descent supports."
                if grown["route_label"] == first["route_label"]
                else f"`{first['route_label']}` changed by {number(first['eval_actual_delta'], 3)}."
            ),
            f"The same update takes {number(first['train_actual_update_loss_reduction'], 3)} nats per token off the loss of "
            f"the training records to first order, and {number(first['eval_actual_update_loss_reduction'], 3)} off that of "
            "the held-out ones.",
        ]


def _supported(rows: list[dict[str, Any]], source: int) -> str:
    first, others = rows[0], rows[1:]
    text = (
        f"**At step {source} descent on training records {'supports' if first['train_route_support'] > 0 else 'opposes'} "
        f"`{first['route_label']}` {'most' if first['train_route_support'] > 0 else 'least'}**: −∇ℓ·∇R = "
        f"{number(first['train_route_support'], 3)}, on held-out records {number(first['eval_route_support'], 3)}"
    )
    listed = ", ".join(f"`{row['route_label']}` {number(row['train_route_support'], 3)}" for row in others)
    return f"{text}. The others: {listed}." if others else f"{text}."
