"""Secrets in the environment reach no file and no line that is printed, whatever a run comes to."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("secrets.yaml")
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DRPO_PLANTED", "VLLM_API_KEY")
SECRETS = {name: f"planted-{name.lower()}-2718281828" for name in NAMES}
ENGINE_DIES = """
import os
from drpo_lightning.rollout.process import EngineProcess
if __name__ == "__main__":
    EngineProcess(os.abort, (), {"SOME_SETTING": "1"}, 16).call("generate", timeout_seconds=60)
"""
TIMEOUT_SECONDS = 300


def contents(folder):
    """Name and bytes of every file, and of what is packed in it."""
    for path in Path(folder).rglob("*"):
        if not path.is_file():
            continue
        yield path, path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((path / name, archive.read(name)) for name in archive.namelist())
        elif path.suffix == ".parquet":
            parquet = pytest.importorskip("pyarrow.parquet")
            yield path, str(parquet.read_table(path).to_pylist()).encode()


def leaks(folder, printed):
    found = [*contents(folder), ("what was printed", printed.encode())]
    return [(str(where), name) for where, data in found for name in NAMES if SECRETS[name].encode() in data]


def run(folder, *command):
    """Runs Python with the secrets in its environment; exit status and all that it printed."""
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert not leaks(folder, result.stdout)
    return result.returncode, result.stdout


def drpo(folder, command, *arguments):
    return run(folder, "-m", "drpo_lightning", command, *arguments)


def fit(folder, *arguments):
    return drpo(folder, "fit", f"--config={CONFIG}", f"--vars.folder={folder}", *arguments)


def test_a_run_its_export_and_a_resumed_run(tmp_path):
    status, printed = fit(tmp_path)
    assert status == 0, printed[-3000:]
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    status, printed = drpo(tmp_path, "export", f"--ckpt={checkpoint}", f"--out={tmp_path / 'exported'}")
    assert status == 0, printed[-3000:]
    status, printed = fit(tmp_path, "--ckpt_path=last", "--trainer.max_epochs=3")
    assert status == 0, printed[-3000:]
    written = {path.suffix or path.name.split(".")[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert written >= {".ckpt", ".safetensors", ".parquet", ".csv", ".yaml", ".json"}
    assert list(tmp_path.rglob("events.out.tfevents*"))
    for folder in (tmp_path / "exported", next(tmp_path.rglob("policy"))):  # from the checkpoint; by the run
        assert "KeyedPrompts" in (folder / "README.md").read_text()
        assert "KeyedPrompts" in (folder / "training.json").read_text()
    saved = next(tmp_path.rglob("config.yaml")).read_text()
    assert "key: ${oc.env:DRPO_PLANTED}" in saved
    assert "sentence: the key is ${oc.env:DRPO_PLANTED}" in saved
    assert "token: ${oc.env:DRPO_PLANTED}" in saved
    assert "level: '3'" in saved or "level: 3" in saved
    config = next(tmp_path.rglob("config.yaml"))
    status, printed = drpo(tmp_path, "fit", f"--config={config}", "--trainer.max_epochs=1", "--ckpt_path=null")
    assert status == 0, printed[-3000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.optimizer.lr=1e30",), "NaN or infinite"),
        (("--trainer.callbacks.function=tests.reliability.victims.fails",), "Traceback"),
        (("--data.num_prompts=none",), "num_prompts"),
        (("--model.model=models/nowhere/at/all",), "models/nowhere/at/all"),
    ],
    ids=["numbers", "reward", "setting", "model"],
)
def test_a_run_that_fails(tmp_path, arguments, message):
    status, printed = fit(tmp_path, *arguments)
    assert status != 0
    assert message in printed, printed[-3000:]
    if message.startswith("NaN"):
        assert list(tmp_path.rglob("non_finite/*.jsonl"))


def test_the_death_of_an_engine(tmp_path):
    (tmp_path / "engine.py").write_text(ENGINE_DIES)
    status, printed = run(tmp_path, str(tmp_path / "engine.py"))
    assert status == 1
    assert "died (killed by SIGABRT)" in printed


def test_a_leak_would_be_found(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", SECRETS["HF_TOKEN"] * 100)
    assert leaks(tmp_path, SECRETS["DRPO_PLANTED"]) == [
        (str(tmp_path / "a.ckpt" / "data"), "HF_TOKEN"),
        ("what was printed", "DRPO_PLANTED"),
    ]
