"""A host of a server whose first host is another: its ranks draw with those over there. Neither jobs nor connections.

It has no word from the first host but what its ranks hear. When they end, because a rank anywhere died or because the
first host started its engine again, they are started again, and meet the others at `dist_init_addr`.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.errors import RunFailure
from sgl_diffusion.runtime.parallel.launch import launch
from sgl_diffusion.runtime.parallel.layout import read_layout
from sgl_diffusion.server.args import ServeArgs
from sgl_diffusion.server.logs import set_up_logs
from sgl_diffusion.server.messages import LOAD, Load
from sgl_diffusion.server.replicas import of_a_replica

AGAIN_S = 2.0  # by then the first host has noticed as well, and does not wait for those that have ended

log = logging.getLogger("sgl_diffusion")


def follow(model: ServerArgs, args: ServeArgs) -> int:
    """Draws with the first host until a signal asks it to stop. Returns the exit code.

    Raises:
        UserError: the model cannot be had as asked.
    """
    set_up_logs(model.log_level, args.log_format)
    replica = of_a_replica(model)
    if others := sorted(args.model_fields_set - {"log_format"}):
        log.info("node_rank=%d: of effect on the first host alone: %s", model.node_rank, ", ".join(others))
    ranks = read_layout(replica).ranks
    load = Load(
        server_args=replica.model_dump(mode="json", exclude_unset=True), data_dir="", log_format=args.log_format
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with TemporaryDirectory(prefix="sgl-diffusion-engine-") as folder:
        Path(folder, LOAD).write_bytes(load.line())
        try:
            while True:
                try:
                    launch(replica, ranks, "sgl_diffusion.server.worker", [folder])
                except RunFailure as e:
                    log.error("the ranks of this host ended: %s; they are started again in %g s", e, AGAIN_S)
                time.sleep(AGAIN_S)
        except KeyboardInterrupt:
            return 0
