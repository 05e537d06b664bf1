"""What the servers have been sent, by the labels that they give to it."""

from itertools import dropwhile


class SentWeights:
    """Labels of the weights that the servers were sent, oldest first, and the numbers of those weights.

    Every rank has one, and announces weights in it before the first of them is on its way: a server that goes on with
    requests over a sync may answer any rank with the new label before the sync has ended. To be used in the event loop
    alone.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def announce(self, label: str, number: int) -> None:
        """Notes weights that servers are about to get.

        Args:
            label: what they will call them.
            number: see `RolloutEngine.weights_version`.
        """
        self._numbers[label] = number

    def since(self, label: str) -> dict[str, int]:
        """The weights of a label and all later ones, those that are on their way too: labels and numbers, in order."""
        return dict(dropwhile(lambda sent: sent[0] != label, self._numbers.items()))
