"""Simulated experiments that a federation of hospitals would not run: a site that poisons the model, and the like."""
