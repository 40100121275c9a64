"""Outputs are dataclasses and dicts of their fields that are not None, in the order of the class."""

import copy
import io
import json
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.parallel.scatter_gather as scatter_gather
import torch.utils._pytree as pytree
import transformers
from oracle import TINY_TEXT, TINY_VISION, project_model, transformers_model, worst_difference
from torch import Tensor

from siglip_model.outputs import BaseModelOutputWithPooling, ImageClassifierOutput, ModelOutput, SiglipOutput

A, B, C = torch.zeros(2, 3), torch.ones(2), torch.full((1,), 2.0)


def nested() -> SiglipOutput:
    text = BaseModelOutputWithPooling(A, B, hidden_states=(A, C))
    return SiglipOutput(logits_per_image=A, text_embeds=B, text_model_output=text)


def test_fields_by_attribute_name_and_position() -> None:
    output = nested()
    assert isinstance(output, Mapping) and isinstance(output, dict)
    assert list(output) == ["logits_per_image", "text_embeds", "text_model_output"]
    assert output.loss is None and "loss" not in output and output.get("loss", 3) == 3
    assert output.text_embeds is output["text_embeds"] is output[1] is B
    assert output[:2] == (A, B) and len(output) == 3
    with pytest.raises(KeyError):
        output["loss"]
    assert repr(SiglipOutput(C)).startswith("SiglipOutput(loss=tensor([2.]), logits_per_image=None")


def test_what_is_set_later_keeps_the_order() -> None:
    output = BaseModelOutputWithPooling(A, hidden_states=(A,))
    output.pooler_output = B
    assert list(output) == ["last_hidden_state", "pooler_output", "hidden_states"]
    output["pooler_output"] = C
    assert output.pooler_output is C and output[1] is C
    output.update({"attentions": (C,)}, last_hidden_state=B)
    assert list(output) == ["last_hidden_state", "pooler_output", "hidden_states", "attentions"]
    output.pooler_output = None
    assert list(output) == ["last_hidden_state", "hidden_states", "attentions"]
    both = output | {"pooler_output": C}
    assert type(both) is BaseModelOutputWithPooling and both[1] is C and output.pooler_output is None
    assert output.setdefault("pooler_output", B) is B is output.setdefault("pooler_output", C) is output[1]
    output |= {"pooler_output": C}
    assert output[1] is C and list(output) == ["last_hidden_state", "pooler_output", "hidden_states", "attentions"]
    changes = (
        lambda: output.update(other=A),
        lambda: output.__setitem__("other", A),
        lambda: output.setdefault("other", A),
        lambda: output | {"other": A},
    )
    for change in changes:
        with pytest.raises(KeyError, match="other"):
            change()


@pytest.mark.parametrize(
    "items",
    [
        lambda output: dict(output),
        lambda output: list(output.items()),
        lambda output: ((name, output[name]) for name in output),
        lambda output: transformers.modeling_outputs.BaseModelOutputWithPooling(**output),
    ],
    ids=["dict", "pairs", "generator", "output of transformers"],
)
def test_rebuilt_from_items(items: Callable[[ModelOutput], Any]) -> None:
    """As accelerate, nn.DataParallel and pipelines do."""
    output = BaseModelOutputWithPooling(A, hidden_states=(A, C))
    rebuilt = BaseModelOutputWithPooling(items(output))
    assert list(rebuilt) == list(output) and worst_difference(rebuilt, output) == 0
    assert rebuilt.hidden_states is output.hidden_states and rebuilt.pooler_output is None


@pytest.mark.parametrize("value", [[1.0, 2.0], [[1.0, 2.0]], [], [("a", 1, 2)]])
def test_a_list_stays_a_field(value: list[Any]) -> None:
    """Such as a tensor's `tolist()`, on the way to JSON."""
    output = BaseModelOutputWithPooling(last_hidden_state=value)
    assert output.last_hidden_state == value and json.loads(json.dumps(output)).keys() == {"last_hidden_state"}


def through_torch_save(output: ModelOutput) -> ModelOutput:
    file = io.BytesIO()
    torch.save(output, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output)), through_torch_save])
def test_copies_are_independent(twin: Callable[[ModelOutput], Any]) -> None:
    output = nested()
    found = twin(output)
    assert type(found) is SiglipOutput and list(found) == list(output)
    assert type(found.text_model_output) is BaseModelOutputWithPooling
    found.text_model_output.last_hidden_state.add_(1)
    found.loss = C
    assert worst_difference(output, nested()) == 0 and output.loss is None


@pytest.mark.parametrize("twin", [copy.copy, ModelOutput.copy])
def test_a_shallow_copy_shares_tensors_alone(twin: Callable[[ModelOutput], Any]) -> None:
    output = nested()
    found = twin(output)
    assert type(found) is SiglipOutput and found.text_embeds is B
    found.loss = C
    assert output.loss is None


def joined(*tensors: Tensor) -> Tensor:
    return torch.cat([tensor.reshape(1) if tensor.dim() == 0 else tensor for tensor in tensors])


@pytest.fixture
def copies_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.DataParallel's own code, in which only the copies between GPUs are replaced."""

    class OnCpu:
        apply = staticmethod(lambda device, dim, *tensors: joined(*tensors))

    def copies(tensors: list[Tensor], devices: list[int], detach: bool) -> list[list[Tensor]]:
        return [[tensor.detach() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    replicate = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(scatter_gather, "Gather", OnCpu)
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: device)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"return_loss": True, "output_hidden_states": True, "output_attentions": True},
        {"return_loss": True, "output_hidden_states": [0, -1]},
        {"output_hidden_states": True, "return_dict": False},
    ],
    ids=str,
)
def test_models_in_data_parallel(copies_on_the_cpu: None, asked: dict[str, Any]) -> None:
    model = project_model(transformers_model(TINY_TEXT, TINY_VISION), "eager")
    halves = [(torch.randint(0, 99, (2, 7)), torch.randn(2, 3, 48, 48)) for _ in range(2)]
    replicas = torch.nn.parallel.replicate(model, [0, 1])
    gathered = scatter_gather.gather([each(*half, **asked) for each, half in zip(replicas, halves, strict=True)], "cpu")
    alone = [model(*half, **asked) for half in halves]
    assert type(gathered) is type(alone[0])
    expected = pytree.tree_map(lambda *parts: None if parts[0] is None else joined(*parts), *alone)
    assert worst_difference(gathered, expected) == 0.0
    assert all((each.device, each.dtype) == (model.device, model.dtype) for each in replicas)


def test_replicas_train_layers_after_frozen_embeddings(copies_on_the_cpu: None) -> None:
    tower = project_model(transformers_model(TINY_TEXT, TINY_VISION), "sdpa").vision_model.train()
    tower.embeddings.requires_grad_(False)
    tower.activation_checkpointing_enable({"use_reentrant": True})
    torch.nn.parallel.replicate(tower, [0])[0](torch.randn(1, 3, 48, 48)).pooler_output.sum().backward()
    assert tower.encoder.layers[0].mlp.fc1.weight.grad.abs().max() > 0


def test_gathered_by_data_parallel(copies_on_the_cpu: None) -> None:
    halves = [ImageClassifierOutput(torch.tensor(float(number)), A + number) for number in range(2)]
    gathered = scatter_gather.gather(halves, "cpu")
    assert type(gathered) is ImageClassifierOutput
    assert torch.equal(gathered.loss, torch.tensor([0.0, 1.0])) and gathered.logits.shape == (4, 3)


@pytest.mark.parametrize("cls", [BaseModelOutputWithPooling, ImageClassifierOutput, SiglipOutput])
def test_instances_of_transformers_classes_too(cls: type) -> None:
    """Its pipelines and tests ask, and treat other dicts as plain ones."""
    modules = (transformers.modeling_outputs, transformers.models.siglip.modeling_siglip)
    twin = next(vars(module)[cls.__name__] for module in modules if cls.__name__ in vars(module))
    output = cls(C)
    assert isinstance(output, cls) and isinstance(output, twin) and type(output) is cls
    assert isinstance(output, transformers.utils.ModelOutput) and not isinstance(output, torch.Tensor)
    assert output == cls(C) and output != cls() and repr(output) == repr(twin(C))
    assert type(pickle.loads(pickle.dumps(output))) is type(copy.copy(output)) is cls
