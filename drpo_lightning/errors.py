"""Errors that are told apart from others."""


class SettingError(ValueError):
    """A setting, or a file that a setting names, cannot work; the message names it and the way out.

    Raised before anything heavy starts. The command line prints it without a traceback.
    """


class NonFiniteError(RuntimeError):
    """A number of the training is NaN or infinite; the message names it and the samples, and the run stops."""
