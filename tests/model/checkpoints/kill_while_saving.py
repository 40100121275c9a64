"""Saves one checkpoint over another in children that are killed, each later than the last; prints what each kill left.

Run as: python kill_while_saving.py FOLDER OLD_TENSORS OLD_SHARD_SIZE NEW_TENSORS NEW_SHARD_SIZE SAME_CONFIG ...
with the last five repeated for each case.

A moment is an audit event of Python (open, rename, remove, mkdir, listdir ...) or the middle of writing a weights file.
For each case a JSON line, a list: what each kill interrupted, and what was found after it (by the loader: "old", "new"
or "neither"; by one that looks at config.json and model.safetensors alone; after another save).
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch

from siglip_model.checkpoints.files import load_config_dict
from siglip_model.checkpoints.loading import load_state_dict
from siglip_model.checkpoints.saving import save_checkpoint


def tensors(count, value):
    return {f"tensor.{index}": torch.full((index + 1, 100), float(value)) for index in range(count)}


def save_and_die(folder, checkpoint, shard_size, moment, report):
    """Save, and be killed at the given moment after reporting it; exit with 0 if the save ends earlier."""
    left = moment
    saving = True
    save_file = safetensors.torch.save_file

    def tick(event):
        nonlocal left, saving
        left -= 1
        if left < 0:
            saving = False  # what follows makes audit events too
            os.write(report, event.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def half_save_file(to_write, path, metadata):
        nonlocal saving
        save_file(to_write, path, metadata=metadata)
        if left == 0:
            saving = False
            os.truncate(path, os.path.getsize(path) // 2)
        tick("half of a weights file")

    def hook(event, arguments):
        if saving and event.split(".")[0] in ("open", "os", "shutil", "fcntl"):
            tick(event)

    safetensors.torch.save_file = half_save_file
    sys.addaudithook(hook)
    save_checkpoint(folder, checkpoint[0], checkpoint[1], max_shard_size=shard_size)
    saving = False
    os._exit(0)


def found(folder, checkpoints):
    try:
        config, weights = load_config_dict(folder), load_state_dict(folder)
    except Exception as error:
        return f"neither: {error!r}"
    for name, (expected_weights, expected_config) in checkpoints.items():
        same = weights.keys() == expected_weights.keys()
        if (
            same
            and config == expected_config
            and all(torch.equal(weights[key], expected_weights[key]) for key in weights)
        ):
            return name
    return "neither: a mixture"


def kill_at_every_moment(base, old_count, old_size, new_count, new_size, same_config):
    old_config = {"model_type": "siglip", "owner": "old"}
    old = tensors(old_count, 1), old_config
    new = tensors(new_count, 2), old_config if same_config else {"model_type": "siglip", "owner": "new"}
    checkpoints = {"old": old, "new": new}
    shutil.rmtree(base, ignore_errors=True)
    save_checkpoint(base / "clean", *new, max_shard_size=new_size)
    results = []
    folder = base / "folder"
    while not results or results[-1]["killed"]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text("{}")
        save_checkpoint(folder, *old, max_shard_size=old_size)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_and_die(folder, new, new_size, len(results), writer)
        status = os.waitpid(child, 0)[1]
        os.close(writer)
        with os.fdopen(reader) as report:
            result = {"event": report.read(), "killed": os.WIFSIGNALED(status), "found": found(folder, checkpoints)}
        if not result["killed"] and status != 0:
            raise RuntimeError(f"the save failed in the child: status {status}")
        # A loader that does not know the protocol: config.json and model.safetensors where they are.
        if same_config and (folder / "model.safetensors").is_file():
            weights = safetensors.torch.load_file(folder / "model.safetensors")
            result["plain"] = "old" if weights["tensor.0"][0, 0] == 1 else "new"
        # Whatever is left, the next save succeeds and leaves nothing behind.
        save_checkpoint(folder, *new, max_shard_size=new_size)
        result["saved_again"] = found(folder, checkpoints)
        result["leftovers"] = sorted(set(os.listdir(folder)) ^ {*os.listdir(base / "clean"), "tokenizer_config.json"})
        results.append(result)
    return results


def main():
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote; a disk without power might
    numbers = list(map(int, sys.argv[2:]))
    for start in range(0, len(numbers), 5):
        print(json.dumps(kill_at_every_moment(Path(sys.argv[1]) / "case", *numbers[start : start + 5])), flush=True)


main()
