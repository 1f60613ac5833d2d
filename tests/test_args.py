"""One declaration of every option: flags, config files, messages and the reference page agree with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sgl_diffusion.cli import generate, reference
from sgl_diffusion.cli.flags import Parser, parse_command_line
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs, VaeConfig, parse_args
from sgl_diffusion.runtime.errors import UserError

FLAG_BUDGET = 82


def parse(*argv: str) -> tuple[ServerArgs, SamplingParams]:
    parser = Parser(allow_abbrev=False)
    generate.add_arguments(parser)
    return parse_args(parse_command_line(parser, argv))


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- flags ------------------------------------------------------------------------------


def test_nothing_given_is_the_declared_defaults() -> None:
    assert parse() == (ServerArgs(), SamplingParams())
    assert parse()[0].model_fields_set == set()


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--vae-tiling"], True),
        (["--vae-tiling", "true"], True),
        (["--vae-tiling", "false"], False),
        (["--vae-tiling=false"], False),
        (["--no-vae-tiling"], False),
        ([], None),
    ],
)
def test_switches_take_every_spelling(words: list[str], value: bool | None) -> None:
    assert parse(*words, "--seed", "1")[0].vae_tiling is value


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--mode", "memory"], "performance_mode", "memory"),
        (["--num-samples", "3"], "num_outputs_per_prompt", 3),
        (["--num-outputs", "3"], "num_outputs_per_prompt", 3),
        (["--sp-size", "1"], "sp_degree", 1),
        (["--sp-degree", "1"], "sp_degree", 1),
        (["--model", "x"], "model_path", "x"),
        (["--prompt", "a b", "--prompt", "c"], "prompt", ["a b", "c"]),
        (["--prompt", "a", "c"], "prompt", ["a", "c"]),
        (["--text-encoder-precisions", "fp16", "bf16"], "text_encoder_precisions", ["fp16", "bf16"]),
        (["--vae-path", "p"], "component_paths", {"vae": "p"}),
        (["--text-encoder-2-path=p"], "component_paths", {"text_encoder_2": "p"}),
        (["--component-paths", '{"vae": "p"}', "--unet-path", "q"], "component_paths", {"vae": "p", "unet": "q"}),
        (["--component-paths.vae", "p"], "component_paths", {"vae": "p"}),
        (["--component-attention-backends", "text_encoder=torch_sdpa,transformer=fa"],
         "component_attention_backends", {"text_encoder": "torch_sdpa", "transformer": "fa"}),
        (["--component-attention-backends.text_encoder", "torch_sdpa",
          "--component-attention-backends.transformer", "fa"],
         "component_attention_backends", {"text_encoder": "torch_sdpa", "transformer": "fa"}),
        (["--component-attention-backends", "text_encoder=torch_sdpa", "--component-attention-backends", "vae=fa"],
         "component_attention_backends", {"text_encoder": "torch_sdpa", "vae": "fa"}),
        (["--diffusers-kwargs", '{"eta": 0.5, "use_karras_sigmas": true}'],
         "diffusers_kwargs", {"eta": 0.5, "use_karras_sigmas": True}),
        (["--diffusers-kwargs", "eta=0.5,use_karras_sigmas=true,mode=x"],
         "diffusers_kwargs", {"eta": 0.5, "use_karras_sigmas": True, "mode": "x"}),
        (["--diffusers-kwargs.cross_attention_kwargs.scale", "0.5", "--diffusers-kwargs.eta=1"],
         "diffusers_kwargs", {"cross_attention_kwargs": {"scale": 0.5}, "eta": 1}),
    ],
)  # fmt: skip
def test_flags_aliases_and_maps(words: list[str], field: str, value: Any) -> None:
    server, sampling = parse(*words)
    assert getattr(server if field in ServerArgs.model_fields else sampling, field) == value


@pytest.mark.parametrize(
    "words",
    [
        ["--vae-config.tile-sample-min-height", "128", "--vae-config.load_encoder", "true"],
        ["--vae-config", '{"tile_sample_min_height": 128, "load-encoder": true, "load_decoder": null}'],
        ["--vae-config", "tile-sample-min-height=128,load_encoder=true", "--vae-config.load-decoder", "true"],
    ],
)
def test_vae_config_in_every_spelling(words: list[str]) -> None:
    assert parse(*words)[0].vae_config == VaeConfig(tile_sample_min_height=128, load_encoder=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num-inference-step", "3"], "unknown flag --num-inference-step; did you mean --num-inference-steps?"),
        (["--outptu-path", "x"], "unknown flag --outptu-path; did you mean --output-path?"),
        (["--num-inf", "3"], "unknown flag --num-inf"),  # no abbreviations
        (["stray"], "unexpected argument 'stray'"),
        (["--num-inference-steps", "-3"], "num_inference_steps=-3: must be at least 1"),
        (["--seed", "x"], "seed=x: expected a whole number"),
        (["--guidance-scale", "-1"], "guidance_scale=-1: must be at least 0"),
        (["--guidance-scale", "inf"], "guidance_scale=inf: expected a finite number"),
        (["--backend", "vllm"], "backend=vllm: expected 'auto', 'sglang' or 'diffusers'"),
        (["--vae-tiling", "maybe"], "vae_tiling=maybe: expected true or false"),
        (["--trust-remote-code", "1"], "trust_remote_code=1: expected true or false"),
        (["--device", "tpu"], "device=tpu: expected auto, cpu, cuda or cuda:N"),
        (["--num-gpus", "0"], "num_gpus=0: must be at least 1"),
        (["--output-quality", "101"], "output_quality=101: must be at most 100"),
        (["--diffusers-kwargs", "{"], "diffusers_kwargs={: not readable as JSON"),
        (["--vae-config.load-decoder", "false"], "vae_config.load_decoder=false: must be true"),
        (["--vae-config.nope", "1"], "vae_config.nope=1: is not a known key"),
        (
            ["--component-attention-backends", "fa"],
            "component_attention_backends=fa: expected a JSON object or key=value",
        ),
        (["--component-paths", '{"vae": 3}'], "component_paths.vae=3: expected text"),
        (["--vae-path"], "--vae-path: expected one value"),
    ],
)
def test_mistakes_are_one_line_that_names_field_value_and_allowed(words: list[str], told: str) -> None:
    assert refused(*words).startswith(told)


# -- config files -----------------------------------------------------------------------

SPEC_CONFIG: dict[str, Any] = {  # the documents' example; the keys this version has
    "model_path": "FastVideo/FastHunyuan-diffusers",
    "prompt": "A beautiful woman in a red dress walking down a street",
    "output_path": "outputs/",
    "num_gpus": 1,
    "sp_size": 1,
    "tp_size": 1,
    "num_frames": 45,
    "height": 720,
    "width": 1280,
    "num_inference_steps": 6,
    "seed": 1024,
    "fps": 24,
    "precision": "bf16",
    "vae_precision": "fp16",
    "vae_tiling": True,
    "vae_config": {
        "load_encoder": False,
        "load_decoder": True,
        "tile_sample_min_height": 256,
        "tile_sample_min_width": 256,
    },
    "text_encoder_precisions": ["fp16", "fp16"],
    "mask_strategy_file_path": None,
    "enable_torch_compile": False,
    "guidance_scale": None,
}


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_config_file_sets_what_the_flags_do_not(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"config{suffix}"
    file.write_text(json.dumps(SPEC_CONFIG) if suffix == ".json" else yaml.safe_dump(SPEC_CONFIG))
    server, sampling = parse("--config", str(file), "--seed", "7", "--height", "480")
    assert (sampling.seed, sampling.height, sampling.width) == ([7], 480, 1280)
    assert sampling.prompt == [SPEC_CONFIG["prompt"]]
    assert sampling.guidance_scale is None and "guidance_scale" not in sampling.model_fields_set
    assert server.sp_degree == 1
    assert server.vae_config.tile_sample_min_height == 256
    assert server.text_encoder_precisions == ["fp16", "fp16"]


@pytest.mark.parametrize(
    "key",
    ["vae_config.tile_sample_min_height", "vae-config.tile-sample-min-height", "vae_config.tile-sample-min-height"],
)
def test_dotted_config_keys_equal_nested_ones(tmp_path: Path, key: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({key: 128, "vae-path": "v", "component_paths": {"unet": "u"}}))
    server, _ = parse("--config", str(file))
    assert server.vae_config == VaeConfig(tile_sample_min_height=128)
    assert server.component_paths == {"vae": "v", "unet": "u"}


def test_a_map_in_the_file_is_completed_by_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "component_attention_backends: transformer=fa,vae=torch_sdpa\n"
        "diffusers_kwargs: {cross-attention: {scale: 0.5, text: '1'}, none: null}\n"
        "vae_config: {load-encoder: true, tile_sample_min_width: null}\n"
    )
    server, sampling = parse(
        "--config", str(file), "--component-attention-backends.vae", "triton",
        "--diffusers-kwargs.cross-attention.scale", "2", "--vae-config.tile-sample-min-height", "64",
    )  # fmt: skip
    assert server.component_attention_backends == {"transformer": "fa", "vae": "triton"}
    assert server.vae_config == VaeConfig(load_encoder=True, tile_sample_min_height=64)
    assert sampling.diffusers_kwargs == {"cross-attention": {"scale": 2, "text": "1"}, "none": None}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"num_inference_step": 3}', "unknown key num_inference_step; did you mean num_inference_steps?"),
        ('{"outptu_path": "x"}', "unknown key outptu_path; did you mean output_path?"),
        ('{"seed.x": 1}', "unknown key seed.x"),
        ('{"model": "a", "model_path": "b"}', "model and model_path are the same option"),
        ('{"seed": true}', "seed=true: expected a whole number"),
        ('{"trust_remote_code": "yes"}', "trust_remote_code=yes: expected true or false"),
        ('{"vae_config": 5, "vae_config.load_encoder": true}', "vae_config=5: expected keys and values"),
        ('{"vae_config.load_encoder": true, "vae_config": 5}', "vae_config=5: expected keys and values"),
        ('{"_path": "x"}', "unknown key _path"),
        ("[1]", "expected keys and values"),
        ("{", "not readable"),
        ("", "not readable"),
    ],
)
def test_config_mistakes(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(content)
    assert told in refused("--config", str(file))


def test_config_file_that_is_not_there_or_of_another_kind(tmp_path: Path) -> None:
    assert "cannot be read" in refused("--config", str(tmp_path / "none.json"))
    assert "expected a .json, .yaml or .yml file" in refused("--config", str(tmp_path / "c.toml"))


# -- the declarations themselves --------------------------------------------------------


def test_every_field_is_documented_and_within_budget() -> None:
    fields = {**ServerArgs.model_fields, **SamplingParams.model_fields}
    assert len(fields) == len(ServerArgs.model_fields) + len(SamplingParams.model_fields)
    assert all(f.description for f in fields.values())
    assert len(fields) <= FLAG_BUDGET


def test_the_reference_page_is_up_to_date() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page()


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    fields = (*ServerArgs.model_fields, *SamplingParams.model_fields)
    assert all(f" --{name.replace('_', '-')} " in shown.partition("Model:")[2].replace(",", " ") for name in fields)
    assert shown.count("(default: ") == len(fields)
    assert "load_encoder" in shown
    assert "Seed of the first picture, each further one adds 1; or one for every prompt. (default: 42)" in shown


def test_arguments_work_from_python() -> None:
    assert SamplingParams(prompt="one").prompt == ["one"]
    with pytest.raises(ValueError, match="stepz"):
        SamplingParams(prompt="one", stepz=3)
