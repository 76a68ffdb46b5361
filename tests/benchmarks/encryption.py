"""What does homomorphic encryption cost in time and bytes, beside a round without it?

    python tests/benchmarks/encryption.py [--threads N] [--sites N] [--repeats N] [--steps N]

The update is that of jobs/ct_ddpm_he (0.7 million parameters); the way is the job's: gate, packing, NVFlare's
encryptor, gate of ciphertext, sum at the server, NVFlare's decryptor, noise and mean. Medians of repeats in one run;
the last line is one JSON object:

    encrypt_s           a site's filters on one update, with the plain gate in front
    sum_s               the server's checks and sum over all sites, and the sum as bytes
    open_s              a site's decryptor, noise, mean and gate
    plain_s             the same round without encryption: gate at each site, checks and average at the server
    training_s          one site's round of local training, on images of the job's size
    bytes_a_parameter   of a reply as it leaves, encrypted and plain
    error               furthest parameter of the opened mean from the plain one
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
from nvflare.app_opt.he.model_encryptor import HEModelEncryptor

from custom.aggregators.encrypted_sum import EncryptedSum
from custom.aggregators.in_time_average import InTimeAverage
from custom.codec import TaskHeader, decrypt_task, mean_reply, read_task, reply_meta, to_torch, update_reply
from custom.config import ExperimentConfig
from custom.device import keep_freed_memory
from custom.diffusion.networks import build_network
from custom.egress import UPDATE_METRICS
from custom.filters.egress_gate import passed
from custom.filters.encryption import PackUpdate, sealed
from custom.he_contexts import new_context, serialized, tenseal
from custom.he_packing import UPDATE, opened
from custom.stages import model_shapes
from custom.training import train_round
from medical_data.cohort import Cohort
from privacy.rng import SecureRandomness

JOB = Path(__file__).resolve().parents[2] / "jobs" / "ct_ddpm_he"
HEADER = TaskHeader(run_id="r", round_number=0, config_sha256="", schedule_sha256="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="of training, scaled to the job's number")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    experiment = ExperimentConfig.of_job(JOB)
    plain = replace(experiment, encryption=None)
    shapes = model_shapes(experiment)
    client = new_context()
    server = tenseal().context_from(serialized(client, secret_key=False))
    encryptor = HEModelEncryptor(weigh_by_local_iter=False)
    decryptor = HEModelDecryptor()
    encryptor.tenseal_context = decryptor.tenseal_context = client
    encryptor.encrypt_layers = [True]
    peer = FLContext()
    peer.set_peer_context(FLContext())
    rng = np.random.default_rng(0)
    sites = [
        {name: rng.normal(0, 1e-2, shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(options.sites)
    ]

    def reply(arrays: dict[str, Any]) -> Any:
        return update_reply(to_torch(arrays), weight=30.0, metrics=dict.fromkeys(UPDATE_METRICS, 1.0))

    times: dict[str, list[float]] = {name: [] for name in ("encrypt_s", "sum_s", "open_s", "plain_s")}
    for _ in range(options.repeats):
        left = []
        for arrays in sites:
            answer, start = reply(arrays), time.perf_counter()
            gated = passed(answer, experiment)
            left.append(sealed(encryptor.process(PackUpdate().process(gated, FLContext()), peer), experiment))
            times["encrypt_s"].append(time.perf_counter() - start)
        start = time.perf_counter()
        total = EncryptedSum(shapes, experiment, server)
        for number, answer in enumerate(left):
            dxo = from_shareable(answer)
            assert total.add(f"site-{number}", dxo.data, reply_meta(dxo.meta)), total.refused
        task = FLModelUtils.to_shareable(decrypt_task(*total.ciphertext(), HEADER))
        times["sum_s"].append(time.perf_counter() - start)
        start = time.perf_counter()
        numbers: Any = read_task(decryptor.process(task, FLContext()))[0][UPDATE]
        mean = from_shareable(passed(mean_reply(opened(numbers, shapes, SecureRandomness())), experiment)).data
        times["open_s"].append(time.perf_counter() - start)
        answers, start = [reply(arrays) for arrays in sites], time.perf_counter()
        average = InTimeAverage(shapes, plain)
        for number, answer in enumerate(answers):
            dxo = from_shareable(passed(answer, plain))
            assert average.add(f"site-{number}", dxo.data, reply_meta(dxo.meta)), average.refused
        exact = average.mean()
        times["plain_s"].append(time.perf_counter() - start)
    count = sum(array.size for array in exact.values())
    figures: dict[str, Any] = {name: round(statistics.median(values), 3) for name, values in times.items()}
    figures["training_s"] = round(training(experiment, options.steps), 1)
    figures["parameters"], figures["sites"] = count, options.sites
    figures["bytes_a_parameter"] = {
        "encrypted": round(len(from_shareable(left[0]).data[UPDATE]) / count, 2),
        "sum": round(len(total.ciphertext()[1]) / count, 2),
        "plain": 4.0,
    }
    figures["error"] = max(float(np.abs(mean[name] - exact[name]).max()) for name in exact)
    print(json.dumps(figures))


def training(experiment: ExperimentConfig, steps: int) -> float:
    """Seconds of one site's round, from fewer steps, on noise in place of images."""
    rng = np.random.default_rng(0)
    cohort = Cohort(
        images=rng.normal(0, 1, (160, *experiment.image_shape)).astype(np.float32),
        patient=np.repeat(np.arange(40, dtype=np.int32), 4),
        pseudonyms=tuple(f"p{patient}" for patient in range(40)),
        held_out=np.arange(40) >= 30,
        manifest_sha256="0" * 64,
    )
    network = build_network(experiment.network, spatial_dims=2, seed=0)
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    few = replace(experiment, training=replace(experiment.training, steps_per_round=steps))
    options: dict[str, Any] = {
        "weights": weights, "optimizer_state": {}, "site": "s", "round_number": 0, "device": torch.device("cpu"),
    }  # fmt: skip
    train_round(cohort=cohort, config=few, **options)
    start = time.perf_counter()
    train_round(cohort=cohort, config=few, **options)
    return (time.perf_counter() - start) * experiment.training.steps_per_round / steps


if __name__ == "__main__":
    main()
