# SPDX-License-Identifier: Apache-2.0
"""`fulgurite fit`, `validate`, `test`, `predict` and `explain`: a LightningCLI in which classes go by their short names."""

from __future__ import annotations

import functools
import inspect
import json
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback, instantiate_class

from fulgurite.cli.arguments import Mentioned, find_class, import_components, mentioned, overrides, takes
from fulgurite.cli.messages import construction_error, parsing_error, users_mistake
from fulgurite.errors import FulguriteError
from fulgurite.registry import registry
from fulgurite.tasks import Classification

_MODEL = f"{Classification.__module__}.{Classification.__qualname__}"
_LINKED = ("num_classes", "input_shape")
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
_OBJECTS = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}


class FulguriteCLI(LightningCLI):
    """A LightningCLI that knows the components of all plugins by their short names.

    The model is a `fulgurite.Classification` and the data are `Digits` unless others are named; a model with loaders of its
    own gets no data. The model takes `num_classes` and `input_shape` from the data if it has such arguments, the data such
    attributes, and nobody has given them. An optimizer given with `optimizer` is built when training begins, from all
    parameters that exist by then. What is typed stands above the hyper-parameters that a checkpoint holds.

    Args:
        args: Words of a command line, by default the process's own, or a nested configuration.
        run: Whether the first of `args` is a command (`fit`, `validate`, `test`, `predict`) that shall be run; else the
            objects are only built, from the arguments of `fit`.
        callbacks: Callbacks that are added after those of the configuration.
        seed: The default of `seed_everything`.
        save_config: Whether the configuration is saved in the directory of the logger.

    Raises:
        FulguriteError: If the arguments do not fit; the message says which, and why.
    """

    def __init__(
        self,
        args: Sequence[str] | Mapping[str, Any] | None = None,
        *,
        run: bool = True,
        callbacks: Sequence[pl.Callback] = (),
        seed: int | bool = True,
        save_config: bool = True,
    ) -> None:
        given = sys.argv[1:] if args is None else dict(args) if isinstance(args, Mapping) else list(args)
        self._given: Mentioned = mentioned(given)
        self._run = run
        import_components(self._given.words)
        with warnings.catch_warnings():
            # Lightning 2.6.6 calls what jsonargparse 4.5x deprecates.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse|lightning.pytorch.cli")
            try:
                super().__init__(
                    args=given,
                    run=run,
                    save_config_callback=_SaveConfig if save_config else None,
                    trainer_defaults={"callbacks": list(callbacks)},
                    seed_everything_default=seed,
                    parser_kwargs={
                        "prog": "fulgurite" if run else "fulgurite explain",
                        "exit_on_error": False,
                        "allow_abbrev": False,
                    },
                    auto_configure_optimizers=False,
                )
            except ArgumentError as error:
                raise parsing_error(error, self._given) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the defaults, link the model to the data, and add optimizer and schedule."""
        model = self._set_default_class(parser, "model", pl.LightningModule, _MODEL)
        if self._given.under("data") or not any(overrides(model, pl.LightningModule, loader) for loader in _LOADERS):
            digits = registry().plugin("datamodules").component("Digits")
            self._set_default_class(parser, "data", pl.LightningDataModule, digits.target.replace(":", "."))
        for name in _LINKED:
            # A link to what the model does not take would end up in the hyper-parameters that its checkpoints hold.
            if takes(model, name) and not self._given.under(f"model.{name}"):
                parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.add_optimizer_args()
        parser.add_lr_scheduler_args()
        if not self._run:
            parser.add_method_arguments(pl.Trainer, "fit", skip=_OBJECTS)

    def _set_default_class(self, parser: LightningArgumentParser, key: str, base: type, default: str) -> Any:
        """Let the class that is named be the default, and return it.

        Of another default's arguments the parser would keep those that the named class has too, such as a batch size.
        """
        named = find_class(str(self._given.values.get(key, default)), base)
        usable = inspect.isclass(named) and issubclass(named, base)
        parser.set_defaults({key: {"class_path": f"{named.__module__}.{named.__qualname__}" if usable else default}})
        return named

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; the process's own command line is not looked at."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)
        self._typed = self.config.clone()

    def before_instantiate_classes(self) -> None:
        """Put what was typed above the hyper-parameters that Lightning has read from a checkpoint since then."""
        prefix = f"{self.subcommand}.model" if self.subcommand else "model"
        typed, found = (config.get(f"{prefix}.class_path") for config in (self._typed, self.config))
        if typed != found:
            raise FulguriteError(
                f"Expected `ckpt_path` to be a checkpoint of the model {typed}, but got one of {found}. Name that model, or "
                f"another checkpoint."
            )
        for key in self._given.values:
            owner, _, name = key.partition(".")
            argument = f"{prefix}.init_args.{name.partition('.')[0]}"
            if owner == "model" and argument in self._typed:
                self.config[argument] = self._typed[argument]

    def instantiate_classes(self) -> None:
        """Build everything; what a constructor has against its arguments becomes the message."""
        try:
            super().instantiate_classes()
        except Exception as error:
            raise construction_error(error) from error

    def after_instantiate_classes(self) -> None:
        """Let the module build the optimizer that was given when Lightning asks for it, not before."""
        built = self.config_init.get(str(self.subcommand), self.config_init)
        if built.get("optimizer"):
            self.model.configure_optimizers = functools.partial(
                _configure_optimizers, self.model, built["optimizer"], built.get("lr_scheduler")
            )
        elif built.get("lr_scheduler"):
            raise FulguriteError(
                "Expected `optimizer` together with `lr_scheduler`, but got none: add --optimizer=SGD."
            )


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration in the logger's directory; without a logger no directory is the run's own."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.loggers:
            return
        try:
            super().setup(trainer, pl_module, stage)
        except RuntimeError as error:
            raise FulguriteError(
                f"Expected {trainer.log_dir} to be a new directory, but it holds the configuration of an earlier run. Give "
                f"the logger another version or name, or delete it."
            ) from error


def assemble(
    config: Mapping[str, Any], *, callbacks: Sequence[pl.Callback] = (), seed: int | bool = True
) -> FulguriteCLI:
    """Build trainer, model and data from a nested configuration, without running anything.

    Args:
        config: What a YAML file that `fulgurite fit --config` takes contains.
        callbacks: Callbacks that are added after those of the configuration.
        seed: An integer replaces the configuration's `seed_everything`; True keeps it; False sets no seed.

    Returns:
        An object with `trainer`, `model`, `datamodule` and `config`.

    Raises:
        FulguriteError: If the configuration does not fit.
    """
    if seed is not True:
        config = {**config, "seed_everything": seed}
    return FulguriteCLI(config, run=False, callbacks=callbacks, seed=seed, save_config=False)


def run(command: str, argv: list[str]) -> int:
    """Run a command; return its exit status.

    Raises:
        FulguriteError: If something that was asked for cannot be done.
        KeyboardInterrupt: After Ctrl-C, when Lightning has shut down.
    """
    if command == "explain":
        return _explain(argv)
    try:
        FulguriteCLI([command, *argv])
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    except Exception as error:
        if users_mistake(error):
            raise FulguriteError(str(error)) from error
        raise
    return 0


def _explain(argv: list[str]) -> int:
    from rich.console import Console

    from fulgurite.explanation import explain

    cli = FulguriteCLI([word for word in argv if word != "--json"], run=False, seed=False, save_config=False)
    explanation = explain(cli.trainer, cli.model)
    if "--json" in argv:
        print(json.dumps(explanation.to_dict(), indent=1))
    else:
        Console().print(explanation)
    return 0


def _configure_optimizers(model: pl.LightningModule, optimizer: Any, lr_scheduler: Any) -> Any:
    made = instantiate_class(model.parameters(), optimizer)
    schedule = instantiate_class(made, lr_scheduler) if lr_scheduler else None
    return LightningCLI.configure_optimizers(model, made, schedule)
