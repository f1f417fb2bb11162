# SPDX-License-Identifier: Apache-2.0
"""The checks of tasks: LightningModules that others train, and that interventions act on."""

from __future__ import annotations

import argparse
import inspect
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from fulgurite.intervention import Intervention
from fulgurite.losses import LossCall
from fulgurite.testing.check import CheckError, InapplicableError, check, expect
from fulgurite.testing.lab import CLASSES, EXAMPLES, FEATURES, Lab, Run, expect_close
from fulgurite.testing.processes import on_ranks
from fulgurite.testing.trainers import contained


def _fit(lab: Lab, callbacks: Any = (), **arguments: Any) -> Run:
    return lab.fit(callbacks, module=lab.make(), **arguments)


def _predict(lab: Lab, run: Run) -> Tensor:
    with contained():
        batches: Any = run.trainer.predict(run.module, lab.loader(shuffle=False))
    return torch.cat([torch.as_tensor(batch) for batch in batches])


@check("task")
def check_task_in_every_stage(lab: Lab) -> None:
    """One of fit, validate, test and predict fails, or what it trained or logged is not finite."""
    held_out = lab.loader(shuffle=False)
    run = _fit(lab, validation=held_out)
    start = _fit(lab, max_epochs=0)
    expect(run.weights.isfinite().all(), "parameters are not finite after two epochs")
    expect(not torch.equal(run.weights, start.weights), "fit does not change the parameters")
    with contained():
        values = {
            **run.trainer.callback_metrics,
            **run.trainer.validate(run.module, held_out, verbose=False)[0],
            **run.trainer.test(run.module, held_out, verbose=False)[0],
        }
    infinite = [name for name, value in values.items() if not torch.as_tensor(value).isfinite()]
    expect(not infinite, f"it logs what is not finite: {', '.join(sorted(infinite))}")
    expect(len(values) > 0, "it logs nothing")
    predictions = _predict(lab, run)
    expect(len(predictions) == EXAMPLES, f"predict gives {len(predictions)} predictions for {EXAMPLES} examples")
    expect(bool(predictions.isfinite().all()), "predictions are not finite")


@check("task")
def check_task_state_round_trip(lab: Lab) -> None:
    """A checkpoint does not load safely, or the loaded task predicts something else."""
    run = _fit(lab)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ckpt"
        run.trainer.save_checkpoint(path)
        state = torch.load(path, weights_only=True)["state_dict"]
    torch.manual_seed(11)
    other = lab.make()
    if hasattr(other, "configure_model"):
        other.configure_model()
    other.load_state_dict(state)
    loaded = Run(other, run.trainer, run.streams)
    expect(torch.equal(_predict(lab, run), _predict(lab, loaded)), "after loading a checkpoint it predicts otherwise")


@check("task")
def check_task_resumes(lab: Lab) -> None:
    """A run that was stopped at the end of an epoch goes on otherwise than one that was not."""

    def train(callbacks: Any = (), **arguments: Any) -> Run:
        return _fit(lab, callbacks, loader=lab.loader(shuffle=False), max_epochs=3, **arguments)

    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        whole = train([saver], enable_checkpointing=True)
        resumed = train(checkpoint=Path(folder) / "epoch=1.ckpt")
    expect_close(whole, resumed, "the resumed run ends elsewhere", 0.0)


class _Watch(Intervention):
    """Counts the calls of the criterion and changes nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def on_loss(self, call: LossCall) -> LossCall:
        """Count."""
        self.calls += 1
        return call


class _Shrink(Intervention):
    """Trains towards half of the outputs' scale: a change that every criterion feels."""

    def on_loss(self, call: LossCall) -> LossCall:
        """Halve the outputs."""
        return call.replace(outputs=0.5 * call.outputs)


@check("task")
def check_task_shows_its_criterion(lab: Lab) -> None:
    """A plugin finds no criterion, or several, or changes one from which the loss is not made."""
    watch = _Watch()
    alone, watched, shrunk = _fit(lab), _fit(lab, [watch]), _fit(lab, [_Shrink()])
    steps = 2 * len(lab.loader())
    expect(watch.calls == steps, f"an intervention sees {watch.calls} calls of the criterion in {steps} steps")
    expect_close(alone, watched, "an intervention that returns the call as it is changes the training", 0.0)
    expect(not torch.equal(alone.weights, shrunk.weights), "what an intervention makes of the call has no effect")


@check("task")
def check_task_accumulates(lab: Lab) -> None:
    """Two accumulated micro-batches do not give what one batch of twice the size gives: its loss is no mean."""
    whole = _fit(lab, loader=lab.loader(batch_size=22, shuffle=False))
    parts = _fit(lab, loader=lab.loader(batch_size=11, shuffle=False), accumulate_grad_batches=2)
    expect_close(whole, parts, "two micro-batches of 11 do not give what one batch of 22 gives", lab.rounding)


@check("task")
def check_task_validation_is_untouched(lab: Lab) -> None:
    """Validating more often trains another model."""

    def train(**arguments: Any) -> Run:
        loader = lab.loader(generator=torch.Generator().manual_seed(3))  # validation draws from the global stream
        return _fit(lab, loader=loader, **arguments)

    with_validation = train(validation=lab.loader(shuffle=False), val_check_interval=0.5)
    expect_close(train(), with_validation, "validating twice per epoch changes the trained parameters", 0.0)


@check("task")
def check_task_on_two_ranks(lab: Lab) -> None:
    """On two devices it trains another model than on one with the same global batch, or logs otherwise."""
    data: Any = lab.dataset()

    def train(batch_size: int, rank: int | None, **trainer: Any) -> dict[str, Any]:
        shard: Any = None if rank is None else DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
        loader = DataLoader(data, batch_size=batch_size, sampler=shard)
        held_out = DataLoader(data, batch_size=batch_size)
        run = _fit(lab, loader=loader, validation=held_out, num_sanity_val_steps=0, **trainer)
        metrics = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
        return {"weights": run.weights, "metrics": metrics}

    one = train(22, None)
    first, second = on_ranks(
        lambda rank: train(
            11, rank, strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)), devices=2
        )
    )
    expect(torch.equal(first["weights"], second["weights"]), "the ranks end with different parameters")
    apart = float((one["weights"] - first["weights"]).abs().max())
    expect(
        apart <= lab.rounding,
        f"two ranks with batches of 11 do not give what one gives with 22 (difference {apart:.2g})",
    )
    held_out = [name for name in one["metrics"] if not name.startswith("train")]
    different = [n for n in held_out if abs(first["metrics"].get(n, torch.inf) - one["metrics"][n]) > 1e-3]
    expect(not different, f"two ranks validate otherwise than one: {', '.join(sorted(different))}")


_PLAIN = (bool, int, float, str, type(None))


@check("task")
def check_task_configuration(lab: Lab) -> None:
    """It cannot be used from a command line, or its saved configuration makes another task."""
    made = lab.make()
    kind, arguments = type(made), _arguments(made)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model")
    given = {"model": {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}}
    try:
        text = parser.dump(parser.parse_object(given))
    except argparse.ArgumentError as error:
        raise CheckError(f"the command line refuses its own arguments: {' '.join(str(error).split())}") from error
    again = parser.parse_string(text)
    expect(parser.dump(again) == text, "the configuration changes when it is written and read again")
    first, second = (lab.fit(module=_built(parser, config)) for config in (given, again))
    expect_close(first, second, "what is built from the written configuration trains otherwise", 0.0)


def _built(parser: LightningArgumentParser, config: Any) -> pl.LightningModule:
    parsed = parser.parse_object(config) if isinstance(config, dict) else config
    return parser.instantiate_classes(parsed).model


def _arguments(task: pl.LightningModule) -> dict[str, Any]:
    """Return the constructor's arguments that a command line can give: plain values, and what the data know.

    Raises:
        InapplicableError: If one without a default is an object.
    """
    from_data = {"num_classes": CLASSES, "input_shape": list(FEATURES)}
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(task)).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(task, name, from_data.get(name, parameter.default))
        if isinstance(value, _PLAIN):
            arguments[name] = value
        elif name in from_data:
            arguments[name] = from_data[name]
        elif parameter.default is parameter.empty:
            raise InapplicableError(f"its argument `{name}` is an object, which the check cannot write down")
    return arguments
