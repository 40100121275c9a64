"""Copies of every public object: deepcopy, pickle, torch.save, the pickler of multiprocessing, and averaged weights."""

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from oracle import TINY_TEXT, TINY_VISION
from PIL import Image
from tiny_checkpoint import shared_tiny_checkpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import siglip_model
from siglip_kernels import MissingBackendError, SigLipLoss, UnsupportedInputError
from siglip_kernels.integrations.report import Replaced, Report
from siglip_model import backends
from siglip_model.checkpoints.errors import CheckpointError
from siglip_model.embed.file import EmbeddingFileError, Embeddings
from siglip_model.embed.run import EmbeddingInterrupted, EmbedSummary
from siglip_model.images.files import UnreadableImageError
from siglip_model.outputs import BaseModelOutputWithPooling, SiglipOutput
from siglip_model.training.batch import Batch
from siglip_model.training.optimizer import make_optimizers
from siglip_model.training.settings import TrainingConfig

CONFIG = siglip_model.SiglipConfig(
    text_config={**TINY_TEXT, "num_hidden_layers": 1},
    vision_config={**TINY_VISION, "num_hidden_layers": 1},
    num_labels=3,
)
SUMMARY = EmbedSummary("out", 3, 1, 0, 3, 8, False, 0.5)


def model(**kwargs: Any) -> siglip_model.SiglipModel:
    torch.manual_seed(0)
    return siglip_model.SiglipModel(copy.deepcopy(CONFIG), **kwargs).eval()  # a model writes its backend into its own


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(32).view(2, 16), "pixel_values": torch.linspace(-1, 1, 13824).view(2, 3, 48, 48)}


def through_torch_save(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


PICKLES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": through_torch_save,
    "multiprocessing": lambda thing: pickle.loads(bytes(ForkingPickler.dumps(thing))),
}
COPIES = {"deepcopy": copy.deepcopy, **PICKLES}


OBJECTS: dict[str, Callable[[Path], Any]] = {
    **{f"model, {name}": lambda _, name=name: model(backend=name) for name in ("eager", "sdpa", "triton", "auto")},
    "text tower": lambda _: model().text_model,
    "vision tower": lambda _: model().vision_model,
    "classifier": lambda _: siglip_model.SiglipForImageClassification(CONFIG),
    "configuration": lambda _: copy.deepcopy(CONFIG),
    "text configuration": lambda _: siglip_model.SiglipTextConfig(),
    "vision configuration": lambda _: siglip_model.SiglipVisionConfig(),
    "processor": lambda folder: siglip_model.AutoProcessor.from_pretrained(folder),
    "tokenizer": lambda folder: siglip_model.SiglipTokenizer.from_pretrained(folder),
    "image processor": lambda folder: siglip_model.SiglipImageProcessorPil.from_pretrained(folder),
    "fast image processor": lambda folder: siglip_model.SiglipImageProcessor.from_pretrained(folder),
    "pipeline": lambda folder: siglip_model.pipeline("zero-shot-image-classification", model=folder),
    "batch of the processor": lambda folder: siglip_model.AutoProcessor.from_pretrained(folder)(
        text=["a cat"], images=Image.new("RGB", (40, 40)), return_tensors="pt"
    ),
    "output": lambda _: SiglipOutput(torch.ones(1), vision_model_output=BaseModelOutputWithPooling(torch.ones(2))),
    "loss": lambda _: SigLipLoss(dist_impl="gather", chunk_size=3),
    "optimizer": lambda _: make_optimizers(model(), TrainingConfig(steps=200))[0],
    "training configuration": lambda _: TrainingConfig(steps=200),
    "training batch": lambda _: Batch(**inputs()),
    "averaged weights": lambda _: AveragedModel(model()),
    "embeddings": lambda _: Embeddings(torch.ones(1, 2), ["a.png"], {"b.png": "damaged"}, {"model": "tiny"}),
    "summary": lambda _: SUMMARY,
    "report": lambda _: Report("SiglipModel", "transformers", (Replaced("mlp", "MLP", ("mlp",)),), ()),
}


def mutable_parts(thing: Any, seen: dict[int, Any] | None = None) -> dict[int, Any]:
    """Everything that an object is made of and that can be changed, by its address."""
    seen = {} if seen is None else seen
    if isinstance(thing, (type, backends.Backend)) or (callable(thing) and not hasattr(thing, "__dict__")):
        return seen
    if isinstance(thing, Tensor):
        seen[thing.untyped_storage().data_ptr()] = thing
    elif isinstance(thing, np.ndarray):
        seen[thing.ctypes.data] = thing
    elif id(thing) not in seen:
        if isinstance(thing, (dict, list, set)) and thing:
            seen[id(thing)] = thing
        for part in _parts(thing):
            mutable_parts(part, seen)
    return seen


def _parts(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, (list, set, tuple)):
        yield from thing
    module = type(thing).__module__
    if module.startswith(("siglip_", "torch.nn", "torch.optim")) and hasattr(thing, "__dict__"):
        yield from vars(thing).values()


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, nn.Module):
        return repr(found) == repr(expected) and same(found.state_dict(), expected.state_dict())
    if isinstance(expected, torch.optim.Optimizer):
        return same(found.state_dict(), expected.state_dict())
    if hasattr(expected, "to_dict"):
        return found.to_dict() == expected.to_dict()
    if dataclasses.is_dataclass(expected):
        return same(vars(found), vars(expected))
    if hasattr(expected, "__dict__"):
        return vars(found).keys() == vars(expected).keys()
    return found == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.mark.parametrize("name", OBJECTS)
def test_copies_are_equal_and_independent(name: str, folder: Path) -> None:
    thing = OBJECTS[name](folder)
    for how, twin in COPIES.items():
        found = twin(thing)
        assert type(found) is type(thing) and same(found, thing), how
        if how != "multiprocessing":  # which moves tensors to shared memory
            shared = mutable_parts(found).keys() & mutable_parts(thing).keys()
            assert not shared, (how, [mutable_parts(thing)[each] for each in shared])
    assert type(copy.copy(thing)) is type(thing)


def test_the_walk_finds_what_is_shared() -> None:
    original = model()
    shallow = copy.copy(original)
    assert len(mutable_parts(shallow).keys() & mutable_parts(original).keys()) > 40
    assert len(mutable_parts(OBJECTS["embeddings"](Path())).keys()) == 4


@pytest.mark.parametrize("backend", ["eager", "sdpa", "triton"])
def test_copies_of_models_compute_with_the_same_backend(backend: str) -> None:
    original = model(backend=backend)
    expected = original(**inputs()).logits_per_image
    for twin in (copy.deepcopy, PICKLES["pickle"]):
        found = twin(original)
        assert found.ops is original.ops is backends.BACKENDS[backend]
        assert torch.equal(found(**inputs()).logits_per_image, expected)
        with torch.no_grad():
            found.logit_bias.add_(1)
        assert torch.equal(original(**inputs()).logits_per_image, expected)


def test_a_backend_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = backends.replace(backends.SDPA, name="mine", lacks=lambda: None)
    monkeypatch.setitem(backends.BACKENDS, "mine", mine)
    original = model(backend="mine")
    assert copy.deepcopy(original).ops is mine is copy.deepcopy(mine)
    pickled = pickle.dumps(original)
    assert pickle.loads(pickled).ops is mine
    monkeypatch.delitem(backends.BACKENDS, "mine")
    with pytest.raises(ValueError, match="pickled model has the backend 'mine'; supported: eager, sdpa"):
        pickle.loads(pickled)


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto takes triton there")
def test_auto_is_resolved_where_a_pickle_is_loaded() -> None:
    original = model(backend="auto")
    original._backend = backends.TRITON  # as on a GPU
    original._apply_backend()
    assert pickle.loads(pickle.dumps(original)).backend == "sdpa"


@pytest.mark.parametrize(
    "error",
    [
        EmbeddingInterrupted(SUMMARY),
        EmbeddingFileError("damaged"),
        CheckpointError("damaged"),
        UnreadableImageError("damaged"),
        UnsupportedInputError("x: y"),
        MissingBackendError("no GPU"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_reach_another_process(error: BaseException) -> None:
    for twin in COPIES.values():
        found = twin(error)
        assert type(found) is type(error) and str(found) == str(error) and vars(found) == vars(error)


# Process groups ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A group other than the default one."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def with_group(group: Any) -> siglip_model.SiglipModel:
    made = model()
    made.use_global_loss(group=group, dist_impl="gather")
    return made


def test_copies_share_the_group(group: Any) -> None:
    for chosen in (group, dist.group.WORLD):
        original = with_group(chosen)
        expected = original(**inputs(), return_loss=True).loss
        averaged = AveragedModel(original).module
        for found in (copy.deepcopy(original), copy.deepcopy(original.global_loss), copy.copy(original), averaged):
            loss = found if isinstance(found, SigLipLoss) else found.global_loss
            assert loss.group is chosen and loss.dist_impl == "gather"
        assert torch.equal(averaged(**inputs(), return_loss=True).loss, expected)
        shared = mutable_parts(copy.deepcopy(original)).keys() & mutable_parts(original).keys()
        assert not shared
        twin = copy.deepcopy(original)
        twin.use_global_loss(False)
        assert original.global_loss is not None and original.global_loss.group is chosen


@pytest.mark.parametrize("how", PICKLES)
def test_pickles_name_a_group_and_restore_the_default(how: str, group: Any) -> None:
    original = with_group(dist.group.WORLD)
    found = PICKLES[how](original)
    assert found.global_loss.group is None and found.global_loss.dist_impl == "gather"
    assert original.global_loss is not None and original.global_loss.group is dist.group.WORLD
    expected = original(**inputs(), return_loss=True).loss
    assert torch.equal(found(**inputs(), return_loss=True).loss, expected)
    for thing in (with_group(group), SigLipLoss(group=group)):
        with pytest.raises(UnsupportedInputError, match=r"SigLipLoss: group is .* cannot be pickled; supported: .*"):
            PICKLES[how](thing)
