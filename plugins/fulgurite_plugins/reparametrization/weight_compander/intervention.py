# SPDX-License-Identifier: Apache-2.0
"""Weight Compander as a callback (Cakaj, Mehnert, Yang, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.intervention import Capabilities, Intervention
from fulgurite_plugins.reparametrization.weight_compander.functional import (
    Companding,
    check_positive,
    check_width,
    companding,
)
from fulgurite_plugins.reparametrization.weight_compander.selection import companded, listed, select
from fulgurite_plugins.reparametrization.weight_compander.surgery import (
    Init,
    Scales,
    fold,
    fold_state_dict,
    holds_plain_weights,
    learned_scales,
    reparametrise,
)

_REFUSED = dict.fromkeys(
    ("fsdp", "deepspeed"),
    "it could not be tried with parameters that these strategies flatten or partition. Use ModelParallelStrategy (FSDP2), "
    "with `WeightCompander(...).operate(self)` in `configure_model`, before `fully_shard`.",
)


class WeightCompander(Intervention):
    r"""Compute weights from free tensors by a function that is steep at zero and bounded: $w = a \arctan(v / b)$.

    Weight tensors are reparametrised in place (`torch.nn.utils.parametrize`) before weights are restored, the strategy
    wraps the model and optimizers are made. The optimizer moves $v$: its weight decay and gradient clipping act on $v$.
    When training has ended the weights are made plain again.

    Args:
        modules: Which layers: names of classes (`"Linear"`; `"Conv"` for all convolutions) and names of submodules with
            wildcards (`"encoder.*"`), separated by commas or as a list. The name of a part of the model means the linear and
            convolutional layers in it.
        fn: The companding function: `"arctan"`, `"tanh"`, `"softsign"`, or a `Companding`.
        a: Amplitude; None for the relative rule.
        b: Width, from 1e-18 to 1e18; None for the relative rule.
        relative: `a` and `b` as multiples of each tensor's standard deviation when training begins. The default is
            this project's choice.
        learn: Whether `a` and `b` are learned, without weight decay.
        lr_scale: What the learning rate is multiplied by for learned `a` and `b`.
        init: `"preserve"`: the network computes at first what it computed before, as far as the bound allows. `"direct"`:
            the free tensors begin as what the weights were.
        include_bias: Whether to reparametrise the biases of these layers too.
        export: Whether to make the weights plain when `fit` has ended.
        exclude: Layers to leave out, as in `modules`; `"first"` and `"last"` are the ends of what `modules` takes.
        shared: Whether all tensors share one `a` and `b`.

    Raises:
        ValueError: If an argument is outside its range, or only one of `a` and `b` is given.

    Example:
        >>> trainer = pl.Trainer(callbacks=[WeightCompander(relative=(1.2, 1.2))])  # doctest: +SKIP
    """

    capabilities = Capabilities(refused_strategies=_REFUSED)

    def __init__(
        self,
        modules: str | list[str] = "Linear,Conv",
        fn: str | Companding = "arctan",
        a: float | None = None,
        b: float | None = None,
        relative: tuple[float, float] = (1.2, 1.2),
        learn: bool = False,
        lr_scale: float = 0.01,
        init: Init = "preserve",
        include_bias: bool = False,
        export: bool = True,
        exclude: str | list[str] = "",
        shared: bool = False,
    ) -> None:
        if not listed(modules):
            raise ValueError(f"Expected `modules` of WeightCompander to name some layers, but got {modules!r}.")
        if (a is None) != (b is None):
            raise ValueError(
                f"Expected `a` and `b` of WeightCompander to be given together or not at all, but got a={a!r}, b={b!r}."
            )
        if len(relative) != 2:
            raise ValueError(f"Expected `relative` of WeightCompander to be two numbers, but got {relative!r}.")
        numbers: dict[str, float | None] = {
            "relative[0]": relative[0],
            "relative[1]": relative[1],
            "lr_scale": lr_scale,
        }
        numbers |= {} if a is None else {"a": a, "b": b}
        for name, value in numbers.items():
            (check_width if name == "b" else check_positive)("WeightCompander", name, value)
        if init not in get_args(Init):
            raise ValueError(f"Expected `init` of WeightCompander to be 'preserve' or 'direct', but got {init!r}.")
        if init == "preserve" and companding(fn).inverse is None:
            raise ValueError(
                "Expected `fn` of WeightCompander to have an inverse when init is 'preserve', but it has none. Give its "
                "inverse, or init='direct'."
            )
        self.modules = modules
        self.fn = fn
        self.a = a
        self.b = b
        self.relative = relative
        self.learn = learn
        self.lr_scale = lr_scale
        self.init = init
        self.include_bias = include_bias
        self.export = export
        self.exclude = exclude
        self.shared = shared
        self._trains = True
        self._others: list[WeightCompander] = []
        self._handle: RemovableHandle | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note what is about to run, and who else reparametrises."""
        self._trains = stage == "fit"
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._others = [found for found in callbacks if isinstance(found, WeightCompander) and found is not self]

    def operate(self, module: nn.Module) -> None:
        """Reparametrise a model in place; weights that are companded already are left as they are.

        It may be called without a trainer, on any module. A trainer that only evaluates changes nothing, but a checkpoint
        that was written during training is folded when it is loaded into plain weights.

        Raises:
            RefusedError: If the arguments name no layer, or a tensor cannot be reparametrised.
        """
        others, self._others = self._others, []
        if not self._trains:
            if not companded(module):
                self._handle = module.register_load_state_dict_pre_hook(self._fold_loaded)
            return
        places = select(module, self.modules, self.exclude, self.include_bias)
        mine = {place.name for place in places}
        for other in others:
            both = mine & {place.name for place in select(module, other.modules, other.exclude, other.include_bias)}
            if both:
                raise RefusedError(
                    f"Two WeightCompander callbacks both reparametrise {', '.join(sorted(both)[:3])}. Let their `modules` "
                    f"or `exclude` keep them apart, or use one of them."
                )
        scales = Scales(self.a, self.b, self.relative)
        reparametrise(module, places, scales, self.fn, self.learn, self.init, self.shared)

    def parameter_options(self, module: nn.Module) -> Mapping[nn.Parameter, Mapping[str, Any]]:
        """Keep learned `a` and `b` out of weight decay, and let them learn more slowly."""
        return {parameter: {"weight_decay": 0.0, "lr_scale": self.lr_scale} for parameter in learned_scales(module)}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that learned `a` and `b` are really optimised.

        Raises:
            RefusedError: If an optimizer was made before the model was changed, and does not know of them.
        """
        optimised = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        for place in companded(pl_module):
            found, compander = place.parameter, place.compander
            if (
                compander is not None
                and compander.learn
                and id(found) in optimised
                and id(compander.log_a) not in optimised
            ):
                raise RefusedError(
                    f"WeightCompander(learn=True): the optimizer moves `{place.name}`, but not its `a` and `b`: it was made "
                    f"before the model was changed. Make it in `configure_optimizers`, from the module's parameters."
                )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to go on with an optimizer that has moved plain weights: its momentum is not that of `v`.

        Raises:
            RefusedError: If the checkpoint was written by a training without companded weights, or after `fit`.
        """
        plain = holds_plain_weights(checkpoint.get("state_dict", {}), pl_module)
        if plain and self._trains and checkpoint.get("optimizer_states"):
            raise RefusedError(
                f"WeightCompander cannot resume from this checkpoint: it holds plain weights ({plain[0]}), and an optimizer "
                f"state that belongs to them. Resume from a checkpoint that was written during training with it; or begin a "
                f"new fit after `module.load_state_dict(torch.load(path)['state_dict'])`."
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the free tensors are finite; once per epoch, because it waits for the device.

        Raises:
            FulguriteError: If one of them is not.
        """
        free = {place.name: place.parameter.detach() for place in companded(pl_module)}
        if not free:
            return
        largest = torch._foreach_norm(list(free.values()), float("inf"))
        whole = [value.full_tensor() if isinstance(value, DTensor) else value for value in largest]
        finite = torch.stack([value.float().isfinite() for value in whole]).tolist()
        bad = [name for name, good in zip(free, finite, strict=True) if not good]
        if bad:
            raise FulguriteError(
                f"WeightCompander: the free tensor of `{bad[0]}` ({len(bad)} of {len(free)}) is not finite after step "
                f"{trainer.global_step}. Lower the learning rate, or clip gradients."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the weights plain when `fit` has ended."""
        self._stop_folding()
        if stage != "fit" or not self.export:
            return
        try:
            fold(pl_module)
        except RefusedError as refusal:  # training is over: what it gave must not be lost
            rank_zero_warn(f"WeightCompander leaves the weights reparametrised: {refusal}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the model reparametrised, so that a checkpoint of the emergency is exact and another `fit` goes on."""
        self._stop_folding()

    def _fold_loaded(self, module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        plain = fold_state_dict(state, self.fn)
        state.clear()
        state.update(plain)

    def _stop_folding(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
