"""The error that a user can fix."""


class UserError(Exception):
    """A sentence that names the file or flag at fault and says what to do about it.

    The scripts print it without a traceback and exit with `status`: 2 for wrong usage (flags, csv
    files, checkpoints), 1 for a run that failed on the way.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status
