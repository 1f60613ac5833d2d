"""The native denoiser equals `WanTransformer3DModel` on tiny random checkpoints: fp32, 1e-4 of the std."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from test_bench import bench
from tiny_checkpoints import neutral, randomise
from torch import Tensor

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import Condition, Guidance, Size
from sgl_diffusion.models.wan import Wan, WanTransformer
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.weights import load_weights, slots, weight_files

SIGMAS = [1.0, 0.8337, 0.41, 0.0]
SIZES = {"video": Size(64, 96, 9), "tall": Size(112, 48, 5), "picture": Size(48, 48)}
TEXT_TOKENS, TEXT_DIM = 12, 40
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "2x32": {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "ffn_dim": 96},
    "3x20": {"num_attention_heads": 3, "attention_head_dim": 20, "num_layers": 1, "ffn_dim": 72, "freq_dim": 64},
    "1x128": {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 3, "ffn_dim": 200},
}


def native(folder: Path, dtype: torch.dtype = torch.float32) -> Wan:
    with torch.device("meta"):
        module = Wan.build("transformer", read_json(folder / "config.json"), partial(attention, impl="auto"), {})
    load_weights(module, weight_files(folder), torch.device("cpu"), dtype)
    return Wan({"transformer": module.eval()})


def judge(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return diffusers.WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("denoisers")
    for name, shape in SHAPES.items():
        model = diffusers.WanTransformer3DModel(text_dim=TEXT_DIM, **shape)
        randomise(model, "transformer").save_pretrained(root / name)
    return {name: root / name for name in SHAPES}


def text(batch: int) -> Condition:
    """The end of every prompt is zeros, as the pipeline pads them."""
    hidden = torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    hidden[:, -3:] = 0
    return Condition({"encoder_hidden_states": hidden})


def noise(family: Wan, size: Size, batch: int) -> Tensor:
    return family.noise(size, [torch.Generator().manual_seed(i) for i in range(batch)])


@torch.no_grad()
def velocities(family: Wan, size: Size, batch: int) -> list[Tensor]:
    """Of one and the same state at every step, so that only the timestep moves them."""
    predict = family.predictor(text(batch), size, Guidance(None), SIGMAS)
    return [predict(noise(family, size, batch), step) for step in range(len(SIGMAS) - 1)]


@torch.no_grad()
def expected(model: Any, x: Tensor, batch: int) -> list[Tensor]:
    hidden, dtype = text(batch).tensors["encoder_hidden_states"], model.patch_embedding.weight.dtype
    return [model(x.to(dtype), torch.full((batch,), sigma * 1000), hidden.to(dtype)).sample for sigma in SIGMAS[:-1]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_step_equals_diffusers(folders: dict[str, Path], shape: str, size: str, batch: int) -> None:
    family = native(folders[shape])
    ours = velocities(family, SIZES[size], batch)
    theirs = expected(judge(folders[shape]), noise(family, SIZES[size], batch), batch)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-4 * b.std()
    assert (theirs[0] - theirs[1]).abs().max() > 0.1 * theirs[0].std(), "the timestep has to matter"


def test_the_state_starts_as_in_diffusers(folders: dict[str, Path]) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    factors = SimpleNamespace(vae_scale_factor_temporal=4, vae_scale_factor_spatial=8)
    theirs = diffusers.WanPipeline.prepare_latents(
        factors, 2, 16, 64, 96, 9, torch.float32, torch.device("cpu"), generators
    )
    ours = noise(native(folders["2x32"], torch.bfloat16), SIZES["video"], 2)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_half_precision_keeps_what_diffusers_keeps_in_fp32(folders: dict[str, Path]) -> None:
    model, family = judge(folders["2x32"], torch.bfloat16), native(folders["2x32"], torch.bfloat16)
    parameters, theirs = dict(family.transformer.named_parameters()), dict(model.named_parameters())
    for name, slot in slots(family.transformer).items():
        mine = parameters[slot.parameter][slot.start : slot.stop]
        assert mine.dtype == theirs[name].dtype, name
        assert torch.equal(mine, theirs[name]), name
    moved = family.transformer.to(torch.float64).to(torch.bfloat16)
    assert moved.scale_shift_table.dtype == torch.float32 and moved.proj_out.weight.dtype == torch.bfloat16


def test_half_precision_follows_the_roundings_of_diffusers(folders: dict[str, Path]) -> None:
    """Both round at different places of the same formulas: ours may be no further from fp32 than diffusers is."""
    for shape in SHAPES:
        family = native(folders[shape], torch.bfloat16)
        x = noise(family, SIZES["video"], 2)
        exact = expected(judge(folders[shape]), x, 2)
        theirs = expected(judge(folders[shape], torch.bfloat16), x, 2)
        for a, b, truth in zip(velocities(family, SIZES["video"], 2), theirs, exact, strict=True):
            assert a.dtype == torch.bfloat16 and a.isfinite().all()
            off, allowed = ((y.float() - truth).norm() / truth.norm() for y in (a, b))
            assert off < 1.2 * allowed < 0.03, (shape, off, allowed)


def test_every_small_weight_is_noticed(folders: dict[str, Path]) -> None:
    """Forgetting any bias, norm weight or row of a table moves the result."""
    family = native(folders["2x32"])
    parameters = dict(family.transformer.named_parameters())
    before, blind = velocities(family, SIZES["picture"], 1), []
    for name, slot in slots(family.transformer).items():
        rows = parameters[slot.parameter].data[slot.start : slot.stop]
        vectors = rows.flatten(0, 1) if name.endswith("scale_shift_table") else [rows]
        for i, vector in enumerate(vectors):
            if (forgotten := neutral(name, vector)) is None:
                continue
            kept = vector.clone()
            vector.copy_(forgotten)
            after = velocities(family, SIZES["picture"], 1)
            vector.copy_(kept)
            if max(((a - b).abs().max() / b.std()).item() for a, b in zip(after, before, strict=True)) < 1e-4:
                blind.append(f"{name}[{i}]")
    assert not blind


def test_it_reads_every_tensor_of_the_checkpoint(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        wanted = {name for name, _ in judge(folder).named_parameters()}
        assert set(slots(native(folder).transformer)) == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_dim", 1280),
        ("added_kv_proj_dim", 64),
        ("in_channels", 36),
        ("out_channels", 48),
        ("patch_size", [1, 1, 1]),
        ("cross_attn_norm", False),
        ("qk_norm", None),
        ("eps", 1e-5),
        ("window_size", [-1, -1]),
    ],
)
def test_a_config_it_does_not_implement_is_refused(folders: dict[str, Path], key: str, value: object) -> None:
    config = {**read_json(folders["2x32"] / "config.json"), key: value}
    with pytest.raises(ConfigError, match=f"config key {key}="), torch.device("meta"):
        Wan.build("transformer", config, partial(attention, impl="auto"), {})


def test_presets_are_the_published_sizes() -> None:
    billions = {"Wan-AI/Wan2.1-T2V-14B-Diffusers": 14.29, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1.42}
    for name, preset in Wan.presets().items():
        config = preset.components["transformer"]
        with torch.device("meta"):
            module = Wan.build("transformer", config, partial(attention, impl="auto"), {})
            theirs = diffusers.WanTransformer3DModel.from_config(dict(config))
        assert isinstance(module, WanTransformer)
        parameters = sum(p.numel() for p in module.parameters())
        assert parameters == sum(p.numel() for p in theirs.parameters())
        assert parameters / 1e9 == pytest.approx(billions[name], abs=0.01)


@pytest.mark.parametrize(
    ("model", "blocks", "diffusers_total"),
    [("wan21-t2v-14b", 40, 2433), ("wan2.1-t2v-1.3b", 30, 1833)],
)
def test_a_step_takes_few_launches(tmp_path: Path, model: str, blocks: int, diffusers_total: int) -> None:
    """13 launches a block, where diffusers takes 60."""
    report = tmp_path / "launches.json"
    code, out, err = bench("launches", "--model", model, "--json", str(report))
    assert code == 0, out + err
    counts = json.loads(report.read_text())
    assert (counts["height"], counts["width"], counts["frames"]) == (480, 832, 81)
    assert sum(counts["diffusers"].values()) == diffusers_total
    ours = counts["ours"]
    assert sum(ours.values()) <= 13 * blocks + 10
    assert ours["qk_norm_rope_kernel"] == blocks
    assert not {"copy_", "cat", "add", "mul"} & set(ours)
    assert ours["_to_copy"] == 1, "the state is fp32 whatever the model's dtype; nothing else is converted"
