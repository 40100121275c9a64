"""CPU tensors without Triton's interpreter: each operation names the argument, and the backends that run there."""

from collections.abc import Callable
from subprocess import CompletedProcess

_CALLS = """
import torch
import siglip_kernels as k

x, weight, bias = torch.zeros(1, 2, 8), torch.zeros(8, 8), torch.zeros(8)
heads = torch.zeros(1, 2, 1, 8)

def pool_arguments(dtype):
    return [torch.zeros(shape, dtype=dtype) for shape in ((1, 2, 8), (1, 1, 8), (24, 8), (24,), (8, 8), (8,))] + [2]

traced = [  # these raise in the same way under torch.compile
    (k.attention, (heads, heads, heads)),
    (k.layer_norm, (x, bias, bias)),
    (k.attention_pool, pool_arguments(torch.float16)),
    (k.attention_pool, pool_arguments(torch.float32)),
    (k.patch_embed, (torch.zeros(1, 3, 4, 4), torch.zeros(8, 3, 4, 4), bias, torch.zeros(1, 8))),
]
eager = [
    (k.linear, (x, weight, bias)),
    (k.linear, (x, weight, bias, x)),
    (k.mlp, (x, weight, bias, weight, bias)),
    (k.pre_norm_mlp, (x, bias, bias, 1e-6, weight, bias, weight, bias)),
    (k.pre_norm_qkv, (x, bias, bias, 1e-6, weight, bias, weight, bias, weight, bias, 2)),
    (k.pre_norm_attention, (x, bias, bias, 1e-6, *(weight, bias) * 4, 1)),
    (k.resize_normalize, ([torch.zeros(8, 4, 4, dtype=torch.uint8)], bias, bias, (2, 2), "bilinear", torch.float32)),
]
calls = traced + eager
calls += [(torch.compile(operation, backend="eager", fullgraph=True), arguments) for operation, arguments in traced]
for call, arguments in calls:
    try:
        call(*arguments)
    except k.MissingBackendError as error:
        assert isinstance(error, RuntimeError)
        print(error)
"""


def test_cpu_tensors_without_the_interpreter(run_python: Callable[..., CompletedProcess[str]]) -> None:
    done = run_python(_CALLS, CUDA_VISIBLE_DEVICES="")
    traced = ["attention: q", "layer_norm: x", "attention_pool: x", "attention_pool: x", "patch_embed: pixel_values"]
    eager = ["linear: x", "linear: x", "mlp: x", "pre_norm_mlp: x", "pre_norm_qkv: x", "pre_norm_attention: x"]
    eager.append("resize_normalize: images")
    lines = done.stdout.splitlines()
    assert [line.partition(" is on cpu")[0] for line in lines] == traced + eager + traced, done.stderr
    assert all("'sdpa'" in line and "'eager'" in line for line in lines)
    assert all("TRITON_INTERPRET=1" in line and "use siglip_kernels.reference, or" in line for line in lines)
    assert all("attn_implementation='sdpa'" in line for line in lines)
