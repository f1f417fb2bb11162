# SPDX-License-Identifier: Apache-2.0
"""Neurons that memorise are pruned, as a callback."""

from __future__ import annotations

from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fulgurite import distributed
from fulgurite.errors import RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention, others_that_change
from fulgurite_plugins.grokking.corrupted_grokking.functional import Basis
from fulgurite_plugins.grokking.corrupted_grokking.ipr import SHARDED
from fulgurite_plugins.grokking.corrupted_grokking.neurons import Layers, Neurons, find_neurons
from fulgurite_plugins.grokking.corrupted_grokking.surgery import (
    Order,
    check_removable,
    fit_to_state,
    fold_masks,
    fold_masks_in_state,
    lay_masks,
    mask_for,
    masks_of,
    places,
    ranked,
    remove,
    zero_moments,
)

Mode = Literal["zero", "mask", "remove"]


class IPRPruning(Intervention):
    """Prune the neurons whose weights are concentrated least, or most, or some at random, during training or at its end.

    The weights that lead to a pruned neuron, and those that lead away from it, are zero from then on. Neurons are scored as
    by `NeuronIPR`. In mode `"zero"` zeros are written, the optimizer forgets these weights, and they are written again after
    every step. In mode `"mask"` the weights are multiplied with masks, from the beginning of training, that are made plain
    when it ends. In mode `"remove"` the layers become smaller.

    Args:
        fraction: Fraction of the neurons, in [0, 1); `floor(fraction * N)` are pruned.
        order: `"lowest"` scores first, which is the method; `"highest"` or `"random"` to compare.
        mode: `"zero"`, `"mask"` or `"remove"`.
        at_epoch: The epoch, counted from 0, at whose beginning they are pruned; None for the end of training.
        layers: `{"in": [...], "out": [...]}`, names of linear layers; or `"auto"`.
        r: The power of the ratio.
        basis: The basis of the ratio; see `NeuronIPR`.
        seed: Seed of the random order.

    Attributes:
        pruned: The pruned neurons `[n]`, as they were numbered before; None before.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        fraction: float,
        order: Order = "lowest",
        mode: Mode = "zero",
        at_epoch: int | None = None,
        layers: Layers = "auto",
        r: float = 2,
        basis: Basis = "fourier",
        seed: int = 0,
    ) -> None:
        fits = is_number(fraction) and 0 <= fraction < 1
        check_argument(fits, "fraction", "IPRPruning", "in [0, 1): some neurons must stay", fraction)
        check_choice(order, get_args(Order), "order", "IPRPruning")
        check_choice(mode, get_args(Mode), "mode", "IPRPruning")
        fits = at_epoch is None or (isinstance(at_epoch, int) and at_epoch >= 0)
        check_argument(fits, "at_epoch", "IPRPruning", "an epoch, counted from 0, or None", at_epoch)
        check_argument(r > 1, "r", "IPRPruning", "above 1", r)
        self.fraction = fraction
        self.order: Order = order
        self.mode: Mode = mode
        self.at_epoch = at_epoch
        self.layers = layers
        self.r = r
        self.basis = basis
        self.seed = seed
        self.pruned: Tensor | None = None
        self._trains = True
        self._handle: RemovableHandle | None = None
        self._zeros: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """Whole rows of weights are needed, and layers that change their size upset what DDP has prepared."""
        refused = dict(SHARDED, model_parallel="it writes whole rows of weights, which are sharded there. Use DDP.")
        if self.mode == "remove" and self.at_epoch is not None:
            refused["ddp"] = (
                "layers that become smaller in the middle of training do not fit its buckets of gradients. Use mode='zero' "
                "or 'mask', or at_epoch=None."
            )
        return Capabilities(refused_strategies=refused, exclusive=("choice of neurons", "pruning"))

    def state_arguments(self) -> dict[str, Any]:
        """Two prunings are told apart by when they happen and in which order."""
        return {"order": self.order, "at_epoch": self.at_epoch, "mode": self.mode}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note what is about to run; a checkpoint is restored after this."""
        self._trains = stage == "fit"
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = [type(found).__name__ for found in callbacks if isinstance(found, WeightAveraging)]
        if self._trains and self.mode == "remove" and averaging:
            raise RefusedError(
                f"IPRPruning(mode='remove') makes layers smaller, but the copy of the model in {averaging[0]} keeps its "
                f"size. Use mode='zero' or 'mask', or remove one of them."
            )
        if self._trains and trainer.current_epoch == 0:
            self.pruned = self._zeros = None

    def operate(self, module: pl.LightningModule) -> None:
        """Lay the masks; or let a checkpoint of a smaller model, or one with masks, be loaded."""
        if self.fraction == 0:
            return
        neurons = self._neurons(module)
        if self.mode == "mask" and self._trains:
            if not masks_of(neurons):
                lay_masks(neurons)
        elif self.mode != "zero":
            self._stop_loading()
            self._handle = module.register_load_state_dict_pre_hook(self._before_loading)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, if it is the epoch."""
        if trainer.current_epoch == self.at_epoch:
            self._prune(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, if it was to be done at the end."""
        if self.at_epoch is None:
            self._prune(trainer, pl_module)

    def constrain(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Write the zeros again: weight decay and momentum leave them alone, gradients need not."""
        if self.mode != "zero" or self.pruned is None or not len(self.pruned):
            return
        if self._zeros is None:
            found = places(self._neurons(module))
            self._zeros = (
                [getattr(owner, name) for owner, name, _ in found],
                [mask_for(place, self.pruned) for place in found],
            )
        with torch.no_grad():
            torch._foreach_mul_(*self._zeros)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make masked weights plain when `fit` has ended."""
        self._stop_loading()
        self._zeros = None
        if stage == "fit" and self.mode == "mask" and self.fraction:
            fold_masks(self._neurons(pl_module))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the masks, so that a checkpoint of the emergency is exact and another `fit` goes on."""
        self._stop_loading()
        self._zeros = None

    def state_dict(self) -> dict[str, Any]:
        """Return which neurons were pruned."""
        return {"version": 1, "pruned": None if self.pruned is None else self.pruned.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore which neurons were pruned."""
        self.pruned, self._zeros = state_dict["pruned"], None

    def _prune(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.pruned is not None or self.fraction == 0:
            return
        neurons = self._neurons(module)
        scores = neurons.scores(self.r, self.basis)
        distributed.broadcast_([scores])  # devices of two kinds may round differently
        count = int(self.fraction * neurons.width + 1e-9)  # 0.29 * 100 is a little less than 29
        self.pruned = ranked(scores, self.order, self.seed)[:count].sort().values
        if self.mode == "remove":
            kept = torch.ones(neurons.width, dtype=torch.bool).index_fill_(0, self.pruned.cpu(), False)
            remove(neurons, kept.nonzero().squeeze(1), trainer.optimizers)
        elif self.mode == "mask":
            for place, mask in masks_of(neurons):
                mask.mask.copy_(mask_for(place, self.pruned))
        else:
            zero_moments(neurons, self.pruned, trainer.optimizers)
            with torch.no_grad():
                for place in places(neurons):
                    getattr(place[0], place[1]).mul_(mask_for(place, self.pruned))

    def _before_loading(self, module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        if self.mode == "mask":
            fold_masks_in_state(state)
        else:
            neurons = self._neurons(module)
            fit_to_state(neurons, {child: name for name, child in module.named_modules()}, state)

    def _neurons(self, module: nn.Module) -> Neurons:
        try:
            neurons = find_neurons(module, self.layers, "IPRPruning")
            if self.mode == "remove":
                check_removable(neurons)
        except RefusedError as refusal:
            trainer = getattr(module, "_trainer", None)
            others = "" if trainer is None else others_that_change(trainer, self)
            raise RefusedError(f"{refusal}{others}") from None
        return neurons

    def _stop_loading(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
