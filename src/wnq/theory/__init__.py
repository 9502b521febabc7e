"""The exact error of uniform quantizers: for any density, at any width and clip, on both grids.

>>> from wnq.theory import Gaussian, optimal_clip
>>> clip, error = optimal_clip(Gaussian(), bits=2, grid="symmetric")
>>> print(f"{clip:.3f} sigma, relative error {error:.4f}")
1.224 sigma, relative error 0.1902
"""

from wnq.theory.crest import expected_crest
from wnq.theory.densities import Density, Gaussian, Laplace, StudentT, UniformDensity
from wnq.theory.empirical import Empirical
from wnq.theory.expected import error_bound, error_curve, error_parts, expected_error, law_error
from wnq.theory.optimum import optimal_clip

__all__ = [
    "Density",
    "Empirical",
    "Gaussian",
    "Laplace",
    "StudentT",
    "UniformDensity",
    "error_bound",
    "error_curve",
    "error_parts",
    "expected_crest",
    "expected_error",
    "law_error",
    "optimal_clip",
]
