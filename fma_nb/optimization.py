"""Stage 6, optimization: how a gradient becomes a step, how long the steps are, and what is averaged.

References
----------
I. Loshchilov, F. Hutter: "Decoupled Weight Decay Regularization", ICLR 2019 (AdamW).
K. Jordan et al.: "Muon: An optimizer for hidden layers in neural networks", 2024.
K. Jordan: "cifar10-airbench", airbench94_muon.py, 2024 (filters are set to a fixed length before each step).
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fma_nb.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build a recipe's optimizer.

    Weight decay acts on matrices, and under Adam and AdamW on the filters of convolutions too; Muon keeps
    their norm fixed instead. Biases and the gains of batch normalisation are vectors and have none.
    """
    filters = [p for p in model.parameters() if p.ndim == 4]
    matrices = [p for p in model.parameters() if 1 < p.ndim < 4]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "muon":
        return Muon(groups, filters, lr=recipe.lr, filter_lr=recipe.filter_lr)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind([*groups, {"params": filters, "weight_decay": recipe.weight_decay}], lr=recipe.lr)


class Muon(torch.optim.AdamW):
    """Muon for the filters of convolutions, AdamW for all other parameters.

    A few directions often dominate a gradient, and then also a step along it. Muon takes the averaged
    gradient of a layer as a matrix [shape=(n_out, n_in * height * width)] and makes it nearly orthogonal, so
    that the step is about equally long in all of the matrix's directions. The CRNN's filters stand before
    batch normalisation, where their length means nothing; it is set anew before each step, so that
    ``filter_lr`` is the relative length of a step. For the baseline, which has no batch normalisation, that
    length is a constraint of its own. ``torch.optim.Muon`` takes matrices only and does not set the length.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        filters: list[nn.Parameter],
        lr: float,
        filter_lr: float,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(groups, lr=lr)
        self.add_param_group({"params": filters, "lr": filter_lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters, the filters here, the others by AdamW; clear the filters' gradients."""
        group = self.param_groups[-1]
        for filters in group["params"]:
            state = self.state[filters]
            if not state:  # under the names that AdamW uses, which reads them back
                state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(filters)
            state["exp_avg"].lerp_(filters.grad, 1 - group["momentum"])
            direction = filters.grad.lerp(state["exp_avg"], group["momentum"])  # Nesterov momentum
            # The step's norm is about sqrt(min(matrix shape)); where that is n_out, filter_lr is relative.
            filters.mul_(len(filters) ** 0.5 / filters.norm())
            filters.sub_(orthogonalize(direction.flatten(1)).view(filters.shape), alpha=group["lr"])
            filters.grad = None  # so that AdamW leaves the filters alone
        super().step(closure)


def orthogonalize(matrix: Tensor, n_steps: int = 5) -> Tensor:
    """Push the singular values of a matrix towards 1, by a Newton-Schulz iteration.

    Five steps with these coefficients bring a random matrix's values to between 0.68 and 1.2. Values below
    about a hundredth of the largest are raised but stay smaller.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(n_steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def lr_factor(warmup: float | None, n_steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the step: linear rise, then half a cosine."""
    if warmup is None:
        return lambda _: 1.0
    rise = max(1, round(warmup * n_steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, n_steps - rise)))

    return factor


class MovingAverage:
    """Exponential moving average of a model's weights and buffers, with a smaller decay in the first updates.

    PyTorch's `AveragedModel` copies its count to the GPU in every update, which waits for the GPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.n_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of ``model``."""
        kept = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates)) if self.n_updates else 0.0
        averages, weights = self.module.state_dict(), model.state_dict()
        for name, average in averages.items():
            if average.is_floating_point():
                average.lerp_(weights[name], 1 - kept)
            else:
                average.copy_(weights[name])
        self.n_updates += 1
