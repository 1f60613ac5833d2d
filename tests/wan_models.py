"""Tiny random Wan denoisers of every published kind, and how diffusers' pipelines call theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from tiny_checkpoints import neutral, randomise
from torch import Tensor

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.family import Condition, Guidance, Size
from sgl_diffusion.models.wan import Wan
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.weights import load_weights, slots, weight_files

TIMESTEPS = [999.0, 833.7, 410]
TEXT_DIM, IMAGE_DIM, IMAGE_TOKENS = 40, 24, 5
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "2x32": {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "ffn_dim": 96},
    "3x20": {"num_attention_heads": 3, "attention_head_dim": 20, "num_layers": 1, "ffn_dim": 72, "freq_dim": 64},
    "1x128": {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 3, "ffn_dim": 200},
}


@dataclass(frozen=True)
class Variant:
    """`begins`: with a picture in place of the first frame."""

    config: Mapping[str, Any]
    pictures: int = 0  # that the denoiser looks at
    begins: bool = False


def looking(pictures: int) -> Variant:
    places = {"pos_embed_seq_len": pictures * IMAGE_TOKENS} if pictures > 1 else {}
    return Variant({"in_channels": 36, "image_dim": IMAGE_DIM, **places}, pictures)


VARIANTS = {
    "t2v": Variant({}),
    "i2v": looking(1),
    "flf2v": looking(2),
    "i2v-a14b": Variant({"in_channels": 36}),
    "ti2v": Variant({"in_channels": 48, "out_channels": 48}),
    "ti2v-from-a-picture": Variant({"in_channels": 48, "out_channels": 48}, begins=True),
}
SIZES = {"video": Size(64, 96, 9), "tall": Size(128, 32, 5), "picture": Size(64, 32)}


def save(root: Path, variant: str, shape: str = "2x32") -> Path:
    config = {"text_dim": TEXT_DIM, **SHAPES[shape], **VARIANTS[variant].config}
    if "image_dim" in config:
        config["added_kv_proj_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    folder = root / f"{variant}-{shape}"
    randomise(diffusers.WanTransformer3DModel(**config), "transformer").save_pretrained(folder)
    return folder


def native(folder: Path, dtype: torch.dtype = torch.float32) -> Wan:
    with torch.device("meta"):
        module = Wan.build("transformer", read_json(folder / "config.json"), partial(attention, impl="auto"), {})
    load_weights(module, weight_files(folder), torch.device("cpu"), dtype)
    return Wan({"transformer": module.eval().requires_grad_(False)})


def judge(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).eval()


def noise(family: Wan, size: Size, batch: int) -> Tensor:
    return family.noise(size, [torch.Generator().manual_seed(i) for i in range(batch)])


def condition(variant: str, size: Size, batch: int) -> Condition:
    """The end of every prompt is zeros, as the pipeline pads them. Masks are those of a first or last frame."""
    kind, config = VARIANTS[variant], VARIANTS[variant].config
    generator = torch.Generator().manual_seed(1)
    tokens = 512 if kind.pictures else 12  # diffusers knows the text from the picture by its 512 tokens
    text = torch.randn(batch, tokens, TEXT_DIM, generator=generator)
    text[:, -3:] = 0
    tensors, f = {"encoder_hidden_states": text}, 16 if "out_channels" in config else 8
    latent_size = ((size.frames - 1) // 4 + 1, size.height // f, size.width // f)
    if kind.pictures:
        tensors["encoder_hidden_states_image"] = torch.randn(
            batch, kind.pictures * IMAGE_TOKENS, IMAGE_DIM, generator=generator
        )
    if config.get("in_channels") == 36:
        mask = torch.zeros(batch, 4, *latent_size)
        mask[:, :, [0, -1] if kind.pictures == 2 else 0] = 1
        tensors["latent_condition"] = torch.cat([mask, torch.randn(batch, 16, *latent_size, generator=generator)], 1)
    if kind.begins:
        tensors["latent_condition"] = torch.randn(batch, 48, 1, *latent_size[1:], generator=generator)
    return Condition(tensors)


@torch.no_grad()
def velocities(family: Wan, variant: str, size: Size, batch: int) -> list[Tensor]:
    """Of one and the same state at every step, so that only the timestep moves them."""
    predict = family.predictor(condition(variant, size, batch), size, Guidance(None), TIMESTEPS)
    return [predict(noise(family, size, batch), step) for step in range(len(TIMESTEPS))]


def called_by_diffusers(variant: str, given: Mapping[str, Tensor], x: Tensor, t: float) -> dict[str, Tensor]:
    """Inputs of one call, as `WanPipeline` and `WanImageToVideoPipeline` put them together."""
    kind, latents = VARIANTS[variant], given.get("latent_condition")
    inputs = {"hidden_states": x, "timestep": torch.full((len(x),), t)}
    inputs["encoder_hidden_states"] = given["encoder_hidden_states"]
    if kind.pictures:
        inputs["encoder_hidden_states_image"] = given["encoder_hidden_states_image"].view(-1, IMAGE_TOKENS, IMAGE_DIM)
    if x.shape[1] == 48:
        mask = torch.ones(1, 1, *x.shape[2:])
        if kind.begins:
            mask[:, :, 0] = 0
            inputs["hidden_states"] = (1 - mask) * latents + mask * x
        inputs["timestep"] = (mask[0][0][:, ::2, ::2] * t).flatten()[None].expand(len(x), -1)
    elif latents is not None:
        inputs["hidden_states"] = torch.cat([x, latents], dim=1)
    return inputs


@torch.no_grad()
def expected(model: Any, variant: str, x: Tensor, size: Size, batch: int) -> list[Tensor]:
    given, dtype = condition(variant, size, batch).tensors, model.patch_embedding.weight.dtype
    calls = [called_by_diffusers(variant, given, x, t) for t in TIMESTEPS]
    return [model(**{k: v if k == "timestep" else v.to(dtype) for k, v in inputs.items()}).sample for inputs in calls]


def unnoticed(family: Wan, run: Callable[[], Sequence[Tensor]]) -> list[str]:
    """Biases, norm weights and rows of tables whose absence does not move the results."""
    module, blind, before = family.denoisers["transformer"], [], run()
    parameters = dict(module.named_parameters())
    for name, slot in slots(module).items():
        rows = parameters[slot.parameter].data[slot.start : slot.stop]
        vectors = rows.flatten(0, 1) if name.endswith(("scale_shift_table", "pos_embed")) else [rows]
        for i, vector in enumerate(vectors):
            if (forgotten := neutral(name, vector)) is None:
                continue
            kept = vector.clone()
            vector.copy_(forgotten)
            after = run()
            vector.copy_(kept)
            if max(((a - b).abs().max() / b.std()).item() for a, b in zip(after, before, strict=True)) < 1e-4:
                blind.append(f"{name}[{i}]")
    return blind
