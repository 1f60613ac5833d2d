"""Fields of requests: those of the OpenAI API, and those of `SamplingParams`, whose declarations are the only ones.

A body becomes `Asked`: what to draw, in the engine's words, and how to present it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from sgl_diffusion.runtime.args import SamplingParams
from sgl_diffusion.runtime.option import Options, nearest, one_line, unset, value_type
from sgl_diffusion.server.bodies import Body, read_json
from sgl_diffusion.server.errors import ApiError, bad_field

MAX_RESULTS = 10  # of one request, as OpenAI has it
MOST = {
    "num_outputs_per_prompt": MAX_RESULTS, "num_inference_steps": 1000, "num_frames": 10_000, "fps": 1000,
    "guidance_scale": 100, "guidance_scale_2": 100, "true_cfg_scale": 100,
}  # fmt: skip
"""Limits that someone at the command line does without: there, one who asks for too much waits for it himself, and sees
what becomes of a picture whose numbers overflow.
"""
STEPS_OF_QUALITY = {"low": 0.5, "high": 1.5, "hd": 1.5}  # times the model's default; the other words leave it

SERVER_OWNED = (
    "prompt_path", "output_path", "output_file_name", "save_output", "return_frames", "perf_dump_path",
    "measure_memory", "resume_latents", "profile",
)  # fmt: skip
REFUSED = {
    **dict.fromkeys(SERVER_OWNED, ": is the server's to choose"),
    "mask": ": this model takes none",
    "style": ": this model draws what the prompt says; describe the style there",
}
TOLD_OTHERWISE = ("prompt", "seed", "image_path")  # one of each over HTTP, or not a path

PositiveSize = Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")]


class CommonFields(Options):
    """What every request may say."""

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = Field(None, description="The id of the model; this server has one.")
    size: PositiveSize | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto: the model's.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of the first result, each further one adds 1. (default: 42)"
    )
    priority: int | None = Field(None, ge=-100, le=100, description="Higher goes first. (default: 0)")
    partial_images: int | None = Field(None, ge=0, le=3, description="Previews to send while it is drawn. (default: 0)")
    user: str | None = Field(None, max_length=1000, description="The end user's name; kept with the job.")
    safety_identifier: str | None = Field(None, max_length=1000, description="The newer name of `user`.")


class ImageFields(CommonFields):
    """What a request for pictures may say beside the sampling options."""

    n: int | None = Field(None, ge=1, le=MAX_RESULTS, description="Pictures to draw. (default: 1)")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="(default: b64_json)")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="Of the files. (default: png)")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP. (default: 95)")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    quality: Literal["auto", "standard", "low", "medium", "high", "hd"] | None = Field(
        None, description="low: half of the model's denoising steps; high and hd: half as many again."
    )
    moderation: Literal["auto"] | None = Field(None, description="There is none.")
    stream: bool | None = Field(None, description="Answer with server-sent events. (default: false)")
    image_path: list[str] | None = Field(
        None, description="Input pictures: data URIs, or URLs on hosts that the server allows."
    )


class VideoFields(CommonFields):
    """What a request for a clip may say beside the sampling options."""

    seconds: int | float | str | None = Field(
        None, description="Length; the nearest that the model can draw is. Not with num_frames. (default: the model's)"
    )
    output_format: Literal["mp4", "webm", "gif"] | None = Field(None, description="Of the file. (default: mp4)")
    input_reference: str | dict[str, str] | None = Field(
        None,
        description='The first frame: a file of a form, a data URI, a URL on an allowed host, or {"image_url": ...}.',
    )
    reference_url: str | None = Field(None, description="The same as a URL.")


def _with_sampling(name: str, base: type[CommonFields]) -> type[Any]:
    """`base` and the options of `SamplingParams` that a client may set: the same types, limits and words."""
    fields: dict[str, Any] = {}
    for option_name, declared in SamplingParams.model_fields.items():
        if option_name in (*SERVER_OWNED, *TOLD_OTHERWISE):
            continue
        field: FieldInfo = copy.copy(declared)
        field.default, field.default_factory, field.json_schema_extra = None, None, None
        field.description = f"{declared.description} (default: {_default(declared)})"
        annotation: Any = declared.annotation
        if option_name in MOST:
            annotation = Annotated[annotation, Field(le=MOST[option_name])]
        fields[option_name] = (annotation | None, field)
    return create_model(name, __base__=base, __doc__=base.__doc__, **fields)


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return unset(field) if value is None else str(value or "none")


GenerationBody = _with_sampling("GenerationBody", ImageFields)
VideoBody = _with_sampling("VideoBody", VideoFields)


class EditFields(ImageFields):
    """What a request to edit pictures may say beside the sampling options."""

    image: str | dict[str, str] | list[str | dict[str, str]] | None = Field(
        None, description='The pictures: files of a form, data URIs, URLs on allowed hosts, or {"image_url": ...}.'
    )
    url: str | list[str] | None = Field(None, description="The same as URLs.")


EditBody = _with_sampling("EditBody", EditFields)

Fields = TypeVar("Fields", bound=CommonFields)


def parse(model: type[Fields], body: Body) -> Fields:
    """A body's fields, checked one by one.

    Raises:
        ApiError: 400 that names the first that is unknown, refused or wrong.
    """
    for name in (*body.values, *body.files):
        if name in REFUSED:
            raise bad_field(name, REFUSED[name], code="unsupported_parameter")
        if name not in model.model_fields:
            told = f": is not a known field{nearest(name, list(model.model_fields))}"
            raise bad_field(name, told, code="unknown_parameter")
    values = dict(body.values)
    for name, value in values.items():
        if body.is_form and isinstance(value, str) and value_type(model.model_fields[name]) is dict:
            values[name] = read_json(value, name)
    try:
        return model.model_validate(values, strict=not body.is_form)
    except ValidationError as e:
        first = e.errors()[0]
        param = str(first["loc"][0])
        told = f"{param}: is missing" if first["type"] == "missing" else one_line(e)
        raise ApiError(400, told, param=param) from None


@dataclass(frozen=True)
class Asked:
    """A request in the engine's words.

    Attributes:
        sampling: fields of `SamplingParams`, without the input pictures.
        presentation: how to tell it.
        spelled: option -> the field it came from, where that has another name.
    """

    sampling: dict[str, Any]
    presentation: dict[str, Any]
    priority: int
    spelled: dict[str, str]

    def say(self, option: str, value: Any, field: str, written: Any) -> None:
        """Sets an option as a field with another name says it.

        Raises:
            ApiError: the option is given as well.
        """
        if option in self.sampling:
            raise bad_field(field, f"={written}: {option} says it too; give one of them")
        self.sampling[option], self.spelled[option] = value, field


def images_asked(fields: ImageFields, card: Mapping[str, Any]) -> Asked:
    """
    Args:
        card: of the engine, for what the words of `quality` come to.
    Raises:
        ApiError: fields that contradict one another.
    """
    asked = _asked(fields)
    if fields.n is not None:
        asked.say("num_outputs_per_prompt", fields.n, "n", fields.n)
    if factor := STEPS_OF_QUALITY.get(fields.quality or "auto"):
        if "defaults" not in card:
            told = f"={fields.quality}: this model has no steps of its own; give num_inference_steps"
            raise bad_field("quality", told)
        steps = max(1, round(factor * card["defaults"]["num_inference_steps"]))
        asked.say("num_inference_steps", steps, "quality", fields.quality)
    suffix = fields.output_format or "png"
    if (compression := fields.output_compression) is not None:
        if suffix == "png":
            raise bad_field("output_compression", ": has no effect on PNG; expected output_format jpeg or webp")
        asked.say("output_quality", max(1, compression), "output_compression", compression)
    if fields.partial_images and not fields.stream:
        raise bad_field("partial_images", f"={fields.partial_images}: needs stream=true")
    asked.presentation.update(
        response_format=fields.response_format or "b64_json",
        output_format=suffix,
        output_compression=compression,
        background="opaque",
        quality=fields.quality or "auto",
    )
    return asked


def video_asked(fields: VideoFields, card: Mapping[str, Any]) -> Asked:
    """
    Args:
        card: of the engine, for the frames that its clips can have.
    Raises:
        ApiError: fields that contradict one another.
    """
    asked = _asked(fields)
    if fields.seconds is not None:
        fps = asked.sampling.get("fps") or card.get("defaults", {}).get("fps")
        if fps is None:
            raise bad_field("seconds", f"={fields.seconds}: this model has no frame rate of its own; say fps")
        frames = nearest_frames(_seconds(fields.seconds) * fps, card.get("frame_step") or 1)
        asked.say("num_frames", frames, "seconds", fields.seconds)
    asked.presentation.update(output_format=fields.output_format or "mp4")
    return asked


def nearest_frames(frames: float, multiple: int) -> int:
    """The nearest of 1, 1 + multiple, 1 + 2 * multiple ..."""
    return 1 + multiple * max(0, round((frames - 1) / multiple))


def _seconds(value: int | float | str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:  # false for NaN too
        raise bad_field("seconds", f"={str(value)[:20]}: expected a number above 0, at most 3600")
    return seconds


def _asked(fields: CommonFields) -> Asked:
    """What all requests have."""
    sampling = fields.model_dump(include=set(SamplingParams.model_fields) - {"image_path"}, exclude_none=True)
    sampling["prompt"] = [fields.prompt]
    presentation = {
        "model": fields.model,
        "user": fields.safety_identifier or fields.user,
        "partial_images": fields.partial_images or 0,
    }
    asked = Asked(sampling, presentation, fields.priority or 0, spelled={})
    if fields.size not in (None, "auto"):
        width, height = str(fields.size).split("x")
        asked.say("width", int(width), "size", fields.size)
        asked.say("height", int(height), "size", fields.size)
    return asked


def input_references(fields: CommonFields) -> list[str]:
    """The pictures that a body names; the files of a form are not among them.

    Raises:
        ApiError: a mapping with other keys than image_url.
    """
    if isinstance(fields, VideoFields):
        named = {"input_reference": fields.input_reference, "reference_url": fields.reference_url}
    else:
        assert isinstance(fields, ImageFields)
        named = {name: getattr(fields, name, None) for name in ("image", "url", "image_path")}
    found: list[str] = []
    for name, value in named.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                if set(item) != {"image_url"}:
                    raise bad_field(name, ': expected {"image_url": ...}')
                item = item["image_url"]
            if item is not None:
                found.append(item)
    return found


def body_schema(model: type[CommonFields], files: tuple[str, ...] = ()) -> dict[str, Any]:
    """OpenAPI's `requestBody`: the same fields as JSON, and as a form where some may be files."""
    schema = model.model_json_schema()
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if files:
        form = copy.deepcopy(schema)
        for name in files:
            binary = {"type": "string", "format": "binary"}
            form["properties"][name] = {"anyOf": [binary, {"type": "array", "items": binary}]}
        content["multipart/form-data"] = {"schema": form}
    return {"requestBody": {"required": True, "content": content}}
