"""The GEMM with fused epilogues of linear, mlp and qkv, and the Hopper pipeline that the sigmoid loss shares."""
