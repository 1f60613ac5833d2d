"""Ranks that share weights: what each loads, what it sends, and that all of them get what one process gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
import transformers
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from shared_models import build_all
from sharing import BATCH, BLOCKS, CPU, DENOISERS, ENCODERS, built, everything
from torch import nn

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.checkpoint import EMBEDDED, read_json
from sgl_diffusion.runtime.encoders import dummy_encoder
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.live_bytes import module_bytes
from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.parallel.layout import Layout
from sgl_diffusion.runtime.parallel.mesh import ONE, Mesh
from sgl_diffusion.runtime.parallel.tensor import receipt, share_denoiser, share_encoder
from sgl_diffusion.runtime.parallel.volume_tensor import all_reduced
from sgl_diffusion.runtime.resolve import resolve
from sgl_diffusion.runtime.weights import fill_dummy, find_weights, load_weights, weight_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_all(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return everything(folder, 1)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What each of two, or four, finds."""
    return run_ranks(request.param, everything, folder, request.param)


# -- the same results -----------------------------------------------------------------


@pytest.mark.parametrize("name", [*DENOISERS, *ENCODERS])
def test_ranks_get_what_one_process_gets(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    wanted = alone[name]["result"]
    assert alone[name]["receipt"]["rows"] == 0
    for rank in ranks:
        got = rank[name]["result"]
        assert abs(got - wanted).max() <= 1e-5 * wanted.std()
        assert (got == ranks[0][name]["result"]).all(), "states that ranks replicate may not drift apart"


@pytest.mark.parametrize("name", DENOISERS)
def test_shares_that_stay_in_their_files_come_layer_by_layer(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert (rank[name]["offloaded"] == rank[name]["result"]).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_the_receipt_counts_an_encoders_layers(name: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[-1][name]["receipt"] == {**ENCODERS[name], "whole": 0}


def test_the_receipt_counts_a_denoisers_layers(ranks: list[dict[str, Any]]) -> None:
    double, single = {"columns": 4, "rows": 4}, {"columns": 1, "rows": 1}
    both = {key: BLOCKS * (double[key] + single[key]) for key in double}
    plain = {"columns": 2 * (BLOCKS + 2), "rows": 2 * (BLOCKS + 2)}
    wanted = {"flux": both, "flux2": both, "qwen": {k: BLOCKS * n for k, n in double.items()}, "z_image": plain}
    wanted["wan"] = {"columns": BLOCKS, "rows": BLOCKS}
    wanted = {name: {**counts, "whole": 0} for name, counts in wanted.items()}
    assert {name: ranks[0][name]["receipt"] for name in DENOISERS} == wanted


@pytest.mark.parametrize("name", DENOISERS)
def test_what_is_sent_is_what_the_formula_says(name: str, ranks: list[dict[str, Any]]) -> None:
    case = DENOISERS[name]
    wanted = BATCH * all_reduced(case.tokens, case.sums, 4, len(ranks))
    assert {collective: sent["bytes"] for collective, sent in ranks[0][name]["traffic"].items()} == {
        "all_reduce": wanted
    }


# -- what a rank loads ----------------------------------------------------------------


def rank_of_two(rank: int) -> Group:
    """One that talks to no one."""
    return Group("tp", 2, rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_packed_parts_are_cut_one_by_one(folder: Path, rank: int) -> None:
    stored = load_file(folder / "flux" / "diffusion_pytorch_model.safetensors")
    module = built("flux", folder, rank_of_two(rank))
    load_weights(module, weight_files(folder / "flux"), CPU, torch.float32)
    block, name = module.single_transformer_blocks[1], "single_transformer_blocks.1"
    parts = [stored[f"{name}.{part}.weight"] for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    wanted = torch.cat([part.chunk(2)[rank] for part in parts])
    assert torch.equal(block.attn.to_qkv_mlp.weight, wanted)
    attended, mlp = stored[f"{name}.proj_out.weight"].split([128, 512], dim=1)
    wanted = torch.cat([attended.chunk(2, 1)[rank], mlp.chunk(2, 1)[rank]], dim=1)
    assert torch.equal(block.proj_out.weight, wanted)
    assert torch.equal(block.proj_out.bias, stored[f"{name}.proj_out.bias"])


def test_a_wrong_checkpoint_is_told_by_the_shapes_of_all_ranks(folder: Path) -> None:
    stored = load_file(folder / "qwen" / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn.to_k.weight"
    stored[name] = stored[name][:64].clone()  # what one of two ranks keeps
    lost = "transformer_blocks.1.img_mlp.net.2.bias"
    del stored[lost]
    wrong = folder / "wrong.safetensors"
    save_file(stored, wrong)
    message = rf"missing weights: {lost}; mis-shaped weights: {name} \(64, 128\) instead of \(128, 128\)$"
    with pytest.raises(UserError, match=message):
        find_weights(built("qwen", folder, rank_of_two(1)), [wrong])


@pytest.mark.parametrize("name", ["flux2", "t5"])
def test_dummies_of_ranks_are_cut_from_those_of_one(folder: Path, name: str) -> None:
    def filled(group: Group) -> nn.Module:
        if name in DENOISERS:
            module = built(name, folder, group)
        else:
            config = read_json(folder / name / "config.json")
            module = dummy_encoder(name, config, CPU, torch.float32, None, group)
        fill_dummy(module, CPU, torch.float32)
        return module

    whole = dict(filled(ONE.tp).named_parameters())
    ours = [filled(rank_of_two(rank)) for rank in range(2)]
    for rank, module in enumerate(ours):
        shares = {path: part.share for path, part in module.named_modules() if hasattr(part, "share")}
        for key, p in module.named_parameters():
            share = shares.get(key.rpartition(".")[0])
            assert torch.equal(p, whole[key] if share is None else share.of(whole[key])), (rank, key)


def test_shapes_alone_are_shared_as_for_a_plan(folder: Path) -> None:
    blueprint = resolve(ServerArgs(model_path=EMBEDDED, device="cpu")).blueprint
    assert blueprint is not None

    def planned(mesh: Mesh) -> dict[str, Any]:
        parts = replace(blueprint, mesh=mesh).shape_only_parts(blueprint.attention_on(CPU))
        return {key: part for key, part in parts.items() if isinstance(part, nn.Module)}

    one, two = planned(ONE), planned(Mesh.stand_in(Layout(tp=3)))  # whose encoders have other numbers of heads
    for key, part in two.items():
        ratio = module_bytes([part]) / module_bytes([one[key]])
        assert 1 / 3 < ratio < 1 if receipt(part)["rows"] else ratio == 1
    assert {key for key, part in two.items() if receipt(part)["rows"]} == {"transformer"}
    assert receipt(two["text_encoder_2"])["whole"] > 0


# -- what cannot be shared ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("flux", 3, "transformer_blocks.0.attn.to_qkv has 4 heads of 32, which 3 ranks cannot share"),
        ("flux2", 8, "transformer_blocks.0.attn.to_qkv has 4 heads of 32, which 8 ranks cannot share"),
        ("wan", 3, "blocks.0.ffn.net.0.proj has 128 outputs, which 3 ranks cannot share"),
    ],
)
def test_numbers_that_ranks_do_not_divide_are_refused(folder: Path, name: str, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^tp_size={ranks}: transformer.{message}$"):
        built(name, folder, Group("tp", ranks))


def test_an_encoders_heads_that_ranks_do_not_divide_stay_whole() -> None:
    encoder = tiny_qwen.text_encoder(tiny_qwen.tokenizer())  # three heads
    share_encoder("text_encoder", encoder, rank_of_two(1))
    assert receipt(encoder) == {"columns": 4, "rows": 2, "whole": 2}


def test_an_unknown_encoder_is_refused() -> None:
    config = transformers.BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UserError, match="^tp_size=2: text_encoder: not known how ranks share a BertModel$"):
        share_encoder("text_encoder", transformers.BertModel(config), rank_of_two(0))


def test_a_module_that_declares_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="^tp_size=2: unet, a Sequential, has no layers for ranks to share$"):
        share_denoiser("unet", nn.Sequential(nn.Linear(4, 4)), rank_of_two(0))
