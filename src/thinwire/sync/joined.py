"""What synchronisers carry for parts of a model, put together.

Residuals, and all else that belongs to a parameter, stand in tables by its name (`BY_NAME`); a rank with a part of the model has
those of its own parameters. What the ranks of one replica have saved is joined to what a rank with the whole model would have,
and cut to the parameters of a new part. Two ranks with the same parameter (tied weights) had equal gradients, and so equal
residuals: the first is kept. Thus with p replicas 1/p sum_i e_i stays the same for each parameter when the parts change.
"""

from collections.abc import Container, Sequence
from typing import Any

BY_NAME = ("kept", "numels", "steps", "counts", "rights")
"""Keys of tables: of `memory.Store` and `memory.ErrorFeedback`, of averagers that count, and of PowerSGD."""
CARRIED, FRAGMENTS = "carried", "fragments"
"""Keys of lists: what each averager carries; fragments, each with the names that are in it (`local_steps`)."""


def joined(states: Sequence[dict[str, Any]], names: Container[str], like: int = 0) -> dict[str, Any]:
    """Of `states` with the same keys, tables joined and cut to `names`, and all fragments; all else is that of number `like`."""
    found: dict[str, Any] = {}
    for key, value in states[like].items():
        others = [state[key] for state in states]
        if key in BY_NAME:
            everything = {name: its for table in reversed(others) for name, its in table.items()}
            found[key] = {name: its for name, its in everything.items() if name in names}
        elif key == CARRIED:
            found[key] = [joined(several, names, like) for several in zip(*others, strict=True)]
        elif key == FRAGMENTS:
            found[key] = [fragment for fragments in others for fragment in fragments]
        else:
            found[key] = joined(others, names, like) if isinstance(value, dict) else value
    return found
