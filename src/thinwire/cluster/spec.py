"""What a cluster file may hold: its tables and keys, with the checks that need only one of them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from thinwire.cluster.model import Quantity
from thinwire.units import parse

MAX_COUNT = 100_000

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


def _quantity(unit: str, *, zero: bool = False) -> BeforeValidator:
    def read(value: Any) -> Quantity:
        if isinstance(value, Quantity):
            return value
        if not isinstance(value, dict):
            return checked(Quantity(parse(value, unit)))
        unknown = set(value) - {"value", "source", "low", "high", "date"}
        if unknown or "value" not in value:
            raise ValueError(f"{value}: a measured quantity is a table of value, source, low, high, date")
        if value.get("source", "measured") not in ("declared", "measured"):
            raise ValueError(f"source = {value['source']!r}; allowed: declared, measured")
        ends = {end: parse(value[end], unit) for end in ("low", "high") if end in value}
        if len(ends) == 2 and ends["low"] > ends["high"]:
            raise ValueError(f"low = {ends['low']:g} is above high = {ends['high']:g}")
        date = str(value["date"]) if "date" in value else None
        return checked(Quantity(parse(value["value"], unit), value.get("source", "measured"), date=date, **ends))

    def checked(quantity: Quantity) -> Quantity:
        if quantity.value < 0 or (quantity.value == 0 and not zero):
            raise ValueError(f"{quantity.value:g} is not allowed; it must be {'0 or more' if zero else 'above 0'}")
        return quantity

    return BeforeValidator(read)


Bandwidth = Annotated[Quantity, _quantity("bit/s")]
Latency = Annotated[Quantity, _quantity("s", zero=True)]
Memory = Annotated[Quantity, _quantity("B")]
Burst = Annotated[Quantity, _quantity("B", zero=True)]
Rate = Annotated[Quantity, _quantity("flop/s")]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class DeviceSpec(_Spec):
    """`count` equal devices of a host; {j} in the name counts them."""

    name: str = ""
    kind: str = "cpu"
    count: Count = 1
    flops_per_s: Rate | None = None
    memory_bytes: Memory | None = None


class Cable(_Spec):
    """Two links, one each way; the way back is equal unless said otherwise. burst_bytes: of both."""

    bandwidth_bps: Bandwidth
    latency_s: Latency = Quantity(0.0)
    back_bandwidth_bps: Bandwidth | None = None
    back_latency_s: Latency | None = None
    burst_bytes: Burst = Quantity(0.0)


class CardSpec(Cable):
    """A cable whose near end is known: to the rack's switch, or to `to`."""

    to: str | None = None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class HostSpec(_Spec):
    """`count` equal hosts; {i} in name, rack and address counts them."""

    name: str
    count: Count = 1
    device: Annotated[list[DeviceSpec], BeforeValidator(_listed), Field(min_length=1)] = [DeviceSpec()]
    card: CardSpec | None = None
    rack: str | None = None
    address: str | None = None


class RackSpec(_Spec):
    """A switch and its cable to the core switch."""

    name: str
    count: Count = 1
    uplink: CardSpec


class SwitchSpec(_Spec):
    """`count` equal switches."""

    name: str
    kind: Literal["network", "nvswitch", "optical"] = "network"
    count: Count = 1


class LinkSpec(Cable):
    """One cable, or one for each value of the counters in `each`."""

    source: str
    target: str
    one_way: bool = False
    each: dict[str, Count] = {}


class ClusterSpec(_Spec):
    """The whole file."""

    name: str
    host: list[HostSpec] = Field(min_length=1)
    rack: list[RackSpec] = []
    switch: list[SwitchSpec] = []
    link: list[LinkSpec] = []
    ranks: list[str] = []
