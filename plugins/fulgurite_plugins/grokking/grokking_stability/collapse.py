# SPDX-License-Identifier: Apache-2.0
r"""Softmax Collapse and naive loss minimisation, of logits and of gradients (Prieto, Barsbey, Mediano, Birdal, 2025).

| symbol | meaning | argument |
|---|---|---|
| $z$, $y$ | logits; class index | `logits`, `targets` |
| $\theta$, $\nabla L$ | parameters; gradient of the loss | `parameters`, `gradients` |
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fulgurite.errors import check_argument
from fulgurite_plugins.grokking.grokking_stability.functional import precision


def collapsed(logits: Tensor, dtype: torch.dtype | str, dim: int = -1) -> Tensor:
    r"""Return for which examples softmax has collapsed in a precision: $\mathrm{fl}(\sum_k \exp(z_k - \max z)) = 1$.

    Logits and exponentials are rounded to the precision, and added in it as torch adds (halves in float32, rounded at the
    end), as the softmax of a training does: small classes that would count together may be absorbed one by one.

    Args:
        logits: $z$, with classes along `dim`, in the precision in which the loss gets them.
        dtype: The precision of the softmax.
        dim: The dimension of the classes.

    Returns:
        Booleans of the shape without `dim`; False where a logit is not finite.

    Raises:
        ValueError: If the precision is none.

    Example:
        >>> collapsed(torch.tensor([[16.0, 0.0], [17.0, 0.0]]), "float32")
        tensor([False,  True])
    """
    dtype = precision(dtype, "collapsed", "dtype")
    rounded = logits.detach().to(dtype).movedim(dim, -1)
    wide = torch.promote_types(dtype, torch.float32)  # exponentials of halves are those of float32, rounded
    exponentials = (rounded - rounded.amax(-1, keepdim=True)).to(wide).exp().to(dtype)
    return exponentials.contiguous().sum(-1) == 1  # contiguous: the order of addition depends on the layout


def softmax_collapse_fraction(logits: Tensor, dtype: torch.dtype | str = "float32", dim: int = -1) -> Tensor:
    """Return the fraction of examples for which softmax has collapsed in a precision; see `collapsed`.

    Args:
        logits: Logits with classes along `dim`, in the precision in which the loss gets them.
        dtype: The precision of the softmax.
        dim: The dimension of the classes.

    Returns:
        A scalar in float64; NaN if there are no examples.

    Raises:
        ValueError: If the precision is none.
    """
    return collapsed(logits, dtype, dim).double().mean()


def has_zero_loss(logits: Tensor, targets: Tensor, dtype: torch.dtype | str) -> Tensor:
    r"""Return for which examples the cross entropy is exactly 0 in a precision.

    With $z' = z - \max z$ it is $\log \sum_k \exp(z'_k) - z'_y$, of which no part is negative: it is 0 where softmax has
    collapsed to the label's class.

    Args:
        logits: $z$, `[B, C, *]`.
        targets: Class indices `[B, *]`; negative ones, as `ignore_index` is, are never counted.
        dtype: The precision of the loss.

    Returns:
        Booleans `[B, *]`.

    Raises:
        ValueError: If the precision is none.
    """
    rounded = logits.detach().to(precision(dtype, "has_zero_loss", "dtype"))
    label = rounded.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
    return collapsed(logits, dtype, dim=1) & (label == rounded.amax(1)) & (targets >= 0)


def zero_loss_fraction(logits: Tensor, targets: Tensor, dtype: torch.dtype | str = "float32") -> Tensor:
    """Return the fraction of examples whose cross entropy is exactly 0 in a precision; see `has_zero_loss`.

    Args:
        logits: Logits `[B, C, *]`.
        targets: Class indices `[B, *]`.
        dtype: The precision of the loss.

    Returns:
        A scalar in float64; NaN if there are no examples.

    Raises:
        ValueError: If the precision is none.
    """
    return has_zero_loss(logits, targets, dtype).double().mean()


def nlm_alignment(parameters: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    r"""Return how far the descent direction points along the weights, $\cos(-\nabla L, \theta)$.

    1 is naive loss minimisation, which only scales the weights; the square is the fraction of $|\nabla L|^2$ that lies in
    the span of $\theta$. It is 0 after `PerpGrad`.

    Args:
        parameters: Parameters, together $\theta$; for the alignment of a tensor, that tensor alone.
        gradients: The gradient of the loss for each of them.

    Returns:
        A scalar in float64; NaN if parameters or gradients are zero.

    Raises:
        ValueError: If there are not as many gradients as parameters, or shapes differ.

    Example:
        >>> nlm_alignment([torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 4.0])])
        tensor(0.6000, dtype=torch.float64)
    """
    products = torch.stack([inner_products(w, g) for w, g in zip(parameters, gradients, strict=True)]).sum(0)
    return -products[1] / (products[0] * products[2]).sqrt()


def inner_products(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the squared norm of a parameter, its inner product with the gradient, and the gradient's squared norm.

    Args:
        parameter: A tensor.
        gradient: A tensor of the same shape; complex ones are taken as pairs of real numbers.

    Returns:
        `[3]` in float64.

    Raises:
        ValueError: If the shapes differ.
    """
    same = parameter.shape == gradient.shape
    check_argument(same, "gradient", "NLM alignment", f"of shape {list(parameter.shape)}", list(gradient.shape))
    w, g = (torch.view_as_real(t) if t.is_complex() else t for t in (parameter.detach(), gradient.detach()))
    w, g = w.double().flatten(), g.double().flatten()
    return torch.stack([w.dot(w), w.dot(g), g.dot(g)])
