"""`siglip evaluate`: zero-shot accuracy or retrieval of a checkpoint."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from siglip_model.cli import terminal
from siglip_model.cli.options import (
    BackendOption,
    BatchSizeOption,
    CheckpointOption,
    DtypeOption,
    JsonOption,
    errors_in_one_line,
    exit_with,
)
from siglip_model.demo import CHECKPOINT
from siglip_model.text.prompts import TEMPLATE


def evaluate(
    data: Annotated[str, typer.Option(metavar="FOLDER|SHARDS", help="What to evaluate on.", show_default=False)],
    template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help=f"Sentence in which {{}} stands for the class; repeat for several. [default: {TEMPLATE}]",
            show_default=False,
        ),
    ] = None,
    model: CheckpointOption = str(CHECKPOINT),
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda; auto: a GPU if there is one.")] = "auto",
    batch_size: BatchSizeOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint: zero-shot accuracy or retrieval, by the data.

    A folder with a folder of images per class (classes.json may name them) gives zero-shot top-1 and top-5, with the
    prompts of several templates averaged. A captioned folder or shards, as for `siglip train`, give the recall of
    retrieval among 1, 5 and 10. Under torchrun the processes share the work.
    """
    with errors_in_one_line():
        if model.endswith(".onnx"):
            raise ValueError(f"--model is {model!r}; supported: a checkpoint, not a file of `siglip export`")
        from siglip_model.auto import AutoModelForZeroShotImageClassification, AutoProcessor
        from siglip_model.fit import check_fit
        from siglip_model.training.evaluation.run import check_data, evaluate_on
        from siglip_model.training.processes import joined_processes
        from siglip_model.training.settings import naming

        with joined_processes(device) as processes:
            with naming("data"):
                check_data(data)
            processor = AutoProcessor.from_pretrained(model)
            loaded = AutoModelForZeroShotImageClassification.from_pretrained(
                model, backend=backend, dtype=dtype, device_map=processes.device
            )
            check_fit(loaded.config, processor.tokenizer, processor.image_processor, model)
            result = evaluate_on(
                data,
                loaded,
                processor,
                templates=template or None,
                batch_size=batch_size,
                processes=processes,
                on_failure=lambda failure: terminal.say(f"failed: {failure.name}: {failure.reason}"),
            )
            if processes.rank > 0:
                return
        if as_json:
            print(json.dumps(result, indent=2))
        else:
            terminal.print_scores(result)
        exit_with(False, result["failed"], result["images"], result["images"] + result["failed"])
