"""The native denoiser equals `ZImageTransformer2DModel` on tiny random checkpoints: fp32, 1e-4 of the std."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from test_offload import StandIn
from tiny_checkpoints import neutral
from tiny_z_image import TEXT_WIDTH, transformer
from torch import Tensor

from sgl_diffusion.bench.launches import count_native, find
from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import Condition, Guidance, Size
from sgl_diffusion.models.z_image import ZImage
from sgl_diffusion.models.z_image.transformer import ZImageTransformer
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.offload import Offloaded
from sgl_diffusion.runtime.weights import load_weights, slots, weight_files

TIMESTEPS = [1000.0, 833.7, 20.0]
# 6 x 5 image tokens are filled up by 2, 4 x 16 not at all, 1 by 31
SIZES = {"tall": Size(96, 80), "wide": Size(64, 256), "dot": Size(16, 16)}
TEXTS = (7, 32, 45)  # tokens; the second needs no padding
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "2x32": {"heads": 2, "head_dim": 32, "layers": 2},
    "3x16": {"heads": 3, "head_dim": 16, "layers": 1, "refiners": 2},
    "3x128": {"heads": 3, "head_dim": 128, "layers": 1},  # wider than a timestep's embedding
}


def native(folder: Path, dtype: torch.dtype = torch.float32) -> ZImage:
    with torch.device("meta"):
        module = ZImage.build("transformer", read_json(folder / "config.json"), partial(attention, impl="auto"), {})
    load_weights(module, weight_files(folder), torch.device("cpu"), dtype)
    return of(module.eval().requires_grad_(False))


def of(module: Any) -> ZImage:
    return ZImage({"transformer": module, "vae": SimpleNamespace(config=SimpleNamespace(downsampling=8))})


def judge(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return diffusers.ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("denoisers")
    for name, shape in SHAPES.items():
        transformer(**shape).save_pretrained(root / name)
    return {name: root / name for name in SHAPES}


def text(batch: int, tokens: int = TEXTS[0]) -> Condition:
    hidden = 3 * torch.randn(batch, tokens, TEXT_WIDTH, generator=torch.Generator().manual_seed(tokens))
    return Condition({"cap_feats": hidden})


def noise(family: ZImage, size: Size, batch: int) -> Tensor:
    return family.noise(size, [torch.Generator().manual_seed(i) for i in range(batch)])


def velocities(family: ZImage, size: Size, condition: Condition) -> list[Tensor]:
    """Of one and the same state at every step, so that only the timestep moves them."""
    predict = family.predictor(condition, size, Guidance(None), TIMESTEPS)
    x = noise(family, size, len(condition.tensors["cap_feats"]))
    return [predict(x, step) for step in range(len(TIMESTEPS))]


@torch.no_grad()
def expected(model: Any, x: Tensor, condition: Condition) -> list[Tensor]:
    """Called as by diffusers' pipeline, which turns the sign of what it gets."""
    pictures = list(x.to(model.dtype).unsqueeze(2))
    texts = list(condition.tensors["cap_feats"].to(model.dtype))
    each = [model(pictures, (1000 - torch.tensor(t).expand(len(x))) / 1000, texts).sample for t in TIMESTEPS]
    return [-torch.stack(of_step).squeeze(2) for of_step in each]


# -- parity -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_equals_diffusers(folders: dict[str, Path], shape: str) -> None:
    family, model = native(folders[shape]), judge(folders[shape])
    for tokens, (size, batch) in product(TEXTS, [("tall", 1), ("wide", 1), ("dot", 1), ("tall", 2)]):
        condition = text(batch, tokens)
        ours = velocities(family, SIZES[size], condition)
        theirs = expected(model, noise(family, SIZES[size], batch), condition)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 1e-4 * b.std(), (tokens, size, batch)
        assert (theirs[0] - theirs[1]).abs().max() > 0.1 * theirs[0].std(), "the timestep has to matter"


def test_half_precision_follows_the_roundings_of_diffusers(folders: dict[str, Path]) -> None:
    """Both round at different places of the same formulas: ours may be no further from fp32 than diffusers is."""
    for shape in SHAPES:
        family, size, condition = native(folders[shape], torch.bfloat16), SIZES["wide"], text(2)
        model, half = judge(folders[shape]), judge(folders[shape], torch.bfloat16)
        x = noise(family, size, 2)
        assert x.dtype == torch.float32, "noise is drawn in fp32 for a model of any dtype"
        exact, theirs = expected(model, x, condition), expected(half, x, condition)
        for a, b, truth in zip(velocities(family, size, condition), theirs, exact, strict=True):
            assert a.dtype == torch.bfloat16 and a.isfinite().all()
            off, allowed = ((y.float() - truth).norm() / truth.norm() for y in (a, b))
            assert off < 1.2 * allowed, (shape, off, allowed)


def test_every_small_weight_is_noticed(folders: dict[str, Path]) -> None:
    """Forgetting any bias, norm weight, padding or vector of a modulation bias moves the result."""
    family = native(folders["2x32"])
    parameters = dict(family.transformer.named_parameters())
    before, blind, tried = velocities(family, SIZES["tall"], text(1)), set(), 0
    for name, slot in slots(family.transformer).items():
        rows = parameters[slot.parameter].data[slot.start : slot.stop]
        if neutral(name, rows) is None and not name.endswith("pad_token"):
            continue
        for i, vector in enumerate(rows.chunk(4 if "adaLN_modulation.0" in name else 1)):
            forgotten, kept = neutral(name, vector), vector.clone()
            vector.copy_(torch.zeros(()) if forgotten is None else forgotten)
            after = velocities(family, SIZES["tall"], text(1))
            vector.copy_(kept)
            tried += 1
            if max(((a - b).abs().max() / b.std()).item() for a, b in zip(after, before, strict=True)) < 1e-4:
                blind.add(f"{name}[{i}]")
    assert not blind and tried > 40


def test_it_reads_every_tensor_of_the_checkpoint(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        wanted = {name for name, _ in judge(folder).named_parameters()}
        assert set(slots(native(folder).transformer)) == wanted


# -- what is done when --------------------------------------------------------------


def test_the_state_and_the_text_are_not_written_to(folders: dict[str, Path]) -> None:
    """Blocks add to their stream in place: a second call starts from the same text as the first."""
    family, condition = native(folders["2x32"]), text(1)
    predict, x = family.predictor(condition, SIZES["tall"], Guidance(None), TIMESTEPS), noise(family, SIZES["tall"], 1)
    assert torch.equal(predict(x, 0), predict(x, 0))
    assert torch.equal(x, noise(family, SIZES["tall"], 1))
    assert torch.equal(condition.tensors["cap_feats"], text(1).tensors["cap_feats"])


def test_a_step_computes_nothing_that_no_step_changes(folders: dict[str, Path]) -> None:
    family, called = native(folders["2x32"]), []
    for name in family.transformer.before_first_step:
        family.transformer.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    predict = family.predictor(text(1), SIZES["tall"], Guidance(None), TIMESTEPS)
    assert called == ["cap_embedder", "context_refiner.0", "t_embedder", "modulation"]
    predict(noise(family, SIZES["tall"], 1), 0)
    assert len(called) == 4


@pytest.mark.parametrize("prefetch", [0.0, 2.0])
def test_weights_that_come_block_by_block_are_there_when_they_are_read(
    folders: dict[str, Path], prefetch: float
) -> None:
    """A block's last norm is computed where the next one begins, when the block's own weights have left."""
    family, size = native(folders["2x32"]), SIZES["tall"]
    resident = velocities(family, size, text(1))
    component = Offloaded("transformer", family.transformer, StandIn(), prefetch=prefetch, cyclic=True, pin=True)
    with component.on_device():
        assert all(map(torch.equal, velocities(family, size, text(1)), resident))
    told = component.report(steps=len(TIMESTEPS))
    assert (told["late_layers"], told["layers"]) == (0, 3)


def test_a_step_takes_few_launches() -> None:
    """9 launches a block, where diffusers takes 75 (`sglang bench launches --model z-image`)."""
    family, preset = find("z-image")
    launches = count_native(family, preset, Size(1024, 1024), "sm_90", "triton")
    assert launches.total() <= 300
    assert launches["qk_norm_rope_kernel"] == 32
    assert not {"cat", "add", "mul", "tanh", "silu"} & set(launches)
    assert launches["copy_"] == 1, "what stands behind the image is copied into the stream, which blocks write to"


# -- configs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("all_patch_size", [2, 4]),
        ("all_f_patch_size", [2]),
        ("qk_norm", False),
        ("n_kv_heads", 1),
        ("nheads", 7),
        ("siglip_feat_dim", 1152),
        ("axes_dims", [8, 8, 8]),
        ("axes_dims", [16, 16]),
        ("axes_lens", [64, 64]),
        ("window_size", [-1, -1]),
    ],
)
def test_a_config_it_does_not_implement_is_refused(folders: dict[str, Path], key: str, value: object) -> None:
    config = {**read_json(folders["2x32"] / "config.json"), key: value}
    with pytest.raises(ConfigError, match=f"config key {key}="), torch.device("meta"):
        ZImage.build("transformer", config, partial(attention, impl="auto"), {})


@pytest.mark.parametrize("name", ZImage.presets())
def test_the_preset_is_the_published_size(name: str) -> None:
    config = ZImage.presets()[name].components["transformer"]
    with torch.device("meta"):
        module = ZImage.build("transformer", {**config, "nheads": 30}, partial(attention, impl="auto"), {})
    assert isinstance(module, ZImageTransformer)
    assert sum(p.numel() for p in module.parameters()) == 6_154_908_736
