"""The ledger knows what the cards have sent, but for headers, acknowledgements and what TCP sends once more."""

import pytest

from thinwire.bench.ledger import measure
from thinwire.cluster.equal import equal_hosts


@pytest.mark.lab
def test_cards_agree_with_the_ledger_on_every_host(warm: None) -> None:
    rows = measure(equal_hosts(3, 300e6), 2**22, 4)
    assert len(rows) == 3
    for row in rows:
        assert row["held"], row
        assert row["retransmitted_bytes"] < 0.5 * row["ledger_bytes"], row  # or nothing was compared
