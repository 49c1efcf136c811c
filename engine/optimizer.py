"""The algebra of Adam and AdamW: which optimizers it covers, the exact replay, the split of one update.

Sources: Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (AdamW, decoupled weight decay). The split of an
update (``update_terms``) and the search for the clip coefficient (``clipping``) are offered here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from .. import LakebedError
from .clipping import bits_equal, clip_coefficient
from .update_terms import UpdateTerms, split_update

__all__ = [
    "AdamGroup",
    "AdamReplay",
    "OptimizerError",
    "ParameterMismatch",
    "UnsupportedOptimizer",
    "UpdateTerms",
    "bits_equal",
    "check_supported",
    "clip_coefficient",
    "numeric_environment",
    "parameter_groups",
    "split_update",
]
_FLOATS = ("learning_rate", "beta1", "beta2", "eps", "weight_decay")


class OptimizerError(LakebedError, ValueError):
    """An optimizer, or the parameters given to it, cannot be recorded as asked."""


class UnsupportedOptimizer(OptimizerError):
    """The update of this optimizer cannot be replayed exactly from gradients."""

    def __init__(self, optimizer: object, reason: str) -> None:
        kind = type(optimizer)
        super().__init__(
            f"{kind.__module__}.{kind.__qualname__} cannot be replayed from its gradients: {reason}. "
            'Record it with store="full", which keeps weights and optimizer state at every step.'
        )


class ParameterMismatch(OptimizerError):
    """The optimizer's parameters are not the model's, or one of them stands in two groups."""


@dataclass(frozen=True)
class AdamGroup:
    """The hyperparameters of one parameter group at one step, as torch.optim applied them.

    ``decoupled`` is True for AdamW (decay outside the moments) and False for Adam (an L2 term in the
    gradient). ``foreach`` and ``fused`` are the flags the optimizer was built with (None: torch's default
    for the device); they choose between implementations whose last bits differ. Floats survive ``to_json``
    exactly.
    """

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool = True
    maximize: bool = False
    foreach: bool | None = None
    fused: bool | None = None

    @classmethod
    def from_param_group(cls, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> AdamGroup:
        """Read one entry of ``optimizer.param_groups``; UnsupportedOptimizer if it cannot be replayed."""
        for option in ("amsgrad", "capturable", "differentiable"):
            if group.get(option):
                raise UnsupportedOptimizer(optimizer, f"it was built with {option}=True")
        beta1, beta2 = group["betas"]
        numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        for name, number in zip(_FLOATS, numbers, strict=True):
            # A tensor or a numpy float32 takes part in the update in its own precision, which a float does
            # not.
            if not isinstance(number, float | int):
                raise UnsupportedOptimizer(optimizer, f"its {name} is a {type(number).__name__}, not a float")
        flags = {
            "decoupled": _base_class(optimizer) is torch.optim.AdamW
            or group.get("decoupled_weight_decay", False),
            "maximize": group["maximize"],
            "foreach": group["foreach"],
            "fused": group["fused"],
        }
        return cls.from_json(dict(zip(_FLOATS, numbers, strict=True)) | flags)

    def to_json(self) -> dict[str, float | bool | None]:
        """Return a JSON-able dict; ``AdamGroup.from_json`` gives back an equal group."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AdamGroup:
        """Build a group from ``to_json``'s dict; unknown keys are an error (TypeError)."""
        values: dict[str, Any] = {k: float(v) if k in _FLOATS else v for k, v in record.items()}
        return cls(**values)


def _base_class(optimizer: torch.optim.Optimizer) -> type[torch.optim.Optimizer] | None:
    for base in (torch.optim.AdamW, torch.optim.Adam):  # AdamW first: it is a subclass of Adam
        if isinstance(optimizer, base):
            return base
    return None


def check_supported(optimizer: torch.optim.Optimizer) -> None:
    """Raise UnsupportedOptimizer unless ``optimizer`` is torch's own Adam or AdamW in a replayable setting.

    A subclass is accepted as long as it inherits the update unchanged. Sparse gradients are refused by the
    optimizers themselves, at the first step.
    """
    base = _base_class(optimizer)
    if base is None:
        raise UnsupportedOptimizer(optimizer, "only torch.optim.Adam and torch.optim.AdamW can")
    for method in ("step", "_init_group"):
        # torch wraps `step` once per class to call hooks, so the innermost functions are compared.
        own, inherited = (inspect.unwrap(getattr(cls, method)) for cls in (type(optimizer), base))
        if own is not inherited:
            raise UnsupportedOptimizer(optimizer, f"it overrides {base.__name__}.{method}")
    for group in optimizer.param_groups:
        AdamGroup.from_param_group(optimizer, group)
        if any(parameter.is_complex() for parameter in group["params"]):
            raise UnsupportedOptimizer(optimizer, "it has complex parameters")


def parameter_groups(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, nn.Parameter], dict[str, int]]:
    """Name the optimizer's parameters.

    Returns the parameters by name, in the model's order, and the index of each one's parameter group. A tied
    parameter appears once, under the first name ``model.named_parameters()`` gives it. Raises
    ParameterMismatch if a parameter is in two groups or is not the model's.
    """
    group_of_tensor: dict[nn.Parameter, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter in group_of_tensor:
                raise ParameterMismatch(
                    f"a parameter of shape {tuple(parameter.shape)} is in the optimizer's groups "
                    f"{group_of_tensor[parameter]} and {index}"
                )
            group_of_tensor[parameter] = index
    named = {name: p for name, p in model.named_parameters() if p in group_of_tensor}
    if unknown := set(group_of_tensor) - set(named.values()):
        shapes = sorted(tuple(parameter.shape) for parameter in unknown)
        raise ParameterMismatch(
            f"the optimizer holds {len(unknown)} parameter(s) that the model does not name, "
            f"of shapes {shapes}"
        )
    return named, {name: group_of_tensor[parameter] for name, parameter in named.items()}


def numeric_environment() -> dict[str, str | int | bool]:
    """What can change the last bit of an update; record it beside a trace whose replay must be bit-exact.

    ``cpu_capability`` is the one that matters: torch's kernels differ between vector instruction sets.
    ``flush_denormal`` is a property of the calling thread (``torch.set_flush_denormal``), inherited by
    threads started afterwards: replay in a thread that has the same setting. ``threads`` was never seen to
    change a bit of the update.
    """
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "flush_denormal": not bool((torch.full((64,), 1e-39) * 1.0)[0]),
    }


class AdamReplay:
    """Weights and moments that follow a live Adam or AdamW, bit for bit, from its gradients alone.

    The update is torch's own (``torch.optim.adam.adam``), in the implementation the group records. Tensors
    are private copies; ``weights``, ``exp_avg``, ``exp_avg_sq`` map each parameter name to a tensor that the
    next ``step`` overwrites, and ``step_counts`` counts each parameter's updates. Safe to run in a thread
    beside training (one thread at a time per object).

    Parameters of a group are kept in one flat buffer and updated by one call when torch's kernel provably
    does not care where in a buffer an element lies; otherwise (a fused kernel, a parameter without gradient)
    tensor by tensor. A missing moment means that the parameter has not been stepped: torch starts it at
    zero.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        exp_avg: Mapping[str, Tensor] | None = None,
        exp_avg_sq: Mapping[str, Tensor] | None = None,
        step_counts: Mapping[str, int] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        def private(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device=device, copy=True).contiguous()

        self.weights = {name: private(weight) for name, weight in weights.items()}
        self.exp_avg, self.exp_avg_sq = (
            {
                name: private(moment[name]) if name in moment else torch.zeros_like(weight)
                for name, weight in self.weights.items()
            }
            for moment in (exp_avg or {}, exp_avg_sq or {})
        )
        self.step_counts = {name: int((step_counts or {}).get(name, 0)) for name in self.weights}
        self._group_of: dict[str, int] | None = None
        self._buckets: list[_Bucket] = []

    @torch.no_grad()
    def step(
        self,
        raw_gradients: Mapping[str, Tensor | None],
        clip_coefficient: float | None,
        groups: Sequence[AdamGroup],
        group_of: Mapping[str, int],
    ) -> None:
        """Apply one update.

        ``raw_gradients`` are multiplied by ``clip_coefficient`` first, as ``clip_grad_norm_`` does (None:
        used as they are). A parameter whose gradient is None or absent is skipped, its step counter too, as
        torch does. Raises ParameterMismatch for a gradient or a group of a parameter this replay does not
        hold.
        """
        if self._group_of != group_of:
            self._arrange(group_of)
        if stray := [name for name in raw_gradients if name not in group_of]:
            raise ParameterMismatch(f"gradients of parameters in no optimizer group: {', '.join(stray)}")
        scale = 1.0 if clip_coefficient is None else clip_coefficient
        for bucket in self._buckets:
            group = groups[bucket.group]
            present = [name for name in bucket.names if raw_gradients.get(name) is not None]
            counts = [self.step_counts[name] + 1 for name in present]
            gradients = [self._gradient(name, raw_gradients[name]) for name in present]
            whole = len(present) == len(bucket.names) and len(set(counts)) == 1
            if whole and bucket.position_independent(group):
                torch.cat([gradient.reshape(-1) for gradient in gradients], out=bucket.gradient)
                if scale != 1.0:
                    bucket.gradient.mul_(scale)
                _update(group, [bucket.weight], [bucket.gradient], [bucket.m], [bucket.v], counts[:1])
            elif present:
                scaled = gradients if scale == 1.0 else [gradient.mul(scale) for gradient in gradients]
                weights, m, v = (
                    [tensors[name] for name in present]
                    for tensors in (self.weights, self.exp_avg, self.exp_avg_sq)
                )
                _update(group, weights, scaled, m, v, counts)
            self.step_counts.update(zip(present, counts, strict=True))

    def mismatches(
        self,
        weights: Mapping[str, Tensor],
        exp_avg: Mapping[str, Tensor],
        exp_avg_sq: Mapping[str, Tensor],
        step_counts: Mapping[str, int],
    ) -> list[str]:
        """Name what differs by even one bit from the given state, e.g. ``["exp_avg blocks.0.ln_1.bias"]``.

        A moment that the given state does not hold (the parameter was never stepped) must be zero here.
        """
        found = []
        for kind, given in (("weight", weights), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            held = self.weights if kind == "weight" else getattr(self, kind)
            for name, tensor in held.items():
                other = given.get(name, torch.zeros(()) if kind == "weight" else torch.zeros_like(tensor))
                if not bits_equal(tensor, other.detach().to(tensor.device)):
                    found.append(f"{kind} {name}")
        return found + [f"step {n}" for n, k in self.step_counts.items() if k != step_counts.get(n, 0)]

    def _gradient(self, name: str, gradient: Tensor | None) -> Tensor:
        weight = self.weights[name]
        if gradient is None or gradient.shape != weight.shape:
            raise ParameterMismatch(
                f"the gradient of {name} is not shaped {tuple(weight.shape)} as its weight is"
            )
        return gradient.detach().to(weight.device)

    def _arrange(self, group_of: Mapping[str, int]) -> None:
        """Lay the parameters of each (group, dtype, device) end to end; the named tensors become views."""
        if stray := [name for name in group_of if name not in self.weights]:
            raise ParameterMismatch(f"the replay holds no weights of {', '.join(stray)}")
        members: dict[tuple[int, torch.dtype, torch.device], list[str]] = {}
        for name, weight in self.weights.items():
            if name in group_of:
                members.setdefault((group_of[name], weight.dtype, weight.device), []).append(name)
        self._buckets = []
        for (group, _, _), names in members.items():
            flats: list[Tensor] = []
            for tensors in (self.weights, self.exp_avg, self.exp_avg_sq):
                flat = torch.cat([tensors[name].reshape(-1) for name in names])
                pieces = torch.split(flat, [tensors[name].numel() for name in names])
                tensors.update({n: p.view(tensors[n].shape) for n, p in zip(names, pieces, strict=True)})
                flats.append(flat)
            self._buckets.append(
                _Bucket(group, names, flats[0], flats[1], flats[2], torch.empty_like(flats[0]))
            )
        self._group_of = dict(group_of)


@dataclass(frozen=True)
class _Bucket:
    """Flat buffers, Float[elements] each, of the parameters ``names`` of one group, dtype and device."""

    group: int
    names: list[str]
    weight: Tensor
    m: Tensor
    v: Tensor
    gradient: Tensor

    def position_independent(self, group: AdamGroup) -> bool:
        flags = (group.decoupled, group.maximize, group.foreach, group.fused)
        return _position_independent(self.weight.dtype, self.weight.device, *flags)


def _update(
    group: AdamGroup,
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    counts: Sequence[int],
) -> None:
    """One update in place by torch's function; ``counts`` are the step counters after it."""
    counter_device = weights[0].device if group.fused else "cpu"
    function = adamw if group.decoupled else adam
    function(
        weights,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.tensor(float(count - 1), dtype=torch.float32, device=counter_device) for count in counts],
        foreach=group.foreach,
        fused=group.fused,
        amsgrad=False,
        beta1=group.beta1,
        beta2=group.beta2,
        lr=group.learning_rate,
        weight_decay=group.weight_decay,
        eps=group.eps,
        maximize=group.maximize,
    )


@lru_cache(maxsize=64)
def _position_independent(
    dtype: torch.dtype,
    device: torch.device,
    decoupled: bool,
    maximize: bool,
    foreach: bool | None,
    fused: bool | None,
) -> bool:
    """Whether this machine's kernel gives an element the same bits wherever in a buffer it lies.

    Kernels work in vectors and finish the tail element by element, and the two codes may round differently
    (torch's fused Adam does: its vector code fuses a multiply-add). Decided by trial: one update of a whole
    buffer against the same update in pieces of 1, 2, … 63 elements, which have every tail there is.
    """
    source = torch.Generator().manual_seed(0)  # its own generator: training's random numbers must not move
    normal = torch.randn(4, 2016, generator=source, dtype=torch.float64)
    spread = torch.exp(3 * torch.randn(4, 2016, generator=source, dtype=torch.float64))
    weight, gradient, m, v = (normal * spread).to(dtype=dtype, device=device)
    group = AdamGroup(1e-3, 0.9, 0.999, 1e-8, 0.01, decoupled, maximize, foreach, fused)
    whole, parts = ([weight.clone(), gradient, m.clone(), v.abs()] for _ in range(2))
    for tensors, sizes in ((whole, [2016]), (parts, list(range(1, 64)))):
        for w, g, m, v in zip(*(torch.split(tensor, sizes) for tensor in tensors), strict=True):
            _update(group, [w], [g], [m], [v], counts=[7])  # slices: the whole tensors change in place
    return all(bits_equal(a, b) for a, b in zip(whole, parts, strict=True))
