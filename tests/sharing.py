"""What each of several ranks does with tiny models whose weights they share. No diffusers: its import takes seconds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.family import Condition, Guidance, Size
from sgl_diffusion.models.flux import Flux1
from sgl_diffusion.models.flux2 import Flux2
from sgl_diffusion.models.qwen_image import QwenImage
from sgl_diffusion.models.text import LayerStates, MaskedHidden, Pooled
from sgl_diffusion.models.wan import Wan
from sgl_diffusion.models.z_image import ZImage
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.encoders import load_encoder
from sgl_diffusion.runtime.offload import Offloaded
from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.parallel.layout import Layout
from sgl_diffusion.runtime.parallel.mesh import ONE, Mesh
from sgl_diffusion.runtime.parallel.sharded import load_sharded, report
from sgl_diffusion.runtime.parallel.tensor import receipt, share_denoiser
from sgl_diffusion.runtime.weights import find_weights, load_weights, weight_files

CPU = torch.device("cpu")
TEXT, BATCH, BLOCKS = 21, 2, 2
SQUARE, CLIP = Size(96, 64), Size(32, 48, 5)
# imported here, before ranks are forked, instead of by each
IMPORTED = [getattr(transformers, f"{name}Model") for name in ("CLIPText", "T5Encoder", "UMT5Encoder", "Qwen3")]
VAE = SimpleNamespace(config=SimpleNamespace(downsampling=8, spatial=8, temporal=4, z_dim=16, latent_channels=32))


@dataclass(frozen=True)
class Denoiser:
    """A tiny one with a number of heads that four divides.

    Attributes:
        text: channels of the encoded text.
        tokens: of a sample, that go through all blocks.
        sums: outputs of the layers that end in an all-reduce, of all tokens, at a step.
    """

    family: Any
    text: int
    size: Size
    tokens: int
    sums: list[int]


DENOISERS = {
    "flux": Denoiser(Flux1, 48, SQUARE, TEXT + 24, [128] * 3 * BLOCKS),
    "flux2": Denoiser(Flux2, 48, SQUARE, TEXT + 24, [128] * 3 * BLOCKS),
    "qwen": Denoiser(QwenImage, 48, SQUARE, TEXT + 24, [128] * 2 * BLOCKS),
    "wan": Denoiser(Wan, 48, CLIP, 2 * 2 * 3, [64] * BLOCKS),
    # the noise refiner sees the image's 32 tokens alone, and so it is with the text once a request
    "z_image": Denoiser(ZImage, 40, SQUARE, 64, [384] * 2 * BLOCKS + [192] * 2 + [192] * 2),
}
_LANGUAGE = {"columns": 2 * 5, "rows": 2 * 2}
# encoder -> how many layers have their outputs, and their inputs, spread
ENCODERS: Mapping[str, dict[str, int]] = {
    "clip": {"columns": 2 * 4, "rows": 2 * 2},
    **dict.fromkeys(("t5", "umt5", "qwen3", "qwen_vl", "mistral"), _LANGUAGE),
}


@torch.inference_mode()
def encoded(encoder: Any) -> Tensor:
    """As its family reads it."""
    ids = torch.randint(3, 60, (1, TEXT), generator=torch.Generator().manual_seed(3))
    ids[0, -4] = 2
    mask = (torch.arange(TEXT) < TEXT - 3).long()[None]
    if "CLIP" in type(encoder).__name__:
        return Pooled(encoder)(ids)[0]
    if "T5" in type(encoder).__name__:
        return MaskedHidden(encoder)(ids, mask)[0]
    return LayerStates(encoder.base_model, (1, -1))(ids, mask)[0]


def built(name: str, folder: Path, group: Group) -> nn.Module:
    """Of shapes alone."""
    family, config = DENOISERS[name].family, read_json(folder / name / "config.json")
    with torch.device("meta"):
        module: nn.Module = family.build("transformer", config, attention, {})
    share_denoiser("transformer", module, group)
    return module.eval().requires_grad_(False)


@torch.inference_mode()
def velocity(name: str, module: nn.Module) -> Tensor:
    case, draw = DENOISERS[name], torch.Generator().manual_seed(5)
    text = "cap_feats" if name == "z_image" else "encoder_hidden_states"
    condition = {text: torch.randn(BATCH, TEXT, case.text, generator=draw)}
    if name == "flux":
        condition["pooled_projections"] = torch.randn(BATCH, 32, generator=draw)
    family = case.family({"transformer": module, "vae": VAE, "model_index": {}})
    x = family.noise(case.size, [torch.Generator().manual_seed(i) for i in range(BATCH)])
    predict = family.predictor(Condition(condition), case.size, Guidance(None), [700.0, 300.0], "transformer")
    return predict(x, 1)


class AtOnce:
    """A device in host memory that has copied what it was asked to before anything else happens."""

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def pin(self, host: Tensor) -> Callable[[], None]:
        raise AssertionError("nothing is on the host")

    def copy(self, transfer: Callable[[], None], after: Sequence[Any]) -> None:
        transfer()

    def computed(self) -> None:
        pass

    def compute_waits(self, event: Any) -> None:
        pass


def everything(folder: Path, size: int) -> dict[str, Any]:
    """This rank's results, for every denoiser and encoder."""
    group, found = (ONE if size == 1 else Mesh.join(Layout(tp=size), CPU, 60.0)).tp, {}
    for name in DENOISERS:
        module = built(name, folder, group)
        load_weights(module, weight_files(folder / name), CPU, torch.float32)
        found[name] = {"result": velocity(name, module).numpy(), "receipt": receipt(module)}
        found[name]["traffic"] = {collective: asdict(sent) for collective, sent in group.traffic.items()}
        mapped = find_weights(module, weight_files(folder / name))
        offloaded = Offloaded(name, module, AtOnce(), prefetch=1, cyclic=True, mapped=mapped)
        with offloaded.on_device():
            found[name]["offloaded"] = velocity(name, module).numpy()
        group.traffic.clear()
    for name in ENCODERS:
        config = read_json(folder / name / "config.json")
        times, encoder = load_encoder("text_encoder", config, folder / name, CPU, torch.float32, None, tp=group)
        found[name] = {"result": encoded(encoder.eval()).numpy(), "receipt": receipt(encoder)}
    return found


def sharded(folder: Path, size: int, half: Sequence[str]) -> dict[str, Any]:
    """This rank's results with sharded weights, of two requests, by denoiser; what it holds after them in tensors, and
    what it received for each."""
    world, found = Mesh.join(Layout(ulysses=size), CPU, 60.0).world, {}
    gather, received = dist.all_gather_single, [0]

    def counted(output: Tensor, own: Tensor, *args: Any, **kwargs: Any) -> Any:
        received[0] += output.nbytes - own.nbytes
        return gather(output, own, *args, **kwargs)

    dist.all_gather_single = counted  # FSDP's messages go through no group of ours
    for name, dtype in [(name, torch.bfloat16) for name in half] + [(name, torch.float32) for name in DENOISERS]:
        key = name + " in bf16" * (dtype == torch.bfloat16)
        before = bytes_of_tensors() if not found else 0
        module = built(name, folder, ONE.tp)
        load_sharded(name, module, weight_files(folder / name), CPU, dtype, world)
        received[0] = 0
        results = [velocity(name, module).float().numpy() for _ in range(2)]
        held = {} if found else {"held": bytes_of_tensors() - before - sum(result.nbytes for result in results)}
        found[key] = {"results": results, "report": report(module), "received": received[0] / 2, **held}
    module = built("flux", folder, ONE.tp)
    load_sharded("flux", module, None, CPU, torch.float32, world)
    found["dummy"] = {"results": [velocity("flux", module).numpy()]}
    return found


def bytes_of_tensors() -> int:
    """Of all that are reachable, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, Tensor) and x.device == CPU]
    plain = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in plain}.values())
