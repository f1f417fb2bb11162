# SPDX-License-Identifier: Apache-2.0
"""Measures of how lazy or rich a training is, and why it generalises late."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fulgurite.captured import CapturedLoss
from fulgurite.errors import RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention
from fulgurite.landscape import kernel_velocity, ntk_gram
from fulgurite.measurement import undisturbed
from fulgurite.samples.fixed import FixedBatches
from fulgurite_plugins.grokking.lazy_to_rich_grokking.functional import (
    kernel_alignment,
    kernel_regression,
    lazy_trajectory,
)
from fulgurite_plugins.grokking.lazy_to_rich_grokking.metrics import GeneralizationDelay
from fulgurite_plugins.grokking.lazy_to_rich_grokking.probe import Examples, Probe, Whole, refuse_batch_norm, trained
from fulgurite_plugins.grokking.lazy_to_rich_grokking.scaling import find, scale_of

Kernel = Literal["trace", "full"]

_MOST = 5000
_NAME = "LazyRichMonitor"
_REFUSED = dict.fromkeys(
    ("fsdp", "model_parallel", "deepspeed"),
    "the gradient of every single example needs whole parameters on each rank. Use DDP.",
)


class LazyRichMonitor(Intervention):
    r"""Measure during training, on fixed examples, how far a network is from being lazy; it changes nothing.

    Logged, in evaluation mode, under `lazyrichmonitor/`: `kernel_alignment` (of the tangent kernel with the targets),
    `kernel_drift` ($1 - \cos$ between the kernel and the first), `displacement` ($|\theta - \theta_0| / |\theta_0|$),
    `feature_drift` (the same as the drift, of the centred Gram matrix of the last layer's inputs), `train_loss`,
    `kernel_regression_train_loss` (the squared error of the best solution with the first kernel), and, if there is
    validation data, `val_loss`, `kernel_regression_val_loss`, `train_step` and `val_step` (when the losses became small) and
    `delay` (decades between the two, so far). Everything is kept in `history`, the displacement of each
    tensor in `displacements`.

    Args:
        dataloader: Of which examples the kernel is: `"train"`, `"val"` or a DataLoader. Only with `"train"` there is
            validation beside it.
        max_samples: How many examples at most, drawn once; at most 5000.
        every_n_steps: Optimizer steps between measurements.
        kernel: `"trace"`: summed over outputs, `[N, N]`. `"full"`: `[NC, NC]`.
        parameters: Patterns of names of the parameters that count; None for all that are trained.
        log_linearized: Whether to log `linearized_train_loss` and `linearized_val_loss`: the losses if the kernel had not
            changed since the start. For `mse_loss` and SGD.
        thresholds: The loss that counts as small, relative to that of a network that gives zero.
        smoothing: Weight of the past in a running mean of the losses that are compared with it, in [0, 1).
        allow_batchnorm_eval: Whether a network with batch normalisation may be measured, in evaluation mode.
        module: The name of the network; None for the only part of the LightningModule that has parameters.
        criterion: The criterion, as for every intervention.

    Attributes:
        history: One dictionary per measurement: `step`, and what was logged.
        displacements: $|\theta - \theta_0| / |\theta_0|$ of each tensor, at the last measurement.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LazyRichMonitor(every_n_steps=50)])  # doctest: +SKIP
    """

    capabilities = Capabilities(refused_strategies=_REFUSED)

    history: list[dict[str, float]]
    displacements: dict[str, float]
    _start: dict[str, Any]
    _crossings: dict[str, Any]
    _whole: Any
    _probe: Any
    _examples: Any
    _validation: Examples | None
    _chosen: dict[str, nn.Parameter]
    _delay: GeneralizationDelay | None

    def __init__(
        self,
        dataloader: Literal["train", "val"] | DataLoader[Any] = "train",
        max_samples: int = 256,
        every_n_steps: int = 100,
        kernel: Kernel = "trace",
        parameters: list[str] | None = None,
        log_linearized: bool = False,
        thresholds: float = 0.1,
        smoothing: float = 0.0,
        allow_batchnorm_eval: bool = False,
        module: str | None = None,
        criterion: str | None = None,
    ) -> None:
        for name, value in (("max_samples", max_samples), ("every_n_steps", every_n_steps)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            check_argument(whole, name, _NAME, "a positive integer", value)
        if max_samples > _MOST:
            raise ValueError(
                f"Expected `max_samples` of {_NAME} to be at most {_MOST}, but got {max_samples}: a kernel of that many "
                f"examples takes {4 * max_samples**2 / 2**30:.1f} GiB, times the square of the outputs if it is full."
            )
        check_choice(kernel, get_args(Kernel), "kernel", _NAME)
        good = is_number(thresholds) and thresholds > 0
        check_argument(good, "thresholds", _NAME, "a positive number", thresholds)
        check_argument(is_number(smoothing) and 0 <= smoothing < 1, "smoothing", _NAME, "in [0, 1)", smoothing)
        self.dataloader = dataloader
        self.max_samples = max_samples
        self.every_n_steps = every_n_steps
        self.kernel: Kernel = kernel
        self.parameters = parameters
        self.log_linearized = log_linearized
        self.thresholds = thresholds
        self.smoothing = smoothing
        self.allow_batchnorm_eval = allow_batchnorm_eval
        self.module = module
        self.criterion = criterion
        self._anew()
        self._forget()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew; a checkpoint is restored later."""
        if stage == "fit":
            self._anew()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the examples, and measure the start, unless it was measured before.

        Raises:
            RefusedError: If the network has batch normalisation, or does not give `[N, C]` for targets that fit.
        """
        network, scale = find(pl_module, self.module, _NAME), scale_of(pl_module)
        self._whole = Whole(network, scale.other if scale is not None and scale.center == "antisymmetric" else None)
        if not self.allow_batchnorm_eval:
            refuse_batch_norm(network, _NAME)
        self._probe = Probe(CapturedLoss(trainer, pl_module, _NAME, self.criterion), network, _NAME)
        self._examples = self._examples_of(trainer, self.dataloader)
        self._validation = None
        if self.dataloader == "train" and trainer.val_dataloaders:
            self._validation = self._examples_of(trainer, "val")
        self._chosen = self._choose(trained(self._whole, pl_module))
        if self.log_linearized:
            self._refuse_linearized(trainer)
        self._start = move_data_to_device(self._start, self._examples.targets.device)
        if not self._start:
            self._begin()
        self._delay = self._make_delay()
        if not self.history:
            self._measure(trainer.global_step)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Count the time of the lazy trajectory."""
        if self.log_linearized:
            self._time += _learning_rate(optimizer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Measure after every `every_n_steps`-th optimizer step."""
        step = trainer.global_step
        if step // self.every_n_steps > self._measured_at // self.every_n_steps:
            measured = self._measure(step)
            pl_module.log_dict({f"{self.name}/{key}": value for key, value in measured.items()}, batch_size=1)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of model and examples."""
        self._forget()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of model and examples."""
        self._forget()

    def state_arguments(self) -> dict[str, Any]:
        """Return what distinguishes the states of two monitors."""
        loader = self.dataloader if isinstance(self.dataloader, str) else "own"
        return {"dataloader": loader, "kernel": self.kernel, "parameters": self.parameters, "network": self.module}

    def state_dict(self) -> dict[str, Any]:
        """Return the start, with its kernel and parameters, and everything measured."""
        return {
            "version": 1,
            "start": move_data_to_device(self._start, torch.device("cpu")),
            "crossings": self._crossings,
            "history": [dict(entry) for entry in self.history],
            "displacements": dict(self.displacements),
            "time": self._time,
            "measured_at": self._measured_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the start and everything measured."""
        self._start = state_dict["start"]
        self._crossings = state_dict["crossings"]
        self.history = state_dict["history"]
        self.displacements = state_dict["displacements"]
        self._time = state_dict["time"]
        self._measured_at = state_dict["measured_at"]

    def _forget(self) -> None:
        self._whole = None
        self._probe = None
        self._examples = None
        self._validation = None
        self._chosen = {}
        self._delay = None

    def _anew(self) -> None:
        self.history = []
        self.displacements = {}
        self._start = {}
        self._crossings = {}
        self._time = 0.0
        self._measured_at = 0

    def _examples_of(self, trainer: pl.Trainer, loader: Any) -> Examples:
        examples: Examples = self._probe.examples(FixedBatches(trainer, _NAME, loader, self.max_samples))
        return examples

    def _choose(self, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        patterns = ["*"] if self.parameters is None else self.parameters
        chosen = {name: p for name, p in parameters.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
        if not chosen:
            raise RefusedError(
                f"Expected `parameters` of {_NAME} to be patterns of names of trained parameters, but {self.parameters!r} "
                f"matches none of {', '.join(list(parameters)[:8]) or 'none'}."
            )
        return chosen

    def _begin(self) -> None:
        """Remember the network at the start: its kernel, parameters, features, and the best that its kernel can do."""
        self._start = {
            "parameters": {name: p.detach().clone() for name, p in self._chosen.items()},
            "features": self._feature_gram(),
            "outputs": self._probe.outputs(self._examples),
        }
        both = self._gram(self._examples, self._validation)
        n, columns = len(self._examples), both.ndim // 2
        self._start["kernel"] = both[:n].narrow(columns, 0, n)
        if self._validation is not None:
            self._start["cross"] = both[n:].narrow(columns, 0, n)
            self._start["val_outputs"] = self._probe.outputs(self._validation)

    def _gram(self, *examples: Examples | None) -> Tensor:
        inputs = tuple(torch.cat(parts) for parts in zip(*(e.inputs for e in examples if e is not None), strict=True))
        inside = {id(p): name for name, p in self._whole.named_parameters()}
        names = [inside[id(p)] for p in self._chosen.values()]
        with undisturbed(self._whole) as network:
            return ntk_gram(network, inputs, parameters=names, trace=self.kernel == "trace")

    def _feature_gram(self) -> Tensor:
        features = self._probe.features(self._examples)
        features = features.float() if features.dtype.itemsize < 4 else features
        features = features - features.mean(dim=0)
        return features @ features.mT

    def _measure(self, step: int) -> dict[str, float]:
        kernel, start = self._gram(self._examples), self._start
        values: dict[str, Any] = {
            "kernel_alignment": kernel_alignment(kernel, self._examples.targets),
            "kernel_drift": kernel_velocity(start["kernel"], kernel),
            "feature_drift": kernel_velocity(start["features"], self._feature_gram()),
            "displacement": self._displacement(),
            "train_loss": self._probe.loss(self._examples),
        }
        if self._validation is not None:
            values["val_loss"] = self._probe.loss(self._validation)
        measured = {name: float(value) for name, value in values.items()}
        measured |= self._kernel_regression_losses()
        if self.log_linearized:
            measured |= self._linearized_losses()
        if self._delay is not None:
            measured |= self._crossed(self._delay, measured, step)
        self.history.append({"step": step, **measured})
        self._measured_at = step
        return measured

    def _displacement(self) -> Tensor:
        before = list(self._start["parameters"].values())
        now = [p.detach() for p in self._chosen.values()]
        moved = torch.stack(torch._foreach_norm(torch._foreach_sub(now, before)))
        size = torch.stack(torch._foreach_norm(before))
        self.displacements = dict(zip(self._chosen, (moved / size).tolist(), strict=True))
        return moved.norm() / size.norm()

    def _kernel_regression_losses(self) -> dict[str, float]:
        if "kernel_regression" not in self._start:
            self._start["kernel_regression"] = self._predicted_losses("kernel_regression", kernel_regression)
        losses: dict[str, float] = self._start["kernel_regression"]
        return losses

    def _linearized_losses(self) -> dict[str, float]:
        scale = 2 / self._examples.targets.shape[1]  # MSELoss has no half, and averages over outputs

        def lazy(kernel: Tensor, targets: Tensor, **known: Any) -> Tensor:
            times = torch.tensor([self._time * scale])
            return lazy_trajectory(kernel, targets, known.pop("initial"), times, **known)[0]

        return self._predicted_losses("linearized", lazy)

    def _predicted_losses(self, name: str, predict: Any) -> dict[str, float]:
        """Return the squared errors of what a method with the first kernel predicts."""
        start, targets = self._start, self._examples.targets
        outputs = 1 if self.kernel == "full" else targets.shape[1]  # a trace is C times the kernel of one output
        kernel = start["kernel"] / outputs
        found = predict(kernel, targets, initial=start["outputs"])
        losses = {f"{name}_train_loss": float((found - targets).square().mean())}
        if self._validation is not None:
            known = {"cross": start["cross"] / outputs, "cross_initial": start["val_outputs"]}
            found = predict(kernel, targets, initial=start["outputs"], **known)
            losses[f"{name}_val_loss"] = float((found - self._validation.targets).square().mean())
        return losses

    def _make_delay(self) -> GeneralizationDelay | None:
        if self._validation is None:
            return None
        trivial = (self._examples.trivial, self._validation.trivial)
        delay = GeneralizationDelay(self.thresholds, *trivial, self.smoothing, sync_on_compute=False)
        delay.persistent(True)
        if self._crossings:
            delay.load_state_dict(self._crossings)
        return delay

    def _crossed(self, metric: GeneralizationDelay, measured: dict[str, float], step: int) -> dict[str, float]:
        """Return when the losses became small, as far as they have, and the delay as far as it is known."""
        metric.update(measured["train_loss"], measured["val_loss"], step)
        self._crossings = {name: value.clone() for name, value in metric.state_dict().items()}
        train, val = metric.delay
        found = {name: at for name, at in (("train_step", train), ("val_step", val)) if math.isfinite(at)}
        if math.isfinite(train):
            found["delay"] = metric.delay._replace(test=min(val, step)).decades
        return found

    def _refuse_linearized(self, trainer: pl.Trainer) -> None:
        kind = type(trainer.optimizers[0]).__name__
        if kind != "SGD" or len(trainer.optimizers) > 1 or self._examples.loss_name != "mse_loss":
            raise RefusedError(
                f"{_NAME}(log_linearized=True) follows the lazy trajectory of the squared error (`mse_loss`) under one SGD "
                f"optimizer, but got {self._examples.loss_name} under {kind}. Set log_linearized=False."
            )


def _learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the rate of gradient flow: momentum makes each gradient count several times."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / (1 - float(group.get("momentum", 0.0)))
