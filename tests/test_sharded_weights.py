"""Ranks that keep some rows of every weight: results bit for bit those of whole weights, and what is held for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from ranks import run_ranks
from shared_models import build_all
from sharing import CPU, DENOISERS, built, sharded, velocity
from torch import nn

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.live_bytes import module_bytes
from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.parallel.mesh import ONE
from sgl_diffusion.runtime.parallel.sharded import Footprint, check_sharding, load_sharded
from sgl_diffusion.runtime.weights import fill_dummy, load_weights, weight_files

HALF = ("flux", "wan")  # denoisers that are run in bf16, too: the second has blocks of both dtypes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = build_all(tmp_path_factory.mktemp("sharded"), *DENOISERS)
    tiny_wan.transformer("transformer", ffn_dim=130).save_pretrained(root / "wan")  # which four ranks do not divide
    return root


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    found = {}
    for name, half in [(name, False) for name in DENOISERS] + [(name, True) for name in HALF]:
        module, dtype = built(name, folder, ONE.tp), torch.bfloat16 if half else torch.float32
        footprints = {ranks: Footprint.of(module.to(dtype), ranks) for ranks in (2, 4)}
        load_weights(module, weight_files(folder / name), CPU, dtype)
        found[name + " in bf16" * half] = {
            "result": velocity(name, module).float().numpy(), "footprints": footprints, "bytes": module_bytes([module]),
        }  # fmt: skip
    module = built("flux", folder, ONE.tp)
    fill_dummy(module, CPU, torch.float32)
    found["dummy"] = {"result": velocity("flux", module).numpy()}
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    return run_ranks(request.param, sharded, folder, request.param, HALF)


def test_sharded_weights_give_the_same_bits(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Of two requests: gathered weights are freed after the first."""
    for rank in ranks:
        assert rank.keys() == alone.keys()
        for name, found in rank.items():
            for result in found["results"]:
                assert (result == alone[name]["result"]).all(), name


def test_a_rank_holds_its_rows_and_what_is_in_no_layer(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for name in alone.keys() - {"dummy"}:
        planned: Footprint = alone[name]["footprints"][len(ranks)]
        reports = [rank[name]["report"] for rank in ranks]
        assert max(report["sharded_bytes"] for report in reports) == planned.shards, name
        assert sum(report["sharded_bytes"] for report in reports) == alone[name]["bytes"] - planned.whole, name
        assert {report["whole_bytes"] for report in reports} == {planned.whole}, name


def test_no_gathered_weights_are_left_behind(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    first = f"{HALF[0]} in bf16"
    planned: Footprint = alone[first]["footprints"][len(ranks)]
    for rank in ranks:
        spare = rank[first]["held"] - planned.whole - planned.shards
        assert 0 <= spare < planned.at_work / 100


def test_a_rank_receives_what_the_plan_says(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Every layer once, for one step; of Wan's blocks, what is read of the text before the first one is, too."""
    for name in alone.keys() - {"dummy"}:
        planned: Footprint = alone[name]["footprints"][len(ranks)]
        passes = 2 if name.startswith("wan") else 1
        assert {rank[name]["received"] for rank in ranks} == {passes * planned.gathered}, name


# -- what is refused ------------------------------------------------------------------


def test_two_says_in_where_weights_are_are_refused() -> None:
    check_sharding(1, {"transformer": "resident"})
    with pytest.raises(UserError, match="^use_fsdp_inference=true: not with tp_size=2, by which"):
        check_sharding(2, {"transformer": "resident"})
    with pytest.raises(UserError, match="^use_fsdp_inference=true: not with the layerwise offload of transformer_2"):
        check_sharding(1, {"transformer": "resident", "transformer_2": "layerwise"})


def test_a_module_without_lists_of_layers_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match="^use_fsdp_inference=true: unet has no lists of layers$"):
        load_sharded("unet", module, None, CPU, torch.float32, Group("world", 2))
