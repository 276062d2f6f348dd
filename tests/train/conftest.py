"""Fixtures of the tests of training."""

from pathlib import Path

import pytest
from small_run import make_config

from thinwire.config.run import RunConfig


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return make_config(tmp_path)
