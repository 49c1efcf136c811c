"""First singular directions of W_QK and W_OV against the token embedding: what `-- arrays: head_directions` holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..lake.errors import MissingData
from ..lake.imports import leave_pandas_alone
from .arrays.token_geometry import TokenSubspace, subspace_alignment, token_subspace, top_tokens
from .report import ReportFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .results import Results

# First singular directions of one head: token list, alignment, and class of tokens each is held against. Arrays of their
# vectors, in the same order, below.
_DIRECTIONS = (
    ("qk_query_direction_top_tokens", "qk_query_key_subspace_alignment", "key"),
    ("qk_key_direction_top_tokens", "qk_key_key_subspace_alignment", "key"),
    ("ov_input_direction_top_tokens", "ov_input_value_subspace_alignment", "value"),
    ("ov_output_direction_top_tokens", "ov_output_value_subspace_alignment", "value"),
)
_ARRAYS = ("W_QK.U", "W_QK.Vh", "W_OV.U", "W_OV.Vh")
_CELLS_AT_ONCE = 16_000_000


def head_directions(results: Results, probe: str, count: int) -> Mapping[str, Any]:
    """A row per step and head: alignments, token lists, and the subspaces of the step (the same for all its heads).

    Alignments and subspaces are null where the probe has no such tokens. Raises ReportFailed for a zero direction.
    """
    leave_pandas_alone()
    told = results.lake.session.execute(
        "SELECT key_tokens, value_tokens, vocabulary FROM probes WHERE run = ? AND probe = ?",
        [results.run, probe],
        tables={"probes"},
    ).fetchall()[0]
    tokens = {"key": told[0], "value": told[1]}
    directions = _directions(results)
    count_steps, layers, each, *_ = directions.shape
    heads = count_steps * layers * each
    places = np.indices((count_steps, layers, each)).reshape(3, -1)
    steps = np.array(results.steps, np.int64)[places[0]]
    columns: dict[str, Any] = {
        "step": pa.array(steps.tolist(), pa.int64()),
        "layer": pa.array(places[1].tolist(), pa.int32()),
        "head": pa.array(places[2].tolist(), pa.int32()),
    }
    stacked = directions.reshape(heads, len(_DIRECTIONS), -1)
    ids: list[NDArray[np.int64]] = []
    signed: list[NDArray[np.float64]] = []
    subspaces: list[dict[str, TokenSubspace]] = []
    alignments = np.full((heads, len(_DIRECTIONS)), np.nan)
    for step, embedding in _embeddings(results, sorted(set(steps.tolist()))):
        here = np.flatnonzero(steps == step)
        chosen, scores = top_tokens(stacked[here], embedding, count)
        ids.append(chosen)
        signed.append(scores)
        held = {
            kind: token_subspace(embedding[of], f"{kind} tokens at step {step}")
            for kind, of in tokens.items()
            if of
        }
        subspaces.extend([held] * len(here))
        for place, (_, _, kind) in enumerate(_DIRECTIONS):
            if kind in held:
                alignments[here, place] = subspace_alignment(stacked[here, place], held[kind])
    all_ids, all_signed = np.concatenate(ids), np.concatenate(signed)
    for place, (top, alignment, _) in enumerate(_DIRECTIONS):
        columns[alignment] = pa.array(alignments[:, place].tolist(), pa.float64(), from_pandas=True)
        columns[top] = _token_lists(all_ids[:, place], all_signed[:, place], told[2])
    columns["embedding_subspaces"] = pa.array(
        [{f"{kind}_identity_subspace": _summary(held.get(kind)) for kind in tokens} for held in subspaces],
        _SUBSPACES,
    )
    return columns


_SUBSPACE = pa.struct(
    {
        "rank": pa.int64(),
        "ambient_dim": pa.int64(),
        "num_tokens": pa.int64(),
        "singular_values": pa.list_(pa.float64()),
    }
)
_SUBSPACES = pa.struct({"key_identity_subspace": _SUBSPACE, "value_identity_subspace": _SUBSPACE})


def _summary(subspace: TokenSubspace | None) -> dict[str, Any] | None:
    if subspace is None:
        return None
    return {
        "rank": subspace.rank,
        "ambient_dim": len(subspace.basis),
        "num_tokens": subspace.num_tokens,
        "singular_values": subspace.singular_values,
    }


def _directions(results: Results) -> NDArray[np.float64]:
    """Float64[step, layer, head, direction, d], directions as in `_DIRECTIONS`; raises ReportFailed for a zero one.

    Arrays are read as such: the scan behind SQL costs several times as much.
    """
    first = [results.lake.tensor("svd", name, results.run).read(results.steps)[..., 0, :] for name in _ARRAYS]
    found = np.stack(first, axis=-2).astype(np.float64)
    bad = np.argwhere(~(np.linalg.norm(found, axis=-1) > 0))
    if len(bad):
        step, layer, head, direction = bad[0].tolist()
        matrix, _, part = _ARRAYS[direction].partition(".")
        raise ReportFailed(
            f"the first {'left' if part == 'U' else 'right'} singular vector of L{layer}H{head} {matrix} at step "
            f"{results.steps[step]} is zero or not a number and has no direction; leave that step out"
        )
    return found


def _embeddings(results: Results, steps: list[int]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(step, token embedding Float64[vocabulary, d]), a few steps in memory at a time."""
    found = results.lake.session.execute(
        "SELECT parameter, shape FROM parameters WHERE run = ? AND module = 'token_embedding'",
        [results.run],
        tables={"parameters"},
    ).fetchall()
    if not found:
        raise MissingData(
            f"run {results.run!r} does not say which parameter is its token embedding: import it with an adapter"
        )
    parameter, shape = found[0]
    embedding = results.lake.tensor("weights", parameter, results.run)
    at_once = max(1, _CELLS_AT_ONCE // int(np.prod(shape)))
    for start in range(0, len(steps), at_once):
        part = steps[start : start + at_once]
        yield from zip(part, embedding.read(part).astype(np.float64), strict=True)


def _token_lists(
    ids: NDArray[np.int64], signed: NDArray[np.float64], vocabulary: list[str] | None
) -> pa.ListArray:
    """Int and Float[n, k] as n lists of {token, token_id, signed_score, abs_score}."""
    # From lists: from NumPy arrays pyarrow would import numpy.ma, and `take` pyarrow.compute, longer than all of this takes.
    flat, scores = ids.reshape(-1).tolist(), signed.reshape(-1).tolist()
    texts = vocabulary or []
    tokens = pa.StructArray.from_arrays(
        [
            # An imported probe knows the texts of its own tokens only.
            pa.array([texts[token] if token < len(texts) else None for token in flat], pa.string()),
            pa.array(flat, pa.int64()),
            pa.array(scores, pa.float64()),
            pa.array([abs(score) for score in scores], pa.float64()),
        ],
        ["token", "token_id", "signed_score", "abs_score"],
    )
    starts = range(0, len(flat) + 1, ids.shape[1])
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), tokens)
