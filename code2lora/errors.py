"""The one error that a person can act on; everything else is a bug and propagates."""


class UserError(Exception):
    """A problem a person can fix: one line that says what is, and a hint that says what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
