"""Published runs over thin networks: our prediction of what they state, from their settings."""

import pytest

from thinwire.bench import published


def test_utilisations_of_the_published_table_are_predicted() -> None:
    rows = published.utilisations()
    assert len(rows) == 15
    assert [row["case"] for row in rows if not row["held"]] == ["Streaming DiLoCo, 1B, data parallel"]
    assert all(abs(row["ratio"] - 1) < 0.17 for row in rows)


def test_shapes_have_about_the_parameters_that_are_stated() -> None:
    for parameters, layers in ((1e9, 24), (1e10, 48), (1e11, 108)):
        config = published.shape(parameters, layers)
        assert abs(12 * layers * config.width**2 + published.VOCABULARY * config.width - parameters) < 0.03 * parameters


@pytest.mark.long
def test_the_search_beats_what_was_run_on_the_same_links() -> None:
    """And names the plan; theirs is counted with the same penalties."""
    rows = [row for row in published.run(None, published.DEFAULTS) if row["what"].startswith("days")]
    assert [row["case"].split(",")[0] for row in rows] == ["Covenant-72B", "Covenant-72B", "INTELLECT-1"]
    assert all(0.5 < row["ratio"] < 1 and row["predicted"] < row["stated"] for row in rows)
