"""What is put in the place of a target value code: the code itself, what maps from a source code predict, and controls.

Everything is float64. Axes: `example` every query event, `eval` those that judge the maps, `rank`. Source: definitions 4
§B, §C.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .value_codes import (
    AffineMap,
    IdentityBasis,
    Side,
    TooFewExamples,
    identity_basis,
    random_basis,
    ridge_map,
)

ORACLE, TRUE = "oracle_actual_projected", "true_transfer"
SHUFFLED, WRONG, KEY, RANDOM = (
    "shuffled_answer_value",
    "wrong_support_value",
    "key_identity",
    "random_subspace",
)
CONTEXT_ONLY, WITH_CONTEXT = "context_only", "source_plus_context"


@dataclass(frozen=True)
class Ends:
    """What a step offers; `vector` is `example` in all of them."""

    source: Side
    target: Side
    fit: Tensor
    """`Bool[example]`: those that fit bases and maps; the others judge."""
    wrong_source: Tensor | None = None
    """`Float64[example, d_model]`: for control wrong_support_value."""
    key: Side | None = None
    """For control key_identity."""
    context: Side | None = None
    """Grouped by the target's tokens."""


@dataclass(frozen=True)
class Fitting:
    """How bases and maps are fitted."""

    rank: int
    context_rank: int
    """Of no meaning without a context."""
    ridge: float
    seed: int
    """Of the random directions, at this step and rank."""
    controls: Collection[str]


@dataclass(frozen=True)
class Replacement:
    """What is put along the target's directions."""

    coordinates: Tensor
    """`Float64[eval, rank]`."""
    source: Tensor | None
    """`Int[eval]`: the example, among those that judge, whose source it was made from; None where there was none."""


@dataclass(frozen=True)
class Transfers:
    """The target's code of the examples that judge, and its replacements by kind."""

    basis: Tensor
    """`Float64[d_model, rank]`: the target's."""
    target: Tensor
    """`Float64[eval, rank]`: the code itself."""
    replacements: dict[str, Replacement]
    bases: dict[str, IdentityBasis | Tensor]
    """By role; random directions are `Float64[d_model, rank]`."""


def fit_transfers(ends: Ends, fitting: Fitting) -> Transfers:
    """Bases and maps of the fit examples, and what they predict for the others. Raises ValueCodeError."""
    fits, judges = int(ends.fit.sum()), int((~ends.fit).sum())
    if not fits or not judges:
        raise TooFewExamples(
            f"of {fits + judges} examples {fits} fit and {judges} judge the map, and both must have some; change "
            "--fit-fraction, --split or --max-records"
        )
    if SHUFFLED in fitting.controls and judges < 2:
        raise TooFewExamples(f"control {SHUFFLED} needs at least two eval examples; lower --fit-fraction")
    fitter = _Fitter(ends, fitting)
    replacements = dict(fitter.replacements())
    return Transfers(fitter.target_basis, fitter.z[~ends.fit], replacements, fitter.bases)


class _Fitter:
    """Fits bases once, and maps as they are asked for."""

    def __init__(self, ends: Ends, fitting: Fitting) -> None:
        self.ends, self.fitting = ends, fitting
        self.bases: dict[str, IdentityBasis | Tensor] = {}
        self.source_basis = self._basis("source_value_identity", ends.source, fitting.rank)
        self.target_basis = self._basis("target_value_identity", ends.target, fitting.rank)
        self.a = ends.source.vectors @ self.source_basis
        self.z = ends.target.vectors @ self.target_basis

    def _basis(self, role: str, side: Side, rank: int) -> Tensor:
        found = identity_basis(side.of(self.ends.fit), rank)
        self.bases[role] = found
        return found.basis

    def _map(self, source: Tensor, kind: str) -> AffineMap:
        """From coordinates of every example, fitted on those that fit."""
        fit = self.ends.fit
        what = f"the map of {kind} at rank {self.fitting.rank}"
        return ridge_map(source[fit], self.z[fit], self.fitting.ridge, what)

    def replacements(self) -> Iterator[tuple[str, Replacement]]:
        """Each with its kind, in report order."""
        judge, controls = ~self.ends.fit, self.fitting.controls
        own = torch.arange(int(judge.sum()), device=self.z.device)
        yield ORACLE, Replacement(self.z[judge], None)
        true_map = self._map(self.a, TRUE)
        yield TRUE, Replacement(true_map(self.a[judge]), own)
        # Controls that keep the true map: another source for each example that judges.
        others: dict[str, tuple[Tensor, Tensor]] = {}
        if SHUFFLED in controls:
            others[SHUFFLED] = self.a[judge].roll(-1, 0), own.roll(-1)
        if WRONG in controls:
            assert self.ends.wrong_source is not None
            others[WRONG] = (self.ends.wrong_source @ self.source_basis)[judge], own
        for kind, (coordinates, source) in others.items():
            yield kind, Replacement(true_map(coordinates), source)
        # Controls with directions, and so a map, of their own.
        for kind, coordinates in self._refit():
            yield kind, Replacement(self._map(coordinates, kind)(coordinates[judge]), own)
        if self.ends.context is not None:
            yield from self._with_context(self.ends.context, others, own)

    def _refit(self) -> Iterator[tuple[str, Tensor]]:
        """(control, coordinates of every example)."""
        ends, fitting = self.ends, self.fitting
        if KEY in fitting.controls:
            assert ends.key is not None
            basis = self._basis("source_key_identity_control", ends.key, fitting.rank)
            yield KEY, ends.key.vectors @ basis
        if RANDOM in fitting.controls:
            vectors = ends.source.vectors
            basis = random_basis(vectors.shape[1], fitting.rank, fitting.seed).to(vectors.device)
            self.bases["random_source_control"] = basis
            yield RANDOM, vectors @ basis

    def _with_context(
        self, context: Side, others: dict[str, tuple[Tensor, Tensor]], own: Tensor
    ) -> Iterator[tuple[str, Replacement]]:
        judge = ~self.ends.fit
        c = context.vectors @ self._basis("prediction_context_identity", context, self.fitting.context_rank)
        yield CONTEXT_ONLY, Replacement(self._map(c, CONTEXT_ONLY)(c[judge]), None)
        both = torch.cat([self.a, c], 1)
        true_map = self._map(both, WITH_CONTEXT)
        yield WITH_CONTEXT, Replacement(true_map(both[judge]), own)
        for kind, (coordinates, source) in others.items():
            mixed = torch.cat([coordinates, c[judge]], 1)
            yield f"{WITH_CONTEXT}_{kind}", Replacement(true_map(mixed), source)
        random = self.bases.get("random_source_control")
        if isinstance(random, Tensor):
            mixed = torch.cat([self.ends.source.vectors @ random, c], 1)
            kind = f"{WITH_CONTEXT}_{RANDOM}"
            yield kind, Replacement(self._map(mixed, kind)(mixed[judge]), own)
            # What published numbers have: coordinates on random directions through a map meant for the source's own.
            yield f"{kind}_not_refit", Replacement(true_map(mixed[judge]), own)
