# SPDX-License-Identifier: Apache-2.0
"""Training on the examples that matter (Paul, Ganguli, Dziugaite, 2021)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fulgurite import distributed
from fulgurite.errors import FulguriteError, RefusedError, check_argument, check_choice, is_number
from fulgurite.intervention import Capabilities, Intervention
from fulgurite.samples import TrainingSubset
from fulgurite_plugins.data_selection.data_diet.files import as_scores, check_same_data, describe_dataset, labels_of
from fulgurite_plugins.data_selection.data_diet.functional import Strategy, select_examples
from fulgurite_plugins.data_selection.data_diet.inner import InnerRuns, inner_scores, template_of
from fulgurite_plugins.data_selection.data_diet.scoring import (
    SCORES,
    SHARDED,
    Scoring,
    batch_size_of,
    check_loader,
    check_names,
    score_examples,
    size_of,
    training_loader,
)

Source = str | Tensor | None
_OWNER = "PruneTrainingSet"


class PruneTrainingSet(Intervention):
    """Train on the part of the training set that matters, chosen by scores of its examples.

    Where the scores come from: a file or a tensor (`source`); else `runs` short inner trainings of copies of the module,
    before the run, which then begins from its own initial weights; else, with `runs=0`, the run itself after `epoch` epochs,
    from when on it goes on with the part. Validation and test are untouched, and so is the number of optimizer steps
    (`match_steps`).

    Args:
        keep: How much is kept: a fraction in (0, 1] (a float), or a number of examples (an integer).
        score: `"el2n"`, `"grand"`, `"l1"`, `"max_margin"`, `"sum_margin"`, `"error"` or `"forgetting"`; of a file also a
            full name such as `"el2n@10"`.
        source: A file that `ScoreExamples`, `ForgettingEvents` or `fulgurite score` wrote, or scores `[N]`.
        runs: Number of inner trainings whose scores are averaged; 0 scores in the run itself.
        epoch: After how many epochs scores are computed. A tenth of training is the authors' working point; too early is
            harmful.
        strategy: `"hardest"`, `"easiest"`, the `"window"` that begins at `offset` in ascending order, or a `"random"` part,
            the control, which needs no scores.
        offset: Where the window begins: a fraction in [0, 1) (a float), or a number (an integer). With wrong labels leave
            out the hardest: `keep=0.5, offset=0.4` leaves out the top tenth.
        balanced: Whether each class is pruned for itself, so that classes keep their proportions.
        match_steps: Whether an epoch goes through the part repeatedly, so that it has as many steps as with all data.
        seed: Of the order and of the random part, by default the global seed; and of the inner runs, by default 0, so that
            they can be shared.
        dataset: The training examples in their order, without random transforms, for scoring; see `ScoreExamples`.
        parameters: Of GraNd: `"all"`, `"last_layer"` or patterns of names.
        reinit: Draws new initial weights of a module in place; by default `reset_parameters` of every layer.
        directory: Where finished inner runs are kept and found again, by whoever trains the same model on the same data; by
            default they survive a kill, and are removed when all are finished.
        criterion: The criterion, if the training step calls several.

    Attributes:
        indices: The examples that are trained on `[m]`, ascending; None for all.
        values: The scores `[N]` by which they were chosen; None for a random part.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[PruneTrainingSet(keep=0.5, source="scores.safetensors")])  # doctest: +SKIP
    """

    def __init__(
        self,
        keep: float | int = 0.5,
        score: str = "el2n",
        source: Source = None,
        runs: int = 10,
        epoch: float = 20,
        strategy: Strategy = "hardest",
        offset: float | int = 0,
        balanced: bool = False,
        match_steps: bool = True,
        seed: int | None = None,
        dataset: Any = None,
        parameters: str | Sequence[str] = "all",
        reinit: Callable[[nn.Module], Any] | None = None,
        directory: str | None = None,
        criterion: str | None = None,
    ) -> None:
        some = is_number(keep) and (keep >= 1 if isinstance(keep, int) else 0 < keep <= 1)
        check_argument(some, "keep", _OWNER, "in (0, 1], or a positive integer", keep)
        inside = is_number(offset) and offset >= 0 and (isinstance(offset, int) or offset < 1)
        check_argument(inside, "offset", _OWNER, "in [0, 1), or an integer that is not negative", offset)
        check_argument(is_number(runs) and isinstance(runs, int) and runs >= 0, "runs", _OWNER, "0, 1, 2 ...", runs)
        check_argument(is_number(epoch) and epoch >= 0, "epoch", _OWNER, "a number of epochs from 0 on", epoch)
        check_choice(strategy, get_args(Strategy), "strategy", _OWNER)
        if isinstance(keep, float) and isinstance(offset, float) and strategy == "window" and keep + offset > 1 + 1e-9:
            raise ValueError(f"Expected keep + offset of PruneTrainingSet to be at most 1, but got {keep} + {offset}.")
        self.keep = keep
        self.score = score
        self.source = source
        self.runs = runs
        self.epoch = epoch
        self.strategy: Strategy = strategy
        self.offset = offset
        self.balanced = balanced
        self.match_steps = match_steps
        self.seed = seed
        self.dataset = dataset
        self.parameters = parameters
        self.reinit = reinit
        self.directory = directory
        self.criterion = criterion
        if self._scores_itself:  # forgetting events are counted while an inner run trains, not in a pass over the data
            check_names("PruneTrainingSet", (score,), (*SCORES, "forgetting") if runs else SCORES)
        self._scoring = Scoring("PruneTrainingSet", (score,), dataset, parameters, criterion=criterion)
        if self._online and (epoch < 1 or epoch != int(epoch)):
            raise ValueError(
                f"Expected `epoch` of PruneTrainingSet(runs=0) to be a whole number of epochs after which the run goes on "
                f"with the part, but got {epoch!r}."
            )
        self.indices: Tensor | None = None
        self.values: Tensor | None = None
        self._size = 0
        self._labels: Tensor | None = None
        self._subset: TrainingSubset | None = None
        self._template: pl.LightningModule | None = None

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """Scoring copies the model; pruning by a file does not touch it."""
        return Capabilities(exclusive=("training set",), refused_strategies=SHARDED if self._scores_itself else {})

    @property
    def _scores_itself(self) -> bool:
        return self.source is None and self.strategy != "random"

    @property
    def _online(self) -> bool:
        return self._scores_itself and self.runs == 0

    def state_arguments(self) -> dict[str, Any]:
        """What is kept, and when it is chosen, tells two instances apart."""
        return {"keep": self.keep, "score": self.score, "strategy": self.strategy, "runs": self.runs}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have the part chosen when Lightning asks for the training data, or later."""
        if stage != "fit":
            return
        self._subset = TrainingSubset(trainer, "PruneTrainingSet", self._seed())
        self._template = None
        if trainer.current_epoch == 0:
            self.indices, self.values, self._labels = None, None, None
        if self._scores_itself and not self._online:
            self._template = template_of(pl_module)  # before `operate` of others and `configure_model`
        self._subset.restrict_by(self._choose, self.match_steps)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the inner trainings, unless a checkpoint has brought back what was chosen."""
        if self._template is None or self.values is not None:
            return
        assert self._subset is not None
        with isolate_rng():
            loader = self._subset.unrestricted_loader()
        check_loader(loader, "PruneTrainingSet")
        inner = InnerRuns(self._scoring, self.epoch, self.runs, self.seed or 0, self.reinit, self.directory)
        found = inner_scores(trainer, self._template, loader, inner)
        self.values, self._labels = next(iter(found.values.values())), found.targets
        self._template = None
        chosen = self._select(loader)
        if chosen is not None:
            self._subset.restrict(chosen, self.match_steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how many examples there are, and refuse an online choice that would come too late."""
        planned = trainer.max_epochs
        if self._online and planned is not None and 0 < planned <= self.epoch:
            text = (
                f"PruneTrainingSet(runs=0) chooses after epoch {self.epoch:g}, but the trainer ends after {planned}: "
                f"nothing is pruned. Choose earlier, or train longer."
            )
            if planned < self.epoch:
                raise RefusedError(text)
            warnings.warn(text, stacklevel=2)
        self._size = size_of(training_loader(trainer, "PruneTrainingSet"))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how much was trained on, and choose online, when it is time."""
        assert self._subset is not None
        self._log(trainer, pl_module)
        if self._online and self.indices is None and trainer.current_epoch + 1 == self.epoch:
            loader = training_loader(trainer, "PruneTrainingSet")
            measured = score_examples(trainer, pl_module, loader, self._scoring)
            self.values, self._labels = measured.values[self.score], measured.targets
            chosen = self._select(loader)
            if chosen is not None:
                self._subset.restrict(chosen, self.match_steps)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the training data as they were found."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the training data as they were found."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return what was chosen, and by which scores."""
        return {"version": 1, "indices": self.indices, "values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Train on the part that was chosen before, without scoring again."""
        self.indices, self.values = state_dict["indices"], state_dict["values"]
        if self._subset is None:
            return
        if self.indices is not None:
            self._subset.restrict(self.indices, self.match_steps)
        elif not self._online:
            self._subset.reset()  # all were kept

    def _choose(self, loader: DataLoader[Any]) -> Tensor | None:
        """Return the examples to train on when Lightning asks for the data; None for all, as long as scores are to come."""
        if self._scores_itself:
            return None
        if self.source is not None and self.strategy != "random":
            key, self.values, scores = as_scores(self.source, self.score)
            self._check_source(key, scores, loader)
            self._labels = None if scores is None else scores.targets
        return self._select(loader)

    def _check_source(self, key: str, scores: Any, loader: DataLoader[Any]) -> None:
        assert self.values is not None
        if scores is not None:
            check_same_data(scores, describe_dataset(loader.dataset))
        if len(self.values) != size_of(loader):
            raise FulguriteError(
                f"PruneTrainingSet: expected a score for each of the {size_of(loader)} training examples, but {key} has "
                f"{len(self.values)}."
            )

    def _select(self, loader: DataLoader[Any]) -> Tensor | None:
        """Return the kept examples, the same on all ranks; None for all."""
        n = size_of(loader)
        labels = self._labels if self._labels is not None else labels_of(loader.dataset, read=self.balanced)
        if self.balanced and labels is None:
            raise RefusedError(
                "PruneTrainingSet(balanced=True) prunes each class for itself, but the training examples have no class that "
                "is a single integer. Use balanced=False."
            )
        scores = torch.zeros(n) if self.values is None else self.values
        try:
            kept = select_examples(
                scores, self.keep, self.strategy, self.offset, labels if self.balanced else None, self._seed()
            )
        except ValueError as error:
            raise RefusedError(f"PruneTrainingSet: {error}") from None
        kept = self._agreed(kept)
        self._warn_of_lost_classes(labels, kept, loader.dataset)
        if loader.drop_last and not self.match_steps and len(kept) < batch_size_of(loader):
            raise RefusedError(
                f"PruneTrainingSet keeps {len(kept)} examples, fewer than the batch size {batch_size_of(loader)}, and the "
                f"training DataLoader has drop_last=True: nothing would be trained on. Keep more, or use match_steps=True."
            )
        self.indices = None if len(kept) == n else kept
        return self.indices

    def _agreed(self, kept: Tensor) -> Tensor:
        """Return the choice of rank 0, which the scores make the same everywhere."""
        assert self._subset is not None
        shared = kept.to(self._subset.trainer.strategy.root_device)  # NCCL takes no tensor of the CPU
        distributed.broadcast_([shared])
        return shared.cpu()

    def _warn_of_lost_classes(self, labels: Tensor | None, kept: Tensor, dataset: Any) -> None:
        if labels is None:
            return
        lost = sorted(set(labels.unique().tolist()) - set(labels[kept].unique().tolist()))
        names = getattr(dataset, "classes", None)
        if lost:
            shown = ", ".join(str(names[c]) if names is not None and c < len(names) else str(c) for c in lost)
            warnings.warn(
                f"PruneTrainingSet keeps no example of {len(lost)} classes: {shown}. Keep more, or use balanced=True.",
                stacklevel=2,
            )

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the share that is trained on, and of examples known to be labelled wrongly, the share that is."""
        n = self._size
        module.log(f"{self.name}/kept", (n if self.indices is None else len(self.indices)) / n)
        wrong = wrong_labels(getattr(trainer, "datamodule", None), n)
        if wrong is not None and bool(wrong.any()):
            kept = wrong if self.indices is None else wrong[self.indices]
            module.log(f"{self.name}/wrong_labels_kept", float(kept.sum() / wrong.sum()))

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _close(self) -> None:
        self._template = None
        if self._subset is not None:
            self._subset.close()
            self._subset = None


def wrong_labels(datamodule: Any, n: int) -> Tensor | None:
    """Return which of `n` training labels are wrong `[n]`, if the datamodule keeps the clean ones."""
    clean, given = (getattr(datamodule, name, None) for name in ("train_clean_targets", "train_targets"))
    if not isinstance(clean, Tensor) or not isinstance(given, Tensor) or len(clean) != n or len(given) != n:
        return None
    return clean != given
