"""What the value-code reports share: mean residual vectors of a role, token groups, the stage lens (definitions 4 §0)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveInt

from ..lake.datasets import ACTIVATIONS, READOUTS, WEIGHTS, Need
from ..lake.errors import UnknownName
from ..lake.value_codes import ANSWER_VALUE, CAUSAL_PREFIX, MEASURED_EVENTS, POSITION_TOKEN
from .probe_report import ProbeReport, require_roles, require_stages
from .report import Report, ReportFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..lake import Lake
    from .arrays.stage_lens import Candidates, StageLens
    from .results import Results

FINAL_NORM = "final_norm"
# Both built-in families' epsilon, for runs registered before the lake held it.
FALLBACK_EPSILON = 1e-5
_LABELS = ("query_key", "support_key", "support_value")

_SECTIONS = f"""\
-- Events of the first --max-records records.
-- view: measured_events
{MEASURED_EVENTS}

-- view: token_texts
SELECT token, coalesce(max(text), token::VARCHAR) AS text
FROM (
    SELECT unnest(range(len(vocabulary)))::INTEGER AS token, unnest(vocabulary) AS text
    FROM probes
    WHERE run = $run AND probe = $probe AND vocabulary IS NOT NULL
    UNION ALL
    SELECT answer_token, answer FROM measured_events
    UNION ALL
    SELECT unnest(competitors), NULL FROM measured_events
    UNION ALL
    SELECT token, text FROM positions WHERE run = $run AND probe = $probe
)
GROUP BY token

-- What an event can be grouped by: the token of a role (its first position), and the answer.
-- view: label_tokens
SELECT m.place, p.role AS label, min_by(p.token, p.position) AS token
FROM positions AS p
JOIN measured_events AS m ON m.event = p.event
WHERE p.run = $run AND p.probe = $probe AND p.kind = 'role' AND list_contains($labels, p.role)
GROUP BY ALL
UNION ALL
SELECT place, 'answer_value', answer_token FROM measured_events

-- Where the roles that are read stand, and in which row of the stored activations.
-- view: role_positions
SELECT m.place, n.role, p.position, p.token, m.prediction_position, a."row"
FROM (SELECT unnest($roles) AS role) AS n
JOIN positions AS p
    ON p.run = $run AND p.probe = $probe
    AND CASE WHEN n.role = 'causal_prefix' THEN p.kind = 'partition' ELSE p.kind = 'role' AND p.role = n.role END
JOIN measured_events AS m ON m.event = p.event
LEFT JOIN activation_rows AS a
    ON a.run = $run AND a.probe = $probe AND a.layout = $layout AND a.example = m.example AND a.position = p.position
ORDER BY n.role, m.place, p.position

-- view: event_facts
SELECT
    m.place, m.example AS batch_index, m.sample_id, m.split, m.query_index,
    q.token AS query_key_token_id, qt.text AS query_key_token,
    s.token AS support_value_token_id, st.text AS support_value_token,
    m.answer_token AS answer_value_token_id, coalesce(m.answer, m.answer_token::VARCHAR) AS answer_value_token
FROM measured_events AS m
LEFT JOIN label_tokens AS q ON q.place = m.place AND q.label = 'query_key'
LEFT JOIN token_texts AS qt ON qt.token = q.token
LEFT JOIN label_tokens AS s ON s.place = m.place AND s.label = 'support_value'
LEFT JOIN token_texts AS st ON st.token = s.token
ORDER BY m.place

"""

_FINAL_VALUES = """\
-- The model's own logits.
-- view: final_values
SELECT
    r.step, m.place, r.answer_logit AS correct_value_logit, r.best_wrong_logit AS best_wrong_value_logit, r.value_margin,
    CASE WHEN r.answer_logit > r.best_wrong_logit
        OR (r.answer_logit = r.best_wrong_logit AND m.answer_token < r.best_wrong_token)
        THEN m.answer_token ELSE r.best_wrong_token END AS best_value_token_id,
    (best_value_token_id = m.answer_token)::DOUBLE AS value_accuracy
FROM readouts AS r
JOIN measured_events AS m ON m.event = r.event
WHERE r.run = $run AND r.probe = $probe AND list_contains($steps, r.step) AND r.stage = 'logits'

"""


@dataclass(frozen=True)
class RolePlaces:
    """Where a role stands: `rows` Int64[k] of the stored activations, those of event i from `starts[i]` on, `counts`
    Int64[n] of them, and the `first_tokens` Int64[n] at the lowest position."""

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    first_tokens: NDArray[np.int64]

    def means(self, stored: NDArray[np.float32]) -> NDArray[np.float64]:
        """Mean vector of each event over the role's positions: stored Float32[row, d] -> Float64[n, d]."""
        import numpy as np

        vectors = stored[self.rows].astype(np.float64)
        if len(self.rows) == len(self.counts):
            return vectors
        sums: NDArray[np.float64] = np.add.reduceat(vectors, self.starts, axis=0)
        return sums / self.counts[:, None]


class _ValueCodeSections(Report):
    """Puts the shared views after `chosen_events` and before the report's own sections."""

    # View `final_values`: step, place, and the value metrics of the model's own logits.
    final_values_section: ClassVar[str] = _FINAL_VALUES

    @classmethod
    def sql_text(cls) -> str:
        """The shared views, then the report's own sections."""
        return _SECTIONS + cls.final_values_section + super().sql_text()


class ValueCodeReport(ProbeReport, _ValueCodeSections):
    """Base of the reports on value codes: residual vectors averaged over a role's positions, one per query event."""

    max_records: PositiveInt | None = Field(
        None, description="measure the first of the split's records only; default all"
    )
    markdown_top_k_rows: PositiveInt = Field(160, description="rows of the Markdown's table")

    def stages_read(self) -> tuple[str, ...]:
        """Residual stages the report reads."""
        raise NotImplementedError

    def roles_read(self) -> tuple[str, ...]:
        """Roles whose positions it averages over."""
        raise NotImplementedError

    def groupings(self) -> tuple[str, ...]:
        """By which tokens it groups."""
        raise NotImplementedError

    @property
    def layout(self) -> str:
        """The layout of activations that holds the positions: only `all` holds every position."""
        return "all" if CAUSAL_PREFIX in self.roles_read() else "roles"

    def needs(self) -> tuple[Need, ...]:
        """Residual vectors, the model's own logits, and the weights of the stage lens."""
        return (
            Need(ACTIVATIONS, {"probe": self.probe, "layout": self.layout}),
            Need(READOUTS, {"probe": self.probe}),
            Need(WEIGHTS),
        )

    def parameters(self) -> dict[str, Any]:
        """Adds `layout`, `roles` and `labels`."""
        return {
            **super().parameters(),
            "layout": self.layout,
            "roles": list(dict.fromkeys(self.roles_read())),
            "labels": list(dict.fromkeys((*_LABELS, *self.groupings()))),
        }

    def require(self, lake: Lake, run: str) -> None:
        """Stages, roles and groupings must be there."""
        super().require(lake, run)
        require_stages(lake, run, *self.stages_read())
        require_roles(lake, run, self.probe, *self.roles_read())
        require_groupings(lake, run, self.probe, *self.groupings())

    # -- what is read ----------------------------------------------------------------------------------------------------

    def candidates(self, results: Results) -> Candidates:
        """Which values compete, per event; raises ReportFailed for no event, or one without competitors."""
        from .arrays.stage_lens import Candidates

        table = results.arrow(
            "SELECT answer_token, coalesce(len(competitors), 0) AS number, sample_id, query_index FROM measured_events "
            "ORDER BY place"
        )
        if not len(table):
            raise ReportFailed(
                f"{self.report_name()}: the records selected hold no query event; choose another --split"
            )
        counts = table["number"].to_numpy()
        if not counts.all():
            at = int((counts == 0).argmax())
            raise ReportFailed(
                f"{self.report_name()}: event {table['sample_id'][at]} query {table['query_index'][at]} has no competitors, "
                "so no value margin"
            )
        wrong = results.arrow(
            "SELECT token FROM (SELECT place, unnest(competitors) AS token FROM measured_events) ORDER BY place, token"
        )
        answers = table["answer_token"].to_numpy().astype("int64")
        return Candidates.of(answers, wrong["token"].to_numpy().astype("int64"), counts)

    def places(self, results: Results, role: str, up_to_prediction: bool = False) -> RolePlaces:
        """Where `role` stands in every event; `up_to_prediction` leaves out what comes after, else that is refused."""
        import numpy as np

        table = results.arrow(
            'SELECT place, position, token, prediction_position, "row" FROM role_positions WHERE role = $role '
            "AND (NOT $cut OR position <= prediction_position) ORDER BY place, position",
            role=role,
            cut=up_to_prediction,
        )
        place, count = table["place"].to_numpy(), int(results.value("SELECT count(*) FROM measured_events"))
        counts = np.bincount(place, minlength=count)
        if not counts.all():
            where = " up to the prediction" if up_to_prediction else ""
            raise ReportFailed(
                f"{self.report_name()}: role {role!r} resolves to no position{where} in {int((counts == 0).sum())} of "
                f"{count} events (such as {_event(results, int((counts == 0).argmax()))}); choose another role or --split"
            )
        beyond = np.bincount(
            place[table["position"].to_numpy() > table["prediction_position"].to_numpy()]
        ).nonzero()[0]
        if len(beyond):
            raise ReportFailed(
                f"{self.report_name()}: Intervention positions must be in the causal prefix: role {role!r} has positions "
                f"after the prediction in {len(beyond)} of {count} events; choose a role that lies before it"
            )
        if table["row"].null_count:
            raise ReportFailed(
                f"{self.report_name()}: {table['row'].null_count} positions of role {role!r} have no stored activation; "
                "build the probe anew"
            )
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
        return RolePlaces(
            table["row"].to_numpy(), starts, counts, table["token"].to_numpy()[starts].astype(np.int64)
        )

    def group_tokens(self, results: Results, grouping: str, places: RolePlaces) -> NDArray[np.int64]:
        """Token id that groups each event's vector, Int64[n]; position_token is that of the vector's own position."""
        import numpy as np

        if grouping == POSITION_TOKEN:
            return places.first_tokens
        table = results.arrow(
            "SELECT m.place, l.token FROM measured_events AS m LEFT JOIN label_tokens AS l ON l.place = m.place AND "
            "l.label = $label ORDER BY m.place",
            label=grouping,
        )
        if table["token"].null_count:
            raise ReportFailed(
                f"{self.report_name()}: {table['token'].null_count} of {len(table)} events have no role {grouping!r} to "
                "group by; choose another --group-by"
            )
        tokens: NDArray[np.int64] = table["token"].to_numpy().astype(np.int64)
        return tokens

    def stored(self, results: Results, stage: str, step: int) -> NDArray[np.float32]:
        """Stored activations of a stage: Float32[row, d_model]; refuses those of a run that diverged."""
        import numpy as np

        name = f"{self.probe}/{self.layout}/{stage}"
        cells: NDArray[np.float32] = results.lake.tensor("activations", name, results.run).read(step)
        if not np.isfinite(cells).all():
            raise ReportFailed(
                f"{self.report_name()}: {stage} holds NaN or infinite values at step {step}; leave it out with --steps"
            )
        return cells

    def lens(self, results: Results, tokens: NDArray[np.int64]) -> Callable[[int], StageLens]:
        """The stage lens for some tokens, by step."""
        import numpy as np

        from .arrays.stage_lens import StageLens

        names, epsilon = self._lens_parameters(results), layer_norm_epsilon(results.lake, results.run)

        def at(step: int) -> StageLens:
            def read(part: str) -> NDArray[np.float32]:
                cells: NDArray[np.float32] = results.lake.tensor("weights", names[part], results.run).read(
                    step
                )
                return cells

            gain = read("gain").astype(np.float64).reshape(-1)
            bias = read("bias").astype(np.float64).reshape(-1) if "bias" in names else np.zeros_like(gain)
            return StageLens(read("unembedding")[tokens].astype(np.float64), gain, bias, epsilon)

        return at

    def _lens_parameters(self, results: Results) -> dict[str, str]:
        rows = results.lake.session.execute(
            "SELECT parameter, module, is_bias FROM parameters WHERE run = ? AND module IN ('unembedding', "
            "'token_embedding', 'final_norm') ORDER BY module",
            [results.run],
            tables={"parameters"},
        ).fetchall()
        found: dict[str, str] = {}
        for name, module, is_bias in rows:
            part = "unembedding" if module != FINAL_NORM else "bias" if is_bias else "gain"
            found[part] = name  # a module `unembedding` comes last and wins over the tied token embedding
        if not {"unembedding", "gain"} <= found.keys():
            raise ReportFailed(
                f"{self.report_name()}: run {results.run!r} does not tell which parameters unembed; it was recorded without "
                "an adapter"
            )
        return found


def layer_norm_epsilon(lake: Lake, run: str) -> float:
    """Epsilon of the final LayerNorm, or FALLBACK_EPSILON where the lake does not hold it."""
    found = lake.session.execute(
        "SELECT layer_norm_eps FROM stages WHERE run = ? AND stage = 'final_norm'", [run], tables={"stages"}
    ).fetchall()
    return FALLBACK_EPSILON if not found or found[0][0] is None else float(found[0][0])


def require_groupings(lake: Lake, run: str, probe: str, *groupings: str) -> None:
    """Raises UnknownName, naming what vectors can be grouped by."""
    rows = lake.session.execute(
        "SELECT DISTINCT role FROM positions WHERE run = ? AND probe = ? AND kind = 'role' ORDER BY role",
        [run, probe],
        tables={"positions"},
    ).fetchall()
    held = [POSITION_TOKEN, ANSWER_VALUE, *(role for (role,) in rows)]
    for grouping in groupings:
        if grouping not in held:
            raise UnknownName(f"cannot group by {grouping!r}; probe {probe!r} has {', '.join(held)}")


def no_repeats(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values without repetitions, in order."""
    return tuple(dict.fromkeys(values))


def _event(results: Results, place: int) -> str:
    found = results.first(
        "SELECT sample_id, query_index FROM measured_events WHERE place = $place", place=place
    )
    assert found is not None
    return f"{found['sample_id']} query {found['query_index']}"
