"""Every sampler takes the steps that diffusers takes, in ranges as in one, with one captured graph for all of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from test_graphs import Watch
from test_schedulers import DPM, EULER, UNIPC, WAN, judge_of
from torch import Tensor

from sgl_diffusion.bench.launches import counted
from sgl_diffusion.models.family import Predictor
from sgl_diffusion.runtime.denoise import State, Step, integrate
from sgl_diffusion.runtime.graphs import Graphs
from sgl_diffusion.runtime.schedulers import DMD, Schedule, read_scheduler
from sgl_diffusion.runtime.tape import Tapes

SHAPE = (1, 4, 3, 8, 8)


def model(x: Tensor, t: Tensor, bend: float = 1.3) -> Tensor:
    """Not linear in anything, so that no mistake cancels."""
    return torch.tanh(bend * x + t / 700) + 0.3 * torch.sin(3 * x) * (1 - t / 1000)


def other_model(x: Tensor, t: Tensor) -> Tensor:
    return model(x, t, bend=0.4)


def predictor(call: Callable[..., Tensor], timesteps: Any) -> Predictor:
    return Predictor(lambda x, t: call(x, t), (), [torch.tensor(float(t)) for t in timesteps])


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(schedule: Schedule, x: Tensor, **more: Any) -> list[Step]:
    whole = range(schedule.steps)
    positive = predictor(model, schedule.timesteps)
    return list(integrate(State.start(x, schedule), schedule, whole, positive, **more))


def judged(judge: Any, steps: int, x: Tensor, velocity: Callable[[int, Tensor, Tensor], Tensor]) -> list[Tensor]:
    """States of diffusers' scheduler, called as its video pipelines call it."""
    judge.set_timesteps(steps)
    judge.set_begin_index(0)
    states = []
    for i, t in enumerate(judge.timesteps):
        x = judge.step(velocity(i, x, t), t, x, return_dict=False)[0]
        states.append(x)
    return states


def worst(got: list[Step], want: list[Tensor]) -> float:
    """Largest difference of any step's states, as a share of their standard deviation."""
    assert len(got) == len(want)
    return float(torch.stack([(a.x - b).abs().max() / b.std() for a, b in zip(got, want, strict=True)]).max())


MULTISTEP = [
    WAN,
    {**UNIPC, "solver_order": 1, "flow_shift": 3.0},
    {**UNIPC, "solver_order": 3, "flow_shift": 5.0},
    {**UNIPC, "solver_order": 2, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    {**UNIPC, "solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min", "flow_shift": 3.0},
    {**UNIPC, "solver_order": 3, "disable_corrector": [0, 2]},
    {**UNIPC, "flow_shift": 8.0, "final_sigmas_type": "sigma_min"},
    {**UNIPC, "solver_order": 1, "lower_order_final": False},
    {**DPM, "solver_order": 1, "flow_shift": 3.0},
    {**DPM, "flow_shift": 5.0},
    {**DPM, "solver_type": "heun", "flow_shift": 3.0},
    {**DPM, "solver_order": 3, "flow_shift": 3.0},
    {**DPM, "lower_order_final": False, "flow_shift": 3.0},
    {**DPM, "solver_order": 3, "lower_order_final": False, "euler_at_final": True},
    {**DPM, "solver_order": 2, "final_sigmas_type": "sigma_min", "flow_shift": 3.0},
    {**DPM, "solver_order": 2, "final_sigmas_type": "sigma_min", "euler_at_final": True, "flow_shift": 3.0},
]


def described(config: dict[str, Any]) -> str:
    plain = WAN if config is WAN else {**UNIPC, **DPM}
    return "-".join([config["_class_name"][:5], *(str(v) for k, v in config.items() if k not in plain)])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 14, 15, 50])
@pytest.mark.parametrize("config", MULTISTEP, ids=described)
def test_every_step_equals_diffusers(config: dict[str, Any], steps: int) -> None:
    got = run(read_scheduler(config).schedule(steps, 0), start())
    want = judged(judge_of(config), steps, start(), lambda i, x, t: model(x, t))
    assert worst(got, want) < 1e-5
    assert [step.index for step in got] == list(range(steps))


@pytest.mark.parametrize("steps", [1, 8])
def test_the_last_step_of_bh1_is_finite(steps: int) -> None:
    """Where diffusers multiplies an infinite B(h) by no difference at all; the limit is the prediction itself."""
    config = {**UNIPC, "solver_type": "bh1"}
    got = run(read_scheduler(config).schedule(steps, 0), start())
    *want, broken = judged(judge_of(config), steps, start(), lambda i, x, t: model(x, t))
    assert broken.isnan().all()
    assert steps == 1 or worst(got[:-1], want) < 1e-5
    assert torch.equal(got[-1].x, got[-1].state.history[0])


def test_euler_equals_diffusers() -> None:
    schedule = read_scheduler({**EULER, "shift": 3.0}).schedule(8, 0)
    judge = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    judge.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8))
    x, want = start(), []
    for t in judge.timesteps:
        x = judge.step(model(x, t), t, x, return_dict=False)[0]
        want.append(x)
    assert worst(run(schedule, start()), want) < 1e-6


def test_a_distilled_model_gets_fresh_noise_after_every_step_but_the_last() -> None:
    schedule = DMD((1000, 757, 522), shift=8.0).schedule(3, 0)
    judge = diffusers.FlowMatchLCMScheduler()
    judge.set_timesteps(sigmas=list(schedule.sigmas[:-1]))
    generator, x, want = torch.Generator().manual_seed(7), start(), []
    for t, ours in zip(judge.timesteps, schedule.timesteps, strict=True):
        x = judge.step(model(x, torch.tensor(float(ours))), t, x, generator=generator, return_dict=False)[0]
        want.append(x)
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randn(SHAPE, generator=generator) for _ in range(schedule.noises)]
    assert worst(run(schedule, start(), noise=noise), want) < 1e-6
    for wrong in ([], [*noise, noise[0]]):
        with pytest.raises(ValueError, match=f"noise: {len(wrong)} tensors, expected 2"):
            run(schedule, start(), noise=wrong)


@pytest.mark.parametrize("config", [WAN, DPM, EULER], ids=["unipc", "dpm", "euler"])
def test_guidance_is_part_of_the_step(config: dict[str, Any]) -> None:
    schedule = read_scheduler(config).schedule(8, 0)
    got = run(schedule, start(), negative=predictor(other_model, schedule.timesteps), scale=5.0)

    def guided(i: int, x: Tensor, t: Tensor) -> Tensor:
        against = other_model(x, t)
        return against + 5.0 * (model(x, t) - against)

    if config is EULER:
        want, x = [], start()
        for i, t in enumerate(schedule.timesteps):
            x = x + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * guided(i, x, torch.tensor(t))
            want.append(x)
    else:
        want = judged(judge_of(config), 8, start(), guided)
    assert worst(got, want) < 2e-5  # guidance multiplies every rounding of a prediction by its scale
    before = [start(), *(step.x for step in got)]
    for i, step in enumerate(got):
        assert torch.allclose(
            step.velocity, guided(i, before[i], torch.tensor(float(schedule.timesteps[i]))), atol=1e-5
        )


@pytest.mark.parametrize("config", [WAN, DPM, EULER], ids=["unipc", "dpm", "euler"])
def test_ranges_go_on_where_the_last_one_ended(config: dict[str, Any]) -> None:
    schedule = read_scheduler(config).schedule(8, 0)
    whole, parts, state = run(schedule, start()), list[Step](), State.start(start(), schedule)
    for steps in (range(3), range(3, 4), range(4, 8)):
        positive = predictor(model, schedule.timesteps[steps.start : steps.stop])
        parts += integrate(state, schedule, steps, positive)
        state = parts[-1].state
    for a, b in zip(parts, whole, strict=True):
        assert (a.index, a.sigma) == (b.index, b.sigma)
        assert torch.equal(a.x, b.x) and torch.equal(a.velocity, b.velocity)


def test_another_denoiser_and_scale_may_take_over() -> None:
    """As two experts of one checkpoint do: the solver goes on with what the first predicted."""
    schedule, change = read_scheduler(WAN).schedule(8, 0), 3
    experts = [(model, other_model, 4.0), (other_model, model, 3.0)]
    state, got = State.start(start(), schedule), list[Step]()
    for steps, (for_it, against, scale) in zip((range(change), range(change, 8)), experts, strict=True):
        seen = schedule.timesteps[steps.start : steps.stop]
        got += integrate(state, schedule, steps, predictor(for_it, seen), predictor(against, seen), scale)
        state = got[-1].state

    def guided(i: int, x: Tensor, t: Tensor) -> Tensor:
        for_it, against, scale = experts[i >= change]
        return against(x, t) + scale * (for_it(x, t) - against(x, t))

    assert worst(got, judged(judge_of(WAN), 8, start(), guided)) < 2e-5


def test_half_precision_states_are_rounded_no_worse_than_by_diffusers() -> None:
    """Everything between two states is in fp32; a state and a prediction are kept in the dtype of the first."""

    def rounded(x: Tensor, t: Tensor) -> Tensor:
        return model(x.float(), t).to(torch.bfloat16)

    schedule = read_scheduler(WAN).schedule(8, 0)
    exact = run(schedule, start(torch.bfloat16).float())[-1].x
    positive = predictor(rounded, schedule.timesteps)
    x = start(torch.bfloat16)
    ours = list(integrate(State.start(x, schedule), schedule, range(8), positive))[-1]
    theirs = judged(judge_of(WAN), 8, x, lambda i, x, t: rounded(x, t))[-1]
    assert ours.x.dtype == theirs.dtype == torch.bfloat16
    assert all(prediction.dtype == torch.bfloat16 for prediction in ours.state.history)
    assert (ours.x - exact).square().mean() < 1.1 * (theirs - exact).square().mean()


# -- one graph for all steps ------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "cfg"])
@pytest.mark.parametrize("config", [WAN, {**UNIPC, "solver_order": 3}, DPM, None], ids=["wan", "unipc3", "dpm", "dmd"])
def test_one_captured_step_serves_all(config: dict[str, Any] | None, guided: bool) -> None:
    sampler = DMD((1000, 757, 522), shift=8.0) if config is None else read_scheduler(config)
    schedule = sampler.schedule(3 if config is None else 9, 0)
    noise = [start() + i for i in range(schedule.noises)]
    positive, negative = (predictor(call, schedule.timesteps) for call in (model, other_model))

    def states(**more: Any) -> list[Step]:
        start_ = State.start(start(), schedule)
        against = negative if guided else None
        return list(integrate(start_, schedule, range(schedule.steps), positive, against, 4.0, noise, **more))

    graphs = Graphs(Tapes())
    for a, b in zip(chain(states(execute=graphs), states(execute=graphs)), states() * 2, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.velocity, b.velocity)
    assert (graphs.captures, graphs.replays, graphs.eager) == (1, 2 * schedule.steps - 1, {})


@pytest.mark.parametrize("config", [WAN, EULER], ids=["unipc", "euler"])
def test_the_numbers_of_all_steps_are_made_before_the_first(config: dict[str, Any]) -> None:
    made: list[list[int]] = []

    def execute(step: Callable[..., Any], *arguments: Any) -> Any:
        numbers = [a for a in arguments if isinstance(a, Tensor) and a.ndim < 2]
        made.append([number.untyped_storage().data_ptr() for number in numbers])
        return step(*arguments)

    run(read_scheduler(config).schedule(8, 0), start(), execute=execute)
    assert len(made) == 8 and len(made[0]) == (2 if config is EULER else 3)
    assert all(places == made[0] for places in made)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "cfg"])
@pytest.mark.parametrize("config", [WAN, {**UNIPC, "solver_order": 3}, DPM, None], ids=["wan", "unipc3", "dpm", "dmd"])
def test_a_step_waits_for_nothing_moves_nothing_and_launches_two_kernels(
    config: dict[str, Any] | None, guided: bool
) -> None:
    """On shape-only tensors, which take the path of a GPU's. A product stands for the denoiser."""
    sampler = DMD((1000, 757, 522), shift=8.0) if config is None else read_scheduler(config)
    schedule = sampler.schedule(3 if config is None else 9, 0)
    x = start().to("meta")
    branch = Predictor(torch.mul, (), [torch.empty((), device="meta")] * schedule.steps)
    noise = [torch.empty_like(x) for _ in range(schedule.noises)]
    state, whole = State.start(x, schedule), range(schedule.steps)
    loop = integrate(state, schedule, whole, branch, branch if guided else None, 4.0, noise)
    with counted("sm_90"):
        next(loop)  # brings what all steps need to the device
    watches = []
    for _ in whole[1:]:
        with counted("sm_90") as launches, Watch() as watch:
            next(loop)
        assert launches == {"mul": 1 + guided, "guided_step_kernel": 1, "linear_combination_kernel": 1}
        watches.append(watch)
    assert watches[0].seen and all(watch.seen == watches[0].seen for watch in watches)
