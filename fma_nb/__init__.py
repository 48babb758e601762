"""fma-nb: music genre classification on FMA-Small, taught and measured in five notebooks.

The modules are the stages that data passes through, each importing only from those before it::

    metadata -> audio -> spectrogram -> dataset -> model -> training -> evaluation -> plots -> report

``download`` and ``mini`` bring the raw data, ``run`` executes the notebooks, ``cli`` is the command line.
"""

import os

# cuBLAS reads this once, when CUDA starts; without it matrix products on a GPU are not reproducible.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load `fma_nb.predict` when it is asked for: it needs PyTorch, which most commands do not."""
    if name == "predict":
        from fma_nb.commands.predict import predict

        return predict
    raise AttributeError(f"module 'fma_nb' has no attribute {name!r}")
