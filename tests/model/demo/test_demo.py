"""The emoji demo: names, augmentation, scores, vocabulary, and the shipped checkpoint with its card."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from siglip_model import SiglipModel, SiglipProcessor, SiglipTokenizer
from siglip_model.demo import CHECKPOINT, PICTURES, SCORE_FILE
from siglip_model.demo.recipe import new_labels
from siglip_model.demo.recipe.augmentation import augment
from siglip_model.demo.recipe.build import SIZE, EmojiBatches, training_config
from siglip_model.demo.recipe.bundle import NAMES
from siglip_model.demo.recipe.emoji import (
    DESIGNS,
    TEST_DESIGN,
    TRAINING_DESIGNS,
    VALIDATION_DESIGN,
    Emoji,
    choose_names,
    download,
    draw,
    on_white,
    read_design,
)
from siglip_model.demo.recipe.evaluate import Score, all_logits, score_logits
from siglip_model.demo.recipe.fp8 import compare
from siglip_model.demo.recipe.model_card import write_card
from siglip_model.demo.recipe.vocabulary import write_tokenizer
from siglip_model.text.prompts import TEMPLATE
from siglip_model.training.captions import read_captions
from siglip_model.training.evaluation.zero_shot import find_classes


def write_package(folder: Path, design, icons, *, aliases=None, characters=None, hidden=()) -> None:
    package = folder / f"{design.name}-any" / "package"
    package.mkdir(parents=True)
    body = '<rect width="10" height="10" fill="#f00"/>'
    content = {
        "icons": {name: {"body": body} | ({"hidden": True} if name in hidden else {}) for name in icons},
        "aliases": aliases or {},
        "width": 10,
        "height": 10,
    }
    (package / "icons.json").write_text(json.dumps(content))
    (package / "chars.json").write_text(json.dumps(characters or {}))
    (package / "package.json").write_text(json.dumps({"name": design.package, "version": design.version}))


def test_names_are_joined_by_id_by_sequence_and_by_alias(tmp_path):
    noto, noto_v1, flat, fluent, emojione = TRAINING_DESIGNS
    write_package(
        tmp_path,
        TEST_DESIGN,
        ["bear", "cat", "dog", "elk", "hand-dark-skin-tone", "flag-france", "old"],
        characters={"1f408-fe0f": "cat"},
        hidden=["old"],
    )
    write_package(tmp_path, noto, ["bear", "kitty", "dog", "old"], characters={"1f408": "kitty"})
    write_package(tmp_path, noto_v1, ["bear-face", "cat"], aliases={"bear": {"parent": "bear-face"}})
    write_package(tmp_path, flat, ["hound"], aliases={"dog": {"parent": "hound", "hFlip": True}})
    write_package(tmp_path, fluent, ["elk", "hand-dark-skin-tone", "flag-france"])
    write_package(tmp_path, emojione, ["flag-france", "hand-dark-skin-tone"])
    write_package(tmp_path, VALIDATION_DESIGN, ["cat", "zebra"])

    names, shown = choose_names([read_design(tmp_path, design) for design in DESIGNS])
    assert names == ["bear", "cat"]  # dog and elk are drawn by one training design; a flipped alias is not a synonym
    assert shown["noto"] == {"bear": "bear", "cat": "kitty"}
    assert shown["noto-v1"] == {"bear": "bear-face", "cat": "cat"}
    assert shown["twemoji"] == {"bear": "bear", "cat": "cat"}
    assert shown["openmoji"] == {"cat": "cat"}


def test_another_version_of_a_package_is_rejected(tmp_path, monkeypatch):
    write_package(tmp_path, TEST_DESIGN, ["cat"])
    manifest = next(tmp_path.glob("*/package/package.json"))
    manifest.write_text(json.dumps({"name": TEST_DESIGN.package, "version": "0.0.1"}))
    with pytest.raises(FileNotFoundError, match=re.escape(f"{TEST_DESIGN.package} in version {TEST_DESIGN.version}")):
        read_design(tmp_path, TEST_DESIGN)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is not installed"):
        download(tmp_path, [TEST_DESIGN])


def test_icons_are_drawn_square_and_composited_over_white(tmp_path):
    pytest.importorskip("resvg_py")
    write_package(tmp_path, TEST_DESIGN, ["cat"])
    path = next(tmp_path.glob("*/package/icons.json"))
    path.write_text(
        json.dumps(
            {"icons": {"cat": {"body": '<rect width="20" height="10" fill="#f00"/>', "width": 20}}, "height": 10}
        )
    )
    image = draw(read_design(tmp_path, TEST_DESIGN).svg("cat"), 40)
    assert image.size == (40, 40)
    white = on_white(image)
    assert white.getpixel((20, 2)) == (255, 255, 255) and white.getpixel((20, 20)) == (255, 0, 0)


def test_augmentation_stays_in_range_and_repeats_with_its_seed():
    pictures = torch.randint(0, 256, (8, 4, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, again, other = (augment(pictures, 16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == (8, 3, 16, 16) and first.dtype == torch.float32
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


def test_a_transparent_drawing_becomes_its_background():
    pictures = torch.full((32, 4, 20, 20), 77, dtype=torch.uint8)
    pictures[:, 3] = 0
    images = augment(pictures, 16, torch.Generator().manual_seed(0))
    assert torch.allclose(images, images[:, :, :1, :1].expand_as(images), atol=1e-6)
    assert (images[:, 0, 0, 0] == 1).any() and (images[:, 0, 0, 0] < 0.9).any()  # white and other backgrounds


def test_batches_pair_each_name_with_images_of_different_designs(monkeypatch):
    """An image's red and green encode its name, its blue its design, so that a mix-up is visible."""
    count = 20
    pictures, name_of = {}, {}
    for column, design in enumerate(TRAINING_DESIGNS):
        ids = torch.arange(count)[column % 2 :: 2] if column < 2 else torch.arange(count).flip(0)
        shade = torch.stack([ids, ids, torch.full_like(ids, column), torch.full_like(ids, 255)], 1).to(torch.uint8)
        pictures[design.name], name_of[design.name] = shade[:, :, None, None].expand(-1, 4, 4, 4), ids
    prompts = torch.arange(count)[None, :, None].repeat(6, 1, 3)
    monkeypatch.setattr("siglip_model.demo.recipe.build.augment", lambda images, size, generator: images[:, :3].float())
    batches = EmojiBatches(Emoji([str(i) for i in range(count)], pictures, name_of), prompts, 8, 3)
    batch = batches(0, torch.Generator().manual_seed(0))
    names = batch.input_ids[:, 0]
    assert len(names.unique()) == 8
    assert batch.pixel_values.shape == (3, 8, 3, 4, 4)
    assert torch.equal(batch.pixel_values[:, :, 0, 0, 0].long(), names.expand(3, -1))
    for designs in batch.pixel_values[:, :, 2, 0, 0].T:
        assert len(designs.unique()) == 3


def test_scores_of_known_rankings():
    right = torch.arange(40)
    perfect = score_logits(torch.eye(40), right)
    assert (perfect.ten_way, perfect.top1, perfect.top5) == (1, 1, 1)
    ties = score_logits(torch.zeros(40, 40), right)
    assert (ties.ten_way, ties.top1, ties.top5) == (0, 0, 0)
    # Two names are always better than the right one, so ten-way is C(37, 9) / C(39, 9).
    logits = torch.rand(
        400, 40, generator=torch.Generator().manual_seed(5)
    )  # another seed than that of the random names
    right = torch.arange(400) % 40
    best = logits.scatter(1, right[:, None], -1).topk(3).values
    third = score_logits(logits.scatter(1, right[:, None], best[:, 1:].mean(1, keepdim=True)), right)
    assert (third.names, third.pictures, third.top1, third.top5) == (40, 400, 0, 1)
    assert third.ten_way == pytest.approx(30 * 29 / (39 * 38), abs=0.03)


def test_the_vocabulary_has_the_layout_of_published_checkpoints(tmp_path):
    words = [
        "red",
        "green",
        "blue",
        "cat",
        "dog",
        "bear",
        "horse",
        "apple",
        "pear",
        "plum",
        "moon",
        "sun",
        "star",
        "rain",
    ]
    write_tokenizer([f"{a} {b}" for a in words for b in words], tmp_path)
    tokenizer = SiglipTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 1, 2)
    encoded = tokenizer("Blue, CAT!", padding="max_length", max_length=64)
    assert list(encoded) == ["input_ids"]
    assert encoded["input_ids"] == [
        *tokenizer("blue cat")["input_ids"],
        *[1] * (64 - len(tokenizer("blue cat").input_ids)),
    ]
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "blue cat"


@pytest.fixture(scope="module")
def shipped():
    return SiglipModel.from_pretrained(CHECKPOINT), SiglipProcessor.from_pretrained(CHECKPOINT)


def test_the_shipped_checkpoint_names_the_bundled_images(shipped):
    """At least seven of eight, each among all eight names; not trained on, selected before any measurement."""
    images = [Image.open(PICTURES / f"{name}.png") for name in NAMES]
    logits = all_logits(*shipped, images, [name.replace("-", " ") for name in NAMES])
    assert (logits.argmax(1) == torch.arange(len(NAMES))).sum() >= 7


def test_the_shipped_checkpoint_runs_in_transformers_pipeline():
    transformers = pytest.importorskip("transformers")
    logits = all_logits(
        SiglipModel.from_pretrained(CHECKPOINT),
        SiglipProcessor.from_pretrained(CHECKPOINT),
        [Image.open(PICTURES / "rocket.png")],
        ["guitar", "rocket"],
    )
    reference = transformers.pipeline(
        "zero-shot-image-classification",
        model=transformers.SiglipModel.from_pretrained(CHECKPOINT),
        tokenizer=transformers.SiglipTokenizer.from_pretrained(CHECKPOINT),
        image_processor=transformers.SiglipImageProcessor.from_pretrained(CHECKPOINT),
    )(str(PICTURES / "rocket.png"), candidate_labels=["guitar", "rocket"], hypothesis_template=TEMPLATE)
    scores = {each["label"]: each["score"] for each in reference}
    assert [scores["guitar"], scores["rocket"]] == pytest.approx(logits.sigmoid()[0].tolist(), abs=1e-5)


def test_the_checkpoint_is_small_and_its_card_states_score_and_licences(shipped):
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 10_000_000
    card = (CHECKPOINT / "README.md").read_text()
    ten_way, top5 = (float(x) for x in re.findall(r"\*\*([\d.]+)%\*\*", card))
    assert ten_way >= 90 and top5 >= 55
    assert int(re.search(r"each of (\d+) names", card)[1]) >= 1500
    score = json.loads((CHECKPOINT / SCORE_FILE).read_text())  # what `siglip demo` reports
    assert [f"{score[name]:.1%}" for name in ("ten_way", "top5")] == [f"{ten_way}%", f"{top5}%"]
    for design in DESIGNS:
        assert f"{design.package} {design.version} | {design.author} | {design.licence}" in card
    assert f"{shipped[0].num_parameters():,} parameters" in card


def test_the_shipped_card_is_what_the_recipe_writes(shipped, tmp_path):
    model, processor = shipped
    shipped_card = (CHECKPOINT / "README.md").read_text()
    score = Score(**json.loads((CHECKPOINT / SCORE_FILE).read_text()))
    images = int(re.search(r"^(\d+) images of", shipped_card, re.MULTILINE)[1])  # all other numbers are known
    drawings = {design.name: torch.empty(0) for design in TRAINING_DESIGNS} | {"noto": torch.empty(images, 0)}
    write_card(
        tmp_path,
        score,
        Emoji([], drawings, {}),
        training_config(),
        parameters=model.num_parameters(),
        size=SIZE,
        pieces=len(processor.tokenizer),
        texts=128,
        views=4,
    )
    assert (tmp_path / "README.md").read_text() == shipped_card
    score.save(tmp_path)
    assert (tmp_path / SCORE_FILE).read_text() == (CHECKPOINT / SCORE_FILE).read_text()


def test_the_data_to_fine_tune_on_has_a_folder_per_new_word(tmp_path):
    new_labels.main(tmp_path, train=2, test=1)
    samples, skipped = read_captions(tmp_path / "train")
    assert skipped == [] and len(samples) == 2 * len(new_labels.WORDS)
    assert samples[0].captions == ("This is a photo of blim.",)
    assert sorted(find_classes(tmp_path / "test").values()) == sorted(new_labels.WORDS)
    image = Image.open(samples[0].image)
    assert image.size == (64, 64) and image.mode == "RGB"


def test_limits_of_fp8():
    """What is beyond one is named; a random vector of 4 % of an embedding's length is within all."""
    torch.manual_seed(0)
    texts, images = (torch.nn.functional.normalize(torch.randn(40, 64), dim=-1) for _ in range(2))
    images = torch.nn.functional.normalize(images + 2 * texts, dim=-1)
    right = torch.arange(40)
    exact = texts, images, images @ texts.T

    def turned(share: float, rows: slice) -> tuple[torch.Tensor, ...]:
        moved = images.clone()
        moved[rows] += share * torch.nn.functional.normalize(torch.randn_like(images[rows]), dim=-1)
        return texts, moved, moved @ texts.T

    near = compare(turned(0.04, slice(None)), exact, right)
    assert near.problems() == [] and near.same_first > 0.9 and 0.9 < near.same_five <= 1
    assert "cosine 1.00000 in the mean" in str(near) and "top-1 agrees with fp32 for 100.0%" in str(near)
    (problem,) = compare(turned(0.2, slice(0, 1)), exact, right).problems()
    assert problem.startswith("the least image cosine is 0.9") and "at least 0.995" in problem
    assert "the mean image cosine" in compare(turned(0.06, slice(None)), exact, right).problems()[0]
    wrong = compare((texts, images, exact[2].roll(1, 0)), exact, right)
    assert "ten-way accuracy is" in wrong.problems()[0] and wrong.same_first < 0.1
