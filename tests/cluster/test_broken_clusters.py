"""Each way to break a cluster file gives one line that names the file, the key, the value and what is allowed."""

import re
from pathlib import Path

import pytest

from thinwire.cluster import Cluster, Device, Host, load_cluster
from thinwire.errors import UserError

GOOD = """
name = "pair"
ranks = ["h0/cpu0", "h1/cpu0"]

[[host]]
name = "h{i}"
count = 2
rack = "r"
device = { kind = "cpu", flops_per_s = "6 Gflop/s" }
card = { bandwidth_bps = "100 Mbit/s", latency_s = "50 us" }

[[rack]]
name = "r"
uplink = { bandwidth_bps = "1 Gbit/s" }

[[switch]]
name = "optics"
kind = "optical"

[[link]]
source = "h{i}"
target = "optics"
bandwidth_bps = 1e9
each = { i = 2 }
"""

BROKEN = {
    "unknown key": ('rack = "r"', 'rakc = "r"', "unknown key host.0.rakc; allowed: name, count, device, card, rack, address"),
    "unknown key inside": ("latency_s", "latency_ms", "unknown key host.0.card.latency_ms; allowed: bandwidth_bps, latency_s"),
    "unknown key of a device": ("flops_per_s", "flops", "unknown key host.0.device.0.flops; allowed: name, kind, count"),
    "unknown table": ("[[switch]]", "[[swich]]", "unknown key swich; allowed: name, host, rack, switch, link, ranks"),
    "missing key": ("bandwidth_bps = 1e9", "", "link.0.bandwidth_bps is missing"),
    "no hosts": (GOOD, 'name = "none"\nhost = []', r"host = \[\]: .*at least 1"),
    "wrong unit": ('"100 Mbit/s"', '"100 MB"', r"host.0.card.bandwidth_bps: '100 MB' has a wrong unit; allowed: bit/s kbit/s"),
    "wrong unit of a latency": ('"50 us"', '"50 Mbit/s"', "host.0.card.latency_s: '50 Mbit/s' has a wrong unit; allowed: s, ms"),
    "no number": ('"100 Mbit/s"', '"fast"', "host.0.card.bandwidth_bps: 'fast' is not a number with a unit; e.g. '100 Mbit/s'"),
    "negative bandwidth": ('"100 Mbit/s"', "-5", "host.0.card.bandwidth_bps: -5 is not allowed; it must be above 0"),
    "negative with a unit": ('"100 Mbit/s"', '"-5 Mbit/s"', r"host.0.card.bandwidth_bps: -5e\+06 is not allowed"),
    "zero bandwidth": ('"100 Mbit/s"', "0", "host.0.card.bandwidth_bps: 0 is not allowed; it must be above 0"),
    "negative latency": ('"50 us"', "-1", "host.0.card.latency_s: -1 is not allowed; it must be 0 or more"),
    "infinite": ('"100 Mbit/s"', "inf", "host.0.card.bandwidth_bps: inf is not a quantity; it must be finite"),
    "not a quantity": ('"100 Mbit/s"', "true", "host.0.card.bandwidth_bps: True is not a quantity"),
    "measured without value": ('"100 Mbit/s"', "{ low = 3 }", r"bandwidth_bps: .*'low': 3.* table of value, source, low, high"),
    "measured by whom": ('"100 Mbit/s"', '{ value = 3, source = "said" }', "source = 'said'; allowed: declared, measured"),
    "interval upside down": ('"100 Mbit/s"', "{ value = 3, low = 4, high = 2 }", "low = 4 is above high = 2"),
    "count of nothing": ("count = 2", "count = 0", "host.0.count = 0: .*greater than or equal to 1"),
    "count of too many": ("each = { i = 2 }", "each = { i = 100000, j = 100000 }", r"link.each = .*; at most 100000 are allowed"),
    "kind of switch": ('"optical"', '"magic"', "switch.0.kind = 'magic': .*'network', 'nvswitch' or 'optical'"),
    "doubled host": ("h{i}", "h", "the name 'h' is given twice"),
    "doubled switch": ("[[link]]", '[[switch]]\nname = "optics"\n[[link]]', "the name 'optics' is given twice"),
    "doubled rack": (
        "[[switch]]",
        '[[rack]]\nname = "r"\nuplink = { bandwidth_bps = 1 }\n[[switch]]',
        "rack.name = 'r' is given",
    ),
    "rack named like a host": ('"r"', '"h0"', "the name 'h0' is given twice"),
    "doubled link": ("each = { i = 2 }", "each = { i = 2, k = 3 }", "link 'h0' -> 'optics' is given 3 times; write one"),
    "link to itself": ('target = "optics"', 'target = "h{i}"', "link 'h0' -> 'h0': a link joins two different nodes"),
    "unknown counter": ('"h{i}"\ncount', '"h{k}"\ncount', r"host.name = 'h\{k\}': unknown counter; known here: \{i\}"),
    "unknown counter of a link": ("each = { i = 2 }", "", r"link.source = 'h\{i\}': unknown counter; known here: none"),
    "missing host in a link": ('source = "h{i}"', 'source = "g{i}"', "link 'g0' -> 'optics': there is no host or switch 'g0'"),
    "missing rack": ('rack = "r"', 'rack = "q"', r"host h0: rack = 'q': there is no such rack; write a \[\[rack\]\]"),
    "missing device in ranks": ('"h1/cpu0"]', '"h2/cpu0"]', "ranks: there is no device 'h2/cpu0'; known: h0/cpu0, h1/cpu0"),
    "device listed twice": ('"h1/cpu0"]', '"h0/cpu0"]', "ranks: 'h0/cpu0' is listed twice; each device carries one rank"),
    "wrong type": ("count = 2", 'count = "two"', "host.0.count = 'two': .*integer"),
    "a table for a list": ("[[rack]]", "[rack]", "rack = .*: input should be a valid list"),
    "not TOML": ("[[host]]", "[[host]", "not valid TOML: .*line 5"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_line(case, tmp_path: Path) -> None:
    good, bad, message = BROKEN[case]
    assert good in GOOD
    path = tmp_path / "cluster.toml"
    path.write_text(GOOD.replace(good, bad), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: .*{message}") as error:
        load_cluster(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 300


def test_the_file_that_is_broken_above_is_good(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text(GOOD, encoding="utf-8")
    assert load_cluster(tmp_path / "cluster.toml").world_size == 2


def test_an_island_is_refused(tmp_path: Path) -> None:
    text = 'name = "islands"\n[[host]]\nname = "h{i}"\ncount = 2\ncard = { bandwidth_bps = 1, to = "s{i}" }'
    (tmp_path / "cluster.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="islands: no route from 'h0' to 'h1'; add the missing link or card"):
        load_cluster(tmp_path / "cluster.toml")


def test_a_link_in_one_direction_only_is_refused(tmp_path: Path) -> None:
    link = '[[link]]\nsource = "b"\ntarget = "a"\nbandwidth_bps = 1\none_way = true'
    (tmp_path / "cluster.toml").write_text(f'name = "x"\n[[host]]\nname = "a"\n[[host]]\nname = "b"\n{link}', encoding="utf-8")
    with pytest.raises(UserError, match="no route from 'a' to 'b'"):
        load_cluster(tmp_path / "cluster.toml")


def test_a_missing_file_and_an_unknown_name_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: there is no such file"):
        load_cluster(tmp_path / "nowhere.toml")
    with pytest.raises(UserError, match=r"there is no cluster 'two-rakcs'; give a \.toml file or one of: .*two-racks"):
        load_cluster("two-rakcs")


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UserError, match=r"folder\.toml: cannot be read: .*directory"):
        load_cluster(tmp_path / "folder.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(UserError, match=r"latin\.toml: cannot be read: .*utf-8"):
        load_cluster(tmp_path / "latin.toml")


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_cluster(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "two-racks").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_cluster("two-racks").world_size == 8


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ((Host(name="h", devices=()),), "host 'h' has no device; a host has one or more"),
        ((Host(name="h", devices=(Device(name="cpu0"),)),), "device 'cpu0': its name must begin with 'h/'"),
    ],
)
def test_a_cluster_made_in_python_is_checked_too(hosts, message) -> None:
    with pytest.raises(UserError, match=message):
        Cluster(name="made", hosts=hosts)
