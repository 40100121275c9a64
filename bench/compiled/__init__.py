"""The compiled kernels, inspected without a GPU: registers, spills, machine code and counted clocks."""
