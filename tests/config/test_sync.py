"""[sync] of run.toml: what older files call otherwise still works."""

import pytest

from thinwire.config.run import RunConfig


def test_the_old_name_of_assign_works_and_warns() -> None:
    with pytest.warns(FutureWarning, match=r"^sync\.deal is now called sync\.assign$"):
        old = RunConfig.model_validate({"sync": {"deal": "by_speed", "accumulate": 4}})
    assert old == RunConfig.model_validate({"sync": {"assign": "by_speed", "accumulate": 4}}) and old.sync.by_speed
