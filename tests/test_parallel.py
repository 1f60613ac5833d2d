"""Requests drawn by several ranks: real processes over gloo, whose final latents are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_checkpoints import build_flux
from torch import Tensor

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.events import Drawn
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.trace import Stopwatch

TOLERANCE = 1e-5  # of the latents' standard deviation
FP8_TOLERANCE = 0.5  # numbers that travel are off by up to a 16th, in each of three blocks and two steps
PROMPTS = ["a red circle left of a blue square", "a green star"]
GUIDED = {"negative_prompt": "blue", "true_cfg_scale": 2.5}
MODELS: dict[str, dict[str, Any]] = {
    # 15 tokens of the picture and 24 of the text; 6 heads. Or 3 heads, and a text of 3 tokens: fewer than 4 ranks
    "flux6": {"height": 48, "width": 80, "max_sequence_length": 24, **GUIDED},
    "flux3": {"height": 48, "width": 80, "max_sequence_length": 3, "prompt": "red", **GUIDED},
    "wan": {"height": 32, "width": 80, "num_frames": 5, "max_sequence_length": 24, "guidance_scale": 4.0},
    "wan22_ti2v": {"height": 64, "width": 96, "num_frames": 5, "max_sequence_length": 24, "guidance_scale": 4.0},
    "qwen": {"height": 48, "width": 80, "negative_prompt": "a square", "true_cfg_scale": 2.5},
}


@dataclass(frozen=True)
class Case:
    """A model on a layout; `bitwise` where no sum is in another order than in one process."""

    model: str
    layout: dict[str, Any]
    bitwise: bool = False
    sampling: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.model, *(f"{name}={degree}" for name, degree in self.layout.items())])


U2, U4, R2, R4 = ({f"{kind}_degree": n} for kind, n in (("ulysses", 2), ("ulysses", 4), ("ring", 2), ("ring", 4)))
CFG, TP, DP, VAE = {"enable_cfg_parallel": True}, {"tp_size": 2}, {"dp_size": 2}, {"vae_sp": True}
FSDP = {"use_fsdp_inference": True}
TWO_RESULTS = (("prompt", PROMPTS),)

CASES = [
    # two ranks
    *(Case(model, U2) for model in MODELS if model != "qwen"),
    *(Case(model, R2) for model in MODELS),
    *(Case(model, CFG, bitwise=True) for model in ("flux6", "wan", "qwen")),
    *(Case(model, TP) for model in ("flux6", "wan", "qwen")),
    *(Case(model, DP, bitwise=True, sampling=TWO_RESULTS) for model in ("flux6", "wan")),
    Case("flux6", {**CFG, **VAE}), Case("flux6", {**CFG, **FSDP}, bitwise=True), Case("wan", {**U2, **FSDP}),
    Case("wan", {**U2, **VAE}), Case("flux6", {**U2, "sp_communication": "fp8"}),
    # four
    Case("flux6", U4), Case("flux3", R4), Case("wan", R4), Case("qwen", R4),
    *(Case(model, {**U2, **R2}) for model in ("flux6", "flux3", "wan", "qwen")),
    *(Case(model, {**CFG, **U2}) for model in ("flux6", "wan", "qwen")),
    Case("flux6", {**U2, **TP}), Case("flux6", {**R2, **U2, **VAE}), Case("wan", {**R2, **CFG, **VAE}),
    Case("flux6", {**U2, "ring_degree": 1, **DP}, sampling=(("prompt", [*PROMPTS, "a blue star"]),)),
    # eight
    Case("flux6", {**U4, **R2}), Case("flux6", {**CFG, **U2, **R2}),
    Case("flux6", {**DP, **U2, **TP}, sampling=TWO_RESULTS),
    Case("wan", {**CFG, **U2, **R2}), Case("qwen", {**CFG, **R4}),
]  # fmt: skip


def ranks_of(case: Case) -> int:
    degrees = {"ulysses_degree": 1, "ring_degree": 1, "tp_size": 1, "dp_size": 1, **case.layout}
    ranks = 2 if case.layout.get("enable_cfg_parallel") else 1
    for name in ("ulysses_degree", "ring_degree", "tp_size", "dp_size"):
        ranks *= degrees[name]
    return ranks


def draw(folder: str, layout: dict[str, Any], sampling: dict[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
    """Final latents and what took effect, of one rank among others; None if others tell."""
    timeout = {"dist_timeout": 60.0} if layout else {}
    args = ServerArgs(model_path=folder, device="cpu", log_level="error", **timeout, **layout)
    with Engine.load(args) as engine:
        if not engine.lockstep.is_first:
            engine.follow()
            return None
        pipeline = engine.backend
        assert isinstance(pipeline, NativePipeline)
        request = resolve_request(SamplingParams(save_output=False, **sampling), {}, args)
        job = pipeline.prepare(request)
        drawn = [e for e in pipeline.run(job, Stopwatch(engine.device)) if isinstance(e, Drawn)]
        return drawn[0].latents.clone(), {"pixels": [e.pixels for e in drawn], **pipeline.effective(job)}


def draw_all(cases: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[Any]:
    return [draw(*case) for case in cases]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parallel")
    made = {
        "flux6": build_flux(root / "flux6", heads=6, head_dim=32, double=1, single=2),
        "flux3": build_flux(root / "flux3", heads=3, head_dim=32, double=1, single=2),
    }
    return {name: made.get(name) or tiny(name) for name in MODELS}


def sampling_of(case: Case) -> dict[str, Any]:
    return {"prompt": PROMPTS[0], "num_inference_steps": 2, "seed": 3, **MODELS[case.model], **dict(case.sampling)}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> Callable[[Case], Any]:
    """What one process draws."""
    known: dict[tuple[str, Any], Any] = {}

    def drawn(case: Case) -> Any:
        key = case.model, repr(case.sampling)
        if key not in known:
            known[key] = draw(str(folders[case.model]), {}, sampling_of(case))
        return known[key]

    return drawn


@pytest.mark.parametrize("count", [2, 4, 8])
def test_ranks_draw_what_one_process_draws(count: int, folders: dict[str, Path], alone: Callable[[Case], Any]) -> None:
    """All cases of so many ranks, one after the other in the same processes."""
    cases = [case for case in CASES if ranks_of(case) == count]
    asked = [(str(folders[case.model]), case.layout, sampling_of(case)) for case in cases]
    first, *others = run_ranks(count, draw_all, asked)
    assert all(result is None for other in others for result in other)
    drawn = zip(cases, first, strict=True)
    wrong = [f"{case}: {told}" for case, result in drawn for told in differences(case, result, alone(case))]
    assert not wrong, "\n".join(wrong)


def differences(case: Case, drawn: tuple[Tensor, dict[str, Any]], expected: tuple[Tensor, dict[str, Any]]) -> list[str]:
    """What is not as it is in one process, and what did not take effect."""
    (latents, effective), (one, effective_alone) = drawn, expected
    if latents.shape != one.shape:
        return [f"latents of shape {tuple(latents.shape)}, not {tuple(one.shape)}"]
    told = []
    error = float((latents - one).abs().max() / one.std())
    rounded = case.layout.get("sp_communication") == "fp8"
    if not error <= (FP8_TOLERANCE if rounded else TOLERANCE) or (case.bitwise and not torch.equal(latents, one)):
        told.append(f"latents are off by {error:.1e}")
    if rounded:
        return told + ["nothing is rounded"] * (error < 1e-3)
    pixels, of_one = (np.ravel(np.stack(of["pixels"][0])).astype(int) for of in (effective, effective_alone))
    if (np.abs(pixels - of_one) > 1).any():
        told.append("pixels differ by more than one")
    parallel = effective["parallel"]
    degrees = {name.partition("_")[0]: n for name, n in case.layout.items() if type(n) is int}
    if parallel["ranks"] != ranks_of(case) or any(parallel[name] != n for name, n in degrees.items()):
        told.append(f"ran on {parallel}")
    if case.layout.get("tp_size", 1) > 1 and not parallel["layers"]["transformer"]["rows"]:
        told.append(f"layers that ranks share: {parallel['layers']}")
    if case.layout.get("vae_sp") and "exchange" not in parallel["sent"].get("world", {}):
        told.append("no band of the picture was exchanged")
    if case.layout.get("use_fsdp_inference") and not parallel["weights"]["transformer"]["sharded_bytes"]:
        told.append("no weight is sharded")
    return told
