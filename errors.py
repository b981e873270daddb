"""The error that means: the user gave something that cannot work, and this sentence says what to
change.
"""


class UserError(ValueError):
    """A mistake in a command, a configuration or a file that a user gave.

    Its message is one sentence that names what was given, what is allowed and the key or flag to
    change. Scripts print it without a traceback and exit with status 2 (engine.cli). Any other
    exception is a fault of the program, or of a fork, and keeps its traceback.
    """
