"""Errors that a person reads as one line. Torch-free."""


class UserError(Exception):
    """A user's mistake. The message is one line that names the field, the value and what is allowed.

    The CLI prints it without a traceback and exits with code 2; the server answers with status 400.
    """


class RunFailure(Exception):
    """A run that failed through no mistake in the request. One line that says what happened and what may help.

    The CLI exits with code 1; the server answers with status 500.
    """
