"""What the contextual reports share: residual vectors at the positions of a role, grouped by a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..lake.datasets import ACTIVATIONS, READOUTS, SVD, Need
from ..lake.errors import UnknownName
from .behavior_options import BehaviorOptions
from .probe_report import HeadReport, require_roles, require_stages
from .report import Report, ReportFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..lake import Lake
    from .results import Results

POSITION_TOKEN, ANSWER_VALUE = "position_token", "answer_value"

_SECTIONS = """\
-- Which positions are read under which label, and by which token they are grouped.
-- view: role_specs
SELECT
    unnest(range(len($labels))) AS spec, unnest($labels) AS role, unnest($context_roles) AS context_role,
    unnest($group_bys) AS group_by

-- view: context_positions
SELECT DISTINCT
    s.spec, s.role, s.context_role, s.group_by, e.event, e.example, e.sample_id, e.split, e.query_index,
    e.prediction_position, e.answer_token, e.answer, p.position, p.token, p.text
FROM role_specs AS s
JOIN positions AS p
    ON p.run = $run AND p.probe = $probe
    AND CASE WHEN s.context_role = 'causal_prefix' THEN p.kind = 'partition'
        ELSE p.kind = 'role' AND p.role = s.context_role END
JOIN chosen_events AS e ON e.event = p.event

-- The token of every role that groups; each has one position per event.
-- view: role_tokens
SELECT event, role, min(token) AS token, min(coalesce(text, token::VARCHAR)) AS text
FROM positions
WHERE run = $run AND probe = $probe AND kind = 'role' AND list_contains($group_bys, role)
GROUP BY event, role

-- view: context_vectors
SELECT
    p.* EXCLUDE (answer_token, answer, token, text),
    CASE p.group_by WHEN 'position_token' THEN p.token WHEN 'answer_value' THEN p.answer_token ELSE t.token END
        AS group_token_id,
    CASE p.group_by WHEN 'position_token' THEN coalesce(p.text, p.token::VARCHAR)
        WHEN 'answer_value' THEN coalesce(p.answer, p.answer_token::VARCHAR) ELSE t.text END AS group_token,
    p.token AS position_token_id,
    coalesce(p.text, p.token::VARCHAR) AS position_token,
    a."row"
FROM context_positions AS p
LEFT JOIN role_tokens AS t ON t.event = p.event AND t.role = p.group_by
LEFT JOIN activation_rows AS a
    ON a.run = $run AND a.probe = $probe AND a.layout = $layout AND a.example = p.example AND a.position = p.position
ORDER BY p.spec, p.event, p.position

"""


@dataclass(frozen=True)
class RoleSpec:
    """Vectors of one label: those at the positions of `context_role`, grouped by the token that `group_by` says."""

    label: str
    context_role: str
    group_by: str


class _ContextSections(Report):
    """Puts the shared views after `chosen_events` and before the report's own sections."""

    @classmethod
    def sql_text(cls) -> str:
        """The shared views, then the report's own sections."""
        return _SECTIONS + super().sql_text()


class ContextualReport(HeadReport, BehaviorOptions, _ContextSections):
    """Base of reports that read raw residual vectors (no LayerNorm) at the positions of a role.

    View `context_vectors` has one row per label, event and position, with the `row` of its activation.
    """

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """The labels, in order."""
        raise NotImplementedError

    def stages(self) -> tuple[str, ...]:
        """The residual stages that are read."""
        raise NotImplementedError

    @property
    def layout(self) -> str:
        """The layout of activations that holds the positions: every position is in `all` only."""
        everywhere = any(spec.context_role == "causal_prefix" for spec in self.role_specs())
        return "all" if everywhere else "roles"

    def needs(self) -> tuple[Need, ...]:
        """Residual vectors, the model's answers, and the head's singular vectors."""
        return (
            Need(ACTIVATIONS, {"probe": self.probe, "layout": self.layout}),
            Need(READOUTS, {"probe": self.probe}),
            Need(SVD),
        )

    def parameters(self) -> dict[str, Any]:
        """Adds `labels`, `context_roles`, `group_bys` and `layout`."""
        specs = self.role_specs()
        return {
            **super().parameters(),
            "labels": [spec.label for spec in specs],
            "context_roles": [spec.context_role for spec in specs],
            "group_bys": [spec.group_by for spec in specs],
            "layout": self.layout,
        }

    def require(self, lake: Lake, run: str) -> None:
        """Stages, roles and groupings must be there."""
        super().require(lake, run)
        require_stages(lake, run, *self.stages())
        require_roles(lake, run, self.probe, *(spec.context_role for spec in self.role_specs()))
        _require_groupings(lake, run, self.probe, {spec.group_by: None for spec in self.role_specs()})

    def context(self, results: Results) -> dict[str, Context]:
        """The vectors' places and groups by label; raises ReportFailed where a role cannot be read."""
        _check_positions(self.report_name(), results)
        table = results.arrow(
            'SELECT role, "row", group_token_id FROM context_vectors ORDER BY spec, event, position'
        )
        from .arrays import stack_by

        rows = table["row"].to_numpy()
        found = stack_by(table["role"].to_pylist(), rows, table["group_token_id"].to_numpy())
        for spec in self.role_specs():
            if spec.label not in found:
                raise ReportFailed(
                    f"{self.report_name()}: role {spec.context_role!r} resolves to no position in the "
                    f"{results.value('SELECT count(*) FROM chosen_events')} events selected; choose another --split or role"
                )
        return {spec.label: Context(*found[spec.label]) for spec in self.role_specs()}

    def warnings(self, results: Results) -> list[str]:
        """Events without a role give no vector, but answer all the same."""
        rows = results.rows(
            "SELECT context_role, count(DISTINCT event) AS events, (SELECT count(*) FROM chosen_events) AS total "
            "FROM context_vectors GROUP BY context_role HAVING events < total ORDER BY context_role"
        )
        return [
            f"{row['total'] - row['events']} of {row['total']} events have no {row['context_role']}: they give no "
            "vectors, but count in the answer margin."
            for row in rows
        ]

    def residuals(self, results: Results) -> Iterator[tuple[int, str, Residuals]]:
        """(step, stage, its stored vectors), one at a time, so that memory does not grow with steps."""
        # Arrays are read as such: the scan behind SQL costs more than all of their arithmetic.
        stored = {
            stage: results.lake.tensor("activations", f"{self.probe}/{self.layout}/{stage}", results.run)
            for stage in self.stages()
        }
        for step in results.steps:
            for stage, tensor in stored.items():
                yield step, stage, Residuals(tensor.read(step))

    def singular_directions(self, results: Results, rank: int, option: str) -> dict[int, Directions]:
        """The head's first `rank` singular directions by step; raises ReportFailed for a rank it does not have."""
        where = "run = $run AND matrix = 'W_QK' AND layer = $layer AND head = $head AND list_contains($steps, step)"
        head = {"run": results.run, "layer": self.head_layer, "head": self.head, "steps": results.steps}
        values = results.arrow(
            f"SELECT step, singular_value FROM singular_values WHERE {where} ORDER BY step, rank",
            tables={"singular_values"},
            **head,
        )
        from .arrays import stack_by

        by_step = stack_by(values["step"].to_pylist(), values["singular_value"].to_numpy())
        for step in results.steps:
            held = len(by_step[step][0]) if step in by_step else 0
            if rank > held:
                raise ReportFailed(
                    f"{self.report_name()}: {option} {rank} exceeds the {held} singular directions that W_QK of "
                    f"{self.head_label} has (the head's width); take at most {held}"
                )
        left, right = (
            results.lake.tensor("svd", f"W_QK.{part}", results.run).read(results.steps)[
                :, self.head_layer, self.head
            ]
            for part in ("U", "Vh")
        )
        return {
            step: Directions(by_step[step][0], left[at].astype("float64"), right[at].astype("float64"))
            for at, step in enumerate(results.steps)
        }


@dataclass(frozen=True)
class Context:
    """Vectors of a label: `rows` Int64[n] of the stored activations, `token_ids` Int[n] of their groups."""

    rows: NDArray[np.int64]
    token_ids: NDArray[np.int64]


class Residuals:
    """Stored vectors of one stage and step, Float32[row, d]."""

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self._vectors = vectors

    def at(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Vectors of the rows given, Float64[n, d]; only these are widened."""
        widened: NDArray[np.float64] = self._vectors[rows].astype("float64")
        return widened


@dataclass(frozen=True)
class Directions:
    """W_QK of a head: singular values Float64[k], and as rows the left (query-side) and right directions Float64[k, d]."""

    values: NDArray[np.float64]
    left: NDArray[np.float64]
    right: NDArray[np.float64]


def _require_groupings(lake: Lake, run: str, probe: str, groupings: Mapping[str, None]) -> None:
    """Raises UnknownName, naming what vectors can be grouped by."""
    rows = lake.session.execute(
        "SELECT role FROM (SELECT role, event, count(DISTINCT position) AS positions FROM positions WHERE run = ? AND "
        "probe = ? AND kind = 'role' GROUP BY role, event) GROUP BY role HAVING max(positions) = 1 ORDER BY role",
        [run, probe],
        tables={"positions"},
    ).fetchall()
    held = [POSITION_TOKEN, ANSWER_VALUE, *(role for (role,) in rows)]
    for grouping in groupings:
        if grouping not in held:
            raise UnknownName(
                f"cannot group by {grouping!r}; probe {probe!r} has {', '.join(held)} "
                "(position_token, answer_value, or a role with one position)"
            )


def _check_positions(name: str, results: Results) -> None:
    beyond = results.first(
        "SELECT context_role, count(DISTINCT event) AS events, any_value(total) AS total FROM (SELECT *, "
        "(SELECT count(*) FROM chosen_events) AS total FROM context_positions) "
        "WHERE position > prediction_position GROUP BY context_role ORDER BY context_role"
    )
    if beyond is not None:
        raise ReportFailed(
            f"{name}: Intervention positions must be in the causal prefix: role {beyond['context_role']!r} has positions "
            f"after the prediction in {beyond['events']} of {beyond['total']} events; choose a role that lies before it"
        )
    absent = results.first(
        "SELECT group_by, context_role, count(DISTINCT event) AS events FROM context_vectors WHERE group_token_id IS NULL "
        "GROUP BY ALL ORDER BY ALL"
    )
    if absent is not None:
        raise ReportFailed(
            f"{name}: {absent['events']} events have no role {absent['group_by']!r} to group {absent['context_role']!r} by; "
            "choose another --group-by"
        )
    unstored = results.value('SELECT count(*) FROM context_vectors WHERE "row" IS NULL')
    if unstored:
        raise ReportFailed(f"{name}: {unstored} positions have no stored activation; build the probe anew")
