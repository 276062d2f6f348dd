"""The run folder: what a run leaves behind, and nothing that needs torch to read it."""

from thinwire.record.folder import RunFolder
from thinwire.record.schema import (
    Baseline,
    Card,
    Cards,
    Checkpoint,
    Data,
    End,
    Entry,
    Eval,
    Ledger,
    LedgerEntry,
    LinkLoad,
    Record,
    Resume,
    Step,
    StepCost,
    TransferCost,
)

__all__ = [
    "Baseline",
    "Card",
    "Cards",
    "Checkpoint",
    "Data",
    "End",
    "Entry",
    "Eval",
    "Ledger",
    "LedgerEntry",
    "LinkLoad",
    "Record",
    "Resume",
    "RunFolder",
    "Step",
    "StepCost",
    "TransferCost",
]
