"""Triton's tutorial 06, fused attention, as the public Triton kernel to compare counts of attention with.

Written for this project after the tutorial: without a causal mask, and for lengths that tiles divide, so that it needs
no masks at all. Where the tutorial would pad a head to the next power of two, it is given this project's two blocks of
columns. It is compiled and counted, never run.
"""

import itertools
import re
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from bench.compiled.launch import Launch
from siglip_kernels.attention.config import split_head_dim

TOKENS, HEADS = 1024, 1024  # of one head; of all samples


@triton.jit
def tutorial_attention_kernel(
    q,  # (HEADS · TOKENS, HEAD_DIM), as k, v and out
    k,
    v,
    out,
    log_sum_exp,  # (HEADS, TOKENS) fp32
    scale,
    tokens,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_query = tl.program_id(0) * BLOCK_Q
    first = tl.program_id(1) * tokens
    queries = first + first_query + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, MAIN)[None, :]
    keys = (first + tl.arange(0, BLOCK_K))[:, None]
    q_main = tl.load(q + queries[:, None] * HEAD_DIM + columns)
    q_tail = q_main
    k_main = k + keys * HEAD_DIM + columns
    v_main = v + keys * HEAD_DIM + columns
    if TAIL > 0:
        last_columns = MAIN + tl.arange(0, TAIL)[None, :]
        q_tail = tl.load(q + queries[:, None] * HEAD_DIM + last_columns)
        k_tail = k + keys * HEAD_DIM + last_columns
        v_tail = v + keys * HEAD_DIM + last_columns
    exponent_scale = scale * 1.4426950408889634
    running_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    running_sum = tl.full([BLOCK_Q], 1.0, tl.float32)
    main = tl.zeros([BLOCK_Q, MAIN], tl.float32)
    tail = tl.zeros([BLOCK_Q, TAIL if TAIL > 0 else 16], tl.float32)
    for _ in tl.range(0, tokens, BLOCK_K):
        scores = tl.dot(q_main, tl.load(k_main).T)
        if TAIL > 0:
            scores = tl.dot(q_tail, tl.load(k_tail).T, scores)
        new_max = tl.maximum(running_max, tl.max(scores, 1) * exponent_scale)
        weights = tl.exp2(scores * exponent_scale - new_max[:, None])
        correction = tl.exp2(running_max - new_max)
        main = main * correction[:, None]
        main = tl.dot(weights.to(tl.bfloat16), tl.load(v_main), main)
        if TAIL > 0:
            tail = tl.dot(weights.to(tl.bfloat16), tl.load(v_tail), tail * correction[:, None])
            k_tail += BLOCK_K * HEAD_DIM
            v_tail += BLOCK_K * HEAD_DIM
        running_sum = running_sum * correction + tl.sum(weights, 1)
        running_max = new_max
        k_main += BLOCK_K * HEAD_DIM
        v_main += BLOCK_K * HEAD_DIM
    tl.store(log_sum_exp + queries, running_max + tl.log2(running_sum))
    tl.store(out + queries[:, None] * HEAD_DIM + columns, (main / running_sum[:, None]).to(tl.bfloat16))
    if TAIL > 0:
        tl.store(out + queries[:, None] * HEAD_DIM + last_columns, (tail / running_sum[:, None]).to(tl.bfloat16))


def launches(only: str = "") -> Iterator[Launch]:
    """The tiles that the tutorial tunes, at two head dims. only: a regular expression that the names contain.

    Of its pipeline depths the first: the others differ in waits alone. Head dim 72 is counted at 80 columns.
    """
    for columns, queries, keys, warps in itertools.product((64, 80), (64, 128), (32, 64, 128), (4, 8)):
        name = f"bf16 S={TOKENS} D={columns} {queries}x{keys} {warps} warps forward"
        if re.search(only, name):
            yield Launch(name, _forward(columns, queries, keys, warps))


def _forward(head_dim: int, queries: int, keys: int, warps: int) -> Callable[[], None]:
    main, tail = split_head_dim(head_dim)

    def launch() -> None:
        q, k, v, out = (torch.empty(HEADS * TOKENS, head_dim, dtype=torch.bfloat16, device="meta") for _ in range(4))
        log_sum_exp = torch.empty(HEADS, TOKENS, device="meta")
        tutorial_attention_kernel[(TOKENS // queries, HEADS)](
            q, k, v, out, log_sum_exp, head_dim**-0.5, TOKENS,
            HEAD_DIM=head_dim, MAIN=main, TAIL=tail, BLOCK_Q=queries, BLOCK_K=keys, num_warps=warps, num_stages=2,
        )  # fmt: skip

    return launch
