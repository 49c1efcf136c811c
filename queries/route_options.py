"""Routes as reports take them: one by options, or several by `--route label=…,stage=…,subspace=…,position_role=…`.

A route is a stage, a subspace of its residual stream, and a role's positions: what passes there from the clean record into
the corrupted one (definitions 2 §A, §D; 3 §E). View `labels` has them, view `route_cells` the margins of the three runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from ..lake.subspaces import ROUTE_SCORE, SUBSPACES, route_parameters
from .attribution_report import AttributionReport, require_rank
from .pair_selection import RecordSide
from .probe_report import require_head, require_roles, require_stages
from .results import Results

if TYPE_CHECKING:
    from ..lake import Lake

_REQUIRED = ("label", "stage", "subspace", "position_role")
_KEYS = (*_REQUIRED, "rank", "head_layer", "head")


@dataclass(frozen=True)
class Route:
    """One route. Made by `parse_route` or `make_route`, which check that a subspace has what it takes."""

    label: str
    stage: str
    subspace: str
    position_role: str
    rank: int | None
    head_layer: int | None
    head: int | None

    @property
    def head_label(self) -> str | None:
        """L2H1."""
        return None if self.head is None else f"L{self.head_layer}H{self.head}"

    def parameters(self) -> dict[str, Any]:
        """Of scalar route_score."""
        return route_parameters(self.stage, self.subspace, self.position_role, self.rank, self.head_label)


def parse_route(text: str) -> Route:
    """A route from its specification. Raises ValueError, saying what is wrong in it."""
    if not text.strip():
        raise ValueError(
            f"a route is empty; it is label=…, stage=…, subspace=…, position_role=… of {_keys()}"
        )
    found: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"route {text!r}: {item.strip()!r} has no '='; an item is key=value")
        if key not in _KEYS:
            raise ValueError(f"route {text!r}: no key {key!r}; there are {_keys()}")
        if key in found:
            raise ValueError(f"route {text!r}: key {key!r} stands twice")
        if not value:
            raise ValueError(f"route {text!r}: key {key!r} has no value")
        found[key] = value
    for key in _REQUIRED:
        if key not in found:
            raise ValueError(f"route {text!r}: key {key!r} is missing")
    optional = {key: value for key, value in found.items() if value not in ("none", "null")}
    try:
        return make_route({**{key: found[key] for key in _REQUIRED}, **optional})
    except ValueError as error:
        raise ValueError(f"route {text!r}: {error}") from None


def parse_routes(texts: Sequence[str]) -> tuple[Route, ...]:
    """Several of them. Raises ValueError, also for two of one label or of one meaning."""
    routes = tuple(parse_route(text) for text in texts)
    labels: set[str] = set()
    held: dict[str, str] = {}
    for route in routes:
        if route.label in labels:
            raise ValueError(f"label {route.label!r} stands for two routes")
        same = held.setdefault(str(route.parameters()), route.label)
        if same != route.label:
            raise ValueError(f"routes {same!r} and {route.label!r} are the same")
        labels.add(route.label)
    return routes


def require_routes(lake: Lake, run: str, report: str, probe: str, routes: Sequence[Route]) -> None:
    """Raises UnknownName for a stage, role or head that is not there, InvalidOption for a rank beyond a head's width."""
    for route in routes:
        require_stages(lake, run, route.stage)
        require_roles(lake, run, probe, route.position_role)
        if route.head is not None:
            require_head(lake, run, route.head_layer or 0, route.head)
            require_rank(lake, run, report, route.rank or 1)


def make_route(values: Mapping[str, Any]) -> Route:
    """A route from the values of its keys; `head` may be a label such as L2H1. Raises ValueError."""
    layer, head = values.get("head_layer"), values.get("head")
    label = re.fullmatch(r"L(\d+)H(\d+)", str(head))
    if label:
        if layer is not None and int(layer) != int(label[1]):
            raise ValueError(f"head {head} and head_layer {layer} disagree")
        layer, head = label.groups()
    route = Route(
        str(values["label"]),
        str(values["stage"]),
        str(values["subspace"]),
        str(values["position_role"]),
        _whole("rank", values.get("rank")),
        _whole("head_layer", layer),
        _whole("head", head),
    )
    _check(route)
    return route


def _check(route: Route) -> None:
    """A subspace takes the rank and head it needs, and no others: definitions 2 §A1."""
    name = route.subspace
    if name not in SUBSPACES:
        raise ValueError(f"no subspace {name!r}; there are {', '.join(SUBSPACES)}")
    of_head = name.startswith("head_")
    if of_head and (route.head is None or route.head_layer is None):
        raise ValueError(f"{name} is of a head: it needs head_layer and head")
    if not of_head and (route.head is not None or route.head_layer is not None):
        raise ValueError(f"{name} is of no head: it takes no head_layer and head")
    if name == "full_residual" and route.rank is not None:
        raise ValueError(f"{name} is the whole residual vector: it takes no rank")
    if name != "full_residual" and (route.rank is None or route.rank < 1):
        raise ValueError(f"{name} needs a rank of at least 1")


def _whole(key: str, value: Any) -> int | None:
    if value is None:
        return None
    if not re.fullmatch(r"-?\d+", str(value).strip()):
        raise ValueError(f"{key} {value!r} is no whole number")
    return int(value)


def _keys() -> str:
    return ", ".join(_KEYS)


_LONGEST = """\
CASE subspace_name
    WHEN 'embedding_key_identity' THEN greatest(d_model, num_keys)
    WHEN 'embedding_value_identity' THEN greatest(d_model, num_values)
    ELSE d_model
  END"""
ROUTE_LABELS = """\
-- The routes.
-- view: labels
SELECT
  spec, position, label, domain, $record_side[1] AS record_side,
  p->>'$.stage' AS stage, p->>'$.subspace' AS subspace_name,
  CASE
    WHEN p->>'$.subspace' = 'full_residual' THEN 'full_residual'
    WHEN p->>'$.subspace' LIKE 'head%' THEN 'head_singular_vectors'
    ELSE 'embedding_identity'
  END AS subspace_type,
  p->>'$.head' AS head_label,
  regexp_extract(p->>'$.head', 'L(\\d+)H', 1)::INTEGER AS head_layer,
  regexp_extract(p->>'$.head', 'H(\\d+)', 1)::INTEGER AS head,
  (p->>'$.rank')::INTEGER AS rank, p->>'$.position_role' AS position_role
FROM (
  SELECT
    unnest($spec) AS spec, unnest($spec_parameters)::JSON AS p, unnest($route_label) AS label,
    unnest($route_domain) AS domain, unnest(range(1, len($spec) + 1)) AS position
)
"""
# 2^-23 is float32's epsilon: what the weights were stored in.
ROUTE_BASES = f"""\
-- What a basis was cut from, at the source; no row for a full residual.
-- view: route_bases
WITH sizes AS (
  SELECT
    (SELECT max(shape[2]) FROM parameters WHERE run = $run AND module = 'token_embedding') AS d_model,
    len(key_tokens) AS num_keys, len(value_tokens) AS num_values,
    (SELECT count(DISTINCT head) FROM slices WHERE run = $run AND slice_kind = 'head') AS num_heads
  FROM probes
  WHERE run = $run AND probe = $probe
),
cut AS (
  SELECT l.*, b.source_step, b.target_step, b.singular_values, s.*, {_LONGEST} AS longest
  FROM scalar_bases AS b
  JOIN labels AS l USING (spec)
  JOIN intervals AS i USING (source_step, target_step), sizes AS s
  WHERE b.run = $run
)
SELECT
  position, label, domain, source_step, target_step, subspace_name, subspace_type, rank AS selected_rank,
  len(list_filter(singular_values, lambda s: s > longest * 2.0 ** -23 * singular_values[1])) AS available_rank,
  d_model AS ambient_dim, singular_values[1:rank] AS singular_values, 'cpu' AS basis_svd_device,
  CASE subspace_name WHEN 'embedding_key_identity' THEN 'key' WHEN 'embedding_value_identity' THEN 'value' END
    AS token_class,
  CASE subspace_name WHEN 'embedding_key_identity' THEN num_keys WHEN 'embedding_value_identity' THEN num_values END
    AS num_tokens,
  CASE WHEN subspace_name LIKE 'head_qk%' THEN 'QK' WHEN subspace_name LIKE 'head_ov%' THEN 'OV' END AS matrix,
  CASE WHEN head IS NOT NULL THEN split_part(subspace_name, '_', 3) END AS side,
  head_layer, head, head_label, CASE WHEN head IS NOT NULL THEN d_model // num_heads END AS head_dim
FROM cut
ORDER BY position, source_step
"""
_VIEWS = f"""\
{ROUTE_LABELS}
{ROUTE_BASES}
-- By cell: means over pairs of the margins of the three runs, and of the scores' sizes and signs.
-- view: route_cells
SELECT
  v.spec, v.source_step, v.target_step, c.split, c.pair_type,
  favg(source_value) FILTER (quantity = 'transfer_margin_clean') AS source_transfer_margin_clean_mean,
  favg(source_value) FILTER (quantity = 'transfer_margin_corrupted') AS source_transfer_margin_corrupted_mean,
  favg(source_value) FILTER (quantity = 'transfer_margin_patched') AS source_transfer_margin_patched_mean,
  favg(target_value) FILTER (quantity = 'transfer_margin_clean') AS target_transfer_margin_clean_mean,
  favg(target_value) FILTER (quantity = 'transfer_margin_corrupted') AS target_transfer_margin_corrupted_mean,
  favg(target_value) FILTER (quantity = 'transfer_margin_patched') AS target_transfer_margin_patched_mean,
  favg(abs(source_value)) FILTER (quantity = 'value') AS source_route_delta_abs_mean,
  favg(abs(target_value)) FILTER (quantity = 'value') AS target_route_delta_abs_mean,
  favg((source_value > 0)::INTEGER) FILTER (quantity = 'value') AS source_route_delta_positive_fraction,
  favg((target_value > 0)::INTEGER) FILTER (quantity = 'value') AS target_route_delta_positive_fraction
FROM pair_changes AS v
JOIN scalar_cells AS c ON c.spec = v.spec AND c.split IN ('__all__', v.split) AND c.pair_type IN ('__all__', v.pair_type)
GROUP BY ALL
ORDER BY ALL

-- Everything of a route, interval and cell (the metric columns of definitions 2 §E).
-- view: route_metrics
SELECT
  m.spec, l.position, i.source_step, i.target_step, i.step_gap, i.source_checkpoint, i.target_checkpoint, i.learning_rate,
  m.split, m.pair_type, l.label AS route_label, l.domain, l.stage, l.subspace_name, l.subspace_type, l.head_label,
  l.head_layer, l.head, l.rank, l.position_role, m.num_pairs,
  m.source_value AS source_route_score, m.target_value AS target_route_score,
  m.actual_delta, m.actual_delta_abs_mean, m.actual_delta_std,
  m.predicted_delta, m.residual, m.absolute_error, m.relative_error, m.relative_error_denominator,
  m.predicted_relative_error, m.predicted_relative_error_denominator, m.sign_match,
  m.integrated_delta, m.integrated_relative_error, m.predicted_delta_counting_aliases,
  c.* EXCLUDE (spec, source_step, target_step, split, pair_type),
  m.parameter_delta_l2_norm, m.gradient_l2_norm AS route_gradient_l2_norm,
  m.update_gradient_cosine AS update_route_gradient_cosine, m.num_parameters,
  m.zero_gradient_parameter_count AS zero_route_gradient_parameter_count,
  m.zero_gradient_parameter_names AS zero_route_gradient_parameter_names
FROM metrics AS m
JOIN intervals AS i USING (source_step, target_step)
JOIN labels AS l USING (spec)
JOIN route_cells AS c USING (spec, source_step, target_step, split, pair_type)
"""


class RouteReport(AttributionReport):
    """Base of reports on route scores. `routes` says which; a route takes both records of a pair."""

    more_views: ClassVar[str] = _VIEWS

    record_side: tuple[RecordSide, ...] = Field(
        ("clean",), description="not for routes: they take both records of a pair"
    )

    @model_validator(mode="after")
    def _no_side(self) -> RouteReport:
        if "record_side" in self.model_fields_set:
            raise ValueError(
                "--record-side: a route puts the clean record's state into the corrupted one; it has no side"
            )
        return self

    @property
    def routes(self) -> tuple[Route, ...]:
        """In the order of the report."""
        raise NotImplementedError

    def scalars(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """One per route."""
        return [(ROUTE_SCORE, route.parameters()) for route in self.routes]

    def measured_sides(self) -> tuple[RecordSide, ...]:
        """Both."""
        return ("clean", "corrupted")

    def parameters(self) -> dict[str, Any]:
        """Adds what view `labels` reads."""
        labels = [route.label for route in self.routes]
        return {**super().parameters(), "route_label": labels, "route_domain": ["eval"] * len(labels)}

    def require(self, lake: Lake, run: str) -> None:
        """Stages, roles and heads must be there, and ranks within a head's width."""
        super().require(lake, run)
        require_routes(lake, run, self.report_name(), self.probe, self.routes)


class SeveralRoutes(RouteReport):
    """Base of those with `--route`."""

    route: tuple[str, ...] = Field(
        ...,
        min_length=1,
        description="label=…,stage=…,subspace=…,position_role=… and, as the subspace needs, rank=…,head_layer=…,head=…",
    )

    @field_validator("route")
    @classmethod
    def _parsed(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        parse_routes(texts)
        return texts

    @property
    def routes(self) -> tuple[Route, ...]:
        """Those of `--route`."""
        return parse_routes(self.route)


def last_bases(results: Results) -> list[dict[str, Any]]:
    """The basis summary of the last interval, by route (definitions 2 §A1); without what a subspace does not have."""
    rows = results.rows(
        "SELECT * EXCLUDE (source_step, target_step, position) FROM route_bases "
        "WHERE source_step = (SELECT max(source_step) FROM intervals)"
    )
    return [{name: value for name, value in row.items() if value is not None} for row in rows]
