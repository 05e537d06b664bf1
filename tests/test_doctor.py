"""What `drpo doctor` finds on machines that lack something."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest

from drpo_lightning import doctor


def found(check):
    return list(check())


@contextmanager
def hub(status):
    """A server that answers every request with a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("status", [200, 401, 404])
def test_a_hub_that_answers_is_reached(monkeypatch, status):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    with hub(status) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        (finding,) = found(doctor.check_hub)
    assert finding.status == "ok"
    assert "with a token" in finding.found
    assert "secret-token" not in str(finding)


@pytest.mark.parametrize(
    ("environment", "status", "text"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "note", "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "note", "is not reached: "),
        ({"HF_ENDPOINT": "file:///etc"}, "problem", "HF_ENDPOINT is 'file:///etc'"),
    ],
)
def test_a_hub_that_does_not_answer(monkeypatch, environment, status, text):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (finding,) = found(doctor.check_hub)
    assert finding.status == status
    assert text in finding.found
    assert finding.advice


def test_packages_of_this_environment_fit():
    findings = found(doctor.check_packages)
    assert {finding.subject for finding in findings} >= {"torch", "lightning", "transformers", "tensorboard"}
    assert not [finding for finding in findings if finding.status == "problem"]


def test_a_package_that_is_too_old_or_missing_is_a_problem(monkeypatch):
    needed = ["torch>=999", "no-such-package>=1.2", "peft>=999; extra == 'lora'", "no-such-extra; extra == 'lora'"]
    monkeypatch.setattr(doctor, "requires", lambda _: needed)
    by_name = {finding.subject: finding for finding in found(doctor.check_packages)}
    assert (by_name["torch"].status, by_name["torch"].advice) == ("problem", "pip install 'torch>=999'")
    assert by_name["no-such-package"].advice == "pip install 'no-such-package>=1.2'"
    assert by_name["no-such-extra"].status == "note"
    assert "drpo-lightning[lora]" in by_name["no-such-extra"].advice


def test_a_vllm_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('libcudart.so.99 is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = found(doctor.check_vllm)
    assert finding.status == "problem"
    assert "libcudart.so.99 is missing" in finding.found


def test_without_vllm_there_is_advice(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    (finding,) = found(doctor.check_vllm)
    assert finding.status == "note"
    assert "TransformersEngine" in finding.advice


def test_without_a_compiler_there_is_advice(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = found(doctor.check_compiler)
    assert finding.status == "note"


def test_a_path_with_a_space_is_noted(monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/home/a b/.venv")
    (finding,) = found(doctor.check_path)
    assert finding.status == "note"
    monkeypatch.setattr(sys, "prefix", "/home/ab/.venv")
    assert found(doctor.check_path) == []


def test_few_open_files_and_a_full_disk_are_noted(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e9)
    try:
        findings = {finding.subject: finding for finding in found(doctor.check_limits)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert findings["open files"].advice == f"ulimit -n {doctor.MIN_FILES}"
    assert findings["this folder"].status == "note"


def test_folders_that_cannot_be_written_to_have_a_way_out(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)  # root may write anywhere
    findings = {f.subject: f for f in found(doctor.check_limits) if "cannot be written to" in f.found}
    assert {name: finding.status for name, finding in findings.items()} == {
        "this folder": "problem", "temporary files": "problem", "model cache": "note"
    }  # fmt: skip
    assert "TMPDIR" in findings["temporary files"].advice
    assert all(finding.advice for finding in findings.values())


def test_without_loopback_ranks_cannot_meet(monkeypatch):
    def refuse(*_):
        raise PermissionError("Operation not permitted")

    assert [finding.status for finding in found(doctor.check_ports)] == ["ok"]
    monkeypatch.setattr(doctor.socket, "create_server", refuse)
    (finding,) = found(doctor.check_ports)
    assert (finding.status, finding.found) == ("problem", "Operation not permitted")
    assert finding.advice


def test_a_driver_whose_gpu_torch_does_not_see_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    problem, cpu = found(doctor.check_accelerator)
    assert problem.status == "problem"
    assert "CUDA_VISIBLE_DEVICES" in problem.advice
    assert cpu.status == "note"


def test_a_gpu_is_shown_and_one_without_bfloat16_has_a_precision_to_set(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA T4", total_memory=16 * 2**30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: gpu)
    for has_bfloat16, status, advice in ((True, "ok", ""), (False, "note", "`trainer.precision: 16-mixed`")):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda has=has_bfloat16: has)
        findings = found(doctor.check_accelerator)
        assert [(f.subject, f.status) for f in findings] == [("GPU 0", status), ("GPU 1", status)]
        assert all(f.found.startswith("NVIDIA T4, 16 GiB") and advice in f.advice for f in findings)


def test_the_command_shows_a_table_and_says_whether_there_is_a_problem(tmp_path):
    command = [sys.executable, "-m", "drpo_lightning", "doctor"]
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('broken')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    assert "cannot be imported: ImportError: broken" in done.stdout
    assert "1 problems" in done.stdout
    assert not [line for line in done.stdout.splitlines() if len(line) > 200]
