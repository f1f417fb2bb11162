# SPDX-License-Identifier: Apache-2.0
"""Scores of all training examples during any ordinary run, without the run noticing (Paul, Ganguli, Dziugaite, 2021)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from fulgurite.errors import RefusedError
from fulgurite.intervention import Capabilities, Intervention
from fulgurite_plugins.data_selection.data_diet.files import (
    Scores,
    describe_dataset,
    describe_model,
    describe_run,
    save_scores,
    versions,
)
from fulgurite_plugins.data_selection.data_diet.scoring import (
    SHARDED,
    Measured,
    Scoring,
    check_names,
    score_examples,
    training_loader,
)


class ScoreExamples(Intervention):
    r"""Score every training example at certain epochs, and write the scores into a file.

    EL2N is $\lVert p - y \rVert_2$, GraNd the norm of the example's own gradient, both with the model as it is then, in
    evaluation mode. Training goes on bit for bit as without it. One run is noisy: average several (`fulgurite score`).

    Args:
        scores: Of `"el2n"`, `"grand"`, `"l1"`, `"max_margin"`, `"sum_margin"`, and `"error"` for regression.
        epochs: After how many epochs, fractions allowed. About a tenth of training is the authors' working point; too early
            is harmful, and at 0, before training, the scores were found to be no better than chance.
        dataset: The training examples in their order, without random transforms: a dataset, a DataLoader, or the name of an
            attribute of the datamodule or module that is one. By default the training set as it is.
        parameters: Of GraNd: `"all"` that require gradients, `"last_layer"`, or patterns of names.
        chunk: Examples per pass of GraNd; by default as many as take about 64 MiB.
        augmentations: Passes over the data whose mean is taken, for data with random transforms.
        directory: Where files go, as `seed=S-epoch=E.safetensors`; by default `scores` in the trainer's root folder.
        stop: Whether training ends after the last scoring.
        criterion: The criterion, if the training step calls several: an attribute of the module, or a function of
            `torch.nn.functional`.

    Attributes:
        latest: The scores `[N]` by name (`"el2n@10"`), as of the last scoring.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[ScoreExamples(epochs=(2, 10, 20))])  # doctest: +SKIP
    """

    capabilities = Capabilities(refused_strategies=SHARDED)

    def __init__(
        self,
        scores: Sequence[str] = ("el2n",),
        epochs: Sequence[float] = (20,),
        dataset: Any = None,
        parameters: str | Sequence[str] = "all",
        chunk: int | Literal["auto"] = "auto",
        augmentations: int = 1,
        directory: str | None = None,
        stop: bool = False,
        criterion: str | None = None,
    ) -> None:
        if isinstance(scores, str):
            raise ValueError(
                f"Expected `scores` of ScoreExamples to be several names, such as ('el2n',), but got {scores!r}."
            )
        if not epochs or any(isinstance(e, bool) or not isinstance(e, int | float) or e < 0 for e in epochs):
            raise ValueError(
                f"Expected `epochs` of ScoreExamples to be numbers of epochs from 0 on, such as (2, 10), but got {epochs!r}."
            )
        check_names("ScoreExamples", scores)
        if isinstance(augmentations, bool) or not isinstance(augmentations, int) or augmentations < 1:
            raise ValueError(
                f"Expected `augmentations` of ScoreExamples to be a positive number, but got {augmentations!r}."
            )
        self.scores = scores
        self.epochs = epochs
        self.dataset = dataset
        self.parameters = parameters
        self.chunk = chunk
        self.augmentations = augmentations
        self.directory = directory
        self.stop = stop
        self.criterion = criterion
        self.scoring = Scoring("ScoreExamples", tuple(scores), dataset, parameters, chunk, augmentations, criterion)
        self.latest: Mapping[str, Tensor] = {}
        self._done: list[float] = []
        self._unlogged: dict[str, float] = {}

    def state_arguments(self) -> dict[str, Any]:
        """What is scored when, and where it goes, tells two instances apart."""
        return {"scores": list(self.scores), "epochs": list(self.epochs), "directory": self.directory}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse epochs that will not come."""
        if stage != "fit":
            return
        if trainer.current_epoch == 0:
            self._done, self._unlogged, self.latest = [], {}, {}
        planned = trainer.max_epochs
        if planned is not None and 0 < planned < max(self.epochs):
            raise RefusedError(
                f"ScoreExamples: expected `epochs` within the {planned} epochs of the trainer, but got {max(self.epochs)}. "
                f"Score earlier, or train longer."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score before training, if asked for."""
        training_loader(trainer, "ScoreExamples")  # refuse data without indices before the first step
        if trainer.global_step == 0:
            self._score_if_due(trainer, pl_module, 0.0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score if the batch completes an epoch, or a fraction of one, that was asked for."""
        self._score_if_due(trainer, pl_module, trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the mean of what was scored in the epoch."""
        for name, value in self._unlogged.items():
            pl_module.log(f"{self.name}/{name}", value)
        self._unlogged = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which scores there are not."""
        missing = [epoch for epoch in self.epochs if epoch not in self._done]
        if missing:
            warnings.warn(
                f"ScoreExamples: training ended before the scores of epoch {', '.join(map(str, missing))} were computed.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return which epochs are scored; the scores are in files."""
        return {"version": 1, "done": list(self._done)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore which epochs are scored."""
        self._done = list(state_dict["done"])

    def _score_if_due(self, trainer: pl.Trainer, module: pl.LightningModule, position: float) -> None:
        due = [epoch for epoch in self.epochs if epoch <= position + 1e-9 and epoch not in self._done]
        if not due:
            return
        loader = training_loader(trainer, "ScoreExamples")
        measured = score_examples(trainer, module, loader, self.scoring)
        for epoch in due:
            self._write(trainer, module, loader.dataset, measured, epoch)
        self._done += due
        if self.stop and len(self._done) == len(self.epochs):
            trainer.should_stop = True

    def _write(
        self, trainer: pl.Trainer, module: pl.LightningModule, dataset: Any, measured: Measured, epoch: float
    ) -> None:
        self.latest = {f"{name}@{epoch:g}": value for name, value in measured.values.items()}
        self._unlogged |= {name: float(value.mean()) for name, value in measured.values.items()}
        if trainer.is_global_zero:
            provenance = {
                "dataset": describe_dataset(dataset),
                "model": describe_model(module),
                "runs": [describe_run(epoch, trainer.global_step)],
                "parameters": self.parameters if "grand" in self.scores else None,
                "augmentations": self.augmentations,
                **versions(),
            }
            path = scores_folder(trainer, self.directory) / f"{seed_name()}epoch={epoch:g}.safetensors"
            save_scores(path, Scores(self.latest, measured.targets, provenance))


def scores_folder(trainer: pl.Trainer, directory: str | None) -> Path:
    """Return where files of scores go."""
    return Path(trainer.default_root_dir) / "scores" if directory is None else Path(directory)


def seed_name() -> str:
    """Return the beginning of a file name that tells runs of different global seeds apart."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return "" if seed is None else f"seed={seed}-"
