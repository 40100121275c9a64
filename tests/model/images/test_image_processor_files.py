"""Image processor files: saving and loading, files of transformers 4 and 5, damaged and missing files."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from image_samples import SIZE, picture
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as TransformersPil

from siglip_model.images.auto import AutoImageProcessor
from siglip_model.images.pillow import SiglipImageProcessorPil
from siglip_model.images.processor import ImageProcessor
from siglip_model.images.tensor import SiglipImageProcessor


class TestFiles:
    @pytest.mark.parametrize("cls", [SiglipImageProcessorPil, SiglipImageProcessor])
    @pytest.mark.parametrize(
        "options",
        [{}, {"size": 30}, {"size": SIZE, "resample": 2, "image_mean": (0.1, 0.2, 0.3), "do_normalize": False}],
    )
    def test_round_trip(self, cls: Any, options: dict[str, Any], tmp_path: Path) -> None:
        processor = cls(**options)
        assert [Path(path).name for path in processor.save_pretrained(tmp_path / "new")] == ["preprocessor_config.json"]
        reference = TransformersPil.from_pretrained(tmp_path / "new")
        again = cls.from_pretrained(tmp_path / "new")
        assert type(AutoImageProcessor.from_pretrained(tmp_path / "new")) is SiglipImageProcessor
        assert type(AutoImageProcessor.from_pretrained(tmp_path / "new", backend=cls.backend)) is cls
        image = picture("RGB")
        expected = processor(image, return_tensors="pt").pixel_values
        assert torch.equal(again(image, return_tensors="pt").pixel_values, expected)
        exact = SiglipImageProcessorPil(**options)(image, return_tensors="pt").pixel_values
        assert torch.equal(reference(image, return_tensors="pt").pixel_values, exact)
        assert repr(again) == repr(processor) and repr(pickle.loads(pickle.dumps(processor))) == repr(processor)

    def test_path_of_a_file(self, tmp_path: Path) -> None:
        settings = SiglipImageProcessorPil(size=SIZE).to_dict()
        (tmp_path / "mine.json").write_text(json.dumps(settings))
        (tmp_path / "nested.json").write_text(json.dumps({"image_processor": settings}))
        for cls in (TransformersPil, AutoImageProcessor, SiglipImageProcessor):
            assert cls.from_pretrained(str(tmp_path / "mine.json")).size == SIZE
        assert SiglipImageProcessor.from_pretrained(tmp_path / "nested.json").size == SIZE

    def test_numpy_numbers(self, tmp_path: Path) -> None:
        options = {"image_mean": np.float32([0.1, 0.2, 0.3]), "rescale_factor": np.float32(0.004), "size": np.int64(9)}
        processor = SiglipImageProcessorPil(**options)
        processor.save_pretrained(tmp_path)
        again = SiglipImageProcessorPil.from_pretrained(tmp_path)
        assert torch.equal(*(one(picture("RGB"), return_tensors="pt").pixel_values for one in (processor, again)))

    def test_files_of_transformers(self, tmp_path: Path) -> None:
        TransformersPil(size=SIZE, image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
        image = picture("RGB")
        expected = TransformersPil.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
        assert torch.equal(
            SiglipImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values, expected
        )
        smaller = SiglipImageProcessorPil.from_pretrained(tmp_path, size={"height": 8, "width": 8})
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
            SiglipImageProcessorPil.from_pretrained(tmp_path),
            TransformersPil.from_pretrained(tmp_path),
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
            "image_processor": {**SiglipImageProcessorPil(size=SIZE).to_dict()},
            "processor_class": "SiglipProcessor",
        }
        (tmp_path / "processor_config.json").write_text(json.dumps(nested))
        assert SiglipImageProcessorPil.from_pretrained(tmp_path).size == SIZE
        SiglipImageProcessorPil().save_pretrained(tmp_path)
        assert SiglipImageProcessorPil.from_pretrained(tmp_path).size == SIZE
        (tmp_path / "processor_config.json").write_text('{"processor_class": "SiglipProcessor"}')
        assert SiglipImageProcessorPil.from_pretrained(tmp_path).size == {"height": 224, "width": 224}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "preprocessor_config"), ("{", "preprocessor_config"), ("[]", "preprocessor_config"),
            ('{"image_processor_type": "CLIPImageProcessor"}', "CLIPImageProcessor"),
            ('{"do_center_crop": true}', "crop_size is None"), ('{"do_pad": 1}', "do_pad is 1"),
            ('{"size": {"height": 3}}', "size"),
        ],
    )  # fmt: skip
    def test_bad_files(self, tmp_path: Path, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / "preprocessor_config.json").write_text(content)
        for load in (SiglipImageProcessorPil.from_pretrained, AutoImageProcessor.from_pretrained):
            with pytest.raises((OSError, ValueError), match=message):
                load(tmp_path)

    def test_unknown_argument(self, tmp_path: Path) -> None:
        SiglipImageProcessorPil().save_pretrained(tmp_path)
        with pytest.raises(TypeError, match="sise"):
            SiglipImageProcessorPil.from_pretrained(tmp_path, sise=3)

    def test_dicts_and_json(self, tmp_path: Path) -> None:
        for cls, theirs in (
            (SiglipImageProcessor, transformers.SiglipImageProcessor),
            (SiglipImageProcessorPil, TransformersPil),
        ):
            options = {"size": SIZE, "do_normalize": None, "do_center_crop": True, "crop_size": 12}
            processor, reference = cls(**options), theirs(**options)
            assert json.loads(processor.to_json_string()) == json.loads(reference.to_json_string())
            assert processor.size.height == 24 and processor.size.shortest_edge is None
            processor.to_json_file(tmp_path / "settings.json")
            for again in (cls.from_json_file(tmp_path / "settings.json"), cls.from_dict(processor.to_dict())):
                assert type(again) is cls and again.to_dict() == processor.to_dict()
                assert again.do_normalize is None
            changed, unused = cls.from_dict(processor.to_dict(), do_pad=True, foo=1, return_unused_kwargs=True)
            assert changed.do_pad is True and unused == {"foo": 1}
            with pytest.raises(TypeError, match="foo"):
                cls.from_dict(processor.to_dict(), foo=1)
            processor.save_pretrained(tmp_path)
            changed, unused = cls.from_pretrained(tmp_path, size=9, foo=1, return_unused_kwargs=True)
            assert changed.size == {"shortest_edge": 9} and unused == {"foo": 1}

    def test_a_subclass_has_its_own_defaults(self) -> None:
        class Small(SiglipImageProcessor):
            size = {"height": 4, "width": 4}  # noqa: RUF012
            do_normalize = False

        assert Small()(picture("RGB"), return_tensors="pt").pixel_values.shape == (1, 3, 4, 4)
        assert Small().do_normalize is False and SiglipImageProcessor().do_normalize is True

    def test_the_caller_s_options_stay_out_of_files(self, tmp_path: Path) -> None:
        processor = SiglipImageProcessor(device="meta", return_tensors="pt", size=SIZE)
        assert processor(picture("RGB")).pixel_values.device.type == "meta"
        processor.save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert not {"device", "return_tensors"} & set(settings)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "device": "meta"}))
        assert SiglipImageProcessor.from_pretrained(tmp_path).device is None


def test_the_base_class_is_abstract() -> None:
    with pytest.raises(NotImplementedError):
        ImageProcessor()(picture("RGB"))
