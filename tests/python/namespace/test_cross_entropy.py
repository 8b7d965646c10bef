"""Cross entropy against PyTorch's own in fp64: smoothing, scale, z-loss, ignored rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import cross_entropy
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

from .plain import DTYPES, assert_first_order_only, assert_rounded_once

OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"logit_scale": 0.7},
    {"lse_square_scale": 1e-2},
    {"label_smoothing": 0.2, "logit_scale": 1.3, "lse_square_scale": 1e-2, "ignore_index": 3},
]


def problem(rows: int = 33, classes: int = 50, dtype=torch.float64):
    logits = (torch.randn(rows, classes, dtype=torch.float64) * 3.0).to(dtype)
    labels = torch.randint(0, classes, (rows,))
    labels[::7] = -100
    return logits, labels


def expected(logits, labels, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, **ignore):
    """(losses, z_losses) by PyTorch's function, in fp64; differentiable."""
    ignore_index = ignore.get("ignore_index", -100)
    scaled = logits.double() * logit_scale
    losses = F.cross_entropy(
        scaled,
        labels.long(),
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    z_losses = lse_square_scale * torch.logsumexp(scaled, 1).square()
    z_losses = z_losses.masked_fill(labels == ignore_index, 0.0)
    return losses + z_losses, z_losses


def usable(labels: torch.Tensor, options: dict) -> torch.Tensor:
    ignore_index = options.get("ignore_index", -100)
    return torch.where(labels == -100, ignore_index, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [2**24, 130])
def test_losses_and_gradients(dtype, options, chunk, monkeypatch):
    """130 elements at once are two rows, and one row at the end."""
    monkeypatch.setattr(cross_entropy, "_CHUNK", chunk)
    logits, labels = problem(dtype=dtype)
    labels = usable(labels, options)
    logits.requires_grad_()
    losses, z_losses = cross_entropy_loss(logits, labels, **options)
    assert losses.dtype == z_losses.dtype == torch.float32 and not z_losses.requires_grad
    exact = logits.detach().double().requires_grad_()
    exact_losses, exact_z = expected(exact, labels, **options)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(z_losses.double(), exact_z, rtol=1e-6, atol=1e-7)
    ignored = labels == options.get("ignore_index", -100)
    assert ignored.any() and not losses[ignored].any() and not z_losses[ignored].any()

    dlosses = torch.randn_like(losses)
    losses.backward(dlosses)
    exact_losses.backward(dlosses.double())
    assert logits.grad.dtype == dtype
    assert_rounded_once(logits.grad, exact.grad, slack=4e-6)
    assert not logits.grad[ignored].any()


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    logits, labels = problem(4, 7)
    labels = usable(labels, options)
    assert gradcheck(lambda x: cross_entropy_loss(x, labels, **options)[0], logits.requires_grad_())


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_are_of_first_order_only(inplace):
    logits, labels = problem(4, 7)

    def call(x):
        return cross_entropy_loss(x * 1.0, labels, inplace_backward=inplace)[0]

    assert_first_order_only(call, logits.requires_grad_())


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_label_types_and_strides(kind):
    logits, labels = problem(dtype=torch.float32)
    wide = logits.t().contiguous().t()
    losses, _ = cross_entropy_loss(wide, labels.to(kind))
    torch.testing.assert_close(losses, cross_entropy_loss(logits, labels)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_over_the_logits(dtype, inplace):
    leaf, labels = problem(dtype=dtype)
    leaf.requires_grad_()
    logits = leaf * 1.0
    before = logits.detach().clone()
    losses, _ = cross_entropy_loss(logits, labels, inplace_backward=inplace)
    losses.sum().backward()
    assert torch.equal(logits.detach(), leaf.grad if inplace else before)
    other = before.clone().requires_grad_()
    cross_entropy_loss(other, labels)[0].sum().backward()
    assert torch.equal(other.grad, leaf.grad)


def test_rows_that_share_memory_are_not_overwritten():
    logits = torch.randn(1, 5).expand(3, 5).requires_grad_()
    before = logits.detach().clone()
    cross_entropy_loss(logits, torch.tensor([0, 1, 2]), inplace_backward=True)[0].sum().backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_precomputed_lse_is_used(smoothing):
    logits, labels = problem(dtype=torch.float32)
    lse = torch.logsumexp(logits, 1)
    options = {"label_smoothing": smoothing, "lse_square_scale": 0.1}
    losses, z_losses = cross_entropy_loss(logits, labels, lse, **options)
    torch.testing.assert_close(losses, cross_entropy_loss(logits, labels, **options)[0])
    # Twice the lse shows that it is the one that is used; it is no lse of scaled logits.
    doubled = cross_entropy_loss(logits, labels, 2.0 * lse, **options)[1]
    torch.testing.assert_close(doubled, 4.0 * z_losses)
    scaled = {**options, "logit_scale": 0.5}
    torch.testing.assert_close(
        cross_entropy_loss(logits, labels, 2.0 * lse, **scaled),
        cross_entropy_loss(logits, labels, **scaled),
    )


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [3e4, 3e4, 3e4]], requires_grad=True)
    losses, _ = cross_entropy_loss(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(losses, torch.tensor([0.0, math.log(3.0)]), atol=2e-3, rtol=0.0)
    losses.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("label", "is_wrong"), [(-1, True), (5, True), (4, False), (-100, False)])
def test_labels_out_of_range_are_refused(label, is_wrong):
    logits, labels = torch.zeros(2, 5), torch.tensor([0, label])
    if is_wrong and labels.device.type == "cpu":
        with pytest.raises(ValueError, match=rf"labels: must be in \[0, 5\) .* one is {label}"):
            cross_entropy_loss(logits, labels)
        return
    losses, _ = cross_entropy_loss(logits.requires_grad_(), labels)
    losses.sum().backward()
    # Elsewhere than on the CPU such a row has neither loss nor gradient.
    nothing = is_wrong or label == -100
    assert (losses[1] == 0.0) == nothing and logits.grad[1].any() != nothing


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_out_of_range_where_they_are_not_looked_at(smoothing, monkeypatch):
    """As on a GPU: no term of the label, and a gradient that fits the loss."""
    monkeypatch.setattr(cross_entropy, "_check_labels", lambda labels, options: None)
    logits, labels = torch.randn(2, 5, dtype=torch.float64), torch.tensor([-1, 7])
    options = {"label_smoothing": smoothing, "lse_square_scale": 0.1}
    losses, z_losses = cross_entropy_loss(logits, labels, **options)
    lse = torch.logsumexp(logits, 1)
    torch.testing.assert_close(losses, smoothing * (lse - logits.mean(1)) + 0.1 * lse**2)
    torch.testing.assert_close(z_losses, 0.1 * lse**2)
    logits.requires_grad_()
    assert gradcheck(lambda x: cross_entropy_loss(x, labels, **options)[0], logits)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"logits: must have shape \[batch, classes\]"):
        cross_entropy_loss(torch.zeros(2, 3, 4), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"labels: must have shape \[2\], has \[3\]"):
        cross_entropy_loss(torch.zeros(2, 4), torch.zeros(3).long())
    with pytest.raises(ValueError, match="precomputed_lse"):
        cross_entropy_loss(torch.zeros(2, 4), torch.zeros(2).long(), torch.zeros(3))


def test_wrong_dtypes_are_refused():
    logits, labels = torch.zeros(2, 4), torch.zeros(2).long()
    for kind in (torch.float32, torch.bool, torch.int16):
        with pytest.raises(ValueError, match=f"labels: must be int32 or int64, is {kind}"):
            cross_entropy_loss(logits, labels.to(kind))
    with pytest.raises(ValueError, match="logits: must be of a floating dtype, is"):
        cross_entropy_loss(logits.long(), labels)
    with pytest.raises(ValueError, match="precomputed_lse: must be of a floating dtype, is"):
        cross_entropy_loss(logits, labels, labels)


def test_no_rows():
    logits = torch.zeros(0, 4, requires_grad=True)
    losses, z_losses = cross_entropy_loss(logits, torch.zeros(0).long())
    losses.sum().backward()
    assert losses.shape == z_losses.shape == (0,) and logits.grad.shape == (0, 4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
def test_module(reduction, options):
    logits, labels = problem(dtype=torch.float32)
    labels = usable(labels, options)
    module = CrossEntropyLoss(reduction=reduction, return_z_loss=True, **options)
    loss, z_loss = module(logits, labels)
    count = (labels != options.get("ignore_index", -100)).sum()
    for actual, exact in zip((loss, z_loss), expected(logits, labels, **options)):
        exact = {"mean": exact.sum() / count, "sum": exact.sum(), "none": exact}[reduction]
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=2e-6)
    alone = CrossEntropyLoss(reduction=reduction, **options)(logits, labels)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, loss)


def test_module_of_ignored_rows_and_of_another_reduction():
    loss = CrossEntropyLoss()(torch.zeros(2, 3), torch.full((2,), -100))
    assert loss.isnan()
    with pytest.raises(NotImplementedError, match="reduction"):
        CrossEntropyLoss(reduction="median")
    module = CrossEntropyLoss(inplace_backward=True)
    logits = torch.randn(2, 3, requires_grad=True)
    module(
        logits * 1.0, torch.tensor([0, 2]), precomputed_lse=torch.logsumexp(logits, 1)
    ).backward()
    exact = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0, 2])), logits)[0]
    torch.testing.assert_close(logits.grad, exact)


def test_as_verl_uses_it():
    """Log-probabilities of labels, from a pair."""
    logits, labels = torch.randn(2, 6, 11, requires_grad=True), torch.randint(0, 11, (2, 6))
    output = cross_entropy_loss(logits.reshape(-1, 11), labels.reshape(-1), inplace_backward=False)
    assert isinstance(output, tuple)
    exact = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(-output[0].view(2, 6), exact)


def test_as_axolotl_uses_it():
    """A loss over shifted labels, with inplace_backward, on a model's last layer."""
    head = torch.nn.Linear(8, 20)
    hidden, labels = torch.randn(15, 8), torch.randint(0, 20, (15,))
    labels[3] = -100
    CrossEntropyLoss(inplace_backward=True)(head(hidden), labels).backward()
    gradient = head.weight.grad.clone()
    head.zero_grad()
    F.cross_entropy(head(hidden), labels).backward()
    torch.testing.assert_close(gradient, head.weight.grad)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(options, dtype):
    logits, labels = problem(dtype=dtype)
    labels = usable(labels, options)
    gradients = []
    for default in (dtype, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            x = logits.clone().requires_grad_()
            cross_entropy_loss(x, labels, **options)[0].sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        gradients.append(x.grad)
    assert torch.equal(*gradients)
