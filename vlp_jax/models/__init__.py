"""Flax linen modules; nothing here knows of a loss."""
