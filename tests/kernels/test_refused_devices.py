"""GPUs that the kernels do not support, and arguments on several devices: each operation names what came."""

import re

import machines
import pytest
import torch
from test_arguments import ARGUMENTS, call, tensors
from torch._subclasses.fake_tensor import FakeTensorMode

import siglip_kernels
from siglip_kernels import MissingBackendError, UnsupportedInputError
from siglip_kernels.device import kernels_run_on, why_no_gpu, why_not, why_not_here

CUDA_0, CUDA_1 = torch.device("cuda", 0), torch.device("cuda", 1)
AMD = r"AMD Instinct MI300X \(gfx942\) is an AMD GPU \(ROCm 6.4\), which the kernels do not support"
OLD = r"NVIDIA GeForce RTX 2080 Ti has compute capability 7.5; the kernels need 8.0 or later"
MACHINES = {
    "ROCm": (dict(gpus=(machines.H100, machines.MI300X), hip="6.4"), AMD),
    "sm_75": (dict(gpus=(machines.H100, machines.RTX_2080), hip=None), OLD),
}
WITHOUT_KERNELS = {"siglip_kernels::count_positives", "siglip_kernels::fp8_gradient"}
OPERATORS = {
    name.partition("::")[2]: definition
    for name, definition in torch._library.custom_ops.OPDEFS.items()
    if name.startswith("siglip_kernels::") and name not in WITHOUT_KERNELS
}
PLACEHOLDERS = {"int": 1, "float": 1.0, "bool": True, "SymInt": 1, "str": "triton", "ScalarType": torch.float32}


def test_every_operation_is_an_operator():
    operations = {"attention", "attention_pool", "layer_norm", "linear", "mlp", "patch_embed", "sigmoid_loss"}
    assert OPERATORS.keys() >= operations | {"pre_norm_attention", "pre_norm_mlp", "pre_norm_qkv"}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_the_gpu_of_their_tensors(name, machine, monkeypatch):
    reported, reason = MACHINES[machine]
    machines.report(monkeypatch, *reported["gpus"], hip=reported["hip"])
    definition = OPERATORS[name]

    def placeholder(kind: str) -> object:
        kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional") else kind
        if kind.startswith("List["):
            return [placeholder(kind.removeprefix("List[").removesuffix("]"))]
        return torch.empty(2, 4, 8, 16, device=CUDA_1) if kind == "Tensor" else PLACEHOLDERS[kind]

    with FakeTensorMode():
        arguments = [placeholder(str(argument.type)) for argument in definition._opoverload._schema.arguments]
        backends = r".*'sdpa' or 'eager'( \(in transformers attn_implementation='sdpa'\))?"
        message = rf"^[\w.]+: \w+ is on cuda:1, and {reason}.*; use ({backends}|loss=.*chunked_sigmoid_loss)$"
        with pytest.raises(MissingBackendError, match=message):
            definition._init_fn(*arguments)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_product_that_starts_no_kernel_is_refused(machine, monkeypatch):
    reported, reason = MACHINES[machine]
    machines.report(monkeypatch, *reported["gpus"], hip=reported["hip"])
    with FakeTensorMode(), pytest.raises(MissingBackendError, match=f"^linear: x is on cuda:1, and {reason}"):
        siglip_kernels.linear(torch.empty(3, 16, device=CUDA_1), torch.empty(16, 16, device=CUDA_1))


def test_each_gpu_is_judged_by_itself(monkeypatch):
    machines.report(monkeypatch, machines.RTX_2080, machines.H100)
    assert not kernels_run_on(CUDA_0) and kernels_run_on(CUDA_1)
    assert why_no_gpu() is None and why_not_here() is None
    machines.report(monkeypatch, machines.RTX_2080)
    assert why_no_gpu() == why_not_here() == why_not(CUDA_0) == OLD


@pytest.mark.parametrize(
    ("hip", "reason"),
    [("6.4", r"cuda:0 is an AMD GPU \(ROCm 6.4\)"), (None, "cuda:0 has compute capability 7.5; .* 8.0 or later")],
)
def test_a_gpu_that_says_nothing_of_itself_is_refused_all_the_same(hip, reason, monkeypatch):
    machines.report(monkeypatch, machines.RTX_2080, hip=hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", machines.broken)
    for answer in (why_not(CUDA_0), why_no_gpu(), why_not_here()):
        assert re.match(reason, answer)


def test_a_device_that_pytorch_cannot_use(monkeypatch):
    machines.report(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", machines.broken)
    assert not kernels_run_on(CUDA_0) and why_not(CUDA_0) == "PyTorch cannot use that device: Invalid device id"


def test_an_answer_does_not_outlive_its_machine(monkeypatch):
    """Until CUDA is initialised, a process may change which GPUs it sees."""
    machines.report(monkeypatch, machines.H100)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert kernels_run_on(CUDA_0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: machines.RTX_2080.capability)
    assert not kernels_run_on(CUDA_0)


@pytest.mark.parametrize("gpus", [(), (machines.MI300X,)])
def test_a_pytorch_for_rocm_says_so_on_every_device(gpus, monkeypatch):
    machines.report(monkeypatch, *gpus, hip="6.4")
    found = "AMD Instinct MI300X (gfx942) is an AMD GPU" if gpus else "this PyTorch is built for AMD GPUs"
    reason = f"{found} (ROCm 6.4), which the kernels do not support; they run on NVIDIA GPUs"
    assert why_not_here() == why_no_gpu() == why_not(torch.device("cpu")) == reason


@pytest.mark.parametrize(("kind", "name"), [("xpu", "Intel GPUs"), ("mps", "Apple GPUs"), ("hpu", "hpu devices")])
def test_other_accelerators(kind, name, monkeypatch):
    machines.report(monkeypatch)
    assert f"the kernels do not support {name}" in why_not(torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    assert "there is no CUDA device, and the kernels do not support" in why_not_here()


@pytest.mark.parametrize(("operation", "argument"), ARGUMENTS)
def test_arguments_on_several_devices_are_named(operation, argument, device):
    arguments = tensors(operation, device)
    first = next(iter(arguments))
    named = next(name for name in arguments if name != first) if argument == first else argument
    arguments[argument] = arguments[argument].to("meta")
    message = f"^{operation}: {named} is on (meta|{device}).*; supported: (one device|a number or a tensor with one)"
    with pytest.raises(UnsupportedInputError, match=message):
        call(operation, arguments)
