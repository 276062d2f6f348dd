"""The page: what it prints is in the folder, it asks nobody for anything, every gap is named, and it fits the window."""

import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
from chromium import framed, screenshot
from PIL import Image
from run_folders import RUN_TOML, make_run

from thinwire.cluster import load_cluster, shipped_clusters
from thinwire.record import Examples, RunFolder
from thinwire.report import Facts, page, write_report
from thinwire.report.charts import MAX_POINTS, Series, _thinned
from thinwire.report.diagram import diagram
from thinwire.report.facts import card_rows, setup_bytes, step_rows, transfer_rows
from thinwire.report.network import picture
from thinwire.report.text import percent, whole
from thinwire.stepcost import LinkLoad
from thinwire.tasks.pictures import svg, uri

SECTIONS = ["loss", "step", "bytes", "network", "assumptions", "settings"]
OPTIONAL = ["predicted.json", "measured.json", "ledger.json", "cards.json", "cluster.toml", "run.toml", "events.jsonl"]


class Balance(HTMLParser):
    """Counts tags that are closed in the wrong order, and collects the words of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def check_form(text: str) -> str:
    """Balanced tags, well-formed SVG, nothing external, no nan; returns the words of the page."""
    balance = Balance(text)
    assert balance.open == [] and balance.wrong == []
    for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(found)
        assert not re.search(r'="[^"]*\b(nan|inf)\b', re.sub(r'data-hover="[^"]*"', "", found))
    addresses = set(re.findall(r"\w+://[^\"'<\s]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not addresses
    assert not re.search(r"<(link|iframe|object)\b|\bsrc=(?!.data:image/)|@import|url\(|fetch\(|XMLHttpRequest", text)
    words = "\n".join(balance.words)
    assert not re.search(r"\b(nan|inf|None)\b", words), re.findall(r".*\b(?:nan|inf|None)\b.*", words)
    for name in SECTIONS:
        assert f'<section id="{name}">' in text
        body = text.split(f'<section id="{name}">')[1].split("</section>")[0]
        assert len(re.sub(r"<[^>]*>", "", body)) > 30, f"section {name} is blank"
    return words


@pytest.mark.parametrize("name", sorted(shipped_clusters()))
def test_every_shipped_cluster_makes_a_sound_page(tmp_path: Path, name: str) -> None:
    cluster = load_cluster(name)
    folder = make_run(tmp_path / "run", cluster, steps=20)
    words = check_form(page(Facts(folder)))
    assert cluster.name in words and "wrong" not in words
    assert "Not in this run folder" not in words
    drawn = page(Facts(folder)).count('class="host"')
    assert drawn == len(cluster.hosts) or len(cluster.hosts) in (1, 128)


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_the_folder(tmp_path: Path, seed: int) -> None:
    folder = make_run(tmp_path / "run", load_cluster("four-hosts-100mbit"), seed=seed, steps=40)
    words = check_form(page(Facts(folder)))
    facts = Facts(folder)
    measured_, predicted = folder.measured(), folder.predicted()
    assert measured_ and predicted
    for cost, key in itertools.product((measured_, predicted), ("step_s", "compute_s", "exposed_s")):
        assert f"{1000 * getattr(cost, key):.1f} ms" in words
    rows = {row.key: row for row in step_rows(facts)}
    assert percent(predicted.step_s / measured_.step_s - 1, signed=True) in words
    assert rows["step_s"].predicted == predicted.step_s and rows["step_s"].measured == measured_.step_s
    for entry in json.loads((folder.path / "ledger.json").read_text())["entries"]:
        assert entry["last_step"] < 0 or whole(entry["wire_bytes"]) in words
    for card in json.loads((folder.path / "cards.json").read_text())["cards"]:
        assert whole(card["sent_bytes"]) in words and whole(card["received_bytes"]) in words
    held_out = folder.evals()[-1].loss
    assert f"{held_out:.3f}" in words and "2.451" in words and "bigram table" in words


def test_examples_are_shown_with_their_pictures(tmp_path: Path) -> None:
    """Lines up to an empty one are one example, and each line is, where there is none."""
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=2)
    assert '<section id="examples">' not in page(Facts(folder))
    pixel = uri(svg(numpy.zeros((1, 1, 3), numpy.uint8)))
    folder.write("examples.json", Examples(step=2, lines=(pixel, "a coat", "", "a <b>bag</b>", "")))
    text = page(Facts(folder))
    words = check_form(text)
    assert f'<img src="{pixel}" alt="">' in text and "a <b>bag</b>" in words
    assert Facts(folder).example_lines == [[pixel, "a coat"], ["a <b>bag</b>"]]
    folder.write("examples.json", Examples(step=2, lines=("one", "two")))
    assert Facts(folder).example_lines == [["one"], ["two"]]


def test_text_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a<b>&'\"", load_cluster("laptop"), steps=2, end="failed: <b>rank 2</b> & co")
    text = page(Facts(folder))
    check_form(text)
    assert "<script>alert" in RUN_TOML and "<script>alert" not in text
    assert "<b>rank 2" not in text and "&lt;b&gt;rank 2" in text


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_missing_is_named(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    without = tuple(random_.sample(OPTIONAL, random_.randrange(1, len(OPTIONAL) + 1)))
    end = random_.choice(["done", "interrupted", "failed: rank 2 died", None])
    steps = random_.choice([1, 2, 30])
    folder = make_run(
        tmp_path / "run", load_cluster(random_.choice(["two-racks", "laptop"])), seed, steps, without=without, end=end
    )
    words = check_form(page(Facts(folder)))
    gaps = words.split("Not in this run folder")[1]
    for name in set(without) - {"events.jsonl"}:
        assert f"{name} is absent" in gaps
    if "events.jsonl" in without:
        assert "No step was recorded" in gaps
    elif end != "done":
        assert (end or "no end recorded") in words


def test_a_bare_record_is_enough(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write("record.json", {"thinwire": "0.1.0", "started": "now", "world_size": 1, "hosts": ["here"]})
    words = check_form(page(Facts(folder)))
    assert "No step was recorded" in words


def test_medians_stand_in_for_a_measurement_and_are_called_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=31, without=("measured.json",), end=None)
    facts = Facts(folder)
    assert facts.measured is not None
    times = sorted(step.step_s for step in folder.steps()[1:])
    assert facts.measured.step_s == pytest.approx((times[14] + times[15]) / 2)
    assert "medians over 30 of 31 step events, the first left out" in check_form(page(facts))


@pytest.mark.parametrize(("steps", "nan_from"), [(30, 11), (30, 1), (1, 1), (1, None)])
def test_a_loss_that_is_not_finite_is_a_gap_and_is_named(tmp_path: Path, steps: int, nan_from: int | None) -> None:
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=steps, nan_from=nan_from)
    words = check_form(page(Facts(folder)))
    assert ("not a finite number" in words) == (nan_from is not None)
    if nan_from is not None:
        assert f"first at step {nan_from}" in words


@pytest.mark.parametrize("change", [-1, 1])
def test_one_byte_or_one_call_too_few_is_not_equal(tmp_path: Path, change: int) -> None:
    folder = make_run(tmp_path / "run", load_cluster("four-hosts-100mbit"), steps=10)
    assert all(row.equal for row in transfer_rows(Facts(folder)))
    content = json.loads((folder.path / "ledger.json").read_text())
    content["entries"][-1]["wire_bytes"] += change
    folder.write("ledger.json", content)
    rows = transfer_rows(Facts(folder))
    assert [row.equal for row in rows] == [True, True, False]
    assert "2 of 3 predicted transfers" in check_form(page(Facts(folder)))
    dropped = [entry for entry in content["entries"] if entry["label"] != "gradients/bucket1"]
    folder.write("ledger.json", {"entries": dropped})
    assert [row.equal for row in transfer_rows(Facts(folder))] == [True, False, False]


def test_a_transfer_of_every_few_steps_is_counted_by_its_events(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=20)
    transfer = {"label": "outer", "axis": "data", "op": "all_reduce", "message_bytes": 600, "calls": 1, "every": 4}
    folder.write("predicted.json", {"step_s": 1.0, "transfers": [{**transfer, "wire_bytes_per_step": 225}]})
    entry = {"label": "outer", "axis": "data", "op": "all_reduce", "message_bytes": 600, "calls": 5, "wire_bytes": 4500}
    span = {"first_step": 3, "last_step": 19}
    folder.write("ledger.json", {"entries": [{**entry, **span, "rank": rank} for rank in range(4)]})
    assert [row.equal for row in transfer_rows(Facts(folder))] == [True]


def test_what_was_sent_before_ddp_ordered_its_buckets_is_a_row_of_its_own(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=10)
    content = json.loads((folder.path / "ledger.json").read_text())
    for entry in [entry for entry in content["entries"] if entry["label"] == "gradients/bucket0"]:
        entry["wire_bytes"] -= entry["wire_bytes"] // entry["calls"]
        entry["calls"], entry["first_step"] = 9, 1
        first = {"calls": 1, "message_bytes": 77, "wire_bytes": 115, "first_step": 0, "last_step": 0}
        content["entries"].append({**entry, **first})
    folder.write("ledger.json", content)
    rows = transfer_rows(Facts(folder))
    assert [row.equal for row in rows] == [True, True, True, False]
    assert rows[-1].ledger_low == 115 and math.isnan(rows[-1].predicted_bytes)


@pytest.mark.parametrize(
    ("steps", "calls", "equal"), [(20, 4, True), (18, 4, True), (20, 3, False), (18, 5, False), (11, 2, True)]
)
def test_one_more_event_may_end_the_run(tmp_path: Path, steps: int, calls: int, equal: bool) -> None:
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=steps)
    transfer = {"label": "loss", "axis": "data", "op": "all_reduce", "message_bytes": 8, "calls": 1, "every": 5}
    folder.write("predicted.json", {"step_s": 1.0, "transfers": [{**transfer, "wire_bytes_per_step": 12 / 5}]})
    content = json.loads((folder.path / "ledger.json").read_text())
    span = {"calls": calls, "wire_bytes": 12 * calls, "first_step": 4, "last_step": steps - 1}
    content["entries"] += [{**transfer, **span, "rank": rank} for rank in range(4)]
    folder.write("ledger.json", content)
    assert transfer_rows(Facts(folder))[0].equal is equal


def test_what_was_sent_before_the_first_step_is_not_counted_with_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=1)
    entries = json.loads((folder.path / "ledger.json").read_text())["entries"]
    assert setup_bytes(Facts(folder)) == sum(entry["wire_bytes"] for entry in entries if entry["label"] == "set-up") > 0


@pytest.mark.parametrize("count", [3, MAX_POINTS, MAX_POINTS + 1, 12345])
def test_of_a_long_line_some_points_are_drawn_from_the_first_to_the_last(count: int) -> None:
    line = Series("x", "#000", [(float(k), 2.0 * k) for k in range(count)], [str(k) for k in range(count)])
    drawn = _thinned(line)
    places = [int(x) for x, _ in drawn.points]
    assert (places[0], places[-1], len(places)) == (0, count - 1, min(count, MAX_POINTS))
    assert places == sorted(set(places)) and list(drawn.labels) == [str(k) for k in places]
    assert [y for _, y in drawn.points] == [2.0 * k for k in places]


@pytest.mark.parametrize(("name", "slow"), [("home-internet", 0), ("two-racks", 0), ("one-slow-host", 1)])
def test_a_host_is_called_slow_beside_the_others_not_for_its_slower_direction(name: str, slow: int) -> None:
    cluster = load_cluster(name)
    loads = [
        LinkLoad(source=link.source, target=link.target, bytes_per_step=1, busy_s=1 / link.bandwidth_bps.value)
        for link in cluster.links
    ]
    assert diagram(picture(cluster, loads), 1.0).count(" slow</text>") == slow


def test_cards_add_up_by_host(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", load_cluster("laptop"), steps=2)
    cards = [{"host": "a", "interface": f"eth{k}", "sent_bytes": 52, "received_bytes": 7} for k in range(2)]
    folder.write("cards.json", {"cards": cards, "ledger_sent_bytes": {"a": 100}})
    (row,) = card_rows(Facts(folder))
    assert row.sent_bytes == 104 and row.received_bytes == 14
    assert math.isclose(row.difference, 0.04) and row.interfaces == "eth0, eth1"


@pytest.mark.long
@pytest.mark.parametrize("name", ["two-racks", "32-nodes-25gbe"])
def test_it_looks_like_something_and_fits_desktop_and_phone(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run", load_cluster(name))
    path = write_report(folder)
    screenshot(path, tmp_path / "page.png", 1200, 1600)
    picture = numpy.asarray(Image.open(tmp_path / "page.png").convert("RGB")) / 255
    assert picture.shape == (1600, 1200, 3)
    ink = (picture.min(axis=2) < 0.6).mean()
    assert 0.01 < ink < 0.5, f"{ink:.1%} of the picture is dark"
    bands = [band.std() for band in picture.reshape(8, 200, 1200, 3)]
    assert min(bands) > 0.01, f"a band of the picture is blank: {bands}"
    for width, seen in zip((1200, 375), framed(path.read_text(), (1200, 375), tmp_path), strict=True):
        assert seen["client"] == width and seen["scroll"] <= width and seen["outside"] == []
        assert seen["readout"].startswith("step 300 · ")
        assert seen["text"] > 9, "the text of a chart is too small to read"
