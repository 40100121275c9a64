"""`load`: the towers of an exported file in ONNX Runtime, with the methods of a SiglipModel."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from siglip_kernels.errors import unsupported
from siglip_model.auto import AutoConfig
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.onnx import signed
from siglip_model.onnx.file import INPUTS, INT8, METADATA, OUTPUTS, imported
from siglip_model.onnx.weights import find_weights, read_tensor
from siglip_model.outputs import BaseModelOutputWithPooling


class OnnxModel:
    """What `load` returns; it takes the place of a SiglipModel in `pipeline`, `embed_images` and `search`.

    config: the configuration of the exported model. precision: "float32" or "int8". towers: "vision", "text" or both.
    logit_scale, logit_bias: as in SiglipModel; the former is the logarithm of the temperature.
    """

    backend = "onnxruntime"
    device = torch.device("cpu")
    dtype = torch.float32  # of inputs and outputs
    training = False

    def __init__(self, path: str | os.PathLike[str], num_threads: int | None = None) -> None:
        """Arguments and errors: see `load`."""
        onnx = imported("onnx")
        imported("onnxruntime")
        self.path = Path(path)
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; supported: a whole number from 1, or None")
        self.num_threads = num_threads
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        try:
            self._graphs = onnx.load(self.path, load_external_data=False)
        except Exception as error:  # protobuf's
            raise CheckpointError(f"{self.path} is not an ONNX file ({error})") from error
        about = {entry.key: entry.value for entry in self._graphs.metadata_props}
        if METADATA not in about:
            raise CheckpointError(f"{self.path} was not written by `siglip export`; supported: files that were")
        settings = json.loads(about[METADATA])
        content = settings["config"]
        self.config: Any = AutoConfig.classes[content["model_type"]].from_dict(content)
        self.precision: str = settings["precision"]
        self.logit_scale, self.logit_bias = (torch.tensor(settings[name]) for name in ("logit_scale", "logit_bias"))
        outputs = {each.name for each in self._graphs.graph.output}
        self.towers = tuple(tower for tower, name in OUTPUTS.items() if name in outputs)
        self._folder = find_weights(self._graphs, self.path)

    def __repr__(self) -> str:
        return f"OnnxModel({str(self.path)!r}, precision={self.precision!r}, towers={self.towers})"

    def __getstate__(self) -> dict[str, Any]:
        """All but the sessions, which a copy creates again from the file."""
        return {name: value for name, value in vars(self).items() if name != "_sessions"}

    def eval(self) -> Self:
        """Nothing: the model is for inference."""
        return self

    def to(self, device: str | torch.device) -> Self:
        """Raises UnsupportedInputError for another device than the CPU."""
        if torch.device(device).type != "cpu":
            raise unsupported("ONNX", "device", f"is {device}", "cpu; other devices run the checkpoint itself")
        return self

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """pixel_values: floating point (B, C, H, W). `pooler_output`: float32 (B, width), not normalised.

        Raises UnsupportedInputError for other shapes and where the file has no vision tower, as for all arguments.
        """
        vision = self.config.vision_config
        shape = (vision.num_channels, vision.image_size, vision.image_size)
        if tuple(pixel_values.shape[1:]) != shape or not pixel_values.is_floating_point():
            got = f"has shape {tuple(pixel_values.shape)} and dtype {pixel_values.dtype}"
            raise unsupported("ONNX", "pixel_values", got, f"floating point (batch, {', '.join(map(str, shape))})")
        return self._run("vision", pixel_values.float())

    def get_text_features(self, input_ids: Tensor) -> BaseModelOutputWithPooling:
        """input_ids: integers (B, L), L up to max_position_embeddings. `pooler_output`: float32 (B, width)."""
        text = self.config.text_config
        most = text.max_position_embeddings
        if input_ids.dim() != 2 or not 1 <= input_ids.shape[1] <= most or input_ids.is_floating_point():
            got = f"has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}"
            raise unsupported("ONNX", "input_ids", got, f"integers (batch, 1 to {most} tokens)")
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < text.vocab_size:
            got = f"reaches from {int(input_ids.min())} to {int(input_ids.max())}"
            raise unsupported("ONNX", "input_ids", got, f"ids from 0 to {text.vocab_size - 1}")
        return self._run("text", input_ids.long())

    def logits_per_text(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """t·⟨text, image⟩ + b: (T, I) from unit embeddings (T, D) and (I, D). The sigmoid of it is a probability."""
        return text_embeds @ image_embeds.T * self.logit_scale.exp() + self.logit_bias

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the file, for a digest of the model."""
        for weight in self._graphs.graph.initializer:
            yield weight.name, torch.from_numpy(read_tensor(weight, self._folder))

    def _run(self, tower: str, given: Tensor) -> BaseModelOutputWithPooling:
        if tower not in self.towers:
            raise unsupported(
                "ONNX", "towers", f"of {self.path} are {', '.join(self.towers)}", f"an export with the {tower} tower"
            )
        (features,) = self._sessions[tower].run(None, {INPUTS[tower]: given.detach().cpu().contiguous().numpy()})
        return BaseModelOutputWithPooling(pooler_output=torch.from_numpy(features))

    @functools.cached_property
    def _sessions(self) -> Sessions:
        give_sign = self.precision == INT8 and signed.faster()
        return Sessions(self._graphs, self._folder, self.num_threads, give_sign)


class Sessions(dict[str, Any]):
    """Tower -> its InferenceSession, created when it is first used."""

    def __init__(self, graphs: Any, folder: Path, num_threads: int | None, give_sign: bool) -> None:
        super().__init__()
        self._graphs, self._folder, self._num_threads, self._give_sign = graphs, folder, num_threads, give_sign

    def __missing__(self, tower: str) -> Any:
        onnxruntime = imported("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._num_threads or torch.get_num_threads()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        options.log_severity_level = 3  # errors
        one = imported("onnx.utils").Extractor(self._graphs).extract_model([INPUTS[tower]], [OUTPUTS[tower]])
        try:
            if self._give_sign:
                signed.give_sign(one, self._folder)
            session = onnxruntime.InferenceSession(one.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # pybind11's, one class per status
            raise CheckpointError(f"{self._folder}: the {tower} tower cannot be loaded ({error})") from error
        return self.setdefault(tower, session)


def load(path: str | os.PathLike[str], *, num_threads: int | None = None) -> OnnxModel:
    """A model that `export` or `siglip export` wrote, in ONNX Runtime on the CPU.

    path: the file .onnx, beside which its weights, .onnx.data, lie; both may be links. num_threads: of each operation;
    by default as many as PyTorch uses. Each tower is loaded when it is first used.
    Raises FileNotFoundError, CheckpointError (a ValueError) for another or a damaged file, ValueError for num_threads
    below 1, and ImportError without the packages of the extra `onnx`.
    """
    return OnnxModel(path, num_threads)
