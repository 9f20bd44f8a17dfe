"""FLUX.2's network and the reader of its checkpoints."""
