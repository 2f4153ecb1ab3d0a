"""Run configurations: each module has get_config(arg) -> ml_collections.ConfigDict."""
