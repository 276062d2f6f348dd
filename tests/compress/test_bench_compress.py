"""The benchmark runs, small, without compiling."""

from thinwire.bench.registry import find
from thinwire.compress.base import CODECS


def test_each_codec_has_a_row_for_each_length() -> None:
    rows = find("compress")(None, {"numels": [1 << 13, 1 << 14], "turns": 1, "fused": False})
    measured = [row for row in rows if "numel" in row]
    for kind in CODECS:
        assert [row["numel"] for row in measured if row["case"] == kind] == [1 << 13, 1 << 14]
    assert all(row["copy_gb_per_s"] > 0 and row["encode_gb_per_s"] > 0 and row["decode_gb_per_s"] > 0 for row in measured)
    assert any(row["case"].startswith("peer: torch ") for row in measured)
    assert not any("bar" in row for row in rows)
