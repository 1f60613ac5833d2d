"""How much memory a request takes: predicted from configs alone, refused where it cannot fit, chosen offload by.

Weights are counted by where they live, activations by a rehearsal of the request (`rehearsal.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from sgl_diffusion.models.family import ENCODERS
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.blueprint import AT_WORK, Blueprint
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.live_bytes import module_bytes
from sgl_diffusion.runtime.offload import Layout, fits_host_memory
from sgl_diffusion.runtime.plan import Residency, dtype_name, first_that_fits
from sgl_diffusion.runtime.rehearsal import Rehearsal, Workload
from sgl_diffusion.runtime.report import MIB, ComponentMemory, MemoryReport, StageMemory

CUDA_GRANULARITY = 512  # bytes; blocks of PyTorch's allocator are multiples
CUBLAS_WORKSPACE = 32 * MIB  # PyTorch's own default on sm_90, the largest there is


@dataclass(frozen=True)
class Weights:
    """Bytes of a component on the device while it works and while it does not, and of the host's copy."""

    at_work: int
    at_rest: int
    host: int


class MemoryPlanner:
    """Predicts what requests to a native pipeline need, refuses those that cannot fit, and chooses how to decode.

    Args:
        rehearsal: of a planner of the same pipeline with another offload.
    """

    def __init__(self, blueprint: Blueprint, args: ServerArgs, rehearsal: Rehearsal | None = None) -> None:
        self.blueprint, self.plan, self.args = blueprint, blueprint.plan, args
        self.limit_mb = args.device_memory_limit_mb
        # a captured step keeps its memory for itself; those of a compiled or an offloaded denoiser are not captured
        still = all(self.plan.offload[k] == "resident" for k, kind in blueprint.kinds.items() if kind == "denoiser")
        self.on_gpu = self.plan.device.type == "cuda"
        self.captures = args.enable_cuda_graph != "false" and not args.enable_torch_compile and still
        self.workspace = CUBLAS_WORKSPACE if self.on_gpu else 0
        self.rehearsal = rehearsal or Rehearsal(
            blueprint,
            args,
            taped=self.captures and not self.on_gpu,
            granularity=CUDA_GRANULARITY if self.on_gpu else 1,
        )

    def with_offload(self, offload: Mapping[str, Residency]) -> MemoryPlanner:
        """Of the same pipeline with its weights elsewhere."""
        plan = replace(self.plan, offload=offload)
        return MemoryPlanner(replace(self.blueprint, plan=plan), self.args, self.rehearsal)

    @cached_property
    def weights(self) -> dict[str, Weights]:
        """Of every component that has any, by where the plan keeps them."""
        modules = {key: part for key, part in self.rehearsal.parts.items() if key in self.plan.offload}
        return {key: self._weights(key, module) for key, module in modules.items()}

    def _weights(self, key: str, module: nn.Module) -> Weights:
        residency = self.plan.offload[key]
        if self.plan.sharded and self.blueprint.kinds[key] == "denoiser":
            from sgl_diffusion.runtime.parallel.sharded import Footprint  # takes most of a second

            kept = Footprint.of(module, self.blueprint.mesh.world.size)
            return Weights(kept.whole + kept.shards + kept.at_work, kept.whole + kept.shards, 0)
        if residency == "resident":
            g = self.rehearsal.granularity
            size = sum(-(-t.nbytes // g) * g for t in (*module.parameters(), *module.buffers()))
            return Weights(size, size, 0)
        layout = Layout(module, self.plan.prefetch if residency == "layerwise" else None)
        return Weights(layout.at_work, 0, layout.size)

    @cached_property
    def mapped(self) -> Collection[str]:
        """Offloaded components that will stay in their files, as there is no room for a copy in host memory."""
        taken, mapped = 0, []  # in the order in which they are loaded
        for key, w in self.weights.items():
            from_files = self.args.load_format != "dummy" and self.blueprint.kinds[key] not in ENCODERS
            module, dtype = self.rehearsal.parts[key], self.plan.dtypes[key]
            whole = key in self.blueprint.quantization or fits_host_memory(module, dtype, taken)
            if w.host and from_files and not whole:
                mapped.append(key)
            else:
                taken += w.host
        return mapped

    def _dtype(self, key: str) -> str:
        """Of a component's weights, and of those that are quantised."""
        quantization = self.blueprint.quantization.get(key)
        return dtype_name(self.plan.dtypes[key]) + (f", {quantization.format}" if quantization else "")

    def _tier(self, key: str) -> Literal["pinned", "pageable", "mapped"] | None:
        """Where a component's weights are on the host."""
        if self.plan.offload[key] == "resident":
            return None
        return "mapped" if key in self.mapped else "pinned" if self.plan.pin_memory else "pageable"

    def peak(self, work: Workload) -> int:
        """Bytes that a request needs, captured steps included, decoded as its size or a flag says."""
        return max(self._needed(work, self.plan.tiles(work.size)).values())

    # -- against what there is --------------------------------------------------------

    def available(self) -> int | None:
        """Bytes of the device that a request may take, weights included; None where nothing says."""
        if self.limit_mb is not None:
            return self.limit_mb * MIB
        if self.plan.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.plan.device)
        return free + torch.cuda.memory_reserved(self.plan.device)

    def choose(self, work: Workload) -> tuple[bool, str]:
        """Whether a request is decoded in tiles (as asked for, else by size, else because a whole one does not fit),
        and why it cannot fit at all; empty if it can."""
        tiling, available = self.plan.tiles(work.size), self.available()
        if available is None:
            return tiling, ""
        needed = self._needed(work, tiling)
        if needed["decoding"] > available and self.plan.vae_tiling is None and not (tiling or self.plan.vae_sp):
            tiling, needed = True, self._needed(work, True)
        stage = max(needed, key=lambda name: needed[name])
        if needed[stage] <= available:
            return tiling, ""
        numbers = f"{stage} needs {_mib(needed[stage])} (weights {_mib(self.weights_at(stage))})"
        return tiling, (
            f"height={work.size.height}, width={work.size.width}, pictures={work.pictures}: cannot fit on "
            f"{self.plan.device}: {numbers}, {_mib(available)} are available; smaller or fewer pictures"
            f"{self._advice()} need less"
        )

    def tiling(self, work: Workload) -> bool:
        """Whether a request will be decoded in tiles.

        Raises:
            UserError: the request cannot fit, with the numbers.
        """
        tiling, refusal = self.choose(work)
        if refusal:
            raise UserError(refusal)
        return tiling

    def choose_offload(
        self, ways: Mapping[str, Mapping[str, Residency]], works: Sequence[Workload]
    ) -> tuple[str, dict[str, Any]]:
        """The first way to hold the weights in which all requests fit, and the numbers that led there.

        A picture is the same from wherever weights come, but not in tiles: it is decoded as its size or a flag says.
        """
        available = self.available()
        assert available is not None, "a device without a limit holds everything"
        planners = {way: self.with_offload(offload) for way, offload in ways.items()}
        needed = {way: max(planner.peak(work) for work in works) for way, planner in planners.items()}
        way = first_that_fits(needed, available)
        pictures = [f"{work.pictures} of {work.size.width}x{work.size.height}" for work in works]
        mib = {way: round(size / MIB, 1) for way, size in needed.items()}
        return way, {"way": way, "for": pictures, "needed_mb": mib, "available_mb": round(available / MIB, 1)}

    def check_weights(self) -> None:
        """Raises UserError if the weights alone cannot fit, whatever a request asks for."""
        available = self.available()
        if available is None:
            return
        needed = max(self.weights_at(stage) for stage in AT_WORK)
        if needed > available:
            raise UserError(
                f"the weights cannot fit on {self.plan.device}: they need {_mib(needed)}, {_mib(available)} are "
                f"available{self._advice(', use')}"
            )

    def _advice(self, joined: str = " or") -> str:
        """Offload helps where there is something to offload to."""
        on_gpu = self.plan.device.type == "cuda" and "resident" in self.plan.offload.values()
        return f"{joined} --performance-mode memory" if on_gpu else ""

    def weights_at(self, stage: str) -> int:
        """Bytes that are there in a stage. Denoisers come to the device one at a time, all others together."""
        kinds, working = self.blueprint.kinds, AT_WORK[stage]
        at_rest = sum(w.at_rest for w in self.weights.values())
        brought = {k: w.at_work - w.at_rest for k, w in self.weights.items() if kinds[k] in working}
        return at_rest + (max if working == ("denoiser",) else sum)(brought.values())

    def _graphs(self, work: Workload, tiling: bool) -> int:
        return self.rehearsal.activations(work, tiling).get("denoising", 0) if self.captures and self.on_gpu else 0

    def _needed(self, work: Workload, tiling: bool) -> dict[str, int]:
        """Bytes that have to be there in each stage. A captured step's own stay taken in the others."""
        graphs = self._graphs(work, tiling)
        return {
            stage: self.weights_at(stage) + size + self.workspace + (0 if stage == "denoising" else graphs)
            for stage, size in self.rehearsal.activations(work, tiling).items()
        }

    def reserve_decode(self, work: Workload, tiling: bool) -> None:
        """Makes a GPU's allocator hold the memory of the decode before the first step, so that no one else takes it.

        Offloaded weights make room for it in the meantime, so that there is nothing to reserve beside them.

        Raises:
            torch.OutOfMemoryError: it is not there.
        """
        resident = set(self.plan.offload.values()) == {"resident"}
        if self.plan.device.type == "cuda" and resident:
            size = self.rehearsal.activations(work, tiling)["decoding"]
            torch.empty(size, dtype=torch.uint8, device=self.plan.device)

    def report(self, work: Workload, tiling: bool, measured: Mapping[str, int] | None = None) -> MemoryReport:
        """The prediction, beside what was measured of each stage."""
        available, plan = self.available(), self.plan
        stages = [
            StageMemory(
                name=stage,
                weights_mb=self.weights_at(stage) / MIB,
                activations_mb=size / MIB,
                predicted_mb=(self.weights_at(stage) + size + self.workspace) / MIB,
                measured_mb=measured[stage] / MIB if measured and stage in measured else None,
            )
            for stage, size in self.rehearsal.activations(work, tiling).items()
        ]
        components = {
            key: ComponentMemory(
                dtype=self._dtype(key),
                residency=plan.offload[key],
                weights_mb=module_bytes([self.rehearsal.parts[key]]) / MIB,
                device_mb=w.at_work / MIB,
                host=self._tier(key),
            )
            for key, w in self.weights.items()
        }
        host = dict.fromkeys(("pinned", "pageable", "mapped"), 0.0)
        for key, w in self.weights.items():
            if tier := self._tier(key):
                host[tier] += w.host / MIB
        return MemoryReport(
            components=components,
            stages=stages,
            workspace_mb=self.workspace / MIB,
            graphs_mb=self._graphs(work, tiling) / MIB,
            peak_mb=max(stage.predicted_mb for stage in stages),
            measured_peak_mb=max(measured.values()) / MIB if measured else None,
            pinned_host_mb=host["pinned"],
            pageable_host_mb=host["pageable"],
            mapped_host_mb=host["mapped"],
            available_mb=None if available is None else available / MIB,
            decode="tiles" if tiling else "whole",
            chosen=dict(plan.chosen),
        )


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
