"""The script that runs transformers' own tests changes their imports, and copies only what they need."""

from pathlib import Path

from transformers_suite import copy_tests, with_import_changed

CODE = """
from transformers import AutoConfig, SiglipModel as Model
from transformers.testing_utils import slow
from ...test_modeling_common import ModelTesterMixin
import transformers
if True:
    from transformers import SiglipModel
    from transformers import slow
"""

CHANGED = """from transformers import AutoConfig
from siglip_model import SiglipModel as Model
from transformers.testing_utils import slow
from ...test_modeling_common import ModelTesterMixin
import transformers
if True:
    from siglip_model import SiglipModel
    from transformers import slow"""


def test_only_the_import_changes() -> None:
    assert with_import_changed(CODE, {"SiglipModel", "slow_pipeline"}) == CHANGED


def test_other_models_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    kept = ("conftest.py", "pyproject.toml", "tests/common.py", "tests/models/__init__.py")
    for name in (
        *kept,
        "tests/models/siglip/test_a.py",
        "tests/models/bert/test_b.py",
        "tests/fixtures/c",
        "utils/d.py",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    copy_tests(source, tmp_path / "copy")
    assert all((tmp_path / "copy" / name).is_file() for name in (*kept, "tests/models/siglip/test_a.py", "utils/d.py"))
    assert not (tmp_path / "copy/tests/models/bert").exists() and (tmp_path / "copy/tests/fixtures").is_symlink()
    assert (tmp_path / "copy/src/transformers/__init__.py").is_file()
