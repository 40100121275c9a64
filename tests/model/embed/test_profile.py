"""`profile`: the stage that is made slow is the one that bounds the run, and the stages add up to the run."""

import time

import pytest
from colour_embedder import ColourModel, ColourProcessor, save_colours

from siglip_model.embed import embed_images
from siglip_model.embed.journal import EmbeddingJournal
from siglip_model.embed.sources import image_sources

SLOW = 0.02  # seconds


def slowly(function):
    def slow(*arguments, **options):
        time.sleep(SLOW)
        return function(*arguments, **options)

    return slow


@pytest.fixture
def embed(tmp_path):
    save_colours(tmp_path / "images", 12)

    def run(model=None, processor=None, **options):
        options = {"batch_size": 2, "num_workers": 2, "profile": True, **options}
        return embed_images(
            model or ColourModel(),
            processor or ColourProcessor(),
            [tmp_path / "images"],
            tmp_path / "out.safetensors",
            **options,
        )

    return run


def slow_processor():
    class Slow(ColourProcessor):
        __call__ = slowly(ColourProcessor.__call__)

    return {"processor": Slow()}


def slow_model():
    model = ColourModel()
    model.get_image_features = slowly(model.get_image_features)
    return {"model": model}


@pytest.mark.parametrize(
    ("slow", "stage", "words", "least"),
    [
        (slow_processor, "decode", "reading and decoding", 12 * SLOW / 2),
        (slow_model, "compute", "the model", 6 * SLOW),
    ],
)
def test_the_slow_stage_bounds_the_run(embed, slow, stage, words, least):
    report = embed(**slow()).profile
    assert getattr(report, stage) > 0.8 * least and report.bound_by.startswith(words)
    stages = (report.list, report.decode, report.copy, report.compute, report.write, report.rest)
    assert abs(sum(stages) - report.total) < 1e-6 and min(stages) >= 0
    assert 0 < report.busy <= 1 and report.workers == 2


def test_slow_lists_and_slow_writes_bound_it_too(embed, monkeypatch):
    def slow_sources(*arguments):
        for source in image_sources(*arguments):
            time.sleep(SLOW)
            yield source

    monkeypatch.setattr("siglip_model.embed.run.image_sources", slow_sources)
    assert embed().profile.bound_by.startswith("listing the inputs")
    monkeypatch.undo()
    monkeypatch.setattr(EmbeddingJournal, "add", slowly(EmbeddingJournal.add))
    assert embed(overwrite=True).profile.bound_by == "the journal and the output file"


def test_without_it_nothing_is_measured(embed):
    assert embed(profile=False).profile is None
