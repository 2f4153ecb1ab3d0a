"""Sources, the deterministic plan, and the loader."""
