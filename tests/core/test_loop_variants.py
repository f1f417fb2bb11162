# SPDX-License-Identifier: Apache-2.0
"""The loops of Lightning, one by one, with a plugin that knows samples and changes targets (PS-KD as the example).

Each test compares with a slow oracle: a dictionary from dataset index to prediction, refined by hand inside the module.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from fulgurite.errors import RefusedError
from fulgurite_plugins.distillation import PSKD
from tests import helpers
from tests.helpers import Manual, Plain, fit, weights


class WithIndex(Dataset):
    """Data that return their index, for the oracle only."""

    def __init__(self, n: int = 60) -> None:
        self.data = helpers.data(n)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return (*self.data[index], index)


class Ignoring(Plain):
    """Somebody's module that ignores what the data know of their index."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


class Oracle(Plain):
    """PS-KD written by hand with a dictionary."""

    def __init__(self, alpha: float = 0.8, epochs: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha, self.epochs = alpha, epochs
        self.past: dict[int, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, indices = batch
        logits = self(x)
        alpha = self.alpha * (self.current_epoch + 1) / self.epochs
        rows = []
        for label, index, prediction in zip(y, indices.tolist(), logits.detach().float().softmax(1), strict=True):
            hard = F.one_hot(label, 5).float()
            past = self.past.get(index, hard) if self.current_epoch > 0 else hard
            rows.append((1 - alpha) * hard + alpha * past)
            self.past[index] = prediction
        return F.cross_entropy(logits, torch.stack(rows))


def compare(epochs: int = 3, n: int = 60, tolerance: float = 1e-5, workers: int = 0, **kwargs: Any) -> PSKD:
    """Train the plugin and the oracle alike and compare parameters and memory."""
    loader_arguments = kwargs.pop("loader", {})

    def data() -> DataLoader:
        return helpers.loader(WithIndex(n), num_workers=workers, **loader_arguments)

    plugin, plugged, oracle = PSKD(alpha=0.8), Ignoring(), Oracle(epochs=epochs)
    fit(plugged, [plugin], data(), epochs=epochs, **kwargs)
    fit(oracle, [], data(), epochs=epochs, **kwargs)
    torch.testing.assert_close(weights(plugged), weights(oracle), rtol=tolerance, atol=tolerance)
    assert plugin.memory is not None
    seen = sorted(oracle.past)
    assert plugin.memory.seen.nonzero().flatten().tolist() == seen
    expected = torch.stack([oracle.past[index] for index in seen])
    torch.testing.assert_close(plugin.memory.values[seen], expected, rtol=tolerance, atol=tolerance)
    return plugin


def test_single_device_shuffled_with_an_uneven_last_batch():
    compare(n=53)


def test_drop_last_leaves_examples_unseen_in_an_epoch():
    compare(n=53, loader={"drop_last": True})


def test_several_workers():
    compare(workers=2)


def test_persistent_workers():
    compare(workers=1, loader={"persistent_workers": True})


def test_gradient_accumulation_with_a_short_last_window():
    compare(n=53, accumulate_grad_batches=3)


def test_gradient_clipping():
    compare(gradient_clip_val=0.1)


def test_limit_train_batches():
    compare(limit_train_batches=2)


def test_overfit_batches():
    compare(overfit_batches=2)


def test_reload_dataloaders_every_epoch():
    compare(reload_dataloaders_every_n_epochs=1)


def test_bf16_autocast():
    """Targets and loss are float32 in both; the forward is bfloat16."""
    compare(precision="bf16-mixed", tolerance=2e-2)


def test_micro_batches_equal_one_large_batch():
    """PS-KD refines examples one by one: two accumulated batches of 10 are one batch of 20."""

    def run(batch_size: int, accumulate: int) -> Tensor:
        module = Plain()
        fit(
            module,
            [PSKD()],
            helpers.loader(batch_size=batch_size, shuffle=False),
            epochs=3,
            accumulate_grad_batches=accumulate,
        )
        return weights(module)

    torch.testing.assert_close(run(20, 1), run(10, 2), rtol=1e-5, atol=1e-6)


def test_validation_and_sanity_check_touch_neither_memory_nor_training():
    def data() -> DataLoader:
        return helpers.loader(generator=torch.Generator().manual_seed(3))  # validation draws from the global stream

    plugin, validated, alone = PSKD(), Plain(), Plain()
    validation = helpers.loader(helpers.data(37, seed=9), shuffle=False)
    fit(validated, [plugin], data(), val=validation, num_sanity_val_steps=2, val_check_interval=0.5, epochs=3)
    other = PSKD()
    fit(alone, [other], data(), epochs=3)
    assert torch.equal(weights(validated), weights(alone))
    assert torch.equal(plugin.memory.values, other.memory.values)


def test_manual_optimization():
    by_lightning, by_hand = Plain(), Manual()
    fit(by_lightning, [PSKD()], epochs=3)
    fit(by_hand, [PSKD()], epochs=3)
    assert torch.equal(weights(by_lightning), weights(by_hand))


def test_dict_of_loaders_is_refused_by_name():
    loaders = {"a": helpers.loader(), "b": helpers.loader()}
    with pytest.raises(RefusedError, match="pskd needs the dataset index.*CombinedLoader of 2.*snapshot"):
        fit(helpers.Plain(), [PSKD()], loaders)


def test_single_loader_in_a_dict_is_supported():
    class Named(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch["only"][0]), batch["only"][1])

    plain, named = Plain(), Named()
    fit(plain, [PSKD()], epochs=3)
    fit(named, [PSKD()], {"only": helpers.loader()}, epochs=3)
    assert torch.equal(weights(plain), weights(named))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Compilable(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = Block()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss


@pytest.mark.parametrize(
    ("how", "teacher"),
    [
        ("module", "memory"),
        ("module", "snapshot"),
        ("submodule in place", "memory"),
        ("submodule wrapped", "memory"),
        ("submodule wrapped", "snapshot"),
    ],
)
def test_compile_without_recompilation_after_the_first_steps(how, teacher):
    """Also: `self.log` inside a compiled LightningModule, which crashes in stock Lightning 2.6.6."""
    eager = Compilable()
    fit(eager, [PSKD(teacher=teacher)], helpers.loader(batch_size=20), epochs=4)

    class Watch(pl.Callback):
        graphs: list[int] = []

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.graphs.append(counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    counters.clear()
    module: Any = Compilable()
    original, watch = module, Watch()
    watch.graphs = []
    if how == "module":
        module = torch.compile(module, backend="aot_eager")
    elif how == "submodule in place":
        module.net.compile(backend="aot_eager")
    pl.seed_everything(1, verbose=False)
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if how == "submodule wrapped":
        module.net = torch.compile(module.net, backend="aot_eager")
    trainer = helpers.trainer([PSKD(teacher=teacher), watch], epochs=4)
    trainer.fit(module, helpers.loader(batch_size=20))
    torch.testing.assert_close(weights(original), weights(eager), rtol=1e-5, atol=1e-6)
    assert watch.graphs[0] > 0
    assert watch.graphs[1] == watch.graphs[3], "compiled again after the second epoch"


class Stop(pl.Callback):
    """Saves a checkpoint after a number of batches, or at the end of an epoch, and remembers where."""

    def __init__(self, path: Any, batches: int | None) -> None:
        self.path, self.batches, self.count = path, batches, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.count += 1
        if self.count == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path, teacher, workers):
    """With a stateful loader: the second half of the second epoch, then a third one, bit for bit."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def data() -> Any:
        return StatefulDataLoader(helpers.data(), batch_size=16, shuffle=True, num_workers=workers)

    path = tmp_path / "middle.ckpt"
    whole, resumed = Plain(), Plain()
    first, second = PSKD(teacher=teacher), PSKD(teacher=teacher)
    fit(whole, [first, Stop(path, batches=6)], data(), epochs=3)
    fit(resumed, [second], data(), ckpt=path, epochs=3)
    assert torch.equal(weights(whole), weights(resumed))
    if teacher == "memory":
        assert torch.equal(first.memory.values, second.memory.values)


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
def test_resume_at_the_end_of_an_epoch_is_exact(tmp_path, teacher):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def data() -> Any:
        return helpers.loader(shuffle=False)

    whole, resumed = Plain(), Plain()
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(whole, [PSKD(teacher=teacher), saver], data(), epochs=4, enable_checkpointing=True)
    fit(resumed, [PSKD(teacher=teacher)], data(), ckpt=tmp_path / "epoch=1.ckpt", epochs=4)
    assert torch.equal(weights(whole), weights(resumed))


def test_fit_called_twice_goes_on_with_the_memory():
    plugin, module, loader = PSKD(total_epochs=4), Plain(), helpers.loader(shuffle=False)
    trainer = helpers.trainer([plugin], epochs=2)
    pl.seed_everything(1, verbose=False)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    trainer.fit(module, loader)
    half = plugin.memory.values.clone()
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader)
    assert plugin.weight == 0.8
    assert not torch.equal(half, plugin.memory.values)


def test_a_new_trainer_begins_with_an_empty_memory():
    plugin, again, fresh = PSKD(), Plain(), Plain()
    fit(Plain(), [plugin], helpers.loader(helpers.data(31)), epochs=2)
    fit(again, [plugin], epochs=2)
    fit(fresh, [PSKD()], epochs=2)
    assert torch.equal(weights(again), weights(fresh))
    assert plugin.memory.size == 60
