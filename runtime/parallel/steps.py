"""What a step of a request is made of, found by running the model on shapes alone as one of several ranks.

No formula has to be kept in step with any model: how much a rank computes follows from the code that runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels.launch import rehearsing
from sgl_diffusion.models.family import AttentionFn, Condition
from sgl_diffusion.runtime.accounting import Work, attend, counted
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.batch import predictor_of
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.memory import MemoryPlanner
from sgl_diffusion.runtime.parallel.costs import (
    BranchWork,
    Gathered,
    Machine,
    Prediction,
    StepWork,
    predict,
    slower_than_fewer,
)
from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.parallel.layout import Layout, read_layout
from sgl_diffusion.runtime.parallel.mesh import ONE, Mesh
from sgl_diffusion.runtime.parallel.tensor import share_denoiser
from sgl_diffusion.runtime.parallel.volume import Attended, Communication, share, share_size
from sgl_diffusion.runtime.rehearsal import Workload

SHARED = ("latent_preparation", "denoising")  # stages whose activations ranks of a sequence share


class Recorder:
    """A `Split` that notes what is asked of it: the first of so many ranks, of whom there are no others."""

    def __init__(self, ranks: int, communication: Communication) -> None:
        self.ranks, self.communication = ranks, communication
        self.attended, self.gathered = Counter[Attended](), Counter[Gathered]()

    def own(self, tokens: int) -> slice:
        return share(tokens, self.ranks, 0)

    def whole(self, own_BLD: Tensor, tokens: int) -> Tensor:
        B, _, D = own_BLD.shape
        self.gathered[Gathered(B, tokens, D, own_BLD.element_size())] += 1
        return own_BLD.new_empty(B, tokens, D)

    def attend(
        self,
        attention: AttentionFn,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        streams: Sequence[int],
        *,
        replicated: int = 0,
        out: Tensor | None = None,
        code_scale: Tensor | None = None,
    ) -> Tensor:
        B, _, H, K = q_BLHK.shape
        itemsize, travels = q_BLHK.element_size(), self.communication
        self.attended[Attended(tuple(streams), H, K, itemsize, B, replicated, travels)] += 1
        return q_BLHK.new_empty(q_BLHK.shape) if out is None else out


class Observer:
    """Runs the first step of a request on shapes alone, once for every way to share it. The first denoiser stands for
    all of them.

    Args:
        planner: of the model, in whatever layout.
    """

    def __init__(self, planner: MemoryPlanner, work: Workload) -> None:
        if planner.blueprint.mesh.layout != Layout():
            planner = MemoryPlanner(replace(planner.blueprint, mesh=ONE), planner.args)
        self.planner, self.workload = planner, work
        self._seen: dict[Hashable, StepWork] = {}
        self._planners = {1: planner}

    def step(self, layout: Layout) -> StepWork:
        """Of one replica. Raises UserError for weights that cannot be shared so."""
        results = share_size(self.workload.pictures, layout.dp, 0)
        key = layout.sp, layout.tp, results
        if key not in self._seen:
            self._seen[key] = self._observe(layout, results)
        return self._seen[key]

    def _observe(self, layout: Layout, results: int) -> StepWork:
        rehearsal, blueprint = self.planner.rehearsal, self.planner.blueprint
        work = self.workload
        if results != work.pictures:
            work = replace(work, prompts=1, outputs_per_prompt=results)
        timesteps = work.schedule.timesteps
        phase = rehearsal.family.phases(timesteps, work.guidance)[0]
        recorder, group = Recorder(layout.sp, blueprint.plan.sp_communication), Group("tp", layout.tp)
        model = self._denoiser(phase.denoiser, recorder, group)
        family = blueprint.family_of({**rehearsal.parts, phase.denoiser: model})
        branches: list[BranchWork] = []
        with torch.inference_mode(), rehearsing(self.planner.plan.device.type):
            told = rehearsal.conditions(work)
            x = family.noise(work.size, [torch.Generator()] * results)
            for conditions in told:
                if branches and _shapes(conditions) == _shapes(told[0]):
                    branches.append(branches[0])
                    continue
                predictor = predictor_of(
                    family, conditions, work.size, work.guidance, timesteps[: len(phase.steps)], phase.denoiser
                )
                recorder.attended.clear()
                recorder.gathered.clear()
                group.traffic.clear()
                with counted() as counts:
                    velocity = predictor(x, 0)
                branches.append(_branch(recorder, group, counts))
        return StepWork(branches, velocity.nbytes)

    def _denoiser(self, key: str, recorder: Recorder, group: Group) -> nn.Module:
        blueprint = self.planner.blueprint
        with torch.device("meta"):
            model = blueprint.family.build(key, blueprint.configs[key], attend, {}, recorder)
        share_denoiser(key, model, group)
        return model.eval().to(blueprint.plan.dtypes[key])

    # -- layouts ----------------------------------------------------------------------

    def layouts(self, args: ServerArgs, ranks: int) -> Iterator[Layout]:
        """All that ranks can have and this request can use."""
        work, family = self.workload, self.planner.rehearsal.family
        heads = self.planner.blueprint.family.attention_heads(self.planner.blueprint.configs)
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        for dp, cfg, tp, ring in product(divisors, (1, 2), divisors, divisors):
            ulysses, rest = divmod(ranks, dp * cfg * tp * ring)
            if rest or not ulysses or dp > work.pictures or (cfg > 1 and not work.negative):
                continue
            if ring * ulysses > family.image_tokens(work.size):
                continue
            asked = {
                "num_gpus": ranks, "dp_size": dp, "enable_cfg_parallel": cfg > 1, "tp_size": tp, "ring_degree": ring,
                "ulysses_degree": ulysses, "sp_degree": ring * ulysses, "nnodes": 1,
            }  # fmt: skip
            try:
                yield read_layout(args.model_copy(update=asked), heads)
            except UserError:
                continue

    def predictions(self, args: ServerArgs, ranks: int, machine: Machine) -> list[Prediction]:
        """Of every layout of so many GPUs, the fastest first."""
        found: list[Prediction] = []
        for layout in self.layouts(args, ranks):
            try:
                found.append(predict(self.step(layout), layout, machine))
            except UserError:  # weights that cannot be shared so
                continue
        return sorted(found, key=lambda p: (p.step_ms, p.sent_bytes))

    def memory(self, layout: Layout) -> int:
        """Bytes of a rank in the stage that needs the most. Ranks are taken to have equal shares of activations."""
        planner, work = self.planner, self.workload
        weights, needed = self._sharing(layout.tp), list[float]()
        replica = share_size(work.pictures, layout.dp, 0) / work.pictures
        for stage, size in planner.rehearsal.activations(work, planner.plan.tiles(work.size)).items():
            ranks = layout.sp if stage in SHARED else layout.ranks if planner.plan.vae_sp else 1
            needed.append(weights.weights_at(stage) + planner.workspace + replica * size / ranks)
        return round(max(needed))

    def _sharing(self, tp: int) -> MemoryPlanner:
        """Counts the weights that one of so many ranks has."""
        if tp not in self._planners:
            blueprint = replace(self.planner.blueprint, mesh=Mesh.stand_in(Layout(tp=tp)))
            self._planners[tp] = MemoryPlanner(blueprint, self.planner.args)
        return self._planners[tp]


def _shapes(conditions: Sequence[Condition]) -> list[tuple[torch.Size, ...]]:
    return [condition.shapes for condition in conditions]


def _branch(recorder: Recorder, group: Group, counts: Work) -> BranchWork:
    reduced = group.traffic.get("all_reduce")
    return BranchWork(
        attended=dict(recorder.attended),
        gathered=dict(recorder.gathered),
        flops=counts.flops,
        bytes=counts.bytes,
        reduces=reduced.calls if reduced else 0,
        reduced=reduced.bytes if reduced else 0,
    )


def denoiser_dtype(planner: MemoryPlanner) -> torch.dtype:
    """Of all of them."""
    kinds, dtypes = planner.blueprint.kinds, planner.plan.dtypes
    return next(dtypes[key] for key, kind in kinds.items() if kind == "denoiser")


def warning_of(planner: MemoryPlanner, work: Workload, machine: Machine) -> str | None:
    """What to say, before it is drawn, of a request in the planner's layout that fewer GPUs would draw faster: one of
    them, or half as many that share the sequence.
    """
    chosen, observer = planner.plan.layout, Observer(planner, work)
    fewer = [replace(chosen, dp=1, cfg=1, ring=1, ulysses=1, tp=1)]
    if chosen.ulysses % 2 == 0:
        fewer.append(replace(chosen, ulysses=chosen.ulysses // 2))
    elif chosen.ring % 2 == 0:
        fewer.append(replace(chosen, ring=chosen.ring // 2))
    steps = [predict(observer.step(layout), layout, machine) for layout in (chosen, *fewer) if layout.dp == chosen.dp]
    return slower_than_fewer(steps[0], steps[1:])
