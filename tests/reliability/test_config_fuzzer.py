"""Every key of every shipped configuration, changed, left out or misspelt: refused by its name, or taken as it is."""

import contextlib
import copy
import io
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.reliability, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VALUES = [None, "nonsense", "", -1, 0, 10**30, 0.5, math.nan, math.inf, True, [], {}, ["nonsense"], {"nonsense": 1}]
ON_ONE_CPU = {"accelerator": "cpu", "devices": 1, "strategy": "auto"}
TRIED = set()
"""Settings of the configurations so far, which the next ones repeat."""
NAMES_ITS_OWN = ("logger", "callbacks", "strategy", "precision", "accelerator", "devices")
"""Settings of Lightning's own, whose messages say what is wrong and need not repeat the key."""
FREE = ("vars", "columns", "data_sets", "weights", "config")
"""Settings whose keys are the user's own."""
LIMIT_SECONDS = 60


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


def without(config, path):
    result = copy.deepcopy(config)
    node = result
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return result


def misspelt(config, path):
    result = copy.deepcopy(config)
    node = result
    for key in path[:-1]:
        node = node[key]
    node[f"{path[-1]}x"] = node.pop(path[-1])
    return result


def changes(config, path):
    """What is done to a setting, the configuration that it gives, and whether it must, or may, be taken."""
    for value in VALUES:
        yield f"= {value!r}", changed(config, path, value), lambda parsed, value=value: is_meant(value, parsed)
    yield "left out", without(config, path), lambda _: True
    if isinstance(path[-1], str) and (len(path) == 1 or path[-2] not in FREE):
        yield "misspelt", misspelt(config, path), lambda _: False


def is_meant(value, parsed):
    """True where a value that was taken is the one that was given; null and {} are for the defaults."""
    if value is None:
        return True
    if value == {}:
        return getattr(parsed, "class_path", None) != "lightning.Callback"
    if isinstance(value, float) and math.isnan(value):
        return isinstance(parsed, float) and math.isnan(parsed)
    if isinstance(value, bool) or isinstance(parsed, bool):
        return value is parsed
    return value == parsed or (isinstance(parsed, float) and float(value) == parsed)


def parsed_at(command, path):
    """What became of a setting; None where there is nothing."""
    node = command.config
    for key in path:
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return None
    return node


@contextlib.contextmanager
def time_limit():
    """Ends what hangs."""

    def end(*_):
        raise TimeoutError(f"took longer than {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def build(config, folder):
    """Parses and builds everything, without a model: what was printed, and the command line, None if it was refused."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from drpo_lightning.cli import COMMAND_LINE, DRPOCommandLine
    from drpo_lightning.datamodules import RolloutDataModule
    from drpo_lightning.errors import SettingError
    from drpo_lightning.modules import PolicyModule

    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed), time_limit():
        try:
            command = DRPOCommandLine(
                PolicyModule,
                RolloutDataModule,
                args=[f"--config={file}"],
                run=False,
                save_config_callback=None,
                **COMMAND_LINE,
            )
        except SystemExit as stop:
            return f"{printed.getvalue()} {stop.code}", None
        except (SettingError, MisconfigurationException) as error:
            return str(error), None
    return printed.getvalue(), command


def fault(config, path, is_right, folder):
    """What is wrong with how a configuration was taken or refused, None if nothing; and whether it was refused."""
    try:
        message, command = build(config, folder)
    except Exception as error:  # noqa: BLE001 - a traceback is what is looked for
        return f"traceback: {type(error).__name__}: {error}"[-300:], False
    if command is None:
        is_named = any(name in message for name in names(path))
        return (None if is_named else f"not named: {message[-300:]}"), True
    parsed = parsed_at(command, path)
    return (None if is_right(parsed) else f"taken as {parsed!r}"[:300]), False


def names(path):
    """What a message may call a setting: its key, or that of what holds it."""
    own = NAMES_ITS_OWN if path[0] == "trainer" else ()
    return [*own, *(str(key) for key in path[-3:] if isinstance(key, str) and key not in ("init_args", "class_path"))]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_bad_value_ends_in_a_message_that_names_its_key_or_means_what_it_says(file, tmp_path):
    from jsonargparse import set_parsing_settings

    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    config = yaml.safe_load(file.read_text())
    config["trainer"] |= ON_ONE_CPU
    new = [path for path in leaves(config) if setting(config, path) not in TRIED]
    TRIED.update(setting(config, path) for path in new)
    tries = [(path, *change) for path in new for change in changes(config, path)]
    found = [(path, change, *fault(bad, path, is_right, tmp_path)) for path, change, bad, is_right in tries]
    faults = [f"{'.'.join(map(str, path))} {change}: {what}" for path, change, what, _ in found if what]
    refused = sum(is_refused for *_, is_refused in found)
    sys.stderr.write(f"{file.name}: {len(tries)} tried, {refused} refused, {len(faults)} at fault\n")
    assert not faults, f"{len(faults)} of {len(tries)}:\n" + "\n".join(faults[:40])


class ReachedError(BaseException):
    """All that is checked before the model is loaded has been taken."""


def until_the_model(monkeypatch):
    """Lets a run go as far as its model."""
    from drpo_lightning.modules import PolicyModule

    def stop(_):
        raise ReachedError

    monkeypatch.setattr(PolicyModule, "configure_model", stop)


def fit(config, monkeypatch):
    """Runs `drpo fit`: what was printed, and whether it was refused."""
    from drpo_lightning import cli

    Path("config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["drpo", "fit", "--config=config.yaml"])
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed), time_limit():
        try:
            cli.main()
        except ReachedError:
            return printed.getvalue(), False
        except SystemExit as stop:
            return f"{printed.getvalue()} {stop.code}", True
    raise AssertionError("the run ended without a model")


def test_a_run_with_a_bad_value_is_refused_by_its_name_or_reaches_its_model(monkeypatch, tmp_path):
    until_the_model(monkeypatch)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    config["trainer"] |= ON_ONE_CPU
    config["data"]["engine"] = {"class_path": "drpo_lightning.rollout.TransformersEngine"}
    faults, tried, refused = [], 0, 0
    for path in leaves(config):
        for change, bad, _ in changes(config, path):
            tried += 1
            try:
                message, is_refused = fit(bad, monkeypatch)
            except Exception as error:  # noqa: BLE001 - a traceback is what is looked for
                faults.append(f"{'.'.join(map(str, path))} {change}: {type(error).__name__}: {error}")
                continue
            refused += is_refused
            if is_refused and not any(name in message for name in names(path)):
                faults.append(f"{'.'.join(map(str, path))} {change}: not named: {message[-300:]}")
    sys.stderr.write(f"quickstart.yaml, up to the model: {tried} tried, {refused} refused, {len(faults)} at fault\n")
    assert not faults, f"{len(faults)} of {tried}:\n" + "\n".join(faults[:40])
