# SPDX-License-Identifier: Apache-2.0
"""The stability limits of SGD and of gradient descent, watched during any training (Wu, Su, 2023)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from fulgurite.errors import check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention
from fulgurite_plugins.curvature.dynamical_stability.estimating import Measuring, Quantity, Values
from fulgurite_plugins.curvature.dynamical_stability.features import NonFiniteError
from fulgurite_plugins.curvature.dynamical_stability.measuring import SHARDED, check_quantities, measure
from fulgurite_plugins.curvature.dynamical_stability.rates import Rates, Sampling, read_rates, read_sampling

_LIMITS = {
    "lr_trace": "the trace's limit of SGD, Tr(H) <= 2 B C / lr",
    "lr_refined": "the refined limit of SGD",
    "lr_exact": "the exact limit of mean-square stability of SGD",
    "lr_lambda": "the limit of gradient descent, lambda_max <= 2 / lr",
}
"""What is logged as a ratio of the learning rate to a limit, in words."""

_FAR = 0.05
"""Part of the loss at the first measurement above which training has not come near interpolation."""


class StabilityMonitor(Intervention):
    r"""Tell how close a training is to the stability limits of SGD, at the present learning rate and batch size.

    Near a minimum with zero loss, SGD with rate $\eta$ and batch size $B$ stays only where
    $\mathrm{Tr}(H) \le 2B / \eta$, and gradient descent where $\lambda_{\max}(H) \le 2 / \eta$. This callback measures
    both on a fixed set of examples after certain epochs, warns when a limit is crossed, and draws a picture. Training
    goes on bit for bit as without it.

    Logged under `stability/`: `loss`; `trace`, `frobenius`, `lambda_max` (`_error`: standard errors, and of the
    eigenvalue a bound of the error); the ratios of the learning rate to its limits `lr_trace`, `lr_refined`,
    `lr_exact`, `lr_lambda`, above 1 when unstable for certain; `lr_frobenius` $= \eta |H|_F / \sqrt B$, which times the
    root of the `alignment` should not exceed 1; `max_lr_sgd` and `max_lr_gd`, the largest rates that the limits allow;
    with `"exact"`, `radius`, by which one step multiplies the second moment of the distance at worst. With momentum
    $\beta$, `lr_trace_momentum` is the rule of thumb that takes $\eta / (1 - \beta)$ for $\eta$; the limit of gradient
    descent is exact with momentum too.

    Args:
        dataloader: On which examples to measure: `"train"`, `"val"` or a DataLoader.
        max_samples: On how many of them at most; always the same ones.
        every_n_epochs: Epochs between two measurements.
        quantities: Of `"trace"`, `"frobenius"`, `"lambda_max"`, `"refined"` and `"exact"`. The last computes everything
            from the kernel of all examples, exactly, for at most 1024 outputs of all examples together.
        curvature: `"gauss_newton"`, what the theory is about, or `"hessian"`, the whole second derivative, whose trace
            is estimated and logged beside the Gauss-Newton trace as `residual_trace`, their difference.
        output_probes: Random combinations of outputs for the trace; None takes every output, which is exact.
        probes: Random probes of the Frobenius norm, the refined limit and the Hessian's trace.
        lanczos_steps: Products for the largest eigenvalue.
        lr: The learning rate to compare with; None reads it from the optimizer at each measurement.
        batch_size: Examples of one update, over all devices and accumulated batches; None finds it out.
        include_weight_decay: Whether weight decay adds to the curvature in `lr_lambda`, `lr_exact` and `radius`.
        picture: Where to draw the course of the limits at the end of training, a PNG file in the trainer's root folder;
            None draws nothing.
        criterion: The criterion, if the training step calls several losses.
        seed: Seeds the choice of examples and the probes.

    Attributes:
        history: What was measured, one dictionary per measurement, with `epoch` and `lr`.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[StabilityMonitor(every_n_epochs=5)])  # doctest: +SKIP
    """

    capabilities = Capabilities(refused_strategies=SHARDED)

    def __init__(
        self,
        dataloader: Literal["train", "val"] | DataLoader[Any] = "train",
        max_samples: int = 512,
        every_n_epochs: int = 1,
        quantities: Sequence[Quantity] = ("trace", "frobenius", "lambda_max", "refined"),
        curvature: Literal["gauss_newton", "hessian"] = "gauss_newton",
        output_probes: int | None = None,
        probes: int = 16,
        lanczos_steps: int = 20,
        lr: float | None = None,
        batch_size: int | None = None,
        include_weight_decay: bool = False,
        picture: str | None = None,
        criterion: str | None = None,
        seed: int = 0,
    ) -> None:
        name = "StabilityMonitor"
        check_choice(curvature, ("gauss_newton", "hessian"), "curvature", name)
        check_quantities(name, quantities, curvature)
        counts = {"max_samples": max_samples, "every_n_epochs": every_n_epochs, "lanczos_steps": lanczos_steps}
        counts |= {"probes": probes, "output_probes": output_probes or 1, "batch_size": batch_size or 1}
        for argument, value in counts.items():
            check_argument(isinstance(value, int) and value >= 1, argument, name, "a positive integer", value)
        check_argument(lr is None or (is_number(lr) and lr > 0), "lr", name, "positive or None", lr)
        self.dataloader, self.max_samples, self.every_n_epochs = dataloader, max_samples, every_n_epochs
        self.quantities, self.curvature, self.output_probes = quantities, curvature, output_probes
        self.probes, self.lanczos_steps = probes, lanczos_steps
        self.lr, self.batch_size, self.include_weight_decay = lr, batch_size, include_weight_decay
        self.picture, self.criterion, self.seed = picture, criterion, seed
        self.measuring = Measuring(
            name,
            dataloader,
            max_samples,
            tuple(quantities),
            curvature,
            output_probes,
            probes,
            lanczos_steps,
            include_weight_decay,
            criterion,
            seed,
        )
        self.history: list[Values] = []
        self._above: set[str] = set()
        self._told: set[str] = set()

    @property
    def name(self) -> str:
        """The prefix of everything that it logs."""
        return "stability"

    def state_arguments(self) -> dict[str, Any]:
        """What is measured tells two instances apart."""
        return {"quantities": list(self.quantities), "curvature": self.curvature, "max_samples": self.max_samples}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what another training has left; a checkpoint is restored after this."""
        if stage == "fit" and trainer.current_epoch == 0:
            self.history, self._above, self._told = [], set(), set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure before the first step: what cannot be measured is refused here."""
        if trainer.global_step == 0:
            self._measure(trainer, pl_module, epoch=0)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log, if an epoch is due."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs == 0:
            self._measure(trainer, pl_module, epoch)
            if self.history and self.history[-1]["epoch"] == epoch:
                found = {f"{self.name}/{key}": value for key, value in self.history[-1].items()}
                del found[f"{self.name}/epoch"]
                pl_module.log_dict(found)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say if the loss has stayed far from zero, and draw the picture."""
        if not self.history:
            return
        first, last = self.history[0]["loss"], self.history[-1]["loss"]
        if first > 0 and last > _FAR * first:
            self._tell(
                "loss",
                f"the loss at the last measurement is {last:.3g}, which is {last / first:.0%} of that at the first: "
                f"the limits hold near a minimum with zero loss, and are diagnostics only elsewhere.",
            )
        if self.picture is not None and trainer.is_global_zero:
            from fulgurite_plugins.curvature.dynamical_stability.pictures import stability_over_training

            path = Path(trainer.default_root_dir) / self.picture
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stability_over_training(self.history))

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured; examples and probes follow from the seed."""
        history = [dict(values) for values in self.history]
        return {"version": 1, "history": history, "above": sorted(self._above), "told": sorted(self._told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was measured."""
        self.history = [dict(values) for values in state_dict["history"]]
        self._above, self._told = set(state_dict["above"]), set(state_dict["told"])

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        rates = read_rates(trainer, module, self.lr)
        sampling = read_sampling(trainer, self.measuring.user, self.batch_size)
        try:
            values = measure(trainer, module, rates, sampling, self.measuring)
        except NonFiniteError as error:
            self._tell("finite", f"no measurement after epoch {epoch}: {error}")
            return
        found = {"epoch": float(epoch), "lr": rates.lr, **values, **ratios(values, rates, sampling)}
        self.history.append(found)
        self._warn(found, rates)

    def _warn(self, found: Values, rates: Rates) -> None:
        above = {key for key in _LIMITS if found.get(key, 0.0) > 1}
        for key in sorted(above - self._above):
            warnings.warn(
                f"StabilityMonitor: after epoch {found['epoch']:.0f} the learning rate {rates.lr:.4g} is "
                f"{found[key]:.3g} times {_LIMITS[key]} (loss {found['loss']:.3g}): a minimum as sharp as this "
                f"cannot be stayed at.",
                stacklevel=2,
            )
        self._above = above
        if not rates.covered:
            self._tell(
                "optimizer",
                f"the limits are those of SGD, and the optimizer is {', '.join(rates.optimizers)}, which the theory "
                f"does not cover: read them as diagnostics of the curvature only.",
            )
        elif rates.momentum:
            self._tell(
                "momentum",
                f"the limits of SGD are those without momentum; with {rates.momentum:g}, lr / (1 - momentum) in the "
                f"place of lr is a rule of thumb, and logged as lr_trace_momentum. The limit of gradient "
                f"descent is exact.",
            )
        if set(rates.ratios.values()) - {0.0, 1.0}:
            self._tell(
                "groups",
                f"parameter groups have different learning rates: trace and other quantities are weighted by rates "
                f"relative to the largest, {rates.lr:.4g}, and max_lr_sgd and max_lr_gd are limits of the largest.",
            )

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(f"StabilityMonitor: {message}", stacklevel=2)


def ratios(values: Values, rates: Rates, sampling: Sampling) -> Values:
    """Return the learning rate over each of the limits that were measured, above 1 when unstable."""
    found = {
        key: rates.lr / values[limit]
        for key, limit in (
            ("lr_trace", "max_lr_trace"),
            ("lr_refined", "max_lr_refined"),
            ("lr_exact", "max_lr_exact"),
            ("lr_lambda", "max_lr_gd"),
        )
        if limit in values
    }
    if "frobenius" in values:
        found["lr_frobenius"] = rates.lr * values["frobenius"] / math.sqrt(sampling.batch_size)
    if rates.momentum and "lr_trace" in found:
        found["lr_trace_momentum"] = found["lr_trace"] / (1 - rates.momentum)
    return found
