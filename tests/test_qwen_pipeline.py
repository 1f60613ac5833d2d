"""Qwen-Image draws and edits: the native pipelines equal diffusers stage by stage, and what they refuse."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from test_offload import StandIn
from test_offload import load as load_offloaded
from tiny_checkpoints import copy
from tiny_qwen import Processor, text_encoder, tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import Size
from sgl_diffusion.models.qwen_image import QwenImage, QwenImageEdit, QwenImageEditPlus
from sgl_diffusion.models.qwen_image.text import EDITING_SEVERAL
from sgl_diffusion.models.qwen_image.vision import Patches, ProcessorConfig, states_with_pictures
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.resolve import resolve
from sgl_diffusion.runtime.verify import Verification, verify

Tiny = Callable[[str], Path]
PROMPT = "a red circle left of a blue square"
STAGES = {"encoder_hidden_states", "initial_latents", "timesteps", "final_latents", "pixels"}
AREA, SEEN_AREA = 128 * 128, 112 * 112  # of given pictures, where published models have a million pixels


def asked(**sampling: Any) -> SamplingParams:
    small = {"prompt": PROMPT, "height": 64, "width": 96, "num_inference_steps": 3, "seed": 3, "save_output": False}
    return SamplingParams(**{**small, "max_sequence_length": 64, **sampling})


def load(folder: Path, **args: Any) -> Engine:
    return Engine.load(ServerArgs(model_path=str(folder), device="cpu", **args))


def drawn(engine: Engine, **sampling: Any) -> np.ndarray:
    return np.asarray(engine.run(asked(**sampling)).outputs[0].image)


def check(folder: Path, **sampling: Any) -> Verification:
    result = verify(ServerArgs(model_path=str(folder), device="cpu"), asked(**sampling))
    assert {c.stage for c in result.comparisons} >= STAGES
    assert result.tolerance == 1e-4
    assert result.passed, "\n".join(f"{c.stage}: {c.relative_max:.1e}" for c in result.comparisons)
    return result


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three files: a wide one, a tall one and a square."""
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for i, (height, width) in enumerate([(7, 9), (11, 5), (8, 8)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        paths.append(str(folder / f"{i}.png"))
    return paths


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides, given pictures are small; and diffusers has a processor that does without torchvision."""
    dimensions = pipeline_qwenimage_edit.calculate_dimensions
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: dimensions(AREA, ratio))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", SEEN_AREA)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setattr(QwenImageEdit, "seen_area", AREA)
    monkeypatch.setattr(QwenImageEdit, "kept_area", AREA)
    monkeypatch.setattr(QwenImageEditPlus, "seen_area", SEEN_AREA)
    monkeypatch.setattr(transformers.Qwen2VLProcessor, "from_pretrained", Processor.from_pretrained)


# -- parity -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("qwen", {"height": 80, "width": 48, "num_outputs_per_prompt": 2}),
        ("qwen", {"prompt": [PROMPT, "a white cross"], "negative_prompt": " "}),
        ("qwen_lightning", {"negative_prompt": "blurry", "true_cfg_scale": 2.0, "num_inference_steps": 4}),
    ],
)
def test_every_stage_equals_diffusers(tiny: Tiny, name: str, sampling: dict[str, Any]) -> None:
    check(tiny(name), **sampling)


@pytest.mark.parametrize(
    ("name", "given", "sampling"),
    [
        ("qwen_edit", [0], {"height": None, "width": None}),
        ("qwen_edit", [1], {"negative_prompt": " ", "num_outputs_per_prompt": 2}),
        ("qwen_edit_plus", [1], {"negative_prompt": "blurry", "true_cfg_scale": 2.0}),
        ("qwen_edit_plus", [0, 1, 2], {}),
        ("qwen_edit_2511", [2, 0], {"negative_prompt": " ", "num_outputs_per_prompt": 2}),
    ],
)
@pytest.mark.usefixtures("small_pictures")
def test_every_stage_of_an_edit_equals_diffusers(
    tiny: Tiny, pictures: list[str], name: str, given: list[int], sampling: dict[str, Any]
) -> None:
    result = check(tiny(name), image_path=[pictures[i] for i in given], **sampling)
    compared = {c.stage for c in result.comparisons if c.stage.startswith("latent_condition")}
    assert compared == {f"latent_condition_{i}" for i in range(len(given))}


def test_every_small_weight_of_the_encoder_is_noticed() -> None:
    """Forgetting a bias or norm weight of either tower moves what an edit is told."""
    tokens = tokenizer()
    encoder = text_encoder(tokens)
    texts = [tokens(text).input_ids for text in EDITING_SEVERAL.around(PROMPT, 1)]
    patches = Patches(ProcessorConfig())(Image.effect_mandelbrot((100, 140), (-3, -2.5, 2, 2.5), 100))

    @torch.no_grad()
    def states() -> torch.Tensor:
        return states_with_pictures(encoder, texts, [patches])[:, EDITING_SEVERAL.dropped :]

    before, blind = states(), set()
    for name, p in encoder.model.named_parameters():
        if p.ndim > 1:
            continue
        kept = p.data.clone()
        p.data.fill_(1.0 if name.endswith("weight") else 0.0)
        if ((states() - before).abs().max() / before.std()).item() < 1e-4:
            blind.add(name)
        p.data.copy_(kept)
    assert not {name for name in blind if not name.endswith("k_proj.bias")}, "biases of keys cancel in the softmax"


# -- pictures -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 448), (100, 75), (20, 30), (640, 640)])
def test_patches_are_those_of_transformers(size: tuple[int, int]) -> None:
    """Where Pillow resizes, to a few hundredths; else to the rounding of a division."""
    limits = {"shortest_edge": 56 * 56, "longest_edge": 300_000}
    picture = Image.effect_mandelbrot(size, (-3, -2.5, 2, 2.5), 100).convert("RGB")
    theirs = Qwen2VLImageProcessorPil(size=limits)(images=[picture], return_tensors="pt")
    ours, (rows, columns) = Patches(ProcessorConfig(size=limits))(picture)
    assert theirs["image_grid_thw"].tolist() == [[1, rows, columns]]
    same_size = (14 * rows, 14 * columns) == size[::-1]
    assert (ours - theirs["pixel_values"]).abs().max() < (1e-5 if same_size else 0.05)


def test_a_processor_may_be_saved_in_either_way() -> None:
    inner = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056}).to_dict()
    config = ProcessorConfig.read(inner)
    assert ProcessorConfig.read({"image_processor": inner, "processor_class": "Qwen2VLProcessor"}) == config
    assert (
        ProcessorConfig.read({**inner, "architectures": ["Qwen2VLProcessor"], "data_format": "channels_first"})
        == config
    )
    older = Patches(ProcessorConfig.read({"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 9}))
    assert older.fitting(28, 28) == (28, 28) and older.fitting(500, 500) == (84, 84)
    for wrong in ({"do_resize": False}, {"resample": 2}, {"do_center_crop": True}, {"size": {"height": 1}}, {"x": 1}):
        with pytest.raises(ConfigError, match=f"config key {next(iter(wrong))}"):
            ProcessorConfig.read({**inner, **wrong})


def test_a_picture_that_is_too_long_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    Image.new("RGB", (2500, 10)).save(tmp_path / "long.png")
    with pytest.raises(UserError, match="image_path: a picture of 2500x10; at most 200 times as long as wide"):
        load(tiny("qwen_edit")).run(asked(image_path=[str(tmp_path / "long.png")]))


@pytest.mark.parametrize("family", [QwenImageEdit, QwenImageEditPlus])
def test_the_result_has_the_proportions_of_the_last_picture(family: type[QwenImageEdit]) -> None:
    sizes = [(40, 20), (300, 400)]
    width, height, *_ = pipeline_qwenimage_edit.calculate_dimensions(1024 * 1024, 300 / 400)
    given = [Image.new("RGB", size) for size in sizes]
    assert family({"transformer": None}).fitting_size(given, family.defaults({})) == (height, width)


# -- what it refuses, and what it falls back to ---------------------------------------


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"height": 72}, "height=72: must be a multiple of 16; nearest: 64 or 80"),
        ({"num_frames": 5}, "num_frames=5: this model draws pictures"),
        ({"image_path": ["0.png"]}, "image_path: 1 given; this model draws from text alone"),
        ({"max_sequence_length": 2000}, "max_sequence_length=2000: at most 1024"),
        (
            {"max_sequence_length": 10},
            "max_sequence_length=10: the prompt has 3[0-9] tokens, with the end of the template",
        ),
        ({"guidance_scale": 4.0}, "guidance_scale=4.0: this checkpoint has no guidance embedding; leave it out"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale=4.0: needs a negative_prompt"),
        ({"negative_prompt": "", "true_cfg_scale": 1.0}, "negative_prompt: has no effect"),
        ({"num_inference_steps": 1}, "num_inference_steps=1: this checkpoint's schedule"),
    ],
)
def test_requests_it_cannot_honour_are_refused(
    tiny: Tiny, pictures: list[str], monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(Path(pictures[0]).parent)
    with pytest.raises(UserError, match=message):
        load(tiny("qwen")).run(asked(**sampling))


@pytest.mark.usefixtures("small_pictures")
def test_the_head_of_the_language_model_is_not_loaded(tiny: Tiny) -> None:
    engine = load(tiny("qwen"))
    assert isinstance(engine.backend, NativePipeline) and engine.load_report is not None
    encoder, loaded = engine.backend.parts["text_encoder"], engine.load_report.components["text_encoder"]
    assert isinstance(encoder.lm_head, torch.nn.Identity)
    assert loaded.bytes_read == sum(p.nbytes for p in encoder.parameters()) and loaded.layers_left_out == 0


def test_edits_need_their_pictures(tiny: Tiny, pictures: list[str]) -> None:
    edit = load(tiny("qwen_edit"))
    for given in ([], pictures[:2]):
        with pytest.raises(UserError, match=f"image_path: {len(given)} given; this checkpoint edits 1"):
            edit.run(asked(image_path=given))
    with pytest.raises(UserError, match="max_sequence_length=20: the prompt has 3[0-9] tokens, with the end"):
        edit.run(asked(image_path=pictures[:1], max_sequence_length=20))
    with pytest.raises(UserError, match="image_path: none given; this checkpoint edits pictures"):
        load(tiny("qwen_edit_plus")).run(asked())


@pytest.mark.parametrize(
    ("component", "file", "change", "told"),
    [
        ("transformer", "config.json", {"guidance_embeds": True}, "transformer: config key guidance_embeds=True"),
        ("vae", "config.json", {"input_channels": 4}, "vae: config key input_channels=4"),
        ("processor", "preprocessor_config.json", {"resample": 2}, "processor: config key resample=2"),
    ],
)
def test_a_config_it_does_not_understand_goes_to_diffusers(
    tiny: Tiny, tmp_path: Path, component: str, file: str, change: dict[str, Any], told: str
) -> None:
    folder = copy(tiny("qwen_edit"), tmp_path / "copy")
    path = folder / component / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    resolved = resolve(ServerArgs(model_path=str(folder), device="cpu"))
    assert not resolved.native and told in resolved.why


# -- as it runs -----------------------------------------------------------------------


def test_a_picture_does_not_depend_on_its_neighbours_and_replays_are_equal(tiny: Tiny) -> None:
    """Prompts of different lengths are computed one by one within the same step."""
    engine = load(tiny("qwen"))
    alone = drawn(engine, prompt="a white cross", seed=4)
    both = engine.run(asked(prompt=[PROMPT, "a white cross"], seed=3))
    assert both.report.effective["batch"]["denoising"] == "one by one: prompts are not equally long"
    assert np.array_equal(np.asarray(both.outputs[1].image), alone)
    again = engine.run(asked(prompt="a white cross", seed=4))
    assert np.array_equal(np.asarray(again.outputs[0].image), alone)
    graphs = again.report.effective["cuda_graph"]
    assert (graphs["denoising"]["captures"], graphs["denoising"]["replays"]) == (0, 3)


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("place", ["component", "layerwise"])
def test_an_edit_with_its_weights_on_the_host(tiny: Tiny, pictures: list[str], place: str) -> None:
    params = {"image_path": pictures[:2], "negative_prompt": " "}
    components = ("transformer", "vae", "text_encoder")
    offloaded = load_offloaded(tiny("qwen_edit_2511"), StandIn(), dict.fromkeys(components, place))
    assert np.array_equal(drawn(offloaded, **params), drawn(load(tiny("qwen_edit_2511")), **params))


@pytest.mark.usefixtures("small_pictures")
def test_a_plan_knows_what_pictures_cost(tiny: Tiny, pictures: list[str]) -> None:
    engine = load(tiny("qwen_edit_plus"))
    backend = engine.backend
    assert isinstance(backend, NativePipeline)
    peaks = []
    for n in (1, 3):
        request = resolve_request(asked(image_path=pictures[:n]), {}, engine.args)
        peaks.append(backend.memory.rehearsal.activations(backend.memory.rehearsal.workload(request), False))
    assert {"text_encoding", "picture_encoding", "denoising", "decoding"} <= set(peaks[0])
    assert peaks[1]["denoising"] > 1.3 * peaks[0]["denoising"]


def test_dummy_weights_need_no_files(tiny: Tiny, tmp_path: Path) -> None:
    """The same on both sides, where diffusers has a stand-in for every component."""
    bare = copy(tiny("qwen"), tmp_path / "bare")
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    native, judge = (load(bare, load_format="dummy", backend=backend) for backend in ("sglang", "diffusers"))
    assert np.abs(drawn(native).astype(int) - drawn(judge)).max() <= 1


@pytest.mark.usefixtures("small_pictures")
def test_dummy_weights_edit(tiny: Tiny, pictures: list[str]) -> None:
    dummy = load(tiny("qwen_edit"), load_format="dummy")
    assert drawn(dummy, image_path=pictures[:1], max_sequence_length=128).shape == (64, 96, 3)


# -- published checkpoints --------------------------------------------------------------


def test_presets_are_the_published_sizes() -> None:
    for family in (QwenImage, QwenImageEdit, QwenImageEditPlus):
        for name, preset in family.presets().items():
            assert hasattr(diffusers, preset.pipeline_class) and family.defaults(preset.components) == preset.defaults
            assert preset.components["transformer"].get("zero_cond_t", False) == (name == "Qwen/Qwen-Image-Edit-2511")
            theirs = inspect.signature(getattr(diffusers, preset.pipeline_class).__call__).parameters
            for field in ("true_cfg_scale", "guidance_scale", "max_sequence_length"):
                assert getattr(preset.defaults, field) == theirs[field].default
    config = QwenImage.presets()["Qwen/Qwen-Image"].components["vae"]
    with torch.device("meta"):
        module = QwenImage.build("vae", config, attention, {"with_encoder": True})
        theirs = diffusers.AutoencoderKLQwenImage.from_config(dict(config))
    assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_examples_are_what_requests_come_to() -> None:
    """At true size: a square picture has as many tokens as in the first example."""
    preset, square = QwenImageEditPlus.presets()["Qwen/Qwen-Image-Edit-2509"], Image.new("RGB", (9, 9))
    with torch.device("meta"):
        usual, odd = QwenImageEditPlus.examples(preset.components)
        inputs = QwenImageEditPlus.diffusers_inputs(preset.components, usual, Size(64, 96))
    assert usual.tensors["encoder_hidden_states"].shape == (1, 14 * 14 + 128 + 12, 3584)
    assert odd.tensors["encoder_hidden_states"].shape[1] % 16 == 1
    assert usual.tensors["latent_condition_0"].shape == (1, 64, 64, 64)
    assert inputs["hidden_states"].shape == (1, 24 + 64 * 64, 64)
    assert QwenImageEditPlus({"transformer": None}).fitting_size([square], preset.defaults) == (1024, 1024)
