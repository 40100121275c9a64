"""A small SigLIP of transformers for checkpoint tests, and how its files are changed."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

HIDDEN = 32
TENSOR = "vision_model.encoder.layers.1.mlp.fc1.weight"
LAYERS = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {"SiglipTextModel": "text_model", "SiglipVisionModel": "vision_model"}


def small_config(**kwargs):
    text = {**LAYERS, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 1}
    vision = {**LAYERS, "image_size": 32, "patch_size": 16}
    return transformers.SiglipConfig(text_config=text, vision_config=vision, **kwargs)


def copy_of(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def rewrite(folder, change):
    """Let `change` alter the dict of tensors in model.safetensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_same_tensors(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
