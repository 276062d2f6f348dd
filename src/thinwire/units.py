"""Numbers with units, as people write them in files and as the tables show them.

Base units: bit/s for rates (networks count bits), s, B (bytes), B/s (of memory), flop/s. Decimal prefixes k M G T P multiply
by 1000; Ki Mi Gi Ti by 1024 and are for bytes only.
"""

import re
from decimal import Decimal
from math import isfinite

from thinwire.errors import UserError

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}

_FACTORS: dict[str, dict[str, float]] = {
    "bit/s": {f"{prefix}bit/s": factor for prefix, factor in _DECIMAL.items()}
    | {f"{prefix}B/s": 8 * factor for prefix, factor in _DECIMAL.items()},
    "s": _SECONDS,
    "B/s": {f"{prefix}B/s": factor for prefix, factor in _DECIMAL.items()},
    "B": {f"{prefix}B": factor for prefix, factor in (_DECIMAL | _BINARY).items()},
    "flop/s": {f"{prefix}flop/s": factor for prefix, factor in _DECIMAL.items()},
    "": {"": 1.0, "%": 0.01},
}
_EXAMPLES = {"bit/s": "100 Mbit/s", "s": "50 us", "B": "4 GiB", "B/s": "2 TB/s", "flop/s": "10 Gflop/s", "": "0.5 or 50 %"}
_NUMBER = re.compile(r"\s*([+-]?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*")


def parse(value: int | float | str, unit: str) -> float:
    """Return `value` in the base unit `unit` ("bit/s", "s", "B", "B/s", "flop/s" or "" for a plain fraction).

    A bare number is already in the base unit. Raises UserError naming the allowed units otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f"{value!r} is not a quantity; write a number in {unit or 'no unit'} or e.g. {_EXAMPLES[unit]!r}")
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        if match is None:
            raise UserError(f"{value!r} is not a number with a unit; e.g. {_EXAMPLES[unit]!r}")
        factors = _FACTORS[unit]
        if match.group(2) and match.group(2) not in factors:
            allowed = ", ".join(factors) if unit != "bit/s" else "bit/s kbit/s Mbit/s Gbit/s Tbit/s, or B/s kB/s MB/s GB/s"
            raise UserError(f"{value!r} has a wrong unit; allowed: {allowed}; e.g. {_EXAMPLES[unit]!r}")
        number = float(Decimal(match.group(1)) * Decimal(repr(factors.get(match.group(2), 1.0))))  # 50 us is 5e-05
    else:
        number = float(value)
    if not isfinite(number):
        raise UserError(f"{value!r} is not a quantity; it must be finite, e.g. {_EXAMPLES[unit]!r}")
    return number


def show(value: float, unit: str) -> str:
    """Write `value` (in the base unit) for a person: three significant digits and the prefix that fits."""
    if unit == "s":
        return _show_seconds(value)
    if unit == "B":
        return _scaled(value, [("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)])
    prefixes = [(f"{prefix}{unit}", factor) for prefix, factor in reversed(_DECIMAL.items())]
    return _scaled(value, prefixes) if unit else f"{value:.3g}"


def _show_seconds(value: float) -> str:
    if abs(value) >= 120:
        return f"{value / 60:.1f} min"
    return _scaled(value, [("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)])


def _scaled(value: float, scales: list[tuple[str, float]]) -> str:
    for name, factor in scales:
        if abs(value) >= factor * 0.9995:
            scaled = value / factor
            return f"{scaled:.0f} {name}" if abs(scaled) >= 99.95 else f"{scaled:.3g} {name}"
    return f"{value / scales[-1][1]:.3g} {scales[-1][0]}"
