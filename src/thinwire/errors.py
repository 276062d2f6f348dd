"""The one exception that a user may see: a single line with what is wrong, the numbers, and what to do."""


class UserError(ValueError):
    """A mistake that the user can correct. The message is one line; the command line prints it and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
