"""NVFlare controllers: what the server does in a run."""
