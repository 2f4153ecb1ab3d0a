"""Stages of the shared encoder's study (docs/results/momo.py), small enough for a test."""

from ml_collections import ConfigDict

from docs.results import momo


def small_stage(number: int, size: str = "shared_tiny") -> ConfigDict:
    """Two updates of a stage on a few pictures of 16 px.

    Args:
        number: 1 or 2.
        size: of the model, which is made smaller still.
    """
    config = momo.stage(number, size, updates=2)
    config.model.dtype = "float32"
    tower = {"width": 16, "heads": 2, "mlp_width": 32, "depth": 2}
    config.model.image.update(patch_size=8, **tower)
    if config.model.type == "three_towers":
        config.model.text.update(tower)
    config.model.text.max_positions = 64
    config.data.image_size = 16
    config.data.threads, config.data.window_batches = 1, 32
    config.tokenizer.vocab_size = 300
    with config.unlocked():
        config.evals = {}
        config.objectives.mim.update(decoder_width=8, decoder_depth=1, decoder_heads=2)
        config.data.sources.pictures.num_records = 32
        for section in config.data.batches.values():
            section.batch_size = 8
        if "text" in config.data.batches:
            del config.data.sources["phrases"]
            config.data.batches.text.update(max_text_length=32, text_edges=(32,))
    return config
