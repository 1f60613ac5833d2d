"""FLUX.2, dev and klein, equals diffusers stage by stage on tiny random checkpoints: fp32, 1e-4 of the std."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_graphs import Watch
from tiny_checkpoints import neutral
from torch import Tensor

from sgl_diffusion.bench.launches import count_native, find
from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import Condition, Guidance, Size
from sgl_diffusion.models.flux2 import Flux2, Flux2Klein
from sgl_diffusion.models.flux2.family import empirical_shift
from sgl_diffusion.models.flux2.references import fitting, prepared
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.verify import Verification, verify
from sgl_diffusion.runtime.weights import slots, weight_files

Tiny = Callable[[str], Path]
PROMPT = "a red circle left of a blue square"
STAGES = {"encoder_hidden_states", "initial_latents", "timesteps", "final_latents", "pixels"}
GIVEN = {"latent_condition", "condition_ids"}
MODELS = ("flux2", "flux2_klein", "flux2_klein_base")
SIZES = ((96, 80), (70, 130), (64, 64))  # of the pictures, width first


@pytest.fixture(scope="module", autouse=True)
def load_anew() -> Iterator[Callable[[ServerArgs], Engine]]:
    """Every engine is loaded once, as a checkpoint serves many requests here; but for those loaded by this fixture."""
    loaded: dict[str, Engine] = {}
    load = Engine.load

    def once(args: ServerArgs) -> Engine:
        key = args.model_dump_json()
        if key not in loaded:
            loaded[key] = load(args)
        return loaded[key]

    with mock.patch.object(Engine, "load", once):
        yield load


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(len(SIZES))]
    for path, (width, height) in zip(paths, SIZES, strict=True):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return list(map(str, paths))


def asked(**sampling: Any) -> SamplingParams:
    usual = {
        "prompt": PROMPT, "height": 64, "width": 96, "num_inference_steps": 3, "max_sequence_length": 80, "seed": 3,
        "save_output": False,
    }  # fmt: skip
    return SamplingParams.model_validate(usual | sampling)


def test_layers_that_nobody_reads_are_not_loaded(tiny: Tiny, load_anew: Callable[[ServerArgs], Engine]) -> None:
    """What is read of the others equals diffusers in every test of stages here."""
    for name, kept in {"flux2": 30, "flux2_klein": 27}.items():
        engine = load_anew(served(tiny(name)))
        assert isinstance(engine.backend, NativePipeline) and engine.load_report is not None
        encoder = engine.backend.parts["text_encoder"]
        language = encoder.get_decoder()
        assert len(language.layers) == encoder.config.get_text_config().num_hidden_layers == kept
        read = engine.load_report.components["text_encoder"]
        norm = 4 * language.config.hidden_size  # is read, and dropped
        assert read.layers_left_out == 1 and read.bytes_read == norm + sum(p.nbytes for p in encoder.parameters())


def test_a_weight_of_no_layer_is_still_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("flux2_klein"), folder)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    save_file({**load_file(file), "model.layers.28.mlp.gate_proj.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected weights: .*layers\.28\.mlp"):
        Engine.load(served(folder))


def served(folder: Path, **server: Any) -> ServerArgs:
    return ServerArgs.model_validate({"model_path": str(folder), "device": "cpu", **server})


def check(folder: Path, server: Mapping[str, Any] | None = None, **sampling: Any) -> Verification:
    return verify(served(folder, **(server or {})), asked(**sampling))


def native(folder: Path, **server: Any) -> NativePipeline:
    backend = Engine.load(served(folder, backend="sglang", **server)).backend
    assert isinstance(backend, NativePipeline)
    return backend


def assert_equal(result: Verification, *, given: bool = False) -> None:
    assert {c.stage for c in result.comparisons} >= STAGES | (GIVEN if given else set())
    assert result.tolerance == 1e-4
    assert result.passed, "\n".join(f"{c.stage}: {c.relative_max:.1e}" for c in result.comparisons)


# -- whole pipelines ------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"prompt": [PROMPT, "a [IMG]cat"], "num_outputs_per_prompt": 2},
        {"height": 112, "width": 48, "num_inference_steps": 1, "max_sequence_length": 71},
    ],
    ids=["one", "batch", "tall"],
)
def test_every_stage_equals_diffusers(tiny: Tiny, model: str, sampling: dict[str, Any]) -> None:
    assert_equal(check(tiny(model), **sampling))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [1, 3])
def test_given_pictures(tiny: Tiny, pictures: list[str], model: str, count: int) -> None:
    result = check(tiny(model), image_path=pictures[:count], num_outputs_per_prompt=2)
    assert_equal(result, given=True)
    (tokens,) = (c.shape[1] for c in result.comparisons if c.stage == "latent_condition")
    assert tokens == sum((width // 16) * (height // 16) for width, height in SIZES[:count])


def test_a_result_is_as_large_as_the_first_picture(tiny: Tiny, pictures: list[str]) -> None:
    result = check(tiny("flux2_klein"), image_path=pictures[:2], height=None, width=None)
    assert_equal(result, given=True)
    assert next(c.shape for c in result.comparisons if c.stage == "pixels") == (1, 3, 80, 96)


@pytest.mark.parametrize("strength", [1.0, 7.5])
@pytest.mark.parametrize("model", ["flux2", "flux2_klein_base"])
def test_guidance(tiny: Tiny, model: str, strength: float) -> None:
    """Fed to the one, between two branches of the other."""
    assert_equal(check(tiny(model), guidance_scale=strength))


def test_a_negative_prompt_takes_the_place_of_none(tiny: Tiny) -> None:
    engine = Engine.load(served(tiny("flux2_klein_base")))
    drawn = [
        np.asarray(engine.run(asked(negative_prompt=text)).outputs[0].image).astype(int) for text in (None, "", "dark")
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[2] - drawn[0]).max() > 4


def test_tiles(tiny: Tiny, pictures: list[str], tmp_path: Path) -> None:
    """A picture is encoded in tiles, as a result is decoded."""
    picture = Image.open(pictures[0]).resize((208, 176))
    picture.save(tmp_path / "large.png")
    tiles = {"vae_tiling": True, "vae_config": {"tile_sample_min_height": 96, "tile_sample_min_width": 96}}
    large = {"height": 128, "width": 160, "num_inference_steps": 1, "image_path": [str(tmp_path / "large.png")]}
    assert_equal(check(tiny("flux2"), tiles, **large), given=True)


def test_half_precision_follows_the_roundings_of_diffusers(tiny: Tiny, pictures: list[str]) -> None:
    result = check(tiny("flux2"), {"precision": "bf16"}, image_path=pictures[:1])
    stages = {c.stage: c for c in result.comparisons}
    assert stages["initial_latents"].max_abs == stages["timesteps"].max_abs == stages["condition_ids"].max_abs == 0
    assert stages["encoder_hidden_states"].max_abs == 0
    assert stages["latent_condition"].relative_l2 < 0.02
    assert stages["prediction_0"].relative_l2 < 0.03


@pytest.mark.parametrize(("model", "count"), [("flux2", 2), ("flux2_klein_base", 0)])
def test_predicted_memory_is_what_a_run_holds(
    tiny: Tiny, pictures: list[str], load_anew: Callable[[ServerArgs], Engine], model: str, count: int
) -> None:
    report = load_anew(served(tiny(model))).run(asked(measure_memory=True, image_path=pictures[:count])).report
    assert report.memory is not None
    stages = {stage.name: stage for stage in report.memory.stages}
    assert ("picture_encoding" in stages) == bool(count)
    for stage in stages.values():
        assert stage.predicted_mb == pytest.approx(stage.measured_mb, rel=0.02), stage


# -- parts ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [16, 1024, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_noise_levels_are_shifted_as_in_diffusers(tokens: int, steps: int) -> None:
    assert empirical_shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


@pytest.mark.parametrize("size", [(96, 80), (65, 511), (1500, 900), (1024, 1024), (1025, 1024), (2900, 400)])
def test_pictures_are_prepared_as_in_diffusers(size: tuple[int, int]) -> None:
    """As `Flux2Pipeline.__call__` does it, whose steps these are."""
    draw, judge = np.random.default_rng(1), Flux2ImageProcessor(vae_scale_factor=16)
    picture = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    given = judge.check_image_input(picture)
    if size[0] * size[1] > 1024 * 1024:
        given = judge._resize_to_target_area(given, 1024 * 1024)
    width, height = (side // 16 * 16 for side in given.size)
    theirs = judge.preprocess(given, height=height, width=width, resize_mode="crop")
    assert fitting(picture) == (height, width)
    assert torch.equal(prepared(picture), theirs)


def test_encoding_waits_for_nothing(tiny: Tiny) -> None:
    """The language models' share, which is captured; padding before and behind the prompt."""
    for model in ("flux2", "flux2_klein"):
        family = native(tiny(model)).family
        watch = Watch()

        def watched(function: Any, *arguments: Any, watch: Watch = watch) -> Any:
            with watch:
                return function(*arguments)

        with torch.inference_mode():
            family.encode(PROMPT, 80, (), watched)
        assert watch.seen


@torch.inference_mode()
def results(family: Flux2, picture: Image.Image) -> list[Tensor]:
    """All that depends on weights: latents of a picture, a velocity that depends on them, a decoded picture."""
    size = Size(32, 48)
    seen = family.encode_pictures([picture], size)
    draw = torch.Generator().manual_seed(1)
    width = family.transformer.config.joint_attention_dim
    condition = Condition({"encoder_hidden_states": torch.randn(1, 7, width, generator=draw)}) | seen
    x = family.noise(size, [torch.Generator().manual_seed(2)])
    velocity = family.predictor(condition, size, Guidance(4.0), [800.0])(x, 0)
    return [seen.tensors["latent_condition"], velocity, next(family.decode(x, size))]


def test_every_small_weight_is_noticed(tiny: Tiny, pictures: list[str]) -> None:
    """Forgetting any bias, norm weight or statistic moves the result."""
    backend, picture = native(tiny("flux2")), Image.open(pictures[2])
    family = backend.family
    assert isinstance(family, Flux2)
    before, blind = results(family, picture), []
    for component in ("transformer", "vae"):
        for name, p in backend.parts[component].named_parameters():
            if (forgotten := neutral(name, p)) is None:
                continue
            kept = p.clone()
            p.copy_(forgotten)
            after = results(family, picture)
            p.copy_(kept)
            if max(((a - b).abs().max() / b.std()).item() for a, b in zip(after, before, strict=True)) < 1e-4:
                blind.append(name)
    # a key bias adds one number to all scores of a query, which softmax takes out again
    assert blind == [f"{side}.mid_block.attentions.0.to_k.bias" for side in ("decoder", "encoder")]


@pytest.mark.parametrize("model", ["flux2", "flux2_klein"])
def test_it_reads_every_tensor_of_the_checkpoint(tiny: Tiny, model: str) -> None:
    parts, folder = native(tiny(model)).parts, tiny(model)
    for component in ("transformer", "vae"):
        (file,) = weight_files(folder / component)
        with safe_open(file, "pt") as stored:  # type: ignore[no-untyped-call]
            names = set(stored.keys()) - {"bn.num_batches_tracked"}  # how many batches the statistics are of
        assert set(slots(parts[component])) == names


# -- mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "sampling", "message"),
    [
        ("flux2", {"height": 40}, "height=40: must be a multiple of 16; nearest: 32 or 48"),
        ("flux2", {"width": 8}, "width=8: must be a multiple of 16; nearest: 16"),
        ("flux2", {"num_frames": 5}, "num_frames=5: this model draws pictures"),
        ("flux2", {"max_sequence_length": 513}, "max_sequence_length=513: at most 512"),
        ("flux2", {"max_sequence_length": 50}, r"max_sequence_length=50: the prompt has \d+ tokens with its template"),
        ("flux2_klein", {"max_sequence_length": 9}, "this would be lost: "),
        ("flux2_klein", {"guidance_scale": 4.0}, "guidance_scale=4: this model was distilled without; expected 1"),
        ("flux2_klein", {"negative_prompt": "x"}, "negative_prompt: has no effect with guidance_scale=1"),
        ("flux2_klein_base", {"true_cfg_scale": 2.0}, "true_cfg_scale=2.0: this model's is called guidance_scale"),
    ],
)
def test_a_mistake_is_one_line(tiny: Tiny, model: str, sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        Engine.load(served(tiny(model))).run(asked(**sampling))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((63, 200), "image_path: a picture of 63x200 pixels; each side must have at least 64"),
        ((600, 70), "image_path: a picture of 600x70 pixels; sides may be at most 8:1"),
    ],
)
def test_a_picture_it_cannot_take(tiny: Tiny, tmp_path: Path, size: tuple[int, int], message: str) -> None:
    Image.new("RGB", size).save(tmp_path / "p.png")
    with pytest.raises(UserError, match=message):
        Engine.load(served(tiny("flux2"))).run(asked(image_path=[str(tmp_path / "p.png")]))


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("transformer", "patch_size", 2),
        ("transformer", "eps", 1e-5),
        ("transformer", "out_channels", 64),
        ("transformer", "axes_dims_rope", [16, 16]),
        ("transformer", "new_key", 1),
        ("vae", "patch_size", [1, 1]),
        ("vae", "act_fn", "relu"),
        ("vae", "decoder_block_out_channels", [8, 16]),
        ("vae", "latent_channels", 16),
        ("vae", "_class_name", "AutoencoderDC"),
    ],
)
def test_a_config_it_does_not_implement_is_refused(tiny: Tiny, component: str, key: str, value: object) -> None:
    config = {**read_json(tiny("flux2") / component / "config.json"), key: value}
    with pytest.raises(ConfigError, match=f"config key {key}="), torch.device("meta"):
        Flux2.build(component, config, attention, {})


def test_guidance_that_nothing_reads_is_refused(tiny: Tiny) -> None:
    """A checkpoint of dev's kind that was not distilled from guidance; and klein, which has no place for it."""
    config = read_json(tiny("flux2") / "transformer" / "config.json")
    with torch.device("meta"):
        unguided = Flux2.build("transformer", {**config, "guidance_embeds": False}, attention, {})
        family = Flux2({"transformer": unguided, "vae": None})
        with pytest.raises(ConfigError, match="config key guidance_embeds=True"):
            Flux2Klein.build("transformer", config, attention, {})
    family.check(Size(32, 32), Guidance(None), 512, 0)
    with pytest.raises(ValueError, match="guidance_scale=2.0: this checkpoint has no guidance embedding"):
        family.check(Size(32, 32), Guidance(2.0), 512, 0)
    assert Flux2.defaults({"transformer": {**config, "guidance_embeds": False}}).guidance_scale is None


# -- published checkpoints --------------------------------------------------------------

BILLIONS = {
    "black-forest-labs/FLUX.2-dev": 32.223,
    "black-forest-labs/FLUX.2-klein-4B": 3.876,
    "black-forest-labs/FLUX.2-klein-9B": 9.079,
}


@pytest.mark.parametrize("name", BILLIONS)
def test_presets_are_the_published_sizes(name: str) -> None:
    preset = {**Flux2.presets(), **Flux2Klein.presets()}[name]
    family = Flux2Klein if preset.pipeline_class == "Flux2KleinPipeline" else Flux2
    options = {"with_encoder": True}
    for component in ("transformer", "vae"):
        config = dict(preset.components[component])
        with torch.device("meta"):
            module = family.build(component, config, attention, options if component == "vae" else {})
            theirs = getattr(diffusers, config["_class_name"]).from_config(config)
        parameters = sum(p.numel() for p in module.parameters())
        statistics = sum(b.numel() for b in theirs.buffers() if b.ndim)
        assert parameters == sum(p.numel() for p in theirs.parameters()) + statistics
        if component == "transformer":
            assert parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.001)


def test_presets_say_what_their_defaults_are() -> None:
    for family in (Flux2, Flux2Klein):
        for name, preset in family.presets().items():
            assert family.defaults(preset.components) == preset.defaults, name
    steps = {name: p.defaults.num_inference_steps for name, p in Flux2Klein.presets().items()}
    assert {name for name, n in steps.items() if n == 50} == {name for name in steps if "base" in name}


def test_a_step_takes_few_launches() -> None:
    """7 a single block and 11 a double one, where diffusers takes 1,064 in all (`sglang bench launches`)."""
    family, preset = find("flux.2-klein-4b")
    ours = count_native(family, preset, Size(1024, 1024), "sm_90", "triton")
    assert ours.total() <= 195
    assert ours["qk_norm_rope_kernel"] == 25
    assert not {"_to_copy", "add", "mul", "copy_"} & set(ours)
