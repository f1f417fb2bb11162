# SPDX-License-Identifier: Apache-2.0
"""The output scale as a callback (Kumar, Bordelon, Gershman, Pehlevan, 2024; Chizat, Oyallon, Bach, 2019)."""

from __future__ import annotations

from typing import Any, get_args

import lightning.pytorch as pl
from torch import nn

from fulgurite import lightning_adapter
from fulgurite.errors import FulguriteError, RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention
from fulgurite_plugins.grokking.lazy_to_rich_grokking.learning_rate import POWERS, Correction, kind_of, scale_rates
from fulgurite_plugins.grokking.lazy_to_rich_grokking.scaling import Center, OutputScale, find, scale_of, scale_output

_REFUSED = dict.fromkeys(
    ("fsdp", "deepspeed"),
    "the copy that is subtracted, and the learning rates, could not be tried with parameters that these strategies flatten "
    "or partition. Use DDP.",
)

_NO_COPY = (
    "what is subtracted is a copy of the network, and sharded modules cannot be copied. Use DDP, or center='none'."
)


class OutputScaling(Intervention):
    r"""Train $f = \alpha (g - g_0)$ instead of the network $g$: lazily for a large $\alpha$, richly for a small one.

    Weights move by $O(1 / \alpha)$ to fit the targets. The learning rate is corrected ($\eta / \alpha^2$ for SGD,
    $\eta / \alpha$ for Adam and its like), so that outputs begin to move equally fast whatever $\alpha$ is. The scale stays
    in the model when training has ended, and in its state: it is part of the function that was learnt.

    Args:
        alpha: The scale, positive.
        center: `"none"`: $\alpha g$. `"copy"`: the output of a frozen copy of the network is subtracted; one more forward
            pass. `"antisymmetric"`: $\alpha (g - g') / \sqrt 2$ with a twin $g'$ that begins equal and is trained too;
            twice the work. Either makes the output zero at the start.
        lr_correction: `"auto"` goes by the class of each optimizer; `"sgd"`, `"adaptive"` or `"none"` says it.
        preserve_weight_decay: Whether the product of learning rate and weight decay stays what it was.
        module: The name of the network whose output is scaled; None for the only part of the LightningModule that has
            parameters, or its own `forward` if there are several.
        init_scale: What the network's weights are multiplied by before training begins, positive: its trainable parameters
            of two or more dimensions, without biases and the gains of normalisations. A larger one is lazier, too.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[OutputScaling(alpha=0.5)])  # doctest: +SKIP
    """

    def __init__(
        self,
        alpha: float = 1.0,
        center: Center = "copy",
        lr_correction: Correction = "auto",
        preserve_weight_decay: bool = True,
        module: str | None = None,
        init_scale: float = 1.0,
    ) -> None:
        for name, scale in (("alpha", alpha), ("init_scale", init_scale)):
            check_argument(is_number(scale) and scale > 0, name, "OutputScaling", "a positive number", scale)
        check_choice(center, get_args(Center), "center", "OutputScaling")
        check_choice(lr_correction, get_args(Correction), "lr_correction", "OutputScaling")
        self.alpha = alpha
        self.center = center
        self.lr_correction = lr_correction
        self.preserve_weight_decay = preserve_weight_decay
        self.module = module
        self.init_scale = init_scale
        self._scale: OutputScale | None = None
        refused = _REFUSED if center == "none" else {**_REFUSED, "model_parallel": _NO_COPY}
        self.capabilities = Capabilities(refused_strategies=refused, exclusive=("output scale",))

    def operate(self, module: nn.Module) -> None:
        """Scale the network's weights and its output; one that is scaled in the same way already is left as it is.

        It may be called without a trainer, on any module.

        Raises:
            RefusedError: If the network is not found, or is scaled otherwise.
        """
        network = find(module, self.module, "OutputScaling")
        found = scale_of(module)
        if found is not None:
            what = f"{type(network).__name__} is scaled"
            self._refuse_other(float(found.alpha), found.center, found.init_scale, what)
        elif self.alpha != 1 or self.center != "none" or self.init_scale != 1:
            if isinstance(network, pl.LightningModule) and lightning_adapter.strategy_name(network.trainer) != "single":
                raise RefusedError(
                    f"OutputScaling scales what {type(network).__name__}.forward gives, because several of its parts have "
                    f"parameters, but under this strategy Lightning calls the training step through `forward` too. Put "
                    f"these parts into one module, and name it by `module=`."
                )
            found = scale_output(module, network, self.alpha, self.center, self.init_scale)
        self._scale = found

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Correct the learning rates of the optimizers, which are new in every `fit`.

        A checkpoint is restored after it, with the rates that were corrected when it was written.

        Raises:
            RefusedError: If an optimizer is not known, or does not move the twin.
        """
        if self._scale is None:
            return
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in trainer.optimizers:
            self._check_twin(optimizer, pl_module)
            kind = kind_of(optimizer, "OutputScaling") if self.lr_correction == "auto" else self.lr_correction
            factor = self.alpha ** -POWERS[kind]
            scale_rates(optimizer, schedulers, factor, self.preserve_weight_decay)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Check that the training step has used the scaled network.

        Raises:
            FulguriteError: If it has not.
        """
        if self._scale is not None and not self._scale.called:
            raise FulguriteError(
                f"OutputScaling: the training step of {type(pl_module).__name__} did not call the network whose output is "
                f"scaled. Name the one that it calls by `module=`."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the model; it stays scaled."""
        self._scale = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Forget the model; it stays scaled."""
        self._scale = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the model was scaled by."""
        return {"version": 1, "alpha": float(self.alpha), "center": self.center, "init_scale": float(self.init_scale)}

    def state_arguments(self) -> dict[str, Any]:
        """Return what distinguishes two of them."""
        return {"alpha": self.alpha, "center": self.center, "network": self.module, "init_scale": self.init_scale}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check that the checkpoint's model was scaled in the same way.

        Raises:
            RefusedError: If it was not.
        """
        for key, state in checkpoint.get("callbacks", {}).items():
            if key.partition("{")[0] == self.state_key.partition("{")[0]:
                what = "the checkpoint was written by a training"
                self._refuse_other(state["alpha"], state["center"], state.get("init_scale", 1.0), what)

    def _refuse_other(self, alpha: float, center: str, init_scale: float, what: str) -> None:
        numbers = ((alpha, self.alpha), (init_scale, self.init_scale))
        if center != self.center or any(abs(found / own - 1) > 1e-6 for found, own in numbers):
            raise RefusedError(
                f"OutputScaling(alpha={self.alpha:g}, center={self.center!r}, init_scale={self.init_scale:g}): {what} with "
                f"alpha={alpha:g}, center={center!r}, init_scale={init_scale:g}. Use the same values, or begin with a model "
                f"of its own."
            )

    def _check_twin(self, optimizer: Any, module: nn.Module) -> None:
        if self.center != "antisymmetric" or self._scale is None or self._scale.other is None:
            return
        optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
        network = find(module, self.module, "OutputScaling")
        own = {name: p for name, p in network.named_parameters() if not name.startswith("output_scaling.")}
        for name, twin in self._scale.other.named_parameters():
            if name in own and id(own[name]) in optimised and id(twin) not in optimised:
                raise RefusedError(
                    f"OutputScaling(center='antisymmetric'): the optimizer moves {name!r}, but not that of the twin. Make "
                    f"it in `configure_optimizers` from the parameters of the whole module; or use center='copy'."
                )
