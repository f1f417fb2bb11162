# SPDX-License-Identifier: Apache-2.0
"""The spectrum of a curvature matrix during training, as a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch

from fulgurite.curvature import EmpiricalFisher, FiniteDifferenceHessian, GaussNewton, Hessian, step_loss
from fulgurite.errors import check_argument, check_choice
from fulgurite.intervention import Capabilities, Intervention
from fulgurite.random import derived_seed
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.curvature.batch_hessian_lr.density import SpectralDensity, slq_density

Matrix = Literal["hessian", "ggn", "fisher", "finite_differences"]
"""A curvature matrix: `finite_differences` is the Hessian of models that cannot be differentiated twice."""

MATRICES: dict[str, Any] = {
    "hessian": Hessian,
    "ggn": GaussNewton,
    "fisher": EmpiricalFisher,
    "finite_differences": FiniteDifferenceHessian,
}

_USER = "HessianSpectrum (spectrum)"

SHARDED = dict.fromkeys(
    ("fsdp", "model_parallel", "deepspeed", "xla"),
    "products with curvature need whole parameters, which are sharded there. Use DDP or one device.",
)


class HessianSpectrum(Intervention):
    """Measure the spectral density of the Hessian, or of another curvature matrix, every few epochs.

    The loss is that of the user's own `training_step`, in evaluation mode and in float32, on examples that are chosen
    once. Training goes on as if nothing had been measured. It logs `spectrum/largest` and `spectrum/smallest`, and
    keeps the densities.

    Args:
        dataloader: Where the examples come from: the `"train"` or the `"val"` loader.
        num_batches: How many batches (of all devices together) are measured on; 1 shows the batch Hessian, `"all"` that
            of the whole data.
        steps: Lanczos steps.
        probes: Start vectors over which the density is averaged.
        operator: The matrix: `"hessian"`, `"ggn"` (Gauss-Newton), `"fisher"` (the empirical one), or
            `"finite_differences"`, the Hessian of a model that cannot be differentiated twice.
        every_n_epochs: Epochs between two measurements, which are made at their end.
        keep_graphs: Whether the graphs of all batches stay in memory from one product to the next; without, it takes
            about twice as long.
        pictures: A folder in which each density is drawn, relative to the trainer's `default_root_dir`; None for none.
        criterion: For `"ggn"` and `"fisher"`: the criterion, where the training step calls several losses: an attribute
            of the module or a function of `torch.nn.functional`.
        seed: Seeds the choice of examples and the start vectors.

    Attributes:
        densities: What was measured: epochs, counted from 1, and densities.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[HessianSpectrum(num_batches="all")])  # doctest: +SKIP
    """

    capabilities = Capabilities(refused_strategies=SHARDED)

    def __init__(
        self,
        dataloader: Literal["train", "val"] = "train",
        num_batches: int | Literal["all"] = 1,
        steps: int = 50,
        probes: int = 1,
        operator: Matrix = "hessian",
        every_n_epochs: int = 10,
        keep_graphs: bool = True,
        pictures: str | None = None,
        criterion: str | None = None,
        seed: int = 0,
    ) -> None:
        check_choice(dataloader, ("train", "val"), "dataloader", "HessianSpectrum")
        check_choice(operator, get_args(Matrix), "operator", "HessianSpectrum")
        for name, number in (("steps", steps), ("probes", probes), ("every_n_epochs", every_n_epochs)):
            positive = isinstance(number, int) and number >= 1
            check_argument(positive, name, "HessianSpectrum", "a positive integer", number)
        fits = num_batches == "all" or (isinstance(num_batches, int) and num_batches >= 1)
        check_argument(fits, "num_batches", "HessianSpectrum", "a positive integer or 'all'", num_batches)
        self.dataloader = dataloader
        self.num_batches = num_batches
        self.steps = steps
        self.probes = probes
        self.operator = operator
        self.every_n_epochs = every_n_epochs
        self.keep_graphs = keep_graphs
        self.pictures = pictures
        self.criterion = criterion
        self.seed = seed
        self.densities: list[tuple[int, SpectralDensity]] = []

    @property
    def name(self) -> str:
        """The prefix of everything that is logged."""
        return "spectrum"

    def state_arguments(self) -> dict[str, Any]:
        """What is measured tells two instances apart."""
        return {"operator": self.operator, "dataloader": self.dataloader, "num_batches": self.num_batches}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what the training of another trainer has left."""
        if stage == "fit" and trainer.current_epoch == 0:
            self.densities = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, every few epochs."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs:
            return
        density = self.measure(trainer, pl_module)
        self.densities.append((epoch, density))
        pl_module.log("spectrum/largest", density.largest)
        pl_module.log("spectrum/smallest", density.smallest)
        if self.pictures is not None and trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / self.pictures
            folder.mkdir(parents=True, exist_ok=True)
            density.draw(folder / f"{self.operator}_{epoch:04d}.png", f"{self.operator}, after epoch {epoch}")

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> SpectralDensity:
        """Return the density now; its start vectors are the same at any time and on all ranks."""
        batches = FixedBatches(trainer, _USER, self.dataloader, seed=self.seed, share=True)
        if self.num_batches != "all":
            wanted = self.num_batches * batches.batch_size * trainer.world_size
            batches = FixedBatches(trainer, _USER, self.dataloader, wanted, seed=self.seed, share=True)
        source = step_loss(trainer, module, batches, _USER, self.criterion)
        arguments = {} if self.operator == "finite_differences" else {"keep_graphs": self.keep_graphs}
        with MATRICES[self.operator](source, module.parameters(), **arguments) as matrix:
            return slq_density(matrix, self.steps, self.probes, derived_seed(self.seed, 1))

    def state_dict(self) -> dict[str, Any]:
        """Return the densities so far."""
        return {"version": 1, "densities": [(epoch, d.values, d.weights) for epoch, d in self.densities]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring the densities back."""
        self.densities = [
            (epoch, SpectralDensity(torch.as_tensor(values), torch.as_tensor(weights)))
            for epoch, values, weights in state_dict["densities"]
        ]
