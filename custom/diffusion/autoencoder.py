"""The autoencoder of latent diffusion: MONAI's AutoencoderKL, with centre and scale of its latents as parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from custom.diffusion.light_monai import light_monai
from custom.model_config import AutoencoderConfig

with light_monai():
    from monai.networks.nets.autoencoderkl import AutoencoderKL

# Steps of the optimiser move centre and logarithm of the scale this much faster than other parameters: they have a long
# way to go from 0, and only a few hundred steps.
SCALE_RATE = 10.0
# Their part of the gradient, which under differential privacy shares the clip norm with all others.
SCALE_WEIGHT = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """What a pass gives, of images [B, 1, *spatial].

    Attributes:
        images: [B, 1, *spatial].
        mean: of the latents before scaling, [B, C, *latent].
        deviation: their standard deviation.
        centre: mean of the latents over the data, [C, 1, …].
        log_scale: logarithm of their standard deviation over the data, [C, 1, …].
    """

    images: Tensor
    mean: Tensor
    deviation: Tensor
    centre: Tensor
    log_scale: Tensor


class Autoencoder(nn.Module):
    """AutoencoderKL whose latents are brought to mean 0 and deviation 1 over all sites' images, channel by channel.

    Centre and scale are the maximum likelihood estimates of a Gaussian, found by gradient descent with everything else.
    They are agreed across sites like any weight: no site tells a statistic of its own, and whatever bounds or hides an
    update (clipping, noise, masks) does so with them (docs/adr/0021).

    Args:
        config: channels, …
        spatial_dims: 2 or 3.
    """

    def __init__(self, config: AutoencoderConfig, *, spatial_dims: int) -> None:
        super().__init__()
        self.kl = AutoencoderKL(
            spatial_dims=spatial_dims,
            in_channels=1,
            out_channels=1,
            num_res_blocks=(config.res_blocks,) * len(config.channels),
            channels=config.channels,
            attention_levels=(False,) * len(config.channels),
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            with_encoder_nonlocal_attn=False,  # attention over 24³ latents does not fit
            with_decoder_nonlocal_attn=False,
        )
        self.shift = nn.Parameter(torch.zeros(config.latent_channels, *(1,) * spatial_dims))
        self.scale = nn.Parameter(torch.zeros_like(self.shift))

    @property
    def centre(self) -> Tensor:
        """Mean of the latents, [C, 1, …]."""
        return SCALE_RATE * self.shift

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the latents' standard deviation, [C, 1, …]."""
        return SCALE_RATE * self.scale

    def forward(self, x: Tensor, noise: Tensor) -> Reconstruction:
        """Images [B, 1, *spatial] through latents that standard normal noise [B, C, *latent] moves."""
        mean, deviation = self.kl.encode(x)
        images = self.kl.decode(mean + deviation * noise)
        return Reconstruction(
            images=images, mean=mean, deviation=deviation, centre=self.centre, log_scale=self.log_scale
        )

    def encode(self, x: Tensor) -> Tensor:
        """Scaled latents [B, C, *latent] of images [B, 1, *spatial]: the posterior's mean."""
        mean: Tensor = self.kl.encode(x)[0]
        return (mean - self.centre) / self.log_scale.exp()

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 1, *spatial] of scaled latents [B, C, *latent]."""
        images: Tensor = self.kl.decode(latents * self.log_scale.exp() + self.centre)
        return images


def build_autoencoder(config: AutoencoderConfig, *, spatial_dims: int, seed: int | None = None) -> Autoencoder:
    """Build it; arguments as of :func:`custom.diffusion.networks.build_network`."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return Autoencoder(config, spatial_dims=spatial_dims)


def autoencoder_loss(network: Callable[..., Reconstruction], x0: Tensor, noise: Tensor, *, kl_weight: float) -> Tensor:
    """Mean absolute error and weighted divergence from N(0, 1) (arXiv:2112.10752, app. G), one value per image, [B].

    The likelihood of centre and scale adds a gradient and no value. There is neither a perceptual loss, whose network
    would have to be downloaded, nor an adversary.

    Args:
        network: called as ``network(x=…, noise=…)``.
        x0: images in [-1, 1], [B, 1, *spatial].
        noise: standard normal, [B, C, *latent].
        kl_weight: of the divergence, a mean over latents.
    """
    made = network(x=x0, noise=noise)
    error = (made.images - x0).abs().flatten(start_dim=1).mean(dim=1)
    variance = made.deviation.square()
    divergence = 0.5 * (made.mean.square() + variance - 1 - variance.log()).flatten(start_dim=1).mean(dim=1)
    square = (made.mean.detach() - made.centre).square()
    nll = (0.5 * square * (-2 * made.log_scale).exp() + made.log_scale).flatten(start_dim=1).mean(dim=1)
    return error + kl_weight * divergence + SCALE_WEIGHT * (nll - nll.detach())
