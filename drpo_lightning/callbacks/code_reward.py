"""Programs that the policy writes, run against tests."""

from collections.abc import Mapping
from typing import Any

from drpo_lightning.callbacks.fallible_reward import OnFailure, score_of_failures
from drpo_lightning.callbacks.isolated_reward import IsolatedReward
from drpo_lightning.rewards.code_cases import code_cases
from drpo_lightning.rewards.code_execution import CodeAnswer, ProgramLimits, check_namespaces

MARGIN_SECONDS = 10.0
"""Beyond a completion's time, after which its worker is ended too."""


class CodeReward(IsolatedReward):
    """1 if the Python in a completion passes the tests of its row, else 0.

    The completion's last block between ```` ```python ```` and ```` ``` ```` is the program, or, if there is none, the
    last one without a language; without either it gets 0. Each test is a fresh process with an empty folder, none of
    the trainer's environment, and limits on time, memory, processes, files and output. With `namespaces` it has no
    network, reaches no other process by signals, and whatever it starts ends with it. The tests in `column` are of one
    of these forms, or JSON of it:

    | form | a program passes if |
    |---|---|
    | `"assert add(1, 2) == 3"`, or a list of such texts | the text runs to its end after the program |
    | `[{"input": "1 2", "output": "3"}, ...]`, `{"inputs": [...], "outputs": [...]}` | it reads one, writes the other |

    Not a sandbox: see docs/rewards.md for what a program can still do. Needs Linux.

    Args:
        column: column of the data set that holds the tests.
        partial_credit: gives the share of tests that are passed; otherwise the first one that is not decides.
        timeout_seconds: for all tests of a completion; those that it leaves no time for are not passed.
        case_timeout_seconds: for one test.
        memory_limit_gib: address space of each process of a program.
        max_processes: processes and threads of a program; of no effect for root, and without namespaces.
        output_limit_mib: length of its output, and of each file that it writes.
        namespaces: gives each program namespaces of its own, through `unshare`.
        weight: factor of this reward in the sum.
        name: what it is logged as.
        on_failure: what becomes of a completion that brings its worker down, see `FallibleReward`. A program that
            crashes or is late is none: it has not passed.
        failure_score: with `on_failure: score`; 0 by default.
        settings: see `IsolatedReward`.

    Raises:
        ValueError: if a setting is out of range.
        SettingError: if the machine does not let users have namespaces.
    """

    def __init__(
        self,
        column: str = "tests",
        partial_credit: bool = False,
        timeout_seconds: float = 30.0,
        case_timeout_seconds: float = 5.0,
        memory_limit_gib: float = 1.0,
        max_processes: int = 64,
        output_limit_mib: float = 1.0,
        namespaces: bool = True,
        weight: float = 1.0,
        name: str = "code",
        on_failure: OnFailure = "score",
        failure_score: float | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        for key, value in (
            ("timeout_seconds", timeout_seconds),
            ("case_timeout_seconds", case_timeout_seconds),
            ("memory_limit_gib", memory_limit_gib),
            ("max_processes", max_processes),
            ("output_limit_mib", output_limit_mib),
        ):
            if not 0 < value < float("inf"):
                raise ValueError(f"`{key}` must be positive and finite, got {value}")
        if namespaces:
            check_namespaces()
        limits = ProgramLimits(
            seconds=case_timeout_seconds,
            memory_bytes=int(memory_limit_gib * 2**30),
            max_processes=max_processes,
            file_bytes=int(output_limit_mib * 2**20),
            namespaces=namespaces,
        )
        answer = CodeAnswer(
            column, partial_credit=partial_credit, seconds=timeout_seconds, limits=limits, name=name, weight=weight
        )
        super().__init__(
            answer,
            timeout_seconds=timeout_seconds + case_timeout_seconds + MARGIN_SECONDS,
            memory_limit_gib=None,
            max_processes=None,
            on_failure=on_failure,
            failure_score=score_of_failures(on_failure, failure_score),
            **settings,
        )
        self._column = column

    def check_row(self, row: Mapping[str, Any]) -> None:
        """The tests must be of a known form."""
        code_cases(row[self._column])
