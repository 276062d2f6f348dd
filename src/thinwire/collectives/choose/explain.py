"""A choice in words and numbers: what runs, what it puts on which link, how far from the bound, why the next best is worse."""

from typing import Any

from thinwire.cluster import Link
from thinwire.collectives.choose.native import pattern
from thinwire.collectives.choose.select import TIE, Priced, Selection
from thinwire.collectives.price import link_seconds
from thinwire.collectives.schedules.schedule import Schedule
from thinwire.units import show


def lines(selection: Selection) -> list[tuple[str, str]]:
    """(what, in words), from the choice to what it was chosen against."""
    best, native, second, bound = selection.best, selection.native, selection.runner_up, selection.bound
    found = [("algorithm", named(best)), ("moves", _moves(best)), ("predicted", f"{show(best.seconds, 's')}: {best.why}")]
    part = f", {bound.seconds / best.seconds:.0%} of the predicted time" if best.seconds else ""
    found.append(("bound", f"{show(bound.seconds, 's')}{part}: {bound.where}"))
    if second is not None:
        found.append(("runner-up", f"{named(second)}, {show(second.seconds, 's')}: {loses(best, second)}"))
    if native is not best:
        times = f" ({native.seconds / best.seconds:.2f} x)" if best.seconds else ""
        found.append(("native", f"{show(native.seconds, 's')}{times}: {native.why}"))
    seen = f"{selection.estimated} candidates estimated, {len(selection.ranking)} simulated, among {selection.call.p} ranks"
    found.append(("looked at", seen))
    return found + [("left out", sentence) for sentence in selection.left_out]


def as_dict(selection: Selection) -> dict[str, Any]:
    """Plain data, units in the names."""
    call, best, second = selection.call, selection.best, selection.runner_up
    return {
        "cluster": call.cluster.name,
        "op": call.op,
        "bytes": call.message_bytes,
        "ranks": list(call.cluster.ranks),
        "root": call.root,
        "algorithm": best.candidate.title,
        "order": best.candidate.order and list(best.candidate.order),
        "predicted_s": best.seconds,
        "why": best.why,
        "bound_s": selection.bound.seconds,
        "bound_where": selection.bound.where,
        "native_s": selection.native.seconds,
        "runner_up": second and second.candidate.title,
        "runner_up_s": second and second.seconds,
        "runner_up_why": second and loses(best, second),
        "links": [
            {"source": link.source, "target": link.target, "payload_bytes": size, "busy_s": link_seconds(link, size)}
            for link, size in fullest(best)
        ],
        "ranking": [{"algorithm": one.candidate.title, "predicted_s": one.seconds} for one in selection.ranking],
        "left_out": list(selection.left_out),
    }


def named(one: Priced) -> str:
    """The algorithm; for the backend's own, what that means."""
    candidate = one.candidate
    if candidate.model is not None:
        return candidate.title
    order = "in rank order" if candidate.order is None else f"in the order {' '.join(map(str, candidate.order))}"
    return f"{candidate.title} (the backend's own collective, {order})"


def fullest(one: Priced) -> list[tuple[Link, int]]:
    """Links with what they carry, those first that need longest for it."""
    return sorted(one.link_bytes.items(), key=lambda pair: -link_seconds(*pair))


def schedule_of(selection: Selection) -> Schedule | None:
    """What is run, or what the backend does by itself (positions in its own order); None if that is too large to write down."""
    call, candidate = selection.call, selection.best.candidate
    if candidate.model is not None:
        return candidate.schedule
    order = candidate.order
    return pattern(call.op, call.p, call.message_bytes, call.root if order is None else order.index(call.root))


def loses(best: Priced, other: Priced) -> str:
    """Why `other` is slower: what of its critical path grew most."""
    mine, its = best.run, other.run
    if mine is None or its is None or its.fullest is None:
        return other.why
    if other.seconds <= best.seconds:
        rule = "the backend's own code" if best.candidate.model is None else f"fewer messages, {len(mine.transfers)},"
        return f"faster by less than {TIE:.0%}: then {rule} is preferred ({len(its.transfers)} messages)"
    grown = {
        "software": its.software_s - mine.software_s,
        "latency": its.latency_s - mine.latency_s,
        "wire": its.wire_s - mine.wire_s,
    }
    most = max(grown, key=grown.__getitem__)
    if most != "wire":
        return f"{show(grown[most], 's')} more {most} on its critical path, {len(its.transfers)} messages ({len(mine.transfers)})"
    longer = its.busy * its.seconds - mine.busy * mine.seconds
    name = f"{its.fullest.source} -> {its.fullest.target}"
    if longer > 0.5 * (other.seconds - best.seconds):
        before = mine.link_bytes.get(its.fullest, 0)
        return f"{name} carries {show(its.link_bytes[its.fullest], 'B')} ({show(before, 'B')})"
    return f"its fullest link, {name}, is busy {its.busy:.1%} of the time ({mine.busy:.1%})"


def _moves(one: Priced) -> str:
    if one.run is None:
        return "too many messages to go through one by one"
    schedule = one.candidate.schedule
    steps = f"{len(schedule.steps)} steps, " if schedule else ""
    total = sum(transfer.payload_bytes for transfer in one.run.transfers)
    return f"{steps}{len(one.run.transfers)} messages, {show(total, 'B')} in all"
