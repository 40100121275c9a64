"""Importing costs little, needs neither Triton nor a GPU, and changes nothing."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_without_triton() -> None:
    run(
        "import sys; sys.modules['triton'] = None\n"
        "import siglip_kernels, siglip_model\n"
        "for name in siglip_model.__all__: getattr(siglip_model, name)\n"
        "for name in siglip_kernels.__all__: getattr(siglip_kernels, name)"
    )


def test_nothing_heavy_and_no_device_is_touched() -> None:
    heavy = ["triton", "transformers", "matplotlib", "sentencepiece", "tokenizers", "huggingface_hub", "typer", "PIL"]
    loaded = run(
        "import sys, torch; before = set(sys.modules)\n"
        "import siglip_kernels, siglip_model\n"
        f"print([name for name in {heavy} if name in set(sys.modules) - before], torch.cuda.is_initialized())"
    )
    assert loaded == "[] False"


def test_import_takes_at_most_what_torch_takes_and_a_third_of_a_second() -> None:
    """In processor time, which a busy machine does not stretch; one of three attempts. On machines where importing
    PyTorch takes longer than 1.5 s, at most a fifth more than that."""
    code = (
        "import time; start = time.process_time()\n"
        "import torch; middle = time.process_time()\n"
        "import siglip_kernels, siglip_model; end = time.process_time()\n"
        "print((end - middle) / max(1.5, middle - start))"
    )
    assert any(float(run(code)) < 0.2 for _ in range(3))
