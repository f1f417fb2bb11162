# SPDX-License-Identifier: Apache-2.0
"""Tasks: losses and metrics against values computed by hand, injected parts, and what interventions find."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fulgurite import Classification, Intervention, Regression
from fulgurite.models import MLP, SmallConvNet
from fulgurite_plugins.distillation import PSKD
from tests.helpers import trainer, weights

still = functools.partial(torch.optim.SGD, lr=0.0)


def fixed_logits() -> tuple[Tensor, Tensor]:
    """Five examples of three classes; examples 1 and 4 are wrong."""
    probabilities = torch.tensor(
        [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]], dtype=torch.float64
    )
    return probabilities.log().float(), torch.tensor([0, 1, 1, 2, 2])


def identity_task(**arguments: Any) -> Classification:
    """A task whose inputs are the logits (a zero parameter keeps backward possible)."""

    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    return Classification(num_classes=3, network=Identity(), optimizer=still, **arguments)


def uneven() -> DataLoader:
    return DataLoader(TensorDataset(*fixed_logits()), batch_size=2)


NLL = -(math.log(0.7) + math.log(0.3) + math.log(0.8) + math.log(0.6) + math.log(0.05)) / 5


def test_classification_logs_what_a_hand_computes_with_an_uneven_last_batch() -> None:
    # Breaks if the last batch of one example weighs as much as those of two, or a metric is given the wrong arguments.
    task = identity_task()
    logged = trainer().validate(task, uneven(), verbose=False)[0]
    brier = (
        (0.3**2 + 0.2**2 + 0.1**2)
        + (0.5**2 + 0.7**2 + 0.2**2)
        + (0.1**2 + 0.2**2 + 0.1**2)
        + (0.2**2 + 0.2**2 + 0.4**2)
        + (0.9**2 + 0.05**2 + 0.95**2)
    ) / 5
    # confidences 0.7 right, 0.5 wrong, 0.8 right, 0.6 right, 0.9 wrong, each alone in its bin of ten
    ece = (0.3 + 0.5 + 0.2 + 0.4 + 0.9) / 5
    # by falling confidence: wrong, right, right, right, wrong
    aurc = (1 + 1 / 2 + 1 / 3 + 1 / 4 + 2 / 5) / 5
    expected = {"loss": NLL, "nll": NLL, "acc": 0.6, "error": 0.4, "ece": ece, "brier": brier, "aurc": aurc}
    assert logged == {f"val/{name}": pytest.approx(value, abs=1e-5) for name, value in expected.items()}


def test_test_and_training_log_under_their_own_names() -> None:
    task = identity_task()
    assert set(trainer().test(task, uneven(), verbose=False)[0]) == {
        f"test/{name}" for name in ("loss", "nll", "acc", "error", "ece", "brier", "aurc")
    }
    fitting = trainer(epochs=1)
    fitting.fit(task, uneven())
    assert fitting.callback_metrics["train/loss"].item() == pytest.approx(NLL, abs=1e-5)


def test_label_smoothing_is_in_the_loss_and_not_in_the_nll() -> None:
    logits = fixed_logits()[0]
    logged = trainer().validate(identity_task(label_smoothing=0.1), uneven(), verbose=False)[0]
    smooth = 0.9 * NLL + 0.1 * -torch.log_softmax(logits, 1).mean().item()
    assert logged["val/loss"] == pytest.approx(smooth, abs=1e-5)
    assert logged["val/nll"] == pytest.approx(NLL, abs=1e-5)


def test_a_custom_criterion_gets_outputs_and_targets() -> None:
    class Margin(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.gather(1, targets[:, None]).mean()

    logged = trainer().validate(identity_task(criterion=Margin()), uneven(), verbose=False)[0]
    assert logged["val/loss"] == pytest.approx(-NLL, abs=1e-5)


def test_the_error_is_one_minus_the_accuracy_over_two_epochs() -> None:
    # Breaks if the metrics are not reset, or error and accuracy share their state.
    task = identity_task()
    fitting = trainer(epochs=2)
    fitting.fit(task, uneven(), DataLoader(TensorDataset(*(part[:3] for part in fixed_logits())), batch_size=2))
    metrics = fitting.callback_metrics
    assert metrics["val/acc"].item() == pytest.approx(2 / 3)
    assert metrics["val/error"].item() == pytest.approx(1 / 3)


def test_networks_are_instances_or_made_from_shapes() -> None:
    instance = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    assert Classification(3, network=instance).network is instance
    assert isinstance(Classification(3, (1, 2, 2)).network, MLP)
    made = Classification(3, (2, 5, 4), network=functools.partial(SmallConvNet, width=4))
    assert made(torch.zeros(6, 2, 5, 4)).shape == (6, 3)
    assert made.network.head.in_features == 8


def test_the_models_have_the_sizes_they_are_asked_for() -> None:
    assert [layer.out_features for layer in MLP((1, 3), 7, hidden=(5, 4)) if isinstance(layer, nn.Linear)] == [5, 4, 7]
    assert MLP((1, 3), 7, hidden=())(torch.zeros(2, 1, 3)).shape == (2, 7)
    with pytest.raises(ValueError, match="Use MLP for inputs that are not images"):
        SmallConvNet((1, 40), 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": None}, "`num_classes` of Classification to be a positive integer, but got None"),
        ({"num_classes": 0, "input_shape": (4,)}, "positive integer, but got 0"),
        ({"num_classes": 3}, "`input_shape` of Classification"),
        ({"num_classes": 3, "input_shape": (4,), "label_smoothing": 1.5}, r"in \[0, 1\], but got 1.5"),
        ({"num_classes": 3, "input_shape": (4,), "lr_interval": "day"}, "'epoch' or 'step', but got 'day'"),
        (
            {"num_classes": 3, "input_shape": (4,), "label_smoothing": 0.1, "criterion": nn.CrossEntropyLoss()},
            "Set it on the criterion",
        ),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classification(**arguments)


def test_regression_logs_what_a_hand_computes() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 6.0, 4.0])
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    task = Regression(Echo(), optimizer=still)
    logged = trainer().validate(task, loader, verbose=False)[0]
    mse = (0 + 1 + 0 + 4 + 1) / 5
    assert logged == {
        "val/loss": pytest.approx(mse),
        "val/mse": pytest.approx(mse),
        "val/mae": pytest.approx(4 / 5),
        "val/r2": pytest.approx(1 - 6 / 18),
    }
    absolute = Regression(Echo(), criterion=nn.L1Loss(), optimizer=still)
    assert trainer().validate(absolute, loader, verbose=False)[0]["val/loss"] == pytest.approx(4 / 5)


def test_predict_takes_pairs_and_bare_inputs() -> None:
    task, (logits, _) = identity_task(), fixed_logits()
    pairs = trainer().predict(task, uneven())
    bare = trainer().predict(task, DataLoader(logits, batch_size=2))
    assert torch.equal(torch.cat(pairs), logits)
    assert torch.equal(torch.cat(bare), logits)


def test_the_default_optimizer_is_the_documented_one() -> None:
    optimizer = Classification(3, (4,)).configure_optimizers()
    group = optimizer.param_groups[0]
    assert (type(optimizer), group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (
        torch.optim.SGD,
        0.1,
        0.9,
        True,
        5e-4,
    )


@pytest.mark.parametrize(("interval", "rate"), [("epoch", 0.5**2), ("step", 0.5**6)])
def test_the_schedule_advances_per_epoch_or_per_step(interval: str, rate: float) -> None:
    # Two epochs of three batches.
    task = Classification(
        3,
        network=nn.Linear(3, 3),
        optimizer=functools.partial(torch.optim.SGD, lr=1.0),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        lr_interval=interval,
    )
    fitting = trainer(epochs=2)
    fitting.fit(task, uneven())
    assert fitting.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_a_plateau_schedule_reads_its_metric() -> None:
    # The optimizer moves another tensor, so the validation loss never falls: patience 0 halves the rate after every epoch
    # but the first.
    task = identity_task(lr_scheduler=functools.partial(ReduceLROnPlateau, monitor="val/loss", patience=0, factor=0.5))
    task.make_optimizer = lambda parameters: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    fitting = trainer(epochs=3)
    fitting.fit(task, uneven(), uneven())
    assert fitting.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.25)


def test_pskd_finds_the_criterion_of_a_task_and_changes_its_training() -> None:
    def final(callbacks: list[Any]) -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        task = Classification(3, network=nn.Linear(3, 3), optimizer=functools.partial(torch.optim.SGD, lr=0.5))
        fitting = trainer(callbacks, epochs=3)
        fitting.fit(task, uneven())
        return weights(task), fitting

    plain, _ = final([])
    softened, fitting = final([PSKD(alpha=0.8)])
    assert not torch.equal(plain, softened)
    assert fitting.callback_metrics["pskd/alpha"].item() == pytest.approx(0.8)


def test_on_loss_sees_the_criterion_of_a_task_also_if_it_is_nobodys_function() -> None:
    # Breaks if `fulgurite_criterion` is not looked at: this criterion calls no loss of torch.nn.functional.
    class Squares(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs**2).sum()

    names: list[str] = []

    class Watch(Intervention):
        def on_loss(self, call: Any) -> Any:
            names.append(call.name)
            return call

    trainer([Watch()], epochs=1).fit(identity_task(criterion=Squares()), uneven())
    assert names == ["criterion"] * 3


def test_a_penalty_is_added_to_the_loss_of_a_task() -> None:
    # d(loss + sum of weights)/d weight is one more than d loss/d weight.
    class Sum(Intervention):
        def penalty(self, step: Any) -> Tensor:
            return step.module.network.weight.sum()

    def after(callbacks: list[Any]) -> Tensor:
        torch.manual_seed(0)
        network = nn.Linear(3, 3)
        task = Classification(3, network=network, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
        trainer(callbacks, epochs=1, limit_train_batches=1).fit(task, uneven())
        return network.weight.detach()

    torch.testing.assert_close(after([]) - after([Sum()]), torch.full((3, 3), 0.1))


def test_logits_between_zero_and_one_are_not_taken_for_probabilities():
    """torchmetrics guesses from the values; logits of a barely trained network lie in [0, 1]."""
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.6], [0.7, 0.3], [0.4, 0.5]])
    targets = torch.tensor([0, 1, 1, 1])
    module = Classification(num_classes=2, network=nn.Identity())
    run = trainer()
    run.validate(module, DataLoader(TensorDataset(logits, targets), batch_size=4), verbose=False)
    probabilities = logits.softmax(1)
    brier = (probabilities - F.one_hot(targets, 2)).square().sum(1).mean()
    torch.testing.assert_close(run.callback_metrics["val/brier"], brier)
    torch.testing.assert_close(run.callback_metrics["val/nll"], F.cross_entropy(logits, targets))
