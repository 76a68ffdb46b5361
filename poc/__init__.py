"""A provisioned federation on one machine or on many."""
