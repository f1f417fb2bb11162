# SPDX-License-Identifier: Apache-2.0
"""Small networks for examples, claims and tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from fulgurite.errors import check_argument


class MLP(nn.Sequential):
    """A multilayer perceptron with ReLU that flattens its input.

    Args:
        input_shape: Shape of one input.
        num_classes: Number of outputs.
        hidden: Widths of the hidden layers.
        dropout: Rate of dropout after each hidden layer; None for no such layers.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: Sequence[int] = (128, 128),
        dropout: float | None = None,
    ) -> None:
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(), *([] if dropout is None else [nn.Dropout(dropout)])]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class SmallConvNet(nn.Module):
    """Two convolutions with batch norm, average pooling and a linear layer, for images of any size.

    Args:
        input_shape: Shape of one image, `(channels, height, width)`.
        num_classes: Number of outputs.
        width: Channels of the first convolution; the second has twice as many.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, width: int = 16) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"Expected `input_shape` of SmallConvNet to be (channels, height, width), but got {tuple(input_shape)}. "
                f"Use MLP for inputs that are not images."
            )
        self.features = nn.Sequential(
            nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, channels, height, width]` to logits `[B, num_classes]`."""
        return self.head(self.features(x))


class SmallTransformer(nn.Module):
    """A transformer encoder that reads tokens and classifies by the last: an embedding, post-norm layers, a linear layer.

    There is no code of positions: the last token is told from the others, these not from each other, which is enough for
    pairs.

    Args:
        input_shape: Shape of one input, `(length,)`.
        num_classes: Number of outputs.
        tokens: Number of different tokens; None for `num_classes`, as in modular arithmetic.
        width: Width of the embedding and of the layers.
        depth: Number of layers.
        heads: Heads of attention; they divide the width.
        feedforward: Hidden units of the perceptron in each layer, which has ReLU.
        dropout: Rate of dropout: of attention, within the perceptron, and after both.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        tokens: int | None = None,
        width: int = 128,
        depth: int = 1,
        heads: int = 4,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        tokens = num_classes if tokens is None else tokens
        if len(input_shape) != 1:
            raise ValueError(
                f"Expected `input_shape` of SmallTransformer to be (length,), but got {tuple(input_shape)}. It reads "
                f"sequences of tokens; use SmallConvNet for images."
            )
        sizes = {"tokens": tokens, "width": width, "depth": depth, "heads": heads, "feedforward": feedforward}
        for name, size in sizes.items():
            check_argument(size >= 1, name, owner, "at least 1", size)
        check_argument(width % heads == 0, "width", owner, f"a multiple of its {heads} heads", width)
        check_argument(0 <= dropout < 1, "dropout", owner, "in [0, 1)", dropout)
        self.embedding = nn.Embedding(tokens, width)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, feedforward, dropout, batch_first=True) for _ in range(depth))
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map tokens `[B, length]` to logits `[B, num_classes]`.

        Raises:
            ValueError: If the inputs are no sequences of tokens.
        """
        if inputs.is_floating_point() or inputs.ndim != 2:
            raise ValueError(
                f"Expected tokens [B, length] (int64), but SmallTransformer got {inputs.dtype} {list(inputs.shape)}. Use "
                f"MLP for vectors; ModularArithmetic has tokens if encoding='tokens'."
            )
        return self.head(self.layers(self.embedding(inputs))[:, -1])
