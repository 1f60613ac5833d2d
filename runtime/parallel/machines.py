"""What a prediction takes a machine to be: figures of this device, of a data sheet, or of a measurement's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.limits import limits
from sgl_diffusion.runtime.parallel.costs import Machine, Rates
from sgl_diffusion.runtime.parallel.links import PRESETS, Links, read_links
from sgl_diffusion.runtime.plan import dtype_name

HERE = "here"
# shares of a data sheet's rates that large products, attention and copies are taken to reach: assumptions
PRODUCTS_REACH, ATTENTION_REACHES, COPIES_REACH = 0.7, 0.45, 0.85
ATTENTION_OF_PRODUCTS = ATTENTION_REACHES / PRODUCTS_REACH  # where products are measured
H200_TFLOP_PER_S = {"bf16": 989.5, "fp16": 989.5, "fp32": 67.0}
H200_GB_PER_S = 4800.0
NVLINK = ("A100", "A800", "H100", "H200", "H20", "B200", "B300")  # on boards that are not made for PCI Express


def h200(dtype: torch.dtype) -> Rates:
    """Source: NVIDIA's data sheet of the H200 SXM, rates without sparsity."""
    rated = H200_TFLOP_PER_S[dtype_name(dtype)]
    told = f"data sheet, of which products {PRODUCTS_REACH:.0%}, attention {ATTENTION_REACHES:.0%} and copies "
    told += f"{COPIES_REACH:.0%} are assumed"
    reached = PRODUCTS_REACH * rated, ATTENTION_REACHES * rated, COPIES_REACH * H200_GB_PER_S
    return Rates(f"H200 in {dtype_name(dtype)}", told, *reached)


def rates_here(device: torch.device, dtype: torch.dtype) -> Rates:
    """Of products and copies measured on this device. Every rank is taken to have one like it for itself."""
    reached = limits(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    products = reached.matmul_tflop_per_s
    told = f"measured; attention is taken to reach {ATTENTION_OF_PRODUCTS:.0%} of products"
    return Rates(
        f"{name} in {dtype_name(dtype)}", told, products, ATTENTION_OF_PRODUCTS * products, reached.copy_gb_per_s
    )


def read_rates(path: Path) -> Rates:
    """What `sglang bench kernels --op attention --json FILE` measured. Raises UserError for another file."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"gpu={path}: expected {HERE}, h200 or a file ({e.strerror})") from e
    except ValueError as e:
        raise UserError(f"gpu={path}: not readable as JSON: {e}") from e
    try:
        ours = ("triton", "torch")
        timed = [r for r in raw["rows"] if r["op"] == "attention" and r["impl"] in ours and r["us"] is not None]
        longest = max(timed, key=lambda row: float(row["us"]))
        reached = raw["limits"]["matmul_tflop_per_s"], longest["tflop_per_s"], raw["limits"]["copy_gb_per_s"]
        return Rates(str(raw["device"]), f"measured, {path}", *map(float, reached))
    except (KeyError, TypeError, ValueError) as e:
        told = "expected a file of `sglang bench kernels --op attention --json`"
        raise UserError(f"gpu={path}: {told} ({type(e).__name__}: {e})") from e


def links_here(device: torch.device) -> Links:
    """Within this host, by the name of its devices."""
    if device.type != "cuda":
        return PRESETS["loopback"]
    words = torch.cuda.get_device_name(device).split()
    return PRESETS["nvlink" if set(words) & set(NVLINK) and "PCIe" not in words else "pcie5"]


def machine_of(
    args: ServerArgs,
    ranks: int,
    device: torch.device,
    dtype: torch.dtype,
    gpu: str = HERE,
    links: str | None = None,
) -> Machine:
    """Of the hosts that the arguments tell.

    Args:
        dtype: of the denoiser.
        gpu: this device, "h200", or a file of `sglang bench kernels`.
        links: INTRA or INTRA,INTER, each a preset's name or a file of `sglang bench links`; None for what this device's
            name tells, and InfiniBand between hosts.
    Raises:
        UserError: a name that is not known, a file that cannot be read.
    """
    rates = rates_here(device, dtype) if gpu == HERE else h200(dtype) if gpu == "h200" else read_rates(Path(gpu))
    within, _, between = (links or "").partition(",")
    default = links_here(device) if gpu == HERE else PRESETS["nvlink"]
    return Machine(
        rates=rates,
        within=read_links(within) if within else default,
        between=read_links(between or "infiniband-400"),
        gpus_per_host=max(1, ranks // args.nnodes),
    )
