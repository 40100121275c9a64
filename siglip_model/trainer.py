"""transformers' Trainer, taught to write config.json for the models of this package.

Of models that are not transformers' own it saves the tensors alone, and a folder without config.json cannot be loaded.
"""

from __future__ import annotations

import functools
import sys
from typing import Any


def save_config_with_weights() -> None:
    """From now on every Trainer that saves a SiglipModel, a tower or a classifier also writes its config.json.

    Changes `Trainer._save` once, if the Trainer is imported; what it does with other models stays.
    """
    module = sys.modules.get("transformers.trainer")
    if module is None or hasattr(module.Trainer._save, "__wrapped__"):
        return
    save = module.Trainer._save

    @functools.wraps(save)
    def _save(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        from siglip_model.pretrained import PreTrainedModel

        save(self, output_dir, *args, **kwargs)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel) and self.args.should_save:
            model.save_config(self.args.output_dir if output_dir is None else output_dir)

    module.Trainer._save = _save
