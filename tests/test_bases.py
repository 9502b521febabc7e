"""The shared pieces: tables of signs, sorted levels, least squares that cannot fail."""

import numpy as np
import pytest
import torch

from wnq.bases import (
    as_rows,
    from_rows,
    ladder,
    least_squares,
    nearest,
    normal_equations,
    pattern_numbers,
    sign_table,
)

LIKE = torch.zeros((), dtype=torch.float64)


def test_sign_table_lists_every_pattern_once_lowest_bit_first():
    assert sign_table(2, LIKE).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]
    assert sign_table(2, LIKE, low=0.0).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    for count in range(1, 9):
        table = sign_table(count, LIKE)
        assert len(table.unique(dim=0)) == 2**count
        assert torch.equal(pattern_numbers((table > 0).unsqueeze(0))[0], torch.arange(2**count))


def test_ladder_sorts_levels_and_rank_undoes_order():
    # 2 and -3 with signs: -2+3, 2+3, -2-3, 2-3.
    steps = ladder(sign_table(2, LIKE), torch.tensor([[2.0, -3.0], [1.0, 1.0]], dtype=torch.float64))
    assert steps.levels.tolist() == [[-5, -1, 1, 5], [-2, 0, 0, 2]]
    assert steps.order[0].tolist() == [2, 3, 0, 1]
    assert steps.order[1].tolist() == [0, 1, 2, 3]  # equal levels keep their order
    for row in (0, 1):
        assert torch.equal(steps.rank[row][steps.order[row]], torch.arange(4))
    assert steps.codes(torch.tensor([[1, 2], [0, 3]])).tolist() == [[3, 0], [0, 3]]


def test_nearest_takes_the_lower_level_at_a_threshold():
    levels = torch.tensor([[-1.0, 0.0, 4.0], [0.0, 0.0, 1.0]])
    rows = torch.tensor([[-9.0, -0.5, -0.4, 2.0, 2.1, 9.0], [-1.0, 0.0, 0.1, 0.5, 0.6, float("nan")]])
    assert nearest(levels, rows).tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_rows_and_back(granularity, axis):
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    rows = as_rows(x, granularity, axis)
    assert rows.shape == ((1, 24) if granularity == "tensor" else (x.shape[axis], 24 // x.shape[axis]))
    if granularity == "channel":
        assert torch.equal(rows[1], x.select(axis, 1).reshape(-1))
    codes = (rows > 0).long()
    quantized = from_rows(codes, torch.tensor([[-1.0, 1.0]]).expand(len(rows), 2), x, granularity, axis)
    assert torch.equal(quantized.dequantize(), torch.where(x > 0, 1.0, -1.0))
    assert quantized.codes.dtype == torch.uint8


def test_a_channel_of_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 dimensions, got shape \(5,\)"):
        as_rows(torch.zeros(5), "channel", 0)


@pytest.mark.parametrize("ridge", [1e-10, 0.3])
def test_least_squares_equals_numpy(ridge):
    generator = np.random.default_rng(0)
    signs = np.sign(generator.normal(size=(4, 50, 3)))
    rows = generator.normal(size=(4, 50))
    prior = generator.normal(size=(4, 3))
    gram, moment = normal_equations(torch.tensor(signs), torch.tensor(rows))
    assert torch.equal(gram, torch.tensor(signs.transpose(0, 2, 1) @ signs))
    for start in (None, prior):
        answer = least_squares(gram, moment, ridge, None if start is None else torch.tensor(start)).numpy()
        for b, x, v, v0 in zip(signs, rows, answer, np.zeros_like(prior) if start is None else start, strict=True):
            expected = np.linalg.solve(b.T @ b + ridge * np.eye(3), b.T @ x + ridge * v0)
            assert np.abs(v - expected).max() < 1e-12
            if ridge < 1e-9:
                assert np.abs(v - np.linalg.lstsq(b, x, rcond=None)[0]).max() < 1e-9


def test_least_squares_of_dependent_bases_is_bounded_and_still_fits():
    signs = torch.ones(1, 1000, 8)
    rows = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0))
    gram, moment = normal_equations(signs, rows)
    answer = least_squares(gram, moment, 1e-10 * 1000)
    assert answer.abs().max() < 1
    assert answer.sum().item() == pytest.approx(rows.double().mean().item(), rel=1e-6)
    prior = torch.arange(8.0).unsqueeze(0)  # what the equations leave open keeps the differences of the prior
    kept = least_squares(gram, moment, 1e-10 * 1000, prior)
    assert kept.diff(dim=1) == pytest.approx(1.0, abs=1e-4)
    assert kept.sum().item() == pytest.approx(rows.double().mean().item(), rel=1e-6)


def test_no_data_and_bad_data_do_not_raise():
    zeros = torch.zeros(1, 4, 2)
    prior = torch.tensor([[0.5, 0.25]])
    assert least_squares(*normal_equations(zeros, torch.ones(1, 4)), 1e-6, prior).tolist() == [[0.5, 0.25]]
    for bad in (float("nan"), float("inf")):
        answer = least_squares(*normal_equations(torch.ones(1, 4, 2), torch.tensor([[1.0, bad, 0.0, 1.0]])), 1e-6)
        assert not answer.isfinite().any()


def test_autocast_does_not_round_the_equations():
    # 257 and 1025 elements: their counts are no bfloat16 numbers.
    signs, rows = torch.ones(1, 1025, 2), torch.rand(1, 1025, generator=torch.Generator().manual_seed(0))
    expected = normal_equations(signs, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = normal_equations(signs, rows)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert expected[0][0, 0, 0] == 1025
