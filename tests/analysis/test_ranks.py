"""Ranks against numpy on matrices of known spectrum."""

import numpy as np
import pytest
import torch

from dmc.analysis.ranks import effective_rank, spectrum, stable_rank


def _with_spectrum(values, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(columns, len(values))))
    return torch.from_numpy(left @ np.diag(values) @ right.T)


@pytest.mark.parametrize("rows, columns", [(40, 8), (8, 40), (8, 8)])
def test_spectrum_is_numpys(rows, columns):
    matrix = torch.from_numpy(np.random.default_rng(1).normal(size=(3, rows, columns)))
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum(matrix), expected, rtol=1e-12)
    np.testing.assert_allclose(spectrum(matrix.float()), expected, rtol=1e-4)
    longer = spectrum(matrix, 10)
    assert longer.shape == (3, 10) and not longer[:, 8:].any()


@pytest.mark.parametrize(
    "values, effective, stable",
    [
        ([1.0] * 100, 99, 100.0),  # exactly 99 % of the energy in 99 of 100 equal ones
        ([5.0], 1, 1.0),
        ([10.0, 1.01], 2, 1.010201),
        ([10.0, 0.99], 1, 1.009801),
        ([3.0, 3.0, 0.1], 2, 2 + 1 / 900),
        ([7.0] * 5 + [1e-6] * 20, 5, 5.0),
    ],
)
def test_ranks_of_known_spectra(values, effective, stable):
    found = spectrum(_with_spectrum(values, 128, 100))
    assert int(effective_rank(found)) == effective and float(stable_rank(found)) == pytest.approx(stable, rel=1e-9)
    frobenius, norm = (np.linalg.norm(_with_spectrum(values, 128, 100).numpy(), order) for order in ("fro", 2))
    assert float(stable_rank(found)) == pytest.approx(frobenius**2 / norm**2)


def test_all_energy_is_the_rank_of_numpy():
    matrix = torch.from_numpy(np.random.default_rng(2).normal(size=(30, 4)) @ np.random.default_rng(3).normal(size=(4, 20)))
    assert int(effective_rank(spectrum(matrix), 1.0)) == np.linalg.matrix_rank(matrix.numpy()) == 4


def test_zero_and_bad_energy():
    zero = torch.zeros(2, 5, 3, dtype=torch.float64)
    assert effective_rank(spectrum(zero)).tolist() == [0, 0] and stable_rank(spectrum(zero)).tolist() == [0.0, 0.0]
    for energy in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="energy must be above 0"):
            effective_rank(torch.ones(3), energy)
