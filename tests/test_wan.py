"""Native denoisers equal `WanTransformer3DModel` on tiny random checkpoints: fp32, 1e-4 of the std."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from wan_models import (
    SIZES,
    TIMESTEPS,
    VARIANTS,
    condition,
    expected,
    judge,
    native,
    noise,
    save,
    unnoticed,
    velocities,
)

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import Condition, Guidance
from sgl_diffusion.models.wan import Wan
from sgl_diffusion.models.wan.transformer import hold_first_frame
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.graphs import shape_class
from sgl_diffusion.runtime.weights import slots

Folder = Callable[..., Path]
KINDS = [(variant, "2x32") for variant in VARIANTS] + [(v, s) for v in ("t2v", "i2v") for s in ("3x20", "1x128")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("denoisers")
    made: dict[tuple[str, str], Path] = {}

    def find(variant: str, shape: str = "2x32") -> Path:
        if (variant, shape) not in made:
            made[variant, shape] = save(root, variant, shape)
        return made[variant, shape]

    return find


# -- parity -----------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "shape"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_step_equals_diffusers(folder: Folder, variant: str, shape: str, size: str) -> None:
    path = folder(variant, shape)
    family, model = native(path), judge(path)
    for batch in (1, 2):
        ours = velocities(family, variant, SIZES[size], batch)
        theirs = expected(model, variant, noise(family, SIZES[size], batch), SIZES[size], batch)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 1e-4 * b.std()
    if not (VARIANTS[variant].begins and SIZES[size].frames == 1):
        assert (theirs[0] - theirs[1]).abs().max() > 0.1 * theirs[0].std(), "the timestep has to matter"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_small_weight_is_noticed(folder: Folder, variant: str) -> None:
    """Forgetting any bias, norm weight, row of a table or place of a picture's token moves the result."""
    family = native(folder(variant))
    assert not unnoticed(family, lambda: velocities(family, variant, SIZES["tall"], 1)[1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_reads_every_tensor_of_the_checkpoint(folder: Folder, variant: str) -> None:
    wanted = {name for name, _ in judge(folder(variant)).named_parameters()}
    assert set(slots(native(folder(variant)).denoisers["transformer"])) == wanted


def test_the_norm_of_a_q_that_nothing_computes_is_left_out(folder: Folder, tmp_path: Path) -> None:
    """Published image-to-video checkpoints hold one; diffusers ignores it, too."""
    source = folder("i2v")
    (file,) = source.glob("*.safetensors")
    tensors = {**load_file(file), "blocks.1.attn2.norm_added_q.weight": torch.ones(64)}
    for name, more in (("good", {}), ("bad", {"blocks.1.attn2.norm_added_v.weight": torch.ones(64)})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((source / "config.json").read_text())
        save_file(tensors | more, tmp_path / name / file.name)
    native(tmp_path / "good")
    with pytest.raises(UserError, match="unexpected weights: blocks.1.attn2.norm_added_v.weight"):
        native(tmp_path / "bad")


def test_the_state_starts_as_in_diffusers(folder: Folder) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    for variant, channels, pixels in (("t2v", 16, 8), ("i2v", 16, 8), ("ti2v", 48, 16)):
        factors = SimpleNamespace(vae_scale_factor_temporal=4, vae_scale_factor_spatial=pixels)
        theirs = diffusers.WanPipeline.prepare_latents(
            factors, 2, channels, 64, 96, 9, torch.float32, torch.device("cpu"), generators
        )
        ours = noise(native(folder(variant), torch.bfloat16), SIZES["video"], 2)
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
        generators = [g.manual_seed(i) for i, g in enumerate(generators)]


# -- half precision ---------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["t2v", "flf2v"])
def test_half_precision_keeps_what_diffusers_keeps_in_fp32(folder: Folder, variant: str) -> None:
    model, module = (f(folder(variant), torch.bfloat16) for f in (judge, native))
    module = module.denoisers["transformer"]
    parameters, theirs = dict(module.named_parameters()), dict(model.named_parameters())
    for name, slot in slots(module).items():
        mine = parameters[slot.parameter][slot.start : slot.stop]
        assert mine.dtype == theirs[name].dtype, name
        assert torch.equal(mine, theirs[name]), name
    moved = module.to(torch.float64).to(torch.bfloat16)
    assert moved.scale_shift_table.dtype == torch.float32 and moved.proj_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("variant", "shape"), KINDS)
def test_half_precision_follows_the_roundings_of_diffusers(folder: Folder, variant: str, shape: str) -> None:
    """Both round at different places of the same formulas: ours may be no further from fp32 than diffusers is."""
    path, size = folder(variant, shape), SIZES["video"]
    family = native(path, torch.bfloat16)
    x = noise(family, size, 2)
    exact = expected(judge(path), variant, x, size, 2)
    theirs = expected(judge(path, torch.bfloat16), variant, x, size, 2)
    for a, b, truth in zip(velocities(family, variant, size, 2), theirs, exact, strict=True):
        assert a.dtype == torch.bfloat16 and a.isfinite().all()
        off, allowed = ((y.float() - truth).norm() / truth.norm() for y in (a, b))
        assert off < 1.2 * allowed < 0.03, (off, allowed)


# -- what a request computes once -------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_reads_neither_text_nor_picture(folder: Folder, variant: str) -> None:
    """Their keys and values, timesteps and a condition's share of the patches come from before the first step."""
    family, size = native(folder(variant)), SIZES["video"]
    module, before = family.denoisers["transformer"], velocities(family, variant, size, 2)
    predict = family.predictor(condition(variant, size, 2), size, Guidance(None), TIMESTEPS)

    def refuse(layer: nn.Module, *_: object) -> None:
        raise AssertionError("this layer works once a request")

    for name, layer in module.named_modules():
        if name.startswith("condition_embedder.") or name.endswith(("2.to_k", "2.to_v", "add_k_proj", "add_v_proj")):
            layer.register_forward_pre_hook(refuse)
    module.patch_embedding.put_beside = refuse
    for step, velocity in enumerate(before):
        assert torch.equal(predict(noise(family, size, 2), step), velocity)
    hash(shape_class(predict.request))


def test_a_given_first_frame_replaces_the_states(folder: Folder) -> None:
    family, size = native(folder("ti2v")), SIZES["video"]
    given = condition("ti2v-from-a-picture", size, 2)
    x, first = noise(family, size, 2), given.tensors["latent_condition"]
    held, mask = hold_first_frame(x, first), torch.ones(1, 1, *x.shape[2:])
    mask[:, :, 0] = 0
    assert torch.equal(held, (1 - mask) * first + mask * x)
    predict = family.predictor(given, size, Guidance(None), TIMESTEPS)
    assert len(predict.steps[0].block_N6GD[0, 0]) == 2, "vectors for the first frame and for the others"
    assert torch.equal(predict(x, 1), predict(held, 1))


def test_latents_of_one_pixel_are_good_for_every_size(folder: Folder) -> None:
    """As the example condition has them."""
    family, size = native(folder("i2v-a14b")), SIZES["video"]
    given = dict(condition("i2v-a14b", size, 2).tensors)

    def velocity(latents: Tensor) -> Tensor:
        predict = family.predictor(Condition({**given, "latent_condition": latents}), size, Guidance(None), TIMESTEPS)
        return predict(noise(family, size, 2), 1)

    pixel = given["latent_condition"][:1, :, :1, :1, :1]
    assert torch.equal(velocity(pixel), velocity(pixel.expand_as(given["latent_condition"]).clone()))
    with pytest.raises(RuntimeError, match="expanded size"):
        velocity(given["latent_condition"][..., 1:])


# -- configs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("image_dim", 1280, "added_kv_proj_dim=None"),
        ("added_kv_proj_dim", 64, "added_kv_proj_dim=64"),
        ("pos_embed_seq_len", 514, "pos_embed_seq_len=514"),
        ("in_channels", 32, "in_channels=32"),
        ("out_channels", 48, "in_channels=16"),
        ("patch_size", [1, 1, 1], "patch_size="),
        ("cross_attn_norm", False, "cross_attn_norm=False"),
        ("qk_norm", None, "qk_norm=None"),
        ("eps", 1e-5, "eps=1e-05"),
        ("window_size", [-1, -1], "window_size="),
    ],
)
def test_a_config_it_does_not_implement_is_refused(folder: Folder, key: str, value: object, named: str) -> None:
    config = {**read_json(folder("t2v") / "config.json"), key: value}
    with pytest.raises(ConfigError, match=f"config key {named}"), torch.device("meta"):
        Wan.build("transformer", config, partial(attention, impl="auto"), {})


def test_as_many_channels_come_out_as_go_in_where_nothing_is_said(folder: Folder) -> None:
    config = {**read_json(folder("t2v") / "config.json"), "out_channels": None}
    with torch.device("meta"):
        module = Wan.build("transformer", config, partial(attention, impl="auto"), {})
    assert module.proj_out.out_features == 4 * 16
