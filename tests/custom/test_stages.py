"""Two stages in one run: what each trains, what leaves, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from custom import tasks
from custom.codec import update_reply
from custom.config import ExperimentConfig
from custom.drawing import draw
from custom.egress import EgressRefused, released_shapes
from custom.filters.egress_gate import checked
from custom.job_plan import privacy_plan
from custom.latents import decoded, encoded, latent_cohort
from custom.masked_vector import gradient_shapes, session_encoding, vector_forms
from custom.model_config import AutoencoderConfig, TrainingConfig
from custom.model_file import ModelFile, initial_model, load_model, save_checkpoint, save_model
from custom.named_models import frozen_autoencoder, start_weights
from custom.privacy_config import MeanImageConfig
from custom.secure_config import SecureAggregationConfig
from custom.server_step import moved, stepped
from custom.site_state import SiteState
from custom.stages import PREFIX, fresh_weights, model_autoencoder, model_shapes, stage_of, stage_shapes, stages
from custom.strict import ConfigError
from custom.training import train_round
from medical_data.cache import CacheCorrupted
from medical_data.cohort import Cohort
from medical_data.preprocess import PreprocessConfig

CPU = torch.device("cpu")


def in_3d(experiment: ExperimentConfig) -> ExperimentConfig:
    volumes = PreprocessConfig(spatial_dims=3, size=16, images_per_patient=4, spacing_mm=(8.0, 8.0, 8.0))
    return replace(experiment, preprocess=volumes)


def updates(shapes: dict[str, tuple[int, ...]], value: float = 1e-3) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}


# ---- which round trains what


def test_rounds_are_shared_out_between_the_stages(latent_experiment: ExperimentConfig) -> None:
    assert latent_experiment.autoencoder is not None
    longer = replace(
        latent_experiment,
        federation=replace(latent_experiment.federation, rounds=7),
        autoencoder=replace(latent_experiment.autoencoder, rounds=3),
    )
    names = [stage_of(longer, number).name for number in range(8)]
    assert names == ["autoencoder"] * 3 + ["denoiser"] * 5, "the evaluation after the last round is the denoiser's"
    first, last = stages(longer)
    assert (first.first, first.rounds, last.first, last.rounds) == (0, 3, 3, 4)
    assert first.training.learning_rate == 0.01
    assert last.training == longer.training


@pytest.mark.parametrize("volumes", [False, True])
def test_every_tensor_of_the_model_is_one_stages(latent_experiment: ExperimentConfig, volumes: bool) -> None:
    experiment = in_3d(latent_experiment) if volumes else latent_experiment
    first, last = released_shapes(experiment)
    weights = fresh_weights(experiment, seed=0)
    assert not set(first) & set(last)
    assert first | last == model_shapes(experiment) == {name: tuple(t.shape) for name, t in weights.items()}
    assert all(name.startswith(PREFIX) for name in first)
    assert weights["conv_in.conv.weight"].shape[1] == 2, "the denoiser works on latents of two channels"


def test_without_an_autoencoder_there_is_one_stage_and_names_stay(experiment: ExperimentConfig) -> None:
    (stage,) = stages(experiment)
    assert (stage.name, stage.first, stage.rounds) == ("denoiser", 0, 2)
    assert stage_shapes(experiment, stage) == model_shapes(experiment)
    assert experiment.denoised_shape == experiment.image_shape


def test_a_frozen_autoencoder_is_in_the_model_and_in_no_update(latent_experiment: ExperimentConfig) -> None:
    assert latent_experiment.autoencoder is not None
    public = replace(latent_experiment.autoencoder, rounds=0, frozen="public", training=None)
    frozen = replace(latent_experiment, autoencoder=public)
    (shapes,) = released_shapes(frozen)
    assert not any(name.startswith(PREFIX) for name in shapes)
    assert set(model_shapes(frozen)) > set(shapes)


# ---- a run of both stages in one process


def run(experiment: ExperimentConfig, cohort: Cohort, home: Path) -> ModelFile:
    model, state = initial_model(experiment), SiteState(home / "state")
    for number in range(experiment.federation.rounds):
        stage = stage_of(experiment, number)
        seen = cohort
        if stage.name == "denoiser":
            seen = latent_cohort(cohort, model_autoencoder(experiment, model.weights), state=home, device=CPU)
        update = train_round(
            cohort=seen,
            weights=stage.needed(model.weights),
            state=state.before(number, since=stage.first),
            config=experiment,
            site="a",
            round_number=number,
            device=CPU,
        )
        assert set(update.difference) == set(stage_shapes(experiment, stage))
        state.save(number, update.state)
        model = moved(model, {name: tensor.numpy() for name, tensor in update.difference.items()})
    return model


def test_the_first_stage_trains_the_autoencoder_the_second_the_denoiser(
    latent_experiment: ExperimentConfig, cohort: Cohort, tmp_path: Path
) -> None:
    start, end = initial_model(latent_experiment), run(latent_experiment, cohort, tmp_path)
    moved_names = {name for name in start.weights if not torch.equal(start.weights[name], end.weights[name])}
    assert any(name.startswith(PREFIX) for name in moved_names)
    assert any(not name.startswith(PREFIX) for name in moved_names)
    assert end.rounds_done == 2
    save_model(tmp_path / "model.safetensors", end)
    samples = draw(load_model(tmp_path / "model.safetensors"), count=3, device=CPU)
    assert samples.shape == (3, 1, 16, 16)
    assert samples.min() >= -1
    assert samples.max() <= 1
    np.testing.assert_array_equal(samples[:2], draw(end, count=2, device=CPU))


def test_a_finished_autoencoder_stays_at_its_average(latent_experiment: ExperimentConfig, tmp_path: Path) -> None:
    """Sites encode with what samples are decoded with."""
    assert latent_experiment.autoencoder is not None
    slow = replace(
        latent_experiment,
        federation=replace(latent_experiment.federation, rounds=4, server_ema=0.75),
        autoencoder=replace(latent_experiment.autoencoder, rounds=2),
    )
    first, last = released_shapes(slow)
    start = initial_model(slow)
    one = moved(start, updates(first, 1.0))
    two = moved(one, updates(first, 1.0))
    name, denoiser = min(first), min(last)
    torch.testing.assert_close(one.ema[name], start.weights[name] + 1)
    torch.testing.assert_close(two.ema[name], start.weights[name] + 1.25)
    assert torch.equal(two.weights[name], two.ema[name])
    assert torch.equal(two.weights[denoiser], start.weights[denoiser])
    save_checkpoint(tmp_path / "checkpoint.safetensors", two)
    three = moved(load_model(tmp_path / "checkpoint.safetensors"), updates(last, 1.0))
    torch.testing.assert_close(three.ema[denoiser], start.weights[denoiser] + 1)  # its own average starts here
    assert torch.equal(three.ema[name], two.ema[name])


def test_the_servers_optimiser_starts_anew_with_the_second_stage(latent_experiment: ExperimentConfig) -> None:
    first, last = released_shapes(latent_experiment)
    one = stepped(initial_model(latent_experiment), updates(first))
    assert all(name.startswith(PREFIX) for name in one.optimizer)
    two = stepped(one, updates(last))
    assert not any(name.startswith(PREFIX) for name in two.optimizer)


# ---- latents


def test_latents_are_made_once_and_a_changed_file_is_refused(
    latent_experiment: ExperimentConfig, cohort: Cohort, tmp_path: Path
) -> None:
    autoencoder = model_autoencoder(latent_experiment, fresh_weights(latent_experiment, seed=0))
    made = latent_cohort(cohort, autoencoder, state=tmp_path, device=CPU)
    assert made.images.shape == (24, *latent_experiment.denoised_shape)
    np.testing.assert_array_equal(made.images, encoded(autoencoder, cohort.images, CPU))
    np.testing.assert_array_equal(made.patient, cohort.patient)
    latent_cohort(cohort, autoencoder, state=tmp_path, device=CPU)
    (file,) = (tmp_path / "latents").rglob("*.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o600)
    file.write_bytes(bytes(content))
    with pytest.raises(CacheCorrupted):
        latent_cohort(cohort, autoencoder, state=tmp_path, device=CPU)


def test_latents_of_another_autoencoder_replace_them(
    latent_experiment: ExperimentConfig, cohort: Cohort, tmp_path: Path
) -> None:
    one, other = (
        latent_cohort(cohort, model_autoencoder(latent_experiment, weights), state=tmp_path, device=CPU).images
        for weights in (fresh_weights(latent_experiment, seed=seed) for seed in (0, 1))
    )
    assert not np.array_equal(one, other)
    assert len(list((tmp_path / "latents").rglob("*.npy"))) == 1


def test_what_is_decoded_lies_within_the_window(latent_experiment: ExperimentConfig) -> None:
    autoencoder = model_autoencoder(latent_experiment, fresh_weights(latent_experiment, seed=0))
    images = decoded(autoencoder, 50 * torch.randn(2, *latent_experiment.denoised_shape), CPU)
    assert images.shape == (2, 1, 16, 16)
    assert np.abs(images).max() <= 1


# ---- what leaves


def test_the_gate_knows_both_stages_and_no_mixture(latent_experiment: ExperimentConfig) -> None:
    metrics = {"train_loss": 1.0, "held_out_loss": 1.0, "seconds": 1.0}

    def reply(arrays: dict[str, Any]) -> Any:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return checked(update_reply(tensors, weight=4.0, metrics=metrics), latent_experiment)

    first, last = released_shapes(latent_experiment)
    reply(updates(first))
    reply(updates(last))
    with pytest.raises(EgressRefused, match="beyond the list"):
        reply(updates(first | last))
    with pytest.raises(EgressRefused, match=r"missing|beyond"):
        reply(updates(dict(list(first.items())[1:])))


def test_under_masks_each_round_sums_its_stages_tensors(latent_experiment: ExperimentConfig) -> None:
    masks = SecureAggregationConfig(min_survivors=2)
    masked = replace(latent_experiment, secure_aggregation=masks)
    first, last = (session_encoding(masked, tasks.TRAIN, number, parties=3) for number in (0, 1))
    names = [{block.name for block in schema.blocks} for schema in (first, last)]  # type: ignore[union-attr]
    assert set(stage_shapes(masked, stage_of(masked, 0))) <= names[0]
    assert set(stage_shapes(masked, stage_of(masked, 1))) <= names[1]
    assert not set(stage_shapes(masked, stage_of(masked, 0))) & names[1]
    assert {(first.size, 32), (last.size, 32)} <= vector_forms(masked)


# ---- differential privacy


def private(latent: ExperimentConfig, private_experiment: ExperimentConfig) -> ExperimentConfig:
    assert latent.autoencoder is not None
    assert private_experiment.privacy is not None
    return replace(
        private_experiment,
        autoencoder=replace(latent.autoencoder, training=TrainingConfig(steps_per_round=3, warmup_steps=0)),
        privacy=replace(private_experiment.privacy, mean_image=None),
    )


def test_one_plan_covers_the_rounds_of_both_stages(
    latent_experiment: ExperimentConfig, private_experiment: ExperimentConfig
) -> None:
    config = private(latent_experiment, private_experiment)
    plan, alone = privacy_plan(config), privacy_plan(replace(config, autoencoder=None))
    assert plan is not None
    assert alone is not None
    assert plan.total_steps == 6
    assert plan.epsilon == alone.epsilon


def test_shared_noise_is_accounted_for_the_larger_stage(
    latent_experiment: ExperimentConfig, private_experiment: ExperimentConfig
) -> None:
    config = private(latent_experiment, private_experiment)
    assert config.privacy is not None
    assert config.autoencoder is not None
    shared = replace(
        config,
        training=TrainingConfig(steps_per_round=1),
        autoencoder=replace(config.autoencoder, training=None),
        privacy=replace(config.privacy, dp="central_secagg", noise_multiplier=4.0),
        secure_aggregation=SecureAggregationConfig(min_survivors=2),
    )
    sizes = [sum(math.prod(s) for s in gradient_shapes(shared, stage).values()) for stage in stages(shared)]
    plan = privacy_plan(shared)
    assert plan is not None
    assert plan.config.shared_noise is not None
    assert plan.config.shared_noise.dimensions == max(sizes)
    sums = [session_encoding(shared, tasks.TRAIN, number, parties=3).size for number in (0, 1)]
    assert sums == [size + 1 for size in sizes], "and the weight"


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rounds": 2}, "autoencoder.rounds"),
        ({"training": TrainingConfig(steps_per_round=3)}, "autoencoder.training.batch_size"),
        ({"channels": (8, 8, 8, 8, 8)}, "preprocess.size"),
    ],
)
def test_an_experiment_that_cannot_be_meant_is_refused(
    latent_experiment: ExperimentConfig, changes: dict[str, Any], named: str
) -> None:
    assert latent_experiment.autoencoder is not None
    with pytest.raises(ConfigError, match=named):
        replace(latent_experiment, autoencoder=replace(latent_experiment.autoencoder, **changes))


def test_a_private_experiment_that_cannot_be_meant_is_refused(
    latent_experiment: ExperimentConfig, private_experiment: ExperimentConfig
) -> None:
    good = private(latent_experiment, private_experiment)
    assert good.privacy is not None
    assert good.autoencoder is not None
    mean = MeanImageConfig(clip_norm=1.0, noise_multiplier=1.0)
    for privacy, named in (({"mean_image": mean}, "privacy.mean_image"), ({"trained": ("out.*",)}, "privacy.trained")):
        with pytest.raises(ConfigError, match=named):
            replace(good, privacy=replace(good.privacy, **privacy))  # type: ignore[arg-type]
    for training, named in (
        (TrainingConfig(steps_per_round=3, batch_size=4), "batch_size"),
        (TrainingConfig(steps_per_round=3, gradient_clip=1.0), "gradient_clip"),
        (TrainingConfig(steps_per_round=4), "steps_per_round"),
    ):
        with pytest.raises(ConfigError, match=f"autoencoder.training.{named}"):
            replace(good, autoencoder=replace(good.autoencoder, training=training))


def test_a_frozen_autoencoder_is_taken_by_name_if_it_fits(latent_experiment: ExperimentConfig, tmp_path: Path) -> None:
    assert latent_experiment.autoencoder is not None
    save_model(tmp_path / "public.safetensors", initial_model(latent_experiment))
    config = replace(latent_experiment.autoencoder, rounds=0, frozen="public", training=None)
    job = replace(latent_experiment, seed=99, autoencoder=config)
    given = frozen_autoencoder(tmp_path, job, "public")
    assert set(given) == set(released_shapes(latent_experiment)[0])
    with pytest.raises(ConfigError, match=r"autoencoder\.frozen = 'other': no "):
        frozen_autoencoder(tmp_path, job, "other")
    wider = replace(job, autoencoder=replace(config, latent_channels=4))
    with pytest.raises(ConfigError, match=r"autoencoder\.frozen\.autoencoder"):
        frozen_autoencoder(tmp_path, wider, "public")
    with pytest.raises(ConfigError, match=r"start_from\.autoencoder"):
        start_weights(tmp_path, replace(wider, start_from="public"))


def test_the_autoencoder_block_survives_json(latent_experiment: ExperimentConfig) -> None:
    assert ExperimentConfig.from_json(latent_experiment.to_json()) == latent_experiment
    assert isinstance(ExperimentConfig.from_json(latent_experiment.to_json()).autoencoder, AutoencoderConfig)
