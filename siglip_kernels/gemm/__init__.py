"""The GEMM with fused epilogues that linear, mlp, qkv and the sigmoid loss share."""
