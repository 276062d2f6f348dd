"""What synchronisers carry for parts of a model, put together.

Residuals, and all else that belongs to a parameter, stand in tables by its name (`BY_NAME`); a rank with a part of the model has
those of its own parameters. What the ranks of one replica have saved is joined to what a rank with the whole model would have,
and cut to the parameters of a new part. Two ranks with the same parameter (tied weights) had equal gradients, and so equal
residuals: the first is kept; of ranks that see other tokens, with experts of their own, it is the `Mean`. Thus with p replicas
1/p sum_i e_i stays the same for each parameter when the parts change.

Where ranks have parts of a parameter itself (tensor ranks), a `Fit` makes of them the part that this rank has. What belongs to no
single value, PowerSGD's Q, then begins anew.
"""

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.compress.memory import Store

BY_NAME = ("kept", "numels", "steps", "counts", "rights")
"""Keys of tables: of `memory.Store` and `memory.ErrorFeedback`, of averagers that count, and of PowerSGD."""
CARRIED, FRAGMENTS = "carried", "fragments"
"""Keys of lists: what each averager carries; fragments, each with the names that are in it (`local_steps`)."""
IN_FRAGMENTS = ("anchor", "momentum", "under_way")


class Fit(Protocol):
    """Which part of each parameter the states are of. Numbers are their places among them."""

    def same(self, name: str, numbers: Collection[int]) -> int | None:
        """The first of these states that is of the part that this rank has."""
        ...

    def flat(self, name: str, values: Mapping[int, Tensor]) -> Tensor | None:
        """This rank's part, flat, from the flat parts of these states, of which none is the same; 0 where none has it."""
        ...


class First:
    """All have the whole parameter, or none of it."""

    def same(self, name: str, numbers: Collection[int]) -> int | None:
        return min(numbers)

    def flat(self, name: str, values: Mapping[int, Tensor]) -> Tensor | None:
        return values[min(values)]


FIRST = First()


class Mean(First):
    """The same, but those that have a parameter are replicas, which owe each their own."""

    def same(self, name: str, numbers: Collection[int]) -> int | None:
        return min(numbers) if len(numbers) == 1 else None

    def flat(self, name: str, values: Mapping[int, Tensor]) -> Tensor | None:
        return torch.stack(list(values.values())).mean(dim=0)


def joined(states: Sequence[dict[str, Any]], names: Container[str], like: int = 0, fit: Fit = FIRST) -> dict[str, Any]:
    """Of `states` with the same keys, tables joined and cut to `names`, and all fragments; all else is that of number `like`."""
    found: dict[str, Any] = {}
    for key, value in states[like].items():
        others = [state[key] for state in states]
        if key in BY_NAME:
            found[key] = _table(others, names, fit)
        elif key == CARRIED:
            found[key] = [joined(several, names, like, fit) for several in zip(*others, strict=True)]
        elif key == FRAGMENTS:
            found[key] = _fragments(others, names, fit)
        elif isinstance(value, dict):
            found[key] = _store(others, names, fit) if "kept" in value else joined(others, names, like, fit)
        else:
            found[key] = value
    return found


def _holders(tables: Sequence[Mapping[str, Any]], names: Container[str]) -> Iterator[tuple[str, list[int]]]:
    """Each of `names`, and the tables that have it."""
    for name in dict.fromkeys(name for table in tables for name in table):
        if name in names:
            yield name, [number for number, table in enumerate(tables) if name in table]


def _table(tables: Sequence[Mapping[str, Any]], names: Container[str], fit: Fit) -> dict[str, Any]:
    found = {}
    for name, numbers in _holders(tables, names):
        same = fit.same(name, numbers)
        if same is not None:
            found[name] = tables[same][name]
        elif not isinstance(first := tables[numbers[0]][name], Tensor):
            found[name] = first
    return found


def _store(stores: Sequence[dict[str, Any]], names: Container[str], fit: Fit) -> dict[str, Any]:
    """Of `memory.Store`; in float32 where parts are put together."""
    tables = [store["kept"] for store in stores]
    if all(fit.same(name, numbers) is not None for name, numbers in _holders(tables, names)):
        return joined(stores, names, 0, fit)
    opened = [Store(store["storage"], dict(store["kept"]), dict(store["numels"])).all() for store in stores]
    kept: dict[str, Tensor] = {}
    for name, numbers in _holders(tables, names):
        same = fit.same(name, numbers)
        values = fit.flat(name, {number: opened[number][name] for number in numbers}) if same is None else opened[same][name]
        if values is not None:
            kept[name] = values
    return {"storage": "float32", "kept": kept, "numels": {name: values.numel() for name, values in kept.items()}}


def _fragments(saved: Sequence[Sequence[dict[str, Any]]], names: Container[str], fit: Fit) -> list[dict[str, Any]]:
    """All of them as they are, or of one parameter each where parts of parameters are put together."""
    pieces = [dict(_pieces(fragments)) for fragments in saved]
    holders = list(_holders(pieces, names))
    if all(fit.same(name, numbers) == numbers[0] for name, numbers in holders):
        return [fragment for fragments in saved for fragment in fragments]
    found = []
    for name, numbers in holders:
        same = fit.same(name, numbers)
        first = pieces[numbers[0] if same is None else same][name]
        if same is None:
            fitted = {
                key: fit.flat(name, {number: pieces[number][name][key] for number in numbers})
                for key in IN_FRAGMENTS
                if first[key] is not None and first[key].numel()
            }
            first = {**first, **fitted}
        found.append({**first, "names": [name], "sizes": [first["anchor"].numel()]})
    return found


def _pieces(fragments: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each parameter has in them."""
    for one in fragments:
        sizes = one.get("sizes", ())
        for name, first, size in zip(one["names"], accumulate(sizes, initial=0), sizes, strict=False):
            cut = {key: None if one[key] is None else one[key][first : first + size] for key in IN_FRAGMENTS}
            yield name, {"sent_at": one["sent_at"], **cut}
