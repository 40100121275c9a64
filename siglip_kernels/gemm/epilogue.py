"""The epilogues of the GEMMs for Hopper and Blackwell: a tile of the result leaves by TMA, PIECE columns at a time."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from siglip_kernels.tma import async_load, async_store

PIECE = gl.constexpr(64)  # columns that an epilogue works on at a time: 128 bytes of fp16 or bf16


@gluon.jit
def reciprocal(x):
    """1 / x for 1 <= x <= inf, by one instruction: a division handles the whole range of its operands."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


# As in gelu.py: e^(-2u) = 2^(x (_LINEAR + _CUBIC x²)), and 2 du/dx = _SLOPE + _SLOPE_SQUARE x².
_LINEAR = gl.constexpr(-2 * 1.4426950408889634 * 0.7978845608028654)
_CUBIC = gl.constexpr(-2 * 1.4426950408889634 * 0.7978845608028654 * 0.044715)
_SLOPE = gl.constexpr(2 * 0.7978845608028654)
_SLOPE_SQUARE = gl.constexpr(2 * 0.7978845608028654 * 3 * 0.044715)
_ROOT = gl.constexpr(0.7978845608028654)  # u = x (_ROOT + _ROOT_CUBIC x²)
_ROOT_CUBIC = gl.constexpr(0.7978845608028654 * 0.044715)


@gluon.jit
def gelu(x):
    """tanh-GELU as x σ(2u), u = √(2/π) (x + 0.044715 x³). x: fp32."""
    x = gl.where(x < -100.0, -100.0, x)  # -inf would give -inf · 0
    return x * reciprocal(1.0 + gl.exp2((x * x * _CUBIC + _LINEAR) * x))


@gluon.jit
def tanh(x):
    """The hyperbolic tangent, to a relative 2⁻¹¹."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def scaled_gelu(x, half):
    """gelu(x) · 2 half, for a result in fp8, as gelu.py computes it. x: fp32 [rows, columns]; half: fp32 [rows, 1]."""
    u = (x * x * _ROOT_CUBIC + _ROOT) * x
    scaled = x * half
    return scaled * tanh(u) + scaled


@gluon.jit
def gelu_and_derivative(x):
    """gelu(x) and s + x s (1 - s) · 2 du/dx, where s = σ(2u) and 1 - s = s e^(-2u). x: fp32."""
    x = gl.where(x < -10.0, -10.0, x)  # gelu(-10) is -1e-37; much further e^(-2u) would overflow
    near = gl.where(x > 10.0, 10.0, x)
    square = near * near
    e = gl.exp2((square * _CUBIC + _LINEAR) * near)
    s = reciprocal(1.0 + e)
    return x * s, s + near * s * (s * e) * (square * _SLOPE_SQUARE + _SLOPE)


@gluon.jit
def _send(value, buffer, target, row, column):
    """Rounds to the target's dtype, and starts the copy from the buffer to target[row : , column : ]."""
    buffer.store(value.to(target.dtype))
    fence_async_shared()
    async_store(target, [row, column], buffer)


@gluon.jit
def load_added(added, landed, buffers, first_row, first_column, PIECES: gl.constexpr):
    """Starts the loads of PIECES pieces into as many buffers, once the last results have been sent from there."""
    tma.store_wait(pendings=0)
    mbarrier.expect(landed, PIECES * added.block_type.nbytes)
    for piece in gl.static_range(PIECES):
        async_load(added, [first_row, first_column + piece * PIECE], landed, buffers.index(piece))


@gluon.jit
def finish_piece(
    value,  # fp32 [rows, PIECE]: the products, with the bias
    piece: gl.constexpr,
    buffers,
    added,  # loaded by load_added; as in gemm_kernel
    second_out,
    target,
    half_scales,  # fp32 [rows]: half of what gelu(·) is multiplied by for a result in fp8, or None
    column_sums,  # pointer to the sums of these rows, or None
    first_row,
    column,
    COLUMNS: gl.constexpr,
    GELU: gl.constexpr,
):
    """The epilogue of a piece: its results are on their way to memory."""
    LAYOUT: gl.constexpr = value.type.layout
    # Of two results for each piece, the second has a buffer of its own.
    if added is not None:
        buffer = buffers.index(piece)
        second_buffer = buffers.index(buffers.shape[0] - 1)
    elif second_out is not None:
        buffer = buffers.index(0)
        second_buffer = buffers.index(1)
    else:
        buffer = buffers.index(piece % 2)

    if GELU == "forward":
        if second_out is not None:
            tma.store_wait(pendings=1)
            _send(value, second_buffer, second_out, first_row, column)
        value = gelu(value) if half_scales is None else scaled_gelu(value, half_scales[:, None])
    elif GELU == "backward":
        again, derivative = gelu_and_derivative(buffer.load(LAYOUT).to(gl.float32))
        if second_out is not None:
            tma.store_wait(pendings=1)
            _send(again, second_buffer, second_out, first_row, column)
        value *= derivative
        if column_sums is not None:
            columns = column + gl.arange(0, PIECE, gl.SliceLayout(0, LAYOUT))
            gl.store(column_sums + columns, gl.sum(value, 0), mask=columns < COLUMNS)
    elif added is not None:
        value += buffer.load(LAYOUT).to(gl.float32)

    if added is None:
        tma.store_wait(pendings=1)
    _send(value, buffer, target, first_row, column)
