# SPDX-License-Identifier: Apache-2.0
"""Curvature products equal dense matrices, over batches and loops; Lanczos and the estimators equal closed forms."""

import math

import lightning.pytorch as pl
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.curvature import (
    EmpiricalFisher,
    Evaluation,
    FiniteDifferenceHessian,
    GaussNewton,
    Hessian,
    Operator,
    hutchinson_diagonal,
    hutchinson_frobenius,
    hutchinson_trace,
    lanczos,
    model_loss,
    step_loss,
)
from fulgurite.errors import FulguriteError, RefusedError
from fulgurite.per_example import cross_entropy
from fulgurite.samples import FixedBatches

torch.manual_seed(0)
INPUTS, TARGETS = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
BATCHES = [(INPUTS[:5], TARGETS[:5]), (INPUTS[5:], TARGETS[5:])]
"""Two batches of different sizes: their mean must be weighted."""


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def flat_loss(model: nn.Module):
    """The mean loss over all examples as a function of the flat parameters, and these."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return functional_call(model, values, INPUTS.to(flat.dtype))

    return outputs, torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def dense(kind: type, model: nn.Module) -> torch.Tensor:
    outputs, point = flat_loss(model)
    if kind in (Hessian, FiniteDifferenceHessian):
        return torch.func.hessian(lambda flat: F.cross_entropy(outputs(flat), TARGETS))(point)
    if kind is EmpiricalFisher:
        rows = torch.func.jacrev(lambda flat: F.cross_entropy(outputs(flat), TARGETS, reduction="none"))(point)
        return rows.mT @ rows / len(rows)
    jacobian = torch.func.jacrev(outputs)(point)
    p = outputs(point).softmax(dim=1)
    inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("ncp,nce,neq->pq", jacobian, inner, jacobian) / len(INPUTS)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", [Hessian, GaussNewton, EmpiricalFisher])
def test_products_are_those_of_the_dense_matrix(kind, kept):
    """One vector, several at once, twice in a row: a graph that is kept must not be consumed."""
    model = network()
    operator = kind(model_loss(model, cross_entropy, BATCHES), model.parameters(), keep_graphs=kept)
    matrix = dense(kind, model)
    assert operator.shape == matrix.shape
    vectors = torch.randn(matrix.shape[0], 20, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(operator @ vectors, matrix @ vectors, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(operator @ vectors[:, 0], matrix @ vectors[:, 0], rtol=1e-10, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_finite_differences_come_close_and_put_the_parameters_back():
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    operator = FiniteDifferenceHessian(model_loss(model, cross_entropy, BATCHES), model.parameters())
    vectors = torch.randn(operator.shape[0], 2, dtype=torch.float64)
    torch.testing.assert_close(operator @ vectors, dense(Hessian, model) @ vectors, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_gauss_newton_of_a_linear_model_is_the_hessian():
    torch.manual_seed(2)
    model = nn.Linear(4, 3).double()
    source = model_loss(model, cross_entropy, BATCHES)
    identity = torch.eye(15, dtype=torch.float64)
    torch.testing.assert_close(
        GaussNewton(source, model.parameters()) @ identity, Hessian(source, model.parameters()) @ identity
    )


def test_a_frozen_parameter_is_no_dimension_and_an_unused_one_is_zero():
    model = network()
    model.add_module("unused", nn.Linear(2, 2).double())
    model[0].weight.requires_grad_(False)
    forward = nn.Sequential(*list(model.children())[:3])
    operator = Hessian(model_loss(forward, cross_entropy, BATCHES), model.parameters())
    assert operator.shape[0] == 5 + 15 + 3 + 6
    product = operator @ torch.ones(operator.shape[0], dtype=torch.float64)
    assert product[:23].abs().min() > 0
    assert torch.equal(product[23:], torch.zeros(6, dtype=torch.float64))
    several = operator @ torch.ones(operator.shape[0], 3, dtype=torch.float64)
    torch.testing.assert_close(several, product.unsqueeze(1).expand(-1, 3))


def test_a_linear_loss_has_no_curvature():
    weight = nn.Parameter(torch.ones(3))

    def source():
        loss = weight.sum()
        yield Evaluation(loss, weight, loss, 1, lambda: loss[None])

    assert torch.equal(Hessian(source, [weight]) @ torch.ones(3), torch.zeros(3))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, EmpiricalFisher])
def test_an_operation_that_is_differentiable_once_is_named_with_a_way_out(kind):
    """Torch itself would silently give a zero matrix."""
    weight = nn.Parameter(torch.ones(3))

    def source():
        outputs = Once.apply(weight)
        loss = outputs.sum()
        yield Evaluation(loss, outputs, loss, 1, lambda: loss[None])

    with pytest.raises(FulguriteError, match="differentiated twice.*OnceBackward.*FiniteDifferenceHessian"):
        kind(source, [weight]) @ torch.ones(3)
    difference = FiniteDifferenceHessian(source, [weight]) @ torch.ones(3)
    torch.testing.assert_close(difference, torch.full((3,), 2.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [Hessian, FiniteDifferenceHessian])
def test_vectors_of_another_size_are_refused(kind):
    model = network()
    operator = kind(model_loss(model, cross_entropy, BATCHES), model.parameters())
    with pytest.raises(ValueError, match=r"Expected vectors of shape \[43\] or \[43, K\], but got \[42\]"):
        operator @ torch.ones(42, dtype=torch.float64)
    with pytest.raises(ValueError, match="there are none"):
        kind(model_loss(model, cross_entropy, BATCHES), [])


def test_an_operator_of_ones_own_needs_nothing_but_its_products():
    class Scaled(Operator):
        def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
            return rows * torch.arange(1.0, 7.0, dtype=torch.float64)

    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    with Scaled([weight]) as operator:
        assert (operator.shape, operator.dtype) == ((6, 6), torch.float64)
        torch.testing.assert_close(operator @ torch.eye(6), torch.arange(1.0, 7.0, dtype=torch.float64).diag())
        assert lanczos(operator, 6).largest()[0] == pytest.approx(6.0)
        assert hutchinson_trace(operator, 2).value == 21.0


# The user's own training step


class Module(pl.LightningModule):
    def __init__(self, loss: str = "cross_entropy", **arguments: object) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
        self.loss, self.arguments = loss, arguments

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        targets = targets if self.loss == "cross_entropy" else F.one_hot(targets, 3).to(inputs.dtype)
        loss = getattr(F, self.loss)(self.network(inputs), targets, **self.arguments)
        self.log("train/loss", loss)
        return loss + 0.05 * self.network[0].weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Measure(pl.Callback):
    """Measures the curvature after every epoch."""

    def __init__(self, kind: type = Hessian) -> None:
        self.kind, self.found = kind, []

    def on_train_epoch_end(self, trainer, pl_module):
        batches = FixedBatches(trainer, "Measure", batch_size=4)  # 4, 4 and 1: their mean must be weighted
        source = step_loss(trainer, pl_module, batches, "Measure")
        with self.kind(source, pl_module.parameters()) as operator:
            self.found.append(operator @ torch.ones(operator.shape[0]))


def fit(module: pl.LightningModule, *callbacks: pl.Callback, accumulate: int = 1) -> pl.LightningModule:
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, DataLoader(TensorDataset(INPUTS.float(), TARGETS), 3, shuffle=True))
    return module


def trained_product(module: Module) -> torch.Tensor:
    """The Hessian of the step's loss, dense, in evaluation mode."""
    module.eval()
    outputs, point = flat_loss(module.network)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs(flat), TARGETS) + 0.05 * flat[:20].square().sum()

    return torch.func.hessian(loss)(point) @ torch.ones(len(point))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_curvature_of_a_training_step_is_that_of_the_whole_loss_and_leaves_no_trace(accumulate):
    """Weight by weight the same training with and without; accumulation does not scale the loss that is measured."""
    measure = Measure()
    measured = fit(Module(), measure, accumulate=accumulate)
    plain = fit(Module(), accumulate=accumulate)
    for ours, theirs in zip(measured.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert measured.training
    torch.testing.assert_close(measure.found[-1], trained_product(measured), rtol=1e-4, atol=1e-5)


def test_gauss_newton_and_fisher_of_a_training_step_are_those_of_its_criterion():
    measure = Measure(GaussNewton)
    module = fit(Module(), measure).eval()
    source = model_loss(module.network, cross_entropy, [(INPUTS.float(), TARGETS)])
    ones = torch.ones(measure.found[-1].shape)
    torch.testing.assert_close(measure.found[-1], GaussNewton(source, module.parameters()) @ ones, rtol=1e-4, atol=1e-6)
    fisher = Measure(EmpiricalFisher)
    module = fit(Module(), fisher).eval()
    source = model_loss(module.network, cross_entropy, [(INPUTS.float(), TARGETS)])
    expected = EmpiricalFisher(source, module.parameters()) @ ones
    torch.testing.assert_close(fisher.found[-1], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        ("cross_entropy", {"label_smoothing": 0.2, "weight": torch.tensor([1.0, 2.0, 0.5])}),
        ("cross_entropy", {"ignore_index": 1}),
        ("cross_entropy", {"reduction": "sum"}),
        ("mse_loss", {}),
        ("binary_cross_entropy_with_logits", {"reduction": "sum"}),
    ],
)
def test_the_losses_of_the_examples_have_the_criterions_mean(loss, arguments):
    class Check(pl.Callback):
        seen = 0

        def on_train_epoch_end(self, trainer, pl_module):
            for evaluation in step_loss(trainer, pl_module, FixedBatches(trainer, "Check", batch_size=9), "Check")():
                torch.testing.assert_close(evaluation.losses().mean(), evaluation.criterion_loss)
                assert evaluation.losses().shape == (evaluation.examples,)
                Check.seen += 1

    fit(Module(loss, **arguments), Check())
    assert Check.seen


# Fixed batches


class Collect(pl.Callback):
    def __init__(self, **options: object) -> None:
        self.options, self.rows = options, []

    def on_train_epoch_end(self, trainer, pl_module):
        batches = FixedBatches(trainer, "Collect", **self.options)
        self.sizes = [len(targets) for _, targets in batches]
        assert len(batches) == len(self.sizes)
        self.rows.append(torch.cat([inputs for inputs, _ in batches]))
        self.indices = batches.indices


def test_fixed_batches_are_the_same_whatever_the_sampler_does():
    collect = Collect(max_samples=7, batch_size=3)
    fit(Module(), collect)
    assert collect.sizes == [3, 3, 1]
    assert torch.equal(collect.rows[0], collect.rows[1])
    assert torch.equal(collect.rows[0], INPUTS.float()[collect.indices])
    assert len(collect.indices.unique()) == 7


def test_fixed_batches_name_what_they_cannot_use():
    class Wrong(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with pytest.raises(RefusedError, match="one val DataLoader, but the trainer has 0"):
                FixedBatches(trainer, "Spectrum", "val")
            with pytest.raises(ValueError, match="'train', 'val' or a DataLoader, but got 'trian'"):
                FixedBatches(trainer, "Spectrum", "trian")
            with pytest.raises(
                ValueError, match="`max_samples` of Spectrum to be a positive number or None, but got 0"
            ):
                FixedBatches(trainer, "Spectrum", max_samples=0)

    fit(Module(), Wrong())


# Lanczos


def symmetric(size: int = 40, clustered: bool = False) -> torch.Tensor:
    torch.manual_seed(4)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    values = torch.linspace(-1, 3, size, dtype=torch.float64)
    if clustered:
        values = 1 + 1e-4 * values
        values[-3:] = 100.0 + torch.tensor([0.0, 1e-7, 1e-6], dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.mT


START = torch.ones(40, dtype=torch.float64)


def test_lanczos_with_all_steps_finds_all_eigenvalues():
    matrix = symmetric()
    found = lanczos(matrix.__matmul__, 40, torch.randn(40, dtype=torch.float64))
    torch.testing.assert_close(found.ritz()[0], torch.linalg.eigvalsh(matrix), rtol=1e-9, atol=1e-9)
    assert found.remainder == 0


def test_the_basis_stays_orthonormal_where_eigenvalues_cluster():
    for steps in (10, 30):
        found = lanczos(symmetric(clustered=True).__matmul__, steps, START)
        gram = found.basis.mT @ found.basis
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-10)
    loose = lanczos(symmetric(clustered=True).__matmul__, 30, START, reorthogonalize=False).basis
    assert (loose.mT @ loose - torch.eye(loose.shape[1])).abs().max() > 1e-6  # what reorthogonalisation is there for


def test_extremes_are_those_of_scipy_and_the_bound_holds():
    matrix = symmetric()
    numpy = LinearOperator((40, 40), matvec=lambda v: matrix.numpy() @ v, dtype="float64")
    largest = eigsh(numpy, 1, which="LA", return_eigenvectors=False)[0]
    smallest = eigsh(numpy, 1, which="SA", return_eigenvectors=False)[0]
    found = lanczos(matrix.__matmul__, 12, START)
    for (value, bound), true in ((found.largest(), largest), (found.smallest(), smallest)):
        assert 0 < abs(value - true) <= bound
    found = lanczos(matrix.__matmul__, 39, START)
    assert found.largest()[0] == pytest.approx(largest, abs=1e-9)
    assert found.smallest()[0] == pytest.approx(smallest, abs=1e-9)


def test_the_quadrature_has_the_moments_of_the_matrix():
    matrix, k = symmetric(), 6
    start = torch.randn(40, dtype=torch.float64)
    values, weights = lanczos(matrix.__matmul__, k, start).ritz()
    unit = start / start.norm()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    for moment in range(2 * k):
        exact = unit @ torch.linalg.matrix_power(matrix, moment) @ unit
        assert (weights * values**moment).sum().item() == pytest.approx(exact.item(), rel=1e-8, abs=1e-8)


def test_a_krylov_space_that_ends_gives_fewer_values():
    found = lanczos(lambda v: 2 * v, 5, START)
    assert found.diagonal.tolist() == pytest.approx([2.0])
    assert found.largest() == (pytest.approx(2.0), 0.0)
    assert lanczos(torch.zeros_like, 5, START).diagonal.tolist() == [0.0]


def test_bad_starts_and_products_are_told():
    with pytest.raises(ValueError, match="`steps` to be positive, but got 0"):
        lanczos(torch.zeros_like, 0, START)
    with pytest.raises(ValueError, match="its norm is 0"):
        lanczos(torch.zeros_like, 1, torch.zeros(4))
    with pytest.raises(ValueError, match="Expected `start`"):
        lanczos(torch.zeros_like, 1)
    with pytest.raises(FloatingPointError, match="Product 1"):
        lanczos(lambda v: v * math.nan, 2, START)


# Probes


def test_probes_are_unbiased_within_their_own_error():
    model = network()
    operator = GaussNewton(model_loss(model, cross_entropy, BATCHES), model.parameters())
    matrix = dense(GaussNewton, model)
    trace = hutchinson_trace(operator, 500)
    assert abs(trace.value - matrix.trace().item()) < 4 * trace.standard_error
    assert 0 < trace.standard_error < 0.2 * trace.value
    norm = hutchinson_frobenius(operator, 500)
    assert abs(norm.value - matrix.norm().item()) < 4 * norm.standard_error
    torch.testing.assert_close(hutchinson_diagonal(operator, 400), matrix.diagonal(), rtol=0.5, atol=0.03)
    assert hutchinson_trace(operator, 3, seed=1) == hutchinson_trace(operator, 3, seed=1)
    assert math.isnan(hutchinson_trace(operator, 1).standard_error)


def test_a_diagonal_matrix_needs_one_probe():
    """Signs squared are 1: the trace of a diagonal matrix is exact."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def source():
        loss = (torch.arange(4) * weight.square()).sum() / 2
        yield Evaluation(loss, weight, loss, 1, lambda: loss[None])

    operator = Hessian(source, [weight])
    assert hutchinson_trace(operator, 1).value == pytest.approx(6)
    assert hutchinson_frobenius(operator, 2).value == pytest.approx(math.sqrt(14))
