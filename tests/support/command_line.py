"""What the tests of the command `siglip` share."""

LABELS = ["2 cats", "a plane", "a remote"]


def one_line(text):
    return len(text.strip().splitlines()) == 1 and "Traceback" not in text
