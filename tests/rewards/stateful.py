"""Rewards with a state, importable in a worker process."""

import os
import time

from drpo_lightning.callbacks import RewardCallback


class Counting(RewardCallback):
    """The score is how many completions it has scored; a completion may end its process, or take too long."""

    def __init__(self, name: str = "counting"):
        super().__init__(name=name)
        self.count = 0

    def score(self, batch):
        scores = []
        for text in batch.completions:
            self.count += 1
            if text == "exit":
                os._exit(3)
            if text == "sleep":
                time.sleep(60)
            if text == "tuple":
                self.count = (self.count,)
            scores.append(self.count if isinstance(self.count, int) else 0.0)
        return scores

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class Answering(Counting):
    """Its answers are upper case, where there are letters."""

    def answers(self, batch):
        if "!" in batch.completions:
            raise KeyError("no answer")
        return [text.upper() or None for text in batch.completions]


class CountingPlain(Counting):
    """With a state that JSON makes another of."""

    def state_dict(self):
        return {1: self.count}


class BeginsWithNothing(Counting):
    """Has a state only once it has scored."""

    def state_dict(self):
        return {"count": self.count} if self.count else {}


class TooLarge(Counting):
    def state_dict(self):
        return {"text": "x" * 50_000}
