"""A provisioned federation: its kits, what a site writes into its own, and one that runs on this machine."""
