"""The machinery of benchmarks: options, turns, rows and their table; and one small comparison with plain PyTorch."""

import json
import threading
from pathlib import Path

import pytest
from rich.console import Console

from command import thinwire
from thinwire.bench.ddp import _row
from thinwire.bench.peers.plain_ddp import Turns
from thinwire.bench.ranks import run_local
from thinwire.bench.registry import BENCHMARKS, describe, find, parse_options, table
from thinwire.errors import UserError


def test_every_benchmark_can_be_found_and_says_what_it_is() -> None:
    assert all(callable(find(name)) for name in BENCHMARKS)
    assert all(len(about) > 20 for about in describe().values())
    with pytest.raises(UserError, match="there is no benchmark 'x'; there are: "):
        find("x")


def test_options_are_read_as_toml_and_unknown_ones_refused() -> None:
    assert parse_options(["turns=3", "hosts=[2, 4]", "kind=int4"]) == {"turns": 3, "hosts": [2, 4], "kind": "int4"}
    with pytest.raises(UserError, match="this benchmark has the options turns, steps, micro_batch"):
        find("ddp")(None, {"turn": 3})
    with pytest.raises(UserError, match="write KEY=VALUE"):
        parse_options(["turns"])


def test_a_table_shows_every_key_once() -> None:
    rows = [{"case": "a", "native_s": 0.1, "held": True}, {"case": "b", "link_bps": 1e8, "bytes": 2**20}]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table("x", rows))
    shown = console.export_text()
    for text in ("case", "native_s", "100 ms", "yes", "100 Mbit/s", "1 MiB"):
        assert text in shown
    console.file.close()


def test_contenders_take_turns(tmp_path: Path) -> None:
    """Whatever the threads' speed, the order is 0, 1, 2, 0, 1, 2, ..."""
    order: list[int] = []

    def contend(index: int) -> None:
        turns = Turns(tmp_path, index, 3, 0, lambda: None)
        for _ in range(5):
            turns.begin()
            order.append(index)
            turns.end()

    threads = [threading.Thread(target=contend, args=(index,)) for index in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert order == [0, 1, 2] * 5


def test_a_local_rank_that_fails_ends_the_others() -> None:
    with pytest.raises(UserError, match="a rank ended with 3"):
        run_local([["sh", "-c", '[ "$RANK" = 1 ] && exit 3; sleep 50']], 2)


def test_ratios_are_of_the_same_turn_and_the_bar_is_the_noise_where_links_are_shaped() -> None:
    """A machine that is half as fast for some turns changes no ratio; the noise is what lies between native's quartiles."""
    plain = {"exchange": [1.0, 1.0, 2.0, 2.0, 4.0], "no_exchange": [0.5] * 5, "processor": [0.25] * 5}
    ours = {"exchange": [1.1, 1.2, 2.2, 2.2, 4.4], "processor": [0.5] * 5}
    results = {"plain_ddp": plain, "our_ddp": ours}
    shaped, unshaped = _row("x", 2, results, None), _row("x", 2, results, 1.02)
    assert shaped["ratio"] == pytest.approx(1.1) and shaped["quartile_low"] == pytest.approx(1.1)
    assert (shaped["native_s"], shaped["ours_s"], shaped["no_exchange_s"]) == (2.0, 2.2, 0.5)
    assert (shaped["native_cpu_s"], shaped["ours_cpu_s"]) == (0.25, 0.5)
    assert shaped["noise"] == 0.5 and shaped["bar"] == 1.5 and shaped["held"]
    assert unshaped["bar"] == 1.02 and not unshaped["held"]


@pytest.mark.long
def test_ours_against_plain_ddp_gives_a_whole_row(tmp_path: Path) -> None:
    small = ["turns=1", "steps=1", "context=16", "layers=1", "width=16"]
    options = [part for change in small for part in ("--set", change)]
    done = thinwire("bench", "ddp", "--json", "rows.json", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["bench"] == "ddp" and content["machine"]["cores"]
    (row,) = content["rows"]
    assert row["native_s"] > 0 and row["ours_s"] > 0 and row["no_exchange_s"] > 0 and row["ratio"] > 0


@pytest.mark.long
def test_ranks_that_share_a_sequence_give_rows_beside_one_rank() -> None:
    options = {"sequence": 64, "steps": 1, "model": {"layers": 2, "width": 32, "heads": 4}}
    alone, keeping, again = find("sequence")(None, options)
    assert (alone["sent_bytes"], alone["speed_up"]) == (0, 1.0)
    assert again["sent_bytes"] - keeping["sent_bytes"] == 2 * 2 * 32 * 32 * 4  # layers, keys and values, tokens of a rank, width
    with pytest.raises(UserError, match=r"64 tokens are no multiple of 6; .* is 2$"):
        find("sequence")(None, options | {"ranks": [1, 3]})
