from __future__ import annotations

from itertools import pairwise
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from custom.config import ExperimentConfig
from custom.diffusion.ema import updated_ema
from custom.diffusion.loss import denoising_loss
from custom.diffusion.networks import build_network
from custom.diffusion.sampler import ddim_step, ddpm_step, sample
from custom.diffusion.schedule import Schedule, build_schedule
from custom.model_config import PRESETS, SamplingConfig, ScheduleConfig


@pytest.fixture(params=["linear_beta", "scaled_linear_beta", "cosine"])
def noise_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class GaussianDenoiser(nn.Module):
    """The optimal denoiser of pixels that are independent N(mean, std²): E[x_0 | x_t] in closed form."""

    def __init__(self, schedule: Schedule, mean: float, std: float) -> None:
        super().__init__()
        self.schedule, self.mean, self.std = schedule, mean, std

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        a = self.schedule.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
        gain = a.sqrt() * self.std**2 / (a * self.std**2 + 1 - a)
        x0 = self.mean + gain * (x - a.sqrt() * self.mean)
        noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return noise if self.schedule.config.prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x0


# ---- networks


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_all_of_a_networks_state_is_parameters(preset: str, spatial_dims: int) -> None:
    with torch.device("meta"):
        network = build_network(PRESETS[preset], spatial_dims=spatial_dims)
    assert not dict(network.named_buffers())
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_images_of_a_batch_do_not_mix(experiment: ExperimentConfig, spatial_dims: int) -> None:
    network = build_network(experiment.network, spatial_dims=spatial_dims, seed=0)
    for parameter in network.parameters():  # MONAI starts the output at zero, which would hide mixing
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(3, 1, *(8,) * spatial_dims), torch.tensor([0, 500, 999])
    batch = network(x=x, timesteps=t)
    for i in range(3):
        torch.testing.assert_close(batch[i], network(x=x[i : i + 1], timesteps=t[i : i + 1])[0], atol=1e-5, rtol=1e-4)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone(experiment: ExperimentConfig) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, same, other = (build_network(experiment.network, spatial_dims=2, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


# ---- schedule and loss


def test_forward_process_and_velocity_are_monais(noise_name: str) -> None:
    from monai.networks.schedulers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, schedule=noise_name)
    x0, noise, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    ours = build_schedule(ScheduleConfig(noise=noise_name, prediction="v"))  # type: ignore[arg-type]
    torch.testing.assert_close(ours.noised(x0, noise, t), theirs.add_noise(x0, noise, t))
    torch.testing.assert_close(ours.target(x0, noise, t), theirs.get_velocity(x0, noise, t))


def test_hash_tells_schedules_apart() -> None:
    configs = [
        ScheduleConfig(timesteps=t, noise=n, prediction=p)
        for t in (100, 1000)
        for n in ("linear_beta", "cosine")
        for p in ("epsilon", "v")
    ]
    assert len({build_schedule(config).sha256 for config in configs}) == len(configs)
    assert build_schedule(configs[0]).sha256 == build_schedule(configs[0]).sha256


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_loss_of_a_network_that_predicts_zero_is_the_targets_mean_square(prediction: str) -> None:
    schedule = build_schedule(ScheduleConfig(prediction=prediction))  # type: ignore[arg-type]

    class Zero(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            return torch.zeros_like(x)

    x0, noise, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([1, 400, 990])
    losses = denoising_loss(Zero(), schedule, x0, noise, t)
    a = schedule.alphas_cumprod[t]
    for i in range(3):
        v = sqrt(a[i]) * noise[i] - sqrt(1 - a[i]) * x0[i]
        expected = (noise[i] if prediction == "epsilon" else v).square().mean()
        torch.testing.assert_close(losses[i], expected)


# ---- samplers


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 500), ("ddim", 400), ("dpm_solver", 25)])
def test_samplers_reach_the_distribution_of_a_closed_form_denoiser(prediction: str, sampler: str, steps: int) -> None:
    schedule = build_schedule(ScheduleConfig(prediction=prediction, noise="linear_beta"))  # type: ignore[arg-type]
    network = GaussianDenoiser(schedule, mean=0.2, std=0.1)
    config = SamplingConfig(sampler=sampler, steps=steps)  # type: ignore[arg-type]
    x = sample(network, schedule, config, count=4, image_shape=(1, 24, 24), seed=0, device=torch.device("cpu"))
    assert float(x.mean()) == pytest.approx(0.2, abs=0.01)
    assert float(x.std()) == pytest.approx(0.1, rel=0.1)


def test_dpm_solver_is_more_accurate_than_ddim_at_the_same_number_of_steps() -> None:
    schedule = build_schedule(ScheduleConfig(noise="linear_beta", prediction="epsilon"))
    network = GaussianDenoiser(schedule, mean=0.2, std=0.1)

    def draw(sampler: str, steps: int) -> Tensor:
        config = SamplingConfig(sampler=sampler, steps=steps)  # type: ignore[arg-type]
        return sample(network, schedule, config, count=4, image_shape=(1, 8, 8), seed=0, device=torch.device("cpu"))

    exact = draw("ddim", 1000)
    assert (draw("dpm_solver", 15) - exact).abs().mean() < 0.5 * (draw("ddim", 15) - exact).abs().mean()


def test_single_steps_equal_monais(noise_name: str) -> None:
    from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

    schedule = build_schedule(ScheduleConfig(noise=noise_name, prediction="epsilon"))  # type: ignore[arg-type]
    x, output = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    a = schedule.alphas_cumprod.double().tolist()
    for t in (1, 300, 990):
        x0 = ((x - sqrt(1 - a[t]) * output) / sqrt(a[t])).clamp(-1, 1)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        theirs, _ = DDPMScheduler(schedule=noise_name).step(output, t, x, torch.Generator().manual_seed(t))
        torch.testing.assert_close(ddpm_step(x, x0, a[t], a[t - 1], noise), theirs, atol=2e-4, rtol=2e-4)
    deterministic = DDIMScheduler(schedule=noise_name, clip_sample=False)
    deterministic.set_timesteps(50)  # their step from t goes to t - 1000/50
    for t in (20, 300, 900):
        x0 = (x - sqrt(1 - a[t]) * output) / sqrt(a[t])
        theirs, _ = deterministic.step(output, t, x)
        torch.testing.assert_close(ddim_step(x, x0, a[t], a[t - 20]), theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver"])
def test_an_image_depends_on_its_seed_and_index_alone(experiment: ExperimentConfig, sampler: str) -> None:
    network = build_network(experiment.network, spatial_dims=2, seed=0)
    schedule = build_schedule(experiment.schedule)
    config = SamplingConfig(sampler=sampler, steps=3)  # type: ignore[arg-type]

    def draw(count: int, batch_size: int, seed: int = 5) -> Tensor:
        return sample(
            network,
            schedule,
            config,
            count=count,
            image_shape=(1, 16, 16),
            seed=seed,
            device=torch.device("cpu"),
            batch_size=batch_size,
        )

    many = draw(5, 2)
    torch.testing.assert_close(draw(3, 3), many[:3], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(draw(3, 3, seed=6), many[:3])
    assert len({float(image.sum()) for image in many}) == 5


def test_samples_lie_in_range(experiment: ExperimentConfig) -> None:
    network = build_network(experiment.network, spatial_dims=3, seed=0)
    images = sample(
        network,
        build_schedule(experiment.schedule),
        SamplingConfig(steps=2),
        count=2,
        image_shape=(1, 8, 8, 8),
        seed=0,
        device=torch.device("cpu"),
    )
    assert images.shape == (2, 1, 8, 8, 8)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1


# ---- average


def test_ema_is_the_weighted_sum_of_the_past() -> None:
    past = [torch.randn(3) for _ in range(5)]
    ema = {"w": past[0]}
    for weights in past[1:]:
        ema = updated_ema(ema, {"w": weights}, 0.8)
    expected = 0.8**4 * past[0] + sum((0.2 * 0.8 ** (4 - i) * w for i, w in enumerate(past[1:], 1)), torch.zeros(3))
    torch.testing.assert_close(ema["w"], expected)


def test_timesteps_shrink_noise(experiment: ExperimentConfig) -> None:
    alphas = build_schedule(experiment.schedule).alphas_cumprod.tolist()
    assert all(later < earlier for earlier, later in pairwise(alphas))
