"""value-code-transfer-map-report: does the code at the support predict that at the prediction (definitions: part 4, B)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ..lake import Lake
from ..lake.value_codes import ANSWER_VALUE, DISTRACTORS, KEY, SUPPORT_KEY, TRUE, WRONG
from .chart import Trajectory
from .markdown import number, percent
from .report import ReportFailed, RowFile, TextTable
from .results import Results
from .value_code_report import FINAL_NORM
from .value_code_transfer import ValueCodeTransferReport

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .arrays.transfer_maps import Ends, Fitting


class ValueCodeTransferMapReport(ValueCodeTransferReport):
    """Does the value code at a source position predict the code at a target position, better than its controls?"""

    row_files: ClassVar[Mapping[str, RowFile]] = {
        "transfer_rows": RowFile("value_code_transfer_map_rows", "transfer_rows"),
        "summary_rows": RowFile("value_code_transfer_map_summary_rows", "summary_rows"),
        "subspace_rows": RowFile("value_code_transfer_map_subspaces", "subspace_rows"),
        "pair_rows": RowFile("value_code_transfer_map_pairs", "pair_rows"),
    }
    tables = (
        TextTable(
            "top_summary",
            "The true transfer and its controls, on held-out examples",
            {
                "step": "checkpoint_step",
                "rank": "basis_rank",
                "source": "eval_kind",
                "rows": "num_rows",
                "coordinate R²": "coord_r_squared",
                "coordinate cosine": "mean_coord_cosine",
                "centroid accuracy": "centroid_accuracy",
                "of rows": "centroid_scored_rows",
                "stage-lens accuracy": "predicted_stage_lens_value_accuracy",
                "stage-lens margin": "mean_predicted_stage_lens_value_margin",
            },
            "Last step and highest rank first.",
        ),
    )
    charts = (
        Trajectory(
            "coord_r_squared",
            "r_squared_chart",
            "How much of the target code the transfer and its controls predict",
            about="R² of the target coordinates on held-out examples; below −1 drawn at −1",
            y="coord_r_squared",
            y_title="coordinate R²",
            series="eval_kind",
            panel="panel",
        ),
        Trajectory(
            "centroid_accuracy",
            "centroid_chart",
            "How often the predicted code is nearest to the right value's",
            about="cosine with the mean target code of each value, held-out examples",
            y="centroid_accuracy",
            y_title="centroid accuracy",
            series="eval_kind",
            panel="panel",
            y_domain=(0, 1),
        ),
    )
    how_to_read = (
        ValueCodeTransferReport.split_note,
        "Coordinates are those on the identity bases (top directions of the token means of the fit examples), not centred. "
        "The map is affine, fitted with a ridge penalty that is not scaled by the number of examples; its offset is free.",
        ValueCodeTransferReport.controls_note,
        "random_subspace shows what any directions of the source predict, not what no information would. It is drawn with "
        "numpy's default generator, seed random_seed + 1009·step + 9176·rank: a report has no torch, whose generator gives "
        "other directions for the same seed.",
        "R² is 1 − Σ squared error / Σ squared distance from the eval mean: 0 is as good as that mean, controls often lie "
        "far below it. The stage lens reads the predicted code alone, without the rest of the residual stream, so its "
        "margin is not the model's.",
        "Groups in the rows are those of the example itself, whichever source a control gives it.",
    )
    next_queries = (
        (
            "What the model itself reads at the stages of the prediction position:",
            "SELECT step, stage, avg(value_margin) AS value_margin FROM readouts WHERE run = $run GROUP BY ALL ORDER BY ALL",
        ),
    )
    place: ClassVar[tuple[int, int]] = (9, 2)
    example: ClassVar[str] = (
        "lakebed query value-code-transfer-map-report --lake demo.lake --run demo --source-stage layer_0_post_mlp "
        "--target-stage layer_1_post_mlp --source-position-role support_value --target-position-role prediction "
        "--group-by answer_value --basis-rank 4 --control shuffled_answer_value --control random_subspace --out transfer"
    )
    demo_options: ClassVar[Mapping[str, Any]] = {
        "source_stage": "layer_0_post_mlp",
        "target_stage": "layer_1_post_mlp",
        "source_position_role": "support_value",
        "target_position_role": "prediction",
        "group_by": ANSWER_VALUE,
        "basis_rank": (2, 4),
        "control": ("shuffled_answer_value", "random_subspace"),
    }

    def parameters(self) -> dict[str, Any]:
        """Adds `eval_kinds`, in order."""
        return {**super().parameters(), "eval_kinds": [TRUE, *self.control]}

    def arrays(self, name: str, results: Results) -> Mapping[str, Any]:
        """Section `transfers`: one row per (step, rank, kind of source), lists with one entry per eval example."""
        from .arrays.lists import RowsOfLists
        from .arrays.side_by_side import side_by_side
        from .arrays.transfer_maps import transfers

        fit, evaluated = self._split(results)
        kinds: list[str] = results.parameters["eval_kinds"]

        def mapped(taken: tuple[int, Ends]) -> list[dict[str, Any]]:
            step, ends = taken
            fitting = _fitting(fit, evaluated, self.ridge_lambda, self.random_seed + 1009 * step)
            try:
                return [
                    {"step": step, "kind_order": kinds.index(row["eval_kind"]), **row}
                    for row in transfers(ends, fitting, self.basis_rank, self.control)
                ]
            except ReportFailed as error:
                raise ReportFailed(f"{self.report_name()}, step {step}: {error}") from error

        rows = RowsOfLists()
        for made in side_by_side(mapped, self._ends(results)):
            for row in made:
                rows.add(row)
        return rows.columns()

    def _split(self, results: Results) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Places of the fit and of the eval examples."""
        import numpy as np

        sides = np.array(
            results.arrow("SELECT fit_split FROM split_examples ORDER BY place")["fit_split"].to_pylist()
        )
        fit, evaluated = np.flatnonzero(sides == "fit"), np.flatnonzero(sides == "eval")
        if not len(fit) or not len(evaluated):
            raise ReportFailed(
                f"{self.report_name()}: of {len(sides)} examples {len(fit)} fit and {len(evaluated)} judge the map, and "
                "both must have some; change --fit-fraction, --split or --max-records"
            )
        return fit, evaluated

    def _ends(self, results: Results) -> Iterator[tuple[int, Ends]]:
        """(step, vectors of both ends and of the controls), one step at a time, so that memory does not grow with steps."""
        from .arrays.transfer_maps import Ends, Side

        candidates = self.candidates(results)
        lens = self.lens(results, candidates.tokens)
        source = self.places(results, self.source_position_role)
        target = self.places(results, self.target_position_role)
        wrong = self.places(results, DISTRACTORS, True) if WRONG in self.control else None
        key = self.places(results, SUPPORT_KEY) if KEY in self.control else None
        tokens = {
            "source": self.group_tokens(results, self.group_by, source),
            "target": self.group_tokens(results, self.group_by, target),
        }
        keys = None if key is None else self.group_tokens(results, SUPPORT_KEY, key)
        for step in results.steps:
            at_source = self.stored(results, self.source_stage, step)
            at_target = (
                at_source
                if self.target_stage == self.source_stage
                else self.stored(results, self.target_stage, step)
            )
            yield (
                step,
                Ends(
                    Side(
                        source.means(at_source),
                        tokens["source"],
                        self.group_by,
                        self.source_stage,
                        self.source_position_role,
                    ),
                    Side(
                        target.means(at_target),
                        tokens["target"],
                        self.group_by,
                        self.target_stage,
                        self.target_position_role,
                    ),
                    None if wrong is None else wrong.means(at_source),
                    None
                    if key is None or keys is None
                    else Side(key.means(at_source), keys, SUPPORT_KEY, self.source_stage, SUPPORT_KEY),
                    lens(step),
                    self.target_stage == FINAL_NORM,
                    candidates,
                ),
            )

    def warnings(self, results: Results) -> list[str]:
        """How often the shuffle changes nothing."""
        return self.shuffle_warning(results, "transfer_rows")

    def findings(self, results: Results) -> list[str]:
        """Whether the true map beats all its controls, by how much, and from which step on."""
        top = max(self.basis_rank)
        rows = results.rows(
            "FROM against_controls WHERE basis_rank = $rank ORDER BY checkpoint_step", rank=top
        )
        last = rows[-1]
        ends = (
            f"{self.source_stage} / {self.source_position_role} → {self.target_stage} / {self.target_position_role}, step "
            f"{last['checkpoint_step']}, rank {top}"
        )
        predicted = (
            f"{ends}: the true transfer predicts the target code with R² **{number(last['true_r_squared'])}** and centroid "
            f"accuracy **{percent(last['true_accuracy'])}** on held-out examples"
        )
        if not self.control:
            return [
                f"{predicted}. No --control was asked for, so nothing says how much of that any source would give."
            ]
        return [predicted + self._margin(last), self._since(rows, top), *self._other_ranks(results, top)]

    def _margin(self, row: dict[str, Any]) -> str:
        verdict = (
            "it beats all its controls" if row["beats_controls"] else "it does **not** beat all its controls"
        )
        parts = []
        if row["control_r_squared"] is not None and row["true_r_squared"] is not None:
            parts.append(
                f"R² {number(row['true_r_squared'] - row['control_r_squared'])} above the best, "
                f"{row['control_by_r_squared']} ({number(row['control_r_squared'])})"
            )
        if row["control_accuracy"] is not None and row["true_accuracy"] is not None:
            parts.append(
                f"accuracy {number(100 * (row['true_accuracy'] - row['control_accuracy']))} points above the best, "
                f"{row['control_by_accuracy']} ({percent(row['control_accuracy'])})"
            )
        return f"; {verdict}: {', '.join(parts)}."

    def _since(self, rows: list[dict[str, Any]], rank: int) -> str:
        since = None
        for row in reversed(rows):
            if not row["beats_controls"]:
                break
            since = row["checkpoint_step"]
        if since is None:
            return f"At rank {rank} it is not ahead of all its controls in both R² and accuracy at the last step."
        when = (
            "at the last step"
            if since == rows[-1]["checkpoint_step"]
            else f"from step **{since}** to the last"
        )
        return f"At rank {rank} it is ahead of all its controls, in R² and in accuracy, {when}."

    def _other_ranks(self, results: Results, top: int) -> list[str]:
        rows = results.rows(
            "FROM against_controls WHERE basis_rank <> $rank AND checkpoint_step = (SELECT max(checkpoint_step) FROM "
            "against_controls) ORDER BY basis_rank",
            rank=top,
        )
        if not rows:
            return []
        listed = "; ".join(
            f"rank {row['basis_rank']} R² {number(row['true_r_squared'])} (best control {number(row['control_r_squared'])})"
            for row in rows
        )
        return [f"At the other ranks, last step: {listed}."]

    def facts(self, lake: Lake, results: Results) -> dict[str, Any]:
        """The formulas in words."""
        return {
            "calculation": {
                "fit_split": "fit if the first 8 bytes of sha256('sample_id:query_index') / (2^64 - 1) < fit_fraction",
                "map": "W = (A'A + lambda I)^-1 A'Z on centred fit coordinates; zhat = (a - mean a) W + mean z",
                "coord_r_squared": "1 - sum |zhat - z|^2 / sum |z - mean of eval z|^2",
                "random_subspace": "Q of the QR of numpy.random.default_rng(random_seed + 1009 step + 9176 rank) normals",
            }
        }


def _fitting(fit: NDArray[np.int64], evaluated: NDArray[np.int64], ridge: float, seed: int) -> Fitting:
    from .arrays.transfer_maps import Fitting

    return Fitting(fit, evaluated, ridge, seed)
