"""The encoding of a text file."""

import codecs

# UTF-32's mark in little-endian order begins with UTF-16's
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(beginning: bytes) -> str:
    """The encoding that the byte order mark among a file's first four bytes names, else UTF-8."""
    return next((name for mark, name in _BYTE_ORDER_MARKS if beginning.startswith(mark)), "utf-8")
