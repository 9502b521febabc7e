"""Straight-through estimators: exact values forward, the stated gradient back."""

import pytest
import torch

from wnq.ste import clamp_ste, grad_scale, round_ste, sign_ste, straight_through

X = torch.randn(10_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("estimator", "expected"), [
    (round_ste, X.round()),
    (sign_ste, torch.where(X >= 0, 1.0, -1.0)),
    (lambda x: clamp_ste(x, -0.5, 0.7), X.clamp(-0.5, 0.7)),
])  # fmt: skip
def test_value_is_exact_and_gradient_is_one(estimator, expected):
    x = X.clone().requires_grad_()
    y = estimator(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, torch.ones_like(x))


def test_four_levels_stay_four_levels():
    levels = torch.tensor([-0.9, -0.3, 0.3, 0.9])
    chosen = levels[torch.randint(0, 4, X.shape, generator=torch.Generator().manual_seed(1))]
    assert straight_through(chosen, X).unique().tolist() == levels.tolist()


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_grad_scale_changes_the_gradient_only(factor):
    x = X.clone().requires_grad_()
    y = grad_scale(x, factor)
    assert torch.equal(y, X)
    (y.sum() + 0 * x.sum()).backward()
    assert torch.allclose(x.grad, torch.full_like(X, factor))
