"""Every call that diffusers' own pipelines make of a Wan denoiser, made of ours: same inputs, same velocity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.family import SETTINGS, Condition, Guidance, Size
from sgl_diffusion.models.wan import Wan
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.weights import load_weights, weight_files

SIZE, STEPS = Size(64, 96, 9), 4
Call = tuple[str, dict[str, Any], Tensor]


def pictures(count: int) -> dict[str, Image.Image]:
    drawn = (Image.radial_gradient("L"), Image.linear_gradient("L"))[:count]
    colours = [picture.resize((SIZE.width, SIZE.height)).convert("RGB") for picture in drawn]
    return dict(zip(("image", "last_image"), colours, strict=False))


def calls_of(pipe: Any, **given: Image.Image) -> list[Call]:
    """Denoiser, inputs and velocity of every call."""
    calls: list[Call] = []
    for key in ("transformer", "transformer_2"):
        if (model := getattr(pipe, key, None)) is None:
            continue

        def keep(_: Any, args: Any, inputs: dict[str, Any], out: tuple[Tensor, ...], key: str = key) -> None:
            calls.append((key, {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}, out[0].clone()))

        model.register_forward_hook(keep, with_kwargs=True)
    pipe(
        prompt="a cat",
        height=SIZE.height,
        width=SIZE.width,
        num_frames=SIZE.frames,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(1)],
        output_type="latent",
        **given,
    )
    return calls


def family(folder: Path) -> Wan:
    parts = {}
    for key in ("transformer", "transformer_2"):
        if not (folder / key).is_dir():
            continue
        with torch.device("meta"):
            parts[key] = Wan.build(key, read_json(folder / key / "config.json"), attention, {})
        load_weights(parts[key].requires_grad_(False), weight_files(folder / key), torch.device("cpu"), torch.float32)
    return Wan(parts)


def taken_apart(inputs: dict[str, Tensor], held: bool) -> tuple[Tensor, Condition]:
    """State and condition, from what diffusers' pipeline put together."""
    x, given = inputs["hidden_states"], {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    if (images := inputs.get("encoder_hidden_states_image")) is not None:
        given["encoder_hidden_states_image"] = images.flatten(0, 1)[None]
    if x.shape[1] == 36:
        x, given["latent_condition"] = x[:, :16].contiguous(), x[:, 16:]
    elif held:
        given["latent_condition"] = x[:, :, :1]
        x = torch.cat([torch.randn_like(x[:, :, :1]), x[:, :, 1:]], dim=2)
    return x, Condition(given)


@pytest.mark.parametrize(
    ("name", "count", "ratio"),
    [
        ("wan", 0, None),
        ("wan_i2v", 1, None),
        ("wan_flf2v", 2, None),
        ("wan22", 0, 0.875),
        ("wan22_i2v", 1, 0.9),
        ("wan22_ti2v", 0, None),
        ("wan22_ti2v", 1, None),
    ],
)
def test_every_call_gives_the_same_velocity(
    tiny: Callable[[str], Path], name: str, count: int, ratio: float | None
) -> None:
    folder, held = tiny(name), name == "wan22_ti2v" and count == 1
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    if held:
        pipe = diffusers.WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
    calls = calls_of(pipe, **pictures(count))
    wan, timesteps, done = family(folder), pipe.scheduler.timesteps.tolist(), 0
    whole = Wan({**wan.parts, SETTINGS: {"boundary_ratio": ratio}})
    for phase in whole.phases(timesteps, Guidance(None)):
        key, run = phase.denoiser, phase.steps
        _, given = taken_apart(calls[run[0]][1], held)
        predict = wan.predictor(given, SIZE, Guidance(None), [timesteps[i] for i in run], key)
        for step, i in enumerate(run):
            called, inputs, velocity = calls[i]
            assert called == key
            ours = predict(taken_apart(inputs, held)[0], step)
            assert (ours - velocity).abs().max() <= 1e-4 * velocity.std()
            done += 1
    assert done == len(calls) == STEPS
