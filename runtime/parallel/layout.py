"""Which rank does what: degrees of parallelism, derived and checked. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How many ways each thing is split; the dimensions of the mesh, the outermost first.

    Neighbouring ranks are on one host, with the fastest links: tensor parallelism, which waits for every message, has
    them first, then the all-to-alls of Ulysses. A ring hides its messages behind attention, so it may cross hosts.

    Attributes:
        dp: results of a request, over replicas of everything.
        cfg: the two branches of classifier-free guidance.
        ring, ulysses: tokens.
        tp: weights.
    """

    dp: int = 1
    cfg: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1

    @property
    def ranks(self) -> int:
        return prod(asdict(self).values())

    @property
    def sp(self) -> int:
        """Ranks that share a sequence."""
        return self.ring * self.ulysses

    def __str__(self) -> str:
        """What is split, for example `ring 2 x ulysses 4`."""
        return " x ".join(f"{name} {degree}" for name, degree in asdict(self).items() if degree > 1) or "one GPU"


def read_layout(args: ServerArgs, heads: int | None = None) -> Layout:
    """The layout that the arguments ask for.

    What is not given is derived: data, tensor and CFG parallelism are off, all GPUs that are left share the sequence,
    and of these as many do so by Ulysses as divide the heads; a ring connects the rest.

    Args:
        heads: of the denoiser; None where the model is not known yet, and is checked later.
    Raises:
        UserError: degrees that do not fit together, or not the number of heads; with the arithmetic.
    """
    dp, tp, cfg = args.dp_size or 1, args.tp_size or 1, 2 if args.enable_cfg_parallel else 1
    others = f"dp {dp} x cfg {cfg} x tp {tp} = {dp * cfg * tp}"
    sp = args.sp_degree
    if sp is None and args.ulysses_degree and args.ring_degree:
        sp = args.ulysses_degree * args.ring_degree
    if sp is None and args.num_gpus is not None:
        sp, left = divmod(args.num_gpus, dp * cfg * tp)
        if left or not sp:
            raise UserError(f"num_gpus={args.num_gpus}: must be a multiple of {others}")
    if sp is None:
        sp = (args.ulysses_degree or 1) * (args.ring_degree or 1)
    if args.num_gpus is not None and args.num_gpus != dp * cfg * tp * sp:
        raise UserError(f"num_gpus={args.num_gpus}: {others}, x sp {sp} = {dp * cfg * tp * sp}; expected the same")
    layout = Layout(dp=dp, cfg=cfg, tp=tp, **_sequence(args, sp, None if heads is None else heads // tp))
    if args.node_rank >= args.nnodes:
        raise UserError(f"node_rank={args.node_rank}: must be below nnodes={args.nnodes}")
    for name in ("dist_init_addr", "dist_timeout"):
        if layout.ranks == 1 and name in args.model_fields_set and getattr(args, name) is not None:
            raise UserError(f"{name}={getattr(args, name)}: no effect without several ranks; see num_gpus")
    if layout.ranks > 1 and args.backend == "diffusers":
        raise UserError(f"num_gpus={layout.ranks}: the diffusers backend runs on one")
    if heads is not None:
        _check_heads(layout, heads)
    if layout.ranks % args.nnodes:
        raise UserError(f"nnodes={args.nnodes}: must divide num_gpus, {layout} = {layout.ranks}")
    return layout


def _sequence(args: ServerArgs, sp: int, heads: int | None) -> dict[str, int]:
    """Degrees of the ring and of Ulysses."""
    ulysses, ring = args.ulysses_degree, args.ring_degree
    if ulysses is None:
        ulysses = sp // ring if ring else next(u for u in _divisors(sp) if heads is None or heads % u == 0)
    if ring is None:
        ring = sp // ulysses
    if ulysses * ring != sp:
        name, value = ("sp_degree", args.sp_degree) if args.sp_degree else ("num_gpus", args.num_gpus)
        raise UserError(
            f"{name}={value}: sp {sp} = ulysses x ring, but ulysses {ulysses} x ring {ring} = {ulysses * ring}"
        )
    return {"ulysses": ulysses, "ring": ring}


def _divisors(n: int) -> Iterator[int]:
    """From the largest down."""
    return (d for d in range(n, 0, -1) if n % d == 0)


def _check_heads(layout: Layout, heads: int) -> None:
    if heads % layout.tp:
        raise UserError(f"tp_size={layout.tp}: must divide the model's {heads} attention heads")
    if layout.ulysses > heads // layout.tp:
        share = f"{heads} / tp {layout.tp} = {heads // layout.tp}" if layout.tp > 1 else str(heads)
        raise UserError(
            f"ulysses_degree={layout.ulysses}: at most one rank for each attention head, of which there are {share}; "
            "use ring_degree for the rest"
        )
