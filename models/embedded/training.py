"""The resumable training loop that all stages of the embedded model share."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def _is_hidden_matrix(name: str, p: nn.Parameter) -> bool:
    """Muon is for the matrices inside blocks; embeddings, heads, norms and convolutions take AdamW."""
    inside = any(part in name for part in ("block", "layers."))
    return p.ndim == 2 and inside and not any(s in name for s in ("relative", "norm"))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), scaled to
    the size of AdamW's (Liu et al. 2025).

    `torch.optim.Muon` iterates in bf16, which a CPU without bf16 units emulates: 0.7 s of a 1.5 s step here.
    In fp32, with matrices of one shape in a batch, it is 0.2 s.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                scale = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                for p, u in zip(params, _orthogonal(torch.stack(updates)), strict=True):
                    p.sub_(u, alpha=scale)


def _orthogonal(x: Tensor) -> Tensor:
    """Nearest orthogonal matrices of a batch, approximately: a quintic iteration on the singular values."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, np.random.Generator], tuple[Tensor, dict[str, float]]],
    *,
    work: Path,
    steps: int,
    lr: float,
    ema: float,
    decay_from: float = 0.5,
    report: Callable[[int], str] | None = None,
) -> None:
    """Runs `steps` optimiser steps and leaves the averaged weights in `model`.

    The step number seeds all randomness of a step, so an interrupted run ends with the weights of an uninterrupted one.
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [p for n, p in params.items() if _is_hidden_matrix(n, p)]
    others = [p for n, p in params.items() if not _is_hidden_matrix(n, p)]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        optimisers.append(Muon(matrices, lr=lr))
    average = {n: p.detach().clone() for n, p in params.items()}
    saved, first = work / f"{name}.ckpt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state["step"]
        with torch.no_grad():
            for n, p in params.items():
                p.copy_(state["model"][n])
        average = state["average"]
        for optimiser, s in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(s)

    def save(step: int) -> None:
        state = {
            "step": step,
            "model": {n: p.detach() for n, p in params.items()},
            "average": average,
            "optimisers": [o.state_dict() for o in optimisers],
        }
        torch.save(state, f"{saved}.part")
        os.replace(f"{saved}.part", saved)

    started = time.perf_counter()
    smooth: dict[str, float] = {}
    for step in range(first, steps):
        rng = np.random.default_rng([17, step])
        torch.manual_seed(step)
        done = step / steps
        factor = min(1, (step + 1) / 100) * (1 if done < decay_from else (1 - done) / (1 - decay_from))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
        loss, facts = loss_of(step, rng)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        keep = min(ema, (1 + step) / (20 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in params.values()], 1 - keep)
        smooth = {k: 0.98 * smooth.get(k, v) + 0.02 * v for k, v in facts.items()}
        if (step + 1) % 100 == 0 or step < 3:
            line = " ".join(f"{k} {v:.4f}" for k, v in smooth.items())
            rate = (time.perf_counter() - started) / (step + 1 - first)
            print(f"{name} {step + 1}/{steps} {rate:.3f} s/step {line}", flush=True)
        if (step + 1) % 500 == 0:
            save(step + 1)
            if report is not None:
                with _weights(params, average):
                    print(f"{name} {step + 1}: {report(step + 1)}", flush=True)
    save(steps)
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(average[n])


class _weights:
    """Holds the averaged weights in the model for the length of a `with` block."""

    def __init__(self, params: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
        self.params, self.average = params, average

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *exc: object) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for n, p in self.params.items():
            mine = p.detach().clone()
            p.copy_(self.average[n])
            self.average[n].copy_(mine)
