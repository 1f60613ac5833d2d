"""What the arguments come to on this machine: device, dtypes, attention, VAE options. The arguments stay as said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sgl_diffusion.models.family import Size
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO_TILING_PIXELS = 4 * 1024 * 1024  # above this a whole decode needs more than ten gigabytes in fp32


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, d in DTYPES.items() if d == dtype)


@dataclass(frozen=True)
class Plan:
    """Resolved choices of one loaded model. `dtypes` and `attention` are by component key."""

    device: torch.device
    dtypes: Mapping[str, torch.dtype]
    attention: Mapping[str, str | None]  # requested backend, None for automatic
    vae_tiling: bool | None  # None: by the size of the picture
    vae_slicing: bool
    compile: bool

    def tiles(self, size: Size) -> bool:
        if self.vae_tiling is None:
            return size.height * size.width > AUTO_TILING_PIXELS
        return self.vae_tiling


def make_plan(args: ServerArgs, kinds: Mapping[str, str]) -> Plan:
    """The plan for a pipeline whose components have these kinds (`denoiser`, `vae`, `text_encoder`, ...).

    Raises:
        UserError: a device that is not there, a list of precisions of the wrong length, an unknown component.
    """
    device = _device(args.device)
    denoisers = [k for k, kind in kinds.items() if kind == "denoiser"]
    encoders = [k for k, kind in kinds.items() if kind == "text_encoder"]
    everywhere = DTYPES.get(args.precision, torch.bfloat16 if device.type == "cuda" else torch.float32)
    dtypes = {k: everywhere for k, kind in kinds.items() if kind in ("denoiser", "vae", "text_encoder", "model")}
    if args.dit_precision is not None:
        dtypes.update(dict.fromkeys(denoisers, DTYPES[args.dit_precision]))
    if args.vae_precision is not None:
        dtypes.update({k: DTYPES[args.vae_precision] for k, kind in kinds.items() if kind == "vae"})
    if args.text_encoder_precisions is not None:
        dtypes.update(zip(encoders, _one_each(args.text_encoder_precisions, encoders), strict=True))

    attention: dict[str, str | None] = dict.fromkeys(dtypes)
    attention.update(dict.fromkeys(denoisers, args.attention_backend))
    for component, backend in args.component_attention_backends.items():
        if component not in attention:
            raise UserError(
                f"component_attention_backends.{component}={backend}: expected one of {', '.join(attention)}"
            )
        attention[component] = backend
    tiling, slicing = {"memory": (True, True), "speed": (False, False)}.get(args.performance_mode, (None, False))
    if args.performance_mode == "manual":
        tiling = False
    return Plan(
        device=device,
        dtypes=dtypes,
        attention={k: None if v == "auto" else v for k, v in attention.items()},
        vae_tiling=tiling if args.vae_tiling is None else args.vae_tiling,
        vae_slicing=slicing if args.vae_slicing is None else args.vae_slicing,
        compile=args.enable_torch_compile,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device={name}: no NVIDIA GPU is available to PyTorch {torch.__version__}")
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} GPU(s)")
    return device


def _one_each(names: Sequence[str], encoders: Sequence[str]) -> list[torch.dtype]:
    if len(names) not in (1, len(encoders)):
        raise UserError(
            f"text_encoder_precisions={' '.join(names)}: expected 1 or {len(encoders)} values, "
            f"one for each of {', '.join(encoders)}"
        )
    return [DTYPES[n] for n in (list(names) * len(encoders) if len(names) == 1 else names)]
