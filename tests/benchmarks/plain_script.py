"""What a researcher would write without lakebed: eight questions, each its own pass over checkpoints and events, with hooks.

It keeps to the formulas and to plain PyTorch; nothing is slowed down on purpose, and nothing is shared between questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lakebed.engine.decoder import SymbolicKVDecoder
from lakebed.engine.forward import residual_stages
from torch import Tensor

LAYER, HEAD, STAGE = 2, 1, "layer_1_post_mlp"
Event = Mapping[str, Any]


def load(path: Path, build: Callable[[], SymbolicKVDecoder]) -> SymbolicKVDecoder:
    """A checkpoint, as every report of a script begins."""
    model = build()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval().requires_grad_(False)


class Hooks:
    """Inputs and outputs of the modules of one forward pass over one record."""

    def __init__(self, model: SymbolicKVDecoder, tokens: Sequence[int]) -> None:
        self.model, self.held = model, {}
        handles = [
            module.register_forward_hook(self._keep(name))
            for name, module in model.named_modules()
            if name.endswith(("ln_1", "ln_2", "q_proj", "k_proj", "v_proj", "ff", "final_norm"))
        ]
        with torch.no_grad():
            self.logits = model(torch.tensor([list(tokens)]))[0]
        for handle in handles:
            handle.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.held[name] = inputs[0][0].detach(), output[0].detach()

        return keep

    def stage(self, name: str) -> Tensor:
        """Float[position, d_model]."""
        layers = self.model.config.n_layers
        if name == "embedding":
            return self.held["blocks.0.ln_1"][0]
        if name == "final_norm":
            return self.held["final_norm"][1]
        layer, part = int(name.split("_")[1]), name.split("_")[3]
        if part == "attn":
            return self.held[f"blocks.{layer}.ln_2"][0]
        return self.held[f"blocks.{layer + 1}.ln_1" if layer + 1 < layers else "final_norm"][0]

    def projected(self, layer: int, head: int, part: str) -> Tensor:
        """Float[position, d_head]."""
        width = self.model.config.d_head
        return self.held[f"blocks.{layer}.attn.{part}_proj"][1][:, head * width : (head + 1) * width]

    def attention(self, layer: int, head: int, query: int) -> tuple[Tensor, Tensor]:
        """Scores and probabilities of one row: Float[key] each."""
        keys = self.projected(layer, head, "k")[: query + 1]
        scores = keys @ self.projected(layer, head, "q")[query] / math.sqrt(keys.shape[1])
        return scores, scores.softmax(0)

    def write(self, layer: int, head: int, query: int) -> Tensor:
        """Float[d_model]."""
        width = self.model.config.d_head
        _, alpha = self.attention(layer, head, query)
        mixed = alpha @ self.projected(layer, head, "v")[: query + 1]
        return self.model.blocks[layer].attn.out_proj.weight[:, head * width : (head + 1) * width] @ mixed

    def margin(self, event: Event) -> float:
        """Value margin of the model's own logits."""
        logits = self.logits[event["p"]]
        return float(logits[event["answer"]] - logits[event["wrong"]].max())


def _readout(hooks: Hooks, event: Event) -> Tensor:
    state = (
        hooks.stage(f"layer_{hooks.model.config.n_layers - 1}_post_mlp")[event["p"]].clone().requires_grad_()
    )
    logits = hooks.model.lm_head(hooks.model.final_norm(state))
    wrong = event["wrong"][logits[event["wrong"]].argmax()]
    (gradient,) = torch.autograd.grad(logits[event["answer"]] - logits[wrong], state)
    return gradient


def _w_qk(model: SymbolicKVDecoder) -> tuple[Tensor, Tensor, Tensor]:
    width = model.config.d_head
    rows = slice(HEAD * width, (HEAD + 1) * width)
    attention = model.blocks[LAYER].attn
    return torch.linalg.svd(
        (attention.q_proj.weight[rows].T @ attention.k_proj.weight[rows]).detach().double()
    )


def attention_geometry(model: SymbolicKVDecoder, events: Sequence[Event]) -> Any:
    """Attention, margins, entropy, OV value and role attention of every head."""
    unembedding, rows = model.lm_head.weight, []
    for event in events:
        hooks = Hooks(model, event["tokens"])
        for layer in range(model.config.n_layers):
            for head in range(model.config.n_heads):
                scores, alpha = hooks.attention(layer, head, event["p"])
                width = model.config.d_head
                output = model.blocks[layer].attn.out_proj.weight[:, head * width : (head + 1) * width]
                value = unembedding @ (output @ hooks.projected(layer, head, "v")[event["support"]])
                far = event["distractors"]
                roles = {role: float(alpha[at].sum()) for role, at in event["partition"].items()}
                rows.append(
                    (
                        float(alpha[event["support"]]),
                        float(scores[event["support"]] - scores[far].max()),
                        float(-(alpha * alpha.log()).sum()),
                        float(value[event["answer"]] - value[event["wrong"]].max()),
                        roles,
                    )
                )
    return rows


def path_logit_decomposition(model: SymbolicKVDecoder, events: Sequence[Event]) -> Any:
    """Direct logit attribution of every head and MLP, and the lens of every stage."""
    rows = []
    for event in events:
        hooks = Hooks(model, event["tokens"])
        gradient = _readout(hooks, event)
        for layer in range(model.config.n_layers):
            for head in range(model.config.n_heads):
                rows.append(float(hooks.write(layer, head, event["p"]) @ gradient))
            rows.append(float(hooks.held[f"blocks.{layer}.ff"][1][event["p"]] @ gradient))
        for stage in residual_stages(model.config.n_layers):
            logits = model.lens(stage, hooks.stage(stage)[event["p"]])
            rows.append(float(logits[event["answer"]] - logits[event["wrong"]].max()))
    return rows


def ablations(model: SymbolicKVDecoder, events: Sequence[Event], top: int = 3) -> Any:
    """What 2·top heads and MLPs do for the margin, at one checkpoint."""
    rows = []
    for event in events:
        for index in range(2 * top):
            attention = model.blocks[index % model.config.n_layers].attn
            handle = attention.out_proj.register_forward_pre_hook(lambda _, inputs: (_zeroed(inputs[0]),))
            rows.append(Hooks(model, event["tokens"]).margin(event))
            handle.remove()
    return rows


def _zeroed(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., : x.shape[-1] // 4] = 0
    return x


def _collect(
    model: SymbolicKVDecoder, events: Sequence[Event], stage: str, role: str
) -> tuple[Tensor, Tensor]:
    vectors, groups = [], []
    for event in events:
        hooks = Hooks(model, event["tokens"])
        vectors.append(hooks.stage(stage)[event[role]])
        groups.append(event["tokens"][event[role]])
        hooks.margin(event)
    return torch.stack(vectors).double(), torch.tensor(groups)


def separability(model: SymbolicKVDecoder, events: Sequence[Event]) -> Any:
    """Leave-one-out centroids in the head's QK subspaces."""
    vectors, groups = _collect(model, events, STAGE, "p")
    left, _, right = _w_qk(model)
    rows = []
    for basis in (left[:, :8], right[:8].T, torch.eye(vectors.shape[1], dtype=torch.float64)):
        z = vectors @ basis
        for i in range(len(z)):
            best = []
            for group in groups.unique():
                chosen = groups == group
                chosen[i] = False
                if chosen.any():
                    best.append((float(((z[chosen].mean(0) - z[i]) ** 2).sum()), int(group)))
            rows.append(min(best)[1] == int(groups[i]))
    return rows


def svd_alignment(model: SymbolicKVDecoder, events: Sequence[Event]) -> Any:
    """Identity subspaces of two roles against the head's singular directions."""
    left, _, right = _w_qk(model)
    rows = []
    for role in ("p", "support"):
        vectors, groups = _collect(model, events, STAGE, role)
        means = torch.stack([vectors[groups == group].mean(0) for group in groups.unique()])
        for data in (means - means.mean(0), vectors - vectors.mean(0)):
            basis = torch.linalg.svd(data, full_matrices=False)[2][:4]
            rows.append([float((basis @ side[:, r]).norm()) for side in (left, right.T) for r in range(4)])
    return rows


def bilinear(model: SymbolicKVDecoder, events: Sequence[Event]) -> Any:
    """Rank-8 QK scores of the support against every distractor."""
    left, sigma, right = _w_qk(model)
    truncated = (left[:, :8] * sigma[:8]) @ right[:8]
    rows = []
    for event in events:
        hooks = Hooks(model, event["tokens"])
        x = model.blocks[LAYER].ln_1(hooks.stage(STAGE)).detach().double()
        scores = x @ (x[event["p"]] @ truncated) / math.sqrt(model.config.d_head)
        rows.append(
            (
                float(scores[event["support"]] - scores[event["distractors"]].mean()),
                float(scores[event["support"]] - scores[event["distractors"]].max()),
                hooks.margin(event),
            )
        )
    return rows


def retrieval_chain(model: SymbolicKVDecoder, events: Sequence[Event]) -> Any:
    """Score, attention, head write, margin and loss of one head."""
    rows = []
    for event in events:
        hooks = Hooks(model, event["tokens"])
        scores, alpha = hooks.attention(LAYER, HEAD, event["p"])
        write = hooks.write(LAYER, HEAD, event["p"])
        direct = model.lm_head.weight @ write
        rows.append(
            (
                float(scores[event["support"]] - scores[event["distractors"]].mean()),
                float(alpha[event["support"]] - alpha[event["distractors"]].mean()),
                float(write @ _readout(hooks, event)),
                float(direct[event["answer"]] - direct[event["wrong"]].max()),
                hooks.margin(event),
                float(-hooks.logits[event["p"]].log_softmax(0)[event["answer"]]),
            )
        )
    return rows


def value_code(model: SymbolicKVDecoder, events: Sequence[Event]) -> Any:
    """Identity subspace and cosine centroids of the answer at four stages and two roles."""
    rows = []
    for stage in ("layer_0_post_mlp", "layer_1_post_mlp", "layer_2_post_mlp", "final_norm"):
        for role in ("p", "support"):
            vectors, _ = _collect(model, events, stage, role)
            groups = torch.tensor([event["answer"] for event in events])
            unit = vectors / vectors.norm(dim=1, keepdim=True)
            for i in range(len(unit)):
                best = []
                for group in groups.unique():
                    chosen = groups == group
                    chosen[i] = False
                    if chosen.any():
                        centre = vectors[chosen].mean(0)
                        best.append((float(unit[i] @ centre / centre.norm()), int(group)))
                rows.append(max(best)[1] == int(groups[i]))
    return rows


def transfer_map(model: SymbolicKVDecoder, events: Sequence[Event]) -> Any:
    """Ridge from the support's value code to the prediction's, at three ranks."""
    source, _ = _collect(model, events, STAGE, "support")
    target, _ = _collect(model, events, "layer_2_post_mlp", "p")
    rows, fit = [], len(events) * 3 // 4
    for rank in (4, 8, 16):
        a = source @ torch.linalg.svd(source[:fit] - source[:fit].mean(0), full_matrices=False)[2][:rank].T
        z = target @ torch.linalg.svd(target[:fit] - target[:fit].mean(0), full_matrices=False)[2][:rank].T
        x, y = a[:fit] - a[:fit].mean(0), z[:fit] - z[:fit].mean(0)
        weights = torch.linalg.solve(x.T @ x + 1e-4 * torch.eye(rank, dtype=torch.float64), x.T @ y)
        rows.append(((a[fit:] - a[:fit].mean(0)) @ weights + z[:fit].mean(0)).tolist())
    return rows


QUESTIONS = (
    attention_geometry,
    path_logit_decomposition,
    separability,
    svd_alignment,
    bilinear,
    retrieval_chain,
    value_code,
    transfer_map,
)


def answer(
    question: Callable[[SymbolicKVDecoder, Sequence[Event]], Any],
    checkpoints: Sequence[Path],
    events: Sequence[Event],
    build: Callable[[], SymbolicKVDecoder],
    out: Path,
) -> None:
    """One question over the checkpoints, written as JSON lines."""
    with out.open("w") as file:
        for path in checkpoints:
            file.write(json.dumps([path.name, question(load(path, build), events)]) + "\n")
