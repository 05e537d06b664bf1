"""The error of a setting that cannot work."""


class SettingError(ValueError):
    """A setting, or a file that a setting names, cannot work; the message names it and the way out.

    Raised before anything heavy starts. The command line prints it without a traceback.
    """
