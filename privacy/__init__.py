"""What may leave a site, and what it costs: differential privacy, secure aggregation, audit."""
