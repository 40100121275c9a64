"""How tests run: on several processes, and without a GPU in Triton's interpreter. See README.md beside this file.

Triton reads TRITON_INTERPRET and PyTorch reads OMP_NUM_THREADS when they are imported, so both are set here, before
anything imports them. Subprocesses that tests start inherit them.
"""

import importlib.util
import os
import signal

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # one worker per core; more threads would compete with the other workers
# Which product is the faster one depends on the load, and results on the product. test_onednn.py chooses for itself.
os.environ.setdefault("SIGLIP_ONEDNN", "0")

import pytest  # noqa: E402
import torch  # noqa: E402
import torchvision_operators  # noqa: E402

if WORKER:
    torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        import fast_interpreter

        fast_interpreter.install()

torchvision_operators.declare_if_missing()  # before anything imports torchvision

# A background process ignores SIGINT, and its children inherit that; tests that send SIGINT need the default handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run on one worker per core, unless -n is given or the command names files or selects tests with -k.

    This is not in addopts because `pytest bench/`, which measures, must stay in one process.
    """
    named = config.option.keyword or any(".py" in argument for argument in config.args)
    if WORKER or named or getattr(config.option, "numprocesses", 0) is not None:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    config.option.numprocesses = 0 if config.option.usepdb else min(cores, 8)
    config.option.dist = "loadgroup"


def pytest_configure(config: pytest.Config) -> None:
    """Let workers, which know the command line only, group tests as `pytest_cmdline_main` asked."""
    if WORKER:
        config.option.loadgroup = True


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():  # a folder of that name is a keyword
            item.add_marker(skip)
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str:
    """The tests that share a fixture of their module, such as compiled kernels, that each worker would build again; ""
    if no other does. With parameters each value is a fixture of its own, and the groups may be on several workers.
    """
    fixtures = getattr(item, "_fixtureinfo").name2fixturedefs.items()  # noqa: B009  not public in pytest
    shared = [name for name, definitions in fixtures if definitions[-1].scope == "module"]
    indices = item.callspec.indices if hasattr(item, "callspec") else {}
    return "-".join([item.path.stem, *(str(indices[name]) for name in shared if name in indices)]) if shared else ""
