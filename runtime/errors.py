"""The one error that means: the user asked for something that cannot be done. Torch-free."""


class UserError(Exception):
    """A user's mistake. The message is one line that names the field, the value and what is allowed.

    The CLI prints it without a traceback and exits with code 2; the server answers with status 400.
    """
