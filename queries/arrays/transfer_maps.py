"""Maps from source to target coordinates at one step, judged on held-out examples (definitions 4 §B)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report import ReportFailed
from .centroids import cosine_to_centroids
from .groups import group_by_token, group_means
from .stage_lens import Candidates, StageLens
from .subspaces import IdentitySubspace, identity_subspace
from .transfer import AffineMap, random_basis, ridge_map, row_cosines
from .value_codes import centroid_columns, lens_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRUE, SHUFFLED, WRONG, KEY, RANDOM = (
    "true_transfer",
    "shuffled_answer_value",
    "wrong_support_value",
    "key_identity",
    "random_subspace",
)


@dataclass(frozen=True)
class Side:
    """Vectors Float64[n, d] of one end at one step, the tokens Int64[n] that group them, and what they are called."""

    vectors: NDArray[np.float64]
    tokens: NDArray[np.int64]
    group_by: str
    stage: str
    role: str

    def __str__(self) -> str:
        return f"{self.stage} / {self.role}, grouped by {self.group_by}"


class Basis:
    """The identity basis of a side's fit examples, up to the largest rank asked for."""

    def __init__(self, side: Side, fit: NDArray[np.int64], rank: int, what: str) -> None:
        groups = group_by_token(side.tokens[fit])
        if len(groups) < 2:
            raise ReportFailed(
                f"the {what} basis of {side} needs at least two tokens among the fit examples, there is one"
            )
        if rank > len(groups) - 1:
            raise ReportFailed(
                f"--basis-rank {rank} is above what the {what} basis allows: {side} has {len(groups)} tokens among the "
                f"{len(fit)} fit examples, so at most rank {len(groups) - 1}"
            )
        self.side, self.groups, self.count = side, groups, len(fit)
        self.found: IdentitySubspace = identity_subspace(
            side.vectors[fit], groups, rank, f"the {what} basis, {side}"
        )

    def at(self, rank: int) -> NDArray[np.float64]:
        """Float64[d, rank]."""
        return self.found.identity.basis[:, :rank]

    def summary(self, basis_role: str, rank: int) -> dict[str, Any]:
        """Fields of a subspace row."""
        identity, whole = self.found.identity, self.found.all_vectors
        return {
            "basis_role": basis_role,
            "role": f"{self.side.stage} {self.side.role}",
            "context_role": self.side.role,
            "group_by": self.side.group_by,
            "num_vectors": self.count,
            "num_unique_tokens": len(self.groups),
            "tokens": self.groups.tokens.tolist(),
            "ambient_dim": self.side.vectors.shape[1],
            "pca_rank": rank,
            "identity_centered_rank": identity.centered_rank,
            "identity_singular_values": identity.singular_values[:rank].tolist(),
            "all_vector_centered_rank": whole.centered_rank,
            "all_vector_singular_values": whole.singular_values[:rank].tolist(),
        }


@dataclass(frozen=True)
class Ends:
    """What a step offers: both ends, the vectors of the controls that were asked for, and how a vector is read."""

    source: Side
    target: Side
    wrong_source: NDArray[np.float64] | None
    key: Side | None
    lens: StageLens
    normalized: bool
    candidates: Candidates


@dataclass(frozen=True)
class Fitting:
    """How maps are fitted: places Int64 of the fit and eval examples, λ, and this step's seed of the random subspace."""

    fit: NDArray[np.int64]
    evaluated: NDArray[np.int64]
    ridge: float
    seed: int


def transfers(
    ends: Ends, fitting: Fitting, ranks: Sequence[int], controls: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row per rank and kind of source: the true map, then the controls in order.

    Raises ReportFailed for a rank that a basis does not have, too few examples, or a vector without direction.
    """
    top = max(ranks)
    source = Basis(ends.source, fitting.fit, top, "source")
    target = Basis(ends.target, fitting.fit, top, "target")
    key = None if ends.key is None else Basis(ends.key, fitting.fit, top, KEY)
    for rank in ranks:
        judge = _Judge(ends, fitting, target.at(rank), rank)
        own = ends.source.vectors @ source.at(rank)
        true_map = judge.fitted(own, TRUE)
        both = [source.summary("source_value_identity", rank), target.summary("target_value_identity", rank)]
        yield judge.row(TRUE, own[fitting.evaluated], true_map) | {"bases": both}
        for control in controls:
            yield _control(control, judge, own, true_map, source.at(rank), key)


def _control(
    kind: str,
    judge: _Judge,
    own: NDArray[np.float64],
    true_map: AffineMap,
    basis: NDArray[np.float64],
    key: Basis | None,
) -> dict[str, Any]:
    ends, fitting, rank = judge.ends, judge.fitting, judge.rank
    evaluated = fitting.evaluated
    if kind == SHUFFLED:
        if len(evaluated) < 2:
            raise ReportFailed(f"control {SHUFFLED} needs at least two eval examples; lower --fit-fraction")
        answers = ends.candidates.answers[evaluated]
        row = judge.row(kind, np.roll(own[evaluated], -1, axis=0), true_map)
        return row | {"source_has_same_answer": (np.roll(answers, -1) == answers).astype(np.float64)}
    if kind == WRONG:
        assert ends.wrong_source is not None
        return judge.row(kind, (ends.wrong_source @ basis)[evaluated], true_map)
    if kind == KEY:
        assert key is not None
        coordinates = key.side.vectors @ key.at(rank)
        summary = key.summary("source_key_identity_control", rank)
    else:
        width = ends.source.vectors.shape[1]
        coordinates = ends.source.vectors @ random_basis(width, rank, fitting.seed + 9176 * rank)
        # What a basis without groups does not have is left out, and null in the rows.
        summary = {
            "basis_role": "random_source_control",
            "role": f"{ends.source.stage} {ends.source.role}",
            "context_role": ends.source.role,
            "group_by": RANDOM,
            "ambient_dim": width,
            "pca_rank": rank,
        }
    return judge.row(kind, coordinates[evaluated], judge.fitted(coordinates, kind)) | {"bases": [summary]}


class _Judge:
    """Fits maps to the target's coordinates at one rank, and measures what they predict for the eval examples."""

    def __init__(self, ends: Ends, fitting: Fitting, basis: NDArray[np.float64], rank: int) -> None:
        self.ends, self.fitting, self.rank = ends, fitting, rank
        self._basis = basis
        self._target = ends.target.vectors @ basis
        self._truth = self._target[fitting.evaluated]
        groups = group_by_token(ends.target.tokens[fitting.fit])
        self._centroid_tokens = groups.tokens
        self._centroids = group_means(self._target[fitting.fit], groups)
        self._candidates = ends.candidates.take(fitting.evaluated)
        self._shared: Mapping[str, Any] = {
            "basis_rank": rank,
            "places": fitting.evaluated,
            "source_group_tokens": ends.source.tokens[fitting.evaluated],
            "target_group_tokens": ends.target.tokens[fitting.evaluated],
            "target_coord_norm": np.linalg.norm(self._truth, axis=1),
            "coord_target_centered_squared_norm": np.square(self._truth - self._truth.mean(0)).sum(1),
        }

    def fitted(self, source: NDArray[np.float64], kind: str) -> AffineMap:
        """The map from source coordinates Float64[n, p] of every example, fitted on the fit examples."""
        fit = self.fitting.fit
        what = f"the map of {kind} at rank {self.rank}"
        return ridge_map(source[fit], self._target[fit], self.fitting.ridge, what)

    def row(self, kind: str, source: NDArray[np.float64], mapping: AffineMap) -> dict[str, Any]:
        """What `mapping` predicts from the eval examples' source coordinates Float64[m, p]."""
        what = f"{kind} at rank {self.rank}"
        predicted = mapping(source)
        vectors = predicted @ self._basis.T
        found = cosine_to_centroids(
            predicted,
            self.ends.target.tokens[self.fitting.evaluated],
            self._centroid_tokens,
            self._centroids,
            what,
        )
        return {
            "eval_kind": kind,
            **self._shared,
            "source_coord_norm": np.linalg.norm(source, axis=1),
            "predicted_coord_norm": np.linalg.norm(predicted, axis=1),
            "coord_squared_error": np.square(predicted - self._truth).sum(1),
            "coord_cosine": row_cosines(predicted, self._truth, what),
            "projected_vector_cosine": row_cosines(vectors, self._truth @ self._basis.T, what),
            **lens_columns(self.ends.lens.logits(vectors, self.ends.normalized), self._candidates),
            **centroid_columns(found),
            "source_has_same_answer": np.full(len(source), np.nan),
            "bases": [],
        }
