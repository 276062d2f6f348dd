"""What carries nothing from step to step, and so has nothing to save."""

from collections.abc import Sequence
from typing import Any


class Stateless:
    """The part of a contract that is about state, for those without any."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Nothing to deal out."""
