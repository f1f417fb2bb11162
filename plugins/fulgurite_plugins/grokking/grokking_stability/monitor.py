# SPDX-License-Identifier: Apache-2.0
"""The Softmax Collapse monitor."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fulgurite import distributed, lightning_adapter
from fulgurite.captured import CapturedLoss
from fulgurite.errors import RefusedError, check_argument
from fulgurite.losses import LossCall
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.grokking.grokking_stability.functional import precision
from fulgurite_plugins.grokking.grokking_stability.intervention import ReplaceSoftmax
from fulgurite_plugins.grokking.grokking_stability.metrics import NLMAlignment, SoftmaxCollapse, ZeroLossFraction

_SHARDED = ("fsdp", "model_parallel", "deepspeed")


class NumericalStabilityMonitor(pl.Callback):
    r"""Log, during training, how much of softmax has collapsed, and how far the gradient points along the weights.

    It measures on a fixed set of training examples, in evaluation mode, by the user's own training step, and changes
    nothing. It logs under `stability/`, for each precision in `dtypes`,

    - `collapse_DTYPE`: the fraction of examples for which softmax has collapsed in it (`SoftmaxCollapse`);
    - `zero_loss_DTYPE`: the fraction whose loss is exactly 0 in it (`ZeroLossFraction`);

    and of the criterion as it is, with `ReplaceSoftmax` if the trainer has it,

    - `zero_gradients`: the fraction whose gradient for the logit of their own class is exactly 0;
    - `nlm_alignment`: the cosine between the descent direction and all weights; `nlm_fraction`, its square, is the part of
      the squared gradient that only scales the weights.

    What needs a class for each example is left out where targets are probabilities.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        dtypes: Precisions to look at: `"float16"`, `"bfloat16"`, `"float32"`, `"float64"`.
        dataloader: The examples; None for those of training.
        max_samples: Examples at most, drawn once; None for all.
        per_tensor: Whether to log `nlm_alignment/NAME` for each parameter too.
        criterion: The criterion: an attribute of the module or a function of `torch.nn.functional`; by default the only
            one that the training step calls.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[NumericalStabilityMonitor()])  # doctest: +SKIP
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32", "float64"),
        dataloader: DataLoader[Any] | None = None,
        max_samples: int | None = 4096,
        per_tensor: bool = False,
        criterion: str | None = None,
    ) -> None:
        owner = type(self).__name__
        for name, value in (("every_n_steps", every_n_steps), ("max_samples", max_samples)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            fits = whole or (value is None and name == "max_samples")
            check_argument(fits, name, owner, "a positive whole number", value)
        for dtype in dtypes:
            precision(dtype, owner, "dtypes")
        self.every_n_steps = every_n_steps
        self.dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
        self.dataloader = dataloader
        self.max_samples = max_samples
        self.per_tensor = per_tensor
        self.criterion = criterion
        self._batches: FixedBatches | None = None
        self._captured: CapturedLoss | None = None
        self._measured = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what it cannot measure.

        Raises:
            RefusedError: If parameters are sharded.
        """
        strategy = lightning_adapter.strategy_name(trainer)
        if stage == "fit" and strategy in _SHARDED:
            raise RefusedError(
                f"NumericalStabilityMonitor cannot be used with the strategy {strategy!r}: it differentiates the loss for "
                f"whole parameters, which are sharded there. Measure a checkpoint on one device."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the examples."""
        name = type(self).__name__
        source = "train" if self.dataloader is None else self.dataloader
        self._batches = FixedBatches(trainer, name, source, self.max_samples, share=True)  # type: ignore[arg-type]
        self._captured = CapturedLoss(trainer, pl_module, name, self.criterion)
        self._measured = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time."""
        step = trainer.global_step
        if step != self._measured and step % self.every_n_steps == 0:
            self._measured = step
            for name, value in self.measure(trainer, pl_module).items():
                pl_module.log(f"stability/{name}", value)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of module and data."""
        self._batches = self._captured = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of module and data."""
        self._batches = self._captured = None

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Tensor]:
        """Return what would be logged now, by name; on several ranks, all of them call this."""
        assert self._batches is not None
        assert self._captured is not None
        device = module.device
        collapse = {dtype: SoftmaxCollapse(dtype).to(device) for dtype in self.dtypes}
        zero_loss = {dtype: ZeroLossFraction(dtype).to(device) for dtype in self.dtypes}
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gradients = [torch.zeros_like(p, dtype=_wide(p)) for p in named.values()]
        counts = torch.zeros(3, dtype=torch.int64, device=device)  # examples; zero gradients; gradients
        for batch in self._batches:
            call = self._captured(batch).call
            actual = self._as_trained(trainer, call)
            examples = len(call.outputs)
            counts[0] += examples
            for total, part in zip(gradients, _gradients(actual, list(named.values())), strict=True):
                total.add_(part, alpha=examples)
            for dtype in self.dtypes:
                collapse[dtype].update(call.outputs)
            if not call.targets.is_floating_point():
                for dtype in self.dtypes:
                    zero_loss[dtype].update(call.outputs, call.targets)
                zero = self._own_gradients(trainer, call) == 0
                counts[1:] += torch.stack([zero.sum(), torch.tensor(zero.numel(), device=device)])
        gradients, counts = _over_ranks(gradients, counts)
        found = {f"collapse_{dtype}": metric.compute() for dtype, metric in collapse.items()}
        if counts[2] > 0:
            found |= {f"zero_loss_{dtype}": metric.compute() for dtype, metric in zero_loss.items()}
            found["zero_gradients"] = counts[1] / counts[2]
        return found | self._alignments(named, gradients)

    def _as_trained(self, trainer: pl.Trainer, call: LossCall) -> LossCall:
        """Return the call that training makes: as the trainer's `ReplaceSoftmax` changes it."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ReplaceSoftmax):
                call = callback.on_loss(call)
        return call

    def _own_gradients(self, trainer: pl.Trainer, call: LossCall) -> Tensor:
        """Return the gradient of the loss for the logit of each example's own class, of those that have one."""
        leaf = call.outputs.detach().requires_grad_()
        loss = self._as_trained(trainer, call.replace(outputs=leaf)).evaluate().sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        kept = call.targets != call.arguments.get("ignore_index", -100)
        own = gradient.gather(1, torch.where(kept, call.targets, 0).unsqueeze(1)).squeeze(1)
        return own[kept]

    def _alignments(self, named: dict[str, nn.Parameter], gradients: list[Tensor]) -> dict[str, Tensor]:
        whole, found = NLMAlignment(sync_on_compute=False), {}
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            one = NLMAlignment(sync_on_compute=False)
            for metric in (whole, one) if self.per_tensor else (whole,):
                metric.to(parameter.device).update(parameter, gradient)
            if self.per_tensor:
                found[f"nlm_alignment/{name}"] = one.compute()
        alignment = whole.compute()
        return {"nlm_alignment": alignment, "nlm_fraction": alignment.square(), **found}


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _gradients(call: LossCall, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of the mean loss, zero where it does not depend on a parameter."""
    loss = call.evaluate()
    found = torch.autograd.grad(loss if loss.ndim == 0 else loss.mean(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _over_ranks(gradients: list[Tensor], counts: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return sums over all ranks; sums of gradients are given as multiples of them, whose direction is what counts."""
    if distributed.is_distributed():
        world = distributed.world()[1]
        gradients = [distributed.average_(gradient) for gradient in gradients]
        counts = (distributed.average_(counts.double()) * world).round().long()
    return gradients, counts
