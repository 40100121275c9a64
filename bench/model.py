"""The model against transformers', side by side in one run: python -m bench.model [--device cuda] [--json FILE]

Every contender runs the same weights on the same inputs, in turn (A B C, A B C, …), so that a machine whose speed
drifts is fair to all. Reported are the median and the 20th and 80th percentile of the repeats, and of the ratio to
transformers' sdpa, taken repeat by repeat. The last contender is the first one again: their ratio is the noise.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
# Real widths, lengths and images; --layers says how deep (every layer is alike).
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base-patch16-224": (BASE, {**BASE, "image_size": 224, "patch_size": 16}),
    "so400m-patch14-384": (SO400M, {**SO400M, "image_size": 384, "patch_size": 14}),
}
REFERENCE = "transformers sdpa"


def contenders(shape: str, layers: int, device: str, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """transformers' model and ours with the same random weights."""
    import transformers

    import siglip_model

    transformers.logging.set_verbosity_error()
    text, vision = ({**part, "num_hidden_layers": layers} for part in SHAPES[shape])
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    theirs = transformers.SiglipModel(config).eval().to(device, dtype)
    eager = transformers.SiglipModel._from_config(config, attn_implementation="eager").eval().to(device, dtype)
    eager.load_state_dict(theirs.state_dict())
    models: dict[str, torch.nn.Module] = {REFERENCE: theirs, "transformers eager": eager}
    for backend in ("sdpa", "eager", *(("triton",) if device == "cuda" else ())):
        ours = siglip_model.SiglipModel(siglip_model.SiglipConfig.from_dict(config.to_dict()), backend=backend)
        ours.load_state_dict(theirs.state_dict())
        models[f"siglip_model {backend}"] = ours.eval().to(device, dtype)
    models[f"{REFERENCE} again"] = theirs
    return models


def forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs).logits_per_image

    return run


def training_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        return loss.detach()

    return run


DIRECTIONS = {"fwd": forward, "fwd+bwd": training_step}


def interleaved(runs: dict[str, Callable[[], torch.Tensor]], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each repeat of each run, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def circumstances(device: str) -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    import transformers

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip()

    processor = next((line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), "unknown")
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": f"{processor or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def main(
    shapes: Annotated[list[str], typer.Option(help="Model shapes; may be given several times.")] = list(SHAPES),  # noqa: B006
    layers: Annotated[int, typer.Option(help="Layers of each tower.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Images, and as many texts of 64 tokens.")] = 4,
    repeats: Annotated[int, typer.Option()] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="Append the rows here, as JSON lines.")] = None,
) -> None:
    """Time the whole model, forward and training step, against transformers'."""
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown:
        raise typer.BadParameter(f"shapes {', '.join(unknown)}; supported: {', '.join(SHAPES)}")
    shared = circumstances(device)
    print(" · ".join(f"{name} {value}" for name, value in shared.items() if value is not None))
    for shape in shapes:
        models = contenders(shape, layers, device, getattr(torch, dtype))
        size = SHAPES[shape][1]["image_size"]
        inputs = {
            "input_ids": torch.randint(0, 32000, (batch_size, 64), device=device),
            "pixel_values": torch.randn(batch_size, 3, size, size, device=device, dtype=getattr(torch, dtype)),
        }
        for direction, prepare in DIRECTIONS.items():
            print(f"\n{shape}, {layers} layers a tower, batch {batch_size}, {dtype}, {direction}: ms (20-80 %), speed")
            times = interleaved({name: prepare(model, inputs) for name, model in models.items()}, repeats, device)
            for name, measured in times.items():
                low, median, high = percentiles(measured)
                ratios = [theirs / ours for theirs, ours in zip(times[REFERENCE], measured, strict=True)]
                ratio = percentiles(ratios)
                print(
                    f"  {name:26} {median:8.1f} ({low:.1f}-{high:.1f})  {ratio[1]:.3f}x ({ratio[0]:.3f}-{ratio[2]:.3f})"
                )
                row = {
                    "suite": "model",
                    "op": "siglip",
                    "direction": direction,
                    "shape": {"model": shape, "layers": layers, "batch": batch_size},
                    "dtype": dtype,
                    "impl": name,
                    "status": "ok",
                    "ms_median": median,
                    "ms_p20": low,
                    "ms_p80": high,
                    "speed_of_transformers_sdpa": ratio[1],
                    **shared,
                }
                if json_file is not None:
                    json_file.parent.mkdir(parents=True, exist_ok=True)
                    with open(json_file, "a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
