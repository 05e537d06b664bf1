"""Lines of other libraries that say nothing to a user of the command line."""

import logging
import os
import sys
import warnings

WARNINGS = (
    # One rank and a process group, vLLM's: there is nothing to synchronise with.
    r"It is recommended to use `self\.log\(.*sync_dist=True",
    # The policy is in evaluation mode on purpose: dropout would make pi another distribution than mu.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Of Lightning and vLLM to their own authors.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"`torch\.distributed\.reduce_op` is deprecated",
)
LINES = ("litlogger", "TPU available:", "HPU available:", "was raised with message:")


class _WithoutNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(line in record.getMessage() for line in LINES)


def quieten() -> None:
    """Leaves those lines out, here and in processes that are started from here; for use before heavy imports."""
    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_WithoutNoise())
    if not sys.stderr.isatty():  # in a log, a bar that is drawn anew is a line of a thousand characters
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
