"""Zero ablations: the model without one head or one MLP, at every position of every record, later layers recomputed.

Source: definitions 2 §C; definitions 4 §0.12.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .forward import Interventions, Model
from .readout import Choices, final_readout

SCALARS = ("value_margin", "answer_logit", "answer_log_prob", "correct")


def ablated_components(n_layers: int, n_heads: int) -> list[str]:
    """Every head, then every MLP: L0H0, …, L0MLP, …"""
    heads = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    return [*heads, *(f"L{layer}MLP" for layer in range(n_layers))]


def _masks(model: Model) -> list[Interventions]:
    """In the order of `ablated_components`. A head's output bias stays, an MLP's goes with it."""
    found = []
    for index in range(model.n_layers * model.n_heads):
        mask = torch.ones(model.n_layers * model.n_heads, device=model.unembedding.device)
        mask[index] = 0
        found.append(Interventions(head_mask=mask.reshape(model.n_layers, model.n_heads)))
    for layer in range(model.n_layers):
        mask = torch.ones(model.n_layers, device=model.unembedding.device)
        mask[layer] = 0
        found.append(Interventions(mlp_mask=mask))
    return found


def ablate(model: Model, tokens: Tensor, row: Tensor, position: Tensor, choices: Choices) -> Tensor:
    """`Float[event, component, scalar]`: each component zeroed in a forward pass of its own."""
    found = []
    for interventions in _masks(model):
        final = model.forward(tokens, interventions=interventions).final[row, position]
        found.append(final_readout(model, final, choices).scalars())
    return torch.stack(found, 1)
