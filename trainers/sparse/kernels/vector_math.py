"""Exponential, error function and GELU of vectors, by polynomials; NaN stays NaN."""

from __future__ import annotations

from trainers.sparse.kernels.builder import Code, Value

# Taylor's coefficients of e^f, |f| <= ln(2)/2, last first: the remainder is below 1e-8 of the value
_EXPONENTIAL = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.42860682030941723e-06  # their sum is ln 2; the first has few bits
_LOWEST, _HIGHEST = -88.0, 88.0  # beyond, e^x is no normal float32; at the lowest its power of 2 comes out 0

# erf(x) = x · P(x²) / Q(x²) for |x| <= 4, the rational approximation that XLA and Eigen use; last first
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def _polynomial(code: Code, x: Value, coefficients: tuple[float, ...]) -> Value:
    total = code.splat(coefficients[0])
    for coefficient in coefficients[1:]:
        total = code.fma(total, x, code.splat(coefficient))
    return total


def _bounded(code: Code, x: Value, low: float, high: float) -> Value:
    x = code.select(code.compare("olt", x, code.splat(low)), code.splat(low), x)
    return code.select(code.compare("ogt", x, code.splat(high)), code.splat(high), x)


def exponential(code: Code, x: Value) -> Value:
    """``e^x`` to about 1e-7 of its value; below about -87.7 it is 0: products with numbers that small, which
    are no normal float32, take a hundred times as long."""
    x = _bounded(code, x, _LOWEST, _HIGHEST)
    power = code.nearest(x * _LOG2_E)
    rest = code.fma(power, code.splat(-_LN2_HIGH), x)
    rest = code.fma(power, code.splat(-_LN2_LOW), rest)
    whole = code.convert("fptosi", power, "integers")
    scale = code.convert("bitcast", code.shift_left(whole + 127, 23), "vector")
    return _polynomial(code, rest, _EXPONENTIAL) * scale


def error_function(code: Code, x: Value) -> Value:
    """``erf(x)`` to about 2e-7."""
    x = _bounded(code, x, -4.0, 4.0)
    square = x * x
    return x * _polynomial(code, square, _ERF_P) / _polynomial(code, square, _ERF_Q)


def gelu(code: Code, x: Value) -> Value:
    """``x · Φ(x)``, GELU in its exact form (with erf, not tanh)."""
    half = x * 0.5
    return code.fma(half, error_function(code, x * 0.7071067811865476), half)
