"""Search by text and image against transformers' probabilities, and files of another model."""

import pytest
import torch
import transformers
from PIL import Image
from tiny_checkpoint import random_image, save_tiny_checkpoint, shared_tiny_checkpoint

from siglip_model import pipeline, search
from siglip_model.embed import EmbeddingFileError, embed_images, load_embeddings
from siglip_model.retrieval import Searcher

TEXTS = ["a red bicycle", "2 cats"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return pipeline(model=checkpoint, device="cpu")


@pytest.fixture(scope="module")
def photos(classifier, checkpoint, tmp_path_factory):
    """Two files, of 12 and 5 images."""
    folder = tmp_path_factory.mktemp("photos")
    files = []
    for name, numbers in (("a", range(12)), ("b", range(12, 17))):
        (folder / name).mkdir()
        for number in numbers:
            random_image(number).save(folder / name / f"{number}.png")
        files.append(folder / f"{name}.safetensors")
        embed_images(
            classifier.model, classifier.image_processor, [folder / name], files[-1], model_name=str(checkpoint)
        )
    return files


def test_scores_are_transformers_probabilities(photos, checkpoint):
    results = search(photos, TEXTS, top=17, device="cpu")
    assert [(found.query, found.kind) for found in results] == [(text, "text") for text in TEXTS]
    files = [file for path in photos for file in load_embeddings(path).files]
    model = transformers.SiglipModel.from_pretrained(checkpoint)
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    images = [Image.open(file).convert("RGB") for file in files]
    inputs = processor(text=TEXTS, images=images, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = torch.sigmoid(model(**inputs).logits_per_text)
    for row, found in enumerate(results):
        assert sorted(hit.name for hit in found.hits) == sorted(files)
        scores = torch.tensor([hit.score for hit in found.hits])
        assert (scores.diff() <= 0).all()
        torch.testing.assert_close(
            scores, expected[row, [files.index(hit.name) for hit in found.hits]], atol=1e-5, rtol=1e-4
        )


def test_an_image_finds_itself_and_has_no_score(photos, classifier):
    file = load_embeddings(photos[1]).files[2]
    found_text, found = search(photos, "2 cats", image=file, top=3, model=classifier)
    assert (found_text.kind, found.kind, len(found.hits)) == ("text", "image", 3)
    assert found.hits[0].name == file and abs(found.hits[0].cosine - 1) < 1e-5
    assert all(hit.score is None for hit in found.hits)
    (again,) = search(photos, image=[Image.open(file)], top=1, model=classifier)
    assert again.hits[0].name == file


def test_the_index_finds_what_exact_search_finds(photos, classifier):
    pytest.importorskip("usearch", reason="the extra `search` is not installed")
    found, exact = (search(photos, TEXTS, model=classifier, approximate=choice) for choice in (True, False))
    assert [[hit.name for hit in one.hits] for one in found] == [[hit.name for hit in one.hits] for one in exact]


def test_another_model_is_named(photos, tmp_path_factory, checkpoint):
    other = tmp_path_factory.mktemp("other")
    save_tiny_checkpoint(other, seed=5)
    with pytest.raises(
        EmbeddingFileError, match=r"a.safetensors was made with .* another model .*made it as model \(--model\)$"
    ):
        search(photos, "2 cats", model=other, device="cpu")
    half = pipeline(model=checkpoint, dtype="bfloat16", device="cpu")
    with pytest.raises(EmbeddingFileError, match=r"float32\), but the given pipeline is another model .*bfloat16"):
        search(photos, "2 cats", model=half)


def test_a_model_that_is_gone_is_named(classifier, photos, tmp_path):
    folder = photos[0].with_suffix("")
    out = tmp_path / "out.safetensors"
    embed_images(classifier.model, classifier.image_processor, [folder], out, model_name=str(tmp_path / "gone"))
    with pytest.raises(EmbeddingFileError, match="was made with .*gone, which cannot be loaded .*give its checkpoint"):
        search(out, "2 cats")
    nameless = tmp_path / "nameless.safetensors"
    embed_images(classifier.model, classifier.image_processor, [folder], nameless)
    with pytest.raises(EmbeddingFileError, match=r"does not name its model; give it as model \(--model\)$"):
        search(nameless, "2 cats")
    assert len(search(nameless, "2 cats", model=classifier)[0].hits) == 10


def test_bad_queries(photos, classifier):
    with Searcher(photos, model=classifier) as searcher:
        with pytest.raises(ValueError, match="there is no query"):
            searcher.find()
        for top in (0, 2.5):
            with pytest.raises(ValueError, match=f"top is {top}; supported: a whole number from 1"):
                searcher.find("x", top=top)
        with pytest.raises(ValueError, match="no such file"):
            searcher.find(image="gone.png")
        for text in (3, ["x", 3]):
            with pytest.raises(ValueError, match="^search: a text is 3; supported: a text or a list of texts$"):
                searcher.find(text)
