"""What the runtime asks of a model family, and the small records that cross the boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from PIL.Image import Image
from torch import Tensor, nn

AttentionFn = Callable[..., Tensor]
"""`attention(q_BLHK, k_BLHK, v_BLHK, *, out=None, code_scale=None)` -> out_BLHK, as `kernels.attention`."""
"""`attention(q_BLHK, k_BLHK, v_BLHK, *, out=None) -> out_BLHK`; the runtime chooses the backend behind it.

A `Split` over ranks that pass keys on asks for `return_lse=True` as well: (out_BLHK, lse_BHL), natural logarithms of
the softmax sums, contiguous and in fp32.
"""

Tensors = Any
"""Tensors in tuples, lists and dataclasses, which may hold plain numbers too."""


Execute = Callable[..., tuple[Tensor, ...]]
"""`execute(function, *arguments)`: runs a pure function of tensors, as it stands or as a captured graph."""


def eager(function: Callable[..., Any], *arguments: Tensors) -> tuple[Tensor, ...]:
    """Runs a function as it stands."""
    result: tuple[Tensor, ...] = function(*arguments)
    return result


class Split(Protocol):
    """How the tokens of a sequence are spread over ranks, each of which computes on its own and has all weights.

    A sequence consists of streams, such as text and picture, and every stream is spread by itself: what a rank has of
    the sequence is its run of the first stream, then its run of the second.
    """

    @property
    def ranks(self) -> int: ...

    def own(self, tokens: int) -> slice:
        """Which tokens of a stream of so many are this rank's."""

    def whole(self, own_BLD: Tensor, tokens: int) -> Tensor:
        """All tokens of a stream, in order, from every rank's own."""

    def attend(
        self,
        attention: AttentionFn,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        streams: Sequence[int],
        *,
        replicated: int = 0,
        out: Tensor | None = None,
        code_scale: Tensor | None = None,
    ) -> Tensor:
        """What this rank's tokens see of those of all ranks.

        Args:
            streams: how many tokens there are of each, over all ranks, in the order in which they lie here.
            replicated: so many streams, the first ones, are not spread: every rank has, and gets, all of them.
            out, code_scale: as of `kernels.attention`.
        """


class OneRank:
    """A `Split` over one rank: everything is here."""

    ranks = 1

    def own(self, tokens: int) -> slice:
        return slice(0, tokens)

    def whole(self, own_BLD: Tensor, tokens: int) -> Tensor:
        return own_BLD

    def attend(
        self,
        attention: AttentionFn,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        streams: Sequence[int],
        *,
        replicated: int = 0,
        out: Tensor | None = None,
        code_scale: Tensor | None = None,
    ) -> Tensor:
        coded = {} if code_scale is None else {"code_scale": code_scale}
        return attention(q_BLHK, k_BLHK, v_BLHK, out=out, **coded)


ONE_RANK = OneRank()


@dataclass(frozen=True)
class Spread:
    """How ranks share the weights of a linear layer (tensor parallelism: Shoeybi et al. 2019, arXiv 1909.08053).

    Every rank has some of its outputs, or reads some of its inputs, of which ranks then sum what they get. A module
    declares it for the layers that it names: `tensor_parallel = {"to_qkv": outputs(1, 1, 1), "to_out.0": inputs()}`.
    Where it has a `head_dim`, no head is cut.

    Attributes:
        parts: shares of the layer's outputs or inputs, which lie side by side; a rank has its run of each.
    """

    of: Literal["outputs", "inputs"]
    parts: tuple[int, ...]


def outputs(*parts: int) -> Spread:
    return Spread("outputs", parts or (1,))


def inputs(*parts: int) -> Spread:
    return Spread("inputs", parts or (1,))


@dataclass(frozen=True)
class OriginalNames:
    """What the authors of a denoiser call the weights that diffusers renames; its class has it as `original_names`.

    Attributes:
        names: theirs -> diffusers', of layers or of whole tensors. "{}" stands for the number of a block. What
            diffusers keeps in several layers has their names and their shares of the rows.
        swapped: diffusers' names of layers whose halves of rows are the other way round.
    """

    names: Mapping[str, str | Mapping[str, int]]
    swapped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Predictor:
    """A denoiser made ready for a request: `predictor(x, step) -> velocity`, both in the shape of the state x.

    Attributes:
        call: `call(x, step's tensors, *request's tensors)`, a pure function of tensors on the device and the same
            object for every request, so that one captured call serves them all.
        request: what the request fixes.
        steps: what each step adds.
    """

    call: Callable[..., Tensor]
    request: tuple[Tensors, ...]
    steps: Sequence[Tensors]

    def __call__(self, x: Tensor, step: int) -> Tensor:
        return self.call(x, self.steps[step], *self.request)


@dataclass(frozen=True)
class Defaults:
    """What a request gets where the user said nothing. A checkpoint may override them in `sampling_defaults.json`."""

    num_inference_steps: int
    guidance_scale: float | None
    height: int
    width: int
    max_sequence_length: int
    num_frames: int = 1
    fps: int | None = None  # of a clip
    guidance_scale_2: float | None = None  # of the second denoiser, where there is one; None for that of the first
    true_cfg_scale: float = 1.0  # of a negative branch that a negative prompt asks for, where it is not the only kind


@dataclass(frozen=True)
class Preset:
    """Component configs of a published checkpoint, so that it can be built at true size without a download.

    `pipeline_class` is its `_class_name` in `model_index.json`.
    """

    components: Mapping[str, Mapping[str, Any]]  # component -> config.json; SETTINGS -> those of model_index.json
    defaults: Defaults
    pipeline_class: str


ENCODERS = ("text_encoder", "image_encoder")
"""Kinds of components that are models of transformers."""

SETTINGS = "model_index"
"""Stands among the component keys for the plain values in `model_index.json`."""


@dataclass(frozen=True)
class Size:
    """A picture's size in pixels, or a video's, with its frames."""

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class Guidance:
    """`embedded` is fed to a guidance-distilled model; `true_cfg` > 1 runs a second, negative branch.

    `true_cfg_2` is the strength while a second denoiser works, None for that of the first.
    """

    embedded: float | None
    true_cfg: float = 1.0
    true_cfg_2: float | None = None


@dataclass(frozen=True)
class Phase:
    """Consecutive steps that one denoiser (a component's key) takes, with guidance of one strength."""

    denoiser: str
    steps: range
    scale: float


@dataclass(frozen=True)
class Distilled:
    """How a model that was distilled to few steps is sampled (DMD: Yin et al. 2024, arXiv 2405.14867)."""

    timesteps: tuple[int, ...]  # in thousandths, before the shift
    shift: float


@dataclass(frozen=True)
class Condition:
    """What a model is told of a result, or of several alike: named tensors with the batch first."""

    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        return tuple(tensor.shape for tensor in self.tensors.values())

    @classmethod
    def batch(cls, conditions: Sequence[Condition]) -> Condition:
        """Of several of equal shapes, in their order."""
        if len(conditions) == 1:
            return conditions[0]
        return cls({k: torch.cat([c.tensors[k] for c in conditions]) for k in conditions[0].tensors})

    def __or__(self, other: Condition) -> Condition:
        """With another's tensors."""
        return Condition({**self.tensors, **other.tensors})


def check_step(name: str, n: int, step: int, first: int | None = None) -> None:
    """Raises ValueError, with the nearest ones, for a number that is none of first, first + step, first + 2 step ...

    Args:
        first: None for `step`: a multiple of it.
    """
    first = step if first is None else first
    if (n - first) % step or n < first:
        below = first + max(0, (n - first) // step) * step
        nearest = f"{below} or {below + step}" if n > first else str(first)
        rule = f"a multiple of {step}" if first == step else f"{step} k + {first}"
        raise ValueError(f"{name}={n}: must be {rule}; nearest: {nearest}")


@dataclass(frozen=True)
class Read:
    """What a family reads of a language model: states between its layers, never the head that tells the next token.

    Attributes:
        layers: the end of a slice of its layers, up to which they are read; None: all. Where it is not all, the final
            norm is not applied either.
    """

    layers: int | None = None


class Family(Protocol):
    """A family's pipeline: stateless but for its loaded parts. All tensors live on the parts' device.

    Attributes:
        draws_video: results are clips.
        classifier_free: `guidance_scale` is the strength of a negative branch, and an empty negative prompt the
            default; otherwise it is fed to the model.
        unguided_scale: the `guidance_scale` that leaves the positive branch as it is, which runs alone then.
        keeps_norm: guided velocities are as long, token by token, as those of the positive branch.
        distilled: None for a model that its checkpoint's scheduler samples.
        exact_tiles: what is decoded in tiles is what is decoded as a whole, up to rounding.
        language_models: what is read of those that are text encoders, by component. The rest is not loaded.
    """

    draws_video: bool
    exact_tiles: bool
    classifier_free: bool
    unguided_scale: float
    keeps_norm: bool
    distilled: Distilled | None
    language_models: Mapping[str, Read]

    @classmethod
    def components(cls) -> Mapping[str, str]:
        """Component key -> kind: `denoiser`, `vae`, `text_encoder`, `image_encoder`, `tokenizer`, `image_processor` (of
        transformers), `processor` (the family's own) or `scheduler`."""

    @classmethod
    def optional(cls) -> frozenset[str]:
        """Keys of those that a checkpoint may lack."""

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        """Published checkpoints by hub id."""

    @classmethod
    def build(
        cls,
        component: str,
        config: Mapping[str, Any],
        attention: AttentionFn,
        options: Mapping[str, Any],
        split: Split = ONE_RANK,
    ) -> nn.Module:
        """The native module of a `denoiser` or `vae`, without weights (call it under a meta device), or of a
        `processor`, which has none. `split` is of a denoiser's tokens."""

    @classmethod
    def encodes_pictures(cls, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether requests to such a checkpoint may hold pictures, which its VAE's encoder is for."""

    @classmethod
    def attention_heads(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Of every denoiser's attention: what ranks that share a sequence or weights share."""

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        """Defaults of a checkpoint with these component configs."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        """`parts` are by component, and the settings of `model_index.json` by SETTINGS."""

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int, pictures: int) -> None:
        """Raises ValueError for a request this checkpoint cannot honour, naming the field; `pictures` are given."""

    def fitting_size(self, pictures: Sequence[Image], defaults: Defaults) -> tuple[int, int]:
        """Height and width of a result from these pictures, where nobody said. Raises ValueError for pictures that
        cannot be taken."""

    def encode(
        self, prompt: str, max_sequence_length: int, pictures: Sequence[Image] = (), execute: Execute = eager
    ) -> Condition:
        """Of one prompt, as long as the family has it; of the pictures beside it, what a text encoder sees in them.

        Raises:
            PromptTooLong: it has more than `max_sequence_length` tokens.
        """

    def encode_pictures(self, pictures: Sequence[Image], size: Size, execute: Execute = eager) -> Condition:
        """What else the denoiser is told of them. Families whose `check` takes no pictures do without."""

    def image_tokens(self, size: Size) -> int:
        """Length of the sequence that is drawn, which dynamic timestep shifting depends on."""

    def noise_levels(self, steps: int) -> Sequence[float] | None:
        """Where the steps begin, from 1 down, before any shift; None for what the scheduler makes of their number."""

    def dynamic_shift(self, size: Size, steps: int) -> float | None:
        """The logarithm (mu) of how much noise levels are shifted; None for the scheduler's own line through
        `image_tokens`."""

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        """The initial state x, one generator a picture, so that a picture does not depend on its neighbours."""

    def phases(self, timesteps: Sequence[float], guidance: Guidance) -> Sequence[Phase]:
        """Which denoiser takes which steps, in order. Timesteps are in thousandths."""

    def predictor(
        self, condition: Condition, size: Size, guidance: Guidance, timesteps: Sequence[float], denoiser: str
    ) -> Predictor:
        """One denoiser made ready for its own steps. Does what a request needs once."""

    def finished(self, x: Tensor, condition: Condition) -> Tensor:
        """The final state of the last step, with what the condition holds fixed."""

    @classmethod
    def examples(cls, configs: Mapping[str, Mapping[str, Any]]) -> Sequence[Condition]:
        """Zeros in the shapes of conditions, on the current device: the usual one first, then those that differ from it
        in which kernels they need (a length that 16 does not divide, pictures beside the text)."""

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        """What diffusers' denoiser takes for one call, of zeros on the current device."""

    def decode(self, x: Tensor, size: Size, execute: Execute = eager) -> Iterator[Tensor]:
        """State -> pictures (B, 3, H, W) in [-1, 1], or chunks (B, 3, F, H, W) of clips in their order."""
