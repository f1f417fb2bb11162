# SPDX-License-Identifier: Apache-2.0
"""Second-order pruning as a callback (Frantar, Kurtic, Alistarh, 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite.errors import RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention, others_that_change
from fulgurite.random import derived_seed
from fulgurite_plugins.curvature.m_fac.collection import gradient_rows, recalibrate
from fulgurite_plugins.curvature.m_fac.functional import check_damping, densities
from fulgurite_plugins.curvature.m_fac.obs import lowest, prune_once

_SHARDED = dict.fromkeys(
    ("fsdp", "model_parallel", "deepspeed"),
    "it ranks and updates whole weight tensors, which are sharded there. Prune with DDP or on one device.",
)


class MFACPruner(Intervention):
    r"""Prune weights where the loss rises least, and move the others to make up for it; then keep the zeros.

    From the gradients of `num_grads` mini-batches comes a damped empirical Fisher $F$ in blocks. The weights with the
    smallest $\rho_i = w_i^2 / (2 [F^{-1}]_{ii})$ are dropped, the others get $\delta = F^{-1} q$ with
    $q_i = -w_i / [F^{-1}]_{ii}$ on what is dropped. This is done in rounds with new gradients, between which the
    density falls geometrically. After every step of the optimizer the dropped weights are set to zero again.

    Pruning `k` happens at the start of epoch `start_epoch + k * every_n_epochs`, counted from 0; one that falls on
    the end of training (`max_epochs`) happens after the last epoch.

    Args:
        sparsities: The fraction of weights that are zero after each pruning: numbers in [0, 1) that rise.
        every_n_epochs: Epochs from one pruning to the next, in which the rest is fine-tuned.
        start_epoch: The epoch of the first pruning; 0 for a model that is trained already.
        num_grads: Mini-batch gradients in the Fisher $m$, of all ranks together.
        grad_batch_size: Examples in such a mini-batch.
        block_size: Weights in a diagonal block of the Fisher; None for no blocks.
        damping: $\lambda$, positive.
        recomputations: Rounds with new gradients in each pruning.
        scope: Whether weights are ranked among all (`"global"`) or within their `"layer"`.
        modules: Names of the layers of `torch.nn` whose `weight` is pruned.
        method: `"mfac"`, or `"magnitude"`: the smallest weights are dropped and the others stay, which needs no
            gradients.
        finetune_lrs: Learning rates of all parameter groups from each pruning on; None leaves them alone.
        lr_drop: What the rate is multiplied by in the last epoch before the next pruning, if `finetune_lrs` are given.
        joint_update: Whether to solve for all dropped weights of a block together, instead of adding up what each
            asks for.
        recalibrate_batchnorm: Whether to measure the running statistics of batch norm anew after a pruning.
        seed: Seeds the choice of examples.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> pruner = MFACPruner((0.5, 0.8, 0.9), every_n_epochs=2)
        >>> trainer = pl.Trainer(max_epochs=10, callbacks=[pruner])  # doctest: +SKIP
    """

    def __init__(
        self,
        sparsities: Sequence[float],
        every_n_epochs: int = 1,
        start_epoch: int = 0,
        num_grads: int = 64,
        grad_batch_size: int = 32,
        block_size: int | None = 128,
        damping: float = 1e-5,
        recomputations: int = 16,
        scope: Literal["global", "layer"] = "global",
        modules: Sequence[str] = ("Linear", "Conv1d", "Conv2d", "Conv3d"),
        method: Literal["mfac", "magnitude"] = "mfac",
        finetune_lrs: Sequence[float] | None = None,
        lr_drop: float = 0.1,
        joint_update: bool = False,
        recalibrate_batchnorm: bool = False,
        seed: int = 0,
    ) -> None:
        owner = "MFACPruner"
        rising = bool(sparsities) and all(is_number(s) and 0 <= s < 1 for s in sparsities)
        rising = rising and list(sparsities) == sorted(set(sparsities))
        check_argument(rising, "sparsities", owner, "numbers in [0, 1) that rise", sparsities)
        for name, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("start_epoch", start_epoch, 0),
            ("num_grads", num_grads, 1),
            ("grad_batch_size", grad_batch_size, 1),
            ("recomputations", recomputations, 1),
            ("seed", seed, 0),
        ):
            fits = isinstance(value, int) and value >= least
            check_argument(fits, name, owner, f"an integer of at least {least}", value)
        fits = block_size is None or (isinstance(block_size, int) and block_size >= 1)
        check_argument(fits, "block_size", owner, "a positive integer, or None for no blocks", block_size)
        check_damping(damping, owner)
        check_choice(scope, ("global", "layer"), "scope", owner)
        check_choice(method, ("mfac", "magnitude"), "method", owner)
        for name in modules:
            known = isinstance(name, str) and isinstance(getattr(nn, name, None), type)
            check_argument(known, "modules", owner, "names of layers of torch.nn", name)
        fits = finetune_lrs is None or (
            len(finetune_lrs) == len(sparsities) and all(is_number(lr) and lr > 0 for lr in finetune_lrs)
        )
        check_argument(
            fits, "finetune_lrs", owner, f"{len(sparsities)} positive numbers, one per pruning", finetune_lrs
        )
        check_argument(is_number(lr_drop) and lr_drop > 0, "lr_drop", owner, "a positive number", lr_drop)
        fits = not joint_update or block_size is not None
        check_argument(fits, "joint_update", owner, "False without blocks (give a block_size)", joint_update)
        self.sparsities = tuple(sparsities)
        self.every_n_epochs = every_n_epochs
        self.start_epoch = start_epoch
        self.num_grads = num_grads
        self.grad_batch_size = grad_batch_size
        self.block_size = block_size
        self.damping = damping
        self.recomputations = recomputations
        self.scope = scope
        self.modules = tuple(modules)
        self.method = method
        self.finetune_lrs = finetune_lrs
        self.lr_drop = lr_drop
        self.joint_update = joint_update
        self.recalibrate_batchnorm = recalibrate_batchnorm
        self.seed = seed
        self.done = 0
        self.masks: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._multipliers: list[Tensor] = []

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """Gradients are taken of the loss that the training step returns."""
        return Capabilities(
            manual_optimization=self.method == "magnitude", refused_strategies=_SHARDED, exclusive=("pruning",)
        )

    def state_arguments(self) -> dict[str, Any]:
        """The schedule and the layers tell two instances apart."""
        return {"sparsities": self.sparsities, "modules": self.modules, "method": self.method}

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that is held at zero."""
        total = sum(weight.numel() for weight in self._weights.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / total if self.masks else 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what the training of another trainer has left; a checkpoint is restored after this."""
        if stage == "fit" and trainer.current_epoch == 0:
            self.done, self.masks, self._weights, self._multipliers = 0, {}, {}, []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the weights, and check that every pruning will happen."""
        self._weights = prunable(pl_module, self.modules)
        if not self._weights:
            raise RefusedError(
                f"MFACPruner found no trainable weight of a {', '.join(self.modules)} in {type(pl_module).__name__}. "
                f"Name the layers in `modules`.{others_that_change(trainer, self)}"
            )
        last = self._epoch_of(len(self.sparsities) - 1)
        if trainer.max_epochs is not None and 0 < trainer.max_epochs < last:
            raise RefusedError(
                f"MFACPruner would prune for the last time at the start of epoch {last}, but training ends after "
                f"{trainer.max_epochs} epochs. Raise max_epochs, or lower start_epoch or every_n_epochs."
            )
        if self.finetune_lrs is not None and trainer.lr_scheduler_configs:
            raise RefusedError(
                "MFACPruner sets the learning rates of its phases (finetune_lrs), which the module's own scheduler would "
                "overwrite. Remove one of the two."
            )
        self._bind()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune if it is time, and set the learning rate of the phase."""
        self._prune_due(trainer, pl_module)
        if self.finetune_lrs is not None and self.done:
            before_next = self.done < len(self.sparsities) and trainer.current_epoch + 1 == self._epoch_of(self.done)
            rate = self.finetune_lrs[self.done - 1] * (self.lr_drop if before_next else 1.0)
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the sparsity."""
        pl_module.log("mfacpruner/sparsity", self.sparsity)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune after the last epoch, if that is when it is due."""
        self._prune_due(trainer, pl_module)

    @torch.no_grad()
    def constrain(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Set the dropped weights to zero again."""
        if self._multipliers:
            torch._foreach_mul_(list(self._weights.values()), self._multipliers)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, and how many prunings are done."""
        return {"version": 1, "done": self.done, "masks": dict(self.masks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the masks."""
        self.done, self.masks = state_dict["done"], dict(state_dict["masks"])

    def _epoch_of(self, number: int) -> int:
        return self.start_epoch + number * self.every_n_epochs

    def _prune_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        while self.done < len(self.sparsities) and self._epoch_of(self.done) <= trainer.current_epoch:
            self._prune(trainer, module)
            self.done += 1

    def _prune(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        weights, target = list(self._weights.values()), 1 - self.sparsities[self.done]
        kept = torch.cat([mask.reshape(-1) for mask in self._bool_masks()])
        present = float(kept.sum()) / len(kept)
        if target >= present:
            return
        rounds = self.recomputations if self.method == "mfac" else 1
        for number, density in enumerate(densities(present, target, rounds)):
            seed = derived_seed(self.seed, self.done, number)
            kept = self._round(trainer, module, weights, kept, density, seed)
        pieces = kept.split([weight.numel() for weight in weights])
        self.masks = {n: m.view_as(w) for (n, w), m in zip(self._weights.items(), pieces, strict=True)}
        self._bind()
        if self.recalibrate_batchnorm:
            recalibrate(
                trainer, module, self.num_grads, self.grad_batch_size, derived_seed(self.seed, self.done, rounds)
            )

    @torch.no_grad()
    def _round(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        weights: list[nn.Parameter],
        kept: Tensor,
        density: float,
        seed: int,
    ) -> Tensor:
        """Drop weights down to a density, and return which of all are kept."""
        flat = torch.cat([weight.reshape(-1) for weight in weights])
        values = flat[kept].to(torch.promote_types(flat.dtype, torch.float32))
        layers = [weight.numel() for weight in weights] if self.scope == "layer" else [len(flat)]
        sizes = [int(part.sum()) for part in kept.split(layers)]
        counts = [max(0, size - round(density * full)) for size, full in zip(sizes, layers, strict=True)]
        if self.method == "magnitude":
            dropped = lowest(values.abs(), sizes, counts)
            values = torch.where(dropped, 0.0, values)
        else:
            rows = gradient_rows(trainer, module, weights, kept, self.num_grads, self.grad_batch_size, seed)
            values, dropped = prune_once(
                values, rows, self.num_grads, sizes, counts, self.damping, self.block_size, self.joint_update
            )
        flat = torch.zeros_like(flat).masked_scatter_(kept, values.to(flat.dtype))
        for weight, piece in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
            weight.copy_(piece.view_as(weight))
        return kept.masked_scatter(kept, ~dropped)

    def _bool_masks(self) -> list[Tensor]:
        return [
            self.masks[name].to(weight.device) if name in self.masks else torch.ones_like(weight, dtype=torch.bool)
            for name, weight in self._weights.items()
        ]

    def _bind(self) -> None:
        """Make what the weights are multiplied by after each step."""
        unknown = sorted(set(self.masks) - set(self._weights))
        if unknown:
            raise RefusedError(
                f"MFACPruner: the checkpoint has masks for {', '.join(unknown)}, which this model does not have or does not "
                f"train. Resume with the model and the `modules` that it was saved with."
            )
        weights = self._weights.values()
        masks = self._bool_masks() if self.masks else []
        self._multipliers = [mask.to(weight.dtype) for mask, weight in zip(masks, weights, strict=False)]


def prunable(module: nn.Module, kinds: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the weights of layers of certain classes of `torch.nn`, by name; what is frozen or parametrised is none.

    Args:
        module: The model.
        kinds: Names of the classes.
    """
    classes = tuple(getattr(nn, kind) for kind in kinds)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, layer in module.named_modules():
        weight = layer._parameters.get("weight") if isinstance(layer, classes) else None
        if weight is not None and weight.requires_grad and id(weight) not in seen:
            seen.add(id(weight))
            found[f"{prefix}.weight" if prefix else "weight"] = weight
    return found
