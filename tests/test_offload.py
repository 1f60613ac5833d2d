"""Offloaded weights, on a device that stands in for a GPU and shows what a forgotten wait or a stray read would do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import build_flux
from torch import Tensor, nn

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.family import Condition, Guidance, Size
from sgl_diffusion.models.qwen_image import QwenImage
from sgl_diffusion.models.wan import Wan
from sgl_diffusion.runtime import offload
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.events import StepDone
from sgl_diffusion.runtime.offload import Offloaded
from sgl_diffusion.runtime.pipeline import NativePipeline
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

    return engine.backend.run(engine.backend.prepare(resolve_request(params, {}, engine.args)), Stopwatch(CPU), record)


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
        told = engine.backend.offload.report({"transformer": STEPS})[key]
        assert told["host"] == "mapped files" and told["mapped_bytes"] > told["pinned_bytes"] == told["host_bytes"] == 0
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


WAN = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "ffn_dim": 96, "text_dim": 40}
QWEN = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 3, "joint_attention_dim": 40}


@pytest.mark.parametrize(("family", "small", "share"), [(Wan, WAN, 0.8), (QwenImage, QWEN, 0.6)])
def test_families_that_work_before_the_loop(family: Any, small: dict[str, Any], share: float) -> None:
    """Wan's blocks read the text once a request, before the first step; Qwen-Image's modulation is computed then."""
    config = next(iter(family.presets().values())).components["transformer"] | small
    with torch.device("meta"):
        module = family.build("transformer", config, attention, {})
    fill_dummy(module.requires_grad_(False), CPU, torch.float32)
    model, size = family({"transformer": module}), Size(32, 32, 5 if family is Wan else 1)
    condition = Condition({"encoder_hidden_states": torch.ones(1, 5, 40)})

    def velocity() -> Tensor:
        x = model.noise(size, [torch.Generator().manual_seed(1)])
        return model.predictor(condition, size, Guidance(None), (1000.0,), "transformer")(x, 0)

    resident = velocity()
    component = Offloaded("transformer", module, StandIn(), prefetch=0.0, cyclic=True, pin=True)
    with component.on_device():
        assert torch.equal(velocity(), resident)
    told = component.report(steps=1)
    assert (told["late_layers"], told["layers"]) == (0, 3)
    # two of three blocks; with Qwen-Image's modulation, which is half as large as all of them, it would be 0.78
    assert told["device_bytes"] < share * told["host_bytes"]


def test_what_works_before_the_first_step_leaves_with_it(flux: Path) -> None:
    streams = StandIn()
    engine = load(flux, streams, {"transformer": "layerwise"})
    assert isinstance(engine.backend, NativePipeline)
    denoiser = engine.backend.parts["transformer"]
    blocks = [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
    early = [p for name in denoiser.before_first_step for p in denoiser.get_submodule(name).parameters()]
    assert sum(p.nbytes for p in early) > 0.2 * sum(p.nbytes for p in denoiser.parameters())
    present: dict[str, list[bool]] = {"before": [], "steps": []}

    def note(when: str) -> None:
        present[when].append(any(storage(p) in map(storage, streams.spaces) for p in early))

    for layer in denoiser.modulation.slices:
        layer.register_forward_hook(lambda *_: note("before"))
    for block in blocks:
        block.register_forward_hook(lambda *_: note("steps"))
    drawn(engine, REQUESTS[0])
    assert all(present["before"]) and len(present["before"]) == len(denoiser.modulation.slices) > 1
    assert not any(present["steps"]) and len(present["steps"]) == STEPS * len(blocks)

    told = engine.backend.offload.report({"transformer": STEPS})["transformer"]
    largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    stem = sum(p.nbytes for p in (*denoiser.x_embedder.parameters(), *denoiser.proj_out.parameters()))
    assert told["device_bytes"] == pytest.approx(stem + 2 * largest, rel=0.05)
    taken = sum(space.numel() for space in streams.spaces)
    assert taken == told["device_bytes"] == engine.backend.memory.weights["transformer"].at_work
    assert told["late_layers"] == 0
    once = told["copied_bytes"] - STEPS * told["copied_bytes_per_step"]
    assert once >= stem + sum(p.nbytes for p in early)
    drawn(engine, REQUESTS[1])  # a batch of a new shape is computed apart, too, and compared
    engine.backend.offload.report({"transformer": STEPS})
    drawn(engine, REQUESTS[1])  # a negative prompt's branch begins anew with the first of them
    assert engine.backend.offload.report({"transformer": STEPS})["transformer"]["late_layers"] == 1


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
