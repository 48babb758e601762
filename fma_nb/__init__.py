"""fma-nb: music genre classification on FMA-Small, taught and measured in five notebooks.

The flat modules are the stages that data passes through, each importing only from those before it::

    metadata -> audio -> spectrogram -> dataset -> model -> recipe, augmentation, optimization -> training
    -> evaluation, calibration -> plots

The rooms hold the machinery around them: ``bulk`` (many clips), ``raw`` (downloads and the synthetic set),
``runs`` (many epochs, seeds and rows), ``commands`` (the command line, the notebook runner, the report). They
import from the flat modules and from rooms before them. Flat modules import from one alone: ``codec``.
"""

import os

# cuBLAS reads this once, when CUDA starts; without it matrix products on a GPU are not reproducible.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")

__version__ = "1.0.0"


def __getattr__(name: str) -> object:
    """Load `fma_nb.predict` when it is asked for: it needs PyTorch, which most commands do not."""
    if name == "predict":
        from fma_nb.commands.predict import predict

        return predict
    raise AttributeError(f"module 'fma_nb' has no attribute {name!r}")
