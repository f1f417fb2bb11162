# SPDX-License-Identifier: Apache-2.0
"""Small trainings that are the same each time: data, modules, `fit`, and what is compared afterwards."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fulgurite.testing.case import Case
from fulgurite.testing.check import InapplicableError, expect
from fulgurite.testing.trainers import contained, make_trainer
from fulgurite.testing.watchdog import HangError

FEATURES, CLASSES, EXAMPLES, BATCH = (1, 6, 6), 4, 44, 8
"""44 examples in batches of 8: five batches and an uneven last one of 4."""


def small_data(n: int = EXAMPLES, seed: int = 0) -> TensorDataset:
    """Return `n` random images `[1, 6, 6]` whose four classes can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % CLASSES
    centres = torch.randn(CLASSES, *FEATURES, generator=torch.Generator().manual_seed(7))
    return TensorDataset(centres[targets] + 0.8 * torch.randn(n, *FEATURES, generator=generator), targets)


def small_network(convolutional: bool = False) -> nn.Module:
    """Return a perceptron, or a small convolutional network with batch norm."""
    if convolutional:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES)
        )
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, CLASSES))


class Plain(pl.LightningModule):
    """Somebody's module that knows nothing of Fulgurite: functional loss, a tensor returned."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = small_network() if network is None else network

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits."""
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the cross entropy."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Return SGD with momentum over the parameters that are to be trained."""
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=0.9)


@dataclass(frozen=True)
class RandomStreams:
    """Where the global random generators stand."""

    torch_states: list[Tensor]
    numpy_state: Any
    python_state: Any

    @classmethod
    def now(cls) -> RandomStreams:
        """Return the present position."""
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls([torch.get_rng_state(), *devices], (kind, tuple(keys), *rest), random.getstate())

    def same_as(self, other: RandomStreams) -> bool:
        """Return whether the next draws of both would be equal."""
        return (
            all(map(torch.equal, self.torch_states, other.torch_states))
            and self.numpy_state == other.numpy_state
            and self.python_state == other.python_state
        )


@dataclass
class Run:
    """What a training left behind."""

    module: pl.LightningModule
    trainer: pl.Trainer
    streams: RandomStreams
    callbacks: tuple[Any, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def weights(self) -> Tensor:
        """All parameters and floating-point buffers, in one vector."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return torch.cat([t.detach().flatten().to(torch.float64) for t in tensors if t.is_floating_point()])

    def has_the_weights_of(self, other: Run) -> bool:
        """Return whether each number of `weights` means the same in both: surgery gives a model other parameters."""
        names = [[name for name, _ in (*m.named_parameters(), *m.named_buffers())] for m in (self.module, other.module)]
        return names[0] == names[1] and self.weights.shape == other.weights.shape


@dataclass
class Lab:
    """Runs trainings for checks; those that several checks look at are run once and remembered.

    Args:
        case: The component's case.
        make: Makes an instance of the component.
        target: The component itself: a class, or a function.
        settings: Arguments of every trainer, unless a check sets them itself: `strategy` and `precision`, if not default.
    """

    case: Case
    make: Callable[..., Any]
    target: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    _remembered: dict[str, Any] = field(default_factory=dict)

    def module(self) -> pl.LightningModule:
        """Return a fresh module to train; its weights are set by `fit`."""
        return Plain() if self.case.module is None else self.case.module()

    def dataset(self, n: int = EXAMPLES) -> Dataset[Any]:
        """Return the training examples."""
        return small_data(n) if self.case.data is None else self.case.data()

    def examples(self, n: int = EXAMPLES) -> Dataset[Any]:
        """Return the first `n` training examples.

        Raises:
            InapplicableError: If the case brings data of its own, and fewer.
        """
        data: Any = self.dataset()
        if len(data) < n:
            raise InapplicableError(f"the check needs {n} examples, and the case's data are {len(data)}")
        return data if len(data) == n else Subset(data, range(n))

    def in_order(self, batch_size: int, n: int = EXAMPLES) -> DataLoader[Any]:
        """Return a loader of the first `n` examples in their order."""
        return DataLoader(self.examples(n), batch_size)

    def loader(self, **arguments: Any) -> DataLoader[Any]:
        """Return the shuffling training loader."""
        return DataLoader(self.dataset(), **{"batch_size": BATCH, "shuffle": True, **arguments})

    def fit(
        self,
        callbacks: Sequence[Any] = (),
        *,
        module: pl.LightningModule | None = None,
        loader: Any = None,
        validation: Any = None,
        checkpoint: Any = None,
        start: int = 1,
        **trainer: Any,
    ) -> Run:
        """Train from a seed that is always the same; two calls with equal arguments draw equal random numbers."""
        module = self.module() if module is None else module
        seed(module, start)
        made = make_trainer(callbacks, **{**self.settings, **trainer})
        with contained() as said:
            made.fit(module, self.loader() if loader is None else loader, validation, ckpt_path=checkpoint)
        trained = getattr(module, "_orig_mod", module)
        return Run(trained, made, RandomStreams.now(), tuple(callbacks), tuple(said))

    def reference(self, key: str = "plain", **arguments: Any) -> Run:
        """Return the training without the component; trained once per key, and not to be changed."""
        return self.remember(f"reference: {key}", lambda: self.fit(**arguments))

    def component_run(self, key: str = "plain", **arguments: Any) -> Run:
        """Return the training with one instance of the component; trained once per key, and not to be changed."""
        return self.remember(f"component: {key}", lambda: self.fit([self.make()], **arguments))

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returned or raised the first time under this key, so that nothing hangs twice."""
        if key not in self._remembered:
            try:
                self._remembered[key] = compute()
            except (Exception, HangError) as error:
                self._remembered[key] = error
        found = self._remembered[key]
        if isinstance(found, BaseException):
            raise found
        return found

    def needs_default_module(self) -> None:
        """Say that a check does not apply to a case with a module of its own.

        Raises:
            InapplicableError: If the case brings one.
        """
        if self.case.module is not None:
            raise InapplicableError("the case brings a module of its own, and the check needs the kit's")

    def needs_default(self, setting: str) -> None:
        """Say that a check sets the `strategy` or the `precision` itself, and does not apply where another was asked for.

        Raises:
            InapplicableError: If another was asked for.
        """
        if setting in self.settings:
            raise InapplicableError(
                f"the check sets the {setting} itself, and {self.settings[setting]!r} was asked for"
            )

    @property
    def rounding(self) -> float:
        """How far apart two trainings may end that compute the same in batches of other sizes."""
        return 1e-4 if "precision" not in self.settings or self.settings["precision"].startswith(("32", "64")) else 3e-2


def expect_close(a: Run, b: Run, reason: str, tolerance: float = 1e-6) -> None:
    """Raise `CheckError` unless two trainings end with equal weights, up to a tolerance."""
    expect(a.weights.shape == b.weights.shape, f"{reason} ({len(a.weights)} and {len(b.weights)} numbers)")
    apart = float((a.weights - b.weights).abs().max())
    expect(apart <= tolerance, f"{reason} (largest difference {apart:.2g})")


def seed(module: nn.Module, start: int = 1) -> None:
    """Set all global generators and the module's parameters, buffers left as they are."""
    pl.seed_everything(start, verbose=False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def equal_states(a: Any, b: Any) -> bool:
    """Return whether two states of nested containers and tensors are equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal_states, a, b))
    return bool(a == b) or (a != a and b != b)


def copied_state(callback: Any) -> Any:
    """Return a copy of a callback's state."""
    return copy.deepcopy(callback.state_dict())


def non_finite(state: Any) -> int:
    """Return how many numbers in a state are infinite or NaN."""
    if isinstance(state, Tensor):
        return int((~state.isfinite()).sum()) if state.is_floating_point() else 0
    if isinstance(state, Mapping):
        return sum(map(non_finite, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(non_finite, state))
    return int(isinstance(state, float) and not math.isfinite(state))
