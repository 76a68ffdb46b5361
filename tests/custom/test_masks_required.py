"""The gates of a job with secure aggregation, and the site's own filter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.shareable import ReturnCode, Shareable, make_reply
from policies import policy_toml

from custom.codec import FromSite, masked_reply, metrics_reply, stage_reply, update_reply
from custom.config import ExperimentConfig
from custom.egress import SECAGG_REFUSED, EgressRefused
from custom.filters import masks_required
from custom.filters.egress_gate import passed
from custom.filters.masks_required import MasksRequired
from custom.masked_vector import vector_forms
from custom.secure_config import SecureAggregationConfig
from custom.site_file import SITE_FILE_VARIABLE
from custom.stages import model_shapes
from custom.strict import ConfigError
from privacy.policy import PolicyRefused
from privacy.secagg.messages import SEALED_BYTES, Revealed, Sealed, Signed
from privacy.secagg.shamir import SHARE_BYTES


@pytest.fixture(scope="module")
def masked(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(experiment, secure_aggregation=SecureAggregationConfig())


def plain_update(experiment: ExperimentConfig) -> Shareable:
    arrays = {name: torch.zeros(shape) for name, shape in model_shapes(experiment).items()}
    return update_reply(arrays, weight=3.0, metrics={"train_loss": 1.0, "held_out_loss": 1.0, "seconds": 1.0})


def test_masked_vectors_messages_and_codes_pass(masked: ExperimentConfig) -> None:
    for size, _ in vector_forms(masked):
        assert passed(masked_reply(np.zeros(size, np.uint32)), masked)
    assert passed(stage_reply(FromSite(signed=Signed(party="a", signature=b"s"))), masked)
    assert passed(stage_reply(FromSite()), masked)
    assert passed(make_reply(SECAGG_REFUSED), masked).get_return_code() == SECAGG_REFUSED


def test_nothing_passes_without_a_mask(masked: ExperimentConfig, experiment: ExperimentConfig) -> None:
    size, _ = max(vector_forms(masked))
    with_meta = masked_reply(np.zeros(size, np.uint32))
    with_meta["DXO"]["meta"]["weight"] = 3.0
    beside = masked_reply(np.zeros(size, np.uint32))
    beside["DXO"]["data"]["weight"] = 3.0
    refused: list[tuple[Shareable, str]] = [
        (plain_update(experiment), "without a mask"),
        (metrics_reply({"held_out_loss": 1.0}), "without a mask"),
        (with_meta, "without a mask"),
        (beside, "beside the masked vector"),
        (masked_reply(np.zeros(size, np.float32)), "unsigned integers"),
        (masked_reply(np.zeros(size + 1, np.uint32)), "unsigned integers"),
        (masked_reply(np.zeros((1, size), np.uint32)), "unsigned integers"),
        (masked_reply(np.zeros(size, np.uint16)), "unsigned integers"),
    ]
    for reply, said in refused:
        with pytest.raises(EgressRefused, match=said):
            passed(reply, masked)
    box, share = (
        Sealed(sender="a", recipient="b", box=bytes(SEALED_BYTES)),
        Revealed(peer="b", share=bytes(SHARE_BYTES)),
    )
    for answer in (FromSite(boxes=(box, box)), FromSite(revealed=(share, share))):
        with pytest.raises(EgressRefused, match="more than one entry"):
            passed(stage_reply(answer), masked)
    for data in ({"patients": [1]}, {"signed": {"party": "a"}}, {"signed": {"party": "a", "signature": "text"}}):
        with pytest.raises(ConfigError):
            passed(DXO(DataKind.WEIGHTS, data=data).to_shareable(), masked)


class Context(SimpleNamespace):
    def get_identity_name(self) -> str:
        return "a"


@pytest.fixture
def filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the site's filter makes of a reply in a job."""
    file = tmp_path / "sites.toml"
    policy = policy_toml(peers=["a", "b"], masks_required=True)
    file.write_text(f'[sites.a]\nhome = "a"\n{policy}\ndata = {{ folder = "x" }}\n')
    monkeypatch.setenv(SITE_FILE_VARIABLE, str(file))
    monkeypatch.setattr(masks_required, "workspace_root", lambda _: tmp_path)

    def process(reply: Shareable, experiment: ExperimentConfig) -> Shareable:
        monkeypatch.setattr(masks_required, "experiment_of", lambda _: experiment)
        return MasksRequired().process(reply, Context())

    return process


def test_a_site_that_requires_masks_lets_no_plain_update_out_whatever_the_job_says(
    filtered: Any, masked: ExperimentConfig, experiment: ExperimentConfig
) -> None:
    with pytest.raises(PolicyRefused, match="secure aggregation is required"):
        filtered(plain_update(experiment), experiment)
    with pytest.raises(EgressRefused, match="without a mask"):
        filtered(plain_update(experiment), masked)
    assert filtered(masked_reply(np.zeros(max(vector_forms(masked))[0], np.uint32)), masked)
    assert filtered(make_reply(ReturnCode.EXECUTION_EXCEPTION), experiment).get_return_code() != ReturnCode.OK
