"""Denoising diffusion on CT: network, schedule, loss, sampler, EMA. Knows nothing of federations."""
