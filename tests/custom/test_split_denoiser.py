from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from custom.config import ExperimentConfig
from custom.diffusion.networks import build_network
from custom.diffusion.split_denoiser import LOW_NOISE, SplitDenoiser
from custom.drawing import draw
from custom.federation_config import PersonalConfig
from custom.model_file import ModelFile, load_model, save_model
from custom.round_parts import personal_shapes
from custom.stages import fresh_weights, model_denoiser, model_shapes, part
from custom.strict import ConfigError

BELOW = 200
BATCHES = [
    [0, 199, 200, 999],
    [999, 0, 500, 100, 200],
    [0, 5, 199],
    [200, 201, 999],
    [199],
    [200],
]


@pytest.fixture
def low(experiment: ExperimentConfig) -> nn.Module:
    return noisy(build_network(experiment.network, spatial_dims=2, seed=1))


@pytest.fixture
def high(experiment: ExperimentConfig) -> nn.Module:
    return noisy(build_network(experiment.network, spatial_dims=2, seed=2))


@pytest.fixture
def split(low: nn.Module, high: nn.Module) -> SplitDenoiser:
    return SplitDenoiser(low_noise=low, high_noise=high, below=BELOW)


@pytest.fixture
def personal(experiment: ExperimentConfig) -> ExperimentConfig:
    return replace(experiment, personal=PersonalConfig(below_timestep=BELOW))


def noisy(network: nn.Module) -> nn.Module:
    """A fresh U-Net's last layer is zero, which would make any two of them equal."""
    generator = torch.Generator().manual_seed(sum(parameter.numel() for parameter in network.parameters()))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return network


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(count))


def personal_weights(config: ExperimentConfig) -> dict[str, Tensor]:
    own = part(fresh_weights(config, seed=9), "denoiser")
    return {**fresh_weights(config, seed=8), **{LOW_NOISE + name: tensor + 0.01 for name, tensor in own.items()}}


@pytest.mark.parametrize("timesteps", BATCHES)
def test_each_image_goes_through_the_denoiser_of_its_timestep(
    split: SplitDenoiser, low: nn.Module, high: nn.Module, timesteps: list[int]
) -> None:
    x, t = images(len(timesteps)), torch.tensor(timesteps)
    one_by_one = torch.cat(
        [
            (low if timesteps[place] < BELOW else high)(x=x[place : place + 1], timesteps=t[place : place + 1])
            for place in range(len(x))
        ]
    )
    together = split(x=x, timesteps=t)
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-4)
    assert together.dtype == x.dtype
    other = torch.cat([(high if t[p] < BELOW else low)(x=x[p : p + 1], timesteps=t[p : p + 1]) for p in range(len(x))])
    assert not torch.allclose(together, other, atol=1e-3)


def test_names_are_those_of_the_global_denoiser_and_of_the_site_s_own(
    split: SplitDenoiser, high: nn.Module, personal: ExperimentConfig
) -> None:
    names = [name for name, _ in high.named_parameters()]
    found = dict(split.named_parameters())
    assert set(found) == {*names, *(LOW_NOISE + name for name in names)}
    assert {name: tuple(tensor.shape) for name, tensor in split.state_dict().items()} == personal_shapes(personal)
    for name, parameter in high.named_parameters():
        assert found[name] is parameter
    assert len(list(split.parameters())) == 2 * len(names), "none twice"


@pytest.mark.parametrize("timesteps", BATCHES)
def test_under_vmap_the_same_comes_out(split: SplitDenoiser, timesteps: list[int]) -> None:
    def of_one(x: Tensor, t: Tensor) -> Tensor:
        return split(x=x[None], timesteps=t[None])[0]

    x, t = images(len(timesteps)), torch.tensor(timesteps)
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's flash attention has no batching rule
        torch.testing.assert_close(torch.func.vmap(of_one)(x, t), split(x=x, timesteps=t), atol=1e-5, rtol=1e-4)


def gradients(network: nn.Module, x: Tensor, timesteps: Tensor) -> dict[str, Tensor | None]:
    network.zero_grad(set_to_none=True)
    network(x=x, timesteps=timesteps).square().sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def test_the_gradient_flows_to_both_and_is_each_one_s_own(
    split: SplitDenoiser, low: nn.Module, high: nn.Module
) -> None:
    x, t = images(5), torch.tensor([999, 0, 500, 100, 200])
    below = t < BELOW
    both = gradients(split, x, t)
    for network, chosen, prefix in ((low, below, LOW_NOISE), (high, ~below, "")):
        for name, gradient in gradients(network, x[chosen], t[chosen]).items():
            assert gradient is not None
            assert gradient.abs().max() > 0
            torch.testing.assert_close(both[prefix + name], gradient, atol=1e-5, rtol=1e-3)


def test_the_denoiser_that_no_image_needs_gets_no_gradient(split: SplitDenoiser) -> None:
    only_low = gradients(split, images(2), torch.tensor([0, 199]))
    assert all((gradient is not None) == name.startswith(LOW_NOISE) for name, gradient in only_low.items())
    only_high = gradients(split, images(2), torch.tensor([200, 999]))
    assert all((gradient is None) == name.startswith(LOW_NOISE) for name, gradient in only_high.items())


def test_a_site_s_weights_make_the_split_denoiser(personal: ExperimentConfig) -> None:
    weights = personal_weights(personal)
    network = model_denoiser(personal, weights)
    assert isinstance(network, SplitDenoiser)
    assert set(network.state_dict()) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    alone = build_network(personal.network, spatial_dims=2)
    for prefix, timesteps in ((LOW_NOISE, [0, BELOW - 1]), ("", [BELOW, 999])):
        names = (name for name in weights if name.startswith(LOW_NOISE) == bool(prefix))
        alone.load_state_dict({name.removeprefix(prefix): weights[name] for name in names})
        x, t = images(2), torch.tensor(timesteps)
        assert torch.equal(network(x=x, timesteps=t), alone(x=x, timesteps=t))
    whole = model_denoiser(personal, fresh_weights(personal, seed=8))
    assert not isinstance(whole, SplitDenoiser), "the global model's is one"


def test_on_latents_the_autoencoder_stays_apart(latent_experiment: ExperimentConfig) -> None:
    federation = replace(latent_experiment.federation, rounds=3)
    config = replace(latent_experiment, federation=federation, personal=PersonalConfig(below_timestep=BELOW))
    weights = personal_weights(config)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == personal_shapes(config)
    network = model_denoiser(config, weights)
    assert isinstance(network, SplitDenoiser)
    assert set(network.state_dict()) == set(part(weights, "denoiser"))


def test_a_personal_model_comes_back_from_disk_and_draws(personal: ExperimentConfig, tmp_path: Path) -> None:
    weights = personal_weights(personal)
    model = ModelFile(experiment=personal, rounds_done=2, weights=weights, ema=weights)
    save_model(tmp_path / "personal.safetensors", model)
    again = load_model(tmp_path / "personal.safetensors")
    assert again.experiment == personal
    assert set(again.weights) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.weights.items())
    network, _ = again.sampling_network()
    x, t = images(4), torch.tensor([0, 199, 200, 999])
    assert torch.equal(network(x=x, timesteps=t), model_denoiser(personal, weights)(x=x, timesteps=t))
    drawn = draw(again, count=2, device=torch.device("cpu"))
    assert drawn.shape == (2, 1, 16, 16)
    assert torch.as_tensor(drawn).isfinite().all()


def test_a_model_file_with_half_a_split_denoiser_is_refused(
    personal: ExperimentConfig, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    weights = personal_weights(personal)
    file = tmp_path / "personal.safetensors"
    for config, tensors in (
        (personal, {name: tensor for name, tensor in weights.items() if name != LOW_NOISE + "out.2.conv.bias"}),
        (experiment, weights),  # whose sites have none
    ):
        save_model(file, ModelFile(experiment=config, rounds_done=2, weights=tensors, ema=tensors))
        with pytest.raises(ConfigError, match="tensors"):
            load_model(file)
    whole = {name: weights[name] for name in model_shapes(personal)}
    save_model(file, ModelFile(experiment=personal, rounds_done=2, weights=whole, ema=whole))
    assert set(load_model(file).weights) == set(whole)
