"""The native denoiser equals `QwenImageTransformer2DModel` on tiny random checkpoints: fp32, 1e-4 of the std."""

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
from sgl_diffusion.models.qwen_image import QwenImage
from sgl_diffusion.models.qwen_image.transformer import QwenImageTransformer
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.weights import load_weights, slots, weight_files

TIMESTEPS = [1000.0, 833.7, 410.0, 20.0]
# rows and columns of tokens: even and odd, more of one or of the other, and one alone
SIZES = {"wide": Size(64, 112), "tall": Size(144, 48), "odd": Size(80, 80), "dot": Size(16, 16)}
TEXT_TOKENS, TEXT_DIM = 7, 40
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "2x32": {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "axes_dims_rope": (8, 12, 12)},
    "3x20": {"num_attention_heads": 3, "attention_head_dim": 20, "num_layers": 1, "axes_dims_rope": (8, 8, 4)},
    "1x128": {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 3, "in_channels": 64},
}
CLEAN = {**SHAPES["2x32"], "zero_cond_t": True}  # given pictures have no noise at any timestep
GRIDS = [(3, 2), (2, 5)]  # rows and columns of given pictures


def native(folder: Path, dtype: torch.dtype = torch.float32) -> QwenImage:
    with torch.device("meta"):
        module = QwenImage.build("transformer", read_json(folder / "config.json"), partial(attention, impl="auto"), {})
    load_weights(module, weight_files(folder), torch.device("cpu"), dtype)
    return QwenImage({"transformer": module.eval()})


def judge(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return diffusers.QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=dtype).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("denoisers")
    for name, shape in {**SHAPES, "clean": CLEAN}.items():
        channels = {"in_channels": 16, **shape}
        config = {"joint_attention_dim": TEXT_DIM, **channels, "out_channels": channels["in_channels"] // 4}
        model = diffusers.QwenImageTransformer2DModel(**config)
        randomise(model, "transformer").save_pretrained(root / name)
    return {name: root / name for name in (*SHAPES, "clean")}


def text(batch: int) -> Condition:
    hidden = 3 * torch.randn(batch, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    return Condition({"encoder_hidden_states": hidden})


def noise(family: QwenImage, size: Size, batch: int) -> Tensor:
    return family.noise(size, [torch.Generator().manual_seed(i) for i in range(batch)])


def pictures(batch: int) -> Condition:
    seeded = torch.Generator().manual_seed(2)
    return Condition(
        {f"latent_condition_{i}": torch.randn(batch, *g, 16, generator=seeded) for i, g in enumerate(GRIDS)}
    )


@torch.no_grad()
def velocities(family: QwenImage, size: Size, batch: int, given: Condition | None = None) -> list[Tensor]:
    """Of one and the same state at every step, so that only the timestep moves them."""
    predict = family.predictor(text(batch) | (given or Condition({})), size, Guidance(None), TIMESTEPS)
    return [predict(noise(family, size, batch), step) for step in range(len(TIMESTEPS))]


@torch.no_grad()
def expected(model: Any, x: Tensor, size: Size, batch: int, given: Condition | None = None) -> list[Tensor]:
    """Called as by diffusers' pipeline, which hands thousandths over in the model's dtype, divided by 1000."""
    dtype = model.proj_out.weight.dtype
    hidden = text(batch).tensors["encoder_hidden_states"].to(dtype)
    shapes = [(1, size.height // 16, size.width // 16)]
    tokens = [x.to(dtype)]
    if given is not None:
        shapes += [(1, *grid) for grid in GRIDS]
        tokens += [tensor.flatten(1, 2) for tensor in given.tensors.values()]
    return [
        model(
            torch.cat(tokens, dim=1),
            encoder_hidden_states=hidden,
            timestep=torch.tensor(t).expand(batch).to(dtype) / 1000,
            img_shapes=[shapes] * batch,
        ).sample[:, : x.shape[1]]
        for t in TIMESTEPS
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "batch"), [("wide", 2), ("tall", 1), ("odd", 2), ("dot", 1)])
def test_every_step_equals_diffusers(folders: dict[str, Path], shape: str, size: str, batch: int) -> None:
    family = native(folders[shape])
    ours = velocities(family, SIZES[size], batch)
    theirs = expected(judge(folders[shape]), noise(family, SIZES[size], batch), SIZES[size], batch)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-4 * b.std()
    assert (theirs[0] - theirs[1]).abs().max() > 0.1 * theirs[0].std(), "the timestep has to matter"


@pytest.mark.parametrize("shape", ["2x32", "clean"])
@pytest.mark.parametrize("batch", [1, 2])
def test_given_pictures_are_further_tokens(folders: dict[str, Path], shape: str, batch: int) -> None:
    """Nothing of them is drawn; the text begins behind the longest side of all."""
    family, size, given = native(folders[shape]), SIZES["dot"], pictures(batch)
    ours = velocities(family, size, batch, given)
    theirs = expected(judge(folders[shape]), noise(family, size, batch), size, batch, given)
    for a, b, alone in zip(ours, theirs, velocities(family, size, batch), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-4 * b.std()
        assert (a - alone).abs().max() > 0.01 * b.std(), "the pictures have to matter"


def test_samples_of_a_batch_do_not_mix(folders: dict[str, Path]) -> None:
    family = native(folders["2x32"])
    hidden, size = text(2).tensors["encoder_hidden_states"], SIZES["wide"]
    x, together = noise(family, size, 2), velocities(family, size, 2)[1]
    for i in range(2):
        alone = family.predictor(Condition({"encoder_hidden_states": hidden[i, None]}), size, Guidance(None), TIMESTEPS)
        with torch.no_grad():
            torch.testing.assert_close(alone(x[i, None], 1)[0], together[i], rtol=0, atol=1e-5)


def test_the_state_and_the_text_are_not_written_to(folders: dict[str, Path]) -> None:
    """Blocks add to their stream in place: a second call starts from the same text as the first."""
    family = native(folders["2x32"])
    predict, x = family.predictor(text(1), SIZES["odd"], Guidance(None), TIMESTEPS), noise(family, SIZES["odd"], 1)
    with torch.no_grad():
        assert torch.equal(predict(x, 0), predict(x, 0))
    assert torch.equal(x, noise(family, SIZES["odd"], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_starts_as_in_diffusers(folders: dict[str, Path], dtype: torch.dtype) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    pipeline = diffusers.QwenImagePipeline
    parts = SimpleNamespace(vae_scale_factor=8, _pack_latents=pipeline._pack_latents)
    theirs = pipeline.prepare_latents(parts, 2, 4, 64, 112, dtype, torch.device("cpu"), generators)
    ours = noise(native(folders["2x32"], dtype), SIZES["wide"], 2)
    assert ours.dtype == dtype and torch.equal(ours, theirs)


def test_half_precision_follows_the_roundings_of_diffusers(folders: dict[str, Path]) -> None:
    """Both round at different places of the same formulas: ours may be no further from fp32 than diffusers is."""
    for shape in SHAPES:
        family, size = native(folders[shape], torch.bfloat16), SIZES["wide"]
        model, half = judge(folders[shape]), judge(folders[shape], torch.bfloat16)
        x = noise(family, size, 2)
        exact, theirs = expected(model, x.float(), size, 2), expected(half, x, size, 2)
        for a, b, truth in zip(velocities(family, size, 2), theirs, exact, strict=True):
            assert a.dtype == torch.bfloat16 and a.isfinite().all()
            off, allowed = ((y.float() - truth).norm() / truth.norm() for y in (a, b))
            assert off < 1.2 * allowed, (shape, off, allowed)


def test_every_small_weight_is_noticed(folders: dict[str, Path]) -> None:
    """Forgetting any bias, norm weight or vector of a modulation bias moves the result."""
    family = native(folders["2x32"])
    parameters = dict(family.transformer.named_parameters())
    before, blind = velocities(family, SIZES["odd"], 1), set()
    for name, slot in slots(family.transformer).items():
        rows = parameters[slot.parameter].data[slot.start : slot.stop]
        if neutral(name, rows) is None:
            continue
        vectors = {"_mod.1": 6, "norm_out": 2}
        for i, vector in enumerate(rows.chunk(next((n for part, n in vectors.items() if part in name), 1))):
            forgotten, kept = neutral(name, vector), vector.clone()
            assert forgotten is not None
            vector.copy_(forgotten)
            after = velocities(family, SIZES["odd"], 1)
            vector.copy_(kept)
            if max(((a - b).abs().max() / b.std()).item() for a, b in zip(after, before, strict=True)) < 1e-4:
                blind.add(f"{name}[{i}]".removeprefix("transformer_blocks.1."))
    # nobody reads the text that the last block writes
    assert blind == {
        "attn.norm_added_q.weight[0]",
        "attn.add_q_proj.bias[0]",
        "attn.to_add_out.bias[0]",
        "txt_mlp.net.0.proj.bias[0]",
        "txt_mlp.net.2.bias[0]",
        *(f"txt_mod.1.bias[{i}]" for i in (2, 3, 4, 5)),
    }


def test_it_reads_every_tensor_of_the_checkpoint(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        wanted = {name for name, _ in judge(folder).named_parameters()}
        assert set(slots(native(folder).transformer)) == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 1),
        ("out_channels", 8),
        ("out_channels", None),
        ("guidance_embeds", True),
        ("use_additional_t_cond", True),
        ("use_layer3d_rope", True),
        ("window_size", [-1, -1]),
    ],
)
def test_a_config_it_does_not_implement_is_refused(folders: dict[str, Path], key: str, value: object) -> None:
    config = {**read_json(folders["2x32"] / "config.json"), key: value}
    with pytest.raises(ConfigError, match=f"config key {key}="), torch.device("meta"):
        QwenImage.build("transformer", config, partial(attention, impl="auto"), {})


def test_the_preset_is_the_published_size() -> None:
    config = QwenImage.presets()["Qwen/Qwen-Image"].components["transformer"]
    with torch.device("meta"):
        module = QwenImage.build("transformer", config, partial(attention, impl="auto"), {})
        theirs = diffusers.QwenImageTransformer2DModel.from_config(dict(config))
    assert isinstance(module, QwenImageTransformer)
    parameters = sum(p.numel() for p in module.parameters())
    assert parameters == sum(p.numel() for p in theirs.parameters())
    assert parameters / 1e9 == pytest.approx(20.43, abs=0.01)


def test_a_step_takes_few_launches(tmp_path: Path) -> None:
    """12 launches a block, where diffusers takes 90."""
    report = tmp_path / "launches.json"
    code, out, err = bench("launches", "--model", "qwen-image", "--json", str(report))
    assert code == 0, out + err
    counts = json.loads(report.read_text())
    assert (counts["height"], counts["width"]) == (1024, 1024)
    assert sum(counts["diffusers"].values()) == 5437
    ours = counts["ours"]
    assert sum(ours.values()) <= 730
    assert ours["qk_norm_rope_kernel"] == 60
    assert not {"_to_copy", "cat", "add", "mul"} & set(ours)
    assert ours["copy_"] == 1, "the text is copied into the stream, which blocks write to; nothing else is"
