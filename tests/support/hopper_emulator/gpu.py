"""An emulated GPU on which the kernels for Hopper are tested."""

import contextlib
import dataclasses
from collections.abc import Iterator

from hopper_emulator.launch import emulating

from bench.compiled.ahead_of_time import GPUS
from siglip_kernels.device import Facts, pretend

# Few multiprocessors, so that each program has several tiles.
HOPPER = dataclasses.replace(GPUS["h200"], multiprocessors=2)


@contextlib.contextmanager
def on_hopper(seed: int = 0, gpu: Facts = HOPPER) -> Iterator[None]:
    """Launches within the context are emulated. seed: of the order in which warps run."""
    with pretend(gpu), emulating(seed):
        yield
