"""What carries nothing from step to step, and so has nothing to save."""

from collections.abc import Sequence
from typing import Any

from thinwire.errors import UserError


class Stateless:
    """The part of a contract that is about state, for those without any."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError if there is any: it would be lost."""
        self.adopt([state])

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """As `load_state_dict`."""
        for state in states:
            if state:
                raise UserError(self._of_no_use(state))

    def _of_no_use(self, state: dict[str, Any]) -> str:
        """What to say of it."""
        return (
            f"the checkpoint holds {', '.join(map(str, state))}, which nothing here would use; resume with [sync] and [compress] "
            "as it was made with"
        )
