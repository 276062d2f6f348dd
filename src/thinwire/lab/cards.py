"""What the network cards themselves counted over a command: the outside witness of every byte that was sent."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.cluster import Cluster
from thinwire.units import show

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class CardCount:
    """Whole frames in bytes, as one card counted them; `*_share` is the part of the line rate that was used."""

    host: str
    interface: str
    sent_bytes: int
    received_bytes: int
    sent_share: float
    received_share: float


def table(cards: tuple[CardCount, ...], seconds: float) -> "Table":
    """The counters for the terminal (rich)."""
    from rich.table import Table

    result = Table(title=f"network cards, {show(seconds, 's')}", title_justify="left")
    for name, side in (("card", "left"), ("sent", "right"), ("of its rate", "right")):
        result.add_column(name, justify=side)  # type: ignore[arg-type]
    result.add_column("received", justify="right")
    result.add_column("of its rate", justify="right")
    for card in cards:
        sent, received = show(card.sent_bytes, "B"), show(card.received_bytes, "B")
        shares = f"{card.sent_share:.1%}", f"{card.received_share:.1%}"
        result.add_row(f"{card.host} {card.interface}", sent, shares[0], received, shares[1])
    return result


def write(path: Path, cards: tuple[CardCount, ...], ledger_sent_bytes: dict[str, int]) -> None:
    """cards.json: the counters, and beside them what the ledgers of each host's ranks say they sent."""
    content = {"cards": [asdict(card) for card in cards], "ledger_sent_bytes": ledger_sent_bytes}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def ledger_sent_bytes(cluster: Cluster, run_folder: Path) -> dict[str, int]:
    """Bytes that the ledger of a run folder says each host sent; empty where the run left no ledger."""
    path = run_folder / "ledger.json"
    if not path.is_file():
        return {}
    sent: Counter[str] = Counter()
    for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
        sent[cluster.host_of(entry["rank"]).name] += entry["wire_bytes"]
    return dict(sent)
