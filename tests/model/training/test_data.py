"""Captions, and batches of folders and shards: order, shares of ranks, resumption, and broken samples."""

import gzip
import json
import multiprocessing
from itertools import islice
from pathlib import Path

import pytest
import torch
from captioned import caption, jpeg, prepared_by, save_folder, save_shard, shard_files
from tiny_checkpoint import random_image, shared_tiny_checkpoint

from siglip_model import SiglipModel
from siglip_model.training.captions import read_captions
from siglip_model.training.folder import folder_batches
from siglip_model.training.loop import train
from siglip_model.training.settings import TrainingConfig
from siglip_model.training.shards import find_shards, is_shards, read_shard, sample_captions, shard_batches

TABLE = [("a.png", "a cat"), ("b.png", "a dog"), ("a.png", "two cats"), ("c.png", " ")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return shared_tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("captioned"), 10)


def taken(source, count, first=0, position=None):
    return list(islice(source(first, position), count))


def assert_same(one, other):
    assert one.names == other.names
    assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.pixel_values, other.pixel_values)


# ---- captions


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_of_an_image_are_joined_and_those_without_caption_are_named(kind, tmp_path):
    if kind == "jsonl":
        lines = [json.dumps({"file_name": image, "text": text}) for image, text in TABLE]
        (tmp_path / "captions.jsonl").write_text("\n".join([*lines, "", "{", '["a"]']))
    elif kind == "csv":
        (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *(",".join(row) for row in TABLE)]))
    else:
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        table = pyarrow.table({"image": [row[0] for row in TABLE], "captions": [[row[1]] for row in TABLE]})
        parquet.write_table(table, tmp_path / "captions.parquet")
    samples, skipped = read_captions(tmp_path)
    assert samples == [
        (str(tmp_path / "a.png"), ("a cat", "two cats")),
        (str(tmp_path / "b.png"), ("a dog",)),
    ]
    reasons = ["has no caption", *(["cannot be read", "is no row with image or file_name"] if kind == "jsonl" else [])]
    assert [one.reason.partition(" (")[0] for one in skipped] == reasons
    assert skipped[0].name == f"{tmp_path / f'captions.{kind}'}, row 4"


def read_with(folder, name, content):
    (folder / name).write_bytes(content)
    samples, skipped = read_captions(folder)
    return [(Path(image).name, captions) for image, captions in samples], [
        (one.name[-5:], one.reason) for one in skipped
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_names_the_encoding_and_bytes_of_another_are_left_out(encoding, tmp_path):
    table = 'image, caption\r\na.png, "a café, red"\r\n'.encode(encoding)
    found = [("a.png", ("a café, red",))]
    assert read_with(tmp_path, "captions.csv", table) == (found, [])
    if encoding == "utf-8":
        left_out = [("row 2", "has a caption that is not valid UTF-8")]
        assert read_with(tmp_path, "captions.csv", table + b"b.png,caf\xe9\r\n") == (found, left_out)
    (tmp_path / "captions.csv").unlink()
    random_image(0).save(tmp_path / "a.png")
    assert read_with(tmp_path, "a.txt", "a café, red\r\n".encode(encoding)) == (found, [])


def test_rows_that_cannot_be_read_are_named(tmp_path):
    rows = [{"image": 5, "text": "a"}, {"image": {"path": "a.png"}, "text": "a"}, {"image": "a.png", "text": 5}]
    content = "\n".join(["[" * 10**5, *map(json.dumps, rows), '{"image": "b.png", "text": ["a dog", null]}'])
    found, left_out = read_with(tmp_path, "captions.jsonl", content.encode())
    assert found == [("b.png", ("a dog",))]
    assert left_out[0][1].startswith("cannot be read (maximum recursion depth")
    assert [reason for _, reason in left_out[1:]] == ["is no row with image or file_name"] * 2 + ["has no caption"]
    (tmp_path / "captions.jsonl").unlink()
    found, left_out = read_with(tmp_path, "captions.csv", b'image,caption\na.png,a cat, red\nb.png,a dog\nc.png,"a\n')
    assert found == [("b.png", ("a dog",))]
    assert left_out == [
        ("row 1", "has more cells than the header; a caption that holds commas must be quoted"),
        ("row 3", "cannot be read (unexpected end of data)"),
    ]


def test_texts_beside_images(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("a.png", "below/b.png", "c.png"):
        random_image(0).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cat\n\n two cats \n")
    (tmp_path / "below/b.txt").write_text("a dog")
    samples, skipped = read_captions(tmp_path)
    assert [(Path(image).name, captions) for image, captions in samples] == [
        ("a.png", ("a cat", "two cats")),
        ("b.png", ("a dog",)),
    ]
    assert [Path(one.name).name for one in skipped] == ["c.png"]


def test_folders_without_captions_or_with_several_tables_are_refused(tmp_path):
    random_image(0).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"holds no captioned images; the first of 1: .*a.png has no caption; support"):
        read_captions(tmp_path)
    (tmp_path / "captions.csv").write_text("")
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"holds captions.jsonl and captions.csv; supported: one of them"):
        read_captions(tmp_path)


# ---- folders


def test_an_epoch_has_every_image_once_in_an_order_of_the_seed(folder, checkpoint):
    samples, _ = read_captions(folder)
    orders = []
    for seed in (0, 1):
        batches = taken(folder_batches(samples, prepared_by(checkpoint), batch_size=5, seed=seed), 4)
        epochs = [[*batches[0].names, *batches[1].names], [*batches[2].names, *batches[3].names]]
        assert all(sorted(epoch) == sorted(sample.image for sample in samples) for epoch in epochs)
        orders += epochs
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_is_the_models_input_and_captions_vary(folder, checkpoint):
    samples, _ = read_captions(folder)
    preparation = prepared_by(checkpoint)
    batches = taken(folder_batches(samples, preparation, batch_size=5), 20)
    assert batches[0].pixel_values.shape == (5, 3, 32, 32) and batches[0].input_ids.shape == (5, 8)
    pairs = {
        (name, tuple(ids.tolist())) for batch in batches for name, ids in zip(batch.names, batch.input_ids, strict=True)
    }
    expected = {(image, tuple(preparation.encode([text])[0].tolist())) for image, texts in samples for text in texts}
    assert pairs == expected  # ten epochs meet both captions of each image
    image = preparation.processor(images=random_image(int(Path(batches[0].names[0]).stem)), return_tensors="pt")
    assert torch.equal(batches[0].pixel_values[0], image["pixel_values"][0])


def test_workers_ranks_and_resumption_do_not_change_the_order(folder, checkpoint):
    samples, _ = read_captions(folder)
    shared = dict(preparation=prepared_by(checkpoint, crop_scale=0.5, flip=True), batch_size=4)
    expected = taken(folder_batches(samples, **shared), 4)
    for one, other in zip(expected, taken(folder_batches(samples, num_workers=2, **shared), 4), strict=True):
        assert_same(one, other)
    assert_same(expected[3], taken(folder_batches(samples, **shared), 1, first=3)[0])
    halves = [taken(folder_batches(samples, rank=rank, world=2, **shared), 1)[0] for rank in range(2)]
    assert (*halves[0].names, *halves[1].names) == expected[0].names
    assert torch.equal(torch.cat([half.pixel_values for half in halves]), expected[0].pixel_values)


def test_other_samples_than_the_saved_runs_are_said(folder, checkpoint, recwarn):
    samples, _ = read_captions(folder)
    position = taken(folder_batches(samples, prepared_by(checkpoint), batch_size=2), 1)[0].position
    taken(folder_batches(samples, prepared_by(checkpoint), batch_size=2), 1, first=1, position=position)
    assert not recwarn
    with pytest.warns(UserWarning, match="images or captions are not those of the saved run"):
        taken(folder_batches(samples[1:], prepared_by(checkpoint), batch_size=2), 1, first=1, position=position)


def test_crops_and_mirroring_change_pixels(folder, checkpoint):
    samples, _ = read_captions(folder)
    plain, crop, flip = (
        taken(folder_batches(samples, prepared_by(checkpoint, **kinds), batch_size=10), 1)[0]
        for kinds in ({}, {"crop_scale": 0.3}, {"flip": True})
    )
    assert plain.names == crop.names == flip.names
    assert not torch.isclose(crop.pixel_values, plain.pixel_values, atol=0.05).flatten(1).all(1).any()
    mirrored = [torch.allclose(flip.pixel_values[i], plain.pixel_values[i].flip(-1), atol=0.02) for i in range(10)]
    same = [torch.equal(flip.pixel_values[i], plain.pixel_values[i]) for i in range(10)]
    assert any(mirrored) and any(same) and all(a != b for a, b in zip(mirrored, same, strict=True))


def test_broken_images_are_replaced_and_named(tmp_path, checkpoint):
    samples, left_out = read_captions(save_folder(tmp_path, 6))
    Path(samples[0].image).write_bytes(b"nothing")
    Path(samples[1].image).unlink()
    source = folder_batches(samples, prepared_by(checkpoint), batch_size=6, left_out=left_out)
    (batch,) = taken(source, 1)
    assert len(batch.names) == 6 and {samples[0].image, samples[1].image}.isdisjoint(batch.names)
    reasons = dict(batch.skipped)
    assert reasons[samples[0].image] == "not an image, or in an unsupported format"
    assert reasons[samples[1].image].startswith("no such file")
    for sample in samples:
        Path(sample.image).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="100 images in a row are broken"):
        taken(source, 1)


# ---- shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        save_shard(folder / f"{shard}.tar", shard_files(range(shard * 4, shard * 4 + 4)))
    return find_shards(f"{folder}/{{0..2}}.tar")


def names(batches):
    return [name.rpartition(":")[2].rpartition("/")[2] for batch in batches for name in batch.names]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2), (6, 0)])  # of three shards
def test_readers_share_the_samples(shards, checkpoint, world, workers):
    shared = dict(batch_size=world, shuffle_buffer=4, num_workers=workers, world=world)
    found = []
    for rank in range(world):
        batches = taken(shard_batches(shards, prepared_by(checkpoint), rank=rank, **shared), 13)
        readers = [batch.position["places"][number % max(1, workers)] for number, batch in enumerate(batches)]
        found += names([batch for batch, (epoch, _) in zip(batches, readers, strict=True) if epoch == 0])
    assert sorted(found) == [f"{number:03}" for number in range(12)]


def test_an_epoch_is_shuffled_and_pairs_stay_together(shards, checkpoint):
    preparation = prepared_by(checkpoint)
    batches = taken(shard_batches(shards, preparation, batch_size=6, shuffle_buffer=6), 4)
    found = names(batches)
    assert sorted(found[:12]) == sorted(found[12:]) == [f"{number:03}" for number in range(12)]
    assert found[:12] != found[12:] and found[:12] != sorted(found[:12])
    for name, ids in zip(names(batches), torch.cat([batch.input_ids for batch in batches]), strict=True):
        assert torch.equal(ids, preparation.encode([caption(int(name))])[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_reader_goes_on_where_it_was(shards, checkpoint, workers):
    source = shard_batches(
        shards, prepared_by(checkpoint, flip=True), batch_size=2, shuffle_buffer=3, num_workers=workers
    )
    whole = taken(source, 9)  # more than an epoch
    position = json.loads(json.dumps(whole[4].position))
    for one, other in zip(whole[5:], taken(source, 4, first=5, position=position), strict=True):
        assert_same(one, other)
        assert one.position == other.position


def test_another_number_of_readers_shuffles_again_and_says_so(shards, checkpoint):
    shared = dict(preparation=prepared_by(checkpoint), batch_size=4, shuffle_buffer=4)
    position = taken(shard_batches(shards, **shared), 1)[0].position
    with pytest.warns(UserWarning, match=r"1 x 1 readers .* before, 2 x 1 now: the shards are shuffled again"):
        halved = shard_batches(shards, world=2, **shared)
        batch = taken(halved, 1, first=1, position=position)[0]
    after = taken(halved, 1, first=2, position=batch.position)[0]  # keeps the order that it then has
    with pytest.warns(UserWarning):
        assert_same(taken(halved, 2, first=1, position=position)[1], after)
    with pytest.warns(UserWarning, match=r"2 x 1 readers .* before, 1 x 2 now"):  # as many, but others
        batches = taken(shard_batches(shards, num_workers=2, **shared), 3, first=2, position=after.position)
    assert sorted(names(batches)) == [f"{number:03}" for number in range(12)]


def test_broken_samples_of_shards_are_left_out_and_named(tmp_path, checkpoint):
    pytest.importorskip("webdataset")
    files = shard_files(range(6))
    files["001.jpg"] = jpeg(1)[:200]
    files["002.txt"] = b" \n"
    del files["003.jpg"]
    cut = save_shard(tmp_path / "cut.tar", shard_files(range(6, 10)))
    cut.write_bytes(cut.read_bytes()[: 3 * 1024])
    whole = save_shard(tmp_path / "whole.tar", files)
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    shards = [str(path) for path in (whole, cut, empty)]
    batches = taken(shard_batches(shards, prepared_by(checkpoint), batch_size=3, shuffle_buffer=5), 6)
    assert {"000", "004", "005"} <= set(names(batches)) <= {"000", "004", "005", "006"}
    reasons = {name.replace(f"{tmp_path}/", ""): why for batch in batches for name, why in batch.skipped}
    assert "runcated" in reasons.pop("whole.tar:001")
    assert reasons.pop("whole.tar:002") == "has no caption"
    assert reasons.pop("whole.tar:003").startswith(
        "has no image next to it; in a shard the files of a sample must follow"
    )
    assert reasons.pop("cut.tar").startswith("cannot be read in full (")
    assert reasons.pop("empty.tar").startswith("cannot be read in full (")
    assert set(reasons) <= {"cut.tar:006", "cut.tar:007"}  # what the cut left of a sample


@pytest.mark.parametrize("damage", ["in a header", "between members", "a header", "in compressed data"])
def test_a_damaged_shard_is_named_and_read_up_to_there(damage, tmp_path):
    """tarfile itself takes such headers for the end of the archive."""
    pytest.importorskip("webdataset")
    files = {f"{number}.txt": b"a cat" for number in range(4)}
    content = save_shard(tmp_path / "a.tar", files).read_bytes()
    content = {
        "in a header": content[: 4 * 512 + 100],
        "between members": content[: 4 * 512],
        "a header": content[: 4 * 512] + b"x" * 512 + content[5 * 512 :],
        "in compressed data": gzip.compress(content)[:-60],
    }[damage]
    (tmp_path / "a.tar").write_bytes(content)
    broken: list = []
    samples = list(read_shard(str(tmp_path / "a.tar"), broken.append))
    assert [sample["__key__"] for sample in samples][:2] == ["0", "1"][: 0 if "compressed" in damage else 2]
    assert {name for name, _ in broken} == {str(tmp_path / "a.tar")}
    assert all(reason.startswith("cannot be read in full (") for _, reason in broken)


def test_a_command_that_fails_is_named_after_all_that_it_wrote_is_read(tmp_path):
    pytest.importorskip("webdataset")
    shard = save_shard(tmp_path / "a.tar", {f"{number}.txt": b"a cat" for number in range(4)})
    broken: list = []
    for command, keys in ((f"head -c 2048 {shard}; exit 3", "01"), (f"cat {shard}; exit 3", "0123"), ("exit 3", "")):
        assert [sample["__key__"] for sample in read_shard(f"pipe:{command}", broken.append)] == [*keys]
        assert broken.pop() == (f"pipe:{command}", "cannot be read in full (its command ended with exit code 3)")
        assert not broken
    assert len(list(read_shard(f"pipe:cat {shard}", broken.append))) == 4 and not broken


def test_shards_without_a_usable_sample_end_the_run(tmp_path, checkpoint):
    pytest.importorskip("webdataset")
    shard = save_shard(tmp_path / "a.tar", {"0.txt": b"a cat"})
    with pytest.raises(ValueError, match=r"finds no usable sample \(.*a.tar:0: has no image next to it"):
        taken(shard_batches([str(shard)], prepared_by(checkpoint), batch_size=1, shuffle_buffer=1), 1)
    readers = shard_batches([str(shard)], prepared_by(checkpoint), batch_size=2, shuffle_buffer=1, world=2, rank=1)
    with pytest.raises(ValueError, match=r"one of the 2 readers .* \(there are fewer samples than readers\)"):
        taken(readers, 1)


def test_an_error_ends_the_workers(tmp_path, folder, checkpoint):
    """They ignore SIGTERM, so that Python would wait for those left when it exits."""
    pytest.importorskip("webdataset")
    shard = save_shard(tmp_path / "a.tar", {"0.txt": b"a cat"})
    source = shard_batches([str(shard)], prepared_by(checkpoint), batch_size=1, shuffle_buffer=1, num_workers=1)
    with pytest.raises(ValueError, match=r"^data: one of the 1 readers .* finds no usable sample"):  # of a worker
        next(source(0, None))
    assert not multiprocessing.active_children()

    source = folder_batches(read_captions(folder)[0], prepared_by(checkpoint), batch_size=2, num_workers=1)
    model = SiglipModel.from_pretrained(checkpoint)
    model.logit_bias.data.fill_(torch.nan)
    config = TrainingConfig(steps=2, warmup_steps=0, max_bad_steps=1)
    with pytest.raises(FloatingPointError) as error:  # of the loop
        train(model, source, config, tmp_path / "run", show_progress=False)
    assert error.traceback and not multiprocessing.active_children()


def test_which_data_is_shards(tmp_path):
    assert is_shards("a/{0..9}.tar") and is_shards("pipe:cat a.tar") and is_shards("a.tgz") and not is_shards("a")
    pytest.importorskip("webdataset")
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*/1.tar"):
        save_shard(tmp_path / "0.tar", {})
        find_shards(f"{tmp_path}/{{0..1}}.tar")
    assert find_shards("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]


def test_captions_in_json():
    sample = {"__url__": "a.tar", "__key__": "0", "json": b'{"caption": ["a cat", ""]}'}
    assert sample_captions(sample) == ["a cat"]
    assert sample_captions({**sample, "txt": b"a dog\na wolf"}) == ["a dog", "a wolf"]
    with pytest.raises(ValueError, match="has no caption$"):
        sample_captions({**sample, "json": b"[]"})
