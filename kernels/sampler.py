"""x' = x + dt * v, where v = negative + scale * (positive - negative), scaled back if asked; in fp32, rounded once.

Shapes: latents of any one shape, (B, ...) or (B, ..., C); dt and scale are numbers.
Why: what a flow-matching sampler does between two calls of the model, in one launch (rescaled over a sample: two)
instead of up to ten; dt and scale may live on the GPU, so that a captured step replays with those of another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.group_norm import combined_moments, running_moments
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned

# B samples  N elements of a sample  R rows (tokens) of C channels
PASSES_PER_PART = 4  # blocks a program reads for the moments of a sample


@triton.jit
def _number(value, IN_MEMORY: tl.constexpr):
    """A number, or the one that a pointer points to."""
    return tl.load(value) if IN_MEMORY else value


@triton.jit
def _guided(positive_ptr, negative_ptr, at, live, scale):
    """The conditional prediction and the guided one."""
    positive = tl.load(positive_ptr + at, mask=live, other=0.0).to(tl.float32)
    velocity = positive
    if negative_ptr is not None:
        negative = tl.load(negative_ptr + at, mask=live, other=0.0).to(tl.float32)
        velocity = negative + scale * (positive - negative)
    return positive, velocity


@triton.jit
def _step(x_ptr, velocity, dt, out_ptr, velocity_ptr, at, live):
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x + dt * velocity).to(out_ptr.dtype.element_ty), mask=live)
    if velocity_ptr is not None:
        tl.store(velocity_ptr + at, velocity.to(velocity_ptr.dtype.element_ty), mask=live)


@triton.jit
def _guidance_moments_kernel(
    positive_ptr, negative_ptr, moments_ptr, scale, N, span, SCALE_IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr
):
    """Count, and mean and sum of squared deviations of both predictions, of one part of a sample."""
    scale = _number(scale, SCALE_IN_MEMORY)
    b, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    guided_mean = tl.zeros((BLOCK,), tl.float32)
    guided_squares = tl.zeros((BLOCK,), tl.float32)
    seen = 0.0
    for start in range(0, span, BLOCK):
        i = part.to(tl.int64) * span + start + lane
        live = i < N
        positive, velocity = _guided(positive_ptr, negative_ptr, b.to(tl.int64) * N + i, live, scale)
        seen += 1.0
        mean, squares = running_moments(positive, live, seen, mean, squares)
        guided_mean, guided_squares = running_moments(velocity, live, seen, guided_mean, guided_squares)
        count += tl.where(live, 1.0, 0.0)
    total, mean_all, squares_all = combined_moments(count, mean, squares)
    _, guided_mean_all, guided_squares_all = combined_moments(count, guided_mean, guided_squares)
    out = moments_ptr + (b * tl.num_programs(1) + part) * 5
    tl.store(out, total)
    tl.store(out + 1, mean_all)
    tl.store(out + 2, squares_all)
    tl.store(out + 3, guided_mean_all)
    tl.store(out + 4, guided_squares_all)


@triton.jit
def _guided_step_kernel(
    x_ptr, positive_ptr, negative_ptr, out_ptr, velocity_ptr, moments_ptr,
    dt, scale,  # numbers, or pointers to them
    rescale, N, parts,
    DT_IN_MEMORY: tl.constexpr, SCALE_IN_MEMORY: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):
    """One block of one sample; all samples count as one where none needs its moments."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    b = tl.program_id(1).to(tl.int64)
    at = b * N + i
    _, velocity = _guided(positive_ptr, negative_ptr, at, live, _number(scale, SCALE_IN_MEMORY))
    if moments_ptr is not None:
        p = tl.arange(0, MAX_PARTS)
        moments = moments_ptr + (b * parts + p) * 5
        count = tl.load(moments, mask=p < parts, other=0.0)
        mean = tl.load(moments + 1, mask=p < parts, other=0.0)
        squares = tl.load(moments + 2, mask=p < parts, other=0.0)
        guided_mean = tl.load(moments + 3, mask=p < parts, other=0.0)
        guided_squares = tl.load(moments + 4, mask=p < parts, other=0.0)
        _, _, squares_all = combined_moments(count, mean, squares)
        _, _, guided_squares_all = combined_moments(count, guided_mean, guided_squares)
        velocity *= rescale * tl.sqrt(squares_all / guided_squares_all) + (1.0 - rescale)
    _step(x_ptr, velocity, _number(dt, DT_IN_MEMORY), out_ptr, velocity_ptr, at, live)


@triton.jit
def _guided_token_step_kernel(
    x_ptr, positive_ptr, negative_ptr, out_ptr, velocity_ptr, dt, scale, R, C,
    DT_IN_MEMORY: tl.constexpr, SCALE_IN_MEMORY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Some tokens; the guided prediction of each gets the length of its conditional one."""
    r = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    at, live = r * C + c, (r < R) & (c < C)
    positive, velocity = _guided(positive_ptr, negative_ptr, at, live, _number(scale, SCALE_IN_MEMORY))
    length = tl.sqrt(tl.sum(positive * positive, axis=1))[:, None]
    guided_length = tl.sqrt(tl.sum(velocity * velocity, axis=1))[:, None]
    # rows beyond the last have length 0
    velocity *= length / tl.where(r < R, guided_length, 1.0)
    _step(x_ptr, velocity, _number(dt, DT_IN_MEMORY), out_ptr, velocity_ptr, at, live)


def guided_euler_step(
    x: Tensor, positive: Tensor, dt: float | Tensor, *, negative: Tensor | None = None,
    scale: float | Tensor = 1.0, rescale: float = 0.0, per_token_norm: bool = False,
    velocity_out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """Classifier-free guidance and one Euler step: a new contiguous tensor in the dtype of x.

    Args:
        x, positive, negative: one shape, any float dtypes and strides. Without `negative`, the prediction is `positive`
            and there is nothing to scale back.
        dt: sigma' - sigma, as a Python float or a 0-d fp32 tensor on the device of x.
        scale: of guidance, as dt; 1 is none.
        rescale: share of the guided prediction that is brought to the standard deviation of `positive`, both taken
            over a whole sample (Lin et al. 2023, section 3.4).
        per_token_norm: brings the guided prediction to the length of `positive`, token by token; the last dimension
            holds the channels of a token.
        velocity_out: written, contiguous; the guided prediction, in any float dtype.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit, or both ways of scaling back.
    Source: `FlowMatchEulerDiscreteScheduler.step`, `rescale_noise_cfg` and the true-guidance pipelines of diffusers.
    """
    _check_step(x, positive, dt, negative, scale, rescale, per_token_norm, velocity_out)
    if not launch.runs_triton(impl, x):
        return guided_euler_step_reference(
            x, positive, dt, negative=negative, scale=scale, rescale=rescale, per_token_norm=per_token_norm,
            velocity_out=velocity_out,
        )  # fmt: skip
    # latents are small: a rare copy beats a strided kernel
    x, positive = x.contiguous(), positive.contiguous()
    negative = None if negative is None else negative.contiguous()
    out = torch.empty_like(x)
    tiles = launch.tile("guided_euler_step")
    block, max_parts, options = tiles.pop("BLOCK"), tiles.pop("MAX_PARTS"), {"enable_fp_fusion": True, **tiles}
    in_memory = {"SCALE_IN_MEMORY": isinstance(scale, Tensor)}
    scale = scale if isinstance(scale, Tensor) else float(scale)
    with launch.on_device(x):
        if per_token_norm and negative is not None:
            C = x.shape[-1]
            R, block_c = x.numel() // C, triton.next_power_of_2(C)
            block_r = max(1, block // block_c)
            _guided_token_step_kernel[(triton.cdiv(R, block_r),)](
                x, positive, negative, out, velocity_out, dt, scale, R, C,
                DT_IN_MEMORY=isinstance(dt, Tensor), **in_memory, BLOCK_R=block_r, BLOCK_C=block_c, **options,
            )  # fmt: skip
            return out
        B, N, parts, moments = 1, x.numel(), 1, None
        if rescale and negative is not None:
            B, N = x.shape[0], x[0].numel()
            parts = min(max_parts, triton.cdiv(N, PASSES_PER_PART * block))
            span = triton.cdiv(triton.cdiv(N, parts), block) * block
            moments = x.new_empty(B, parts, 5, dtype=torch.float32)
            _guidance_moments_kernel[(B, parts)](
                positive, negative, moments, scale, N, span, BLOCK=block, **in_memory, **options
            )
        _guided_step_kernel[(triton.cdiv(N, block), B)](
            x, positive, negative, out, velocity_out, moments, dt, scale, float(rescale), N, parts,
            DT_IN_MEMORY=isinstance(dt, Tensor), **in_memory, MAX_PARTS=max_parts, BLOCK=block, **options,
        )  # fmt: skip
    return out


def _check_step(
    x: Tensor, positive: Tensor, dt: float | Tensor, negative: Tensor | None, scale: float | Tensor,
    rescale: float, per_token_norm: bool, velocity_out: Tensor | None,
) -> None:  # fmt: skip
    optional = {"negative": negative, "velocity_out": velocity_out}
    given = {name: t for name, t in optional.items() if t is not None}
    launch.check_float(x, x=x, positive=positive, **given)
    launch.check_shape(tuple(x.shape), positive=positive, **given)
    if velocity_out is not None:
        launch.check_contiguous(velocity_out=velocity_out)
    if x.ndim < 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (B, ...)")
    if rescale and per_token_norm:
        raise ValueError(f"per_token_norm=True: expected False with rescale={rescale}, which scales back as well")
    numbers = {name: t for name, t in {"dt": dt, "scale": scale}.items() if isinstance(t, Tensor)}
    launch.check_float(x, **numbers)
    launch.check_shape((), **numbers)
    launch.check_dtype(torch.float32, **numbers)


def guided_euler_step_reference(
    x: Tensor, positive: Tensor, dt: float | Tensor, *, negative: Tensor | None = None,
    scale: float | Tensor = 1.0, rescale: float = 0.0, per_token_norm: bool = False,
    velocity_out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    wide = launch.widen(positive)
    if negative is None:
        velocity = wide
        stepped = torch.mul(velocity, dt)
    else:
        weight = scale.to(wide.dtype) if isinstance(scale, Tensor) else scale
        velocity = torch.lerp(launch.widen(negative), wide, weight)
        if per_token_norm:
            length, guided_length = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (wide, velocity))
            velocity.mul_(length.div_(guided_length))
        elif rescale:
            variance, guided_variance = (_sample_variance(t) for t in (wide, velocity))
            velocity.mul_(variance.div_(guided_variance).sqrt_().mul_(rescale).add_(1 - rescale))
        stepped = velocity.mul(dt) if velocity_out is not None else velocity.mul_(dt)
    if velocity_out is not None:
        velocity_out.copy_(velocity)
    return stepped.add_(x).to(x.dtype).contiguous()


def _sample_variance(x: Tensor) -> Tensor:
    """Shape (B, 1, ...). In two passes, which on the CPU is ten times as fast as `torch.var`."""
    dims = tuple(range(1, x.ndim))
    return (x - x.mean(dims, keepdim=True)).square_().mean(dims, keepdim=True)


def eager_guided_euler_step(
    x: Tensor, positive: Tensor, dt: float | Tensor, *, negative: Tensor | None, scale: float | Tensor,
    rescale: float, per_token_norm: bool, velocity_out: Tensor | None,
) -> Tensor:  # fmt: skip
    """As diffusers runs it."""
    velocity = positive
    if negative is not None:
        velocity = negative + scale * (positive - negative)
        if per_token_norm:
            length = torch.norm(positive, dim=-1, keepdim=True)
            guided_length = torch.norm(velocity, dim=-1, keepdim=True)
            velocity = velocity * (length / guided_length)
        if rescale:
            dims = list(range(1, positive.ndim))
            std, guided_std = positive.std(dim=dims, keepdim=True), velocity.std(dim=dims, keepdim=True)
            velocity = rescale * (velocity * (std / guided_std)) + (1 - rescale) * velocity
    if velocity_out is not None:
        velocity_out.copy_(velocity)
    return (x.float() + dt * velocity).to(x.dtype)


def _inputs(
    device: str, dtype: torch.dtype, N: tuple[int, ...], numbers_on: str = "host", guided: bool = True,
    rescale: float = 0.0, per_token_norm: bool = False, keep: bool = False,
) -> Inputs:  # fmt: skip
    dt, scale = (n if numbers_on == "host" else torch.full((), n, device=device) for n in (-0.0371, 4.5))
    rows = (*N[:-1], 2 * N[-1])
    return {
        "x": noise(N, dtype, device),
        # far from zero: a variance taken as E[v^2] - E[v]^2 loses its digits here
        "positive": inside(poisoned(rows, dtype, device), noise(N, dtype, device, 1) + 8, slice(0, N[-1])),
        "dt": dt,
        "negative": noise(N, dtype, device, 2) + 8 if guided else None,
        "scale": scale,
        "rescale": rescale,
        "per_token_norm": per_token_norm,
        "velocity_out": poisoned(N, dtype, device) if keep else None,
    }


def _bytes(i: Inputs) -> int:
    reads_twice = bool(i["rescale"]) and i["negative"] is not None
    moved = [i["x"], i["x"], i["positive"], i["negative"], i["velocity_out"]]
    moved += [i["positive"], i["negative"]] if reads_twice else []
    return sum(t.nbytes for t in moved if t is not None)


OP = Op(
    name="guided_euler_step",
    formula="x + dt * v, v = negative + scale * (positive - negative), scaled back by sample or token if asked",
    replaces="3 of guidance, up to 8 of rescaling, to fp32, mul, add, cast",
    launch=guided_euler_step,
    reference=guided_euler_step_reference,
    eager=eager_guided_euler_step,
    inputs=_inputs,
    tiny=(
        {"N": (1, 1), "guided": False},
        {"N": (2, 5, 33), "guided": False, "numbers_on": "device", "keep": True},
        {"N": (2, 5, 33), "keep": True},
        {"N": (2, 3, 5, 7), "rescale": 0.7, "keep": True},
        {"N": (1, 1100), "rescale": 1.0, "numbers_on": "device"},
        {"N": (2, 5, 33), "per_token_norm": True, "keep": True},
        {"N": (1, 1, 64), "per_token_norm": True, "numbers_on": "device"},
        {"N": (2, 5, 33), "keep": True, "numbers_on": "device"},
    ),
    production=(
        {"N": (1, 4096, 64), "guided": False, "numbers_on": "device"},
        {"N": (1, 16, 21, 60, 104), "numbers_on": "device"},
        {"N": (1, 4096, 64), "per_token_norm": True, "keep": True, "numbers_on": "device"},
        {"N": (2, 16, 128, 128), "rescale": 0.7, "numbers_on": "device"},
    ),
    cpu=(
        {"N": (1, 16384, 64), "guided": False},
        {"N": (1, 16384, 64)},
        {"N": (1, 16384, 64), "per_token_norm": True},
        {"N": (2, 8192, 64), "rescale": 0.7},
    ),
    written=("velocity_out",),
    bytes=_bytes,
)
