"""What all tests share. Shapes and types of the lower floors are checked in every test."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from jaxtyping import install_import_hook

# An int is a float, as in every annotation of Python.
install_import_hook(
    ["drpo_lightning.functional", "drpo_lightning.objectives", "drpo_lightning.metrics", "drpo_lightning.batch"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
