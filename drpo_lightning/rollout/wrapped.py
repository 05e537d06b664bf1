"""Base of engines that use another one."""

from drpo_lightning.rollout.engine import RolloutEngine


class WrappedEngine(RolloutEngine):
    """Says of itself what another engine says; how that is used is up to subclasses.

    Args:
        engine: the other one.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        super().__init__(engine.sleep_mode)
        self.engine = engine
        self.context_setting = engine.context_setting
        self.max_context_tokens = engine.max_context_tokens

    def check_available(self) -> None:
        """Raises `SettingError` if what the engine needs is not installed."""
        self.engine.check_available()

    def describe(self) -> str:
        """One line for the start of a run."""
        return self.engine.describe()

    @property
    def statistics(self) -> dict[str, float]:
        """Figures of the engine's own."""
        return self.engine.statistics

    @property
    def sampling_seconds(self) -> float | None:
        """Seconds in which the engine has computed tokens so far."""
        return self.engine.sampling_seconds

    @property
    def can_sleep(self) -> bool:
        """True if the engine can."""
        return self.engine.can_sleep

    @property
    def supports_adapters(self) -> bool:
        """True if the engine has `load_adapter`."""
        return self.engine.supports_adapters
