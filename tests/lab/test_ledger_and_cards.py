"""The ledger knows what the cards have sent, headers and acknowledgements aside."""

import pytest

from thinwire.bench.ledger import BAR, measure
from thinwire.cluster.equal import equal_hosts


@pytest.mark.lab
def test_cards_agree_with_the_ledger_on_every_host() -> None:
    rows = measure(equal_hosts(3, 300e6), 2**22, 4)
    assert len(rows) == 3
    for row in rows:
        assert row["ledger_bytes"] <= row["card_bytes"] <= row["ledger_bytes"] * (1 + BAR), row
