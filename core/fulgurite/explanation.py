# SPDX-License-Identifier: Apache-2.0
"""What the interventions of a trainer do: in which order, what they may change, at which cost, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from fulgurite import lightning_adapter
from fulgurite.compatibility import check
from fulgurite.errors import RefusedError
from fulgurite.intervention import HOOKS, Intervention
from fulgurite.registry import registry
from fulgurite.splice import Splice

if TYPE_CHECKING:
    from rich.console import RenderableType

_MEANING = {
    "operate": ("once, before weights are restored and optimizers made", "the model"),
    "parameter_options": ("as optimizers are made", "the optimizers' parameter groups"),
    "transform_batch": ("before training_step", "the batch"),
    "on_loss": ("when training_step calls its criterion", "the criterion, its outputs, targets and arguments"),
    "penalty": ("after training_step", "the loss, by adding to it"),
    "transform_gradients": ("gradients complete, before clipping", "the gradients"),
    "constrain": ("after the optimizer has stepped", "the parameters"),
    "on_evaluation_loss": ("in validation and test, after the step", "nothing: it reads outputs and targets"),
}


@dataclass(frozen=True)
class InterventionExplanation:
    """What one intervention does.

    Args:
        name: Its name in logs and messages.
        class_name: Its class.
        plugin: The plugin whose component it is; None if it is nobody's.
        hooks: The two-way hooks that it implements, in the order in which a step meets them.
        may_change: What those hooks may change.
        criterion: The criterion that it acts on, in words; None if it does not look at the loss.
        cost: What it adds to a step, in words.
        notes: What the plugin's manifest says on memory, collectives and the like.
        refuses: What it refuses to work with, and why.
    """

    name: str
    class_name: str
    plugin: str | None
    hooks: tuple[str, ...]
    may_change: tuple[str, ...]
    criterion: str | None
    cost: str
    notes: tuple[str, ...]
    refuses: Mapping[str, str]


@dataclass(frozen=True)
class Explanation:
    """What happens in a trainer; `str()` and rich print it.

    Args:
        module: The class of the module; None if it is not known.
        strategy: The family of the strategy.
        precision: The precision.
        interventions: The interventions, in the order of the trainer's callbacks.
        order: For each hook that is implemented, in the order in which a step meets them, who runs, in order.
        refusal: Why training would be refused as things are; None if it would not be.
        callbacks: The classes of the ordinary callbacks.
    """

    module: str | None
    strategy: str
    precision: str
    interventions: tuple[InterventionExplanation, ...]
    order: Mapping[str, tuple[str, ...]]
    refusal: str | None
    callbacks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [self._title]
        for one in self.interventions:
            lines += [f"\n{self._heading(one)}", *(f"  {label:12} {text}" for label, text in _rows(one))]
        if self.order:
            lines.append("\nIn the order of a step:")
            lines += [f"  {when + ':':54} {', then '.join(names)} ({hook})" for hook, when, names in self._steps]
        return "\n".join([*lines, "", self._verdict, self._others])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = [Text(self._title, "bold")]
        for one in self.interventions:
            table = Table(
                title=Text(self._heading(one)),
                title_justify="left",
                title_style="bold",
                show_header=False,
                min_width=60,
            )
            for row in _rows(one):
                table.add_row(*map(Text, row))
            parts += [Text(), table]
        if self.order:
            table = Table("when", "hook", "who, in this order", title="In the order of a step", title_justify="left")
            for hook, when, names in self._steps:
                table.add_row(Text(when), hook, Text(", then ".join(names)))
            parts += [Text(), table]
        return Group(*parts, Text(), Text(self._verdict, "bold red" if self.refusal else "green"), Text(self._others))

    @property
    def _title(self) -> str:
        count = len(self.interventions) or "No"
        where = f"{self.module or 'a module'}, strategy {self.strategy!r}, precision {self.precision!r}"
        return f"{count} intervention{'s' * (count != 1)} in the training of {where}."

    @property
    def _steps(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [(hook, _MEANING[hook][0], names) for hook, names in self.order.items()]

    @property
    def _verdict(self) -> str:
        if self.refusal:
            return f"Training would be REFUSED: {self.refusal}"
        if not self.interventions:
            return "The training step is the module's own."
        return (
            "Nothing is refused before training starts; criterion and sample indices are looked for in the first step."
        )

    @property
    def _others(self) -> str:
        listed = ", ".join(self.callbacks) if self.callbacks else "none"
        return f"Ordinary callbacks, which Fulgurite leaves to Lightning: {listed}."

    def _heading(self, one: InterventionExplanation) -> str:
        owner = f", plugin {one.plugin}" if one.plugin else ""
        return f"{self.interventions.index(one) + 1}. {one.name} ({one.class_name}{owner})"


def explain(trainer: pl.Trainer, module: pl.LightningModule | None = None) -> Explanation:
    """Explain what the interventions of a trainer do; nothing is run or changed.

    Args:
        trainer: The trainer, before or after training.
        module: Its module; by default the one that the trainer has trained, if there is one. Without it the criterion and
            manual optimization are not known.

    Returns:
        The explanation: `print` it, or take its `to_dict`.

    Example:
        >>> print(explain(pl.Trainer(logger=False, accelerator="cpu", callbacks=[]))._verdict)
        The training step is the module's own.
    """
    module = module or trainer.lightning_module
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    interventions = [callback for callback in callbacks if isinstance(callback, Intervention)]
    splice = Splice(trainer, module or pl.LightningModule(), interventions)
    try:
        check(trainer, splice.module, interventions)
        refusal = None
    except RefusedError as error:
        refusal = str(error)
    implemented = {hook: splice.implementing(hook) for hook in HOOKS}
    return Explanation(
        module=type(module).__name__ if module is not None else None,
        strategy=lightning_adapter.strategy_name(trainer),
        precision=lightning_adapter.precision_name(trainer),
        interventions=tuple(_explain_one(one, splice.names[one], module) for one in interventions),
        order={hook: tuple(splice.names[one] for one in found) for hook, found in implemented.items() if found},
        refusal=refusal,
        callbacks=tuple(
            type(callback).__name__ for callback in callbacks if not isinstance(callback, Intervention | Splice)
        ),
    )


def _explain_one(one: Intervention, name: str, module: pl.LightningModule | None) -> InterventionExplanation:
    wants = one.capabilities
    hooks = tuple(hook for hook in HOOKS if one.overrides(hook))
    refuses = {f"strategy {key!r}": why for key, why in wants.refused_strategies.items()}
    refuses |= {f"precision {key!r}": why for key, why in wants.refused_precisions.items()}
    if not wants.manual_optimization or "penalty" in hooks:
        refuses["manual optimization"] = "it needs the step in which Lightning runs backward and the optimizer."
    refuses |= {f"a second one that takes the {item}": "only one can have it." for item in wants.exclusive}
    plugin = _plugin_of(type(one))
    return InterventionExplanation(
        name=name,
        class_name=type(one).__name__,
        plugin=plugin.name if plugin else None,
        hooks=hooks,
        may_change=tuple(_MEANING[hook][1] for hook in hooks),
        criterion=_criterion(one, module) if "on_loss" in hooks or wants.reads_loss else None,
        cost=_cost(one),
        notes=plugin.capabilities if plugin else (),
        refuses=refuses,
    )


def _criterion(one: Intervention, module: pl.LightningModule | None) -> str:
    named = one.criterion or getattr(type(module), "fulgurite_criterion", None)
    if named is None:
        owner = "the training step" if module is None else f"{type(module).__name__}.training_step"
        return f"the one loss of torch.nn.functional that {owner} calls; seen in the first step"
    found = None if module is None else getattr(module, named, None)
    chosen = "named by its argument `criterion`" if one.criterion else "that of the task"
    return f"{named}{f' ({type(found).__name__})' if found is not None else ''}, {chosen}"


def _cost(one: Intervention) -> str:
    wants = one.capabilities
    passes = [
        f"{number:g} extra {kind} pass{'es' * (number != 1)} per step"
        for number, kind in ((wants.extra_forwards, "forward"), (wants.extra_backwards, "backward"))
        if number
    ]
    costs = passes or ["no extra forward or backward pass"]
    if wants.sample_indices:
        costs.append("needs to know which examples are in the batch")
    if wants.replays_step:
        costs.append("keeps the random state of each step, to run it again")
    return "; ".join(costs)


def _plugin_of(cls: type) -> Any:
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next(
        (plugin for plugin in registry().plugins() for part in plugin.components if part.target == target), None
    )


def _rows(one: InterventionExplanation) -> list[tuple[str, str]]:
    rows = [
        ("hooks", ", ".join(one.hooks) or "ordinary ones of Lightning only"),
        ("may change", "; ".join(one.may_change) or "nothing of the step"),
    ]
    if one.criterion:
        rows.append(("criterion", one.criterion))
    rows.append(("costs", one.cost))
    rows += [("plugin says", note) for note in one.notes]
    reasons: dict[str, list[str]] = {}
    for what, why in one.refuses.items():
        reasons.setdefault(why, []).append(what)
    return rows + [("refuses", f"{', '.join(what)}: {why}") for why, what in reasons.items()]
