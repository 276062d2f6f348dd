"""Parts of a model in every layout, with every optimizer, codec and way to exchange, on a device: here on fake tensors."""

from pathlib import Path

import pytest
from fake_device_layouts import CASES

from on_device import alone

FAKE = Path(__file__).parent / "fake_device_layouts.py"
PARTS = 5


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_is_read_on_the_host_and_no_device_is_mixed(tmp_path: Path, part: int) -> None:
    """In whole steps, on `meta`; messages, gradients, the optimizer's state and the loss are the device's."""
    cases = list(CASES)[part::PARTS]
    assert alone(FAKE, str(tmp_path), *cases).count("all on the device") == len(cases)
