"""The demo checkpoint and images that ship with the package.

From a checkout, the recipe rebuilds and measures them:

python -m siglip_model.demo.recipe.build --help       # train the checkpoint on emoji of several designs
python -m siglip_model.demo.recipe.evaluate --help    # measure the scores in its model card
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
PICTURES = Path(__file__).parent / "pictures"
SCORE_FILE = "score.json"  # in the checkpoint's folder: what the model card reports
