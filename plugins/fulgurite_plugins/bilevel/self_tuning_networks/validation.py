# SPDX-License-Identifier: Apache-2.0
"""The held-out half of a cycle: batches that training does not see, and steps of the hyperparameters on them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite import distributed, lightning_adapter
from fulgurite.errors import RefusedError
from fulgurite.phase import mean_gradients, training_loss, unnoticed
from fulgurite.random import derived_seed
from fulgurite.samples import EndlessStream, HoldOut
from fulgurite_plugins.bilevel.self_tuning_networks.application import Application, batch_size
from fulgurite_plugins.bilevel.self_tuning_networks.functional import gaussian_entropy, perturb
from fulgurite_plugins.bilevel.self_tuning_networks.tuning import Tuner

Source = float | str | Callable[[], Any]
"""A fraction of the training set, `"val"`, or a function that returns a DataLoader, or where to import it from."""


class ValidationSteps:
    r"""Steps of Adam on $E_\epsilon F(w_\phi(\lambda + \epsilon)) - \tau\, \text{Entropy}(\epsilon)$.

    Args:
        source: Where the held-out batches come from.
        user: Who needs them, for messages.
        seed: Seeds the split, the order and the perturbations.
        entropy_weight: The weight $\tau$.
        perturbed: Whether the hyperparameters are perturbed, and the scales with them tuned.

    Attributes:
        steps: Number of steps so far.
        loss: The last loss, averaged over ranks, on the device; None before the first step.
    """

    def __init__(self, source: Source, user: str, seed: int, entropy_weight: float, perturbed: bool) -> None:
        self.source = source
        self.user = user
        self.seed = seed
        self.entropy_weight = entropy_weight
        self.perturbed = perturbed
        self.steps = 0
        self.loss: Tensor | None = None
        self._holdout: HoldOut | None = None
        self._stream: EndlessStream | None = None
        self._position = 0

    def setup(self, trainer: pl.Trainer) -> None:
        """Hold a part of the training set out, if there are no other data."""
        if isinstance(self.source, float):
            self._holdout = HoldOut(trainer, self.user, self.source, self.seed)

    def begin(self, trainer: pl.Trainer) -> None:
        """Find the held-out batches; once the loaders have been made."""
        if self._holdout is not None:
            self._stream = self._holdout.stream(self.seed)
        else:
            self._stream = EndlessStream(self._loader(trainer), self.user, self.seed)
        self._stream.load_state_dict({"position": self._position})

    def step(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batch_idx: int,
        tuner: Tuner,
        application: Application,
    ) -> None:
        """Take one step on the next held-out batch.

        Args:
            trainer: The trainer.
            module: Its module, with gates.
            batch_idx: What the user's step is told as the index of the batch.
            tuner: The hyperparameters.
            application: What brings them to its layers.
        """
        assert self._stream is not None
        batch = lightning_adapter.to_device(trainer, self._stream.next())
        seed = derived_seed(self.seed, distributed.world()[0], self.steps, 0)
        with torch.enable_grad(), unnoticed(module, seed):
            theta = tuner.theta.detach().requires_grad_()
            self.show(theta, batch, application, seed)
            loss = training_loss(trainer, module, batch, batch_idx)
            (gradient,), (self.loss,) = mean_gradients(self.objective(loss, theta), [theta], loss)
            application.conditioning.clear()
        tuner.step(gradient, self.loss)
        self.steps += 1
        self._position = self._stream.position

    def show(self, theta: Tensor, batch: Any, application: Application, seed: int) -> None:
        """Show the layers the hyperparameters of each example of a batch, with their graph."""
        lam = theta[0]
        if self.perturbed:
            generator = application.generators.seeded(theta.device, seed)
            lam = perturb(lam, F.softplus(theta[1]), batch_size(batch, self.user), application.knobs.shared, generator)
        application.conditioning.set(application.embedded(lam), seed=seed)

    def objective(self, loss: Tensor, theta: Tensor) -> Tensor:
        """Return what is minimised: the loss, less the weighted entropy of the perturbation if there is one."""
        return loss - self.entropy_weight * gaussian_entropy(F.softplus(theta[1])) if self.perturbed else loss

    def _loader(self, trainer: pl.Trainer) -> Any:
        if self.source != "val":
            make: Any = _load(self.source, self.user) if isinstance(self.source, str) else self.source
            return make()
        loaders = trainer.val_dataloaders
        if not hasattr(loaders, "dataset"):
            found = "none" if loaders is None else f"a {type(loaders).__name__}"
            raise RefusedError(
                f"{self.user} with holdout='val' needs one validation DataLoader, but the trainer has {found}. Pass one to "
                f"`fit`, or a fraction of the training set as `holdout`."
            )
        warnings.warn(
            f"{self.user} tunes on the validation data: metrics on them become optimistic. Judge the model on others.",
            stacklevel=2,
        )
        return loaders

    def close(self) -> None:
        """Leave the trainer and the loaders as they were found."""
        if self._holdout is not None:
            self._holdout.close()
        if self._stream is not None:
            self._stream.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, the position among the held-out batches, and the split."""
        state: dict[str, Any] = {"steps": self.steps, "position": self._position}
        return state if self._holdout is None else {**state, "split": self._holdout.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; to be called before the loaders are made."""
        self.steps, self._position = state["steps"], state["position"]
        if self._holdout is not None and "split" in state:
            self._holdout.load_state_dict(state["split"])


def _load(path: str, user: str) -> Callable[[], Any]:
    """Import the function that makes the DataLoader of held-out examples."""
    package, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RefusedError(
            f"{user}: expected `holdout` to be a fraction, 'val', or where to import a function that returns a DataLoader "
            f"('package.module:function'), but got {path!r}: {error}."
        ) from error
