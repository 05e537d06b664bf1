"""Ctrl-C, and SIGTERM from a scheduler, as requests that a run ends where its state is whole."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer

REQUEUE_EXIT_CODE = os.EX_TEMPFAIL
"""Exit status after SIGTERM: "try again later". A run that SIGTERM kills outright, before it trains, has 143."""
NOTICES = {
    signal.SIGINT: b"\nCtrl-C: the run ends before the next update, with a checkpoint. Once more: at once, without.\n",
    signal.SIGTERM: b"\nSIGTERM: the run ends before the next update, with a checkpoint and exit status 75.\n",
}


class Terminated(BaseException):
    """SIGTERM has ended the run. No `SystemExit`, which code of others, such as a reward, may raise and catch.

    Attributes:
        exit_code: status that the process is to exit with.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("SIGTERM has ended the run")
        self.exit_code = exit_code


class EndRequest:
    """Takes Ctrl-C and SIGTERM over while a run lasts, and remembers that one came.

    Raised wherever they arrive, they could leave an optimizer step half done, or a rank waiting for another. Lightning
    broadcasts in its handler of SIGTERM, where the other ranks may be in another collective, and all would hang.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """What has come, if anything."""
        self.is_forced = False
        """True after a second Ctrl-C, which does not wait for a whole state."""
        self._before: dict[int, Any] = {}
        self._is_global_zero = False
        self._exit_code: int = REQUEUE_EXIT_CODE
        self._may_end_now: Callable[[], bool] = bool

    def listen(self, trainer: Trainer, may_end_now: Callable[[], bool]) -> None:
        """Takes the signals over, unless they are by now.

        Args:
            trainer: the trainer.
            may_end_now: says in the signal's handler whether the state is whole there, and no other rank is waiting.
        """
        if any(signal.getsignal(number) == self._receive for number in NOTICES):
            return
        self.signal = signal.SIGTERM if trainer.received_sigterm else None  # before
        self.is_forced = False
        self._is_global_zero = trainer.is_global_zero
        self._may_end_now = may_end_now
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_launched_by_lightning = environment is not None and not environment.creates_processes_externally
        if is_launched_by_lightning and trainer.local_rank > 0:
            self._exit_code = 0  # Lightning kills rank 0 when another rank that it has launched fails
        if threading.current_thread() is threading.main_thread():
            for number in NOTICES:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)

    def stop_listening(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        self._before = {}

    def end_if_asked(self, trainer: Trainer) -> None:
        """Ends the run, on all ranks, if a signal has come on any. Collective, where the state is whole.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            Terminated: after SIGTERM.
        """
        received = torch.tensor(self.signal or 0, device=trainer.strategy.root_device)
        self._end(int(trainer.strategy.reduce(received, reduce_op="max")))

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal is not None:
            if number == signal.SIGINT:
                self.is_forced = True
                raise KeyboardInterrupt
            return
        self.signal = number
        if self._is_global_zero:
            os.write(2, NOTICES[signal.Signals(number)])  # `print` may be what has been interrupted
        if self._may_end_now():
            self._end(number)

    def _end(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM:
            raise Terminated(self._exit_code)
