"""One training and many: checkpoints, an exact resume, metrics files, the ablation."""
