"""Offloaded weights, on a device that stands in for a GPU and shows what a forgotten wait or a stray read would do."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import build_flux
from torch import Tensor, nn

from sgl_diffusion.cli import generate
from sgl_diffusion.cli.flags import Parser, parse_command_line
from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.family import Condition, Guidance, Size
from sgl_diffusion.models.wan import Wan
from sgl_diffusion.runtime import offload
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs, parse_args
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.events import StepDone
from sgl_diffusion.runtime.offload import Offloaded
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.plan import make_plan, residency_that_fits
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.resolve import resolve
from sgl_diffusion.runtime.trace import Stopwatch
from sgl_diffusion.runtime.weights import fill_dummy

CPU = torch.device("cpu")
NOT_A_NUMBER = 0xFF  # as every byte, in all dtypes of weights
STEPS = 3
WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


# -- the stand-in ---------------------------------------------------------------------


@dataclass(eq=False)
class Copy:
    transfer: Callable[[], None]
    issued: int
    after: list[int]
    target: int | None = None  # address; known once it has run


@dataclass
class StandIn:
    """A device in host memory. Its memory is NaN, and a copy only runs once computation waits for it.

    Locked host memory is NaN to all but copies. Events are points in time; `uses` are when layers read which memory.
    """

    locks: bool = True
    now: int = 0
    spaces: list[Tensor] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    uses: list[tuple[str, int, int, int]] = field(default_factory=list)  # layer, address, from, to
    locked: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # host memory, what is in it
    unlocked: int = 0

    def tick(self) -> int:
        self.now += 1
        return self.now

    def allocate(self, size: int) -> Tensor:
        self.spaces.append(torch.full((size,), NOT_A_NUMBER, dtype=torch.uint8))
        return self.spaces[-1]

    def pin(self, host: Tensor) -> Callable[[], None]:
        if not self.locks:
            raise RuntimeError("no more locks\nmore")
        self.locked.append((host, host.clone()))
        host.fill_(NOT_A_NUMBER)
        return self._unlock

    def _unlock(self) -> None:
        self.unlocked += 1

    def copy(self, transfer: Callable[[], None], after: Sequence[Any]) -> Copy:
        self.copies.append(Copy(transfer, self.tick(), [event for event in after if isinstance(event, int)]))
        return self.copies[-1]

    def computed(self) -> int:
        return self.tick()

    def compute_waits(self, event: Copy) -> None:
        for copy in self.copies[: self.copies.index(event) + 1]:  # a stream runs in order
            if copy.target is None:
                self._run(copy)

    def _run(self, copy: Copy) -> None:
        before = [space._version for space in self.spaces]
        for host, content in self.locked:
            host.copy_(content)
        copy.transfer()
        for host, _ in self.locked:
            host.fill_(NOT_A_NUMBER)
        written = [s for s, version in zip(self.spaces, before, strict=True) if s._version != version]
        assert len(written) <= 1
        copy.target = written[0].data_ptr() if written else 0

    def watch(self, name: str, layer: nn.Module) -> None:
        """Notes which memory a layer's weights are in whenever it runs."""
        begun: list[int] = []
        layer.register_forward_pre_hook(lambda *_: begun.append(self.tick()))
        layer.register_forward_hook(
            lambda *_: self.uses.append((name, storage(next(layer.parameters())), begun.pop(), self.tick()))
        )


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# -- whole pipelines --------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flux(tmp_path_factory.mktemp("offload") / "flux", double=3, single=4)


def load(
    folder: Path,
    streams: StandIn,
    places: Mapping[str, str],
    *,
    pin: bool | None = None,
    prefetch: float = 0.0,
    **more: Any,
) -> Engine:
    """An engine with offload, which arguments alone cannot have on a CPU."""
    args = ServerArgs(model_path=str(folder), device="cpu", **more)
    model = resolve(args)
    assert model.blueprint is not None
    plan = replace(model.plan, offload={**model.plan.offload, **places}, pin_memory=pin is not False, prefetch=prefetch)
    blueprint, args = replace(model.blueprint, plan=plan), args.model_copy(update={"pin_cpu_memory": pin})
    return Engine(args, replace(model, plan=plan), NativePipeline(blueprint, model.folders, args, streams))


REQUESTS = [
    {"prompt": ["a red circle on a blue background"], "seed": 1},
    {"prompt": ["a white cross"], "negative_prompt": "a circle", "true_cfg_scale": 2.0, "num_outputs_per_prompt": 2},
]


def drawn(engine: Engine, request: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every intermediate tensor of a request."""
    found: dict[str, Tensor] = {}
    for _ in running(engine, request, found):
        pass
    return found


def running(engine: Engine, request: Mapping[str, Any], found: dict[str, Tensor] | None = None) -> Any:
    params = SamplingParams.model_validate({"height": 64, "width": 64, "num_inference_steps": STEPS, **request})
    assert isinstance(engine.backend, NativePipeline)
    found = {} if found is None else found

    def record(name: str, tensor: Tensor) -> None:
        found[name] = tensor.clone()

    return engine.backend.run(resolve_request(params, {}, engine.args), Stopwatch(CPU), record)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def expected(flux: Path) -> list[dict[str, Tensor]]:
    engine = Engine.load(ServerArgs(model_path=str(flux), device="cpu"))
    return [drawn(engine, request) for request in REQUESTS]


@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("prefetch", [None, 0.0, 0.5, 2.0, 99.0])
def test_offloaded_weights_draw_what_resident_ones_draw(
    flux: Path, expected: list[dict[str, Tensor]], prefetch: float | None, pin: bool
) -> None:
    """Two requests in a row, with one denoiser call a step and with two."""
    streams = StandIn()
    places = dict.fromkeys(WEIGHTS, "component" if prefetch is None else "layerwise")
    engine = load(flux, streams, places, pin=pin, prefetch=prefetch or 0.0)
    assert len(streams.locked) == (len(WEIGHTS) if pin else 0)
    for request, tensors in zip(REQUESTS, expected, strict=True):
        assert same(drawn(engine, request), tensors)
    assert streams.copies


def test_weights_stay_in_their_files_where_host_memory_is_short(
    flux: Path, expected: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "available_host_memory", lambda: 2 * 1024**3)
    engine = load(flux, StandIn(), {"transformer": "layerwise", "vae": "component"})
    assert same(drawn(engine, REQUESTS[0]), expected[0])
    assert isinstance(engine.backend, NativePipeline)
    for key in ("transformer", "vae"):  # nothing holds a copy, and nothing could be read by mistake
        assert all(p.isnan().all() and storage(p) for p in engine.backend.parts[key].parameters())
        assert engine.backend.offload.report(STEPS)[key]["host"] == "mapped files"
    with pytest.raises(UserError, match="pin_cpu_memory=true: host memory has no room for transformer"):
        load(flux, StandIn(), {"transformer": "layerwise"}, pin=True)


def test_weights_in_files_are_converted_on_their_way(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = drawn(Engine.load(ServerArgs(model_path=str(flux), device="cpu", precision="bf16")), REQUESTS[0])
    monkeypatch.setattr(offload, "available_host_memory", lambda: 0)
    assert same(drawn(load(flux, StandIn(), {"transformer": "layerwise"}, precision="bf16"), REQUESTS[0]), resident)


def test_dummy_weights_are_the_same_offloaded(flux: Path) -> None:
    args = {"load_format": "dummy"}
    resident = Engine.load(ServerArgs(model_path=str(flux), device="cpu", load_format="dummy"))
    places = {"transformer": "layerwise", "text_encoder_2": "component", "text_encoder": "layerwise"}
    assert same(drawn(load(flux, StandIn(), places, **args), REQUESTS[0]), drawn(resident, REQUESTS[0]))


def test_a_family_that_reads_its_layers_before_the_loop() -> None:
    """Wan's blocks read the text once a request, before the first step: each has its weights then, too."""
    small = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "ffn_dim": 96, "text_dim": 40}
    config = next(iter(Wan.presets().values())).components["transformer"] | small
    with torch.device("meta"):
        module = Wan.build("transformer", config, attention, {})
    fill_dummy(module.requires_grad_(False), CPU, torch.float32)
    family, condition = Wan({"transformer": module}), Condition({"encoder_hidden_states": torch.ones(1, 5, 40)})

    def velocity() -> Tensor:
        x = family.noise(Size(32, 32, 5), [torch.Generator().manual_seed(1)])
        return family.predictor(condition, Size(32, 32, 5), Guidance(None), (1.0, 0.0))(x, 0)

    resident = velocity()
    component = Offloaded("transformer", module, StandIn(), prefetch=0.0, cyclic=True, pin=True)
    with component.on_device():
        assert torch.equal(velocity(), resident)
    assert component.report(steps=1)["late_layers"] == 0


# -- order ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [1.0, 3.0])
def test_copies_overlap_computation_and_overwrite_nothing_in_use(flux: Path, prefetch: float) -> None:
    streams = StandIn()
    engine = load(flux, streams, {"transformer": "layerwise"}, prefetch=prefetch)
    assert isinstance(engine.backend, NativePipeline)
    denoiser = engine.backend.parts["transformer"]
    layers = [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
    for i, layer in enumerate(layers):
        streams.watch(str(i), layer)
    drawn(engine, REQUESTS[0])
    drawn(engine, REQUESTS[0])

    assert [name for name, *_ in streams.uses] == [str(i) for i in range(len(layers))] * STEPS * 2
    for copy in streams.copies:
        assert copy.after, "the memory may still be in use by what came before the stage"
        assert copy.target, "the memory is given back while it is written to"
        for _, address, begun, ended in streams.uses:
            if address == copy.target and begun < copy.issued:
                assert ended < copy.issued, "a buffer is filled while its layer computes"
                assert any(event >= ended for event in copy.after), "nothing orders the copy behind the computation"
    for uses in (streams.uses[: len(layers) * STEPS], streams.uses[len(layers) * STEPS :]):
        assert len({address for _, address, *_ in uses}) == prefetch + 1
        for (_, _, begun, _), (_, address, following, _) in pairwise(uses):
            issued = max(c.issued for c in streams.copies if c.target == address and c.issued < following)
            assert issued < begun, "a layer was asked for only after the one before it began"


def test_a_component_comes_after_what_used_its_memory_before(flux: Path) -> None:
    streams = StandIn()
    drawn(load(flux, streams, dict.fromkeys(WEIGHTS, "component")), REQUESTS[0])
    assert len(streams.copies) == len(WEIGHTS)
    assert all(copy.after and copy.target for copy in streams.copies)


# -- ends -------------------------------------------------------------------------------


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("how", ["closed", "fails"])
@pytest.mark.parametrize("place", ["component", "layerwise"])
def test_weights_are_back_on_the_host_however_a_request_ends(
    flux: Path, expected: list[dict[str, Tensor]], place: str, how: str
) -> None:
    streams = StandIn()
    engine = load(flux, streams, dict.fromkeys(WEIGHTS, place))
    assert isinstance(engine.backend, NativePipeline)
    parameters = [p for key in WEIGHTS for p in engine.backend.parts[key].parameters()]
    homes = [p.data_ptr() for p in parameters]
    if how == "closed":
        events = running(engine, REQUESTS[0])
        next(event for event in events if isinstance(event, StepDone))
        assert [p.data_ptr() for p in parameters] != homes
        events.close()
    else:
        block = engine.backend.parts["transformer"].single_transformer_blocks[1]

        def fail(*_: Any) -> None:
            raise Broken

        handle = block.register_forward_hook(fail)
        with pytest.raises(Broken):
            drawn(engine, REQUESTS[0])
        handle.remove()
    assert [p.data_ptr() for p in parameters] == homes
    assert same(drawn(engine, REQUESTS[0]), expected[0])
    assert [p.data_ptr() for p in parameters] == homes


def test_locks_are_given_back_with_the_pipeline(flux: Path) -> None:
    streams = StandIn()
    engine = load(flux, streams, dict.fromkeys(WEIGHTS, "component"))
    assert streams.unlocked == 0
    del engine
    gc.collect()
    assert streams.unlocked == len(WEIGHTS)


def test_a_system_that_locks_no_memory_is_told(flux: Path) -> None:
    told = r"pin_cpu_memory=true: the system does not lock \d+ bytes for transformer: no more locks; --pin-cpu-memory"
    with pytest.raises(UserError, match=told):
        load(flux, StandIn(locks=False), {"transformer": "component"})


# -- single modules -----------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight, a layer with one of its own that it holds twice, and layers called backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.layers[2].weight = self.layers[0].weight
        self.layers[3].again = self.layers[3].weight
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x) * self.scale
        return x


@pytest.mark.parametrize("cyclic", [True, False])
@pytest.mark.parametrize("prefetch", [None, 0.0, 2.0])
def test_tied_weights_buffers_and_an_order_of_its_own(prefetch: float | None, cyclic: bool) -> None:
    torch.manual_seed(0)
    module, x = Tied().requires_grad_(False), torch.randn(2, 8)
    expected = module(x)
    streams = StandIn()
    component = Offloaded("tied", module, streams, prefetch=prefetch, cyclic=cyclic, pin=True)
    for _ in range(2):
        with component.on_device():
            assert torch.equal(module(x), expected) and torch.equal(module(x), expected)
            assert module.layers[0].weight is module.layers[2].weight
    assert not torch.equal(module(x), expected) if prefetch is None else not module.scale.isfinite()


def test_a_layer_called_while_it_is_away_is_an_error() -> None:
    module = Tied()
    Offloaded("tied", module, StandIn(), prefetch=0.0)
    with pytest.raises(RuntimeError, match="Linear of layer 3 was called while its weights are on the host"):
        module(torch.randn(1, 8))


def test_layers_are_asked_of_a_module_that_has_none() -> None:
    with pytest.raises(UserError, match="layerwise_offload_components=head: it has no lists of layers"):
        Offloaded("head", nn.Linear(2, 2), StandIn(), prefetch=0.0)


# -- the report ---------------------------------------------------------------------------


def test_the_report_says_what_was_copied(flux: Path) -> None:
    engine = load(flux, StandIn(), {"transformer": "layerwise", "text_encoder_2": "component"}, prefetch=2.0)
    params = SamplingParams(prompt=["a cross"], height=64, width=64, num_inference_steps=STEPS, save_output=False)
    reports = [engine.run(params).report.effective for _ in range(2)]
    assert reports[0]["offload"] == reports[1]["offload"]
    told = reports[0]["offload"]
    assert told["vae"] == told["text_encoder"] == {"mode": "resident"}
    encoder, denoiser = told["text_encoder_2"], told["transformer"]
    assert encoder["mode"] == "component" and encoder["copied_bytes"] == encoder["pinned_bytes"] > 0
    assert denoiser["mode"] == "layerwise" and denoiser["host"] == "pinned memory"
    assert (denoiser["layers"], denoiser["prefetch"], denoiser["late_layers"]) == (7, 2, 0)
    assert denoiser["device_bytes"] < denoiser["host_bytes"] < denoiser["copied_bytes"]
    stem = denoiser["copied_bytes"] - STEPS * denoiser["copied_bytes_per_step"]
    assert 0 < stem < denoiser["host_bytes"]


def test_graphs_need_weights_with_an_address(flux: Path) -> None:
    engine = load(flux, StandIn(), {"transformer": "layerwise", "vae": "component"})
    params = SamplingParams(prompt=["a cross"], height=64, width=64, num_inference_steps=1, save_output=False)
    told = engine.run(params).report.effective["cuda_graph"]
    moving = {"offloaded weights have no fixed address": 1}
    assert told["denoising"]["eager"] == told["decoding"]["eager"] == moving
    assert told["text_encoding"]["eager"] == {"this shape was not warmed up": 2}


# -- flags --------------------------------------------------------------------------------

KINDS = {
    "transformer": "denoiser",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "tokenizer": "tokenizer",
    "scheduler": "scheduler",
}
GIGABYTE = 10**9
SIZES = {
    "transformer": 24 * GIGABYTE,
    "vae": GIGABYTE // 5,
    "text_encoder": GIGABYTE // 4,
    "text_encoder_2": 10 * GIGABYTE,
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """PyTorch answers as if there were a GPU; `gpu(bytes)` sets its free memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def free(size: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, size))

    free(100 * GIGABYTE)
    return free


def parse(words: str) -> ServerArgs:
    parser = Parser(allow_abbrev=False)
    generate.add_arguments(parser)
    return parse_args(parse_command_line(parser, words.split()))[0]


@pytest.mark.parametrize(
    ("words", "places"),
    [
        ("", {}),
        ("--mode memory", dict.fromkeys(WEIGHTS, "component")),
        ("--mode memory --vae-cpu-offload false", dict.fromkeys(WEIGHTS, "component") | {"vae": "resident"}),
        ("--mode memory --dit-layerwise-offload", dict.fromkeys(WEIGHTS, "component") | {"transformer": "layerwise"}),
        ("--mode speed --text-encoder-cpu-offload", dict.fromkeys(WEIGHTS[2:], "component")),
        ("--mode manual --dit-cpu-offload", {"transformer": "component"}),
        ("--layerwise-offload-components vae text_encoder_2", {"vae": "layerwise", "text_encoder_2": "layerwise"}),
        ("--layerwise-offload-modules all", dict.fromkeys(WEIGHTS, "layerwise")),
    ],
)
def test_flags_win_over_the_mode(gpu: Any, words: str, places: dict[str, str]) -> None:
    plan = make_plan(parse(words), KINDS, weight_bytes=lambda plan: SIZES)
    assert plan.offload == dict.fromkeys(WEIGHTS, "resident") | places
    assert plan.pin_memory


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--image-encoder-cpu-offload", "image_encoder_cpu_offload=true: this pipeline has no image encoder"),
        ("--dit-cpu-offload --dit-layerwise-offload", "transformer: asked to be offloaded both whole and layer by"),
        ("--layerwise-offload-components vea", "layerwise_offload_components=vea: expected all or any of transformer,"),
        ("--layerwise-offload-components vea", "did you mean vae?"),
        ("--dit-offload-prefetch-size 2", "dit_offload_prefetch_size=2: no effect without --dit-layerwise-offload"),
        ("--dit-offload-prefetch-size 2.5 --dit-layerwise-offload", "dit_offload_prefetch_size=2.5: expected 0, a"),
        ("--dit-offload-prefetch-size -1 --dit-layerwise-offload", "dit_offload_prefetch_size=-1: must be at least 0"),
        ("--pin-cpu-memory", "pin_cpu_memory=true: no effect: no component is offloaded"),
        ("--enable-torch-compile --dit-layerwise-offload", "enable_torch_compile=true: not with the layerwise offload"),
    ],
)  # fmt: skip
def test_offload_without_effect_is_an_error(gpu: Any, words: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(parse(words), KINDS)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_diffusers_backend_has_no_offload(gpu: Any) -> None:
    with pytest.raises(UserError, match="vae_cpu_offload=true: the diffusers backend has no offload"):
        make_plan(parse("--vae-cpu-offload"), KINDS, native=False)
    assert set(make_plan(parse("--mode memory"), KINDS, native=False).offload.values()) == {"resident"}


@pytest.mark.parametrize(
    ("free", "places"),
    [
        (80, {}),
        (36, {"text_encoder": "component", "text_encoder_2": "component"}),
        (30, {"text_encoder": "component", "text_encoder_2": "component", "transformer": "component"}),
        (16, {"text_encoder": "component", "text_encoder_2": "component", "transformer": "layerwise"}),
        (1, {"text_encoder": "component", "text_encoder_2": "component", "transformer": "layerwise"}),
    ],
)
def test_auto_offloads_as_much_as_it_has_to(gpu: Any, free: int, places: dict[str, str]) -> None:
    reserve = 4 * GIGABYTE
    assert residency_that_fits(SIZES, KINDS, free * GIGABYTE, reserve) == dict.fromkeys(SIZES, "resident") | places
    kept = residency_that_fits(SIZES, KINDS, free * GIGABYTE, reserve, {"transformer": "resident"})
    assert kept["transformer"] == "resident"
    gpu(free * GIGABYTE)
    plan = make_plan(parse(""), KINDS, weight_bytes=lambda plan: SIZES)
    assert plan.offload == dict.fromkeys(SIZES, "resident") | places
    assert plan.chosen == {"vae_tiling": "by size"} | ({"offload": places} if places else {})


def test_the_report_names_what_the_mode_chose(gpu: Any, flux: Path) -> None:
    plan = make_plan(parse("--mode memory --vae-cpu-offload --vae-slicing false"), KINDS)
    components = ("transformer", "text_encoder", "text_encoder_2")
    assert plan.chosen == {"vae_tiling": True, "offload": dict.fromkeys(components, "component")}
    engine = Engine.load(ServerArgs(model_path=str(flux), device="cpu", performance_mode="memory"))
    params = SamplingParams(prompt=["a cross"], height=64, width=64, num_inference_steps=1, save_output=False)
    told = engine.run(params).report.effective["performance_mode"]
    assert told == {"mode": "memory", "chose": {"vae_tiling": True, "vae_slicing": True}}


def test_auto_knows_the_size_of_a_checkpoint(gpu: Any, flux: Path) -> None:
    """Before any of its weights are read."""
    gpu(0)
    plan = resolve(ServerArgs(model_path=str(flux), device="cuda")).plan
    assert plan.offload["transformer"] == "layerwise" and plan.offload["text_encoder"] == "component"
    model = resolve(ServerArgs(model_path=str(flux), device="cpu"))
    loaded = Engine.load(ServerArgs(model_path=str(flux), device="cpu")).backend
    assert model.blueprint is not None and isinstance(loaded, NativePipeline)
    sizes = {key: sum(p.nbytes for p in loaded.parts[key].parameters()) for key in WEIGHTS}
    assert model.blueprint.weight_bytes() == sizes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--text-encoder-cpu-offload", "text_encoder_cpu_offload=true"),
        ("--layerwise-offload-components vae transformer", "layerwise_offload_components=vae transformer"),
        ("--dit-layerwise-offload --dit-offload-prefetch-size 2", "dit_layerwise_offload=true"),
        ("--dit-offload-prefetch-size 0", "dit_offload_prefetch_size=0.0"),
        ("--pin-cpu-memory", "pin_cpu_memory=true"),
    ],
)
def test_a_cpu_has_nothing_to_offload(words: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(parse(f"--device cpu {words}"), KINDS)
    assert str(caught.value) == f"{told}: on a CPU there is nothing to offload"
    accepted = make_plan(parse("--device cpu --mode memory --vae-cpu-offload false"), KINDS)
    assert set(accepted.offload.values()) == {"resident"}


def test_the_command_line_refuses_before_any_work(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sgl_diffusion.cli.main", "generate", "--prompt", "x", "--device", "cpu"]
    command += ["--dit-cpu-offload"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.endswith("dit_cpu_offload=true: on a CPU there is nothing to offload")
    assert not list(tmp_path.iterdir())
