# SPDX-License-Identifier: Apache-2.0
"""Data Diet: its equations against closed forms, oracles and identities; selection, averages and files."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from fulgurite.errors import FulguriteError
from fulgurite_plugins.data_selection import (
    average_scores,
    el2n,
    forgetting_counts,
    grand,
    l1_error,
    load_scores,
    max_margin,
    select_examples,
    sum_margin,
)
from fulgurite_plugins.data_selection.data_diet.files import (
    Scores,
    average,
    check_same_data,
    describe_dataset,
    labels_of,
    save_scores,
)
from fulgurite_plugins.data_selection.data_diet.forgetting import Counts
from fulgurite_plugins.data_selection.data_diet.functional import output_error


def case(n: int = 200, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, classes, dtype=torch.float64, generator=generator)
    return logits, torch.randint(0, classes, (n,), generator=generator)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Scores


def test_el2n_is_the_length_of_the_error_vector():
    logits, labels = case()
    scores = el2n(logits, labels)
    by_hand = [
        math.sqrt(sum((p - int(c == y)) ** 2 for c, p in enumerate(row)))
        for row, y in zip(logits.softmax(1), labels, strict=True)
    ]
    same(scores, torch.tensor(by_hand, dtype=torch.float64))
    assert 0 <= float(scores.min()) < 0.05
    assert 1.3 < float(scores.max()) <= math.sqrt(2)
    same(el2n(logits + 100 * torch.arange(200.0).view(-1, 1), labels), scores)
    same(el2n(logits.log_softmax(1), labels), scores)
    same(el2n(logits, F.one_hot(labels, 7).double()), scores)


def test_el2n_of_two_classes_and_the_extremes():
    logits, labels = case(classes=2)
    true = logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    same(el2n(logits, labels), math.sqrt(2) * (1 - true))
    certain = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 1000.0, 0.0]], dtype=torch.float64)
    same(el2n(certain, torch.tensor([0, 0])), torch.tensor([0.0, math.sqrt(2)], dtype=torch.float64))


def test_el2n_is_the_norm_of_the_gradient_for_the_logits():
    logits, labels = case()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    same(el2n(logits.detach(), labels), gradient.norm(dim=1))
    soft = case(classes=7)[0].flip(0).softmax(1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, soft, reduction="sum"), logits)
    same(el2n(logits.detach(), soft), gradient.norm(dim=1))


def test_l1_and_margins_have_their_closed_forms():
    logits, labels = case()
    p = logits.softmax(1)
    true = p.gather(1, labels.unsqueeze(1)).squeeze(1)
    same(l1_error(logits, labels), 2 * (1 - true))
    same(sum_margin(logits, labels), 1 - 7 * true)
    same(sum_margin(logits, labels), (1 - true) - 6 * true)
    best = torch.stack([max(p[i, c] for c in range(7) if c != labels[i]) for i in range(200)])
    same(max_margin(logits, labels), best - true)
    assert torch.equal(max_margin(logits, labels) > 0, logits.argmax(1) != labels)
    outputs, targets = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    same(output_error(outputs, targets), torch.stack([(o - t).norm() for o, t in zip(outputs, targets, strict=True)]))
    same(output_error(outputs[:, 0, 0], targets[:, 0, 0]), (outputs - targets)[:, 0, 0].abs())


@pytest.mark.parametrize("score", [el2n, l1_error, max_margin, sum_margin])
def test_what_does_not_fit_together_is_named(score):
    with pytest.raises(ValueError, match=r"shape \[B, C\].*\[2, 3, 4\]"):
        score(torch.zeros(2, 3, 4), torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match="0 ... 2, as many as the model has outputs, but got values from 1 to 3"):
        score(torch.zeros(2, 3), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="For regression, score with 'error'"):
        score(torch.zeros(2, 3), torch.zeros(2))


def test_grand_of_logistic_regression():
    """|sigma(z) - y| |(x, 1)|, times sqrt 2 for the softmax of two classes, whose rows get opposite gradients."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 6, dtype=torch.float64, generator=generator), torch.arange(30) % 2
    one = nn.Linear(6, 1).double()
    length = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1).norm(dim=1)
    expected = (one(x).squeeze(1).sigmoid() - y).abs() * length

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z.squeeze(1), y, reduction="none")

    same(grand(one, x, y.double(), loss), expected.detach())
    two = nn.Linear(6, 2).double()
    error = el2n(two(x).detach(), y)
    same(grand(two, x, y), error * length)


def test_last_layer_grand_is_el2n_times_the_length_of_the_features():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5))
    network = nn.Sequential(body, nn.Linear(9, 5)).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 5
    network.train()
    found = grand(network, x, y, parameters="last_layer")
    assert network.training
    assert body[1].num_batches_tracked == 0
    network.eval()
    with torch.no_grad():
        features = body(x)
        same(found, el2n(network(x), y) * (features.square().sum(1) + 1).sqrt(), 1e-6)
    whole = grand(network, x, y).square()
    parts = found.square() + grand(network, x, y, parameters="0.*").square()
    same(whole, parts, 1e-9)


def test_grand_equals_a_loop_over_examples():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double()
    x, y = torch.randn(11, 1, 8, 8, dtype=torch.float64), torch.arange(11) % 3
    expected = []
    for i in range(11):
        gradients = torch.autograd.grad(
            F.cross_entropy(network(x[i : i + 1]), y[i : i + 1]), list(network.parameters())
        )
        expected.append(torch.cat([g.flatten() for g in gradients]).norm())
    same(grand(network, x, y), torch.stack(expected), 1e-6)
    same(grand(network, x, y, chunk=3), torch.stack(expected), 1e-6)


# Averages


def test_average_is_the_mean_of_norms_and_not_the_norm_of_a_mean():
    """Jensen: the norm of a mean gradient would be smaller."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    runs, gradients = [], []
    for _ in range(5):
        network = nn.Linear(4, 3).double()
        runs.append(grand(network, x, y))
        parts = [
            torch.autograd.grad(F.cross_entropy(network(x[i : i + 1]), y[i : i + 1]), network.weight) for i in range(8)
        ]
        gradients.append(torch.stack([g[0].flatten() for g in parts]))
    of_norms = average_scores(runs)
    same(of_norms, torch.stack(runs).mean(0))
    assert bool((torch.stack(gradients).mean(0).norm(dim=1) < of_norms).all())


def test_never_learned_examples_in_an_average():
    runs = [torch.tensor([1.0, 2.0, math.inf]), torch.tensor([3.0, math.inf, math.inf])]
    assert average_scores(runs).tolist() == [2.0, math.inf, math.inf]
    assert average_scores(runs, "max", 6).tolist() == [2.0, 4.0, 6.0]
    with pytest.raises(ValueError, match="`presentations`, a number"):
        average_scores(runs, "max")
    with pytest.raises(ValueError, match="`never_learned` of average_scores to be one of 'inf', 'max', but got 'nan'"):
        average_scores(runs, "nan")


def test_averages_name_the_run_and_the_examples_that_are_missing():
    bad = torch.ones(9)
    bad[[2, 5]] = math.nan
    with pytest.raises(ValueError, match="run 1 to have a score for each of 9 examples, but 2 are NaN.* 2, 5"):
        average_scores([torch.ones(9), bad])
    with pytest.raises(ValueError, match=r"one shape \[N\], but got shapes \[\[9\], \[8\]\]"):
        average_scores([torch.ones(9), torch.ones(8)])
    with pytest.raises(ValueError, match="at least one run"):
        average_scores([])


# Forgetting


@pytest.mark.parametrize(("sequence", "score"), [("0101", 1), ("111", 0), ("000", math.inf), ("0110", 1), ("10101", 2)])
def test_forgetting_of_hand_written_sequences(sequence, score):
    correct = torch.tensor([[c == "1"] for c in sequence])
    assert forgetting_counts(correct).tolist() == [score]


def oracle(presentations: list[tuple[int, bool]], n: int) -> list[float]:
    previous, events, learned = dict.fromkeys(range(n), False), dict.fromkeys(range(n), 0), set()
    seen = set()
    for index, correct in presentations:
        events[index] += previous[index] and not correct
        previous[index] = correct
        seen.add(index)
        if correct:
            learned.add(index)
    return [events[i] if i in learned else math.inf if i in seen else math.nan for i in range(n)]


@pytest.mark.parametrize("replacement", [False, True])
def test_counts_equal_a_dictionary_in_any_order_with_repeats(replacement):
    draw = random.Random(0)
    counts, everything = Counts(20), []
    for _ in range(5):
        indices = draw.choices(range(19), k=40) if replacement else draw.sample(range(19), 19)
        epoch = [(index, draw.random() < 0.5) for index in indices]
        everything += epoch
        counts.count(torch.tensor([[position, index, correct] for position, (index, correct) in enumerate(epoch)]))
    expected = torch.tensor(oracle(everything, 20))
    torch.testing.assert_close(counts.scores(), expected, rtol=0, atol=0, equal_nan=True)
    assert counts.scores()[19].isnan()
    assert int(counts.presented.sum()) == len(everything)


def test_what_a_distributed_sampler_has_padded_does_not_count():
    counts = Counts(3)
    counts.count(torch.tensor([[0, 0, 1], [1, 1, 1], [2, 2, 0], [3, 0, 0]]), length=3)
    assert counts.scores().tolist() == [0.0, 0.0, math.inf]
    assert counts.presented.tolist() == [1, 1, 1]
    counts.count(torch.empty(0, 3).long())
    assert counts.presented.tolist() == [1, 1, 1]


# Selection


def random_scores(n: int = 101, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def test_hardest_and_easiest_partition_the_set_and_are_windows():
    scores = random_scores()
    for m in (1, 30, 100):
        hard, easy = select_examples(scores, m), select_examples(scores, 101 - m, "easiest")
        assert sorted([*hard.tolist(), *easy.tolist()]) == list(range(101))
        assert float(scores[hard].min()) >= float(scores[easy].max())
        assert torch.equal(select_examples(scores, m, "window", offset=101 - m), hard)
        assert torch.equal(select_examples(scores, 101 - m, "window", offset=0), easy)
        assert torch.equal(hard, hard.sort().values)
    assert torch.equal(select_examples(scores, 1.0), torch.arange(101))
    order = scores.argsort()
    assert torch.equal(select_examples(scores, 7, "window", offset=20), order[20:27].sort().values)


def test_permuting_the_data_permutes_the_selection():
    scores = random_scores()
    permutation = torch.randperm(101, generator=torch.Generator().manual_seed(3))
    for strategy, offset in (("hardest", 0), ("easiest", 0), ("window", 0.25)):
        kept = select_examples(scores, 40, strategy, offset)
        permuted = select_examples(scores[permutation], 40, strategy, offset)
        assert sorted(permutation[permuted].tolist()) == kept.tolist()


def test_ties_are_broken_by_the_index():
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, math.inf, 0.0])
    assert select_examples(scores, 3).tolist() == [2, 3, 4]
    assert select_examples(scores, 3, "easiest").tolist() == [0, 1, 5]
    same_everywhere = torch.zeros(1000)
    assert select_examples(same_everywhere, 10).tolist() == list(range(990, 1000))


def test_fractions_and_numbers():
    scores = random_scores(10)
    assert len(select_examples(scores, 0.34)) == 3
    assert len(select_examples(scores, 1)) == 1
    assert len(select_examples(scores, 0.01)) == 1
    assert len(select_examples(random_scores(5), 0.3, "window", offset=0.7)) == 2  # both round up: 2 + 4 of 5
    by_number = select_examples(scores, 3, "window", offset=6)
    assert torch.equal(select_examples(scores, 0.3, "window", offset=0.6), by_number)


def test_random_parts_depend_on_the_seed_alone():
    scores = random_scores()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = select_examples(scores, 0.3, "random", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, select_examples(scores.flip(0), 0.3, "random", seed=1))
    assert not torch.equal(first, select_examples(scores, 0.3, "random", seed=2))
    counts = torch.zeros(101)
    for seed in range(2000):
        counts[select_examples(scores, 30, "random", seed=seed)] += 1
    assert float((counts / 2000 - 30 / 101).abs().max()) < 5 * math.sqrt(0.21 / 2000)


@pytest.mark.parametrize("strategy", ["hardest", "easiest", "window", "random"])
def test_balanced_selection_keeps_the_proportions_of_classes(strategy):
    scores = random_scores(100)
    labels = torch.tensor([0] * 60 + [1] * 33 + [2] * 7)
    scores[labels == 1] += 10
    kept = select_examples(scores, 25, strategy, 0.4, labels)
    assert labels[kept].bincount().tolist() == [15, 8, 2]
    if strategy == "hardest":
        assert torch.equal(kept[:15], select_examples(scores[:60], 15))
    if strategy == "window":
        assert torch.equal(kept[:15], select_examples(scores[:60], 15, "window", 24))
    whole = select_examples(scores, 1.0, strategy, 0, labels)
    assert torch.equal(whole, torch.arange(100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), r"`keep` to be a fraction in \(0, 1\], or an integer, but got 0.0"),
        ((1.5,), "but got 1.5"),
        ((11,), "`keep` to be a number between 1 and the 10 examples.*but got 11"),
        ((0,), "between 1 and the 10 examples.*but got 0"),
        ((True,), "but got True"),
        ((5, "window", 6), r"offset \+ keep to be at most the 10 examples, but got 6 \+ 5"),
        ((5, "window", 1.0), r"`offset` to be a fraction in \[0, 1\), or an integer, but got 1.0"),
        ((5, "hard"), "one of 'hardest', 'easiest', 'window', 'random', but got 'hard'"),
        ((5, "hardest", 0, torch.zeros(9)), "one label for each of the 10 scores, but got 9"),
    ],
)
def test_wrong_arguments_of_a_selection_are_named(arguments: Any, message: str):
    with pytest.raises(ValueError, match=message):
        select_examples(random_scores(10), *arguments)


def test_nan_scores_name_their_examples():
    scores = random_scores(10)
    scores[[3, 7]] = math.nan
    with pytest.raises(ValueError, match="2 are NaN, among them those of the examples 3, 7"):
        select_examples(scores, 5)
    with pytest.raises(ValueError, match=r"of shape \[N\], but got \[2, 5\]"):
        select_examples(random_scores(10).view(2, 5), 5)


# Files


def some(n: int = 12, name: str = "el2n@2", seed: int = 0, **more: Any) -> Scores:
    dataset = {"type": "TensorDataset", "size": n, "fingerprint": "abc"}
    provenance = {"dataset": dataset, "runs": [{"seed": seed, "epoch": 2, "steps": 8}], **more}
    return Scores({name: random_scores(n, seed)}, torch.arange(n) % 3, provenance)


def test_scores_survive_a_file_with_all_that_is_known_of_them(tmp_path):
    save_scores(tmp_path / "a" / "s.safetensors", some())
    found = load_scores(tmp_path / "a" / "s.safetensors")
    assert torch.equal(found.values["el2n@2"], some().values["el2n@2"])
    assert torch.equal(found.targets, some().targets)
    assert found.provenance == {"version": 1, **some().provenance}
    assert found.pick("el2n")[0] == found.pick("el2n@2")[0] == "el2n@2"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["s.safetensors"]


def test_names_of_scores():
    several = Scores({"el2n@2": torch.ones(1), "el2n@10": torch.zeros(1), "grand@2": torch.ones(1)})
    assert several.pick("grand")[0] == "grand@2"
    with pytest.raises(FulguriteError, match="'el2n' is one of several: el2n@2, el2n@10"):
        several.pick("el2n")
    with pytest.raises(FulguriteError, match="has el2n@2, el2n@10, grand@2, but got 'grad'"):
        several.pick("grad")


def test_files_that_are_none(tmp_path):
    with pytest.raises(FulguriteError, match=r"nothing.safetensors is none"):
        load_scores(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(FulguriteError, match="cannot be read as one"):
        load_scores(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(FulguriteError, match="cannot be read as one: KeyError|cannot be read as one"):
        load_scores(tmp_path / "weights.safetensors")


def test_average_of_files_counts_runs_and_refuses_strangers():
    mean = average([some(seed=1), some(seed=2)])
    same(mean.values["el2n@2"], (random_scores(12, 1) + random_scores(12, 2)) / 2, 1e-6)
    assert [run["seed"] for run in mean.provenance["runs"]] == [1, 2]
    with pytest.raises(FulguriteError, match="whose size is 12, but the scores were computed on one whose size is 13"):
        average([some(), some(13)])
    other = some()
    other.provenance["dataset"]["fingerprint"] = "xyz"
    with pytest.raises(FulguriteError, match="fingerprint is abc.*fingerprint is xyz"):
        average([some(), other])
    with pytest.raises(FulguriteError, match="hold the same scores, but one has el2n@2 and another l1@2"):
        average([some(), some(name="l1@2")])


def test_average_of_forgetting_takes_the_presentations_from_the_files():
    never = Scores(
        {"forgetting@4": torch.tensor([math.inf, 1.0])},
        None,
        {**some(2).provenance, "presentations": {"forgetting@4": 4}},
    )
    always = Scores({"forgetting@4": torch.tensor([2.0, 1.0])}, None, never.provenance)
    assert average([never, always]).values["forgetting@4"].tolist() == [math.inf, 1.0]
    assert average([never, always], "max").values["forgetting@4"].tolist() == [3.0, 1.0]


def test_fingerprints_tell_labels_and_sizes_apart_and_ignore_augmentation():
    x, y = torch.randn(400, 3), torch.randint(0, 5, (400,))
    print_of = lambda *data: describe_dataset(TensorDataset(*data))["fingerprint"]  # noqa: E731
    assert print_of(x, y) == print_of(torch.randn(400, 3), y)
    assert print_of(x, y) != print_of(x, y.flip(0))
    assert print_of(x[:399], y[:399]) != print_of(x, y)
    assert print_of(x) == print_of(x) != print_of(x + 1)  # no labels: whole examples
    assert describe_dataset(TensorDataset(x, y)) == {
        "type": "TensorDataset",
        "size": 400,
        "fingerprint": print_of(x, y),
    }


def test_a_random_dataset_without_labels_is_told_by_its_size():
    class Random(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(3)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    prints = {describe_dataset(Random(torch.zeros(n, 1)))["fingerprint"] for n in (5, 5, 6)}
    assert len(prints) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_scores_of_other_data_are_refused_with_both_sizes():
    with pytest.raises(FulguriteError, match="size is 7, but the scores were computed on one whose size is 12"):
        check_same_data(some(), {"size": 7, "fingerprint": "abc"})


def test_labels_are_found():
    x, y = torch.zeros(6, 2), torch.arange(6) % 3
    assert torch.equal(labels_of(TensorDataset(x, y)), y)
    assert labels_of(Subset(TensorDataset(x, y), [4, 1])).tolist() == [1, 1]
    items = [{"image": torch.zeros(2), "label": int(label)} for label in y]
    assert labels_of(items) is None
    assert labels_of(items, read=True).tolist() == y.tolist()
    assert labels_of(TensorDataset(x, x), read=True) is None
