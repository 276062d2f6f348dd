"""Parameters of tests that only `make test-all` runs."""

from typing import Any

import pytest


def long(*values: Any) -> Any:
    """One set of parameters; what it shows is shown in short by the others of the same test, or by another test."""
    return pytest.param(*values, marks=pytest.mark.long)
