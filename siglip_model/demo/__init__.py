"""The small checkpoint that ships with the package, its pictures, and the commands that rebuild and measure it.

python -m siglip_model.demo.recipe.build --help       # emoji of several designs -> checkpoint
python -m siglip_model.demo.recipe.evaluate --help    # the score in its model card
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
PICTURES = Path(__file__).parent / "pictures"
