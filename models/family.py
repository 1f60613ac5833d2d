"""What the runtime asks of a model family, and the small records that cross the boundary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

AttentionFn = Callable[..., Tensor]
"""`attention(q_BLHK, k_BLHK, v_BLHK, *, out=None) -> out_BLHK`; the runtime chooses the backend behind it."""

Tensors = Any
"""Tensors in tuples, lists and dataclasses, which may hold plain numbers too."""


Execute = Callable[..., tuple[Tensor, ...]]
"""`execute(function, *arguments)`: runs a pure function of tensors, as it stands or as a captured graph."""


def eager(function: Callable[..., Any], *arguments: Tensors) -> tuple[Tensor, ...]:
    """Runs a function as it stands."""
    result: tuple[Tensor, ...] = function(*arguments)
    return result


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
    frames: int = 1


@dataclass(frozen=True)
class Preset:
    """Component configs of a published checkpoint, so that it can be built at true size without a download."""

    components: Mapping[str, Mapping[str, Any]]  # component -> config.json
    defaults: Defaults


@dataclass(frozen=True)
class Size:
    """A picture's size in pixels, or a video's, with its frames."""

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class Guidance:
    """`embedded` is fed to a guidance-distilled model; `true_cfg` > 1 runs a second, negative branch."""

    embedded: float | None
    true_cfg: float = 1.0


@dataclass(frozen=True)
class Condition:
    """Encoded prompts of a batch: named tensors with the batch first."""

    tensors: Mapping[str, Tensor]

    def repeat(self, times: int) -> Condition:
        """Every prompt `times` times in a row."""
        return Condition({k: v.repeat_interleave(times, dim=0) for k, v in self.tensors.items()})


class Family(Protocol):
    """A family's pipeline: stateless but for its loaded parts. All tensors live on the parts' device."""

    @classmethod
    def components(cls) -> Mapping[str, str]:
        """Component key -> kind: `denoiser`, `vae`, `text_encoder`, `tokenizer` or `scheduler`."""

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
    ) -> nn.Module:
        """The native module of a `denoiser` or `vae`, without weights (call it under a meta device)."""

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        """Defaults of a checkpoint with these component configs."""

    def __init__(self, parts: Mapping[str, Any]) -> None: ...

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int) -> None:
        """Raises ValueError for a request this checkpoint cannot honour, naming the field."""

    def encode(self, prompts: Sequence[str], max_sequence_length: int, execute: Execute = eager) -> Condition:
        """Raises PromptTooLong."""

    def image_tokens(self, size: Size) -> int:
        """Length of the image sequence the denoiser sees, which dynamic timestep shifting depends on."""

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        """The initial state x, one generator a picture, so that a picture does not depend on its neighbours."""

    def predictor(self, condition: Condition, size: Size, guidance: Guidance, sigmas: Sequence[float]) -> Predictor:
        """`sigmas` run from 1 (noise) to 0, one more than there are steps. Does what a request needs once."""

    @classmethod
    def example(cls, configs: Mapping[str, Mapping[str, Any]]) -> Condition:
        """Zeros in the shapes of one prompt's condition at default length, on the current device."""

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        """What diffusers' denoiser takes for one call, of zeros on the current device."""

    def decode(self, x: Tensor, size: Size) -> Tensor:
        """State -> pictures (B, 3, H, W) in [-1, 1]."""
