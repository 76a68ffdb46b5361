"""What a site asks of a job before it accepts it."""
