"""The denoising network: MONAI's DiffusionModelUNet in 2D and 3D from one configuration."""

from __future__ import annotations

import torch
from torch import nn

from custom.diffusion.light_monai import light_monai
from custom.model_config import NetworkConfig

with light_monai():
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

Shapes = dict[str, tuple[int, ...]]


def build_network(config: NetworkConfig, *, spatial_dims: int, channels: int = 1, seed: int | None = None) -> nn.Module:
    """Build the U-Net, called as ``network(x=[B, C, *spatial], timesteps=[B])`` → [B, C, *spatial].

    Nothing in it mixes the images of a batch (group norm, no batch norm), so a loss per image is well defined.

    Args:
        config: channels, attention, …
        spatial_dims: 2 or 3.
        channels: C, of what is denoised: 1 of images, more of latents.
        seed: initialises the weights reproducibly without touching the global generator's state.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        network: nn.Module = DiffusionModelUNet(
            spatial_dims=spatial_dims,
            in_channels=channels,
            out_channels=channels,
            num_res_blocks=config.res_blocks,
            channels=config.channels,
            attention_levels=config.attention,
            norm_num_groups=config.norm_groups,
            num_head_channels=config.head_channels,
            use_flash_attention=True,  # PyTorch's scaled_dot_product_attention; on the CPU too
        )
    return network
