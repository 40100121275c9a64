"""Which library is imported when, and what happens if it, Triton or a GPU is missing, in new processes."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def run(code):
    """In a process without Triton's interpreter that may import torchvision."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS / "support")))
    result = subprocess.run(
        [sys.executable, "-c", f"import sys, torchvision_operators\n{code}"],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")[:-1]


def test_each_integration_imports_its_library_alone():
    code = (
        "libraries = {'transformers', 'timm', 'open_clip', 'triton'}\n"
        "import siglip_kernels; print(sorted(libraries & set(sys.modules)))\n"
        "import siglip_kernels.integrations; print(sorted(libraries & set(sys.modules)))\n"
        "import siglip_kernels.integrations.timm; print(sorted(libraries & set(sys.modules) - {'triton'}))"
    )
    assert run(code) == ["[]", "[]", "['timm']"]
    code = (
        "import siglip_kernels.integrations.transformers as project\n"
        "print(sorted({'timm', 'open_clip'} & set(sys.modules)), 'transformers' in sys.modules)\n"
        "from transformers import AttentionInterface; print('siglip_triton' in AttentionInterface())"
    )
    assert run(code) == ["[] True", "False"]  # registered on demand


def test_a_missing_library_is_named():
    code = (
        "import importlib\n"
        "for library in ('transformers', 'timm', 'open_clip'):\n"
        "    sys.modules[library] = None\n"
        "    try: importlib.import_module(f'siglip_kernels.integrations.{library}')\n"
        "    except ImportError as error: print(library, error.name)"
    )
    assert run(code) == ["transformers transformers", "timm timm", "open_clip open_clip"]


def test_on_the_cpu_the_model_computes_as_before_until_it_is_moved():
    code = (
        "import torch\n"
        "from tiny_transformers import inputs, siglip\n"
        "from siglip_kernels.integrations.transformers import accelerate, register, restore\n"
        "model, arguments = siglip(layers=2), inputs()\n"
        "before = model(**arguments, return_loss=True)\n"
        "report = accelerate(model)\n"
        "print(str(report).splitlines()[:2])\n"
        "after = model(**arguments, return_loss=True)\n"
        "print(torch.equal(before.logits_per_image, after.logits_per_image), torch.equal(before.loss, after.loss))\n"
        "after.loss.backward()\n"
        "register()\n"
        "restore(model)\n"
        "model.set_attn_implementation('siglip_triton')\n"
        "try: model(**arguments)\n"
        "except RuntimeError as error: print(type(error).__name__, error)"
    )
    shown, same, refusal = run(code)
    assert "modules replaced, to use siglip_kernels where its kernels run" in shown and "modules run on" not in shown
    assert "note: its parameters are on cpu, where the library computes; the kernels are used once it is on" in shown
    assert same == "True True"
    assert refusal.startswith("MissingBackendError attention: q is on cpu")


def test_without_triton_it_says_so_and_changes_nothing():
    code = (
        "sys.modules['triton'] = None\n"
        "import timm, tiny_timm\n"
        "from siglip_kernels.integrations.timm import accelerate, restore\n"
        "model = tiny_timm.tower()\n"
        "try: accelerate(model)\n"
        "except RuntimeError as error: print(type(error).__name__, error)\n"
        "restore(model); print(type(model) is timm.models.vision_transformer.VisionTransformer)"
    )
    refusal, same = run(code)
    assert refusal == "MissingBackendError accelerate: the kernels need Triton, which is not installed"
    assert same == "True"
