"""Folders for output: writable, with room, and of one run at a time."""

import signal
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from drpo_lightning.callbacks import ExportPolicy, PolicyCheckpoint, TokenExport
from drpo_lightning.disk import DiskFullError
from drpo_lightning.errors import SettingError
from drpo_lightning.folder_lock import FolderInUseError, locked
from drpo_lightning.output_folders import claim_output_folders
from tests.disks import make_disk  # noqa: F401

HOLD = """
import sys, time
from pathlib import Path
from drpo_lightning.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def claim(tmp_path):
    """Claims the folders of a trainer as a run does; they are given back when the test ends, or `release` is called."""
    stacks = []

    def claim(*callbacks, logger=None, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                accelerator="cpu",
                logger=logger or False,
                callbacks=list(callbacks),
                default_root_dir=tmp_path / "root",
                enable_progress_bar=False,
                **settings,
            )
        stacks.append(ExitStack())
        claim_output_folders(trainer, stacks[-1])
        return trainer

    claim.held = stacks
    claim.release = lambda: stacks.pop().close()
    yield claim
    for stack in stacks:
        stack.close()


def tensorboard(folder, **settings):
    return TensorBoardLogger(folder, name="run", **settings)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_of_one_process_until_it_dies(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match="another process holds"), locked(tmp_path):
            raise AssertionError
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(tmp_path):
            assert not names(tmp_path), "there is no lock file"
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_runs_that_start_at_once_get_folders_of_their_own(claim, tmp_path, kind):
    loggers = [kind(tmp_path, name="run") for _ in range(3)]
    assert [claim(logger=logger).logger.version for logger in loggers] == [0, 1, 2]


def test_a_version_that_another_run_makes_in_the_same_moment_is_left_to_it(claim, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def overtaken(path, *args, **kwargs):
        if path.name == "version_0":
            mkdir(path, *args, **kwargs)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", overtaken)
    assert claim(logger=tensorboard(tmp_path)).logger.version == 1


def test_the_second_run_in_a_folder_is_refused_until_the_first_has_ended(claim, tmp_path):
    outputs = {
        "`dirpath` of PolicyCheckpoint": lambda: claim(
            PolicyCheckpoint(dirpath=tmp_path / "own"), logger=tensorboard(tmp_path)
        ),
        "`folder` of ExportPolicy": lambda: claim(
            ExportPolicy(folder=str(tmp_path / "own")), logger=tensorboard(tmp_path)
        ),
        "`folder` of TokenExport": lambda: claim(
            TokenExport(folder=str(tmp_path / "own")), logger=tensorboard(tmp_path)
        ),
        "`save_dir` of TensorBoardLogger": lambda: claim(logger=tensorboard(tmp_path, version="own")),
        "`save_dir` of CSVLogger": lambda: claim(logger=CSVLogger(tmp_path, name="run", version="own")),
        "`trainer.default_root_dir`": claim,
    }
    for setting, start in outputs.items():
        start()
        with pytest.raises(SettingError, match=f"{setting} '.*': another run is writing there. Wait for its end"):
            start()
        claim.release()
        claim.release()
        start()
        claim.release()


def test_one_run_may_have_one_folder_for_several_things(claim, tmp_path):
    loggers = [tensorboard(tmp_path, version="v"), CSVLogger(tmp_path, name="run", version="v")]
    claim(PolicyCheckpoint(dirpath=tmp_path / "run" / "v"), logger=loggers)


def test_a_run_that_is_refused_leaves_no_folder(claim, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"`save_dir` of CSVLogger '.*file/run' is, or lies in, a file"):
        claim(
            PolicyCheckpoint(dirpath=tmp_path / "new"),
            logger=[tensorboard(tmp_path / "logs"), CSVLogger(tmp_path / "file", name="run")],
        )
    claim.release()
    assert not (tmp_path / "new").exists()
    assert not names(tmp_path / "logs" / "run")


def test_a_try_run_claims_nothing(claim, tmp_path):
    claim(logger=tensorboard(tmp_path, version=3), fast_dev_run=True)
    assert not (tmp_path / "run").exists()


class Elsewhere(Logger):
    """A logger that has no folder, as MLFlowLogger with a database."""

    name = version = experiment = "elsewhere"

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_the_first_logger_must_have_a_folder(claim, tmp_path):
    with pytest.raises(SettingError, match=r"Elsewhere has no folder .*list TensorBoardLogger before it"):
        claim(logger=Elsewhere())
    claim(logger=[tensorboard(tmp_path), Elsewhere()])


def test_a_folder_in_a_file_is_refused(claim, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(SettingError, match=r"`dirpath` of PolicyCheckpoint '.*file.*' is, or lies in, a file; set"):
            claim(PolicyCheckpoint(dirpath=folder))
    with pytest.raises(SettingError, match=r"`folder` of ExportPolicy '.*file' is, or lies in, a file"):
        claim(ExportPolicy(folder=str(file)))


def test_a_folder_that_cannot_be_written_to_is_refused(claim, make_disk):  # noqa: F811
    disk = make_disk(64)
    folder = disk.folder / "logs"
    folder.mkdir()
    disk.make_read_only()
    for start in (
        lambda: claim(logger=tensorboard(folder)),
        lambda: claim(logger=tensorboard(disk.folder, version="new")),
        lambda: claim(PolicyCheckpoint(dirpath=folder)),
    ):
        with pytest.raises(SettingError, match=r"`\w+` of \w+ '.*disk.*' cannot be written to: Read-only file system"):
            start()


def test_a_full_disk_is_refused_at_the_start_and_named_after_an_error_that_does_not(claim, make_disk):  # noqa: F811
    disk = make_disk(64)
    claim(logger=tensorboard(disk.folder, version="first"))
    with pytest.raises(OSError, match="No space left") as error, (disk.folder / "filler").open("wb") as filler:
        filler.write(bytes(128 * 1024))
    with pytest.raises(
        SettingError, match=r"`save_dir` of TensorBoardLogger '.*' cannot be written to: the disk is full"
    ):
        claim(logger=tensorboard(disk.folder, version="second"))
    with pytest.raises(DiskFullError, match=r"a file in '.*first' could not be written: the disk"), claim.held[0]:
        raise ValueError("something was not logged") from error.value


def test_a_run_that_is_refused_leaves_no_folder_of_its_own(tmp_path):
    command = [sys.executable, "-m", "drpo_lightning", "fit", "--config=configs/quickstart.yaml"]
    places = [f"--trainer.logger.init_args.save_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path}"]
    data = ["--data.engine=TransformersEngine", "--data.prompts=FilePrompts", "--data.prompts.path=nowhere.jsonl"]
    done = subprocess.run(
        [*command, *places, *data],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "'nowhere.jsonl' does not exist" in done.stderr
    assert not list(tmp_path.rglob("version_*"))
