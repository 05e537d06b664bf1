"""A data set of somebody's own, which takes a key."""

from drpo_lightning.datamodules import ArithmeticPrompts


class KeyedPrompts(ArithmeticPrompts):
    """Keeps its key, and what it makes of it, as any class may."""

    def __init__(self, token):
        super().__init__()
        self.token = token
        self.headers = {"Authorization": f"Bearer {token}"}
