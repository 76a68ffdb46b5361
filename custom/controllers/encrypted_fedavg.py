"""FedAvg of updates that the server cannot read."""

from __future__ import annotations

from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from custom import tasks
from custom.aggregators.encrypted_sum import EncryptedSum
from custom.codec import Arrays, TaskHeader, decrypt_task, he_context
from custom.config import ExperimentConfig
from custom.controllers.diffusion_fedavg import DiffusionFedAvg, RoundVoid, sent_meta
from custom.diffusion.networks import Shapes
from custom.egress import EgressRefused
from custom.he_contexts import SERVER_CONTEXT
from custom.site_file import ServerConfig
from custom.strict import require


class EncryptedFedAvg(DiffusionFedAvg):
    """The same run, with updates added under CKKS; one site a round opens the sum, never a single update.

    It keeps an honest but curious server from single updates. See docs/threat_model.md for what it does not do.
    """

    _context: Any

    def _check(self, experiment: ExperimentConfig, server: ServerConfig) -> None:
        there, remedy = experiment.encryption is not None, 'missing; give "ckks", or name DiffusionFedAvg'
        require(there, argument="encryption", value=None, remedy=remedy)
        self._context = he_context(self.fl_ctx, SERVER_CONTEXT, secret_key=False)

    def _ask(
        self,
        task: str,
        arrays: Arrays,
        header: TaskHeader,
        asked: list[str],
        shapes: Shapes,
        experiment: ExperimentConfig,
    ) -> EncryptedSum:
        """Send a task, add the encrypted replies as they come in, and have the sum opened.

        Raises:
            RoundVoid: too few acceptable replies, or no site that can open the sum.
        """
        total = EncryptedSum(shapes, experiment, self._context)
        self._collect(total, task, arrays, header, asked, experiment)
        for site in total.accepted:  # in the order of arrival
            reason = self._opened(total, site, header, experiment)
            if reason is None:
                return total
            self.info(f"{site} did not open the sum: {reason}")
        raise RoundVoid(
            f"{task} in round {header.round_number + 1}: none of {', '.join(total.accepted)} could open the encrypted "
            "sum; see those sites' logs"
        )

    def _opened(self, total: EncryptedSum, site: str, header: TaskHeader, experiment: ExperimentConfig) -> str | None:
        """Have one site open the sum; None, or why it did not."""
        refused = ["no answer in time"]

        def receive(reply: FLModel) -> bool:
            try:
                if reply.params_type != ParamsType.DIFF or sent_meta(reply):
                    raise EgressRefused("no bare weight difference")
                total.open_with(reply.params)
            except EgressRefused as error:
                refused[0] = str(error)
                return False
            refused.clear()
            return True

        self.info(f"asking {site} to open the sum of {len(total.accepted)} updates")
        timeout = experiment.federation.round_timeout_s
        self._send(tasks.DECRYPT, decrypt_task(*total.ciphertext(), header), [site], timeout, receive)
        if not refused:
            return None
        code = self._error_codes.get(site)
        return refused[0] if code is None else f"answered {code}"
