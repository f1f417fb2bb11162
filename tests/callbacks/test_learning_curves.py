# SPDX-License-Identifier: Apache-2.0
"""`LearningCurves`: which values are recorded when, what is drawn of them, and when the file is written."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite_callbacks import LearningCurves, learning_curves
from fulgurite_callbacks.learning_curves import choose, group, split_stage
from tests import helpers
from tests.helpers import Plain, fit, weights


class Logs(Plain):
    """Logs numbers that are known in advance; four steps per epoch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_loss", float(self.current_epoch), on_step=False, on_epoch=True)
        self.log("constant", 0.5, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("late", float(10 + self.current_epoch))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("val_acc", float(self.validations))
            self.validations += 1


def drawings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the step of every drawing instead of drawing."""
    steps: list[int] = []
    monkeypatch.setattr(LearningCurves, "draw", lambda self, trainer: steps.append(trainer.global_step))
    return steps


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record only: drawing takes most of the time."""
    drawings(monkeypatch)


def series(callback: LearningCurves, name: str) -> list[tuple[int, float]]:
    return callback.history[name]


def labels(file: Path, callback: LearningCurves, monkeypatch: pytest.MonkeyPatch, the_trainer: Any) -> Any:
    """Draw, and return the figure instead of saving it."""
    figures: list[Any] = []
    monkeypatch.setattr(learning_curves.pictures, "save", lambda figure, path: figures.append(figure))
    callback.draw(the_trainer)
    return figures[0]


# What is recorded


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("order", [1, -1])
def test_one_value_per_metric_and_epoch(tmp_path: Path, order: int):
    """Fails if values of an epoch are missed that are logged late, lag by an epoch, or are counted twice.

    A checkpoint callback, which reads the metrics too, stands before or after.
    """
    curves = LearningCurves(tmp_path / "curves.png")
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_acc")
    fit(
        Logs(),
        [curves, checkpoint][::order],
        val=helpers.loader(shuffle=False),
        epochs=3,
        enable_checkpointing=True,
    )
    assert series(curves, "train_loss") == [(4, 0.0), (8, 1.0), (12, 2.0)]
    assert series(curves, "late") == [(4, 10.0), (8, 11.0), (12, 12.0)]
    assert series(curves, "val_acc") == [(4, 0.0), (8, 1.0), (12, 2.0)]
    assert series(curves, "constant") == [(4, 0.5), (8, 0.5), (12, 0.5)]
    assert len(series(curves, "val_loss")) == 3


@pytest.mark.usefixtures("undrawn")
def test_rare_and_frequent_validations(tmp_path: Path):
    """Fails if an old value is repeated where nothing was validated, or a validation within an epoch is lost."""
    rare = LearningCurves(tmp_path / "curves.png")
    fit(Logs(), [rare], val=helpers.loader(shuffle=False), epochs=5, check_val_every_n_epoch=2)
    assert series(rare, "val_acc") == [(8, 0.0), (16, 1.0)]
    assert [step for step, _ in series(rare, "train_loss")] == [4, 8, 12, 16, 20]
    often = LearningCurves(tmp_path / "curves.png")
    fit(Logs(), [often], val=helpers.loader(shuffle=False), epochs=2, val_check_interval=2)
    assert series(often, "val_acc") == [(2, 0.0), (4, 1.0), (6, 2.0), (8, 3.0)]
    assert series(often, "train_loss") == [(4, 0.0), (8, 1.0)]


def test_validate_and_test_alone_draw_nothing(tmp_path: Path):
    """Fails if a picture of a training is overwritten by an evaluation."""

    class Tested(Logs):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", 1.0)

    curves = LearningCurves(tmp_path / "curves.png")
    the_trainer = helpers.trainer([curves])
    the_trainer.validate(Tested(), helpers.loader(shuffle=False), verbose=False)
    the_trainer.test(Tested(), helpers.loader(shuffle=False), verbose=False)
    assert curves.history == {}
    assert not list(tmp_path.iterdir())


def test_long_histories_are_thinned(monkeypatch: pytest.MonkeyPatch):
    """Fails if the history grows without bound, or loses its first or its latest point."""
    monkeypatch.setattr(learning_curves, "MAX_POINTS", 6)
    monkeypatch.setattr(LearningCurves, "draw", lambda *_: None)
    curves = LearningCurves()
    fit(Logs(), [curves], epochs=12)
    steps = [step for step, _ in series(curves, "train_loss")]
    assert len(steps) <= 6
    assert (steps[0], steps[-1]) == (4, 48)
    assert steps == sorted(steps)


# When it is drawn


def test_refreshed_every_n_epochs_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    """Fails if the picture is drawn more often than asked for, or misses the last epoch."""
    steps = drawings(monkeypatch)
    fit(Logs(), [LearningCurves(every_n_epochs=2)], epochs=5)
    assert steps == [8, 16, 20]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_drawn_after_an_exception_and_an_interrupt(tmp_path: Path, error: type[BaseException]):
    """Fails if what was learned before a crash is not in the picture."""

    class Fails(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 2:
                raise error
            return super().training_step(batch, batch_idx)

    curves = LearningCurves(tmp_path / "curves.png", ["train_loss"], every_n_epochs=100)
    with pytest.raises((ZeroDivisionError, SystemExit, KeyboardInterrupt)):
        fit(Fails(), [curves], epochs=3)
    assert (tmp_path / "curves.png").is_file()
    assert len(series(curves, "train_loss")) == 2


def test_a_failing_picture_hides_no_exception(monkeypatch: pytest.MonkeyPatch):
    """Fails if drawing after an exception raises another one in its place."""

    class Fails(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    def draw(*_: Any) -> None:
        raise TypeError("cannot draw")

    monkeypatch.setattr(LearningCurves, "draw", draw)
    with pytest.raises(ZeroDivisionError):
        fit(Fails(), [LearningCurves(every_n_epochs=5)], epochs=2)


def test_a_full_disk_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    """Fails if days of training end because a picture cannot be written, or if nobody is told."""

    def no_space(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    fit(Logs(), [LearningCurves(tmp_path / "curves.png")], epochs=1)
    assert "could not be written" in caplog.text


def test_written_at_once_and_only_on_rank_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fails if a viewer can meet half a picture, temporary files stay, or other ranks write."""
    target = tmp_path / "deep" / "curves.png"
    replaced: list[tuple[bool, str]] = []
    original = Path.replace

    def replace(self: Path, other: Path) -> Path:
        replaced.append((self.read_bytes()[-8:-4] == b"IEND", str(other)))
        return original(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    curves = LearningCurves(target)
    the_trainer = fit(Logs(), [curves], epochs=1)
    assert replaced == [(True, str(target))]
    assert [path.name for path in target.parent.iterdir()] == ["curves.png"]
    target.unlink()
    monkeypatch.setattr(type(the_trainer), "is_global_zero", False)
    curves.draw(the_trainer)
    assert not target.exists()


# State


@pytest.mark.usefixtures("undrawn")
def test_a_resumed_training_continues_the_picture(tmp_path: Path):
    """Fails if the history is lost, cannot be loaded safely, or points beyond the checkpoint stay."""
    whole = LearningCurves(tmp_path / "a.png")
    loader = helpers.loader(shuffle=False)
    first = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Logs(), [whole, first], loader, val=loader, epochs=4, enable_checkpointing=True)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert whole.state_key in saved["callbacks"]
    module, resumed = Logs(), LearningCurves(tmp_path / "a.png")
    module.validations = 2
    fit(module, [resumed], loader, val=loader, epochs=4, ckpt=tmp_path / "epoch=1.ckpt")
    for name in ("train_loss", "val_acc", "constant"):
        assert series(resumed, name) == series(whole, name)
    assert series(resumed, "late") == [point for point in series(whole, "late") if point[0] != 8]


@pytest.mark.usefixtures("undrawn")
def test_a_second_fit(tmp_path: Path):
    """Fails if a new training continues an old picture, or a training that goes on loses its beginning."""
    curves = LearningCurves(tmp_path / "curves.png")
    fit(Logs(), [curves], epochs=3)
    the_trainer = fit(Logs(), [curves], epochs=2)
    assert series(curves, "train_loss") == [(4, 0.0), (8, 1.0)]
    the_trainer.fit_loop.max_epochs = 3
    the_trainer.fit(Logs(), helpers.loader())
    assert series(curves, "train_loss") == [(4, 0.0), (8, 1.0), (12, 2.0)]


def test_two_instances(tmp_path: Path):
    """Fails if two instances share their state, or quietly overwrite one file."""
    one, two = LearningCurves(tmp_path / "1.png", ["val*"]), LearningCurves(tmp_path / "2.png", ["train*"])
    assert one.state_key != two.state_key
    fit(Logs(), [one, two], epochs=1)
    assert {path.name for path in tmp_path.iterdir()} == {"1.png", "2.png"}
    with pytest.raises(RefusedError, match="its own `path`, but got .*1.png' twice"):
        fit(Logs(), [one, LearningCurves(tmp_path / "1.png", ["train*"])], epochs=1)


def test_default_path_and_pickle(tmp_path: Path):
    curves = LearningCurves()
    fit(Logs(), [curves], epochs=1, default_root_dir=tmp_path)
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(curves)).history == curves.history


# What is drawn


@pytest.mark.parametrize(
    ("name", "quantity", "label"),
    [
        ("train_loss", "loss", "train"),
        ("val/loss", "loss", "val"),
        ("valid.top-1", "top-1", "val"),
        ("loss/validation", "loss", "val"),
        ("test-loss", "loss", "test"),
        ("calibration/val_ece/dataloader_idx_1", "calibration/ece", "val 1"),
        ("loss/dataloader_idx_0", "loss", "0"),
        ("loss", "loss", ""),
        ("val", "val", ""),
        ("interval_loss", "interval_loss", ""),
        ("pskd/alpha", "pskd/alpha", ""),
    ],
)
def test_names_that_differ_by_their_stage(name: str, quantity: str, label: str):
    """Fails if curves of one quantity land on two axes, or part of a word is taken for a stage."""
    assert split_stage(name) == (quantity, label)


def test_choice_and_groups():
    """Fails if patterns are ignored, values per step are drawn beside those per epoch, or a name gets lost."""
    names = ["train_loss", "train_loss_step", "train_loss_epoch", "val_loss", "val/loss", "lr", "epoch", "n_epoch"]
    assert choose(names, ["*loss*", "n*"]) == {
        "train_loss": "train_loss_epoch",
        "val_loss": "val_loss",
        "val/loss": "val/loss",
        "n_epoch": "n_epoch",
    }
    assert group(choose(names, ["*"])) == {
        "loss": {"train": "train_loss_epoch", "val": "val_loss", "val/loss": "val/loss"},
        "lr": {"": "lr"},
        "n_epoch": {"": "n_epoch"},
    }


def test_panels_curves_and_legends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Fails if training and validation do not share an axis, values are wrong, or what is not finite breaks the picture."""
    curves = LearningCurves(tmp_path / "curves.png")
    curves.history = {
        "val_loss": [(1, 3.0), (2, float("nan")), (3, float("inf"))],
        "train_loss": [(1, 2.0), (2, 1.0), (3, 0.5)],
        "cost_in_$": [(3, 7.0)],
    }
    figure = labels(tmp_path, curves, monkeypatch, helpers.trainer())
    loss, cost = [axes for axes in figure.axes if axes.axison]
    assert loss.get_title(loc="left") == "loss"
    train, val = loss.get_lines()
    assert train.get_ydata().tolist() == [2.0, 1.0, 0.5]
    assert train.get_xdata().tolist() == [1, 2, 3]
    assert torch.tensor(val.get_ydata()).isnan().tolist() == [False, True, True]
    assert train.get_color() != val.get_color()
    assert train.get_linestyle() != val.get_linestyle()
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train  0.5", "val  inf"]
    assert cost.get_lines()[0].get_marker() == "o"
    figure.savefig(tmp_path / "drawn.png")


def test_an_empty_picture_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Fails if a pattern without a match leaves the user with a white picture."""
    curves = LearningCurves(tmp_path / "curves.png", ["accuracy*"])
    figure = labels(tmp_path, curves, monkeypatch, helpers.trainer())
    assert "Nothing has been logged yet." in figure.axes[0].texts[0].get_text()
    curves.history = {"val_acc": [(1, 1.0)]}
    figure = labels(tmp_path, curves, monkeypatch, helpers.trainer())
    text = figure.axes[0].texts[0].get_text()
    assert "matches accuracy*" in text
    assert "Logged: val_acc" in text


def test_many_metrics_are_not_all_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Fails if hundreds of metrics make a picture of hundreds of panels, or nobody is told."""
    curves = LearningCurves(tmp_path / "curves.png")
    curves.history = {f"metric {i}": [(1, 1.0)] for i in range(100)}
    figure = labels(tmp_path, curves, monkeypatch, helpers.trainer())
    assert len(figure.axes) == learning_curves.MAX_PANELS
    assert "76 more quantities" in figure.get_suptitle()


def test_matplotlib_is_left_as_found(tmp_path: Path):
    """Fails if drawing opens figures of pyplot or changes the user's settings."""
    import matplotlib
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    fit(Logs(), [LearningCurves(tmp_path / "curves.png")], epochs=1)
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


# Around it


def test_training_is_bit_identical(tmp_path: Path):
    """Fails if recording or drawing shifts the random numbers or touches a parameter."""
    modules, states = [Logs(dropout=0.3), Logs(dropout=0.3)], []
    for module, callbacks in zip(modules, [[], [LearningCurves(tmp_path / "curves.png", ["*loss"])]], strict=True):
        fit(module, callbacks, val=helpers.loader(shuffle=False))
        states.append(torch.get_rng_state())
    assert torch.equal(weights(modules[0]), weights(modules[1]))
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "curves.pdf"}, "`path` of LearningCurves .* ends in .png, but got 'curves.pdf'"),
        ({"path": 3}, "`path` of LearningCurves"),
        ({"metrics": "val_*"}, "`metrics` of LearningCurves .* got 'val_\\*'"),
        ({"metrics": []}, "`metrics` of LearningCurves"),
        ({"metrics": ["ok", 3]}, "`metrics` of LearningCurves"),
        ({"every_n_epochs": 0}, "`every_n_epochs` of LearningCurves to be a positive integer, but got 0"),
        ({"every_n_epochs": True}, "`every_n_epochs`"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LearningCurves(**arguments)


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path: Path):
    """Fails if a wrong path shows only after the first epoch."""
    (tmp_path / "file").touch()
    with pytest.raises(FulguriteError, match="`path` of LearningCurves .* choose another"):
        fit(Logs(), [LearningCurves(tmp_path / "file" / "curves.png")])


def test_trainer_of_the_other_copy_of_lightning(tmp_path: Path):
    """Fails if something recognises classes of `lightning.pytorch` only."""
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(12, 5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("train/loss", 1.0, on_step=False, on_epoch=True)
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", 2.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    curves = LearningCurves(tmp_path / "curves.png")
    the_trainer = other.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[curves],
    )
    the_trainer.fit(Other(), helpers.loader(), helpers.loader(shuffle=False))
    assert curves.history == {"train/loss": [(4, 1.0)], "val/loss": [(4, 2.0)]}
    assert (tmp_path / "curves.png").is_file()


def test_is_a_plain_callback():
    assert issubclass(LearningCurves, pl.Callback)
