# SPDX-License-Identifier: Apache-2.0
"""Small modules, data and trainers that several tests share."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def data(n: int = 60, features: int = 12, classes: int = 5, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator)
    return TensorDataset(x, torch.randint(0, classes, (n,), generator=generator))


def loader(dataset: Any = None, batch_size: int = 16, shuffle: bool = True, **kwargs: Any) -> DataLoader:
    return DataLoader(data() if dataset is None else dataset, batch_size=batch_size, shuffle=shuffle, **kwargs)


class Plain(pl.LightningModule):
    """Somebody's module that knows nothing of Fulgurite."""

    def __init__(self, features: int = 12, classes: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(features, 16), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(16, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class ModuleLoss(Plain):
    def __init__(self, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.criterion(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss


class OneArgument(Plain):
    def training_step(self, batch: Any) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


class DictReturned(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach()}


class DictBatch(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["y"])


class NegativeLogLikelihood(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.nll_loss(F.log_softmax(self(batch[0]), dim=1), batch[1])


class Late(Plain):
    """Makes its layers in configure_model."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.net: nn.Module | None = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def trainer(callbacks: Any = (), epochs: int = 2, **kwargs: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **kwargs})


def fit(
    module: pl.LightningModule,
    callbacks: Any = (),
    loader_: Any = None,
    val: Any = None,
    ckpt: Any = None,
    **kwargs: Any,
) -> pl.Trainer:
    """Train from a fixed seed; two calls with equal arguments draw equal random numbers."""
    pl.seed_everything(1, verbose=False)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    the_trainer = trainer(callbacks, **kwargs)
    the_trainer.fit(module, loader() if loader_ is None else loader_, val, ckpt_path=ckpt)
    return the_trainer


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
