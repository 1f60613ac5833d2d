"""`sglang` as users run it: a subprocess, its files, its exit codes, its one-line messages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import SGLANG, sglang
from tiny_checkpoints import copy, edit_weights

# on the CPU wherever the tests run: fp32, and the same bits everywhere
SMALL = (
    "--device",
    "cpu",
    "--height",
    "32",
    "--width",
    "48",
    "--num-inference-steps",
    "2",
    "--max-sequence-length",
    "16",
)
Tiny = Callable[[str], Path]


def assert_refused(done: subprocess.CompletedProcess[str], *told: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(t in lines[0] for t in told), lines[0]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# -- what works -----------------------------------------------------------------------


def test_the_same_request_gives_the_same_bytes_and_a_report(tiny: Tiny, tmp_path: Path) -> None:
    """And may be repeated, where another one does not take its file."""
    file = ("--output-path", ".", "--output-file-name", "a.png")
    words = ("generate", "--model-path", tiny("flux"), "--seed", "1", *file, *SMALL)
    drawn, written = [], []
    for run in ("one", "two"):
        done = sglang(*words, "--prompt", "a red circle", "--perf-dump-path", f"{run}.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "saved a.png" in done.stdout
        drawn.append((tmp_path / "a.png").read_bytes())
        written.append((tmp_path / "a.png").stat().st_mtime_ns)
    assert_refused(sglang(*words, "--prompt", "a blue circle", cwd=tmp_path), "output_file_name=a.png", "another run")
    assert written[0] < written[1] == (tmp_path / "a.png").stat().st_mtime_ns, "drawn twice, and left alone then"
    assert drawn[0] == drawn[1] == (tmp_path / "a.png").read_bytes()
    report = json.loads((tmp_path / "one.json").read_text())
    assert [s["name"] for s in report["steps"]] == [
        "text_encoding", "latent_preparation", "denoising", "decoding", "saving",
    ]  # fmt: skip
    assert [s["step"] for s in report["denoise_steps_ms"]] == [0, 1]
    assert report["effective"]["backend"] == "sglang" and report["effective"]["ignored"] == []
    assert report["effective"]["attention"]["transformer"] == "torch_sdpa"
    assert report["outputs"] == ["a.png"] and report["error"] is None


def test_prompt_file_samples_config_and_quiet_stderr(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    config = {"model_path": str(tiny("flux")), "num_inference_steps": 9, "seed": 5, "output_file_name": "p.webp"}
    (tmp_path / "c.json").write_text(json.dumps(config))
    done = sglang("generate", "--config", "c.json", "--prompt-path", "prompts.txt", "--num-samples", "2", *SMALL,
                  "--log-level", "warning", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "outputs") == [f"p_{i}.webp" for i in range(4)]
    assert done.stderr == ""


def test_verify_passes_writes_json_and_fails_past_the_tolerance(tiny: Tiny, tmp_path: Path) -> None:
    done = sglang("verify", tiny("flux"), *SMALL, "--output", "v.json", cwd=tmp_path)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
    assert "encoder_hidden_states" in done.stdout and "\N{HORIZONTAL ELLIPSIS}" not in done.stdout  # nothing cut off
    result = json.loads((tmp_path / "v.json").read_text())
    assert result["passed"] and {s["stage"] for s in result["stages"]} >= {"final_latents", "pixels"}
    done = sglang("verify", tiny("flux"), *SMALL, "--tolerance", "1e-12", cwd=tmp_path)
    assert done.returncode == 1 and "FAIL" in done.stdout


def test_help_and_version_need_no_model(tmp_path: Path) -> None:
    for words in (["--help"], [], ["generate", "--help"], ["version"]):
        assert sglang(*words, cwd=tmp_path).returncode == 0
    text = sglang("generate", "--help", cwd=tmp_path).stdout
    assert "--num-inference-steps" in text and "(default: outputs/)" in " ".join(text.split())
    alias = subprocess.run([SGLANG.with_name("sgl-diffusion"), "version"], capture_output=True, check=False)
    assert alias.returncode == 0


# -- what does not ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generat"], "unknown command 'generat'"),
        (["generate", "--promt", "x"], "unknown flag --promt; did you mean --prompt?"),
        (["generate"], "prompt: none given"),
        (["generate", "--prompt", "x", "--num-inference-steps", "-1"], "num_inference_steps=-1: must be at least 1"),
        (["generate", "--prompt", "x", "--model-path", "./nowhere"], "model_path=./nowhere: no such folder"),
        (["generate", "--prompt", "x", "--model-path", "org/name"], "model_path=org/name: not in the local cache"),
        (["generate", "--prompt", "x", "--config", "none.json"], "config=none.json: cannot be read"),
        (["perf", "show", "none.json"], "none.json: cannot be read"),
    ],
)
def test_mistakes_that_need_no_model(tmp_path: Path, words: list[str], told: str) -> None:
    assert_refused(sglang(*words, cwd=tmp_path), told)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--vea-path", "x"], "vea_path=x: "),
        (["--height", "33"], "height=33: must be a multiple of 16; nearest: 32 or 48"),
        (["--num-frames", "5"], "num_frames=5: this model draws pictures"),
        (["--negative-prompt", "x"], "negative_prompt: has no effect without true_cfg_scale above 1"),
        (["--true-cfg-scale", "2"], "true_cfg_scale=2.0: needs a negative_prompt"),
        (["--max-sequence-length", "2"], "max_sequence_length=2: the prompt has"),
        (["--output-file-name", "a.mp4"], "output_file_name=a.mp4: a picture is written as one of .png"),
        (["--output-path", "/proc/none"], "output_path=/proc/none: cannot be written"),
        (["--perf-dump-path", "none/p.json"], "perf_dump_path=none/p.json: the folder none does not exist"),
        (["--attention-backend", "triton"], "triton: needs an NVIDIA GPU"),
        (["--attention-backend", "nope"], "attention backend 'nope' of transformer: expected one of torch_sdpa"),
        (["--device", "cuda:99"], "device=cuda:99: "),
        (["--pipeline-class-name", "FluxPipelin", "--backend", "sglang"], "backend=sglang: FluxPipelin has no native"),
        (["--text-encoder-precisions", "fp32", "fp32", "fp32"], "text_encoder_precisions=fp32 fp32 fp32: expected 1"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_work(tiny: Tiny, tmp_path: Path, words: list[str], told: str) -> None:
    done = sglang("generate", "--model-path", tiny("flux"), "--prompt", "a red circle", *SMALL,
                  *words, cwd=tmp_path)  # fmt: skip
    assert_refused(done, told)
    assert files(tmp_path) == []
    needs_the_model = told.startswith(("max_sequence_length", "output_path"))  # its tokenizer, and no stray folder
    assert ("INFO: loaded" in done.stderr) == needs_the_model


def test_a_corrupt_file_is_named(tiny: Tiny, tmp_path: Path) -> None:
    broken = copy(tiny("flux"), tmp_path / "broken")
    (file,) = (broken / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    done = sglang("generate", "--model-path", "broken", "--prompt", "x", cwd=tmp_path)
    assert_refused(done, str(file.name), "not a readable safetensors file")
    assert not (tmp_path / "outputs").exists()


def test_wrong_weights_are_listed(tiny: Tiny, tmp_path: Path) -> None:
    wrong = copy(tiny("flux"), tmp_path / "wrong")

    def edit(tensors: dict[str, object]) -> None:
        tensors["stray.weight"] = tensors.pop("proj_out.weight")
        tensors["x_embedder.bias"] = tensors["x_embedder.bias"][:-1].clone()  # type: ignore[index]

    edit_weights(wrong, "transformer", edit)
    done = sglang("generate", "--model-path", "wrong", "--prompt", "x", cwd=tmp_path)
    assert_refused(
        done, "missing weights: proj_out.weight", "unexpected weights: stray.weight", "x_embedder.bias (127,)"
    )


def test_a_failed_run_still_leaves_its_report(tiny: Tiny, tmp_path: Path) -> None:
    done = sglang("generate", "--model-path", tiny("flux"), "--prompt", "x", *SMALL, "--height", "40",
                  "--perf-dump-path", "p.json", cwd=tmp_path)  # fmt: skip
    assert_refused(done, "height=40")
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["error"] == {"type": "UserError", "message": done.stderr.splitlines()[-1].removeprefix("error: ")}
    assert files(tmp_path) == ["p.json"]


def test_a_missing_component_folder_and_index(tiny: Tiny, tmp_path: Path) -> None:
    shutil.rmtree(copy(tiny("flux"), tmp_path / "half") / "vae")
    assert_refused(sglang("generate", "--model-path", "half", "--prompt", "x", cwd=tmp_path), "component folder vae")
    (tmp_path / "empty").mkdir()
    assert_refused(sglang("generate", "--model-path", "empty", "--prompt", "x", cwd=tmp_path), "no model_index.json")


def test_a_picture_of_nan_is_a_failure_not_a_file(tiny: Tiny, tmp_path: Path) -> None:
    broken = copy(tiny("flux"), tmp_path / "broken")
    edit_weights(broken, "vae", lambda tensors: tensors["decoder.conv_out.bias"].fill_(float("nan")))
    done = sglang("generate", "--model-path", "broken", "--prompt", "x", *SMALL, "--perf-dump-path", "p.json",
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "failed: the decoded pictures hold NaN" in done.stderr
    assert json.loads((tmp_path / "p.json").read_text())["error"]["type"] == "RunFailure"
    (kept,) = files(tmp_path / "outputs")  # the denoiser's work is not lost: its latents are sound
    assert kept.endswith(".latents.safetensors")


def test_a_terminal_shows_stages_steps_and_time_left(tiny: Tiny, tmp_path: Path) -> None:
    """On a pseudo-terminal the bars are there; elsewhere stderr holds log lines only (see above)."""
    import pty

    leader, follower = pty.openpty()
    words = [SGLANG, "generate", "--model-path", tiny("flux"), "--prompt", "x", *SMALL, "--num-inference-steps", "9"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(words, cwd=tmp_path, stderr=follower, stdout=subprocess.DEVNULL, env=env)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 65536):
            shown += chunk
    except OSError:  # a pseudo-terminal ends with an error, not with an empty read
        pass
    assert process.wait() == 0
    assert b"denoising" in shown and b"9/9" in shown and b"0:00:" in shown


def test_an_interrupted_run_says_so_and_leaves_no_picture(tiny: Tiny, tmp_path: Path) -> None:
    import signal

    endless = [*SMALL, "--num-inference-steps", "100000"]
    words = [SGLANG, "generate", "--model-path", tiny("flux"), "--prompt", "x", *endless]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "loaded" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in process.stderr.read()
    assert files(tmp_path / "outputs") == []
