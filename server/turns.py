"""Whose turn it is. Higher priorities go first; within one, the tenants share the engine. Torch-free.

Start-time fair queueing: a job's turn is the work that its tenant has waiting before it and its own, counted from the
turn that was claimed last. The lowest turn is claimed first, equals in the order in which they came. So a tenant with
two jobs does not wait for the hundred of another, and one that was away has nothing saved up. Each priority has a
clock of its own, or one urgent job of a tenant would put its others, and newcomers, behind everyone.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy import bindparam, func, select

from sgl_diffusion.server.jobs import NewJob, Status
from sgl_diffusion.server.tables import clocks, jobs, schema

WAITS = jobs.c.status == Status.QUEUED

# statements of every request are built once: that takes longer than to run them
_count = select(func.count()).select_from(jobs).where(WAITS)
_line_up = select(schema.c.version).with_for_update()
_state_of_queue = select(
    _count.scalar_subquery(),
    select(clocks.c.virtual_time).where(clocks.c.priority == bindparam("priority")).scalar_subquery(),
    select(func.max(jobs.c.turn))
    .where(jobs.c.tenant == bindparam("tenant"), jobs.c.priority == bindparam("priority"), WAITS)
    .scalar_subquery(),
)
_in_turn = select(jobs).where(WAITS).order_by(jobs.c.priority.desc(), jobs.c.turn, jobs.c.seq)
_next = _in_turn.limit(bindparam("limit")).with_for_update(skip_locked=True)
_next_of_batch = (
    _in_turn.where(jobs.c.batch_key == bindparam("key")).limit(bindparam("limit")).with_for_update(skip_locked=True)
)
_new_clock = clocks.insert()
_advance = (
    clocks.update()
    .where(clocks.c.priority == bindparam("of"), clocks.c.virtual_time < bindparam("turn"))
    .values(virtual_time=bindparam("turn"))
)


class QueueFull(Exception):
    """No more jobs may wait. `waiting`: how many do."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} jobs are waiting already")
        self.waiting = waiting


def line_up(db: sa.Connection) -> None:
    """Waits until no other transaction adds a job: turns, the queue's length and `seq` are in one order."""
    if db.dialect.name != "sqlite":  # whose writers line up where they begin
        db.execute(_line_up)


def turn_of(db: sa.Connection, new: NewJob, max_queue_size: int) -> tuple[float, bool]:
    """The turn of a job that is about to be added, and whether it is the next: nothing waits.

    Raises:
        QueueFull: as many jobs as that wait already.
    """
    asked = {"priority": new.priority, "tenant": new.tenant}
    waiting, virtual_time, tenants_last = db.execute(_state_of_queue, asked).one()
    if waiting >= max_queue_size:
        raise QueueFull(waiting)
    if virtual_time is None:
        db.execute(_new_clock, {"priority": new.priority, "virtual_time": 0.0})
    return float(max(virtual_time or 0.0, tenants_last or 0.0)) + new.work, not waiting


def advance(db: sa.Connection, turns: Sequence[tuple[int, float]]) -> None:
    """Turns, each after its priority, that are claimed: the clocks do not go back behind them."""
    db.execute(_advance, [{"of": priority, "turn": turn} for priority, turn in turns])


def take_turns(
    db: sa.Connection, limit: int, batch_key: str | None, max_results: int | None
) -> Sequence[sa.RowMapping]:
    """The next waiting jobs, locked for this transaction; those that another one has locked are passed over."""
    if batch_key is None:
        rows = db.execute(_next, {"limit": limit}).mappings().all()
    else:
        rows = db.execute(_next_of_batch, {"limit": limit, "key": batch_key}).mappings().all()
    if max_results is not None:
        rows = _fitting(rows, max_results)
    if rows and batch_key is None:  # company is taken before its turn, which moves no clock
        advance(db, [(row["priority"], row["turn"]) for row in rows])
    return rows


def count_waiting(db: sa.Connection) -> int:
    return db.execute(_count).scalar_one()


def _fitting(rows: Sequence[sa.RowMapping], max_results: int) -> Sequence[sa.RowMapping]:
    fitting, results = [], 0
    for row in rows:
        count = row["sampling"].get("num_outputs_per_prompt", 1)
        if results + count <= max_results:
            fitting.append(row)
            results += count
    return fitting
