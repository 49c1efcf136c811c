"""lakebed: a columnar data lake of how transformer circuits form during training."""

__version__ = "0.1.0"


class LakebedError(Exception):
    """Anything a user can mend: its message is one line that names what is wrong and what to do.

    Every error class of the project derives from it, so the command line prints the message alone and exits
    with a non-zero status; any other exception is a bug of ours and keeps its traceback.
    """
