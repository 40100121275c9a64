"""Embedding files of given rows, as `siglip embed` writes them."""

from siglip_model.embed.journal import EmbeddingJournal


def write_rows(path, rows, *, names=None, **settings):
    """rows: float32 (n, width)."""
    common = {"model": "one", "content": "images", "computed_in": "float32"}
    settings = {**common, "dtype": "F32", "width": str(rows.shape[1]), **settings}
    journal = EmbeddingJournal(path, settings)
    for number, row in enumerate(rows):
        name = names[number] if names else f"/images/{number}.png"
        journal.add(name, "", embedding=row.contiguous().numpy().tobytes())
    journal.commit()
    journal.write(complete=True)
    journal.remove()
    return path
