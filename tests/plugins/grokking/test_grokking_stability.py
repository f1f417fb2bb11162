# SPDX-License-Identifier: Apache-2.0
"""Grokking at the edge of numerical stability: its equations against closed forms and slow oracles."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from fulgurite.errors import FulguriteError, RefusedError
from fulgurite_plugins.grokking.grokking_stability import (
    ModularMLP,
    NLMAlignment,
    SoftmaxCollapse,
    StableMaxCrossEntropy,
    ZeroLossFraction,
    log_stablemax,
    nlm_alignment,
    perp_grad_,
    softmax_collapse_fraction,
    stable_logits,
    stablemax,
    stablemax_cross_entropy,
    zero_loss_fraction,
)
from fulgurite_plugins.grokking.grokking_stability.collapse import collapsed, has_zero_loss
from fulgurite_plugins.grokking.grokking_stability.projection import summed_products

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def s(x: Tensor) -> Tensor:
    """The paper's replacement of the exponential, entry by entry."""
    return torch.tensor([v + 1 if v >= 0 else 1 / (1 - v) for v in x.flatten().tolist()], dtype=x.dtype).view_as(x)


# StableMax


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_stablemax_is_s_over_its_sum_and_the_softmax_of_signed_log1p(dtype, tolerance):
    z = random(50, 7, scale=5, dtype=dtype)
    expected = s(z.double()) / s(z.double()).sum(1, keepdim=True)
    torch.testing.assert_close(stablemax(z).double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(stablemax(z).sum(1), torch.ones(50, dtype=dtype), rtol=0, atol=tolerance)
    by_definition = torch.log_softmax(z.sign() * z.abs().log1p(), dim=-1)
    torch.testing.assert_close(log_stablemax(z), by_definition, rtol=0, atol=tolerance)
    assert torch.equal(stable_logits(z).argmax(1), z.argmax(1))
    torch.testing.assert_close(stablemax(z.T, dim=0), stablemax(z).T)
    torch.testing.assert_close(stablemax(z, alpha=2.5), stablemax(2.5 * z))


def test_gradient_at_zero_is_one_over_c_minus_the_label_exactly():
    z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    stablemax_cross_entropy(z, torch.tensor([2])).backward()
    assert z.grad.tolist() == [[0.25, 0.25, -0.75, 0.25]]


def test_gradients_at_the_delicate_places():
    special = torch.tensor([[0.0, 1.0, -1.0, 1e4], [-1e4, 0.0, 0.5, -0.5], [1.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    z = special.requires_grad_()
    target = torch.tensor([0, 1, 2])

    def loss(logits: Tensor) -> Tensor:
        return stablemax_cross_entropy(logits, target)

    assert torch.autograd.gradcheck(loss, z)  # at 0 the two one-sided derivatives are both 1
    p = (s(z.detach()) / s(z.detach()).sum(1, keepdim=True)).detach()
    slope = 1 / (1 + z.detach().abs())
    loss(z).backward()
    torch.testing.assert_close(z.grad, slope * (p - F.one_hot(target, 4)) / 3, rtol=1e-10, atol=1e-16)
    smooth = random(3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(loss, smooth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_no_nan_at_the_places_where_other_spellings_have_them(dtype, compute):
    z = torch.tensor([[0.0, 1.0, -1.0, 65504.0]], dtype=dtype).requires_grad_()
    for label in range(4):
        z.grad = None
        loss = stablemax_cross_entropy(z, torch.tensor([label]), compute_dtype=compute)
        loss.backward()
        assert loss.isfinite()
        assert z.grad.isfinite().all()
        assert z.grad[0, label] != 0 or label == 3  # of the label itself; nearly all of the mass is on the last


def test_forward_and_vectorised_derivatives():
    z = random(4, 3)
    jacobian = torch.func.jacfwd(stable_logits)(z)
    torch.testing.assert_close(jacobian, torch.func.jacrev(stable_logits)(z))
    gradients = torch.func.vmap(torch.func.grad(lambda row: stable_logits(row).square().sum()))(z)
    torch.testing.assert_close(gradients, 2 * stable_logits(z) / (1 + z.abs()))


def composed(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """The loss of class indices as that of soft targets is computed, with the softmax of signed logarithms."""
    return F.cross_entropy(stable_logits(z), y, reduction=reduction)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6, 1e10])
def test_losses_and_gradients_of_well_fitted_examples_keep_their_digits(dtype, tolerance, size):
    """Against exact rational arithmetic; the softmax of signed logarithms loses all of them in float32 at 1e6."""
    z = (-size * (0.5 + random(6, 9).sigmoid() / 2)).to(dtype)
    y = torch.arange(6)
    z[y, y] *= -1
    z.requires_grad_()
    losses = stablemax_cross_entropy(z, y, reduction="none", compute_dtype=dtype)
    losses.sum().backward()
    for row, label, loss, gradient in zip(z.tolist(), y.tolist(), losses.tolist(), z.grad.tolist(), strict=True):
        exact = [Fraction(v) for v in row]
        scores = [v + 1 if v >= 0 else 1 / (1 - v) for v in exact]
        others = sum(scores) - scores[label]
        assert loss == pytest.approx(math.log1p(others / scores[label]), rel=tolerance, abs=0)
        slopes = [1 if v >= 0 else 1 / (1 - v) ** 2 for v in exact]
        expected = [slope / sum(scores) for slope in slopes]
        expected[label] = -others / sum(scores) / (1 + exact[label])
        assert gradient == pytest.approx([float(v) for v in expected], rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("size", "dtype", "least", "most"),
    [
        (1e4, torch.float32, 0.1, 1.0),
        (1e6, torch.float32, 1.0, 1.0),
        (1e4, torch.float64, 1e-11, 1e-8),
        (1e6, torch.float64, 1e-7, 1e-3),
    ],
)
def test_a_softmax_of_signed_logarithms_loses_the_digits_that_the_card_says(size, dtype, least, most):
    z = torch.full((1, 9), -size, dtype=dtype)
    z[0, 0] = size
    others = 8 / Fraction(int(size) + 1)
    exact = math.log1p(others / (int(size) + 1))
    error = abs(float(composed(z, torch.tensor([0]))) / exact - 1)
    assert least <= error <= most


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 2, 3), (4,), (5, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_derivatives_of_the_loss(shape, reduction):
    z = random(*shape, scale=2).requires_grad_()
    sizes = () if len(shape) == 1 else (shape[0], *shape[2:])
    y = torch.arange(math.prod(sizes)).view(sizes) % shape[min(len(shape) - 1, 1)]
    if sizes:
        y.view(-1)[1] = -100

    def ours(z: Tensor) -> Tensor:
        return stablemax_cross_entropy(z, y, reduction=reduction)

    assert torch.autograd.gradcheck(ours, z, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, z)
    vector = random(*shape, seed=1)
    products = []
    for loss in (ours, lambda z: composed(z, y, reduction)):
        at_zero = torch.zeros_like(z).requires_grad_()  # as in networks that begin with a zero last layer
        (gradient,) = torch.autograd.grad(loss(at_zero).sum(), at_zero, create_graph=True)
        products.append(torch.autograd.grad((gradient * vector).sum(), at_zero)[0])
    torch.testing.assert_close(*products, rtol=1e-12, atol=1e-14)


def test_transforms_of_the_loss():
    z, y = random(3, 5, 4, scale=2), torch.arange(15).view(3, 5) % 4
    for reduction in ("mean", "none"):
        expected = torch.stack([composed(*pair, reduction) for pair in zip(z, y, strict=True)])

        def ours(z: Tensor, y: Tensor, reduction: str = reduction) -> Tensor:
            return stablemax_cross_entropy(z, y, reduction=reduction)

        torch.testing.assert_close(torch.func.vmap(ours)(z, y), expected)
        torch.testing.assert_close(torch.func.vmap(ours, (1, None))(z.transpose(0, 1), y[0])[0], expected[0])
        torch.testing.assert_close(torch.func.vmap(ours, (None, 0))(z[0], y)[0], expected[0])
    single = torch.func.vmap(torch.func.grad(stablemax_cross_entropy))(z.flatten(0, 1), y.flatten())
    torch.testing.assert_close(single, torch.func.grad(lambda z: composed(z, y.flatten(), "sum"))(z.flatten(0, 1)))
    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    expected = jacrev(jacrev(composed))(z[0], y[0])
    for outer, inner in ((jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacrev)):  # torch differentiates no `jvp` forward
        torch.testing.assert_close(outer(inner(stablemax_cross_entropy))(z[0], y[0]), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z[0].requires_grad_(), torch.ones_like(z[0]))
        (gradient,) = torch.autograd.grad(stablemax_cross_entropy(dual, y[0]), dual)
        tangent = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(tangent, expected.sum((2, 3)))


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_the_largest_logits_have_finite_losses_and_infinite_ones_do_not(compute):
    largest = torch.finfo(getattr(torch, compute)).max
    dtype = getattr(torch, compute)
    for values in ([largest] * 5, [-largest] * 5, [largest, -largest, 0.0, 1.0, -1.0], [1e30, -1e30, 1e20, 3.0, 1e30]):
        z = torch.tensor(values, dtype=dtype).expand(5, 5).clone().requires_grad_()
        losses = stablemax_cross_entropy(z, torch.arange(5), reduction="none", compute_dtype=compute)
        losses.sum().backward()
        assert z.grad.isfinite().all()
        torch.testing.assert_close(losses, composed(z, torch.arange(5), "none"), rtol=1e-5, atol=1e-5)
    for place in (0, 1):
        for infinite in (torch.inf, torch.nan):
            z = torch.zeros(2, 3, dtype=dtype).index_fill(1, torch.tensor(place), infinite).requires_grad_()
            losses = stablemax_cross_entropy(z, torch.tensor([0, 1]), reduction="none", compute_dtype=compute)
            losses.sum().backward()
            assert losses.isnan().all()
            assert z.grad.isnan().any(1).all()
    z = torch.tensor([[-torch.inf, 0.0, 2.0]], dtype=dtype).requires_grad_()
    for label, expected in ((0, math.inf), (1, math.log(4)), (2, math.log(4 / 3))):
        loss = stablemax_cross_entropy(z, torch.tensor([label]), compute_dtype=compute)
        assert float(loss.detach()) == pytest.approx(expected)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("bad", [-1, 3])
def test_indices_of_no_class_are_refused_and_all_ignored_have_no_mean(bad):
    with pytest.raises(IndexError, match="out of bounds"):
        stablemax_cross_entropy(torch.zeros(2, 3), torch.tensor([0, bad]))
    assert stablemax_cross_entropy(torch.zeros(2, 3), torch.tensor([-100, -100])).isnan()
    assert stablemax_cross_entropy(torch.zeros(2, 3), torch.tensor([-100, -100]), reduction="sum") == 0
    kept = stablemax_cross_entropy(torch.zeros(2, 3), torch.tensor([1, 2]), ignore_index=1)
    assert float(kept) == pytest.approx(math.log(3), rel=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities", "dense"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_arguments_mean_what_they_mean_in_cross_entropy(reduction, smoothing, weighted, kind, chunk):
    shape = (10, 5, 2) if kind == "dense" else (10, 5)
    z = random(*shape, scale=4).requires_grad_()
    targets = torch.arange(20).view(10, 2) % 5 if kind == "dense" else torch.arange(10) % 5
    if kind == "ignored":
        targets = targets.masked_fill(torch.arange(10) % 3 == 0, -7)
    if kind == "probabilities":
        targets = random(10, 5, seed=1).softmax(1)
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1], dtype=torch.float64) if weighted else None
    options = {"weight": weight, "reduction": reduction, "ignore_index": -7, "label_smoothing": smoothing}
    ours = stablemax_cross_entropy(z, targets, chunk_rows=chunk, **options)
    theirs = F.cross_entropy(z.sign() * z.abs().log1p(), targets, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.ones_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, z, upstream), torch.autograd.grad(theirs, z, upstream))
    module = StableMaxCrossEntropy(chunk_rows=chunk, **options)
    assert torch.equal(module(z, targets), ours)


def test_unbatched_logits_and_probabilities_of_the_module():
    z = torch.tensor([3.0, 0.0])
    assert float(stablemax_cross_entropy(z, torch.tensor(0))) == pytest.approx(math.log(5 / 4))
    torch.testing.assert_close(StableMaxCrossEntropy(alpha=2.0).predict_proba(z), stablemax(2 * z))


def test_chunks_keep_no_logits_in_float64():
    """What the graph saves for a backward pass is the input, and not the intermediate results in float64."""

    def saved_bytes(chunk: int | None) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        z = random(64, 50, dtype=torch.float32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = stablemax_cross_entropy(z, torch.arange(64) % 50, chunk_rows=chunk)
        loss.backward()
        return sum(kept.values())

    assert saved_bytes(None) >= 64 * 50 * 8
    assert saved_bytes(8) <= 64 * 50 * 4 + 64 * 8 * 4


def test_binary_form_is_that_of_two_logits():
    """The StableMax of (z, 0) is the sigmoid of the signed logarithm of z."""
    z = random(20, scale=3)
    both = stablemax(torch.stack([z, torch.zeros_like(z)], dim=1))[:, 0]
    torch.testing.assert_close(both, stable_logits(z).sigmoid(), rtol=0, atol=1e-12)
    torch.testing.assert_close(both, s(z) / (s(z) + 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2).long()), ValueError, "floating-point numbers"),
        ((torch.zeros(2, 3), torch.zeros(2)), ValueError, "class indices are whole numbers"),
        ((torch.zeros(2, 3), torch.zeros(3).long()), ValueError, r"of shape \[2\]"),
        ((torch.zeros(2, 3), torch.tensor([0, 3])), IndexError, "out of bounds"),
    ],
)
def test_bad_calls_of_the_loss(arguments, error, message):
    with pytest.raises(error, match=message):
        stablemax_cross_entropy(*arguments)


def test_bad_arguments_of_the_loss_and_logits_that_are_not_finite():
    z = torch.zeros(4, 3)
    for bad, message in (
        ({"alpha": 0.0}, "`alpha`"),
        ({"reduction": "total"}, "`reduction`"),
        ({"compute_dtype": "int8"}, "`compute_dtype`"),
        ({"label_smoothing": 1.5}, "`label_smoothing`"),
    ):
        with pytest.raises(ValueError, match=message):
            StableMaxCrossEntropy(**bad)
    with pytest.raises(ValueError, match="`chunk_rows`"):
        stablemax_cross_entropy(z, torch.zeros(4).long(), chunk_rows=0)
    z[2, 1] = torch.inf
    with pytest.raises(FulguriteError, match="1 of 4 examples of the batch .* first example 2"):
        stablemax_cross_entropy(z, torch.zeros(4).long(), check_finite=True)
    assert stablemax_cross_entropy(z, torch.zeros(4).long()).isnan()


# Softmax Collapse


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24), ("float64", 53)])
def test_softmax_collapses_where_the_other_class_is_absorbed(dtype, bits):
    edge = bits * math.log(2)
    gaps = torch.tensor([0.9 * edge, edge - 0.2, edge + 0.2, 1.2 * edge], dtype=torch.float64)
    logits = torch.stack([gaps, torch.zeros_like(gaps)], dim=1)
    if dtype != "bfloat16":  # in which the gaps are not apart
        assert collapsed(logits, dtype).tolist() == [False, False, True, True]
    assert collapsed(logits, dtype)[0] == False  # noqa: E712
    assert collapsed(logits, dtype)[3] == True  # noqa: E712
    assert float(softmax_collapse_fraction(logits[[0, 3]], dtype)) == 0.5


def test_collapse_in_float32_is_what_torch_computes():
    """For two classes there is one way to add, so that torch's own arithmetic is the oracle."""
    gaps = torch.linspace(14, 19, 200)
    logits = torch.stack([torch.zeros_like(gaps), gaps], dim=1)
    torch_says = (logits - logits.amax(1, keepdim=True)).exp().sum(1) == 1
    assert torch.equal(collapsed(logits, "float32"), torch_says)
    losses = F.cross_entropy(logits, torch.ones(200).long(), reduction="none")
    assert torch.equal(has_zero_loss(logits, torch.ones(200).long(), "float32"), losses == 0)
    assert not has_zero_loss(logits, torch.zeros(200).long(), "float32").any()


def test_examples_without_a_gradient_have_collapsed():
    """Near the edge, with many classes: the sum in the precision finds all but a few of torch's zero gradients."""
    logits = random(2000, 29, scale=2, dtype=torch.float32)
    logits[:, 0] = logits[:, 1:].logsumexp(1) + 24 * math.log(2) + torch.linspace(-2, 3, 2000)
    logits.requires_grad_()
    F.cross_entropy(logits, torch.zeros(2000).long()).backward()
    zero = logits.grad[:, 0] == 0
    found = collapsed(logits, "float32")
    assert 200 < int(zero.sum()) < 1800
    assert 0 < int((zero & ~found).sum()) < 20
    assert torch.equal(collapsed(logits.T, "float32", dim=0), found)


def test_ties_and_nan_do_not_collapse():
    assert not collapsed(torch.tensor([[50.0, 50.0]]), "float16").any()
    assert not collapsed(torch.tensor([[torch.nan, 1.0]]), "float32").any()
    assert not collapsed(torch.full((3, 2), 0.0), "float64").any()


def test_zero_losses_are_fewer_in_higher_precision_and_only_of_right_predictions():
    logits, targets = random(500, 10, scale=15), torch.arange(500) % 10
    fractions = [float(zero_loss_fraction(logits, targets, d)) for d in ("float64", "float32", "float16", "bfloat16")]
    assert fractions == sorted(fractions)
    assert 0 < fractions[1] < fractions[2]
    right = logits.argmax(1) == targets
    assert not (has_zero_loss(logits, targets, "float16") & ~right).any()
    assert torch.equal(has_zero_loss(logits, targets, "float16") & right, collapsed(logits, "float16") & right)
    assert not has_zero_loss(logits, torch.full((500,), -100), "float16").any()


def test_gradient_of_a_collapsed_example_is_zero():
    logits = torch.tensor([[17.0, 0.0], [16.0, 0.0]], requires_grad=True)
    F.cross_entropy(logits, torch.tensor([0, 0])).backward()
    assert logits.grad[0, 0] == 0
    assert logits.grad[1, 0] != 0
    logits.grad = None
    stablemax_cross_entropy(logits, torch.tensor([0, 0]), compute_dtype="float32").backward()
    assert (logits.grad[:, 0] < -1e-3).all()


def test_metrics_add_up_over_batches_and_dense_predictions():
    logits, targets = random(60, 5, 3, scale=12), torch.arange(180).view(60, 3) % 5
    for metric, function in (
        (SoftmaxCollapse("float16"), lambda z, y: softmax_collapse_fraction(z, "float16", dim=1)),
        (ZeroLossFraction("float16"), lambda z, y: zero_loss_fraction(z, y, "float16")),
    ):
        metric.update(logits[:7], targets[:7])
        metric.update(logits[7:], targets[7:])
        assert float(metric.compute()) == pytest.approx(float(function(logits, targets)))
    with pytest.raises(ValueError, match="`dtype` of SoftmaxCollapse"):
        SoftmaxCollapse("int8")


# Naive loss minimisation


def test_alignment_is_the_cosine_of_all_tensors_together():
    w, g = [random(3, 4), random(5, seed=1)], [random(3, 4, seed=2), random(5, seed=3)]
    flat_w, flat_g = (torch.cat([t.flatten() for t in tensors]) for tensors in (w, g))
    expected = F.cosine_similarity(-flat_g, flat_w, dim=0)
    torch.testing.assert_close(nlm_alignment(w, g), expected)
    metric = NLMAlignment()
    for pair in zip(w, g, strict=True):
        metric.update(*pair)
    torch.testing.assert_close(metric.compute().double(), expected, rtol=1e-6, atol=1e-7)
    assert nlm_alignment([torch.zeros(2)], [torch.ones(2)]).isnan()
    assert nlm_alignment([torch.tensor([1.0 + 2.0j])], [torch.tensor([-3.0 - 6.0j])]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="of shape"):
        nlm_alignment([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="zip"):
        nlm_alignment(w, g[:1])


def test_a_network_without_biases_is_homogeneous_of_the_order_of_its_layers():
    """theta . grad f = L f, and f(2 theta) = 2^L f(theta)."""
    torch.manual_seed(0)
    model = ModularMLP((6,), 4, (8, 7), alpha=3.0).double()
    x = random(1, 6)
    output = model(x)[0, 2]
    gradients = torch.autograd.grad(output, list(model.parameters()))
    product = sum((p * g).sum() for p, g in zip(model.parameters(), gradients, strict=True))
    torch.testing.assert_close(product, 3 * output, rtol=1e-6, atol=1e-12)
    before = model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    torch.testing.assert_close(model(x), 8 * before)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


def test_alignment_is_positive_when_all_is_classified_and_scaling_helps():
    torch.manual_seed(0)
    model = ModularMLP((6,), 4, (8,)).double()
    x = random(10, 6)
    targets = model(x).argmax(1)  # every example is right, so that larger logits lower the loss
    gradients = torch.autograd.grad(F.cross_entropy(model(x), targets), list(model.parameters()))
    assert nlm_alignment(model.parameters(), gradients) > 0
    wrong = model(x).argmin(1)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), wrong), list(model.parameters()))
    assert nlm_alignment(model.parameters(), gradients) < 0


def test_bad_arguments_of_the_perceptron():
    with pytest.raises(ValueError, match="`hidden` of ModularMLP"):
        ModularMLP((6,), 4, (0,))
    with pytest.raises(ValueError, match="`alpha` of ModularMLP"):
        ModularMLP((6,), 4, alpha=-1.0)


# Perpendicular gradients


def with_gradients(shapes, dtype=torch.float64, seed=0):
    parameters = [nn.Parameter(random(*shape, seed=seed + 2 * i).to(dtype)) for i, shape in enumerate(shapes)]
    for i, parameter in enumerate(parameters):
        parameter.grad = random(*parameter.shape, seed=seed + 2 * i + 1).to(dtype)
    return parameters


def by_hand(w: Tensor, g: Tensor, rescale: bool = True) -> Tensor:
    """The equations, for one vector in float64."""
    w, g = w.detach().double(), g.double()
    projected = g - (w * g).sum() / (w * w).sum() * w
    return projected * g.norm() / projected.norm() if rescale else projected


SHAPES = ((30, 20), (20,), (4, 3, 2, 2), (7, 1), (2,))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_projection_of_each_tensor_is_that_of_the_equations(rescale, dtype, tolerance):
    parameters = with_gradients(SHAPES, dtype)
    before = [p.grad.clone() for p in parameters]
    assert int(perp_grad_(parameters, rescale=rescale)) == 0
    for p, g in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.grad.double(), by_hand(p, g, rescale), rtol=tolerance, atol=tolerance)
        assert float((p * p.grad).sum().abs()) <= 1e-5 * float(p.norm() * g.norm())
        if rescale:
            assert abs(float(p.grad.norm() / g.norm()) - 1) <= 1e-5
    once = [p.grad.clone() for p in parameters]
    perp_grad_(parameters, rescale=rescale)
    for p, g in zip(parameters, once, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=tolerance)


def test_projection_of_rows():
    parameters = with_gradients(SHAPES)
    before = [p.grad.clone() for p in parameters]
    perp_grad_(parameters, scope="row")
    for p, g in zip(parameters, before, strict=True):
        if p.ndim == 1 or p[0].numel() == 1:  # rows of one entry: the tensor is one unit
            torch.testing.assert_close(p.grad, by_hand(p, g), rtol=1e-12, atol=1e-12)
        else:
            for w, row, got in zip(p, g, p.grad, strict=True):
                torch.testing.assert_close(got, by_hand(w, row), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_projection_of_all_parameters_as_one_vector(dtype):
    parameters = [*with_gradients(SHAPES), *with_gradients(((3, 3), (1,)), dtype, seed=50)]
    flat_w, flat_g = (
        torch.cat([t.detach().double().flatten() for t in tensors])
        for tensors in (parameters, [p.grad for p in parameters])
    )
    perp_grad_(parameters, scope="global")
    got = torch.cat([p.grad.double().flatten() for p in parameters])
    torch.testing.assert_close(got, by_hand(flat_w, flat_g), rtol=0, atol=1e-6 if dtype is torch.float32 else 1e-12)


@pytest.mark.parametrize("part", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_parallel_gradients_are_still_perpendicular_afterwards(part):
    """Once is not enough: what rounding leaves along the weights would be lengthened with the rest."""
    (p,) = with_gradients([(1000,)], torch.float32)
    p.grad = p.detach() + part * p.grad
    before = p.grad.clone()
    perp_grad_([p])
    assert float((p.double() * p.grad.double()).sum().abs()) <= 1e-6 * float(p.norm() * before.norm())
    assert float(p.grad.norm() / before.norm()) == pytest.approx(1, abs=1e-5)


def test_large_tensors_nearly_parallel_to_their_gradients_are_perpendicular_too():
    """A sum of a million squares in float32, one after the other, is wrong by more than what is left along the weights."""
    (p,) = with_gradients([(2**20,)], torch.float32)
    p.grad = p.detach() + 1e-5 * p.grad
    before = p.grad.clone()
    perp_grad_([p])
    assert float((p.double() @ p.grad.double()).abs()) <= 1e-6 * float(p.norm() * before.norm())
    assert float(p.grad.double().norm() / before.double().norm()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_a_gradient_parallel_to_the_weights_becomes_zero_and_not_noise(dtype, scope):
    parameters = with_gradients(((20, 30), (5,)), dtype)
    for p in parameters:
        p.grad = p.detach() * -4
    counted = perp_grad_(parameters, scope=scope)
    assert all((p.grad == 0).all() for p in parameters)
    assert int(counted) == {"tensor": 2, "row": 21, "global": 1}[scope]


def test_scalars_are_left_alone_unless_asked():
    (p,) = with_gradients([(1,)])
    before = p.grad.clone()
    assert int(perp_grad_([p])) == 0
    assert torch.equal(p.grad, before)
    assert int(perp_grad_([p], skip_scalars=False)) == 1
    assert (p.grad == 0).all()


def test_zero_weights_zero_gradients_and_missing_ones():
    zero, still, missing, usual = with_gradients([(3, 3)] * 4)
    zero.data.zero_()
    still.grad.zero_()
    missing.grad = None
    expected, kept = by_hand(usual, usual.grad), zero.grad.clone()
    assert int(perp_grad_([zero, still, missing, usual, usual])) == 0
    assert torch.equal(zero.grad, kept)
    assert (still.grad == 0).all()
    assert missing.grad is None
    torch.testing.assert_close(usual.grad, expected)
    assert int(perp_grad_([])) == 0


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_gradients_that_are_not_finite_are_left_as_they_are(bad):
    first, second = with_gradients([(4, 4)] * 2)
    first.grad[1, 2] = bad
    before, expected = first.grad.clone(), by_hand(second, second.grad)
    perp_grad_([first, second])
    torch.testing.assert_close(first.grad, before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(second.grad, expected)


def test_tiny_gradients_in_float32_are_not_lost():
    """Their squares are below the smallest float32; late in grokking they are so small."""
    (p,) = with_gradients([(50, 50)], torch.float32)
    p.grad *= 1e-28
    before = p.grad.double()
    perp_grad_([p])
    torch.testing.assert_close(p.grad.double() * 1e28, by_hand(p, before) * 1e28, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    parameters = with_gradients(((40, 40), (9,)), dtype)
    before = [p.grad.clone() for p in parameters]
    perp_grad_(parameters)
    for p, g in zip(parameters, before, strict=True):
        assert p.grad.dtype is dtype
        torch.testing.assert_close(p.grad, by_hand(p, g).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_complex_weights_are_pairs_of_real_numbers():
    w, g = (torch.view_as_complex(random(5, 4, 2, seed=i)) for i in (0, 1))
    p = nn.Parameter(w)
    p.grad = g.clone()
    expected = by_hand(torch.view_as_real(w), torch.view_as_real(g))
    perp_grad_([p])
    torch.testing.assert_close(torch.view_as_real(p.grad), expected, rtol=1e-12, atol=1e-12)


def test_layouts_in_memory_do_not_matter():
    w, g = random(4, 3, 5, 5), random(4, 3, 5, 5, seed=1)
    for scope in ("tensor", "row"):
        plain, strided = nn.Parameter(w.clone()), nn.Parameter(w.contiguous(memory_format=torch.channels_last))
        plain.grad, strided.grad = g.clone(), torch.stack([g, g], -1)[..., 0].to(memory_format=torch.channels_last)
        perp_grad_([plain], scope=scope)
        perp_grad_([strided], scope=scope)
        torch.testing.assert_close(plain.grad, strided.grad, rtol=1e-12, atol=1e-14)


def test_many_tensors_in_parts_are_each_done_once(monkeypatch):
    monkeypatch.setattr("fulgurite_plugins.grokking.grokking_stability.projection._CACHED", 50)
    parameters = with_gradients([(5, n) for n in range(2, 25)], torch.float32)
    before = [p.grad.clone() for p in parameters]
    perp_grad_(parameters)
    for p, g in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.grad.double(), by_hand(p, g), rtol=1e-5, atol=1e-5)


def test_sums_of_products_by_norms_are_inner_products():
    """The way of accelerators: a sum of a list of tensors from two norms of it."""
    left, right = [random(30, 4), random(7, seed=1)], [random(30, 4, seed=2), random(7, seed=3)]
    expected = torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)])
    torch.testing.assert_close(summed_products(left, right), expected, rtol=1e-12, atol=1e-12)


def test_sparse_gradients_are_refused_with_advice():
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RefusedError, match="Use `sparse=False` in the embedding"):
        perp_grad_(embedding.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"scope": "column"}, "`scope` of PerpGrad .* 'tensor', 'row', 'global'"), ({"eps": -1.0}, "`eps` of PerpGrad")],
)
def test_bad_arguments_of_the_projection(arguments, message):
    with pytest.raises(ValueError, match=message):
        perp_grad_([], **arguments)


def test_gradient_descent_on_a_homogeneous_network_keeps_the_norm():
    """With one projection over all weights, |theta|^2 grows by exactly the squared length of each step."""
    torch.manual_seed(0)
    model = ModularMLP((6,), 4, (16, 16)).double()
    x, y = random(20, 6), torch.arange(20) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        perp_grad_(model.parameters(), scope="global")
        norm = sum(float(p.detach().square().sum()) for p in model.parameters())
        step = 0.05**2 * sum(float(p.grad.square().sum()) for p in model.parameters())
        optimizer.step()
        after = sum(float(p.detach().square().sum()) for p in model.parameters())
        assert after - norm == pytest.approx(step, rel=1e-6)
