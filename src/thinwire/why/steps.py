"""Traces of all ranks -> the mean step. Pure: no torch, no clocks.

A step ends where an optimizer has stepped (of several the one that steps most rarely), else where the pattern of calls begins
anew. Only steps with the usual pattern of calls on every rank count, and of these the middle half by duration, so that the terms
of their mean add up. Noting calls takes time: where steps are there whose calls were not noted, they say how long a step is, and
the terms of the others are made to add up to that. A rank's step is a program:

    issue   busy so long, then a call is issued
    wait    busy so long, then the rank stands still until some calls are over

A wait of which Python sees nothing (DistributedDataParallel waits in C++) begins at the last call of a backward pass.

    waiting     of a wait, until the last rank has issued the last of these calls: what an infinitely fast network would leave
    exposed     the rest of it
    service     of a call, from the moment when all have issued it and the wire is free of earlier ones, to its end
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from thinwire.errors import UserError
from thinwire.why.trace import (
    BACKWARD,
    BACKWARD_END,
    DATA,
    DATA_END,
    FORWARD,
    OPTIMIZER,
    PLAIN,
    STEP,
    Call,
    Event,
    Mark,
    Trace,
    Wait,
)

PHASES = ("data", "outside", "forward", "backward", "issuing", "optimizer")
"""What a rank is busy with: the data loader; anything else before the first forward pass; the passes; handing calls to the
backend; the update."""
FEWEST_STEPS = 3
PASSED_ON = ("send", "recv")
"""Between two ranks; how long they stand still for these is taken as it was."""

Busy = tuple[float, ...]
"""Seconds by phase."""
Key = tuple[tuple[int, ...], int]
"""A call: its group, and the how manieth of this group in a step."""


@dataclass(frozen=True, slots=True)
class Item:
    """Busy, then `kind` ("issue" one call, "wait" for some)."""

    kind: str
    calls: tuple[Key, ...]
    busy: Busy


@dataclass(frozen=True, slots=True)
class Program:
    """Of a rank's step; tail: busy after the last item."""

    items: tuple[Item, ...]
    tail: Busy

    def times(self, factor: float) -> "Program":
        """The same, so many times as long."""
        items = (Item(one.kind, one.calls, tuple(factor * seconds for seconds in one.busy)) for one in self.items)
        return Program(tuple(items), tuple(factor * seconds for seconds in self.tail))

    def total(self, *phases: str) -> float:
        """Seconds of these phases; of all if none is named."""
        places = [PHASES.index(phase) for phase in phases or PHASES]
        return sum(busy[place] for busy in (*(item.busy for item in self.items), self.tail) for place in places)


@dataclass(frozen=True, slots=True)
class Made:
    """A call of the step. service_s: see the top of the file."""

    op: str
    message_bytes: int
    service_s: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The mean step. waiting_s, exposed_s: by rank; calls: of all groups, in the order in which they were issued."""

    step_s: float
    steps: int
    programs: tuple[Program, ...]
    calls: dict[Key, Made]
    waiting_s: tuple[float, ...]
    exposed_s: tuple[float, ...]

    @property
    def wire_s(self) -> float:
        """How long calls of the busiest rank are on the wire."""
        ranks = range(len(self.programs))
        return max(sum(made.service_s for (group, _), made in self.calls.items() if rank in group) for rank in ranks)


def profile(traces: Sequence[Trace], offsets_s: Sequence[float]) -> Profile:
    """The mean step. offsets_s: what to add to moments of each rank's clock to have those of the first one's.

    UserError if no pattern repeats.
    """
    cut = [_cut(trace) for trace in traces]
    count = min(map(len, cut))
    plain = [n for n in range(count) if any(isinstance(one, Mark) and one.what == PLAIN for one in cut[0][n])]
    walked = [[_walk(events) for events in steps] for steps in cut]
    patterns = [[_pattern(stretches) for stretches, _ in steps] for steps in walked]
    noted = [n for n in range(count) if n not in plain]
    usual = [Counter(found[n] for n in noted).most_common(1)[0][0] if noted else () for found in patterns]
    alike = [n for n in noted if all(found[n] == most for found, most in zip(patterns, usual, strict=True))]
    if len(alike) < FEWEST_STEPS:
        raise UserError(
            f"no step repeats: of {len(noted)} steps {len(alike)} are alike on all ranks; let the script go on for longer"
        )

    def took_s(n: int, rank: int = 0) -> float:
        return _moment(cut[rank][n][-1]) - _moment(cut[rank][n][0])

    def middle_half(numbers: list[int]) -> list[int]:
        quarter = len(numbers) // 4
        return sorted(sorted(numbers, key=took_s)[quarter : len(numbers) - quarter])

    kept = middle_half(alike)
    timed = middle_half(plain) if len(plain) >= FEWEST_STEPS else kept
    walks = [[steps[n] for n in kept] for steps in walked]
    arrivals, ends = _moments(walks, offsets_s)
    waiting, exposed = _blocked(walks, offsets_s, arrivals)
    step_s = fmean(map(took_s, timed))
    times = [step_s / fmean(took_s(n, rank) for n in kept) for rank in range(len(traces))]
    return Profile(
        step_s=step_s,
        steps=len(timed),
        programs=tuple(_mean_program(own).times(factor) for own, factor in zip(walks, times, strict=True)),
        calls=_calls(walks, arrivals, ends),
        waiting_s=tuple(factor * seconds for seconds, factor in zip(waiting, times, strict=True)),
        exposed_s=tuple(factor * seconds for seconds, factor in zip(exposed, times, strict=True)),
    )


@dataclass(slots=True)
class _Stretch:
    """An item of one step as it was; of a wait also from when to when."""

    kind: str
    calls: tuple[Call, ...]
    keys: tuple[Key, ...]
    busy: list[float]
    begun: float = 0.0
    ended: float = 0.0


def period(signs: Sequence[object]) -> int:
    """The length of the shortest pattern that the end of `signs` repeats three times; 0 if there is none."""
    for length in range(1, len(signs) // 3 + 1):
        if all(signs[-place] == signs[-place - length] for place in range(1, 2 * length + 1)):
            return length
    return 0


def _moment(event: Event) -> float:
    moment: float = event.at if isinstance(event, Mark) else event.issued if isinstance(event, Call) else event.ended
    return moment


def _cut(trace: Trace) -> list[list[Event]]:
    """The events of each step; the first one is the one that has ended the step before."""
    counts = Counter(event.who for event in trace if isinstance(event, Mark) and event.what == STEP)
    if counts:
        rarest = min(counts, key=counts.__getitem__)
        ends = [n for n, event in enumerate(trace) if isinstance(event, Mark) and event.what == STEP and event.who == rarest]
    else:
        places = [n for n, event in enumerate(trace) if isinstance(event, Call)]
        length = period([(event.op, event.message_bytes, event.group) for event in trace if isinstance(event, Call)])
        ends = places[len(places) % length :: length] if length else []
    return [trace[a : b + 1] for a, b in pairwise(ends)]


def _pattern(stretches: Sequence[_Stretch]) -> tuple[object, ...]:
    return tuple((one.kind, one.keys, tuple((call.op, call.message_bytes) for call in one.calls)) for one in stretches)


def _walk(events: Sequence[Event]) -> tuple[list[_Stretch], list[float]]:
    """The stretches of one step, and what the rank was busy with after the last."""
    found: list[_Stretch] = []
    cursor, busy, phase, before = _moment(events[0]), [0.0] * len(PHASES), "outside", "outside"
    keys: dict[int, Key] = {}
    numbers: Counter[tuple[int, ...]] = Counter()
    waited = {id(event.call) for event in events if isinstance(event, Wait)}
    hidden: list[Call] = []

    def until(moment: float, doing: str = "") -> None:
        nonlocal cursor
        busy[PHASES.index(doing or phase)] += max(0.0, moment - cursor)
        cursor = max(cursor, moment)

    def close(kind: str, calls: Sequence[Call], ended: float) -> None:
        nonlocal cursor, busy
        found.append(_Stretch(kind, tuple(calls), tuple(keys[id(call)] for call in calls), busy, cursor, max(cursor, ended)))
        cursor, busy = max(cursor, ended), [0.0] * len(PHASES)

    def close_hidden(latest: float) -> None:
        close("wait", hidden, min(latest, max(latest if call.ended is None else call.ended for call in hidden)))
        hidden.clear()

    for event in events[1:]:
        if isinstance(event, Call):
            if event.op in PASSED_ON:
                continue
            until(event.issued)
            keys[id(event)] = event.group, numbers[event.group]
            numbers[event.group] += 1
            close("issue", [event], event.issued)
            if event.returned is not None:
                until(event.returned, "issuing")
            if phase == "backward" and id(event) not in waited:
                hidden.append(event)
        elif isinstance(event, Wait):
            if id(event.call) not in keys:
                continue
            if hidden and phase == "backward" and event.call.issued >= hidden[-1].issued:  # of which parameters were used
                close_hidden(event.begun)
            until(event.begun)
            close("wait", [event.call], event.ended)
        else:
            if event.what == BACKWARD_END and hidden:
                close_hidden(event.at)
            until(event.at)
            if event.what == DATA:
                before, phase = phase, "data"
            elif event.what == DATA_END:
                phase = before
            else:
                phase = {FORWARD: "forward", BACKWARD: "backward", BACKWARD_END: "forward", OPTIMIZER: "optimizer"}.get(
                    event.what, phase
                )
    until(_moment(events[-1]))
    return found, busy


_Walks = Sequence[Sequence[tuple[list[_Stretch], list[float]]]]
"""By rank, by step."""
_Moments = list[dict[Key, float]]
"""By step, of each call, by the first rank's clock."""


def _moments(walks: _Walks, offsets_s: Sequence[float]) -> tuple[_Moments, _Moments]:
    """When the last rank issued each call, and when the last one saw its end."""
    arrivals: _Moments = []
    ends: _Moments = []
    for n in range(len(walks[0])):
        issued: dict[Key, list[float]] = defaultdict(list)
        ended: dict[Key, list[float]] = defaultdict(list)
        for own, offset_s in zip(walks, offsets_s, strict=True):
            for stretch in own[n][0]:
                if stretch.kind == "issue":
                    call = stretch.calls[0]
                    issued[stretch.keys[0]].append(call.issued + offset_s)
                    if call.ended is not None:
                        ended[stretch.keys[0]].append(call.ended + offset_s)
        arrivals.append({key: max(found) for key, found in issued.items()})
        ends.append({key: max(arrivals[-1][key], *ended[key]) for key in issued})
    return arrivals, ends


def _blocked(walks: _Walks, offsets_s: Sequence[float], arrivals: _Moments) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(waiting, exposed) of a step, by rank."""
    waiting, exposed = [], []
    for own, offset_s in zip(walks, offsets_s, strict=True):
        late = still = 0.0
        for (stretches, _), last in zip(own, arrivals, strict=True):
            for stretch in stretches:
                if stretch.kind == "wait":
                    arrived = max(last[key] for key in stretch.keys) - offset_s
                    late += max(0.0, min(stretch.ended, arrived) - stretch.begun)
                    still += stretch.ended - stretch.begun
        waiting.append(late / len(own))
        exposed.append((still - late) / len(own))
    return tuple(waiting), tuple(exposed)


def _mean_program(own: Sequence[tuple[list[_Stretch], list[float]]]) -> Program:
    def mean(parts: Sequence[Sequence[float]]) -> Busy:
        return tuple(map(fmean, zip(*parts, strict=True)))

    items = [
        Item(alike[0].kind, alike[0].keys, mean([stretch.busy for stretch in alike]))
        for alike in zip(*(stretches for stretches, _ in own), strict=True)
    ]
    return Program(tuple(items), mean([tail for _, tail in own]))


def _calls(walks: _Walks, arrivals: _Moments, ends: _Moments) -> dict[Key, Made]:
    services: dict[Key, list[float]] = defaultdict(list)
    for last, ended in zip(arrivals, ends, strict=True):
        free: dict[int, float] = defaultdict(lambda: float("-inf"))
        for key in sorted(last, key=last.__getitem__):
            begun = max(last[key], *(free[rank] for rank in key[0]))
            services[key].append(max(0.0, ended[key] - begun))
            free.update(dict.fromkeys(key[0], max(begun, ended[key])))
    made: dict[Key, Made] = {}
    for own in walks:
        for stretch in own[0][0]:
            if stretch.kind == "issue":
                key, call = stretch.keys[0], stretch.calls[0]
                made.setdefault(key, Made(call.op, call.message_bytes, fmean(services[key])))
    return made
