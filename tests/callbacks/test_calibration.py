# SPDX-License-Identifier: Apache-2.0
"""`Calibration` against values made by hand or by torchmetrics, on modules that log nothing themselves."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error

from fulgurite import distributed
from fulgurite.errors import RefusedError
from fulgurite.losses import LossCall
from fulgurite.metrics import aurc, excess_aurc
from fulgurite.tasks import Classification
from fulgurite_callbacks import Calibration
from fulgurite_callbacks.calibration import predictions_and_targets
from tests import helpers
from tests.helpers import fit, trainer, weights

NAMES = {"ece", "nll", "brier", "aurc", "excess_aurc"}


class Quiet(pl.LightningModule):
    """Returns its inputs as logits; computes a loss in validation and test, and logs nothing."""

    def __init__(self, loss: Any = F.cross_entropy) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch[0] * self.scale, batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.loss(batch[0] * self.scale, batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch[0] * self.scale, batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def predictions(n: int = 41, classes: int = 4, seed: int = 0, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, *shape, generator=generator)
    return logits, torch.randint(0, classes, (n, *shape), generator=generator)


def batches(logits: Tensor, targets: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(logits, targets), batch_size=8)


def expected(logits: Tensor, targets: Tensor, n_bins: int = 10) -> dict[str, float]:
    """All measures of predictions [N, C], from their definitions or from torchmetrics' functions."""
    probabilities = logits.double().softmax(1)
    confidence, predicted = probabilities.max(1)
    truth = F.one_hot(targets, logits.shape[1])
    ece = multiclass_calibration_error(probabilities.float(), targets, logits.shape[1], n_bins=n_bins, norm="l1")
    values = {
        "ece": ece,
        "nll": F.cross_entropy(logits.double(), targets),
        "brier": (probabilities - truth).square().sum(1).mean(),
        "aurc": aurc(confidence, predicted == targets),
        "excess_aurc": excess_aurc(confidence, predicted == targets),
    }
    return {name: float(value) for name, value in values.items()}


def logged(results: dict[str, float], stage: str, prefix: str = "calibration/", suffix: str = "") -> dict[str, float]:
    found = {name: results.get(f"{prefix}{stage}_{name}{suffix}") for name in NAMES}
    return {name: float(value) for name, value in found.items() if value is not None}


def validated(callback: Calibration, module: Any, *loaders: DataLoader) -> dict[str, float]:
    the_trainer = trainer([callback])
    results = the_trainer.validate(module, list(loaders), verbose=False)
    return {name: value for result in results for name, value in result.items()}


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("n_bins", [10, 15])
def test_measures_of_an_unmodified_module(stage: str, n_bins: int):
    """Fails if validate or test alone miss a measure, average over batches, or use other bins."""
    data = predictions()
    the_trainer = trainer([Calibration(n_bins=n_bins)])
    run = the_trainer.validate if stage == "val" else the_trainer.test
    results = run(Quiet(), batches(*data), verbose=False)[0]
    assert set(results) == {f"calibration/{stage}_{name}" for name in NAMES}
    assert logged(results, stage) == pytest.approx(expected(*data, n_bins=n_bins), rel=1e-5)


def test_ece_by_hand():
    """Fails if the error is not the gap weighted by the share of each bin: here |1/2 - 3/4| in the only bin."""
    logits = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log()
    results = validated(Calibration(["ece", "nll"]), Quiet(), batches(logits, torch.tensor([0, 1])))
    nll = -(torch.tensor(0.75).log() + torch.tensor(0.25).log()) / 2
    assert results == pytest.approx({"calibration/val_ece": 0.25, "calibration/val_nll": float(nll)})


def test_logits_between_0_and_1_are_not_taken_for_probabilities():
    """Fails if outputs reach torchmetrics as they are: it takes values in [0, 1] for probabilities."""
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    targets = torch.tensor([0, 0, 1])
    assert logged(validated(Calibration(), Quiet(), batches(logits, targets)), "val") == pytest.approx(
        expected(logits, targets), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_dense_outputs_and_ignored_positions(dtype: torch.dtype):
    """Fails if nll_loss is read as logits of another kind, positions are flattened wrongly or ignored ones counted."""
    logits, targets = predictions(n=10, shape=(3, 2))
    logits = logits.log_softmax(1).to(dtype)
    targets[targets == 3] = 255
    targets[0] = 255
    results = validated(Calibration(), Quiet(lambda x, y: F.nll_loss(x, y, ignore_index=255)), batches(logits, targets))
    flat = logits.float().permute(0, 2, 3, 1).reshape(-1, 4)
    kept = targets.reshape(-1) != 255
    assert logged(results, "val") == pytest.approx(expected(flat[kept], targets.reshape(-1)[kept]), rel=1e-5)


def test_nothing_left_after_ignoring_is_not_a_number():
    """Fails if a validation of ignored positions only crashes, or pretends to be perfect."""
    logits, targets = predictions(n=4)
    results = validated(Calibration(), Quiet(), batches(logits, torch.full_like(targets, -100)))
    assert all(torch.isnan(torch.tensor(value)) for value in logged(results, "val").values())
    assert set(logged(results, "val")) == NAMES


def test_predictions_that_are_not_a_number_show():
    """Fails if a diverged model gets a finite calibration error."""
    logits, targets = predictions(n=20)
    logits[3] = torch.nan
    results = logged(validated(Calibration(), Quiet(), batches(logits, targets)), "val")
    assert all(value != value for value in results.values())


def test_label_smoothing_and_class_weights_do_not_change_the_measures():
    """Fails if the likelihood is the user's smoothed, weighted loss instead of that of the labels."""
    data = predictions()
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]), label_smoothing=0.3)
    assert logged(validated(Calibration(), Quiet(criterion), batches(*data)), "val") == pytest.approx(
        expected(*data), rel=1e-5
    )


def test_one_hot_targets_are_class_indices_and_others_are_refused():
    """Fails if mixed targets are silently rounded."""
    logits, targets = predictions()
    one_hot = F.one_hot(targets, 4).float()
    results = validated(Calibration(), Quiet(), batches(logits, one_hot))
    assert logged(results, "val") == pytest.approx(expected(logits, targets), rel=1e-5)
    with pytest.raises(RefusedError, match="class indices .* not one-hot"):
        validated(Calibration(), Quiet(), batches(logits, 0.9 * one_hot + 0.025))


def test_unbatched_outputs():
    """Fails if `[C]` and a scalar target, which cross_entropy allows, are read as a batch."""
    call = LossCall.bound(F.cross_entropy, (torch.tensor([0.0, 2.0]), torch.tensor(1)), {}, None)
    logs, targets = predictions_and_targets(call)
    assert logs.shape == (1, 2)
    assert targets.tolist() == [1]


def test_several_dataloaders_have_their_own_measures_and_class_counts():
    """Fails if loaders are pooled or named otherwise than Lightning names them."""
    first, second = predictions(n=20), predictions(n=31, classes=7, seed=1)
    results = validated(Calibration(), Quiet(), batches(*first), batches(*second))
    assert len(results) == 10
    for number, data in enumerate((first, second)):
        found = logged(results, "val", suffix=f"/dataloader_idx_{number}")
        assert found == pytest.approx(expected(*data), rel=1e-5)


def test_changing_class_count_is_refused():
    """Fails if two tasks in one loader are pooled."""

    class Changing(Quiet):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch[0][:, : 4 - batch_idx], batch[1] * 0)

    with pytest.raises(RefusedError, match="got 4 and then 3"):
        validated(Calibration(), Changing(), batches(*predictions()))


def test_each_validation_of_a_training_starts_afresh_and_the_sanity_check_logs_nothing():
    """Fails if examples of one epoch, or of the sanity check, are counted in the next."""
    module, data = Quiet(), predictions()
    seen: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            values = {**logged(trainer.callback_metrics, "val"), "scale": module.scale.item()}
            seen.append(values)

    trainer([Calibration(), Watch()], epochs=2).fit(module, batches(*data), batches(*data))
    assert set(seen[0]) == {"scale"}
    assert len(seen) == 3
    for values in seen[1:]:
        scale = values.pop("scale")
        assert values == pytest.approx(expected(data[0] * scale, data[1]), rel=1e-4)


class TwoLosses(Quiet):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.CrossEntropyLoss()
        self.auxiliary = nn.CrossEntropyLoss()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.main(batch[0], batch[1]) + self.auxiliary(-batch[0], batch[1])


def test_the_named_criterion_is_the_one_that_is_measured():
    """Fails if another loss of the same step is measured, or a hook stays on the user's criterion."""
    data = predictions()
    module = TwoLosses()
    with pytest.raises(RefusedError, match=r"one classification loss.*cross_entropy, cross_entropy.*main, auxiliary"):
        validated(Calibration(), module, batches(*data))
    for name, sign in (("main", 1), ("auxiliary", -1)):
        results = validated(Calibration(criterion=name), module, batches(*data))
        assert logged(results, "val") == pytest.approx(expected(sign * data[0], data[1]), rel=1e-5)
    assert not module.main._forward_pre_hooks
    assert not module.auxiliary._forward_pre_hooks


class Tempered(nn.Module):
    """Changes the outputs before it measures them."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs / 2, targets)


def test_the_criterion_of_a_task():
    """Fails if a task's own measures and these disagree, or its criterion may not change the outputs."""
    data = predictions()
    for criterion, scale in ((nn.CrossEntropyLoss(), 1.0), (Tempered(), 0.5)):
        task = Classification(num_classes=4, network=nn.Identity(), criterion=criterion)
        results = validated(Calibration(), task, batches(*data))
        assert logged(results, "val") == pytest.approx(expected(scale * data[0], data[1]), rel=1e-5)
        if scale == 1.0:
            for name in ("ece", "nll", "brier", "aurc"):
                assert results[f"calibration/val_{name}"] == pytest.approx(results[f"val/{name}"], rel=1e-5)


def test_a_named_criterion_that_changes_the_outputs_is_refused():
    """Fails if the message does not say why a criterion that is called is not the one that was named."""
    module = Quiet(Tempered())
    with pytest.raises(RefusedError, match="as they are given to 'loss', but it called cross_entropy"):
        validated(Calibration(criterion="loss"), module, batches(*predictions()))


def test_a_classification_loss_beside_another_kind_is_found():
    """Fails if a regression term in the step hides the only classification loss."""

    class WithPenalty(Quiet):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return F.mse_loss(batch[0], batch[0] * 0) + F.cross_entropy(batch[0], batch[1])

    data = predictions()
    for criterion in (None, "cross_entropy"):
        results = validated(Calibration(criterion=criterion), WithPenalty(), batches(*data))
        assert logged(results, "val") == pytest.approx(expected(*data), rel=1e-5)


@pytest.mark.parametrize(
    ("criterion", "loss", "message"),
    [
        (None, lambda x, y: F.mse_loss(x[:, 0], y.float()), "to call cross_entropy or nll_loss.*it called mse_loss"),
        (None, lambda x, y: x.sum(), "called no loss of torch.nn.functional"),
        ("nll_loss", F.cross_entropy, "to call nll_loss on outputs.*it called cross_entropy"),
        ("missing", F.cross_entropy, "to name a loss module of Quiet.*got 'missing'.*no loss modules"),
        (None, lambda x, y: F.cross_entropy(x[:, :1], 0 * y), "over at least two classes.*got shape"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(criterion: str | None, loss: Any, message: str):
    """Fails if a module without a usable criterion logs nothing in silence; in a training, the sanity check tells."""
    with pytest.raises(RefusedError, match=message):
        trainer([Calibration(criterion=criterion)]).fit(Quiet(loss), batches(*predictions()), batches(*predictions()))


def test_a_training_without_validation_needs_nothing():
    """Fails if laying the splice makes Lightning believe that there is a validation step."""

    class Bare(helpers.Plain):
        validation_step = pl.LightningModule.validation_step

    the_trainer = fit(Bare(), [Calibration()], epochs=1)
    assert not any("calibration" in name for name in the_trainer.callback_metrics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measures": ["ece", "mce"]}, r"`measures` of Calibration .* got \['ece', 'mce'\]"),
        ({"measures": "ece"}, "`measures` of Calibration .* got 'ece'"),
        ({"measures": []}, "`measures` of Calibration"),
        ({"measures": ["ece", "ece"]}, "each once"),
        ({"n_bins": 0}, "`n_bins` of Calibration to be a positive integer, but got 0"),
        ({"n_bins": 10.0}, "`n_bins`"),
        ({"n_bins": True}, "`n_bins`"),
        ({"prefix": ""}, "`prefix` of Calibration"),
        ({"criterion": ""}, "`criterion` of Calibration"),
        ({"plot": "yes"}, "`plot` of Calibration"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str):
    """Fails if a wrong argument is only noticed in validation, or never."""
    with pytest.raises(ValueError, match=message):
        Calibration(**arguments)


def test_two_instances_need_two_prefixes():
    """Fails if two instances average each other's values under one name."""
    data = predictions()
    with pytest.raises(RefusedError, match="its own `prefix`, but got 'calibration/' twice"):
        trainer([Calibration(), Calibration(n_bins=15)]).validate(Quiet(), batches(*data), verbose=False)
    the_trainer = trainer([Calibration(), Calibration(n_bins=15, prefix="fine/")])
    results = the_trainer.validate(Quiet(), batches(*data), verbose=False)[0]
    assert logged(results, "val") == pytest.approx(expected(*data), rel=1e-5)
    assert logged(results, "val", prefix="fine/") == pytest.approx(expected(*data, n_bins=15), rel=1e-5)


def test_training_is_bit_identical(tmp_path: Path):
    """Fails if measuring or drawing shifts the random numbers or touches a parameter."""
    modules = [helpers.Plain(dropout=0.3), helpers.Plain(dropout=0.3)]
    states = []
    for module, callbacks in zip(modules, [[], [Calibration(plot=True)]], strict=True):
        fit(module, callbacks, val=helpers.loader(), default_root_dir=tmp_path)
        states.append(torch.get_rng_state())
    assert torch.equal(weights(modules[0]), weights(modules[1]))
    assert torch.equal(*states)


def test_the_module_is_left_as_found_and_a_second_fit_works():
    """Fails if a hook stays on the criterion after fit or after an exception in a step."""
    module, data = TwoLosses(), predictions()
    callback = Calibration(criterion="main")
    before = dict(module.__dict__)
    for _ in range(2):
        trainer([callback], epochs=1).fit(module, batches(*data), batches(*data))
    assert not module.main._forward_pre_hooks

    class Failing(pl.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer([callback, Failing()]).validate(module, batches(*data))
    assert not module.main._forward_pre_hooks
    assert {name for name in module.__dict__ if not name.startswith("_")} == {n for n in before if n[0] != "_"}
    assert pickle.loads(pickle.dumps(callback)).criterion == "main"


def test_reliability_diagram(tmp_path: Path):
    """Fails if the picture is missing, is drawn without being asked for, or goes through pyplot."""
    import matplotlib.pyplot as plt

    data = predictions()
    for callback in (Calibration(prefix="none/"), Calibration(plot=True)):
        the_trainer = trainer([callback], default_root_dir=tmp_path)
        the_trainer.validate(Quiet(), [batches(*data), batches(*data)], verbose=False)
        the_trainer.test(Quiet(), batches(*data), verbose=False)
    names = {"calibration_val_0.png", "calibration_val_1.png", "calibration_test.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert plt.get_fignums() == []


def test_trainer_of_the_other_copy_of_lightning():
    """Fails if something recognises classes of `lightning.pytorch` only."""
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(batch[0], batch[1])

    data = predictions()
    the_trainer = other.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Calibration()],
    )
    results = the_trainer.validate(Other(), batches(*data), verbose=False)[0]
    assert logged(results, "val") == pytest.approx(expected(*data), rel=1e-5)


def test_a_rank_without_a_batch_takes_part(monkeypatch: pytest.MonkeyPatch):
    """Fails if a rank that saw no batch of a loader skips the collectives of the others; pretended here by one process."""
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, {0: 4, 1: 7}])
    data = predictions()
    results = validated(Calibration(), Quiet(), batches(*data), DataLoader(TensorDataset(*predictions(n=0))))
    assert logged(results, "val", suffix="/dataloader_idx_0") == pytest.approx(expected(*data), rel=1e-5)
    other = logged(results, "val", suffix="/dataloader_idx_1")
    assert set(other) == NAMES
    assert all(value != value for value in other.values())
