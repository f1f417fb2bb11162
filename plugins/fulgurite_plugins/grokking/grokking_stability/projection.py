# SPDX-License-Identifier: Apache-2.0
r"""Gradients without their part along the weights (`OrthoGrad` in the authors' code).

For a weight tensor $w$ with gradient $g$, both as vectors, $g' = g - \frac{w \cdot g}{w \cdot w} w$ and
$g'' = \frac{|g|}{|g'|} g'$.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor

from fulgurite.distributed import sum_
from fulgurite.errors import RefusedError, check_argument, check_choice, is_number

Scope = Literal["tensor", "row", "global"]
"""What is projected by itself: a parameter, a row of it (the weights of one unit), or all parameters as one vector."""

_PARALLEL = {torch.float32: 1e-6, torch.float64: 1e-12}
"""What is left of a gradient of length 1 that is taken for rounding, by the precision of the computation."""

_CACHED, _BUFFERED = 2**19, 2**27
"""Elements that are worked on at once: on a CPU what its cache holds, elsewhere what memory has to spare."""

_IN_ORDER = 2**16
"""Products that a CPU sums in float32, one after the other, before it sums the sums."""

_Member = tuple[Tensor, Tensor, int, int]
"""Weights, gradient, whether its rows are units, copies."""


class SparseGradientError(RefusedError, NotImplementedError):
    """A gradient is sparse; torch's own optimizers raise errors of the second kind for it."""


def check_projection(scope: object, eps: object, owner: str) -> None:
    """Check the arguments that everything has that projects.

    Raises:
        ValueError: If one is outside its range.
    """
    check_choice(scope, get_args(Scope), "scope", owner)
    check_argument(is_number(eps) and eps >= 0, "eps", owner, "a number of at least 0", eps)  # type: ignore[operator]


@torch.no_grad()
def perp_grad_(
    parameters: Iterable[Tensor],
    rescale: bool = True,
    scope: Scope = "tensor",
    skip_scalars: bool = True,
    eps: float = 1e-30,
) -> Tensor:
    r"""Remove the part along the weights from the gradients of parameters, in place.

    Call it when gradients are complete: reduced over ranks, accumulated, not scaled; before they are clipped. Gradients
    that are not finite are left as they are, and so are those of weights that are all zero. What is left of a gradient that
    is parallel to its weights is rounding, and is set to zero instead of being lengthened.

    It is done twice, because once leaves a part along the weights that lengthening would lengthen too, and computed in
    float32 at least, with norms in float64. Sharded parameters (DTensors) take two all-reduces of some numbers per tensor.

    Args:
        parameters: Parameters with gradients in `grad`; those without one are left out, and a second mention too.
        rescale: Whether gradients keep their length.
        scope: `"tensor"`: each parameter by itself. `"row"`: each row of it along the first dimension (of parameters
            whose rows have one entry, all of it). `"global"`: all as one vector.
        skip_scalars: Whether to leave parameters of one entry alone; all of their gradient is along the weight. It does
            not matter for `"global"`.
        eps: Added to the squared norm of the weights.

    Returns:
        How many units of `scope` had a gradient that was parallel to their weights, as a scalar tensor.

    Raises:
        ValueError: If an argument is outside its range.
        RefusedError: If a gradient is sparse, or sharded in a way that cannot be handled.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.grad = torch.tensor([5.0, 0.0])
        >>> _ = perp_grad_([w])
        >>> w.grad  # of length 5, and w @ w.grad = 0
        tensor([ 4., -3.])
    """
    check_projection(scope, eps, "PerpGrad")
    chosen = [p for p in dict.fromkeys(parameters) if p.grad is not None]
    if scope != "global" and skip_scalars:
        chosen = [p for p in chosen if p.numel() > 1]
    parts = list(_parts(chosen, scope))
    if not parts:
        return torch.zeros(())
    together = [parts] if scope == "global" else [[part] for part in parts]
    counts = [_project(joined, scope == "global", rescale, eps) for joined in together]
    return counts[0] if len(counts) == 1 else torch.stack([count.to(counts[0].device) for count in counts]).sum()


@dataclass
class _Part:
    """Some weights and gradients of one device and precision.

    Args:
        weights: The weights, as vectors unless their rows are units; of sharded ones, what this rank has.
        gradients: Their gradients, alike; both in the precision of the computation.
        targets: Where the gradients belong; the gradients themselves unless they had to be converted.
        rows: For each tensor 1 if each of its rows is a unit, 0 if all of it is.
        mesh: The devices that the tensors are sharded over; None if they are whole.
        copies: On how many of them the same part of each tensor lies.
    """

    weights: list[Tensor]
    gradients: list[Tensor]
    targets: list[Tensor]
    rows: list[int]
    mesh: DeviceMesh | None
    copies: list[int]

    def squares(self, tensors: list[Tensor], summed: torch.dtype | None = torch.float64) -> Tensor:
        """Return the squared norm of each unit of weights or gradients `[units]`, in float64.

        In float32 the squares of small gradients would vanish, and those that count late in grokking are small. Weights
        are summed in their own precision (`summed=None`), which is quicker: what that misses the second round corrects.
        """
        if not any(self.rows):
            if summed is None and tensors[0].device.type == "cpu" and max(t.numel() for t in tensors) > _IN_ORDER:
                return _dots(tensors, tensors)
            return torch.stack(torch._foreach_norm(tensors, dtype=summed)).double().square()
        norms = [
            torch.linalg.vector_norm(t, dim=list(range(row, t.ndim)) or None, dtype=summed).view(-1)
            for t, row in zip(tensors, self.rows, strict=True)
        ]
        return torch.cat(norms).double().square()

    def products(self) -> Tensor:
        """Return the inner product of weights and gradient of each unit `[units]`, in float64."""
        pairs = list(zip(self.weights, self.gradients, strict=True))
        if any(self.rows):
            by_row = zip(pairs, self.rows, strict=True)
            dots = [torch.linalg.vecdot(w.flatten(row), g.flatten(row)).view(-1) for (w, g), row in by_row]
            return torch.cat(dots).double()
        if self.weights[0].device.type == "cpu":
            return _dots(self.weights, self.gradients)
        return summed_products(self.weights, self.gradients)

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Return sums `[K, units]` over this rank's part of each tensor as sums over all of it."""
        if self.mesh is not None:
            if set(self.copies) != {1}:
                sums = sums / sums.new_tensor(self.copies)
            for dimension in range(self.mesh.ndim):
                sum_(sums, self.mesh.get_group(dimension))
        return sums

    def scale(self, factors: Tensor) -> None:
        """Multiply each unit of the gradients by a factor `[units]`."""
        torch._foreach_mul_(self.gradients, self._spread(factors))  # type: ignore[arg-type]

    def add_weights(self, factors: Tensor) -> None:
        """Add the weights, each unit multiplied by a factor `[units]`, to the gradients."""
        torch._foreach_addcmul_(self.gradients, self.weights, self._spread(factors))  # type: ignore[call-overload]

    def write(self) -> None:
        """Put the gradients where they belong, if they had to be converted."""
        copied = [
            pair for pair in zip(self.targets, self.gradients, strict=True) if pair[0].data_ptr() != pair[1].data_ptr()
        ]
        if copied:
            torch._foreach_copy_([t for t, _ in copied], [g.view_as(t) for t, g in copied])

    def _spread(self, factors: Tensor) -> Sequence[Tensor]:
        factors = factors.to(self.gradients[0].device, self.gradients[0].dtype)
        if not any(self.rows):
            return factors.unbind()
        sizes = [len(g) if row else 1 for g, row in zip(self.gradients, self.rows, strict=True)]
        pieces = zip(factors.split(sizes), self.gradients, self.rows, strict=True)
        return [piece.view(-1, *[1] * (g.ndim - 1)) if row else piece[0] for piece, g, row in pieces]


def _dots(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the inner products of vectors on a CPU, pair by pair `[n]`, in float64."""
    pairs = zip(left, right, strict=True)
    return torch.stack([a.dot(b) if a.numel() <= _IN_ORDER else _long_dot(a, b) for a, b in pairs]).double()


def _long_dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([a.dot(b) for a, b in zip(left.split(_IN_ORDER), right.split(_IN_ORDER), strict=True)]).sum()


def summed_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the inner products of tensors, pair by pair `[n]`, in float64, by few kernels.

    There is no sum of a list of tensors, but a norm: what a sum of products is, twice that of the positive ones minus that
    of all absolute values.
    """
    products = torch._foreach_mul(left, right)
    absolute = torch.stack(torch._foreach_norm(products, 1, dtype=torch.float64))
    torch._foreach_clamp_min_(products, 0.0)
    return 2 * torch.stack(torch._foreach_norm(products, 1, dtype=torch.float64)) - absolute


def _project(parts: list[_Part], together: bool, rescale: bool, eps: float) -> Tensor:
    """Project the gradients of parts, and return how many units were parallel to their weights."""
    sums = [torch.stack([p.squares(p.weights, None), p.products(), p.squares(p.gradients)]) for p in parts]
    ww, wg, gg = _combined(parts, sums, together)
    usable = gg.isfinite() & (ww > 0) & ww.isfinite()
    _each(parts, _Part.add_weights, torch.where(usable, -wg / (ww + eps), 0.0))
    wg, rest = _combined(parts, [torch.stack([p.products(), p.squares(p.gradients)]) for p in parts], together)
    again = torch.where(usable, -wg / (ww + eps), 0.0)
    left = (rest + 2 * again * wg + again.square() * ww).clamp_min(0.0).sqrt()
    parallel = usable & (left <= _PARALLEL[parts[0].gradients[0].dtype] * gg.sqrt())
    factor = torch.where(usable, gg.sqrt() / left, 1.0) if rescale else torch.ones_like(gg)
    factor = torch.where(parallel, 0.0, factor)
    _each(parts, _Part.scale, factor)
    _each(parts, _Part.add_weights, again * factor)
    for part in parts:
        part.write()
    counted = parallel & (gg > 0)
    return counted[0] if together else counted.sum()


def _combined(parts: list[_Part], sums: list[Tensor], together: bool) -> Tensor:
    """Return the sums over whole units `[K, units]`; over all units, in the place of each, if they are one vector."""
    whole = torch.cat([part.over_ranks(s).to(sums[0].device) for part, s in zip(parts, sums, strict=True)], dim=1)
    return whole.sum(dim=1, keepdim=True).expand_as(whole) if together else whole


def _each(parts: list[_Part], act: Callable[[_Part, Tensor], None], values: Tensor) -> None:
    """Give each part its piece of a value per unit."""
    sizes = [sum(len(g) if row else 1 for g, row in zip(p.gradients, p.rows, strict=True)) for p in parts]
    for part, piece in zip(parts, values.split(sizes), strict=True):
        act(part, piece)


def _parts(parameters: list[Tensor], scope: Scope) -> Iterator[_Part]:
    """Yield parameters with their gradients, by device, precision and mesh; whole ones in parts of a limited size."""
    groups: dict[tuple[Any, ...], list[_Member]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.strided:
            raise SparseGradientError(
                f"PerpGrad cannot project a gradient of layout {gradient.layout} (a parameter of shape "
                f"{list(parameter.shape)}): sparse gradients are not supported. Use `sparse=False` in the embedding, or "
                f"exclude it."
            )
        copies, mesh = 1, None
        if isinstance(parameter, DTensor):
            copies, mesh = sharded_copies(parameter, gradient, scope), parameter.device_mesh
            parameter, gradient = parameter.to_local(), gradient.to_local()  # type: ignore[attr-defined]
        if parameter.is_complex():
            parameter, gradient = torch.view_as_real(parameter), torch.view_as_real(gradient)
        row = int(scope == "row" and parameter.ndim > 1 and parameter[:1].numel() > 1)
        groups[parameter.device, parameter.dtype, gradient.dtype, mesh].append((parameter, gradient, row, copies))
    for (device, *_, mesh), members in groups.items():
        limit = _CACHED if device.type == "cpu" else _BUFFERED
        for some in [members] if mesh is not None else _limited(members, limit):
            weights, targets, rows, copies_of = (list(values) for values in zip(*some, strict=True))
            dtype = torch.promote_types(torch.promote_types(weights[0].dtype, targets[0].dtype), torch.float32)
            weights, gradients = (_worked_on(tensors, rows, dtype) for tensors in (weights, targets))
            yield _Part(weights, gradients, targets, rows, mesh, copies_of)


def _worked_on(tensors: list[Tensor], rows: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in the precision of the computation; those that are one unit as vectors."""
    shaped = (t if row else t.reshape(-1) for t, row in zip(tensors, rows, strict=True))
    return [t if t.dtype is dtype else t.to(dtype) for t in shaped]


def _limited(members: list[_Member], limit: int) -> Iterator[list[_Member]]:
    """Yield consecutive members, as many together as have no more than some number of elements, or one."""
    found: list[_Member] = []
    size = 0
    for member in members:
        if found and size + member[0].numel() > limit:
            yield found
            found, size = [], 0
        found.append(member)
        size += member[0].numel()
    yield found


def sharded_copies(parameter: DTensor, gradient: Tensor | None, scope: Scope, name: str = "") -> int:
    """Return on how many ranks the same part of a sharded parameter lies.

    Args:
        parameter: The parameter.
        gradient: Its gradient, if there is one yet.
        scope: What is projected by itself.
        name: The name of the parameter, for messages.

    Raises:
        RefusedError: If it is sharded in a way that cannot be handled.
    """
    known = f"`{name}`" if name else f"a parameter of shape {list(parameter.shape)}"
    if scope == "row":
        raise RefusedError(
            f"PerpGrad(scope='row') cannot be used with sharded parameters ({known}): a row may lie on several ranks. Use "
            f"scope='tensor'."
        )
    fits = all(placement.is_shard() or placement.is_replicate() for placement in parameter.placements)
    if not fits or (gradient is not None and getattr(gradient, "placements", None) != parameter.placements):
        raise RefusedError(
            f"PerpGrad cannot project the gradient of {known}: it is distributed as {parameter.placements}, and its "
            f"gradient as {getattr(gradient, 'placements', None)}. Shard both alike (`fully_shard`), or exclude it."
        )
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())
