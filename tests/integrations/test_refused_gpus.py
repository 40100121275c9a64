"""accelerate where no GPU runs the kernels: an error that names the GPU, and an unchanged model."""

from types import SimpleNamespace

import machines
import pytest
import tiny_timm
import tiny_transformers
import torch
from acceleration import assert_bitwise, run

from siglip_kernels import MissingBackendError
from siglip_kernels.integrations import open_clip, timm, transformers
from siglip_kernels.integrations.patching import runs

MODELS = {
    "transformers": (transformers, tiny_transformers.siglip),
    "timm": (timm, tiny_timm.tower),
    "open_clip": (open_clip, tiny_timm.tower),
}
MACHINES = {
    "ROCm": ((machines.MI300X,), "6.4", r"AMD Instinct MI300X \(gfx942\) is an AMD GPU \(ROCm 6.4\)"),
    "ROCm without a GPU": ((), "6.4", r"this PyTorch is built for AMD GPUs \(ROCm 6.4\)"),
    "sm_75": ((machines.RTX_2080,), None, "NVIDIA GeForce RTX 2080 Ti has compute capability 7.5"),
}


@pytest.mark.parametrize("library", MODELS)
@pytest.mark.parametrize("machine", MACHINES)
def test_accelerate_names_the_gpu_and_changes_nothing(library, machine, monkeypatch):
    integration, make = MODELS[library]
    model = make()
    kinds = [type(module) for module in model.modules()]
    gpus, hip, reason = MACHINES[machine]
    machines.report(monkeypatch, *gpus, hip=hip)
    with pytest.raises(MissingBackendError, match=f"^accelerate: {reason}.*; use the model as it is"):
        integration.accelerate(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(("index", "refused"), [(0, False), (1, True)])
def test_the_gpu_of_the_model_is_judged(index, refused, monkeypatch):
    model = tiny_timm.tower()
    machines.report(monkeypatch, machines.H100, machines.RTX_2080)
    parameter = SimpleNamespace(device=torch.device("cuda", index), dtype=torch.float32)
    monkeypatch.setattr(model, "parameters", lambda: iter([parameter]))
    if refused:
        with pytest.raises(MissingBackendError, match="^accelerate: NVIDIA GeForce RTX 2080 Ti"):
            timm.accelerate(model)
    else:
        assert timm.accelerate(model).note == ""


def test_an_accelerated_model_on_an_unsupported_gpu_computes_by_the_library(monkeypatch):
    """As after `model.to`: the kernels are asked for the device of each call."""
    model, images = tiny_timm.tower(), torch.randn(2, 3, 32, 32)
    before = run(model, lambda model: dict(features=model(images)))
    timm.accelerate(model)
    machines.report(monkeypatch, machines.RTX_2080)
    assert not runs(images)
    assert_bitwise(run(model, lambda model: dict(features=model(images))), before)
