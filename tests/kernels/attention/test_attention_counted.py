"""Bounds on the clocks of attention's loops, counted from compiled code beside a public Triton kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench.compiled.count import Count, best

ROOT = Path(__file__).parents[3]
# The bounds are those of the constraints' compiler; others count up to 3 % more or less.
pytestmark = pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="counted with Triton 3.7")

# sm_86 has the code and the rates of sm_89.
GPUS = {"published": ("a100", "h200"), "every": ("a100", "rtx4090", "h200", "rtx5090")}
OWN = r"S=729 D=72 \w+$|S=1024 D=64 \w+$"
PEER = {"published": r"128x64 4|128x128", "every": r"\dx\d"}  # in the quick run the tiles that are best anywhere

# Of the backward, with Triton 3.7.1; the other GPUs' products are slower. Shared memory is the bound.
SHARES = {("a100", "D=72"): 0.92, ("h200", "D=64"): 0.97, ("h200", "D=72"): 0.92}


@pytest.fixture(scope="module")
def counts(extent: str) -> list[Count]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    only = f"^bf16 .*({OWN}|{PEER[extent]})"
    command = [sys.executable, "-m", "bench", "count", "attention", "triton_tutorial_attention", "--json"]
    options = ["--only", only, "--gpu", ",".join(GPUS[extent])]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [Count(**count) for count in json.loads(done.stdout)]


def loops(counts: list[Count], kernel: str, gpu: str, columns: str) -> list[Count]:
    return [one for one in counts if one.kernel == kernel and one.gpu == gpu and columns in one.launch.split()]


@pytest.mark.parametrize("head_dim", ["D=64", "D=72"])
def test_the_forward_is_no_slower_than_the_tutorial_at_its_best_tile(counts, extent, head_dim):
    """By the busiest pipe and by issue slots, though strides are arguments here, which the tutorial's are not."""
    for gpu in GPUS[extent]:
        (own,) = loops(counts, "attention_forward_kernel", gpu, head_dim)
        peer = best(loops(counts, "tutorial_attention_kernel", gpu, head_dim.replace("72", "80")))
        assert own.stack_bytes == 0
        assert own.per_thousand(own.bound) <= peer.per_thousand(peer.bound) + 0.005, (str(own), str(peer))
        assert own.per_thousand("issue") <= peer.per_thousand("issue") + 0.0005, (str(own), str(peer))


@pytest.mark.parametrize("head_dim", ["D=64", "D=72"])
def test_the_backward_is_bound_by_products(counts, extent, head_dim):
    """The share of the tensor cores' peak, over the loops of the two kernels that every row takes."""
    for gpu in GPUS[extent]:
        (queries,) = loops(counts, "attention_backward_queries_kernel", gpu, head_dim)
        (keys,) = loops(counts, "attention_backward_keys_kernel", gpu, head_dim)
        clocks = {"tensor": 0.0, "bound": 0.0}
        for loop in (queries, keys):
            scores = loop.multiply_adds / (3 if loop is queries else 4)  # products of tiles
            clocks["tensor"] += loop.clocks["tensor"] / scores
            clocks["bound"] += loop.clocks[loop.bound] / scores
            assert loop.stack_bytes <= (8 if gpu == "rtx5090" else 0)
        assert clocks["tensor"] / clocks["bound"] >= SHARES.get((gpu, head_dim), 0.99), (str(queries), str(keys))
