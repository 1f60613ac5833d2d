"""Nothing compiles, captures or tunes while a user waits; what was compiled is found again by the next process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import knobs

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.compilation import cache_folder, compilations, keep_compiled_code
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError

PROMPTS = ["a red circle on a blue background", "a white cross above a black triangle on a red background"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for compiled code."""
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path))
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process in which Triton compiles; this one may interpret."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)


def prewarm(*argv: str) -> subprocess.CompletedProcess[str]:
    return compiling("-m", "sgl_diffusion.cli.main", "prewarm", *argv)


# -- kernels ------------------------------------------------------------------------

# a model with one block of each kind has all kernels of the whole model, at their true widths
COVERAGE = """
import random
from dataclasses import replace
import torch
from triton.runtime.jit import JITFunction
from sgl_diffusion.bench.absent import GPUS, absent
from sgl_diffusion.kernels.launch import compiling_only
from sgl_diffusion.models.family import Size
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.prewarm import compile_kernels, decode, launch_all
from sgl_diffusion.runtime.resolve import resolve

wanted = set()
JITFunction._do_compile = lambda self, key, *args: wanted.add((self.__name__, key))
args = ServerArgs(model_path=MODEL, load_format="dummy", precision="bf16", device="cpu", quantization=SCHEME)
full = resolve(args).blueprint
configs = {key: dict(config) for key, config in full.configs.items()}
for key, config in configs.items():
    counts = ("num_layers", "num_single_layers", "num_hidden_layers", "n_layers", "n_refiner_layers")
    of_one = {name: 1 for name in counts if name in config}
    config.update(of_one if full.kinds.get(key) in ("denoiser", "text_encoder") else {})
plan = replace(full.plan, attention={**full.plan.attention, "transformer": "triton"})
blueprint, numbers = replace(full, configs=configs, plan=plan), random.Random(0)
with absent(GPUS[ARCH]):
    compile_kernels(blueprint)
    compiled = set(wanted)
    attend = lambda q, k, v, *, out=None: torch.empty_like(q) if out is None else out
    parts = blueprint.shape_only_parts(lambda key: attend)
    with torch.device("meta"):
        examples = blueprint.family.examples(configs)
    with compiling_only():
        for round in range(ROUNDS):
            frames = 9 if blueprint.family.draws_video else 1
            size = Size(*(16 * numbers.randrange(8, 129 // frames + 40) for _ in range(2)), frames)
            conditions = [examples[round % len(examples)]] * numbers.randrange(1, 5)
            launch_all(blueprint, parts, size, conditions, guided=bool(numbers.randrange(2)))
            parts["vae"].tiling = True
            decode(blueprint, parts, size, 1)
            if hasattr(parts["vae"], "encoder"):  # of given pictures
                clip = (frames,) if blueprint.family.draws_video else ()
                picture = torch.empty(1, 3, *clip, size.height, size.width, device="meta", dtype=torch.bfloat16)
                for parts["vae"].tiling in (True, False):
                    parts["vae"].encode(picture)
            parts["vae"].tiling = False
            assert wanted == compiled, f"{size} needs more: {[name for name, _ in wanted - compiled]}"
        codes = blueprint.quantization  # which stay as they are
        wide = {key: part.float() for key, part in parts.items() if hasattr(part, "float") and key not in codes}
        launch_all(blueprint, {**parts, **wide}, size, examples[:1], guided=False)
print(len(compiled), len(wanted - compiled))
"""


@pytest.mark.parametrize(
    ("arch", "model", "scheme", "rounds"),
    [
        ("sm_80", "black-forest-labs/FLUX.1-dev", "fp8", 4),
        ("sm_90", "black-forest-labs/FLUX.1-dev", None, 8),
        ("sm_90", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", None, 3),
        ("sm_90", "Tongyi-MAI/Z-Image-Turbo", "fp8", 6),
        ("sm_90", "black-forest-labs/FLUX.2-klein-4B", None, 6),
        ("sm_90", "Qwen/Qwen-Image", None, 4),
    ],
)
def test_whatever_size_is_asked_for_its_kernels_are_compiled(
    arch: str, model: str, scheme: str | None, rounds: int
) -> None:
    script = COVERAGE
    for name, value in (("ARCH", arch), ("MODEL", model), ("SCHEME", scheme), ("ROUNDS", rounds)):
        script = script.replace(name, repr(value))
    done = compiling("-c", script)
    assert done.returncode == 0, done.stderr
    compiled, more_in_fp32 = map(int, done.stdout.split())
    assert compiled > 30
    assert more_in_fp32 > (10 if scheme is None else 5), "kernels that are not compiled are seen"


def test_a_second_process_compiles_nothing(cache: Path) -> None:
    first, second = (prewarm("--arch", "sm_80") for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    compiled = int(first.stdout.split()[1].strip(","))
    assert compiled > 40
    assert first.stdout == f"compiled {compiled}, found 0 on disk: {cache_folder()}\n"
    assert second.stdout == f"compiled 0, found {compiled} on disk: {cache_folder()}\n"


def test_the_cache_belongs_to_versions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = keep_compiled_code()
    assert folder.is_relative_to(cache) and torch.__version__ in folder.name
    assert knobs.cache.dir == str(folder / "triton")
    monkeypatch.setattr("sgl_diffusion.runtime.compilation.version", lambda package: "9.9")
    assert cache_folder() != folder


def test_a_folder_of_the_users_own_stays(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    keep_compiled_code()
    assert knobs.cache.dir == str(tmp_path / "mine")


def test_no_place_for_compiled_code_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", "/dev/null/cache")
    with pytest.raises(UserError, match="no place for compiled code: Not a directory; SGLANG_DIFFUSION_CACHE_ROOT"):
        keep_compiled_code()


COUNT = """
import torch
from sgl_diffusion.bench.absent import GPUS, absent
from sgl_diffusion.kernels import sampler
from sgl_diffusion.kernels.launch import compiling_only
from sgl_diffusion.runtime.compilation import compilations, keep_compiled_code

keep_compiled_code()
x, before = torch.empty(1, 16, 60, device="meta"), compilations()
for i in range(3):
    if i == 2:
        sampler._guided_step_kernel.device_caches.clear()
    with absent(GPUS["sm_80"]), compiling_only():
        sampler.guided_euler_step(x, x, 0.5)
    made = compilations() - before
    print(made.triton, made.triton_from_disk)
"""


def test_kernels_are_counted_when_compiled_and_when_loaded(cache: Path) -> None:
    done = compiling("-c", COUNT)
    assert done.stdout.splitlines() == ["1 0", "1 0", "1 1"], done.stderr


def test_torch_compile_is_counted() -> None:
    @torch.compile(backend="eager")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice(torch.ones(1))
    before = compilations()
    twice(torch.ones(2, 3))
    assert (compilations() - before).torch_traced == 1


# -- a warm-up -------------------------------------------------------------------------


def draw(engine: Engine, prompt: str, seed: int, size: int) -> dict[str, Any]:
    params = SamplingParams(
        prompt=[prompt], seed=seed, height=size, width=size, num_inference_steps=2, save_output=False
    )
    return engine.run(params).report.effective


def test_after_a_warm_up_twenty_requests_make_nothing(cache: Path) -> None:
    engine = Engine.load(ServerArgs(device="cpu", warmup=True, warmup_resolutions=["64x64", "32x32"], warmup_steps=2))
    assert engine.warmed_up is not None and engine.warmed_up["sizes"] == [[64, 64], [32, 32]]
    for i in range(20):
        effective = draw(engine, PROMPTS[i % 2], seed=i, size=64 if i % 4 < 2 else 32)
        assert set(effective["compilations"].values()) == {0}
        assert all(stage["captures"] == 0 for stage in effective["cuda_graph"].values())
        assert effective["warmup"] == engine.warmed_up


def test_a_warm_up_takes_after_the_request(cache: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump.json"
    like = SamplingParams(
        prompt=[PROMPTS[0]], height=64, width=32, perf_dump_path=str(dump), output_path=str(tmp_path / "out")
    )
    engine = Engine.load(ServerArgs(device="cpu", warmup=True), like=like)
    assert engine.warmed_up is not None and engine.warmed_up["sizes"] == [[64, 32]]
    assert not dump.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"warmup_steps": 2}, "warmup_steps=2: has no effect without warmup"),
        ({"warmup_resolutions": ["64x64"]}, "warmup_resolutions=64x64: has no effect without warmup"),
        ({"warmup": True, "warmup_resolutions": ["64x60"]}, "height=60: must be a multiple of"),
    ],
)
def test_a_mistaken_warm_up_is_named(server: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine.load(ServerArgs(device="cpu", **server))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: device=cpu: nothing to compile; with enable_torch_compile there is, and --arch"),
        (["--warmup-resolutions", "64"], "error: warmup_resolutions=64: expected WIDTHxHEIGHT in pixels"),
        (["--arch", "sm_90", "--enable-torch-compile"], "error: arch=sm_90: torch.compile works on a GPU that is here"),
        (["--arch", "sm_90", "--backend", "diffusers"], "error: arch=sm_90: embedded runs on diffusers"),
        (["--arch", "sm_90", "--model-path", "nowhere"], "error: model_path=nowhere: no such folder"),
    ],
)
def test_prewarm_says_what_it_cannot_do(argv: list[str], message: str, cache: Path) -> None:
    done = prewarm(*argv)
    assert (done.returncode, done.stderr.splitlines()[-1][: len(message)]) == (2, message)
