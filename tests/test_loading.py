"""Where checkpoints come from and how strictly they are read."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoints import build_flux, copy, edit_weights, link_into_hub_cache, reshard

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.resolve import presets

Tiny = Callable[[str], Path]
PARAMS = SamplingParams(
    prompt=["a red circle"], height=32, width=32, num_inference_steps=1, max_sequence_length=16, save_output=False
)


def load(path: Path | str, **server: Any) -> Engine:
    return Engine.load(ServerArgs(model_path=str(path), device="cpu", **server))


def picture(engine: Engine) -> np.ndarray:
    return np.asarray(engine.run(PARAMS).outputs[0].image)


# -- where from -------------------------------------------------------------------------


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_hub_id_resolves_in_the_offline_cache(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    link_into_hub_cache(tmp_path, "some-org/some-model", tiny("flux"), revision or "main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    engine = load("some-org/some-model", **({"revision": revision} if revision else {}))
    assert np.array_equal(picture(engine), picture(load(tiny("flux"))))
    with pytest.raises(UserError, match="not in the local cache at revision v9"):
        load("some-org/some-model", revision="v9")


def test_modelscope_asks_for_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "1")
    with pytest.raises(UserError, match=r"needs the package modelscope \(pip install 'sgl-diffusion\[modelscope\]'\)"):
        load("some-org/some-model")


def test_modelscope_resolves_ids_where_it_is_chosen(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo: str, revision: str | None) -> str:
        asked.append((repo, revision))
        if repo == "some-org/broken":
            raise ValueError("no such model\nsecond line")
        return str(tiny("flux"))

    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "true")
    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert np.array_equal(picture(load("some-org/some-model", revision="v2")), picture(load(tiny("flux"))))
    assert asked == [("some-org/some-model", "v2")]
    with pytest.raises(UserError, match="model_path=some-org/broken: ModelScope: no such model$"):
        load("some-org/broken")


def test_a_revision_of_a_local_folder_is_an_error(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="revision=v2: .* is a local folder"):
        load(tiny("flux"), revision="v2")


# -- component overrides ------------------------------------------------------------------


def test_a_component_of_another_folder_is_used(tiny: Tiny, tmp_path: Path) -> None:
    other = build_flux(tmp_path / "other", seed=7)
    plain, overridden = (
        load(tiny("flux")),
        load(tiny("flux"), component_paths={"transformer": str(other / "transformer")}),
    )
    assert not np.array_equal(picture(plain), picture(overridden))
    assert np.array_equal(picture(overridden), picture(load(other)))  # seed changes the transformer alone


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_an_unknown_component_lists_the_keys(tiny: Tiny, backend: str) -> None:
    with pytest.raises(UserError, match="has no component 'vea'; its components: .*transformer.*vae"):
        load(tiny("flux"), component_paths={"vea": "."}, backend=backend)


def test_an_incomplete_component_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json in it"):
        load(tiny("flux"), component_paths={"vae": str(tmp_path)})
    shutil.copy(tiny("flux") / "vae" / "config.json", tmp_path)
    with pytest.raises(UserError, match="no safetensors file in it"):
        load(tiny("flux"), component_paths={"vae": str(tmp_path)})


# -- weights --------------------------------------------------------------------------------


def test_shards_load_as_one_file(tiny: Tiny, tmp_path: Path) -> None:
    sharded = copy(tiny("flux"), tmp_path / "sharded")
    for component in ("transformer", "vae", "text_encoder_2"):
        reshard(sharded, component)
    assert np.array_equal(picture(load(sharded)), picture(load(tiny("flux"))))
    (sharded / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="shard diffusion_pytorch_model-00002-of-00003.safetensors is missing"):
        load(sharded)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "transformer_blocks.0.attn.to_k.weight"),
        ("transformer", "single_transformer_blocks.1.proj_mlp.bias"),
        ("vae", "decoder.mid_block.resnets.0.norm1.weight"),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
def test_a_missing_weight_is_named(tiny: Tiny, tmp_path: Path, component: str, name: str) -> None:
    broken = copy(tiny("flux"), tmp_path / "broken")
    edit_weights(broken, component, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"missing weights: {name}"):
        load(broken)


def test_half_a_packed_projection_is_not_enough(tiny: Tiny, tmp_path: Path) -> None:
    broken = copy(tiny("flux"), tmp_path / "broken")
    name = "transformer_blocks.0.attn.add_v_proj.bias"
    edit_weights(broken, "transformer", lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    with pytest.raises(UserError, match=rf"mis-shaped weights: {name} \(5,\) instead of \(128,\)"):
        load(broken)


def test_unknown_config_keys_fall_back_with_a_reason_or_fail(tiny: Tiny, tmp_path: Path) -> None:
    changed = copy(tiny("flux"), tmp_path / "changed")
    file = changed / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"invented": 1}))
    with pytest.raises(UserError, match="backend=sglang: transformer: config key invented=1 is not understood"):
        load(changed, backend="sglang")
    engine = load(changed)  # auto: diffusers ignores the key, and the report tells why it was asked
    assert engine.backend.name == "diffusers" and "invented" in engine.model.why


def test_precisions_reach_the_weights(tiny: Tiny) -> None:
    precisions = {"precision": "fp32", "dit_precision": "bf16", "text_encoder_precisions": ["bf16", "fp16"]}
    engine = load(tiny("flux"), **precisions)
    assert isinstance(engine.backend, NativePipeline)
    dtypes = {k: next(engine.backend.parts[k].parameters()).dtype for k in engine.backend.plan.dtypes}
    assert dtypes == {
        "transformer": torch.bfloat16,
        "vae": torch.float32,
        "text_encoder": torch.bfloat16,
        "text_encoder_2": torch.float16,
    }
    report = engine.run(PARAMS).report
    assert report.effective["precision"]["text_encoder_2"] == "fp16"


def test_the_encoder_is_loaded_on_request_and_equals_diffusers(tiny: Tiny) -> None:
    import diffusers

    engine = load(tiny("flux"), vae_config={"load_encoder": True})
    assert isinstance(engine.backend, NativePipeline)
    judge = diffusers.AutoencoderKL.from_pretrained(tiny("flux") / "vae")
    pictures = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, log_variance = engine.backend.parts["vae"].encode(pictures)
    with torch.no_grad():
        expected = judge.encode(pictures).latent_dist
    torch.testing.assert_close(mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_variance, expected.logvar, rtol=1e-5, atol=1e-5)
    plain = load(tiny("flux"))
    assert isinstance(plain.backend, NativePipeline) and not hasattr(plain.backend.parts["vae"], "encoder")


# -- dummy weights ----------------------------------------------------------------------------


def test_dummy_weights_from_a_config_folder_need_no_weights(tiny: Tiny, tmp_path: Path) -> None:
    bare = copy(tiny("flux"), tmp_path / "bare")
    for file in bare.rglob("*.safetensors"):
        file.unlink()
    native, judge = (load(bare, load_format="dummy", backend=b) for b in ("sglang", "diffusers"))
    assert native.run(PARAMS).report.effective["dummy_weights"] is True
    assert np.abs(picture(native).astype(int) - picture(judge)).max() <= 1  # the same weights on both sides


def test_presets_have_the_published_sizes() -> None:
    """Parameter counts of the published checkpoints, on the meta device."""
    from sgl_diffusion.models.flux import PRESETS, Flux1

    for name, billions in (("black-forest-labs/FLUX.1-dev", 11.901), ("black-forest-labs/FLUX.1-schnell", 11.891)):
        assert name in presets()
        with torch.device("meta"):
            parts = {
                k: Flux1.build(k, PRESETS[name].components[k], lambda *a: a[0], {}) for k in ("transformer", "vae")
            }
        assert sum(p.numel() for p in parts["transformer"].parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
        assert sum(p.numel() for p in parts["vae"].parameters()) == 49_545_475  # the decoder of 83,819,683


def test_dummy_of_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(
        UserError, match="load_format=dummy needs a config folder or one of black-forest-labs/FLUX.1-dev"
    ):
        load("org/unknown", load_format="dummy")


def test_model_id_lends_its_defaults(tiny: Tiny) -> None:
    engine = load(tiny("flux"), model_id="black-forest-labs/FLUX.1-schnell")
    assert isinstance(engine.backend, NativePipeline) and engine.backend.defaults.num_inference_steps == 4
    with pytest.raises(UserError, match="model_id=nope: expected one of"):
        load(tiny("flux"), model_id="nope")
