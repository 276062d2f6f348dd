"""How long a step is, if its programs and its calls were these: every rank's program event by event, a few steps in turn.

A call begins when all of its group have issued it and the wires of all are free of earlier calls; it lasts its service time.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from thinwire.errors import UserError
from thinwire.why.steps import PHASES, Busy, Item, Key, Program

REPEATED = 3
"""Steps: the last one has forgotten that all ranks began at once."""


def replay(programs: Sequence[Program], service_s: Mapping[Key, float]) -> float:
    """Seconds of a step. UserError where ranks would wait for each other for ever."""
    now, free = [0.0] * len(programs), [0.0] * len(programs)
    finished = [0.0]
    for _ in range(REPEATED):
        place = [0] * len(programs)
        issued: dict[Key, dict[int, float]] = defaultdict(dict)
        ended: dict[Key, float] = {}
        going = True
        while going:
            going = False
            for rank, program in enumerate(programs):
                while place[rank] < len(program.items):
                    item = program.items[place[rank]]
                    if item.kind == "wait" and not all(key in ended for key in item.calls):
                        break
                    now[rank] += sum(item.busy)
                    if item.kind == "wait":
                        now[rank] = max(now[rank], *(ended[key] for key in item.calls))
                    else:
                        key = item.calls[0]
                        issued[key][rank] = now[rank]
                        if len(issued[key]) == len(key[0]):
                            over = max(*issued[key].values(), *(free[one] for one in key[0])) + service_s[key]
                            ended[key] = over
                            for one in key[0]:
                                free[one] = over
                    place[rank], going = place[rank] + 1, True
        if any(place[rank] < len(program.items) for rank, program in enumerate(programs)):
            raise UserError("the ranks' calls do not fit each other, so that their steps cannot be replayed")
        now = [moment + sum(program.tail) for moment, program in zip(now, programs, strict=True)]
        finished.append(max(now))
    return finished[-1] - finished[-2]


def scaled(program: Program, factors: Mapping[str, float]) -> Program:
    """With what a rank is busy with in these phases times a factor."""
    times = [factors.get(phase, 1.0) for phase in PHASES]

    def change(busy: Busy) -> Busy:
        return tuple(seconds * factor for seconds, factor in zip(busy, times, strict=True))

    return Program(tuple(replace(item, busy=change(item.busy)) for item in program.items), change(program.tail))


def merged(program: Program, heads: Mapping[Key, Key]) -> Program:
    """With calls sent together: each one of `heads` goes out with the call that it maps to, the last of them. What it takes to
    hand a call to the backend is saved with it.
    """
    issuing = PHASES.index("issuing")
    items: list[Item] = []
    nothing: Busy = (0.0,) * len(PHASES)
    carried, saved = nothing, False
    for item in program.items:
        own = [0.0 if saved and place == issuing else seconds for place, seconds in enumerate(item.busy)]
        busy = tuple(a + b for a, b in zip(carried, own, strict=True))
        calls = tuple(dict.fromkeys(heads.get(key, key) for key in item.calls))
        out = {key for one in items if one.kind == "issue" for key in one.calls}
        early = (item.kind == "issue" and calls != item.calls) or (item.kind == "wait" and not out.issuperset(calls))
        carried, saved = busy if early else nothing, early and item.kind == "issue"
        if not early:
            items.append(Item(item.kind, calls, busy))
    return Program(tuple(items), tuple(a + b for a, b in zip(carried, program.tail, strict=True)))


def overlapped(program: Program, keys: Sequence[Key], parts: Sequence[Key]) -> Program | None:
    """With `keys`, issued after the backward pass, cut into `parts`, which go out evenly within it and are waited for at its end.

    None where the backward pass goes on after the first of them, or other calls stand between them.
    """
    backward = PHASES.index("backward")
    mine = [n for n, item in enumerate(program.items) if set(item.calls) & set(keys)]
    if not mine or mine != list(range(mine[0], mine[-1] + 1)) or any(program.items[n].busy[backward] for n in mine[1:]):
        return None
    before = program.items[mine[0]].busy
    if not before[backward]:
        return None
    share = tuple(seconds / len(parts) if place == backward else 0.0 for place, seconds in enumerate(before))
    first = tuple(share[place] if place == backward else seconds for place, seconds in enumerate(before))
    cut = [Item("issue", (key,), share if n else first) for n, key in enumerate(parts)]
    between = [program.items[n].busy for n in mine[1:]]
    over = Item(
        "wait", tuple(parts), tuple(sum(each) for each in zip(*between, strict=True)) if between else (0.0,) * len(PHASES)
    )
    return Program((*program.items[: mine[0]], *cut, over, *program.items[mine[-1] + 1 :]), program.tail)
