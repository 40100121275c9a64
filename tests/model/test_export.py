"""torch.export, torch.jit.trace and AOTInductor: the exported program returns what the model returns, for batches of
another size. ONNX: test_onnx.py."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from export_cases import CALLS, COMPARED, EXPORTED, Method, inputs, model
from oracle import leaves, worst_difference
from torch import Tensor
from torch.export import Dim

from siglip_kernels import SigLipLoss
from siglip_model.outputs import BaseModelOutputWithPooling

BACKENDS = ["eager", "sdpa", "triton"]
TOLERANCE = 1e-5


def proofs(*names: str) -> list[Any]:
    """Every name with every backend; by default each appears once, and the rest is thorough."""
    pairs = [(name, backend) for name in names for backend in BACKENDS]
    default = [(name, BACKENDS[(number + 1) % 3]) for number, name in enumerate(names)]
    return [pytest.param(*pair, marks=[] if pair in default else pytest.mark.thorough) for pair in pairs]


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU, in Triton's interpreter")


def exported(model: Any, arguments: dict[str, Tensor], **options: Any) -> torch.export.ExportedProgram:
    batch = Dim("batch")
    return torch.export.export(model, (), arguments, dynamic_shapes={name: {0: batch} for name in arguments}, **options)


def reloaded(program: torch.export.ExportedProgram) -> Any:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("kind, backend", proofs(*CALLS))
def test_torch_export(kind: str, backend: str) -> None:
    original, given = model(kind, backend), inputs(kind, COMPARED)
    program = exported(original, inputs(kind, EXPORTED))
    found, expected = reloaded(program)(**given), original(**given)
    assert type(found) is type(expected)
    assert worst_difference(found, expected) < TOLERANCE
    kernels = {str(node.target) for node in program.graph.nodes if "siglip_kernels" in str(node.target)}
    assert bool(kernels) == (backend == "triton")  # an explicit backend never falls back


@pytest.mark.parametrize("kind, backend", proofs("SiglipModel"))
def test_torch_export_by_dynamo(kind: str, backend: str) -> None:
    original, given = model(kind, backend), inputs(kind, COMPARED)
    found = reloaded(exported(original, inputs(kind, EXPORTED), strict=True))(**given)
    assert worst_difference(found, original(**given)) < TOLERANCE


METHODS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "text features": ("get_text_features", ["input_ids", "attention_mask"], {}),
    "loss": ("forward", ["input_ids", "pixel_values"], {"return_loss": True}),
    "image features": ("get_image_features", ["pixel_values"], {"interpolate_pos_encoding": True}),
    "everything": (
        "forward",
        ["input_ids", "pixel_values"],
        {"output_hidden_states": True, "output_attentions": True},
    ),
}


@pytest.mark.parametrize("case, backend", proofs(*METHODS))
def test_methods_and_options(case: str, backend: str) -> None:
    name, arguments, options = METHODS[case]
    original = Method(model("SiglipModel", backend), name, **options)
    few, more = (tuple(inputs("SiglipModel", size)[each] for each in arguments) for size in (EXPORTED, COMPARED))
    batch = Dim("batch")
    program = torch.export.export(original, few, dynamic_shapes=(tuple({0: batch} for _ in few),))
    assert worst_difference(reloaded(program)(*more), original(*more)) < TOLERANCE


def test_texts_and_images_of_any_size() -> None:
    text = model("SiglipTextModel", "sdpa")
    sizes = {"input_ids": {1: Dim("tokens", max=16)}}
    program = torch.export.export(text, (), inputs("SiglipTextModel", 2), dynamic_shapes=sizes)
    short = inputs("SiglipTextModel", 2, tokens=9)
    assert worst_difference(program.module()(**short), text(**short)) < TOLERANCE
    vision = Method(model("SiglipVisionModel", "sdpa"), "forward", interpolate_pos_encoding=True)
    rows, columns = Dim("rows", min=2, max=9), Dim("columns", min=2, max=9)
    size = {2: 16 * rows, 3: 16 * columns}
    program = torch.export.export(vision, (torch.randn(1, 3, 64, 80),), dynamic_shapes=((size,),))
    other = torch.randn(1, 3, 96, 48)
    assert worst_difference(program.module()(other), vision(other)) < TOLERANCE


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_the_loss_module(backend: str) -> None:
    loss = SigLipLoss(backend=backend)

    def arguments(pairs: int) -> tuple[Tensor, ...]:
        return *torch.randn(2, pairs, 16, generator=torch.Generator().manual_seed(pairs)), torch.tensor(2.0)

    batch = Dim("batch")
    program = torch.export.export(loss, arguments(4), dynamic_shapes=({0: batch}, {0: batch}, None))
    torch.testing.assert_close(reloaded(program)(*arguments(7)), loss(*arguments(7)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind, backend", proofs(*CALLS))
def test_torch_jit_trace(kind: str, backend: str) -> None:
    """A traced program returns a dict of tensors, so the nested output of SiglipModel has to be tuples."""
    original, given = model(kind, backend), inputs(kind, COMPARED)
    if kind == "SiglipModel":
        original.config.return_dict = False
    traced = torch.jit.trace(original, example_kwarg_inputs=inputs(kind, EXPORTED), strict=False, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert worst_difference(torch.jit.load(file)(**given), original(**given)) < TOLERANCE


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind, backend", [("SiglipTextModel", "sdpa"), ("SiglipForImageClassification", "eager"), ("SiglipModel", "triton")]
)
def test_aot_inductor(kind: str, backend: str, tmp_path: Path) -> None:
    """Its C++ takes a minute to compile."""
    original, given = model(kind, backend), inputs(kind, COMPARED)
    program = exported(original, inputs(kind, EXPORTED))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    found = torch._inductor.aoti_load_package(package)(**given)
    assert worst_difference(found, original(**given)) < TOLERANCE


def test_the_program_of_a_fresh_process(tmp_path: Path) -> None:
    """The outputs' classes are known once siglip_model.outputs is imported."""
    torch.export.save(exported(model("SiglipTextModel", "sdpa"), inputs("SiglipTextModel", 2)), tmp_path / "text.pt2")
    load = (
        "import sys, torch, siglip_model.outputs\n"
        "out = torch.export.load(sys.argv[1]).module()(input_ids=torch.zeros(4, 16, dtype=torch.long))\n"
        "print(type(out).__name__, tuple(out.pooler_output.shape))"
    )
    found = subprocess.run([sys.executable, "-c", load, tmp_path / "text.pt2"], capture_output=True, text=True)
    assert found.stdout.strip() == "BaseModelOutputWithPooling (4, 64)", found.stderr


def test_outputs_are_leaves_by_name() -> None:
    output = BaseModelOutputWithPooling(torch.ones(1), hidden_states=(torch.zeros(1), torch.zeros(2)))
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(output)[0]]
    assert paths == ["['last_hidden_state']", "['hidden_states'][0]", "['hidden_states'][1]"]
    doubled = pytree.tree_map(lambda tensor: 2 * tensor, output)
    assert type(doubled) is BaseModelOutputWithPooling and leaves(doubled).keys() == leaves(output).keys()
