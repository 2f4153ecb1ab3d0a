"""Evaluators: each yields (name, value) pairs from parameters."""
