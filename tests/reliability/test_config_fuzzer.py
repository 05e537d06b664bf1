"""Every key of every shipped configuration, changed for the worse: a message that names it, or what was asked for."""

import contextlib
import copy
import io
import math
import os
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.reliability, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VALUES = [None, "nonsense", "", -1, 0, 10**30, 0.5, math.nan, math.inf, True, [], {}, ["nonsense"], {"nonsense": 1}]
ON_ONE_CPU = ("accelerator=cpu", "devices=1", "strategy=auto")
TRIED = set()
"""Settings of the configurations so far, which the next ones repeat."""
NAMES_ITS_OWN = ("logger", "callbacks", "strategy", "precision", "accelerator", "devices")
"""Settings of Lightning's own, whose messages say what is wrong and need not repeat the key."""


def leaves(node, path=()):
    """Paths of all settings, those that hold others included."""
    if path:
        yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def setting(config, path):
    """What a path means, and what stands there: the same in two configurations that list callbacks in another order."""
    node, parts = config, []
    for key in path:
        node = node[key]
        is_listed = isinstance(key, int) and isinstance(node, dict)
        parts.append(node.get("class_path", key) if is_listed else key)
    return (*parts, repr(node))


def changed(config, path, value):
    result = copy.deepcopy(config)
    node = result
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return result


def build(config, folder):
    """Parses and builds everything, without a model: what was printed, and whether it was refused."""
    from drpo_lightning.cli import COMMAND_LINE, DRPOCommandLine
    from drpo_lightning.datamodules import RolloutDataModule
    from drpo_lightning.errors import SettingError
    from drpo_lightning.modules import PolicyModule

    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            DRPOCommandLine(
                PolicyModule,
                RolloutDataModule,
                args=[
                    f"--config={file}",
                    "--trainer.accelerator=cpu",
                    "--trainer.devices=1",
                    "--trainer.strategy=auto",
                ],
                run=False,
                save_config_callback=None,
                **COMMAND_LINE,
            )
        except SystemExit as stop:
            return f"{printed.getvalue()} {stop.code}", True
        except SettingError as error:
            return str(error), True
    return printed.getvalue(), False


def names(path):
    """What a message may call a setting: its key, or that of what holds it."""
    return [str(key) for key in path[-3:] if isinstance(key, str) and key not in ("init_args", "class_path")]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_bad_value_ends_in_a_message_that_names_its_key(file, tmp_path):
    from jsonargparse import set_parsing_settings

    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    config = yaml.safe_load(file.read_text())
    tried, refused, faults = 0, 0, []
    new = [path for path in leaves(config) if setting(config, path) not in TRIED]
    TRIED.update(setting(config, path) for path in new)
    for path in new:
        for value in VALUES:
            tried += 1
            try:
                message, is_refused = build(changed(config, path, value), tmp_path)
            except Exception as error:  # noqa: BLE001 - a traceback is what is looked for
                message, is_refused = f"{type(error).__name__}: {error}", None
            refused += bool(is_refused)
            if is_refused is not False and not any(name in message for name in (*names(path), *NAMES_ITS_OWN)):
                faults.append(f"{'.'.join(map(str, path))} = {value!r}: {message[-300:]}")
            elif is_refused is None:
                faults.append(f"{'.'.join(map(str, path))} = {value!r}: traceback: {message[-300:]}")
    sys.stderr.write(f"{file.name}: {tried} tried, {refused} refused, {len(faults)} at fault\n")
    assert not faults, f"{len(faults)} of {tried}:\n" + "\n".join(faults[:40])
