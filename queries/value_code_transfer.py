"""What the reports on transfers of value codes share: ends, split, controls, and the examples (definitions 4 §B)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator

from ..lake.value_codes import DISTRACTORS, KEY, SHUFFLED, SUPPORT_KEY, WRONG
from .markdown import percent
from .report import Report
from .results import Results
from .value_code_report import ValueCodeReport, no_repeats

Control = Literal["shuffled_answer_value", "wrong_support_value", "key_identity", "random_subspace"]

_SPLIT = """\
-- Which examples fit the maps and which judge them: the same ones at every step and rank.
-- view: split_examples
SELECT
    *,
    split_number(sample_id, query_index) AS split_number,
    CASE WHEN split_number < $fit_fraction THEN 'fit' ELSE 'eval' END AS fit_split
FROM measured_events
ORDER BY place

"""

_PAIRS = """

-- view: pair_ends
WITH ends AS (
    SELECT place, role, list(position ORDER BY position) AS positions, min_by(token, position) AS first_token
    FROM role_positions
    GROUP BY place, role
)
SELECT
    x.place, x.fit_split,
    s.positions AS source_positions, t.positions AS target_positions, c.positions AS context_positions,
    CASE $group_by WHEN 'position_token' THEN s.first_token ELSE g.token END AS source_group_token_id,
    CASE $group_by WHEN 'position_token' THEN t.first_token ELSE g.token END AS target_group_token_id,
    k.token AS key_group_token_id
FROM split_examples AS x
JOIN ends AS s ON s.place = x.place AND s.role = $source_position_role
JOIN ends AS t ON t.place = x.place AND t.role = $target_position_role
LEFT JOIN ends AS c ON c.place = x.place AND c.role = $context_position_role
LEFT JOIN label_tokens AS g ON g.place = x.place AND g.label = $group_by
LEFT JOIN label_tokens AS k ON k.place = x.place AND k.label = 'support_key'

-- rows: pair_rows
SELECT
    $lake || '#' || $run || '/' || f.step AS checkpoint,
    format('step_{:06d}', f.step) AS checkpoint_name,
    f.step AS checkpoint_step,
    e.batch_index, e.sample_id, e.split, e.query_index,
    $source_stage AS source_stage, $target_stage AS target_stage,
    $source_position_role AS source_position_role, $target_position_role AS target_position_role,
    $context_stage::VARCHAR AS context_stage, $context_position_role::VARCHAR AS context_position_role,
    x.source_positions, x.target_positions, x.context_positions,
    $group_by AS group_by,
    x.source_group_token_id, st.text AS source_group_token,
    x.target_group_token_id, tt.text AS target_group_token,
    x.key_group_token_id, kt.text AS key_group_token,
    e.answer_value_token_id, e.answer_value_token,
    f.value_accuracy AS final_value_accuracy, f.value_margin AS final_value_margin,
    x.fit_split, x.place AS example_index
FROM final_values AS f
JOIN pair_ends AS x ON x.place = f.place
JOIN event_facts AS e ON e.place = f.place
LEFT JOIN token_texts AS st ON st.token = x.source_group_token_id
LEFT JOIN token_texts AS tt ON tt.token = x.target_group_token_id
LEFT JOIN token_texts AS kt ON kt.token = x.key_group_token_id
ORDER BY f.step, f.place
"""


class _TransferSections(Report):
    """Puts view `split_examples` before the report's own sections, and row set `pair_rows` after them."""

    @classmethod
    def sql_text(cls) -> str:
        """The report's own sections between the shared ones."""
        return _SPLIT + super().sql_text() + _PAIRS


class ValueCodeTransferReport(ValueCodeReport, _TransferSections):
    """Base of the reports on maps from the value code at a source position to that at a target position."""

    source_stage: str = Field(..., description="residual stage of the source vectors")
    target_stage: str = Field(..., description="residual stage of the target vectors")
    source_position_role: str = Field(
        ..., description="role whose positions are averaged into the source vector"
    )
    target_position_role: str = Field(
        ..., description="role whose positions are averaged into the target vector"
    )
    group_by: str = Field(
        ..., description="token that groups the vectors: position_token, answer_value, or that of a role"
    )
    basis_rank: tuple[PositiveInt, ...] = Field(
        ..., min_length=1, description="rank of the identity bases between which maps are fitted"
    )
    control: tuple[Control, ...] = Field((), description="control evaluated beside the true transfer")
    fit_fraction: float = Field(
        0.75, gt=0, lt=1, description="share of the examples that fits bases and maps"
    )
    ridge_lambda: float = Field(
        1e-4, ge=0, allow_inf_nan=False, description="ridge penalty, not scaled by examples"
    )
    random_seed: int = Field(0, ge=0, description="seed of control random_subspace")

    split_note: ClassVar[str] = (
        "One example per query event. SHA-256 of sample_id:query_index decides which examples fit bases and maps and which "
        "judge them (eval): the same ones at every step and rank. All numbers are of eval examples."
    )
    controls_note: ClassVar[str] = (
        "true_transfer: each example's own source. shuffled_answer_value: the next eval example's source, same map. "
        "wrong_support_value: the mean of the value distractors up to the prediction, same map. key_identity: the "
        "support key's vector on its own basis, map fitted anew. random_subspace: the true source on random directions, map "
        "fitted anew."
    )

    @field_validator("basis_rank", "control")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return no_repeats(values)

    def stages_read(self) -> tuple[str, ...]:
        """Source and target."""
        return (self.source_stage, self.target_stage)

    def roles_read(self) -> tuple[str, ...]:
        """Source and target, and those of the controls asked for."""
        extra = {WRONG: DISTRACTORS, KEY: SUPPORT_KEY}
        controls = (extra[control] for control in self.control if control in extra)
        return (self.source_position_role, self.target_position_role, *controls)

    def groupings(self) -> tuple[str, ...]:
        """--group-by, and the key where its control is asked for."""
        return (self.group_by, *((SUPPORT_KEY,) if KEY in self.control else ()))

    def parameters(self) -> dict[str, Any]:
        """Adds stage and role of a context, null for a report without."""
        return {"context_stage": None, "context_position_role": None, **super().parameters()}

    def shuffle_warning(self, results: Results, section: str) -> list[str]:
        """How often the shuffle changes nothing; `section` has a row per example, eval_kind and source_has_same_answer."""
        found = results.first(
            "SELECT count(*) AS examples, count(*) FILTER (source_has_same_answer) AS same FROM (SELECT DISTINCT sample_id, "
            f"query_index, source_has_same_answer FROM {section} WHERE eval_kind = $shuffled)",
            shuffled=SHUFFLED,
        )
        if found is None or not found["same"]:
            return []
        return [
            f"The shuffle gives {found['same']} of {found['examples']} eval examples a source with the same answer "
            f"({percent(found['same'] / found['examples'])}), where a right map is right: they are kept, and marked "
            "source_has_same_answer."
        ]
