"""`siglip demo`: zero-shot classification of the bundled images."""

from __future__ import annotations

import json

from siglip_model.cli import terminal
from siglip_model.cli.options import (
    GOOGLE_EXAMPLE,
    BackendOption,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PlotOption,
    TemplateOption,
    errors_in_one_line,
    load_classifier,
)
from siglip_model.demo import CHECKPOINT, PICTURES
from siglip_model.images.files import load_image
from siglip_model.text.prompts import TEMPLATE


def demo(
    template: TemplateOption = TEMPLATE,
    model: ModelOption = str(CHECKPOINT),
    backend: BackendOption = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    batch_size: BatchSizeOption = 16,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try zero-shot classification on eight bundled images."""
    with errors_in_one_line():
        from siglip_model import plot as plotting
        from siglip_model.demo.classify import classify_demo_pictures, ten_way_score

        if plot is not None and (problem := plotting.plot_problem(plot)):
            raise ValueError(f"--plot: {problem}")
        classifier = load_classifier(model, backend, dtype, device)
        results = classify_demo_pictures(classifier, PICTURES, template, batch_size)
        right = sum(result["right"] for result in results)
        if plot is not None:
            rows = [
                plotting.PlotRow(load_image(entry["image"]), entry["name"], entry["predictions"][:3])
                for entry in results
            ]
            plotting.plot_predictions(rows, plot)
            terminal.say(f"wrote {plot}")
        if as_json:
            print(json.dumps({"right": right, "of": len(results), "pictures": results}, indent=2))
            return
        terminal.print_demo(results, right)
        if model == str(CHECKPOINT):
            score = ten_way_score(CHECKPOINT)
            measured = (
                ""
                if score is None
                else f" On all images of that design it ranks the right name first among ten in {score:.1%}."
            )
            print(f"This small model was not trained on the design of these images.{measured}")
        print(f"With a Google checkpoint: {GOOGLE_EXAMPLE}")
