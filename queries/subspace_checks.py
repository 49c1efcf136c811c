"""What a report on a subspace of the residual stream asks of a run: that stage, role, head and rank are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lake.errors import UnknownName
from .attribution_report import require_rank
from .probe_report import require_head, require_roles, require_stages
from .report import InvalidOption

if TYPE_CHECKING:
    from ..lake import Lake
    from .route_options import Route

_TOKENS = {"embedding_key_identity": "key_tokens", "embedding_value_identity": "value_tokens"}


def require_subspace(lake: Lake, run: str, report: str, probe: str, route: Route) -> None:
    """Raises UnknownName for a stage, role or head that is not there, InvalidOption for a rank that the subspace lacks.

    The numerical rank of a step's weights may be lower still; the extraction says so.
    """
    require_stages(lake, run, route.stage)
    require_roles(lake, run, probe, route.position_role)
    if route.head is not None:
        require_head(lake, run, route.head_layer or 0, route.head)
        require_rank(lake, run, report, route.rank or 1)
    if route.subspace in _TOKENS:
        _require_tokens(lake, run, report, probe, route)


def _require_tokens(lake: Lake, run: str, report: str, probe: str, route: Route) -> None:
    """Centred, n tokens span n − 1 directions at most."""
    column = _TOKENS[route.subspace]
    ((tokens,),) = lake.session.execute(
        f"SELECT coalesce(len({column}), 0) FROM probes WHERE run = ? AND probe = ?",
        [run, probe],
        tables={"probes"},
    ).fetchall()
    ((width,),) = lake.session.execute(
        "SELECT max(shape[2]) FROM parameters WHERE run = ? AND module = 'token_embedding'",
        [run],
        tables={"parameters"},
    ).fetchall()
    if tokens < 2:
        raise UnknownName(
            f"{report}: {route.subspace} needs two {column.replace('_', ' ')} or more, and probe {probe!r} names {tokens}"
        )
    limit = min(tokens - 1, width or tokens - 1)
    if (route.rank or 1) > limit:
        raise InvalidOption(
            f"{report}: --rank {route.rank} exceeds that of {route.subspace}, which is at most {limit}: {tokens} tokens "
            "less their mean"
        )


def require_causal_role(lake: Lake, run: str, report: str, probe: str, role: str) -> None:
    """Raises InvalidOption for a role that an event lacks, or that lies after its prediction (definitions 2 §A3)."""
    if role == "causal_prefix":
        return
    ((events, held, after),) = lake.session.execute(
        "SELECT count(DISTINCT e.event), count(DISTINCT p.event), "
        "count(DISTINCT p.event) FILTER (p.position > e.prediction_position) FROM events AS e "
        "LEFT JOIN (SELECT event, position FROM positions WHERE run = $run AND probe = $probe AND kind = 'role' "
        "AND role = $role) AS p USING (event) WHERE e.run = $run AND e.probe = $probe",
        {"run": run, "probe": probe, "role": role},
        tables={"events", "positions"},
    ).fetchall()
    if after:
        raise InvalidOption(
            f"{report}: Intervention positions must be in the causal prefix: role {role!r} lies after the prediction in "
            f"{after} of {events} query events of probe {probe!r}"
        )
    if held < events:
        raise InvalidOption(
            f"{report}: role {role!r} has no position to patch in {events - held} of {events} query events of "
            f"probe {probe!r}"
        )
