"""A site's own filter: nothing leaves without a mask, whatever the job says."""

from __future__ import annotations

from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from custom.codec import experiment_of, workspace_root
from custom.filters.egress_gate import passed
from custom.site_file import site_config


class MasksRequired(Filter):
    """For the result filters of a site's scope (``local/privacy.json``), which a job can neither drop nor reorder.

    The executor asks the same of every task. This filter asks it of every executor.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Let masked vectors, the protocol's messages and error codes pass.

        Raises:
            PolicyRefused: the site's policy requires secure aggregation and the job has none.
            EgressRefused: a reply of a job with secure aggregation that is neither.
        """
        experiment = experiment_of(fl_ctx)
        if shareable.get_return_code() == ReturnCode.OK:
            site = site_config(fl_ctx.get_identity_name(), workspace_root=workspace_root(fl_ctx))
            asked = experiment.secure_aggregation
            site.policy.check_masks(None if asked is None else asked.rules)
        return passed(shareable, experiment)
