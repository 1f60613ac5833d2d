"""x' = x + dt * velocity, in fp32, stored in the dtype of x.

Shapes: x and velocity alike, any; dt is one number.
Why: the update of a flow-matching sampler in one launch; dt may live on the GPU, so that a captured
step replays.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, noise


@triton.jit
def _euler_step_kernel(
    x_ptr, velocity_ptr, out_ptr,
    dt,  # a number, or a pointer to one
    N,
    DT_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    x = tl.load(x_ptr + i, mask=live, other=0.0).to(tl.float32)
    velocity = tl.load(velocity_ptr + i, mask=live, other=0.0).to(tl.float32)
    step = tl.load(dt) if DT_IN_MEMORY else dt
    tl.store(out_ptr + i, (x + step * velocity).to(out_ptr.dtype.element_ty), mask=live)


def euler_step(
    x: Tensor, velocity: Tensor, dt: float | Tensor, *, impl: launch.Impl = "auto"
) -> Tensor:
    """One Euler step: a new tensor in the dtype of x.

    Args:
        x, velocity: one shape, any float dtypes and strides.
        dt: sigma' - sigma, as a Python float or a 0-d fp32 tensor on the device of x.
    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    launch.check_float(x, x=x, velocity=velocity)
    launch.check_shape(tuple(x.shape), velocity=velocity)
    if isinstance(dt, Tensor):
        launch.check_float(x, dt=dt)
        launch.check_shape((), dt=dt)
        launch.check_dtype(torch.float32, dt=dt)
    if not launch.runs_triton(impl, x):
        return euler_step_reference(x, velocity, dt)
    # latents are small: a rare copy beats a strided kernel
    x, velocity = x.contiguous(), velocity.contiguous()
    out = torch.empty_like(x)
    tiles = launch.tile("euler_step")
    with launch.on_device(x):
        _euler_step_kernel[(triton.cdiv(x.numel(), tiles["BLOCK"]),)](
            x, velocity, out, dt, x.numel(),
            DT_IN_MEMORY=isinstance(dt, Tensor), enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return out


def euler_step_reference(x: Tensor, velocity: Tensor, dt: float | Tensor) -> Tensor:
    return torch.mul(launch.widen(velocity), dt).add_(x).to(x.dtype)


def eager_euler_step(x: Tensor, velocity: Tensor, dt: float | Tensor) -> Tensor:
    """As diffusers runs it."""
    return (x.float() + dt * velocity).to(x.dtype)


def _inputs(device: str, dtype: torch.dtype, N: tuple[int, ...], dt_on: str) -> Inputs:
    dt = -0.0371 if dt_on == "host" else torch.full((), -0.0371, device=device)
    return {"x": noise(N, dtype, device), "velocity": noise(N, dtype, device, 1), "dt": dt}


OP = Op(
    name="euler_step",
    formula="x + dt * velocity",
    replaces="mul, add",
    launch=euler_step,
    reference=euler_step_reference,
    eager=eager_euler_step,
    inputs=_inputs,
    tiny=(
        {"N": (1,), "dt_on": 'host'},
        {"N": (2, 5, 33), "dt_on": 'host'},
        {"N": (2, 5, 33), "dt_on": 'device'},
        {"N": (1, 4, 64), "dt_on": 'device'},
    ),
    production=(
        {"N": (1, 4096, 64), "dt_on": 'host'},
        {"N": (1, 16, 21, 60, 104), "dt_on": 'device'},
    ),
    cpu=({"N": (1, 4096, 64), "dt_on": "host"},),
    bytes=lambda i: 3 * i["x"].nbytes,
)
