# SPDX-License-Identifier: Apache-2.0
"""Self-Tuning Networks as a callback (MacKay, Vicol, Lorraine, Duvenaud, Grosse, 2019)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from fulgurite import lightning_adapter
from fulgurite.errors import RefusedError, check_argument, check_choice
from fulgurite.intervention import Capabilities, Intervention, Step
from fulgurite.losses import LossCall
from fulgurite.random import derived_seed
from fulgurite_plugins.bilevel.self_tuning_networks.application import Application, Embed, batch_size
from fulgurite_plugins.bilevel.self_tuning_networks.course import Course
from fulgurite_plugins.bilevel.self_tuning_networks.functional import gaussian_entropy, perturb
from fulgurite_plugins.bilevel.self_tuning_networks.hyperparameters import Hyper
from fulgurite_plugins.bilevel.self_tuning_networks.layers.gated import Layout
from fulgurite_plugins.bilevel.self_tuning_networks.surgery import fuse_model, gate, hyper_parameters
from fulgurite_plugins.bilevel.self_tuning_networks.targets.base import LossTarget
from fulgurite_plugins.bilevel.self_tuning_networks.tuning import Tuner
from fulgurite_plugins.bilevel.self_tuning_networks.validation import ValidationSteps

_USER = "SelfTuning (stn)"
_PATIENCE = 10
"""After so many validation steps in a row without a finite loss, training stops."""
_WRITE_EVERY = 60.0
"""Seconds between two writings of the schedule file while training lasts; an epoch may be much shorter."""

_SHARDED = dict.fromkeys(
    ("fsdp", "model_parallel", "deepspeed", "xla"),
    "its validation phase runs the bare module, whose parameters are sharded there. Use DDP or one device.",
)
_HALF = dict.fromkeys(
    ("16-true", "transformer-engine-float16"),
    "gradients for the hyperparameters vanish in float16 without a loss scale. Use 16-mixed, bf16-mixed or 32-true.",
)


class SelfTuning(Intervention):
    r"""Tune hyperparameters of regularisation by gradient while the model trains once.

    Linear layers, convolutions and embeddings get a second set of weights, gated by the hyperparameters $\lambda$, so that
    the network learns how its best weights depend on them: $\min_\phi E_\epsilon f(\lambda + \epsilon, w_\phi(\lambda +
    \epsilon))$. After every `train_steps` updates, `valid_steps` steps of Adam move $\lambda$ and the scales $s$ of the
    perturbation to lower $E_\epsilon F(w_\phi(\lambda + \epsilon)) - \tau\, \text{Entropy}(\epsilon)$, where $F$ is the loss
    of the user's own `training_step` on held-out batches, in evaluation mode and without the tuned regularisers.

    Args:
        hyperparameters: What is tuned.
        holdout: Where the held-out batches come from: a fraction of the training set, in (0, 1), which is kept from
            training; `"val"` for the validation loader, whose metrics are then optimistic; or a function without arguments
            that returns a DataLoader, or where to import it from (`"package.module:function"`).
        train_steps: Updates of the network in a cycle.
        valid_steps: Steps of the hyperparameters in a cycle.
        warmup_epochs: Epochs, also fractions of one, before the first cycle.
        lr: Learning rate of Adam for the hyperparameters.
        scale_lr: Learning rate of Adam for the scales.
        tune_scales: Whether the scales are tuned; if not, the hyperparameters are not perturbed in validation steps.
        entropy_weight: Weight $\tau$ of the entropy, which keeps the scales from collapsing.
        gate: Patterns of the names of the layers to gate, such as `"network.*"`; by default all that can be.
        embed: What enters the gates: the hyperparameters `"unconstrained"`, or as values in their ranges, `"constrained"`.
        max_grad_norm: Bound on the norm of the gradient for hyperparameters and scales.
        layouts: By pattern, what the leading dimensions of a layer's input are, where that is not the batch:
            `"time,batch"`, `"batch*time"` or `"time*batch"`.
        elementary_scale: Whether a learned scalar, 1 at first, multiplies the elementary weights of each gated layer.
        schedule_file: Name of the file in which the schedule that was found is written, with a picture beside it, relative
            to the log folder of the trainer; None for none.
        seed: Seeds the split, the perturbations and the new weights.

    Attributes:
        course: The values and scales so far.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> tuner = SelfTuning([Hyper("dropout", Dropout("*"), init=0.05)])  # doctest: +SKIP
        >>> trainer = pl.Trainer(callbacks=[tuner])  # doctest: +SKIP
    """

    def __init__(
        self,
        hyperparameters: list[Hyper],
        holdout: float | str | Callable[[], Any] = 0.2,
        train_steps: int = 2,
        valid_steps: int = 1,
        warmup_epochs: float = 5.0,
        lr: float = 3e-3,
        scale_lr: float = 3e-3,
        tune_scales: bool = True,
        entropy_weight: float = 1e-3,
        gate: list[str] | None = None,
        embed: Embed = "unconstrained",
        max_grad_norm: float | None = None,
        layouts: dict[str, Layout] | None = None,
        elementary_scale: bool = False,
        schedule_file: str | None = "stn_schedule.json",
        seed: int = 0,
    ) -> None:
        self.hyperparameters = hyperparameters
        self.holdout = holdout
        self.train_steps = train_steps
        self.valid_steps = valid_steps
        self.warmup_epochs = warmup_epochs
        self.lr = lr
        self.scale_lr = scale_lr
        self.tune_scales = tune_scales
        self.entropy_weight = entropy_weight
        self.gate = gate
        self.embed = embed
        self.max_grad_norm = max_grad_norm
        self.layouts = layouts
        self.elementary_scale = elementary_scale
        self.schedule_file = schedule_file
        self.seed = seed
        self._check_arguments()
        self._reset()

    def _reset(self) -> None:
        self._application = Application(self.hyperparameters, _USER, self.seed, self.embed)
        self._validation = ValidationSteps(self.holdout, _USER, self.seed, self.entropy_weight, self.tune_scales)
        self._tuner: Tuner | None = None
        self._restored: dict[str, Any] | None = None
        self._pending: list[tuple[int, Tensor]] = []
        self.course = Course(())
        self.updates = 0
        self._reported = 0
        self._tuned_after = 0
        self._warmup = 0
        self._path: Path | None = None
        self._written = time.monotonic()

    @property
    def name(self) -> str:
        """The prefix of everything that is logged."""
        return "stn"

    def state_arguments(self) -> dict[str, Any]:
        """Where the held-out batches come from tells two instances apart."""
        return {"holdout": getattr(self.holdout, "__qualname__", self.holdout)}

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """A validation step costs a forward pass and a backward pass for the inputs, once in `train_steps` updates."""
        share = self.valid_steps / self.train_steps
        return Capabilities(
            extra_forwards=share,
            extra_backwards=share,
            exclusive=("gates",),
            manual_optimization=False,
            refused_strategies=_SHARDED,
            refused_precisions=_HALF,
        )

    @property
    def tuner(self) -> Tuner:
        """The hyperparameters, as they are now; made when the model is first seen."""
        assert self._tuner is not None
        return self._tuner

    def overrides(self, hook: str) -> bool:
        """Take part in the call of the criterion only if a hyperparameter acts on it: not every step has one to be found."""
        if hook == "on_loss":
            return any(isinstance(hyper.target, LossTarget) for hyper in self.hyperparameters)
        return super().overrides(hook)

    # The model

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, unless training goes on; hold examples out."""
        if stage != "fit":
            return
        if trainer.current_epoch == 0:
            self._reset()
        self._application.trainer = trainer
        self._validation.setup(trainer)

    def operate(self, module: pl.LightningModule) -> None:
        """Gate the layers, and replace those that hyperparameters act on; a model that is so already is only connected.

        Raises:
            RefusedError: If there is nothing to gate, or nothing for a hyperparameter to act on.
        """
        application = self._application
        generator = torch.Generator().manual_seed(derived_seed(self.seed, 0))
        try:
            count = len(application.find(module))
            gate(module, application.conditioning, count, self.gate, self.layouts, generator, self.elementary_scale)
            application.attach(module)
        except ValueError as error:
            raise RefusedError(f"{_USER}: {error}") from error
        if self._tuner is None:
            lam, scale = application.knobs.initial()
            self._tuner = Tuner(lam, scale, self.lr, self.scale_lr if self.tune_scales else 0.0, self.max_grad_norm)
            self.course = Course(application.knobs.names)
            self._record(0, self._tuner.theta)
            if self._restored is not None:
                self._restore(self._restored)
        self._rest()

    def parameter_options(self, module: pl.LightningModule) -> Mapping[nn.Parameter, Mapping[str, Any]]:
        """Keep the user's weight decay from the weights that gates have brought, and from those whose decay is tuned."""
        parameters = [*hyper_parameters(module), *self._application.knobs.decayed_parameters()]
        return {parameter: {"weight_decay": 0.0} for parameter in parameters}

    def fuse(self, module: nn.Module) -> nn.Module:
        """Return a copy of a trained module with plain layers, at the final hyperparameters: for export and other tools."""
        return fuse_model(module, self._application.embedded(self.tuner.lam))

    # Training steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the held-out batches, and count the updates of the warm-up."""
        if len(lightning_adapter.train_loaders(trainer)) > 1:
            raise RefusedError(
                f"{_USER} needs batches of one DataLoader, but the trainer has a CombinedLoader: how many examples a batch "
                f"has, and what a held-out batch looks like, is not clear. Train with one DataLoader."
            )
        if self.schedule_file is not None:
            self._path = Path(trainer.log_dir or trainer.default_root_dir) / self.schedule_file  # asked on all ranks
        self.tuner.to(pl_module.device)
        self._reported = int(self.tuner.skipped)
        self._application.knobs.to(pl_module.device)
        self._validation.begin(trainer)
        batches = trainer.num_training_batches
        if math.isfinite(batches):
            windows = math.ceil(batches / trainer.accumulate_grad_batches)
            self._warmup = round(self.warmup_epochs * windows)
        elif self.warmup_epochs > 0:
            raise RefusedError(
                f"{_USER} cannot tell how many updates {self.warmup_epochs} epochs of warm-up are, because the training "
                f"data have no length. Pass warmup_epochs=0, or limit_train_batches to the trainer."
            )
        planned = trainer.estimated_stepping_batches
        if planned <= self._warmup and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise RefusedError(
                f"{_USER}: the warm-up of {self.warmup_epochs} epochs takes {self._warmup} updates, and the whole training "
                f"only {planned}: nothing would be tuned. Train longer, or pass a smaller warmup_epochs."
            )

    def transform_batch(self, batch: Any, step: Step) -> Any:
        """Draw hyperparameters for each example, and show them to the inputs and the layers."""
        application, tuner = self._application, self.tuner
        generator = application.generators.seeded(tuner.theta.device, application.seed_of(0))
        count = batch_size(batch, _USER)
        lam = perturb(tuner.lam, tuner.scale, count, application.knobs.shared, generator)
        return application.begin(batch, application.embedded(lam), application.knobs.values(lam))

    def _rest(self) -> None:
        """Show the layers, outside training steps, the hyperparameters as they are."""
        self._application.conditioning.rest(self._application.embedded(self.tuner.lam))

    def on_loss(self, call: LossCall) -> LossCall:
        """Let hyperparameters of the loss act."""
        return self._application.on_loss(call)

    def penalty(self, step: Step) -> dict[str, Tensor]:
        """Return the penalties whose weights are tuned."""
        return self._application.penalties()

    def constrain(self, module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Count an update that has really happened."""
        self.updates += 1

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the step, so that whoever uses the model from now on finds it at rest."""
        self._application.conditioning.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget a step without a backward pass; take the validation steps that are due."""
        self._application.conditioning.clear()
        since = self.updates - max(self._warmup, self._tuned_after)
        if since >= self.train_steps:
            self._tuned_after = self.updates
            for _ in range(self.valid_steps):
                self._validation.step(trainer, pl_module, batch_idx, self.tuner, self._application)
            self._pending.append((self.updates, self.tuner.theta))
            self._rest()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(self._measures(), on_step=True, on_epoch=False)

    # What comes out

    def _record(self, updates: int, theta: Tensor) -> None:
        values = self._application.knobs.constrain(theta[0]).tolist()
        self.course.append(updates, values, torch.nn.functional.softplus(theta[1]).tolist())

    def _flush(self) -> None:
        """Bring what was recorded to the CPU."""
        if self._pending:
            updates, thetas = zip(*self._pending, strict=True)
            for number, theta in zip(updates, torch.stack(thetas).cpu(), strict=True):
                self._record(number, theta)
            self._pending.clear()

    def _measures(self) -> dict[str, Tensor]:
        values, scales = self._application.knobs.constrain(self.tuner.lam), self.tuner.scale
        names = self._application.knobs.names
        return {
            **{f"stn/{name}": value for name, value in zip(names, values.unbind(), strict=True)},
            **{f"stn/{name}_scale": scale for name, scale in zip(names, scales.unbind(), strict=True)},
            "stn/entropy": gaussian_entropy(scales),
            **({} if self._validation.loss is None else {"stn/valid_loss": self._validation.loss}),
        }

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log and, from time to time, write what was found; stop if the held-out loss is not finite any more."""
        self._flush()
        pl_module.log_dict(self._measures())
        if time.monotonic() - self._written > _WRITE_EVERY:
            self._write(trainer)
        skipped = int(self.tuner.skipped)
        if skipped > self._reported:
            warnings.warn(
                f"{_USER}: {skipped - self._reported} validation steps of this epoch were left out, because the held-out "
                f"loss or its gradient was not finite.",
                stacklevel=2,
            )
            self._reported = skipped
        failed = int(self.tuner.in_a_row)
        if failed >= _PATIENCE:
            warnings.warn(
                f"{_USER}: the held-out loss was not finite in the last {failed} validation steps. Training stops; the "
                f"hyperparameters keep their last good values, {self.final_values()}. The usual cause is a regulariser that "
                f"starts strong, with a high learning rate and no gradient clipping.",
                stacklevel=2,
            )
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the schedule, and draw it."""
        self._write(trainer)
        if self._path is not None and trainer.is_global_zero:
            self.course.plot(self._path.with_suffix(".png"))

    def _write(self, trainer: pl.Trainer) -> None:
        if self._path is not None and trainer.is_global_zero:
            self.course.write(self._path, [hyper.as_dict() for hyper in self.hyperparameters])
        self._written = time.monotonic()

    def final_values(self) -> dict[str, float]:
        """Return the values of the hyperparameters as they are now, by name."""
        knobs = self._application.knobs
        return dict(zip(knobs.names, knobs.constrain(self.tuner.lam).tolist(), strict=True))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the trainer and the loaders as they were found; the model keeps its gates, at rest."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the trainer and the loaders as they were found."""
        self._close()

    def _close(self) -> None:
        if self._tuner is not None:
            self._tuner.to(torch.device("cpu"))
            self._rest()
        self._application.leave()
        self._validation.close()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return everything that moves; equal on all ranks."""
        if self._restored is not None:
            return self._restored
        if self._tuner is None:
            return {}
        self._flush()
        return {
            "version": 1,
            "names": list(self.course.names),
            "updates": self.updates,
            "draws": self._application.draws,
            "tuned_after": self._tuned_after,
            "tuner": self.tuner.state_dict(),
            "course": self.course.state_dict(),
            "validation": self._validation.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, at once or when the model is first seen."""
        self._restored = state_dict
        if self._tuner is not None:
            self._restore(state_dict)

    def _restore(self, state: dict[str, Any]) -> None:
        if list(self.course.names) != state["names"]:
            raise RefusedError(
                f"{_USER} tunes {', '.join(self.course.names)}, but the checkpoint is of a training that tuned "
                f"{', '.join(state['names'])}. Resume with the same hyperparameters and the same model."
            )
        self._restored = None
        self.updates, self._tuned_after = state["updates"], state["tuned_after"]
        self._application.draws = state["draws"]
        self._pending.clear()
        self.tuner.load_state_dict(state["tuner"])
        self.course.load_state_dict(state["course"])
        self._validation.load_state_dict(state["validation"])
        self._rest()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to one trainer and one model; the state is kept."""
        runtime = (
            "_application",
            "_validation",
            "_tuner",
            "_pending",
            "course",
            "updates",
            "_tuned_after",
            "_warmup",
            "_path",
        )
        kept = {name: value for name, value in self.__dict__.items() if name not in runtime}
        return {**kept, "_restored": self.state_dict() or None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()
        self._restored = state["_restored"]

    # Arguments

    def _check_arguments(self) -> None:
        def expect(condition: bool, name: str, expected: str, found: object) -> None:
            check_argument(condition, name, "SelfTuning", expected, found)

        expect(bool(self.hyperparameters), "hyperparameters", "at least one Hyper", self.hyperparameters)
        names = [hyper.name for hyper in self.hyperparameters]
        expect(len(set(names)) == len(names), "hyperparameters", "distinct names", names)
        if isinstance(self.holdout, float | int):
            expect(0.0 < self.holdout < 1.0, "holdout", "a fraction in (0, 1), 'val', or a function", self.holdout)
        for name in ("train_steps", "valid_steps"):
            number = getattr(self, name)
            expect(isinstance(number, int) and number >= 1, name, "a positive integer", number)
        for name in ("warmup_epochs", "lr", "scale_lr", "entropy_weight"):
            number = getattr(self, name)
            expect(math.isfinite(number) and number >= 0, name, "a number that is not negative", number)
        bound = self.max_grad_norm
        expect(bound is None or bound > 0, "max_grad_norm", "positive, or None", bound)
        check_choice(self.embed, get_args(Embed), "embed", "SelfTuning")
