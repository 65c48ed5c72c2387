"""A real FP8 trainer, and the source of labelled divergences."""
