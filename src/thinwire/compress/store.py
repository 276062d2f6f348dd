"""Vectors that an exchange keeps from step to step, by the name of their parameter; and steps that are given up."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from thinwire.compress.codecs.blockwise import INT8_BLOCK, Int8


@dataclass
class Store:
    """Flat vectors by name, as they are (float32, or float64) or as block int8."""

    storage: Literal["float32", "int8"] = "float32"
    kept: dict[str, Tensor] = field(default_factory=dict)
    """As stored: values of any shape, or the codes of a flat vector; only the first `numels` values count."""
    numels: dict[str, int] = field(default_factory=dict)
    staged: dict[str, tuple[Tensor, int] | None] | None = None
    """What `commit` will keep, or drop where it is None; None: `put` and `drop` count at once."""

    def put(self, name: str, values: Tensor, numel: int | None = None) -> None:
        """Keeps `values` themselves, or codes of them; the first `numel` of them, all by default."""
        numel = values.numel() if numel is None else numel
        if self.storage == "int8":
            flat = flattened(values, numel).float()
            values = Int8().encode(pad(flat, (0, -numel % INT8_BLOCK)))
        if self.staged is None:
            self.kept[name], self.numels[name] = values, numel
        else:
            self.staged[name] = values, numel

    def get(self, name: str) -> Tensor | None:
        """None if there is nothing under this name."""
        if name not in self.kept:
            return None
        if self.storage == "float32":
            return flattened(self.kept[name], self.numels[name])
        padded = -(-self.numels[name] // INT8_BLOCK) * INT8_BLOCK
        return Int8().decode(self.kept[name], padded)[: self.numels[name]]

    def drop(self, name: str) -> None:
        """Nothing is kept under this name any more."""
        if self.staged is not None:
            self.staged[name] = None
            return
        self.kept.pop(name, None)
        self.numels.pop(name, None)

    def commit(self) -> None:
        """What is staged counts."""
        staged, self.staged = self.staged or {}, None
        for name, entry in staged.items():
            if entry is None:
                self.drop(name)
            else:
                self.kept[name], self.numels[name] = entry
        self.staged = {}

    def rollback(self) -> None:
        """What is staged is forgotten."""
        self.staged = {}

    def stored_bytes(self, numel: int) -> int:
        """Of one vector."""
        return 4 * numel if self.storage == "float32" else Int8().payload_bytes(-(-numel // INT8_BLOCK) * INT8_BLOCK)

    def state_dict(self) -> dict[str, Any]:
        """Codes are saved as codes, so that a resumed run goes on bit for bit."""
        kept = dict(self.kept) if self.storage == "int8" else {name: self.get(name) for name in self.kept}
        return {"storage": self.storage, "kept": kept, "numels": dict(self.numels)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Store":
        """From a state_dict."""
        return cls(state["storage"], dict(state["kept"]), dict(state["numels"]))

    def take(self, other: "Store") -> None:
        """All of `other`, in this one's storage; as it is where that is the same."""
        if other.storage == self.storage:
            self.kept, self.numels = other.kept, other.numels
            return
        for name in other.kept:
            values = other.get(name)
            assert values is not None
            self.put(name, values)

    def take_mean(self, others: Sequence["Store"]) -> None:
        """For each name the mean over `others`, where absent counts as zero."""
        for name in dict.fromkeys(name for other in others for name in other.kept):
            found = [values for other in others if (values := other.get(name)) is not None]
            self.put(name, torch.stack(found).sum(0).div_(len(others)))


def flattened(values: Tensor, numel: int) -> Tensor:
    """The first `numel` values, row behind row; a copy unless they are all there is of `values`, in one piece."""
    if values.dim() == 1 and values.numel() == numel:
        return values
    return values.reshape(-1)[:numel].clone()
