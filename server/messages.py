"""What the API process and the engine process tell each other: JSON, an object a line, over a socket. Torch-free.

They meet in a folder that the API process makes. `Load` lies there; orders go over the line; the engine answers `Ready`
or `LoadFailed`, then tells how they go. Of every job in a `Draw` it tells exactly one end: `Finished` (after
`Drawn`), `Failed`, `Cancelled` or `Kept`, unless the process dies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sgl_diffusion.runtime.checked import Checked
from sgl_diffusion.server.jobs import Failure, ResultFile

LOAD, LINE, LAST_WORDS = "load.json", "line", "last_words.json"  # files of that folder


class Message(BaseModel):
    """Bytes travel as base64."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    def line(self) -> bytes:
        return self.model_dump_json().encode() + b"\n"


# -- to the engine ----------------------------------------------------------------------


class Load(Message):
    """`server_args` are those of `ServerArgs`; results go under `data_dir`."""

    kind: Literal["load"] = "load"
    server_args: Mapping[str, Any]
    data_dir: str
    log_format: Literal["text", "json"]


class Check(Message):
    """Could it be drawn? `call` comes back with the answer."""

    kind: Literal["check"] = "check"
    call: int
    sampling: Mapping[str, Any]


class DrawnJob(Message):
    """A job as the engine needs it: see `jobs.Job`."""

    id: str
    sampling: Mapping[str, Any]
    presentation: Mapping[str, Any]


class Draw(Message):
    """Jobs to draw in one batch: they differ in prompt and seed alone.

    Attributes:
        snapshot_every: steps between snapshots; 0: none.
    """

    kind: Literal["draw"] = "draw"
    jobs: Sequence[DrawnJob]
    snapshot_every: int


class Prepare(Message):
    """An order that may be given soon: `Begin` gives it, `Drop` or any other order says that it will not be."""

    kind: Literal["prepare"] = "prepare"
    order: Draw


class Begin(Message):
    kind: Literal["begin"] = "begin"


class Drop(Message):
    kind: Literal["drop"] = "drop"


class Cancel(Message):
    kind: Literal["cancel"] = "cancel"
    job: str


class Keep(Message):
    """Stop after this step, and keep what there is: the server shuts down."""

    kind: Literal["keep"] = "keep"


Order = Check | Draw | Prepare | Begin | Drop | Cancel | Keep


# -- from the engine --------------------------------------------------------------------


class Ready(Message):
    """The model is loaded and warm. The card is `Engine.card()`."""

    kind: Literal["ready"] = "ready"
    card: Mapping[str, Any]


class LoadFailed(Message):
    """The process ends after this."""

    kind: Literal["load_failed"] = "load_failed"
    message: str
    is_user_error: bool


class RankFailed(Message):
    """The last words of an engine that runs on several ranks, of which one failed or died."""

    kind: Literal["rank_failed"] = "rank_failed"
    message: str
    is_user_error: bool


class CheckPassed(Message):
    kind: Literal["check_passed"] = "check_passed"
    call: int
    checked: Checked


class CheckRefused(Message):
    """`message` is that of a `UserError`, or, if it is not the user's mistake, of a `RunFailure`."""

    kind: Literal["check_refused"] = "check_refused"
    call: int
    message: str
    is_user_error: bool


class Progress(Message):
    """Of all jobs of the batch that go on."""

    kind: Literal["progress"] = "progress"
    jobs: Sequence[str]
    stage: str
    step: int
    steps: int


class Preview(Message):
    kind: Literal["preview"] = "preview"
    job: str
    index: int
    step: int
    data: bytes


class Drawn(Message):
    """The results are in the job's folder."""

    kind: Literal["drawn"] = "drawn"
    job: str
    results: Sequence[ResultFile]


class Finished(Message):
    """So is the report, if the disk took it."""

    kind: Literal["finished"] = "finished"
    job: str


class Failed(Message):
    kind: Literal["failed"] = "failed"
    job: str
    failure: Failure


class Cancelled(Message):
    kind: Literal["cancelled"] = "cancelled"
    job: str


class Kept(Message):
    """Stopped by `Keep`; the job can go on from its snapshot."""

    kind: Literal["kept"] = "kept"
    job: str


class Broken(Message):
    """The process ends after this: the device no longer works for it."""

    kind: Literal["broken"] = "broken"
    reason: str


JobMessage = Progress | Preview | Drawn | Finished | Failed | Cancelled | Kept
Answer = Ready | LoadFailed | RankFailed | CheckPassed | CheckRefused | Broken | JobMessage

_order: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="kind")])
_answer: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="kind")])


def read_order(line: bytes) -> Order:
    return _order.validate_json(line)


def read_answer(line: bytes) -> Answer:
    return _answer.validate_json(line)
