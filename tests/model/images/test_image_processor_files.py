"""Image processor files: saving and loading, files of transformers 4 and 5, damaged and missing files."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_samples import SIZE, picture
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from siglip_model.images.auto import load_image_processor
from siglip_model.images.fast import SiglipImageProcessorFast
from siglip_model.images.pillow import SiglipImageProcessor
from siglip_model.images.processor import ImageProcessor


class TestFiles:
    @pytest.mark.parametrize("cls", [SiglipImageProcessor, SiglipImageProcessorFast])
    @pytest.mark.parametrize(
        "options",
        [{}, {"size": 30}, {"size": SIZE, "resample": 2, "image_mean": (0.1, 0.2, 0.3), "do_normalize": False}],
    )
    def test_round_trip(self, cls: Any, options: dict[str, Any], tmp_path: Path) -> None:
        processor = cls(**options)
        assert [Path(path).name for path in processor.save_pretrained(tmp_path / "new")] == ["preprocessor_config.json"]
        reference = SiglipImageProcessorPil.from_pretrained(tmp_path / "new")
        again = cls.from_pretrained(tmp_path / "new")
        assert type(load_image_processor(tmp_path / "new")) is cls
        image = picture("RGB")
        expected = processor(image, return_tensors="pt").pixel_values
        assert torch.equal(again(image, return_tensors="pt").pixel_values, expected)
        exact = SiglipImageProcessor(**options)(image, return_tensors="pt").pixel_values
        assert torch.equal(reference(image, return_tensors="pt").pixel_values, exact)
        assert repr(again) == repr(processor) and repr(pickle.loads(pickle.dumps(processor))) == repr(processor)

    def test_numpy_numbers(self, tmp_path: Path) -> None:
        options = {"image_mean": np.float32([0.1, 0.2, 0.3]), "rescale_factor": np.float32(0.004), "size": np.int64(9)}
        processor = SiglipImageProcessor(**options)
        processor.save_pretrained(tmp_path)
        again = SiglipImageProcessor.from_pretrained(tmp_path)
        assert torch.equal(*(one(picture("RGB"), return_tensors="pt").pixel_values for one in (processor, again)))

    def test_files_of_transformers(self, tmp_path: Path) -> None:
        SiglipImageProcessorPil(size=SIZE, image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
        image = picture("RGB")
        expected = SiglipImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
        assert torch.equal(
            SiglipImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values, expected
        )
        smaller = SiglipImageProcessor.from_pretrained(tmp_path, size={"height": 8, "width": 8})
        assert smaller(image, return_tensors="pt").pixel_values.shape == (1, 3, 8, 8)

    def test_file_of_transformers_4(self, tmp_path: Path) -> None:
        settings = {
            "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_processor_type": "SiglipImageProcessor", "image_std": [0.5] * 3,
            "processor_class": "SiglipProcessor", "resample": 3, "rescale_factor": 0.00392156862745098, "size": SIZE,
        }  # fmt: skip
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        processor, reference = (
            SiglipImageProcessor.from_pretrained(tmp_path),
            SiglipImageProcessorPil.from_pretrained(tmp_path),
        )
        assert torch.equal(*(one(picture("RGB"), return_tensors="pt").pixel_values for one in (processor, reference)))
        # null means the default, so other modes are converted; transformers fails on their number of channels
        assert torch.equal(
            *(
                processor(image, return_tensors="pt").pixel_values
                for image in (picture("L"), picture("L").convert("RGB"))
            )
        )

    def test_nested_settings_take_precedence(self, tmp_path: Path) -> None:
        nested = {
            "image_processor": {**SiglipImageProcessor(size=SIZE).to_dict()},
            "processor_class": "SiglipProcessor",
        }
        (tmp_path / "processor_config.json").write_text(json.dumps(nested))
        assert SiglipImageProcessor.from_pretrained(tmp_path).size == SIZE
        SiglipImageProcessor().save_pretrained(tmp_path)
        assert SiglipImageProcessor.from_pretrained(tmp_path).size == SIZE
        (tmp_path / "processor_config.json").write_text('{"processor_class": "SiglipProcessor"}')
        assert SiglipImageProcessor.from_pretrained(tmp_path).size == {"height": 224, "width": 224}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "preprocessor_config"), ("{", "preprocessor_config"), ("[]", "preprocessor_config"),
            ('{"image_processor_type": "CLIPImageProcessor"}', "CLIPImageProcessor"),
            ('{"do_center_crop": true}', "do_center_crop"), ('{"size": {"height": 3}}', "size"),
        ],
    )  # fmt: skip
    def test_bad_files(self, tmp_path: Path, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / "preprocessor_config.json").write_text(content)
        for load in (SiglipImageProcessor.from_pretrained, load_image_processor):
            with pytest.raises((OSError, ValueError), match=message):
                load(tmp_path)

    def test_unknown_argument(self, tmp_path: Path) -> None:
        SiglipImageProcessor().save_pretrained(tmp_path)
        with pytest.raises(TypeError, match="sise"):
            SiglipImageProcessor.from_pretrained(tmp_path, sise=3)


def test_the_base_class_is_abstract() -> None:
    with pytest.raises(NotImplementedError):
        ImageProcessor()(picture("RGB"))
