"""Runs side by side as one HTML page: `drpo report`."""

from drpo_lightning.report.command import main

__all__ = ["main"]
