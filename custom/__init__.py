"""What NVFlare deploys to hospital sites: diffusion models, local training and the glue around them."""

import os

# GNU OpenMP's idle threads spin for a moment, then sleep. By default they spin on, which is some 7 % faster on a quiet
# machine and 2.5 times slower where anything else wants a core. Read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
