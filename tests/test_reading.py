"""Bytes of files become weights: in place, through staging buffers, and through a stand-in for a GPU's copy stream."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forks import FORKS
from safetensors.torch import load_file, save_file
from tiny_checkpoints import copy, edit_weights
from torch import Tensor, nn

from sgl_diffusion.cli.main import main
from sgl_diffusion.runtime import reading
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.encoders import load_encoder
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.reading import Run
from sgl_diffusion.runtime.report import Report
from sgl_diffusion.runtime.resolve import resolve
from sgl_diffusion.runtime.weights import Share, find_weights, load_weights, slots

CPU = torch.device("cpu")
NOT_A_NUMBER = 0xFF  # as every byte, in all dtypes of weights
PARAMS = {"prompt": ["a"], "height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}


# -- the stand-in ---------------------------------------------------------------------


@dataclass
class StandIn:
    """A device in host memory whose copies run as late as they may: once someone waits for them.

    A staging buffer that is filled again too early is seen by what arrives.
    """

    refuses: bool = False
    pending: list[Upload] = field(default_factory=list)
    most_pending: int = 0
    pinned: int = 0
    unpinned_while_pending: int | None = None
    copies: int = 0
    computation_waits: int = 0
    spaces: list[Tensor] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def allocate(self, size: int) -> Tensor:
        self.spaces.append(torch.full((size,), NOT_A_NUMBER, dtype=torch.uint8))
        return self.spaces[-1]

    def pin(self, host: Tensor) -> Callable[[], None]:
        if self.refuses:
            raise RuntimeError("no more locks\nmore")
        self.pinned = host.numel()
        return self._unpin

    def _unpin(self) -> None:
        self.unpinned_while_pending = len(self.pending)

    def copy(self, transfer: Callable[[], None], after: Sequence[Any]) -> Upload:
        assert list(after) == ["computed"], "the memory may still be in use"
        with self.lock:
            self.copies += 1
            self.pending.append(Upload(self, transfer))
            self.most_pending = max(self.most_pending, len(self.pending))
            return self.pending[-1]

    def computed(self) -> str:
        return "computed"

    def compute_waits(self, event: Any) -> None:
        self.computation_waits += 1


@dataclass(eq=False)
class Upload:
    streams: StandIn
    transfer: Callable[[], None]

    def synchronize(self) -> None:
        with self.streams.lock:
            while self in self.streams.pending:  # a stream runs in order
                self.streams.pending.pop(0).transfer()


# -- modules ----------------------------------------------------------------------------


class Packed(nn.Module):
    packed = {"qkv": {"q": 2, "k": 1, "v": 1}}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 64)
        self.out = nn.ModuleList(nn.Linear(64, 50) for _ in range(5))
        self.scale = nn.Parameter(torch.empty(1))


def packed_checkpoint(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor is larger than a staging buffer, but for the biases; the stored ones by name."""
    module, generator = Packed(), torch.Generator().manual_seed(0)
    parameters = dict(module.named_parameters())
    stored = {}
    for name, slot in slots(module).items():
        rows = parameters[slot.parameter][slot.start : slot.stop]
        stored[name] = torch.randn(rows.shape, generator=generator).to(dtype)
    save_file(stored, path)
    return stored


@pytest.mark.parametrize("through", ["the host", "a copy stream"])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.float32),
    ],
)
def test_every_byte_arrives_in_its_row_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, wanted: torch.dtype, through: str
) -> None:
    monkeypatch.setattr(reading, "STAGING", 1024)
    expected = packed_checkpoint(tmp_path / "w.safetensors", stored)
    with torch.device("meta"):
        module = Packed()
    streams = StandIn() if through == "a copy stream" else None
    times = load_weights(module, [tmp_path / "w.safetensors"], CPU, wanted, streams)
    parameters = dict(module.named_parameters())
    for name, slot in slots(module).items():
        rows = parameters[slot.parameter][slot.start : slot.stop]
        assert rows.dtype == wanted and torch.equal(rows, expected[name].to(wanted)), name
    assert times.bytes_read == sum(t.nbytes for t in expected.values())
    assert times.read_ms > 0
    assert (times.convert_ms > 0) == (stored != wanted)
    assert (times.upload_ms > 0) == (streams is not None)
    if streams is not None:
        assert streams.pinned == reading.RING * 1024
        assert reading.READERS < streams.most_pending <= reading.RING  # reading goes on behind uploads, but not far
        assert streams.unpinned_while_pending == 0
        assert streams.computation_waits == streams.copies  # else it could read weights that have not arrived
        assert len(streams.spaces) == (0 if stored == wanted else reading.RING)


@pytest.mark.parametrize("through", ["the host", "a copy stream"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, wanted: torch.dtype, through: str
) -> None:
    """Of q, k and v the rows of its heads; of the columns that read two inputs side by side, its run of each."""
    monkeypatch.setattr(reading, "STAGING", 1024)
    stored = packed_checkpoint(tmp_path / "w.safetensors", torch.float32)
    with torch.device("meta"):
        module = Packed()
        module.qkv, module.out[1] = nn.Linear(48, 32), nn.Linear(32, 50)
    module.qkv.share = Share(0, (2, 1, 1), rank, 2)
    module.out[1].share = Share(1, (1, 3), rank, 2)
    streams = StandIn() if through == "a copy stream" else None
    times = load_weights(module, [tmp_path / "w.safetensors"], CPU, wanted, streams)
    if streams is not None:
        assert not streams.pending

    def half(name: str) -> Tensor:
        return stored[name].chunk(2)[rank]

    for leaf in ("weight", "bias"):
        expected = torch.cat([half(f"{part}.{leaf}") for part in "qkv"]).to(wanted)
        assert torch.equal(getattr(module.qkv, leaf), expected)
    first, second = stored["out.1.weight"].split([16, 48], dim=1)
    expected = torch.cat([first.chunk(2, 1)[rank], second.chunk(2, 1)[rank]], dim=1).to(wanted)
    assert torch.equal(module.out[1].weight, expected)
    assert torch.equal(module.out[1].bias, stored["out.1.bias"].to(wanted))
    assert torch.equal(module.out[2].weight, stored["out.2.weight"].to(wanted))

    others = sum(half(f"{part}.{leaf}").nbytes for part in "qkv" for leaf in ("weight", "bias"))
    twice = stored["out.1.weight"].nbytes  # its rows, once for each run
    assert times.bytes_read == sum(t.nbytes for t in stored.values()) - others + twice
    for source in find_weights(module, [tmp_path / "w.safetensors"]):  # as weights do that stay in their files
        rows = module.get_parameter(source.slot.parameter)[source.slot.start : source.slot.stop]
        assert torch.equal(source.read().to(wanted), rows)


def test_locked_memory_that_is_refused_is_told(tmp_path: Path) -> None:
    packed_checkpoint(tmp_path / "w.safetensors", torch.float32)
    with torch.device("meta"):
        module = Packed()
    with pytest.raises(RunFailure, match="does not lock 67108864 bytes to load through: no more locks$"):
        load_weights(module, [tmp_path / "w.safetensors"], CPU, torch.float32, StandIn(refuses=True))


# -- files that are not as they should be ----------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_with_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def overlap(header: dict[str, Any], data: bytes) -> bytes:
    header["out.1.bias"]["data_offsets"] = header["out.0.bias"]["data_offsets"]
    return data


def beyond_the_file(header: dict[str, Any], data: bytes) -> bytes:
    return data[:-1]


def invent_a_dtype(header: dict[str, Any], data: bytes) -> bytes:
    header["out.1.bias"]["dtype"] = "X7"
    return data


def unsupported_dtype(header: dict[str, Any], data: bytes) -> bytes:
    header["out.1.bias"]["dtype"] = "U32"
    return data


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (overlap, "not a readable safetensors file"),
        (beyond_the_file, "not a readable safetensors file"),
        (invent_a_dtype, "not a readable safetensors file"),
        (unsupported_dtype, "weights of dtype U32; expected one of F64, F32"),
    ],
)
def test_corrupt_files_are_one_line(
    tmp_path: Path, damage: Callable[[dict[str, Any], bytes], bytes], told: str
) -> None:
    file = tmp_path / "w.safetensors"
    packed_checkpoint(file, torch.float32)
    header, data = header_of(file)
    write_with_header(file, header, damage(header, data))
    with torch.device("meta"):
        module = Packed()
    with pytest.raises(UserError) as refused:
        load_weights(module, [file], CPU, torch.float32)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    packed_checkpoint(file, torch.float32)
    last = reading.stored_tensors(file)[-1]
    file.write_bytes(file.read_bytes()[:-4])
    told = r"w.safetensors: ends before byte \d+, which its header promises"
    with reading.Loader() as loader, pytest.raises(UserError, match=told):
        loader.load([(Run(last), torch.empty(last.shape))])


def test_a_weight_in_two_files_is_named(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    packed_checkpoint(files[0], torch.float32)
    save_file({"out.1.bias": torch.zeros(50)}, files[1])
    with torch.device("meta"):
        module = Packed()
    with pytest.raises(UserError, match=r"repeated weights: out\.1\.bias$"):
        load_weights(module, files, CPU, torch.float32)


# -- text encoders ------------------------------------------------------------------------------

SMALL_T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
SMALL_CLIP = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "projection_dim": 32}  # fmt: skip
SMALL_QWEN = {
    "text_config": {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2},
    "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32},
}  # fmt: skip
# class, config, values; how older versions of transformers named its weights
ENCODERS: dict[str, tuple[str, dict[str, Any], Callable[[str], str]]] = {
    "CLIPTextModel": ("CLIPTextConfig", SMALL_CLIP, lambda name: "text_model." + name.removeprefix("text_model.")),
    "CLIPTextModelWithProjection": ("CLIPTextConfig", SMALL_CLIP, lambda name: name),
    "T5EncoderModel": ("T5Config", {**SMALL_T5, "feed_forward_proj": "gated-gelu"}, lambda name: name),
    "UMT5EncoderModel": ("UMT5Config", SMALL_T5, lambda name: name),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VLConfig",
        SMALL_QWEN,
        lambda name: name.replace("model.visual.", "visual.").replace("model.language_model.", "model."),
    ),
}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


@pytest.mark.parametrize("names", ["new names", "old names"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_those_of_from_pretrained(name: str, names: str, tmp_path: Path) -> None:
    config_name, values, old_name = ENCODERS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(getattr(transformers, config_name)(**values)).save_pretrained(tmp_path)
    if names == "old names":
        file = tmp_path / "model.safetensors"
        save_file({old_name(key): value for key, value in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        judge = cls.from_pretrained(tmp_path, dtype=dtype)
        expected = tensors_of(judge)
        for streams in (None, StandIn()):
            times, encoder = load_encoder("text_encoder", config, tmp_path, CPU, dtype, None, streams)
            found = tensors_of(encoder)
            assert list(found) == list(expected)
            for key, tensor in found.items():
                assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key
            tied = {k for k, t in found.items() if any(t is u for v, u in found.items() if v != k)}
            assert tied == {k for k, t in expected.items() if any(t is u for v, u in expected.items() if v != k)}
            assert times.read_ms > 0 and times.bytes_read > 0
            if streams is not None:
                assert times.upload_ms > 0 and not streams.pending


def test_an_encoder_prefers_the_whole_file_as_transformers_does(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(tiny("flux"), tmp_path / "variants") / "text_encoder_2"
    plain = load_file(folder / "model.safetensors")
    zeros = {k: torch.zeros_like(v) for k, v in plain.items()}
    save_file(zeros, folder / "model.variant.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    _, encoder = load_encoder("text_encoder_2", config, folder, CPU, torch.float32, None)
    assert torch.equal(encoder.shared.weight, plain["shared.weight"])


def test_a_misshaped_encoder_weight_is_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    broken = copy(tiny("flux"), tmp_path / "broken")
    edit_weights(broken, "text_encoder_2", lambda t: t.update({"shared.weight": t["shared.weight"][:5].clone()}))
    with pytest.raises(
        UserError, match=r"text_encoder_2: mis-shaped weights: shared.weight \(5, 48\) instead of"
    ) as refused:
        Engine.load(ServerArgs(model_path=str(broken), device="cpu"))
    assert "\n" not in str(refused.value)


# -- host memory ----------------------------------------------------------------------------------


def anonymous_mib() -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.parametrize(
    ("dtype", "through", "beside"),
    [
        (torch.float32, "the host", 4),  # in place
        (torch.bfloat16, "the host", 4 * 8 + 4),  # a staging buffer for each reader
        (torch.float32, "a copy stream", 8 * 8 + 4),  # the ring
    ],
)
def test_loading_needs_little_more_than_the_parameters(
    tmp_path: Path, dtype: torch.dtype, through: str, beside: int
) -> None:
    """No second copy of the weights, in any dtype, exists; what is beside them is the buffers."""
    layers, mebibytes = 14, 16
    save_file({f"{i}.weight": torch.zeros(2048, 2048) for i in range(layers)}, tmp_path / "w.safetensors")
    with ProcessPoolExecutor(1, mp_context=FORKS) as process:  # with no memory and no threads of other tests
        taken = process.submit(taken_by_loading, tmp_path / "w.safetensors", layers, dtype, through).result()
    parameters = layers * mebibytes * dtype.itemsize / 4
    assert 0.9 * parameters < taken < parameters + beside


def taken_by_loading(file: Path, layers: int, dtype: torch.dtype, through: str) -> float:
    """MiB that the process has at most, more than before."""
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(layers)))
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    streams = StandIn() if through == "a copy stream" else None
    load_weights(module, [file], CPU, dtype, streams)
    done.set()
    watcher.join()
    return max(peak[0], anonymous_mib()) - before


# -- the report -------------------------------------------------------------------------------------


def test_a_report_tells_how_the_model_was_loaded(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = tmp_path / "dump.json"
    engine = Engine.load(ServerArgs(model_path=str(tiny("flux")), device="cpu", precision="bf16"))
    engine.run(SamplingParams(**PARAMS, save_output=False, perf_dump_path=str(dump)))
    load = Report.read(dump).load
    assert load is not None and load.total is not None and load.warm_up_ms == 0
    assert load.components.keys() == {"vae", "text_encoder", "text_encoder_2", "transformer"}
    for key in ("transformer", "text_encoder_2"):
        stored = load_file(next((tiny("flux") / key).glob("*.safetensors")))
        component = load.components[key]
        assert component.weights == "read" and component.bytes_read == sum(t.nbytes for t in stored.values())
        assert component.read_ms > 0 and component.convert_ms > 0 and component.upload_ms == 0
        assert component.gb_per_s == pytest.approx(component.bytes_read / 1e6 / component.wall_ms)
    assert load.total.bytes_read == sum(c.bytes_read for c in load.components.values())
    assert load.total.wall_ms <= load.wall_ms
    assert json.loads(dump.read_text())["load"]["total"]["gb_per_s"] > 0
    assert main(["perf", "show", str(dump)]) == 0
    shown = capsys.readouterr().out
    assert "load, 4 threads" in shown and "convert" in shown and re.search(r"transformer +read +0\.\d+", shown)


def test_a_warm_up_and_dummy_weights_are_told(tiny: Callable[[str], Path]) -> None:
    args = ServerArgs(model_path=str(tiny("flux")), device="cpu", load_format="dummy", warmup=True)
    load = Engine.load(args, like=SamplingParams(**PARAMS, save_output=False)).load_report
    assert load is not None and {c.weights for c in load.components.values()} == {"dummy"} and load.total is None
    assert load.warm_up_ms > 0
    assert load.warm_up_ms + sum(c.wall_ms for c in load.components.values()) <= load.wall_ms


def test_weights_that_stay_in_their_files_are_told(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sgl_diffusion.runtime.parts.fits_host_memory", lambda module, dtype: False)
    args = ServerArgs(model_path=str(tiny("flux")), device="cpu")
    model = resolve(args)
    assert model.blueprint is not None
    plan = replace(model.plan, offload={**model.plan.offload, "transformer": "component"})
    pipeline = NativePipeline(replace(model.blueprint, plan=plan), model.folders, args, StandIn())
    assert pipeline.loaded["transformer"].weights == "mapped" and pipeline.loaded["transformer"].bytes_read == 0
    assert pipeline.loaded["vae"].weights == "read"


def test_the_benchmark_loads_by_turns(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "load", "--model-path", str(tiny("flux")), "--device", "cpu"]
    assert main([*words, "--rounds", "2", "--json", str(tmp_path / "load.json")]) == 0
    told = json.loads((tmp_path / "load.json").read_text())
    shown = capsys.readouterr().out
    assert f"diffusers / native = {told['ratio']:.2f}" in shown and "read" in shown
    for side in told["sides"].values():
        assert len(side["load_ms"]) == len(side["ready_ms"]) == len(side["cached"]) == 2
        assert all(0 < load <= ready for load, ready in zip(side["load_ms"], side["ready_ms"], strict=True))
        assert side["weights_gb"] > 0
    assert told["sides"]["native"]["split_ms"][0].keys() == {"read", "convert", "upload"}
    assert ("not cold loads" in shown) == any(max(side["cached"]) > 0 for side in told["sides"].values())
    assert main([*words, "--rounds", "0"]) == 2
    assert main(["bench", "load", "--model-path", str(tmp_path / "none")]) == 2
    assert "no safetensors files in that folder" in capsys.readouterr().err
