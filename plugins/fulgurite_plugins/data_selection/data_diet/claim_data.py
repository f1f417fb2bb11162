# SPDX-License-Identifier: Apache-2.0
"""The data of the claim: three splits of the digits, one of which each seed gets."""

from __future__ import annotations

import os

from fulgurite_datamodules import Digits

_SPLITS = 3


class SplitDigits(Digits):
    """Handwritten digits, 1200 to train and 597 to test, in the split (and with the noise) of the seed modulo 3.

    Args:
        label_noise: Fraction of the training labels that are permuted among each other.
    """

    def __init__(self, label_noise: float = 0.0) -> None:
        split = int(os.environ.get("PL_GLOBAL_SEED", 0)) % _SPLITS
        super().__init__(
            val_size=0,
            test_size=597,
            split_seed=split,
            label_noise=label_noise,
            noise_kind="permute",
            noise_seed=split,
            batch_size=64,
            drop_last=True,
        )
