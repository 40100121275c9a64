"""Silences transformers for the comparisons."""

from typing import Any

import pytest
import transformers


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Any:
    """transformers warns about shapes in which either dimension could hold channels."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)
