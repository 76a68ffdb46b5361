"""What NVFlare deploys to hospital sites: diffusion models, local training and the glue around them."""
