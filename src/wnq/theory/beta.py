"""Student's t in NumPy: its density and its lower tail, to full relative precision far out, without SciPy."""

import functools
import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_TINY = 1e-300
_LARGE = 50.0
_NEARLY_GAUSSIAN = 100.0
_NODES = 48
_NEGLIGIBLE = 41.0
"""Where an integrand that starts at 1 is cut, in units of its logarithm: 1e-18."""


@functools.cache
def gauss_legendre(count: int) -> tuple[Floats, Floats]:
    """Return nodes and weights of the quadrature over [-1, 1]."""
    return np.polynomial.legendre.leggauss(count)


def _log_gamma_step(a: float) -> float:
    """Return log(Gamma(a + 1/2) / Gamma(a)), whose two logarithms would cancel for large ``a``."""
    if a < _LARGE:
        return math.lgamma(a + 0.5) - math.lgamma(a)
    return 0.5 * math.log(a) - 1 / (8 * a) + 1 / (192 * a**3) - 1 / (640 * a**5) + 17 / (14336 * a**7)


def student_pdf(x: Floats, df: float) -> Floats:
    """Return the density of Student's t with ``df`` degrees of freedom."""
    norm = math.exp(_log_gamma_step(df / 2)) / math.sqrt(math.pi * df)
    return norm * np.exp(-(df + 1) / 2 * np.log1p(x**2 / df))


def student_cdf(x: Floats, df: float) -> Floats:
    """Return the probability of a value below ``x`` <= 0, with full relative precision in the far tail.

    It is half the regularized incomplete beta function of z = df / (df + x^2) at (df/2, 1/2), by its continued fraction; for
    many degrees of freedom, where that is long, the density's integral, by Gauss and Legendre.
    """
    if df > _NEARLY_GAUSSIAN:
        return _tail(x, df)
    square = x**2
    far = square / (df + square)  # 1 - z, without the cancellation
    z = df / (df + square)
    a, b = df / 2, 0.5
    log_beta = 0.5 * math.log(math.pi) - _log_gamma_step(a)  # log B(a, 1/2)
    with np.errstate(divide="ignore"):
        # log z = -log1p(x^2 / df) is exact where z is near 1 and df is large.
        front = np.exp(-a * np.log1p(square / df) + b * np.log(far) - log_beta)
    direct = z < (a + 1) / (a + b + 2)
    value = np.empty_like(z)
    value[direct] = front[direct] / a * _fraction(a, b, z[direct])
    rest = ~direct
    value[rest] = 1 - front[rest] / b * _fraction(b, a, far[rest])
    return value / 2


def _tail(x: Floats, df: float) -> Floats:
    """Integrate f(|x| + s) / f(|x|) over s, up to where nothing is left of it."""
    start = np.minimum(np.abs(x), 1e100)[..., None]
    reach = (df + start**2) * math.expm1(2 * _NEGLIGIBLE / (df + 1))
    length = reach / (start + np.sqrt(start**2 + reach))
    node, weight = gauss_legendre(_NODES)
    s = length * (node + 1) / 2
    ratio = np.exp(-(df + 1) / 2 * np.log1p(s * (2 * start + s) / (df + start**2)))
    return student_pdf(x, df) * (ratio @ weight) * length[..., 0] / 2


def _fraction(a: float, b: float, z: Floats) -> Floats:
    """Return the continued fraction of the incomplete beta function, by Lentz's method, for z < (a + 1) / (a + b + 2)."""
    if not z.size:
        return z
    c = np.ones_like(z)
    d = 1 / _away(1 - (a + b) * z / (a + 1))
    value = d.copy()
    for m in range(1, 300):
        even = m * (b - m) * z / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = 1 / _away(1 + even * d), _away(1 + even / c)
        value *= d * c
        odd = -(a + m) * (a + b + m) * z / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1 / _away(1 + odd * d), _away(1 + odd / c)
        value *= d * c
        if np.all(np.abs(d * c - 1) < 1e-15):
            break
    return value


def _away(x: Floats) -> Floats:
    """Keep a denominator of the fraction from zero."""
    return np.where(np.abs(x) < _TINY, _TINY, x)
