"""Many clips: the worker pool, spectrograms of a dataset, the builder of the pack."""
