"""The tanh approximation of GELU (Hendrycks & Gimpel, arXiv 1606.08415) and its derivative, as parts of kernels.

    gelu(x) = x/2 (1 + tanh u) = x σ(2u),    u = √(2/π) (x + 0.044715 x³)

so one exponential and one reciprocal, of which a multiprocessor computes few per clock; two elements can share the
reciprocal. Far from zero gelu is 0 or x and its derivative 0 or 1; there x³ must not overflow and give NaN.
"""

import triton
import triton.language as tl

from siglip_kernels.approximate import reciprocal, saturated_fma, tanh

# e^(-2u) = 2^(x (_LINEAR + _CUBIC x²)), and 2 du/dx = _SLOPE + _SLOPE_SQUARE x²
_LINEAR = tl.constexpr(-2 * 1.4426950408889634 * 0.7978845608028654)
_CUBIC = tl.constexpr(-2 * 1.4426950408889634 * 0.7978845608028654 * 0.044715)
_SLOPE = tl.constexpr(2 * 0.7978845608028654)
_SLOPE_SQUARE = tl.constexpr(2 * 0.7978845608028654 * 3 * 0.044715)


_ROOT = tl.constexpr(0.7978845608028654)  # u = x (_ROOT + _ROOT_CUBIC x²)
_ROOT_CUBIC = tl.constexpr(0.7978845608028654 * 0.044715)

# Of σ(2u) for the pairs of `gelu`: below _LEAST it is less than _NOTHING, here 2⁻⁶⁰, which they take for 0.
_LEAST = tl.constexpr(-7.5)
_NOTHING = tl.constexpr(8.673617379884035e-19)


@triton.jit
def _one_plus_exponential(x):
    """1 + e^(-2u) of x limited to _LEAST from below, so that the product of two is finite. A NaN gives a number."""
    x = tl.where(x > _LEAST, x, _LEAST)
    return 1.0 + tl.exp2((x * x * _CUBIC + _LINEAR) * x)


@triton.jit
def gelu(x):
    """x: fp32 [ROWS, COLUMNS]. Neighbours share a reciprocal: with r = 1 / (a b), 1 / a = r b and 1 / b = r a.

    As in PyTorch, gelu(-inf) is NaN, being -inf · 0.
    """
    left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    a = _one_plus_exponential(left)
    b = _one_plus_exponential(right)
    r = reciprocal(a * b)
    left *= saturated_fma(r, b, -_NOTHING)
    right *= saturated_fma(r, a, -_NOTHING)
    return tl.reshape(tl.join(left, right), x.shape)


@triton.jit
def scaled_gelu(x, half):
    """gelu(x) · 2 half, for a result in fp8: by one tanh of eleven bits, in two thirds of the instructions.

    x: fp32 [ROWS, COLUMNS]; half: fp32 [ROWS, 1].
    """
    u = (x * x * _ROOT_CUBIC + _ROOT) * x
    scaled = x * half
    return scaled * tanh(u) + scaled


@triton.jit
def gelu_and_derivative(x):
    """gelu(x) and d gelu / dx = s + x s (1 - s) · 2 du/dx, where s = σ(2u) and 1 - s = s e^(-2u). x: fp32."""
    x = tl.maximum(x, -10.0, propagate_nan=tl.PropagateNan.ALL)  # gelu(-10) is -1e-37; beyond, e^(-2u) would overflow
    near = tl.minimum(x, 10.0, propagate_nan=tl.PropagateNan.ALL)
    square = near * near
    e = tl.exp2((square * _CUBIC + _LINEAR) * near)
    s = reciprocal(1.0 + e)
    return x * s, s + near * s * (s * e) * (square * _SLOPE_SQUARE + _SLOPE)
