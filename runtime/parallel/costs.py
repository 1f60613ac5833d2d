"""What a step takes in a layout: an analytic model of its time, and the bytes each rank sends. Torch-free.

    step = products + attention + all else + what of the communication nothing hides

Every term is the first rank's, which has the most tokens and heads. Products and attention take their FLOPs over the
rate of this device; all else takes the bytes it moves over the bandwidth of a copy, and a product whichever is longer.
Ranks wait for all-to-alls, all-reduces and all-gathers; of a ring's exchanges they wait for what attention to the block
before does not hide. Latency and bandwidth are those of the slowest link that a collective needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from sgl_diffusion.runtime.parallel.layout import Layout
from sgl_diffusion.runtime.parallel.links import Links
from sgl_diffusion.runtime.parallel.volume import Attended, attend_bytes, share_size, whole_bytes

MERGED = 4  # bytes of an fp32 result, which a ring merges block by block


@dataclass(frozen=True)
class Rates:
    """What one device reaches in products of large matrices, in attention, and in a copy."""

    name: str
    source: str
    matmul_tflop_per_s: float
    attention_tflop_per_s: float
    copy_gb_per_s: float


@dataclass(frozen=True)
class Machine:
    """Devices and what joins them, within a host and between hosts."""

    rates: Rates
    within: Links
    between: Links
    gpus_per_host: int


# -- what a rank computes -----------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """All tokens of a stream brought together: a call of `Split.whole`."""

    batch: int
    tokens: int
    width: int
    itemsize: int


@dataclass(frozen=True)
class BranchWork:
    """One branch of a step on the first of the ranks that share it; attention over all ranks' tokens is apart.

    Attributes:
        attended, gathered: and how often.
        flops, bytes: of all else, by class of operation.
        reduces, reduced: all-reduces among the ranks that share the weights, and bytes that each rank sends in them.
    """

    attended: Mapping[Attended, int]
    gathered: Mapping[Gathered, int]
    flops: Mapping[str, int]
    bytes: Mapping[str, int]
    reduces: int
    reduced: int


@dataclass(frozen=True)
class StepWork:
    """The branches of a step, and the size of what each comes to, which ranks of CFG parallelism exchange."""

    branches: Sequence[BranchWork]
    velocity_bytes: int


@dataclass(frozen=True)
class Prediction:
    """A step in a layout. Times are in milliseconds; `sent` is by dimension of the mesh, in bytes a rank.

    Attributes:
        waits: for communication that nothing hides, by dimension.
    """

    layout: Layout
    products: float
    attention: float
    rest: float
    waits: Mapping[str, float]
    sent: Mapping[str, int]

    @property
    def step_ms(self) -> float:
        return self.products + self.attention + self.rest + sum(self.waits.values())

    @property
    def sent_bytes(self) -> int:
        return sum(self.sent.values())


# -- what it takes ------------------------------------------------------------------


def predict(work: StepWork, layout: Layout, machine: Machine) -> Prediction:
    """A step of that work, which has to be of the layout's sequence and weight shares."""
    each = [_branch(branch, layout, machine) for branch in work.branches]
    if layout.cfg == 1:
        return _sum(each)
    longest = max(each, key=lambda p: p.step_ms)
    sent = (layout.cfg - 1) * work.velocity_bytes
    wait = _wait(machine, layout, "cfg", "all_gather", 1, sent)
    return replace(longest, waits={**longest.waits, "cfg": wait}, sent={**longest.sent, "cfg": sent})


def _sum(each: Sequence[Prediction]) -> Prediction:
    """One branch after the other."""
    waits, sent = defaultdict[str, float](float), defaultdict[str, int](int)
    for p in each:
        for of in p.waits:
            waits[of] += p.waits[of]
            sent[of] += p.sent[of]
    times = {of: sum(getattr(p, of) for p in each) for of in ("products", "attention", "rest")}
    return replace(each[0], **times, waits=dict(waits), sent=dict(sent))


def _branch(work: BranchWork, layout: Layout, machine: Machine) -> Prediction:
    rates = machine.rates
    waits, sent = defaultdict[str, float](float), defaultdict[str, int](int)
    products = max(_flops_ms(work.flops.get("gemm", 0), rates), _bytes_ms(work.bytes.get("gemm", 0), rates))
    attention = work.flops.get("attention", 0) / rates.attention_tflop_per_s / 1e9
    moved = sum(size for of, size in work.bytes.items() if of not in ("gemm", "attention"))

    def send(dimension: str, collective: str, calls: int, size: int) -> None:
        if size:
            sent[dimension] += size
            waits[dimension] += _wait(machine, layout, dimension, collective, calls, size)

    for of, n in work.attended.items():
        spread_ms = _attended_flops(of, layout) / rates.attention_tflop_per_s / 1e9
        attention += n * spread_ms
        moved += n * _repacked_bytes(of, layout)
        each = attend_bytes(of, layout.ulysses, layout.ring)
        send("ulysses", "all_to_all", 2 * n, n * each.all_to_all)
        send("sp", "all_gather", n * of.replicated, n * each.all_gather)
        if layout.ring > 1:
            sent["ring"] += n * each.exchange
            block = _wait(machine, layout, "ring", "exchange", 1, each.exchange / (layout.ring - 1))
            waits["ring"] += n * (layout.ring - 1) * max(0.0, block - spread_ms / layout.ring)
    for stream, n in work.gathered.items():
        whole = whole_bytes(stream.tokens, stream.width, stream.itemsize, layout.sp, stream.batch)
        send("sp", "all_gather", n, n * whole)
    send("tp", "all_reduce", work.reduces, work.reduced)
    return Prediction(layout, products, attention, _bytes_ms(moved, rates), dict(waits), dict(sent))


def _flops_ms(flops: int, rates: Rates) -> float:
    return flops / rates.matmul_tflop_per_s / 1e9


def _bytes_ms(moved: float, rates: Rates) -> float:
    return moved / rates.copy_gb_per_s / 1e6


def _seen(of: Attended, layout: Layout) -> int:
    """Pairs of a query and a head of the first rank, among those who exchange heads."""
    ranks = range(layout.ulysses)
    queries = sum(share_size(tokens, layout.sp, rank) for tokens in of.streams for rank in ranks)
    return queries * share_size(of.heads, layout.ulysses, 0)


def _attended_flops(of: Attended, layout: Layout) -> int:
    """Of scores, and of their sum over values."""
    return 4 * of.batch * _seen(of, layout) * of.head_dim * sum(of.streams)


def _repacked_bytes(of: Attended, layout: Layout) -> int:
    """Read and written: q, k, v as messages and the result out of them; for a ring, k and v, and results merged."""
    numbers = of.batch * of.head_dim
    own = numbers * of.heads * sum(share_size(tokens, layout.sp, 0) for tokens in of.streams)
    seen = numbers * _seen(of, layout)
    packed = 2 * of.itemsize * 4 * own if layout.ulysses > 1 else 0
    if layout.ring > 1:
        packed += 2 * of.itemsize * 2 * seen + (layout.ring - 1) * (2 * MERGED + of.itemsize) * seen
    return packed


def _wait(machine: Machine, layout: Layout, dimension: str, collective: str, calls: int, sent: float) -> float:
    """Of so many collectives, in which a rank sends so many bytes in all."""
    inside, outside = _peers(layout, dimension, machine.gpus_per_host)
    if collective == "all_to_all":  # messages of their own to every peer, which travel at once
        ways = [(machine.within, inside), (machine.between, outside)]
        parts = [(links, sent * peers / (inside + outside)) for links, peers in ways if peers]
    else:  # from rank to rank, at the pace of the slowest link
        parts = [(machine.between if outside else machine.within, sent)]
    return max(calls * links.lines[collective].ms(part / calls) for links, part in parts) if calls else 0.0


def _peers(layout: Layout, dimension: str, gpus_per_host: int) -> tuple[int, int]:
    """How many others the first rank has along a dimension, on its host and on others."""
    sizes = asdict(layout) | {"sp": layout.sp}
    inner = {"tp": 1, "ulysses": layout.tp, "sp": layout.tp, "ring": layout.tp * layout.ulysses}
    stride = inner.get(dimension, layout.tp * layout.sp)
    others = [stride * i for i in range(1, sizes[dimension])]
    inside = sum(rank < gpus_per_host for rank in others)
    return inside, len(others) - inside


# -- which layout -------------------------------------------------------------------


def best(predictions: Iterable[Prediction]) -> Prediction:
    """The fastest; of several, that which sends the least."""
    return min(predictions, key=lambda p: (p.step_ms, p.sent_bytes))


def slower_than_fewer(chosen: Prediction, fewer: Iterable[Prediction]) -> str | None:
    """What to warn of, in one line, if one of the layouts of fewer GPUs is predicted to be faster."""
    fewer = [p for p in fewer if p.layout.ranks < chosen.layout.ranks]
    if not fewer or (faster := best(fewer)).step_ms >= chosen.step_ms:
        return None
    waits = sum(chosen.waits.values())
    return (
        f"a step is predicted to take {chosen.step_ms:,.2f} ms on {_gpus(chosen.layout)}, {waits:,.2f} ms of it "
        f"waiting for {chosen.sent_bytes / 1e6:,.1f} MB; {faster.step_ms:,.2f} ms on {_gpus(faster.layout)}"
    )


def _gpus(layout: Layout) -> str:
    return "one GPU" if layout.ranks == 1 else f"{layout.ranks} GPUs ({layout})"
