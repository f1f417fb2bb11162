# SPDX-License-Identifier: Apache-2.0
"""The static algorithm: everything that can be known of the inverse of a damped Fisher of given gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.errors import check_argument
from fulgurite_plugins.curvature.m_fac.functional import check_damping, full_precision, gram_cholesky

_PAGE = 2**20
"""Numbers of a matrix in float64 that are worked on at a time."""


class FisherInverse:
    r"""Products with, and entries of, $F^{-1}$ for $F = \lambda I + \frac{1}{m} G^T G$, whole or in diagonal blocks.

    With $S = m \lambda I + G G^T = L L^T$ and $Z = L^{-1} G$ it is $F^{-1} = \frac{1}{\lambda}(I - Z^T Z)$. A block
    of no more than $m$ columns is smaller than its $S$: there $F = L L^T$ itself is factorised, and $F^{-1} = L^{-T}
    L^{-1}$. Both have the form $F^{-1} = a I + s R^T R$, and only $R$ is kept: $\min(m, B)$ numbers for each of the
    $d$ columns. It is exact for this $F$, equal to the paper's recursion, and level-3 BLAS. Gram matrices and factors
    are in float64, the rest in the precision of the gradients.

    Args:
        gradients: $G$ `[m, d]`: one gradient a row. It is not kept.
        damping: $\lambda$, positive.
        block_size: Columns $B$ of a diagonal block; the last may be smaller. None for one block with all columns.
        device: Where to compute, if not where the gradients lie. Results and the kept $R$ go back there, so that what
            does not fit on the device passes through it page by page.
        chunk_blocks: Blocks that are worked on at a time; None for about 8 MB.

    Raises:
        ValueError: If an argument is outside its range, or a gradient is not finite.

    Example:
        >>> inverse = FisherInverse(torch.tensor([[1.0, 0.0]]), damping=1.0)
        >>> inverse.mul(torch.tensor([2.0, 2.0])), inverse.diag()
        (tensor([1., 2.]), tensor([0.5000, 1.0000]))
    """

    def __init__(
        self,
        gradients: Tensor,
        damping: float,
        block_size: int | None = None,
        device: torch.device | str | None = None,
        chunk_blocks: int | None = None,
    ) -> None:
        owner = "FisherInverse"
        check_damping(damping, owner)
        for name, value in (("block_size", block_size), ("chunk_blocks", chunk_blocks)):
            fits = value is None or (isinstance(value, int) and value >= 1)
            check_argument(fits, name, owner, "a positive integer or None", value)
        described = f"{list(gradients.shape)} {gradients.dtype}"
        fits = gradients.ndim == 2 and 0 not in gradients.shape and gradients.is_floating_point()
        check_argument(fits, "gradients", owner, "a matrix [m, d] of real numbers", described)
        finite = bool(torch.stack(gradients.aminmax()).isfinite().all())
        check_argument(finite, "gradients", owner, "finite", "NaN or infinite numbers")
        rows, self.size = gradients.shape
        self.block_size = min(block_size or self.size, self.size)
        self.dtype = torch.promote_types(gradients.dtype, torch.float32)
        self.device = gradients.device
        self._compute = gradients.device if device is None else torch.device(device)
        direct = self.block_size <= rows
        self._identity, self._sign = (0.0, 1.0) if direct else (1 / damping, -1 / damping)
        self._shared = block_size is None and not direct
        with torch.no_grad():
            if self._shared:
                self._pages = self._column_pages(gradients, damping)
            else:
                chunk = chunk_blocks or max(1, _PAGE // (rows * self.block_size + 2 * min(rows, self.block_size) ** 2))
                self._pages = self._block_pages(gradients, damping, chunk, direct)

    def mul(self, vectors: Tensor) -> Tensor:
        r"""Return $F^{-1} x$ in the shape of `vectors`, `[d]` or `[d, k]`, at a cost of $O(d \min(m, B))$ for each."""
        with full_precision():
            parts = self._split(vectors.reshape(self.size, -1))
            inner = [self._at(page) @ part for page, part in zip(self._pages, parts, strict=True)]
            if self._shared:
                inner = [torch.stack(inner).sum(0)] * len(inner)
            outer = [self._at(page).mT @ sums for page, sums in zip(self._pages, inner, strict=True)]
            products = [self._identity * part + self._sign * out for part, out in zip(parts, outer, strict=True)]
            return self._join(products).view_as(vectors).to(vectors)

    def diag(self) -> Tensor:
        r"""Return $\mathrm{diag}(F^{-1})$ `[d]`."""
        with torch.no_grad():
            squares = [self._at(page).square().sum(1).unsqueeze(2) for page in self._pages]
            return self._identity + self._sign * self._join(squares).squeeze(1).to(self.device)

    def entry(self, i: int, j: int) -> Tensor:
        r"""Return $[F^{-1}]_{ij}$, a scalar, which is 0 between blocks, at a cost of $O(\min(m, B))$."""
        return self.submatrix(torch.tensor([i, j]))[0, 1]

    def submatrix(self, indices: Tensor) -> Tensor:
        r"""Return the rows and columns of $F^{-1}$ with certain numbers `[n]`, as a matrix `[n, n]`.

        Raises:
            IndexError: If a number is not in [0, d).
        """
        numbers = indices.tolist()
        if not all(0 <= number < self.size for number in numbers):
            raise IndexError(f"Expected indices of FisherInverse in [0, {self.size}), but got {numbers}.")
        columns = torch.stack([self._column(number) for number in numbers], dim=1)
        indices = indices.to(self.device)
        block = indices // self.block_size
        same, equal = block.unsqueeze(1) == block, indices.unsqueeze(1) == indices
        return self._identity * equal + self._sign * (columns.T @ columns) * same

    def blocks(self) -> Iterator[Tensor]:
        r"""Yield the diagonal blocks of $F^{-1}$, some `[b, B, B]` at a time; the last is padded.

        Raises:
            ValueError: If no `block_size` was given: the single block could be as large as $F$.
        """
        check_argument(not self._shared, "block_size", "FisherInverse.blocks", "given", None)
        for page in self._pages:
            root = self._at(page)
            identity = torch.eye(self.block_size, dtype=root.dtype, device=root.device)
            yield self._identity * identity + self._sign * (root.mT @ root)

    def _column_pages(self, gradients: Tensor, damping: float) -> list[Tensor]:
        """Return Z of a single block, some columns at a time."""
        rows = len(gradients)
        pages = gradients.split(max(1, _PAGE // rows), dim=1)
        gram = torch.zeros(rows, rows, dtype=torch.float64, device=self._compute)
        for page in pages:
            columns = self._at(page).double()
            gram += columns @ columns.T
        identity = torch.eye(rows, dtype=torch.float64, device=self._compute)
        inverse = torch.linalg.solve_triangular(gram_cholesky(gram, damping), identity, upper=False)
        roots = (inverse @ self._at(page).double() for page in pages)
        return [root.to(self.device, self.dtype).unsqueeze(0) for root in roots]

    def _block_pages(self, gradients: Tensor, damping: float, chunk: int, direct: bool) -> list[Tensor]:
        """Return R of all blocks, some blocks at a time; the last block is filled up with columns of zeros."""
        size, pages = self.block_size, []
        for part in gradients.split(chunk * size, dim=1):
            filled = F.pad(self._at(part).double(), (0, -part.shape[1] % size))
            blocks = filled.view(len(gradients), -1, size).transpose(0, 1)
            if direct:
                fisher = blocks.mT @ blocks / len(gradients)
                fisher.diagonal(dim1=1, dim2=2).add_(damping)
                right = torch.eye(size, dtype=torch.float64, device=filled.device)
                factor = torch.linalg.cholesky_ex(fisher).L
            else:
                factor, right = gram_cholesky(blocks @ blocks.mT, damping), blocks
            root = torch.linalg.solve_triangular(factor, right, upper=False)
            pages.append(root.to(self.device, self.dtype))
        return pages

    def _split(self, columns: Tensor) -> list[Tensor]:
        """Return the rows `[d, k]` as the pages have them, `[b, B, k]` each."""
        shapes = [(page.shape[0], page.shape[2]) for page in self._pages]
        columns = columns.to(self._compute, self.dtype)
        filled = F.pad(columns, (0, 0, 0, sum(b * size for b, size in shapes) - self.size))
        parts = filled.split([b * size for b, size in shapes])
        return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1, part.shape[2]) for part in parts])[: self.size]

    def _at(self, page: Tensor) -> Tensor:
        return page.to(self._compute)

    def _column(self, number: int) -> Tensor:
        """Return one column of R."""
        for page in self._pages:
            width = page.shape[0] * page.shape[2]
            if number < width:
                return page[number // page.shape[2], :, number % page.shape[2]]
            number -= width
        raise AssertionError
