"""Seeded damage to one file of a folder. Each function changes the file and returns what it did, for the message."""

import contextlib
import copy
import json
import os
import random
import sqlite3
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = "@deep@"  # stands for arrays nested too deeply to be built as Python objects
HOSTILE_VALUES = [
    None, True, False, 0, 1, -1, 0.5, 2**31, 2**40, 10**9, 10**400, 1e308, float("nan"), float("inf"), "", "text",
    "64", "../../etc/passwd", "\0", "\ud800", "x" * 10**6, [], {}, [1, 2], [[]], {"a": 1}, [None] * 10_000, DEEP,
]  # fmt: skip
# Keys that the files may have; some are read by name only, some by Python's ** or getattr.
OPTIONAL_KEYS = [
    "model_type", "architectures", "auto_map", "torch_dtype", "dtype", "id2label", "label2id", "num_labels",
    "problem_type", "projection_size", "vision_use_head", "hidden_act", "return_dict", "output_attentions",
    "initializer_factor", "quantization_config", "tokenizer_class", "sp_model_kwargs", "added_tokens_decoder",
    "additional_special_tokens", "extra_special_tokens", "bos_token", "mask_token", "model_max_length",
    "padding_side", "truncation_side", "do_lower_case", "legacy", "split_special_tokens", "max_length", "stride",
    "image_processor_type", "feature_extractor_type", "crop_size", "do_center_crop", "do_pad", "resample",
    "default_to_square", "do_convert_rgb", "shortest_edge", "image_processor", "truncation", "padding", "decoder",
    "vocab_file", "name_or_path", "self", "__class__", "",
]  # fmt: skip

Damage = Callable[[random.Random, Path], str]


# ---- whole files


def raw(rng: random.Random, path: Path) -> str:
    """Bits, bytes and blocks, whatever the file holds."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    length = min(len(content) - start, rng.choice([1, 4, 16, 512, 4096]))
    block = slice(start, start + length)
    kind = rng.choice(["flip", "truncate", "insert", "remove", "swap", "zero", "ones", "repeat", "noise"])
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[start:]
    elif kind == "insert":
        content[start:start] = rng.randbytes(length)
    elif kind == "remove":
        del content[block]
    elif kind == "swap":
        other = rng.randrange(len(content) - length + 1)
        content[block], content[other : other + length] = content[other : other + length], content[block]
    elif kind == "repeat":
        content[start:start] = content[block]
    else:
        content[block] = {"zero": bytes(length), "ones": b"\xff" * length}.get(kind) or rng.randbytes(length)
    path.write_bytes(content)
    return f"{kind} at byte {start}, length {length}"


def entry(rng: random.Random, path: Path) -> str:
    """The file is missing, empty, or another kind of thing."""
    path.unlink()
    kind = rng.choice(["missing", "empty", "folder", "link to itself", "link to nothing", "pipe"])
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "link to nothing":
        path.symlink_to("nothing")
    elif kind == "pipe":
        os.mkfifo(path)
    return kind


# ---- JSON


def json_file(rng: random.Random, path: Path) -> str:
    """One or two values of the document, or its encoding."""
    if rng.random() < 0.1:
        return _encoding(rng, path)
    document, done = json_document(rng, json.loads(path.read_text()))
    path.write_bytes(encode(document))
    return done


def json_lines(rng: random.Random, path: Path) -> str:
    """As `json_file`, of one line; the first in every second case."""
    lines = path.read_bytes().splitlines(keepends=True)
    number = rng.choice([0, rng.randrange(len(lines))])
    document, done = json_document(rng, json.loads(lines[number]))
    lines[number] = encode(document).rstrip(b"\n") + b"\n"
    path.write_bytes(b"".join(lines))
    return f"line {number}: {done}"


def json_document(rng: random.Random, document: Any) -> tuple[Any, str]:
    """A copy with one or two values deleted, replaced, renamed, doubled, nudged or added."""
    root = [copy.deepcopy(document)]  # so that the document itself has a parent
    done = []
    for _ in range(rng.choice([1, 1, 2])):
        parent, key = rng.choice(_places(root))
        value, is_named = parent[key], isinstance(parent, dict)
        kinds = ["replace"] * 4 + ["nudge"] * 2 + ["delete", "double"] * (parent is not root)
        kinds += ["rename", "add", "add", "add"] * is_named
        kind = rng.choice(kinds)
        if kind == "replace":
            parent[key] = rng.choice(HOSTILE_VALUES)
        elif kind == "nudge":
            parent[key] = _nudged(rng, value)
        elif kind == "delete":
            del parent[key]
        elif kind == "double":
            parent[key] = [value, value]
        elif kind == "rename":
            del parent[key]
            parent[f"{key}_"] = value
        else:
            key = rng.choice(OPTIONAL_KEYS)
            parent[key] = rng.choice([*HOSTILE_VALUES, {"model_file": "/dev/null"}])
        shown = f" = {str(parent[key])[:40]!r}" if kind in ("replace", "nudge", "add") else ""
        done.append(f"{kind} {key!r}{shown}")
    return root[0], "; ".join(done)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each (container, key) below the value."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    inner = [place for _, item in items if isinstance(item, (dict, list)) for place in _places(item)]
    return [*((value, key) for key, _ in items), *inner]


def _nudged(rng: random.Random, value: Any) -> Any:
    if isinstance(value, (bool, str)):
        return not value if isinstance(value, bool) else rng.choice([value.upper(), value + " ", value[:-1]])
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value - 1, -value, value * 2, float(value), str(value)])
    if isinstance(value, list):
        return rng.choice([value[:-1], value + value, value[::-1], dict(enumerate(map(str, value)))])
    return list(value) if isinstance(value, dict) else rng.choice([0, ""])


def encode(document: Any) -> bytes:
    """As JSON, with NaN, lone surrogates and deep nesting if the document has them."""
    text = json.dumps(document, ensure_ascii=False)
    if DEEP in text:
        text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.encode("utf-8", "surrogatepass")


def _encoding(rng: random.Random, path: Path) -> str:
    text = path.read_text()
    kind = rng.choice(["UTF-16", "byte order mark", "not UTF-8", "a key twice", "text behind it", "single quotes"])
    if kind == "UTF-16":
        path.write_bytes(text.encode("utf-16"))
    elif kind == "byte order mark":
        path.write_text("\ufeff" + text)
    elif kind == "not UTF-8":
        path.write_bytes(text.encode().replace(b'"', b'"\xff', rng.choice([1, 3, 5])))
    elif kind == "a key twice":
        key = rng.choice(list(json.loads(text)))
        path.write_bytes(text.encode().rstrip()[:-1] + f", {json.dumps(key)}: 7}}".encode())
    else:
        path.write_text(text + "}" if kind == "text behind it" else text.replace('"', "'"))
    return kind


# ---- safetensors


def safetensors_file(rng: random.Random, path: Path) -> str:
    """The header, its length, or the values of a tensor. Embedding files are safetensors files also."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    name = rng.choice([name for name in header if name != "__metadata__"])
    tensor = header[name]
    start, end = tensor["data_offsets"]
    kind = rng.choice(["json", "values", "offsets", "dtype", "shape", "name", "length", "padding", "more", "fewer"])
    done = f"{kind} of {name}"
    padding = b""
    if kind == "json":
        header, done = json_document(rng, header)
    elif kind == "values" and end - start >= 4:
        place = start + 4 * rng.randrange((end - start) // 4)
        value = rng.choice([float("nan"), float("inf"), 3e38, 0.0, -1e-40])
        data[place : place + 4] = struct.pack("<f", value)
        done += f": {value}"
    elif kind == "offsets":
        other = header[rng.choice([other for other in header if other != "__metadata__"])]
        tensor["data_offsets"] = rng.choice([
            [start + 4, end + 4], [start - 4, end - 4], [end, start], [start, end + 4], [start, start], [0, 2**63],
            [2**64 - 4, 2**64], [start, end, end], other["data_offsets"],
        ])  # fmt: skip
        done += f": {tensor['data_offsets']}"
    elif kind == "dtype":
        tensor["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "BOOL", "U8", "F8_E4M3", "F99", "f32", ""])
        done += f": {tensor['dtype']}"
    elif kind == "shape":
        shape = tensor["shape"]
        tensor["shape"] = rng.choice([
            shape[::-1], [*shape, 1], [1, *shape], shape[1:], [], [2**62, 4], [2**64, 1], [-1], [0], [2**40],
            [size + 1 for size in shape], [float(size) for size in shape],
        ])  # fmt: skip
        done += f": {tensor['shape']}"
    elif kind == "name":
        del header[name]
        header[rng.choice([name.upper(), name[1:], f"model.{name}", "", "\ud800", "x" * 10**6])] = tensor
    elif kind == "padding":
        padding = rng.choice([b" ", b"\0", b"{", b"[", b"\xff"]) * rng.choice([1, 8, 10**5, 9 * 10**7])
        done += f": {len(padding)} bytes {padding[:1]!r}"
    elif kind == "more":
        header["more"] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
        data += bytes(16)
    elif kind == "fewer":
        del header[name]
    text = encode(header) + padding
    length = len(text)
    if kind == "length":
        length = rng.choice([0, 1, length - 1, length + 1, len(content), 10**8, 10**8 + 1, 2**63, 2**64 - 1])
        done = f"length of the header: {length}"
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return done


# ---- protobuf, in which SentencePiece models are written


def protobuf_file(rng: random.Random, path: Path) -> str:
    """One field of the outer message: removed, repeated, moved, shortened or with another number or type."""
    fields = _fields(path.read_bytes())
    index = rng.randrange(len(fields)) if rng.random() < 0.5 else -rng.randint(1, 3)  # the last hold the settings
    field = bytearray(fields[index])
    kind = rng.choice(["remove", "repeat", "often", "reverse", "shorten", "tag", "inner", "first only"])
    if kind == "remove":
        del fields[index]
    elif kind in ("repeat", "often"):
        fields[index] = bytes(field) * (2 if kind == "repeat" else max(2, 10**6 // len(field)))
    elif kind == "reverse":
        fields.reverse()
    elif kind == "shorten":
        fields[index] = bytes(field[:-1])
    elif kind == "first only":
        fields = fields[:1]
    else:
        field[0 if kind == "tag" else rng.randrange(1, len(field))] = rng.randrange(256)
        fields[index] = bytes(field)
    path.write_bytes(b"".join(fields))
    return f"{kind} field {index}"


def _fields(content: bytes) -> list[bytes]:
    """The length-delimited fields of a message, each with its tag and length."""
    fields, position = [], 0
    while position < len(content):
        start, length, shift = position, 0, 0
        position += 1
        while True:
            byte = content[position]
            position += 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        position += length
        fields.append(content[start:position])
    return fields


# ---- images


def image_file(rng: random.Random, path: Path) -> str:
    """A number in its header, where sizes are: 0, one more, or the largest. A PNG's checksum is made to fit."""
    content = bytearray(path.read_bytes())
    size = rng.choice([1, 2, 2, 4, 4])
    start = rng.randrange(min(len(content), 64) - size)
    order = rng.choice(["little", "big"])
    number = int.from_bytes(content[start : start + size], order)
    largest = 2 ** (8 * size) - 1
    new = rng.choice([0, min(number + 1, largest), largest, largest // 2, largest // 16])
    content[start : start + size] = new.to_bytes(size, order)
    if path.suffix == ".png":
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    return f"{size} bytes at {start}: {number} becomes {new}"


def png_file(rng: random.Random, path: Path) -> str:
    """A number in its header, or a chunk: removed, repeated, moved, added, or compressed from very much."""
    kind = rng.choice(["number", "number", "remove", "repeat", "move", "add", "compressed"])
    if kind == "number":
        return image_file(rng, path)
    chunks = _chunks(path.read_bytes())
    index = rng.randrange(len(chunks))
    name, data = chunks[index]
    if kind == "remove":
        del chunks[index]
    elif kind == "repeat":
        chunks.insert(index, (name, data))
    elif kind == "move":
        chunks.insert(rng.randrange(len(chunks)), chunks.pop(index))
    elif kind == "add":
        name = rng.choice([b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"gAMA", b"cHRM", b"iCCP", b"acTL", b"fcTL", b"tEXt"])
        chunks.insert(index, (name, rng.randbytes(rng.choice([0, 1, 4, 100, 768]))))
    else:
        name = rng.choice([b"zTXt", b"iCCP", b"iTXt"])
        start = b"a\0\1\0\0\0" if name == b"iTXt" else b"a\0\0"
        chunks.insert(1, (name, start + zlib.compress(bytes(rng.choice([10**6, 10**8])))))
    written = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    path.write_bytes(path.read_bytes()[:8] + b"".join(written))
    return f"{kind} {name.decode()}"


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Name and data of each chunk of a PNG."""
    chunks, position = [], 8
    while position < len(content):
        length = struct.unpack_from(">I", content, position)[0]
        chunks.append((content[position + 4 : position + 8], content[position + 8 : position + 8 + length]))
        position += length + 12
    return chunks


# ---- SQLite, in which journals are written

STATEMENTS = [
    "UPDATE images SET embedding = substr(embedding, 1, 7) WHERE rowid = {row}",
    "UPDATE images SET embedding = embedding || x'00' WHERE rowid = {row}",
    "UPDATE images SET embedding = zeroblob(10000000) WHERE rowid = {row}",
    "UPDATE images SET embedding = x'0000c07f' || substr(embedding, 5) WHERE rowid = {row}",  # NaN
    "UPDATE images SET embedding = substr(embedding, 5) || x'0000807f' WHERE rowid = {row}",  # infinity
    "UPDATE images SET embedding = 'text' WHERE rowid = {row}",
    "UPDATE images SET embedding = 1.5 WHERE rowid = {row}",
    "UPDATE images SET embedding = NULL WHERE rowid = {row}",
    "UPDATE images SET embedding = x'' WHERE rowid = {row}",
    "UPDATE images SET path = NULL WHERE rowid = {row}",
    "UPDATE images SET path = CAST(path AS TEXT) WHERE rowid = {row}",
    "UPDATE images SET path = x'fffe00' WHERE rowid = {row}",
    "UPDATE images SET path = x'' WHERE rowid = {row}",
    "UPDATE images SET path = 7 WHERE rowid = {row}",
    "UPDATE images SET path = zeroblob(1000000) WHERE rowid = {row}",
    "UPDATE images SET stamp = NULL WHERE rowid = {row}",
    "UPDATE images SET stamp = CAST(x'ff' AS TEXT) WHERE rowid = {row}",
    "UPDATE images SET stamp = x'ff' WHERE rowid = {row}",
    "UPDATE images SET stamp = 7 WHERE rowid = {row}",
    "UPDATE images SET error = x'ff' WHERE rowid = {row}",
    "UPDATE images SET error = 'both' WHERE rowid = {row}",
    "UPDATE images SET rowid = -{row} WHERE rowid = {row}",
    "UPDATE images SET rowid = 9223372036854775807 WHERE rowid = {row}",
    "DELETE FROM images WHERE rowid = {row}",
    "DELETE FROM images",
    "DELETE FROM settings",
    "DELETE FROM settings WHERE name = '{setting}'",
    "UPDATE settings SET value = NULL WHERE name = '{setting}'",
    "UPDATE settings SET value = '7' WHERE name = '{setting}'",
    "UPDATE settings SET value = x'ff' WHERE name = '{setting}'",
    "UPDATE settings SET value = CAST(x'ff' AS TEXT) WHERE name = '{setting}'",
    "UPDATE settings SET name = x'ff' WHERE name = '{setting}'",
    "INSERT INTO settings VALUES ('more', 'text')",
    "INSERT INTO settings VALUES (NULL, NULL)",
    "DROP TABLE images",
    "DROP TABLE settings",
    "ALTER TABLE images RENAME COLUMN embedding TO row",
    "ALTER TABLE images ADD COLUMN more TEXT",
    "ALTER TABLE settings RENAME TO options",
    "ALTER TABLE images DROP COLUMN stamp",
    "CREATE TRIGGER lost AFTER INSERT ON images BEGIN DELETE FROM images; END",
    "CREATE TRIGGER refused BEFORE INSERT ON images BEGIN SELECT RAISE(ABORT, 'no'); END",
    "PRAGMA user_version = 99",
    "PRAGMA application_id = 99",
    "PRAGMA journal_mode = WAL",
]


def sqlite_file(rng: random.Random, path: Path) -> str:
    """A statement that the program never executes, in a database that stays one."""
    statement = rng.choice(STATEMENTS).format(
        row=rng.randint(1, 6),
        setting=rng.choice(["width", "dtype", "model", "normalize", "image_processor", "overwrites"]),
    )
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(statement)
    return statement
