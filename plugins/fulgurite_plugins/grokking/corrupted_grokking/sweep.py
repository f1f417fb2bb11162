# SPDX-License-Identifier: Apache-2.0
"""Many networks of the study trained at once, as stacked tensors: what a phase diagram needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.errors import check_argument
from fulgurite_datamodules import ModularArithmetic


def train_grid(
    p: int,
    fractions: Sequence[float],
    corrupted: Sequence[float],
    weight_decay: float = 0.0,
    dropout: float = 0.0,
    width: int = 500,
    epochs: int = 2000,
    seeds: Sequence[int] = (0,),
    lr: float = 1e-2,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Train a `QuadraticMLP` for every training fraction, fraction of wrong labels and seed, all of them at once.

    Full batches of modular addition, wrong labels other than the true ones, mean squared error, AdamW with betas 0.9 and
    0.98: the study's training, up to the order of sums. All networks see all pairs, and masks say which they are trained on.

    Args:
        p: The modulus.
        fractions: Fractions of the pairs to train on, `F` of them.
        corrupted: Fractions of wrong labels, `X` of them.
        weight_decay: Decoupled weight decay.
        dropout: Rate of dropout, of what goes into the square.
        width: Neurons `N`.
        epochs: Number of updates.
        seeds: Seeds of weights, pairs and labels, `S` of them.
        lr: Learning rate.
        device: Where to train.

    Returns:
        Accuracies `[F, X, S]` in evaluation mode: `"train"`, `"as_labelled"`, `"true"`, `"clean"` and `"test"`; NaN where
        there are no such examples.

    Raises:
        ValueError: If an argument is outside its range.
    """
    check_argument(0 <= dropout < 1, "dropout", "train_grid", "in [0, 1)", dropout)
    check_argument(epochs >= 1, "epochs", "train_grid", "at least 1", epochs)
    cells = [(fraction, wrong, seed) for fraction in fractions for wrong in corrupted for seed in seeds]
    data = [_labels(p, *cell) for cell in cells]
    truth, labels, trained, is_corrupted = (torch.stack(parts).to(device) for parts in zip(*data, strict=True))
    weights = [_initial(p, width, seed) for _, _, seed in cells]
    U, V, W = (torch.stack(parts).to(device).requires_grad_() for parts in zip(*weights, strict=True))
    optimizer = torch.optim.AdamW(
        [U, V, W], lr=lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=weight_decay, foreach=True
    )
    generator = torch.Generator(device).manual_seed(0)
    share = trained / trained.sum(1, keepdim=True) / p
    for _ in range(epochs):
        outputs = _outputs(U, V, W, dropout, generator)
        wanted = outputs.scatter_add(2, labels.unsqueeze(2), torch.full_like(outputs[..., :1], -1.0))
        loss = (wanted.square().sum(2) * share).sum()  # the sum over networks, whose gradients have nothing in common
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        predictions = _outputs(U, V, W).argmax(2)
    groups = {
        "train": (predictions == labels, trained),
        "as_labelled": (predictions == labels, is_corrupted),
        "true": (predictions == truth, is_corrupted),
        "clean": (predictions == labels, trained & ~is_corrupted),
        "test": (predictions == truth, ~trained),
    }
    shape = (len(fractions), len(corrupted), len(seeds))
    return {
        name: ((hits & members).sum(1).double() / members.sum(1)).cpu().view(shape)
        for name, (hits, members) in groups.items()
    }


def _outputs(U: Tensor, V: Tensor, W: Tensor, dropout: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Return the outputs `[E, p * p, p]` of networks `[E, p, N]`, `[E, p, N]`, `[E, N, p]` for all pairs."""
    sums = (U.unsqueeze(2) + V.unsqueeze(1)).flatten(1, 2)
    if dropout:
        kept = torch.empty_like(sums, requires_grad=False).bernoulli_(1 - dropout, generator=generator)
        sums = sums * kept / (1 - dropout)
    return sums.square() @ W


def _labels(p: int, fraction: float, wrong: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return true labels, labels, and masks of training pairs and of corrupted ones, of all pairs `[p * p]`."""
    data = ModularArithmetic(
        p,
        train_fraction=fraction,
        corrupted_fraction=wrong,
        exclude_true_label=True,
        encoding="tokens",
        pair_seed=seed,
        noise_seed=seed,
    )
    data.setup()
    truth = data.pairs.sum(1) % p
    labels, trained, is_corrupted = truth.clone(), *torch.zeros(2, p * p, dtype=torch.bool)
    labels[data.train_indices] = data.train_targets
    trained[data.train_indices] = True
    is_corrupted[data.train_indices] = data.train_noisy
    return truth, labels, trained, is_corrupted


def _initial(p: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the initial weights of `QuadraticMLP`, transposed for products with rows of tokens."""
    generator = torch.Generator().manual_seed(seed)
    std = 0.5 / (2 * width) ** (1 / 3)
    shapes = ((p, width), (p, width), (width, p))
    U, V, W = (std * torch.randn(shape, generator=generator) for shape in shapes)
    return U, V, W
