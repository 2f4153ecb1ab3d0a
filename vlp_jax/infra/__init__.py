"""Mesh, checkpoints, logs and reports; knows nothing of the field."""
