from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.parts import cross_entropy
from trainer.parts.cross_entropy import IGNORED, linear_cross_entropy, summed_cross_entropy


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 12),
    classes=st.integers(2, 40),
    ignored=st.floats(0, 1),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 99),
)
def test_agrees_with_pytorch_in_double_precision(
    rows: int, classes: int, ignored: float, smoothing: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (10 * torch.randn(rows, classes, generator=generator)).requires_grad_()
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED
    exact = logits.detach().double().requires_grad_()
    expected = 3 * F.cross_entropy(exact, labels, reduction="sum", label_smoothing=smoothing)
    expected.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CPU_CHUNK_VALUES", 3 * classes)  # several chunks, the last one shorter
        loss = summed_cross_entropy(logits, labels, smoothing)
        (3 * loss).backward()
    assert loss.dtype == torch.float32
    assert 3 * loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)
    torch.testing.assert_close(logits.grad, exact.grad.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(smoothing: float) -> None:
    logits = torch.randn(4, 7)
    logits[1], logits[3, 2] = float("nan"), float("inf")
    logits.requires_grad_()
    loss = summed_cross_entropy(logits, torch.tensor([2, IGNORED, 5, IGNORED]), smoothing)
    loss.backward()
    valid = F.cross_entropy(logits[[0, 2]], torch.tensor([2, 5]), reduction="sum", label_smoothing=smoothing)
    assert loss.item() == pytest.approx(float(valid))
    assert torch.equal(logits.grad[[1, 3]], torch.zeros(2, 7))
    assert (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_rows_count_by_their_weight(smoothing: float) -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, weights = torch.tensor([2, IGNORED, 5, 0, 0]), torch.tensor([0.5, 9.0, 2.0, 0.0, 1.0])
    exact = logits.detach().double().requires_grad_()
    each = F.cross_entropy(exact, labels, reduction="none", label_smoothing=smoothing)
    (each * weights.double()).sum().backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CPU_CHUNK_VALUES", 2 * 7)
        loss = summed_cross_entropy(logits, labels, smoothing, weights)
        loss.backward()
    assert loss.item() == pytest.approx(float((each * weights.double()).sum()), rel=1e-6)
    torch.testing.assert_close(logits.grad, exact.grad.float(), atol=1e-6, rtol=1e-5)


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(300, 16).bfloat16().requires_grad_()
    labels = torch.randint(0, 16, (300,))
    loss = summed_cross_entropy(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(float(F.cross_entropy(logits.double(), labels, reduction="sum")), rel=1e-6)


def test_the_forward_pass_keeps_one_number_a_row() -> None:
    logits = torch.randn(64, 512, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
        summed_cross_entropy(logits, torch.zeros(64, dtype=torch.int64))
    assert sum(saved) <= logits.nbytes + 64 * (8 + 4)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 12),
    width=st.integers(1, 9),
    classes=st.integers(2, 40),
    biased=st.booleans(),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_without_logits_it_agrees_with_pytorch_in_double_precision(
    rows: int, width: int, classes: int, biased: bool, ignored: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, width), (classes, width)] + [(classes,)] * biased
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED
    expected = 3 * F.cross_entropy(F.linear(*exact), labels, reduction="sum")
    expected.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CPU_CHUNK_VALUES", 3 * classes)  # several chunks, the last one shorter
        patch.setattr(cross_entropy, "LEAST_ROWS", 1)
        loss = linear_cross_entropy(*inputs, *[None] * (not biased), labels)
        with torch.no_grad():
            assert torch.equal(loss, linear_cross_entropy(*inputs, *[None] * (not biased), labels))
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    assert 3 * loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-4)
    for found, wanted in zip(inputs, exact, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [40, 3000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_logits_it_is_as_exact_in_low_precision(
    dtype: torch.dtype, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK_VALUES", 2 * classes)  # many chunks to be added up
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).to(dtype)
    weight = torch.randn(classes, 32, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (64,), generator=generator)
    far: dict[str, list[float]] = {}
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    (F.cross_entropy(F.linear(*exact), labels, reduction="sum") * 1024 / 64).backward()  # as a loss scale would
    for name in ("with", "without"):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if name == "with":
            loss = summed_cross_entropy(F.linear(*inputs), labels)
        else:
            loss = linear_cross_entropy(*inputs, None, labels)
        (loss * 1024 / 64).backward()
        far[name] = [
            float((found.grad.double() - wanted.grad).norm() / wanted.grad.norm())
            for found, wanted in zip(inputs, exact, strict=True)
        ]
    assert all(without <= 1.1 * with_ for without, with_ in zip(far["without"], far["with"], strict=True)), far


def test_without_logits_the_gradients_of_unlikely_classes_are_no_zeros_in_fp16() -> None:
    """exp(-16) is about twice the smallest number of fp16, which the loss scale comes too late to raise."""
    hidden = torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.full((50, 1), -16.0, dtype=torch.float16)
    weight[0] = 0.0
    linear_cross_entropy(hidden, weight.requires_grad_(), None, torch.tensor([0])).mul(2.0**12).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[1:].float(), torch.full((49, 1), 2.0**12 * math.exp(-16)), rtol=0.02, atol=0)


def test_no_matrix_of_logits_is_held() -> None:
    rows, width, classes = 4096, 8, 2048
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(classes, width, requires_grad=True)
    labels = torch.randint(0, classes, (rows,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, None, labels).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * cross_entropy.LEAST_ROWS * classes < 4 * rows * classes / 10
