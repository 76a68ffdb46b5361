"""NVFlare filters: what every reply passes before it leaves a site."""
