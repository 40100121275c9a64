"""The tanh form of GELU (Hendrycks & Gimpel, arXiv 1606.08415) and its derivative, as parts of kernels.

    gelu(x) = x/2 (1 + tanh u) = x σ(2u),    u = √(2/π) (x + 0.044715 x³)

so one exponential and one reciprocal. Far from zero both are x or 0 and x or 1; there x³ must not overflow into NaN.
"""

import triton
import triton.language as tl

_CUBIC = tl.constexpr(0.044715)
_EXPONENT = tl.constexpr(-2 * 1.4426950408889634 * 0.7978845608028654)  # 2^(u √(π/2) · this) = e^(-2u)
_SLOPE = tl.constexpr(2 * 0.7978845608028654)
_SLOPE_CUBIC = tl.constexpr(2 * 0.7978845608028654 * 3 * 0.044715)


@triton.jit
def gelu(x):
    """x: fp32."""
    x = tl.where(x < -100.0, -100.0, x)  # -inf would give -inf · 0
    return x / (1.0 + tl.exp2((x * x * _CUBIC + 1.0) * x * _EXPONENT))


@triton.jit
def gelu_and_derivative(x):
    """gelu(x) and d gelu / dx = s + x s (1 - s) · 2 du/dx, where s = σ(2u). x: fp32."""
    x = tl.where(x < -100.0, -100.0, x)
    near = tl.where(x > 100.0, 100.0, x)
    square = near * near
    s = 1.0 / (1.0 + tl.exp2((square * _CUBIC + 1.0) * near * _EXPONENT))
    return x * s, s + near * s * (1.0 - s) * (square * _SLOPE_CUBIC + _SLOPE)
