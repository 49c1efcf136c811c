"""optimizer-update-trace: what every optimizer step did, from the recorded training (definitions: part 1, G)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, NonNegativeInt

from ..lake import Lake
from ..lake.datasets import TRACE, Need
from .chart import StackedBars, Trajectory
from .markdown import number, percent
from .report import Report, RowFile, TextTable
from .results import Results

_EXACT = "instrumented_from_initialization_exact_for_this_trace"
_EXACT_CONTINUATION = "instrumented_continuation_exact_historical_replay"
_NOT_REPLAY = "instrumented_continuation_not_historical_replay"


class OptimizerUpdateTrace(Report):
    """What every optimizer step did: loss, gradient, clipping, update and the AdamW terms it is a sum of."""

    top_k_parameters: NonNegativeInt = Field(
        24, description="parameters per step in the parameter rows, largest update first; 0 writes none"
    )

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "step": RowFile("optimizer_update_trace_steps", "step_rows"),
        "batch": RowFile("optimizer_update_trace_batches", "batch_rows"),
        "parameter_update": RowFile("optimizer_update_trace_parameter_updates", "parameter_update_rows"),
    }
    tables = (
        TextTable(
            "top_parameters",
            "Parameters that moved most",
            {
                "parameter": "parameter",
                "module": "module",
                "share of Σ‖Δθ‖²": "share",
                "mean ‖Δθ‖ per step": "mean_delta_l2",
                "‖θ‖ at start": "start_l2",
                "at end": "end_l2",
                "mean cos(Δθ, −gradient)": "mean_update_gradient_cosine",
            },
        ),
    )
    charts = (
        Trajectory(
            "loss",
            "loss_chart",
            "Training loss, accuracy and learning rate",
            panel="panel",
            panel_titles={"loss": "loss (nats per token)"},
        ),
        Trajectory(
            "gradient_norm",
            "gradient_chart",
            "Gradient norm before and after clipping",
            y="norm",
            y_title="L2 norm over all parameters",
            series="series",
            log_y=True,
        ),
        StackedBars(
            "update_share",
            "module_shares",
            "Where the update went: share of ‖Δθ‖² by module",
            y="share",
            y_title="share of ‖Δθ‖²",
            y_format="%",
        ),
        StackedBars(
            "update_terms",
            "update_terms",
            "What the update is the sum of: AdamW terms",
            about="⟨term, Δθ⟩ / ‖Δθ‖², summed over parameters and steps; arithmetic, not a counterfactual",
            y="share",
            y_title="share of ‖Δθ‖²",
            y_format="%",
        ),
    )
    how_to_read = (
        "Row t is the move from the weights of step t−1 to those of t; loss and gradient belong to the weights of t−1 "
        "and batch t.",
        "The terms are arithmetic, not a counterfactual: current gradient, carried momentum and decay add up to the "
        "update exactly, except for the residual, which is float32 rounding. Without one of them the later gradients "
        "and both denominators would have been others.",
        "A term's share is ⟨term, Δθ⟩ / ‖Δθ‖²: the four shares add up to 1, and a negative one worked against the "
        "update.",
        "`update_dot_negative_clipped_gradient` is ⟨Δθ, −g⟩ for the clipped gradient: to first order, the fall of the loss "
        "on that batch. It is divided by the clip coefficient in `update_dot_negative_gradient`.",
        "The tied embedding is one parameter and counts once. `raw_sgd_l2` and `clipped_sgd_l2` say what plain SGD at "
        "the same learning rate would have moved; they are no part of the sum.",
    )
    next_queries = (
        (
            "At which steps did the update point most against the gradient's own descent direction?",
            "SELECT step, parameter, update_gradient_cosine FROM parameter_updates WHERE run = $run ORDER BY 3 LIMIT 10",
        ),
        (
            "What do two neighbouring gradients of one matrix have in common?",
            "SELECT a.step, sum(list_dot_product(a.values, b.values)) AS product FROM gradients a JOIN gradients b ON "
            "b.run = a.run AND b.parameter = a.parameter AND b.row = a.row AND b.step = a.step + 1 WHERE a.run = $run "
            "AND a.parameter = 'blocks.0.attn.q_proj.weight' AND a.step < 20 GROUP BY a.step ORDER BY a.step",
        ),
    )
    place: ClassVar[tuple[int, int]] = (8, 1)
    example: ClassVar[str] = (
        "lakebed query optimizer-update-trace --lake demo.lake --run demo --steps 1:6000 --top-k-parameters 40 --out updates"
    )

    def needs(self) -> tuple[Need, ...]:
        """The recorded steps."""
        return (Need(TRACE),)

    def outputs(self, lake_uri: str, run: str) -> dict[str, str]:
        """Where the weights lie, which the reference keeps as checkpoint files."""
        return {"checkpoint_dir": f"{lake_uri}/tensors/{run}/weights"}

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """Replay status, and the means of the step rows."""
        run = results.first("FROM run_facts") or {}
        blocker = run.get("historical_replay")
        exact = blocker == "exact"
        continued = run.get("parent_run") is not None
        status = (_EXACT_CONTINUATION if continued else _EXACT) if exact else _NOT_REPLAY
        return {
            "historical_replay_status": status if blocker is not None else None,
            "historical_replay_blocker": None if exact else blocker,
            "parent_run": run.get("parent_run"),
            "parent_step": run.get("parent_step"),
            "summary": results.first("FROM training_summary"),
            "terms": "arithmetic split of the update, not a counterfactual",
        }

    def warnings(self, results: Results) -> list[str]:
        """Non-finite gradients, steps without a batch, and a batch order that is not the parent's."""
        lines = []
        summary = results.first("FROM training_summary")
        assert summary is not None
        if summary["nonfinite_gradient_entries"]:
            lines.append(
                f"{summary['nonfinite_gradient_entries']:,} gradient entries were NaN or infinite, in "
                f"{summary['steps_with_nonfinite_gradients']:,} steps."
            )
        unknown = summary["steps"] - summary["steps_with_clip_coefficient"]
        if unknown:
            lines.append(
                f"In {unknown:,} steps no single factor took the raw gradient to the one the optimizer saw, so they have no "
                "clip coefficient."
            )
        replay = results.value("SELECT historical_replay FROM run_facts")
        if replay not in (None, "exact"):
            lines.append(f"This trace is not a historical replay: {replay}.")
        return lines

    def findings(self, results: Results) -> list[str]:
        """When the loss fell, how often clipping acted, what moved and which term moved it."""
        summary = results.first("FROM training_summary")
        assert summary is not None
        return [
            line
            for line in (
                _accuracy(results),
                _loss(results, summary),
                _clipping(summary),
                _movers(results),
                _terms(summary),
            )
            if line
        ]


def _accuracy(results: Results) -> str:
    """When the task was learned: the last accuracy, its steepest rise, and when it first came within 5 % of its best."""
    reached = results.first(
        "SELECT any_value(split) AS split, arg_max(answer_accuracy, step) AS last, max(step) AS step, "
        "min(step) FILTER (answer_accuracy >= 0.95 * best) AS near_best, max(best) AS best "
        "FROM (SELECT *, max(answer_accuracy) OVER () AS best FROM accuracy)"
    )
    if reached is None or reached["last"] is None:
        return ""
    text = (
        f"Answer accuracy on {reached['split']} was **{number(reached['last'])}** at step {reached['step']}"
    )
    rise = results.first(
        "SELECT lag(step) OVER (ORDER BY step) AS a, step AS b, "
        "answer_accuracy - lag(answer_accuracy) OVER (ORDER BY step) AS gain FROM accuracy "
        "QUALIFY gain > 0 ORDER BY gain DESC, step LIMIT 1"
    )
    if rise is None:
        return f"{text}."
    return (
        f"{text}; it rose fastest between steps {rise['a']} and {rise['b']} (+{number(rise['gain'])}) and was within 5 % "
        f"of its best ({number(reached['best'])}) from step {reached['near_best']}."
    )


def _loss(results: Results, summary: dict[str, Any]) -> str:
    if summary["first_loss"] is None:
        return f"{summary['steps']:,} recorded steps, {summary['start_step']} to {summary['end_step']}; no loss was logged."
    text = (
        f"Over {summary['steps']:,} recorded steps, {summary['start_step']} to {summary['end_step']}, the loss went from "
        f"{number(summary['first_loss'])} to {number(summary['last_loss'])}"
    )
    fastest = results.first(
        "SELECT lag(start_step) OVER (ORDER BY time_window) AS a, end_step AS b, "
        "lag(loss) OVER (ORDER BY time_window) AS before, loss AS after, before - after AS fall FROM windows "
        "QUALIFY fall > 0 AND NOT isnan(fall) ORDER BY fall DESC, time_window LIMIT 1"
    )
    if fastest is None:
        return f"{text}."
    return (
        f"{text}; it **fell fastest between steps {fastest['a']} and {fastest['b']}** (window means "
        f"{number(fastest['before'])} to {number(fastest['after'])})."
    )


def _clipping(summary: dict[str, Any]) -> str:
    if not summary["steps_with_clip_coefficient"]:
        return ""
    share = summary["clipped_steps"] / summary["steps_with_clip_coefficient"]
    strongest = (
        f", by at most a factor {number(1 / summary['lowest_clip_coefficient'], 3)}"
        if summary["clipped_steps"] and summary["lowest_clip_coefficient"]
        else ""
    )
    return (
        f"Clipping acted in {percent(share)} of the steps{strongest}; the largest gradient norm was "
        f"{number(summary['highest_pre_clip_grad_norm'])}, at step {summary['highest_norm_step']}."
    )


def _movers(results: Results) -> str:
    top = results.rows("SELECT parameter, share FROM top_parameters WHERE NOT isnan(share) LIMIT 3")
    if not top:
        return ""
    listed = ", ".join(f"`{row['parameter']}` ({percent(row['share'])})" for row in top)
    return f"Most of the movement, as a share of the summed ‖Δθ‖²: {listed}."


def _terms(summary: dict[str, Any]) -> str:
    whole = summary["squared_update"]
    if not whole or summary["momentum"] is None:
        return ""
    return (
        f"The update is {percent(summary['momentum'] / whole)} carried momentum, "
        f"{percent((summary['current_gradient'] or 0) / whole)} current gradient and "
        f"{percent((summary['weight_decay'] or 0) / whole)} weight decay (shares of ‖Δθ‖²; arithmetic, "
        "not a counterfactual)."
    )
