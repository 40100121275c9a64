"""Calculates, without measuring, time and traffic of the distributed loss, and traffic of DDP and FSDP2.

    python -m bench.ring_model [--global-batch 32768] [--width 768] [--tflops 592.5] [--node-gbs 450] [--network-gbs 50]
        [--parameters 877.96e6] [--micro-batches 1]

The assumptions are arguments. A GPU computes at 75 % of the 790 TFLOP/s that a large bf16 GEMM reaches on an H200 (the
goal of the single-GPU loss, not yet measured). In a node of eight, NVLink carries 450 GB/s per GPU in each direction
(NVIDIA's H100 and H200 datasheets: 900 GB/s in both). Between nodes each GPU has a 400 Gb/s port (NDR InfiniBand, as in
NVIDIA's DGX H100), 50 GB/s in each direction. A message takes 20 µs before its first byte.

The ring: in each of W steps a GPU computes 6 m² D operations on its m images and one block of m texts, while the next
block (2 bytes per value) and the last block's gradient sums (4 bytes) travel; a step lasts as long as the slower of the
two. The ring crosses between nodes at every node's edge, so one network hop sets the pace of all of it. Nothing hides
the last sum. The all-gather: all texts arrive before, and all sums leave after, W m² pairs of computation; nothing is
hidden.

DDP and FSDP2: what a GPU sends in a step of `siglip train --bfloat16`, by ring collectives, each of which sends
(W - 1)/W of its tensor. DDP reduces fp32 gradients and gathers their means, once per step. FSDP2 gathers bf16 weights
in forward and again in backward and reduces fp32 gradients: as many bytes. With --micro-batch it does so for each
micro-batch, and gathers the weights once more for the forward pass without a graph. Embeddings and heads, which the
trainer gathers in fp32, count as layers. How much of it the towers' computation hides is not modelled.
"""

import argparse
import dataclasses


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """Rates in operations and bytes per second; latency in seconds."""

    width: int
    rate: float = 0.75 * 790e12
    node: float = 450e9
    network: float = 50e9
    latency: float = 20e-6
    gpus_in_a_node: int = 8
    text_bytes: int = 2
    sum_bytes: int = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Costs of one GPU. Times in seconds, sizes in bytes."""

    gpus: int
    local_batch: int
    compute: float
    ring: float
    ring_exposed: float  # communication that computation does not hide
    ring_bytes: int  # sent
    ring_memory: int  # buffers besides embeddings, gradients and a block of G
    gather: float
    gather_memory: int


def estimate(gpus: int, global_batch: int, assumed: Assumptions) -> Estimate:
    """One forward and backward pass of the loss of `global_batch` pairs, divided evenly."""
    local = -(-global_batch // gpus)
    values = local * assumed.width
    bandwidth = assumed.node if gpus <= assumed.gpus_in_a_node else assumed.network
    step_compute = 6 * local**2 * assumed.width / assumed.rate
    step_bytes = values * (assumed.text_bytes + assumed.sum_bytes)
    step_transfer = 2 * assumed.latency + step_bytes / bandwidth
    last_sum = assumed.latency + values * assumed.sum_bytes / bandwidth
    compute = gpus * step_compute
    ring = (gpus - 1) * max(step_compute, step_transfer) + step_compute + last_sum
    gathered = (gpus - 1) * values
    gather = compute + 2 * assumed.latency + gathered * (assumed.text_bytes + assumed.sum_bytes) / bandwidth
    return Estimate(
        gpus,
        local,
        compute,
        ring,
        ring - compute,
        (gpus - 1) * values * assumed.text_bytes + gpus * values * assumed.sum_bytes,
        # Two blocks of texts; two shares, one incoming sum and the image gradient's sum.
        2 * values * assumed.text_bytes + 4 * values * assumed.sum_bytes,
        gather,
        gpus * values * (assumed.text_bytes + assumed.sum_bytes) + 2 * values * assumed.sum_bytes,
    )


def table(global_batch: int, assumed: Assumptions) -> str:
    """Estimates for 8 to 4,096 GPUs as text."""
    lines = [
        f"Global batch {global_batch:,}, D = {assumed.width}. Calculated, not measured: "
        f"{assumed.rate / 1e12:.0f} TFLOP/s, {assumed.node / 1e9:.0f} GB/s in a node, "
        f"{assumed.network / 1e9:.0f} GB/s between nodes.",
        "  GPUs  local batch   compute ms    ring ms  exposed  sent MB   ring memory MB   gather ms  gather memory MB",
    ]
    for power in range(3, 13):
        gpus = 2**power
        if gpus > global_batch:
            break
        e = estimate(gpus, global_batch, assumed)
        lines.append(
            f"{e.gpus:6,} {e.local_batch:12,} {e.compute * 1e3:12.2f} {e.ring * 1e3:10.2f} "
            f"{e.ring_exposed / e.ring:7.0%} {e.ring_bytes / 1e6:8,.0f} {e.ring_memory / 1e6:16,.0f} "
            f"{e.gather * 1e3:11.2f} {e.gather_memory / 1e6:17,.0f}"
        )
    return "\n".join(lines)


def parallel_table(parameters: float, micro_batches: int, assumed: Assumptions) -> str:
    """What DDP and FSDP2 send per GPU in a step, with the times in transit, as text."""
    lines = [
        f"{parameters / 1e6:,.0f} M parameters, {micro_batches} micro-batches. Calculated, not measured; per GPU.",
        "  GPUs  DDP MB  in transit ms  FSDP2 MB  in transit ms",
    ]
    for power in range(3, 13):
        gpus = 2**power
        bandwidth = assumed.node if gpus <= assumed.gpus_in_a_node else assumed.network
        ddp, fsdp = parallel_bytes(gpus, parameters, micro_batches)
        lines.append(
            f"{gpus:6,} {ddp / 1e6:7,.0f} {ddp / bandwidth * 1e3:14.1f} {fsdp / 1e6:9,.0f} "
            f"{fsdp / bandwidth * 1e3:14.1f}"
        )
    return "\n".join(lines)


def parallel_bytes(gpus: int, parameters: float, micro_batches: int) -> tuple[float, float]:
    """Bytes that a GPU sends in a step under DDP and under FSDP2."""
    sent = (gpus - 1) / gpus * parameters
    gathers = 2 if micro_batches == 1 else 3
    return sent * (4 + 4), sent * (gathers * 2 + 4) * micro_batches


def main() -> None:
    parser = argparse.ArgumentParser(description="Calculate the costs of the distributed loss; nothing is measured.")
    parser.add_argument("--global-batch", type=int, nargs="+", default=[32_768, 1_048_576])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tflops", type=float, default=0.75 * 790)
    parser.add_argument("--node-gbs", type=float, default=450.0)
    parser.add_argument("--network-gbs", type=float, default=50.0)
    parser.add_argument("--parameters", type=float, default=877.96e6, help="by default those of so400m-patch14-384")
    parser.add_argument("--micro-batches", type=int, default=1, help="per step and process")
    arguments = parser.parse_args()
    assumed = Assumptions(
        arguments.width, arguments.tflops * 1e12, arguments.node_gbs * 1e9, arguments.network_gbs * 1e9
    )
    print("\n\n".join(table(batch, assumed) for batch in arguments.global_batch))
    print("\n" + parallel_table(arguments.parameters, arguments.micro_batches, assumed))


if __name__ == "__main__":
    main()
