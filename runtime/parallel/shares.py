"""Whether every rank has a part in a request."""

from __future__ import annotations

from sgl_diffusion.models.family import Family
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.layout import Layout
from sgl_diffusion.runtime.request import Job


def check_shares(layout: Layout, job: Job, family: Family) -> None:
    """Raises UserError for ranks that would have nothing to do."""
    if layout.cfg > 1 and job.negative_prompt is None:
        raise UserError("enable_cfg_parallel=true: this request has no negative branch, which is guidance's")
    if layout.dp > job.request.count:
        raise UserError(f"dp_size={layout.dp}: at most one replica for each result of a request: {job.request.count}")
    if layout.sp > (tokens := family.image_tokens(job.size)):
        size = f"height={job.size.height}, width={job.size.width}"
        raise UserError(f"{size}: {tokens} tokens are too few for {layout.sp} ranks; at least one for each")
