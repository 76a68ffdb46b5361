"""Less memory in training: activations are computed again in the backward pass, not kept (arXiv:1604.06174).

The unit is a residual or attention block and not a level of the U-Net, whose activations would all be there at once
when it is computed again: a third more memory for ``base`` at 96³, and more operations.

Not with differential privacy: per-patient gradients go backward outside of ``vmap``, where a block of one patient
cannot be computed again (and ``torch.func.grad`` refuses saved tensor hooks).
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from custom.diffusion.light_monai import light_monai

with light_monai():
    from monai.networks.blocks import SpatialAttentionBlock
    from monai.networks.nets.autoencoderkl import AEKLResBlock
    from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock

BLOCKS = (AEKLResBlock, DiffusionUNetResnetBlock, SpatialAttentionBlock)


def checkpointed(network: nn.Module) -> nn.Module:
    """Make every residual and attention block of MONAI's U-Net or autoencoder forget its activations.

    Args:
        network: is changed in place; names of modules and of tensors stay as they are.

    Returns:
        The same network.
    """
    for block in network.modules():
        if isinstance(block, BLOCKS):
            # Nothing in a block is random, so there is no state of a generator to keep.
            forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = forward
    return network
