"""Numbers as people read them: one scale for a column, a dash where nothing is known, the one-sentence verdict."""

import math
from collections.abc import Iterable
from datetime import datetime

from thinwire.stepcost import StepCost
from thinwire.units import show

UNKNOWN = "–"


def quantity(value: float, unit: str) -> str:
    """`value` with its unit ("B", "s", "bit/s", "1/s" for a bare number), or a dash."""
    if not math.isfinite(value):
        return UNKNOWN
    if unit == "1/s":
        return whole(value) if value >= 100 else f"{value:.3g}"
    return show(value, unit).replace(" us", " µs")


def percent(share: float, signed: bool = False) -> str:
    """0.0312 as "3.1 %" (signed: "+3.1 %"), or a dash."""
    if not math.isfinite(share):
        return UNKNOWN
    if 0 < abs(share) < 0.0005 and not signed:
        return "< 0.1 %"
    digits = 1 if abs(share) < 0.0995 else 0
    text = f"{abs(100 * share):.{digits}f} %"
    if not signed or float(text[:-2]) == 0.0:
        return text
    return f"{'+' if share > 0 else '−'}{text}"


def whole(value: float) -> str:
    """12345678 as "12 345 678" (thin spaces), or a dash."""
    return f"{value:,.0f}".replace(",", "\u2009") if math.isfinite(value) else UNKNOWN


def plain(value: float, digits: int) -> str:
    """Fixed digits; a dash where the value is not known."""
    return f"{value:.{digits}f}" if math.isfinite(value) else UNKNOWN


def moment(iso: str) -> str:
    """2026-11-21T09:30:00+00:00 as "2026-11-21 09:30 UTC"; what is not a date stays as it is."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".rstrip()


class Scale:
    """One unit and one number of decimals for a column of seconds, chosen for its largest value."""

    def __init__(self, values: Iterable[float]) -> None:
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        self.unit, self.factor = next(
            ((unit, factor) for unit, factor in (("s", 1.0), ("ms", 1e3)) if largest * factor >= 1), ("µs", 1e6)
        )
        scaled = largest * self.factor
        self.digits = 3 if scaled < 10 else 2 if scaled < 100 else 1

    def show(self, seconds: float) -> str:
        return plain(seconds * self.factor, self.digits)

    def with_unit(self, seconds: float) -> str:
        """A dash alone where nothing is known."""
        return f"{self.show(seconds)} {self.unit}" if math.isfinite(seconds) else UNKNOWN


def share(part: float, total: float) -> str:
    """`part` as a percentage of `total`."""
    return percent(part / total) if total else UNKNOWN


def verdict(measured: StepCost | None, predicted: StepCost | None) -> str:
    """The run in a sentence or two."""
    if measured is None:
        return "No step was recorded."
    seconds = Scale([measured.step_s]).with_unit
    words = [f"A step took {seconds(measured.step_s)}"]
    if math.isfinite(measured.compute_s) and math.isfinite(measured.exposed_s):
        words.append(
            f": {seconds(measured.compute_s)} computing, {seconds(measured.exposed_s)} waiting for the wire"
            f" ({share(measured.exposed_s, measured.step_s)})"
        )
    if measured.waiting_s > 0.01 * measured.step_s:
        words.append(f", {seconds(measured.waiting_s)} waiting for slower ranks")
    words.append(".")
    if predicted is not None and measured.step_s:
        off = (predicted.step_s - measured.step_s) / measured.step_s
        how = "equal" if abs(off) < 0.0005 else f"{percent(abs(off))} {'more' if off > 0 else 'less'}"
        words.append(f" Predicted: {seconds(predicted.step_s)}, {how}.")
    return "".join(words)
