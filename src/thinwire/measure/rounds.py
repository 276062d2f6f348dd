"""Who sends to whom at the same time. A flow is (source host, target host); in a round every host sends at most one
flow and receives at most one. No torch."""

import random
from collections.abc import Mapping, Sequence
from itertools import zip_longest

Flow = tuple[int, int]
Round = list[Flow]


def tournament(num_hosts: int) -> list[Round]:
    """Rounds of disjoint pairs in which everyone meets everyone once (Kirkman 1847, the circle method)."""
    places: list[int | None] = list(range(num_hosts))
    if num_hosts % 2:
        places.append(None)
    half = len(places) // 2
    rounds = []
    for _ in range(len(places) - 1):
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return [pairs for pairs in rounds if pairs]


def one_by_one(num_hosts: int) -> list[Round]:
    """Each host once as sender and once as receiver, with nothing else under way."""
    return [[(host, (host + 1) % num_hosts)] for host in range(num_hosts)]


def everybody(num_hosts: int, seed: int = 0) -> list[Round]:
    """Rounds in which all send and all receive; together they hold each ordered pair once.

    A shuffled circle is shifted by 1, 2, ...; shuffled, so that how many flows leave a rack varies from round to round
    whatever the order of the ranks. Another seed gives another circle.
    """
    circle = list(range(num_hosts))
    random.Random(seed).shuffle(circle)
    return [[(circle[i], circle[(i + shift) % num_hosts]) for i in range(num_hosts)] for shift in range(1, num_hosts)]


def inside(groups: Sequence[Sequence[int]], repetitions: int) -> list[Round]:
    """Rounds of disjoint pairs inside each group, one direction at a time: all send and receive `repetitions` times or more."""
    plans: list[list[Round]] = []
    for group in groups:
        if len(group) < 2:
            continue
        pairings = tournament(len(group))
        counts = dict.fromkeys(range(len(group)), 0)
        chosen: list[Round] = []
        while min(counts.values()) < repetitions:
            pairs = pairings[len(chosen) // 2 % len(pairings)]
            for member in (member for pair in pairs for member in pair):
                counts[member] += 1
            chosen.append([(group[a], group[b]) for a, b in pairs])
            chosen.append([(group[b], group[a]) for a, b in pairs])
        plans.append(chosen)
    return [[flow for flows in together for flow in flows] for together in zip_longest(*plans, fillvalue=[])]


def across(groups: Sequence[Sequence[int]], own: int, speed: Mapping[int, float]) -> tuple[Round, Round]:
    """As many flows as possible out of group `own`, and as many into it; the other ends spread over the other groups.

    Fast hosts come first, so that a slow card does not stand for the uplink.
    """
    outside: list[int] = []
    queues = [sorted(group, key=lambda host: -speed.get(host, 0.0)) for index, group in enumerate(groups) if index != own]
    while any(queues):
        outside += [queue.pop(0) for queue in queues if queue]
    members = sorted(groups[own], key=lambda host: -speed.get(host, 0.0))
    pairs = list(zip(members, outside, strict=False))
    return [(member, other) for member, other in pairs], [(other, member) for member, other in pairs]
