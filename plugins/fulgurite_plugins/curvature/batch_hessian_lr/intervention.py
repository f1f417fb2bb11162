# SPDX-License-Identifier: Apache-2.0
"""A learning rate and a momentum from a few Lanczos steps per epoch (Granziol, Zohren, Roberts, 2022)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from fulgurite import distributed, lightning_adapter
from fulgurite.curvature import Source, lanczos, step_loss
from fulgurite.errors import RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention
from fulgurite.random import derived_seed
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.curvature.batch_hessian_lr import rates
from fulgurite_plugins.curvature.batch_hessian_lr.functional import Extremes, rule_parameters, usable_extremes
from fulgurite_plugins.curvature.batch_hessian_lr.spectrum import MATRICES, SHARDED, Matrix

Rule = Literal["inverse", "polyak", "two_over_sum", "rayleigh"]

_USER = "SLQLearningRate (slq)"
_MAX_MOMENTUM = 0.99


class SLQLearningRate(Intervention):
    r"""Set learning rate and momentum from the extreme eigenvalues of the Hessian of a training batch.

    At the start of an epoch a few Lanczos steps on the batches of the first update give $\lambda_1$ and $\mu$, the
    smallest eigenvalue that is not noise. `rule` makes a learning rate and a momentum of them. The loss is that of the
    user's own `training_step`, in evaluation mode and in float32.

    Args:
        rule: `"inverse"`, $1 / \lambda_1$ with the momentum of the heavy ball; `"polyak"`, both of the heavy ball;
            `"two_over_sum"`, $2 / (\lambda_1 + \mu)$ without momentum; `"rayleigh"`, $|g|^2 / (g \cdot H g)$ along the
            gradient, with the momentum as it is.
        steps: Lanczos steps $k$.
        every_n_epochs: Epochs between two measurements.
        warmup_epochs: Epochs before the first one, with the rate of the optimizer.
        set_momentum: Whether the momentum is set too (the first of Adam's `betas`).
        safety: Factor of every rate that is set.
        max_change: By what factor the rate may change at once, up or down.
        lr_bounds: The smallest and the largest rate.
        on: Whether the Hessian is that of the `"batch"` of the next update, which governs stability, or of the
            `"dataset"`.
        operator: The matrix: `"hessian"`, `"ggn"`, `"fisher"`, or `"finite_differences"`.
        floor: Eigenvalues below this fraction of $\lambda_1$ are not taken for $\mu$.
        add_weight_decay: Whether weight decay counts as curvature.
        schedulers: What becomes of learning-rate schedulers: `"refuse"` them, or `"compose"`: the rate is the
            schedule's factor times what the rule gives.
        examples: With `on="dataset"`: how many examples at most; None for all.
        keep_graphs: Whether the graphs of all batches stay in memory from one product to the next.
        criterion: The criterion, where the training step calls several losses: an attribute of the module or a function
            of `torch.nn.functional`.
        seed: Seeds the start vectors.

    Attributes:
        lr: The rate that was set last, before schedules; None before training.
        momentum: The momentum that was set last.
        extremes: The extreme eigenvalues that were used last; None before.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[SLQLearningRate()])  # doctest: +SKIP
    """

    capabilities = Capabilities(manual_optimization=False, refused_strategies=SHARDED, exclusive=("learning rate",))

    def __init__(
        self,
        rule: Rule = "inverse",
        steps: int = 10,
        every_n_epochs: int = 1,
        warmup_epochs: int = 1,
        set_momentum: bool = True,
        safety: float = 1.0,
        max_change: float = 3.0,
        lr_bounds: tuple[float, float] = (1e-6, 10.0),
        on: Literal["batch", "dataset"] = "batch",
        operator: Matrix = "hessian",
        floor: float = 1e-3,
        add_weight_decay: bool = False,
        schedulers: Literal["refuse", "compose"] = "refuse",
        examples: int | None = None,
        keep_graphs: bool = True,
        criterion: str | None = None,
        seed: int = 0,
    ) -> None:
        self.rule = rule
        self.steps = steps
        self.every_n_epochs = every_n_epochs
        self.warmup_epochs = warmup_epochs
        self.set_momentum = set_momentum
        self.safety = safety
        self.max_change = max_change
        self.lr_bounds = lr_bounds
        self.on = on
        self.operator = operator
        self.floor = floor
        self.add_weight_decay = add_weight_decay
        self.schedulers = schedulers
        self.examples = examples
        self.keep_graphs = keep_graphs
        self.criterion = criterion
        self.seed = seed
        self._check_arguments()
        self._reset()

    def state_arguments(self) -> dict[str, Any]:
        """The rule and what it is measured on tell two instances apart."""
        return {"rule": self.rule, "on": self.on}

    def _check_arguments(self) -> None:
        user = "SLQLearningRate"
        choices = {
            "rule": get_args(Rule),
            "on": ("batch", "dataset"),
            "operator": get_args(Matrix),
            "schedulers": ("refuse", "compose"),
        }
        for name, allowed in choices.items():
            check_choice(getattr(self, name), allowed, name, user)
        for name, least in (("steps", 1), ("every_n_epochs", 1), ("warmup_epochs", 0), ("examples", 1)):
            value = getattr(self, name)
            fits = (isinstance(value, int) and value >= least) or (name == "examples" and value is None)
            check_argument(fits, name, user, f"an integer of at least {least}", value)
        check_argument(is_number(self.safety) and self.safety > 0, "safety", user, "positive", self.safety)
        check_argument(is_number(self.max_change) and self.max_change > 1, "max_change", user, "> 1", self.max_change)
        check_argument(is_number(self.floor) and 0 < self.floor < 1, "floor", user, "in (0, 1)", self.floor)
        low, high = self.lr_bounds
        fits = is_number(low) and is_number(high) and 0 < low <= high
        check_argument(fits, "lr_bounds", user, "two positive numbers, the smaller first", self.lr_bounds)

    def _reset(self) -> None:
        self.lr: float | None = None
        self.momentum = 0.0
        self.extremes: Extremes | None = None
        self._measured_epoch = -1
        self._measurements = 0
        self._batches: list[Any] = []

    @property
    def name(self) -> str:
        """The prefix of everything that is logged."""
        return "slq"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what the training of another trainer has left; a checkpoint is restored after this."""
        if stage == "fit" and trainer.current_epoch == 0:
            self._reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse optimizers and schedulers with which the rates would not be what they shall be."""
        optimizer = trainer.optimizers[0]
        names = {cls.__name__ for cls in type(optimizer).__mro__}
        if not names & {"SGD", "Adam", "AdamW"}:
            raise RefusedError(
                f"{_USER} computes the largest stable rate of SGD, Adam or AdamW; that of {type(optimizer).__name__} is "
                f"not known. Use one of these, or remove the plugin."
            )
        if trainer.lr_scheduler_configs and self.schedulers == "refuse":
            found = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
            raise RefusedError(
                f"{_USER} sets the learning rate, which {found} would overwrite. Remove the scheduler, or pass "
                f"schedulers='compose': then its factor multiplies the rate that is found."
            )
        if self.set_momentum and any(
            getattr(c.scheduler, "cycle_momentum", False) for c in trainer.lr_scheduler_configs
        ):
            raise RefusedError(
                f"{_USER} sets the momentum, which the scheduler would overwrite. Pass cycle_momentum=False to the "
                f"scheduler, or set_momentum=False."
            )
        if trainer.gradient_clip_val:
            warnings.warn(
                f"{_USER}: gradients are clipped (gradient_clip_val={trainer.gradient_clip_val}); the largest stable rate "
                f"is that of steps that are not.",
                stacklevel=2,
            )
        self.momentum = rates.momentum_of(optimizer)
        if self.lr is None:
            self.lr = rates.base_rate(optimizer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure with the batches of the epoch's first update, and set the rate for that update already."""
        epoch = trainer.current_epoch
        waited = epoch - self.warmup_epochs
        if waited < 0 or waited % self.every_n_epochs or epoch == self._measured_epoch:
            return
        self._batches.append(batch)
        if not lightning_adapter.completes_update(trainer):
            return
        batches: Iterable[Any] = self._batches
        self._batches, self._measured_epoch = [], epoch
        if self.on == "dataset":
            batches = FixedBatches(trainer, _USER, "train", self.examples, seed=self.seed, share=True)
        source = step_loss(trainer, pl_module, batches, _USER, self.criterion)
        found = self._measure(source, trainer.optimizers[0])
        self._measurements += 1
        if found is None:
            warnings.warn(
                f"{_USER}: no usable curvature was found before epoch {epoch} (none that is positive and finite, or no "
                f"step of Adam yet); the learning rate stays at {self.lr:.3g}.",
                stacklevel=2,
            )
        else:
            self._apply(trainer, *found)
        pl_module.log_dict(self._values(), on_step=True, on_epoch=False, batch_size=1)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of batches that were kept for a measurement."""
        self._batches = []

    def state_dict(self) -> dict[str, Any]:
        """Return what was found last, and how many measurements there were, from which the next probe is drawn."""
        return {
            "version": 1,
            "lr": self.lr,
            "extremes": None if self.extremes is None else tuple(self.extremes),
            "measured_epoch": self._measured_epoch,
            "measurements": self._measurements,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring it back; the optimizer's own rates and momentum are in the checkpoint too."""
        self.lr = state_dict["lr"]
        self.extremes = None if state_dict["extremes"] is None else Extremes(*state_dict["extremes"])
        self._measured_epoch, self._measurements = state_dict["measured_epoch"], state_dict["measurements"]

    def _values(self) -> dict[str, float]:
        assert self.lr is not None
        values = {"slq/lr": self.lr, "slq/momentum": self.momentum}
        if self.extremes is not None:
            values |= {"slq/largest": self.extremes.largest, "slq/smallest": self.extremes.smallest}
        return values

    def _measure(self, source: Source, optimizer: Optimizer) -> tuple[float, float] | None:
        """Return the rate and the momentum of the rule; None if no usable curvature was found."""
        metric = rates.Metric(optimizer, self.add_weight_decay)
        if not metric.known:
            return None
        parameters = rates.optimised(optimizer)
        arguments = {} if self.operator == "finite_differences" else {"keep_graphs": self.keep_graphs}
        with MATRICES[self.operator](source, parameters, **arguments) as matrix:
            product = metric.product(matrix)
            if self.rule == "rayleigh":
                gradient = metric.root * mean_gradient(source, parameters)
                along, length = torch.stack([gradient @ product(gradient), gradient @ gradient]).tolist()
                usable = is_number(along) and is_number(length) and along > 0 < length
                return (length / along, self.momentum) if usable else None
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self._measurements))
            start = torch.randn(len(metric.root), generator=generator, dtype=torch.float64)
            try:
                ritz, _ = lanczos(product, self.steps, start.to(metric.root)).ritz()
            except FloatingPointError:
                return None
        extremes = usable_extremes(ritz.tolist(), self.floor)
        if extremes is None:
            return None
        self.extremes = extremes
        return rule_parameters(self.rule, *extremes)

    def _apply(self, trainer: pl.Trainer, lr: float, momentum: float) -> None:
        optimizer, before = trainer.optimizers[0], self.lr
        if self.set_momentum and self.rule != "rayleigh":
            self.momentum = min(momentum, _MAX_MOMENTUM)
            rates.set_momentum(optimizer, self.momentum)
        if not before:  # parameters that shall not move
            return
        # A gradient enters the momentum at (1 - dampening) of its size; the rules assume that it enters whole.
        wanted = self.safety * lr / max(1.0 - rates.dampening(optimizer), 1e-3)
        wanted = min(max(wanted, before / self.max_change), before * self.max_change)
        self.lr = min(max(wanted, self.lr_bounds[0]), self.lr_bounds[1])
        rates.multiply_rates(trainer, optimizer, self.lr / before)


def mean_gradient(source: Source, parameters: list[Any]) -> Tensor:
    """Return the gradient `[P]` of the mean loss over the batches of a source and over all ranks."""
    total = torch.zeros(sum(p.numel() for p in parameters) + 1, device=parameters[0].device)
    for evaluation in source():
        gradients = torch.autograd.grad(evaluation.loss, parameters, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.reshape(-1) for g in gradients] + [total.new_ones(1)])
        total = total + evaluation.examples * flat
    distributed.average_(total)
    return total[:-1] / total[-1]
