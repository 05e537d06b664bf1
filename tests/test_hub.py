"""An exported policy is uploaded to a server that talks as the Hugging Face hub does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from drpo_lightning import export
from drpo_lightning.callbacks import ExportPolicy
from drpo_lightning.errors import SettingError
from drpo_lightning.hub import make_repository, upload

TOKEN = "hf_" + "x" * 34


class Hub(ThreadingHTTPServer):
    """Keeps repositories and the files that are committed to them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories = {}
        self.files = {}
        self.refuses = ()
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """What the hub answers to a client that makes a repository and commits a folder."""

    def do_GET(self):
        self.answer(404, {"error": "not found"})

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "who are you?"})
        if any(part in self.path for part in self.server.refuses):
            return self.answer(403, {"error": "you may not"})
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories[name] = asked
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(content)["files"]]
            return self.answer(200, {"files": [f | {"shouldIgnore": False, "oid": None} for f in files]})
        if "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{self.server.url}/acme/policy/commit/1", "commitOid": "1"})
        return self.answer(200, {})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub of this machine, which the client is told of, and a token for it."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_uploads_what_it_has_exported(hub, make_run, tmp_path):
    make_run(ExportPolicy(folder=str(tmp_path / "out"), push_to_hub="acme/policy")).fit()
    assert hub.files == contents(tmp_path / "out")
    assert {"README.md", "training.json", "model.safetensors", "config.json"} <= hub.files.keys()
    assert hub.repositories["acme/policy"]["visibility"] == "private"


def test_the_command_uploads_what_it_has_exported(hub, make_run, tmp_path, capsys):
    run = make_run()
    run.fit()
    run.trainer.save_checkpoint(tmp_path / "run.ckpt")
    arguments = ["--ckpt", str(tmp_path / "run.ckpt"), "--out", str(tmp_path / "out")]
    export.main([*arguments, "--push_to_hub", "acme/policy", "--private", "false"])
    assert hub.files == contents(tmp_path / "out")
    assert hub.repositories["acme/policy"]["visibility"] == "public"
    assert f"Policy uploaded to {hub.url}/acme/policy" in capsys.readouterr().out
    hub.refuses = ("/commit/",)
    with pytest.raises(SystemExit, match=r"could not be uploaded to 'acme/policy'.*hf upload acme/policy"):
        export.main([*arguments, "--push_to_hub", "acme/policy"])


def test_without_the_right_to_write_a_run_ends_before_it_has_begun(hub, make_run, tmp_path):
    hub.refuses = ("/create",)
    run = make_run(ExportPolicy(folder=str(tmp_path / "out"), push_to_hub="acme/policy"))
    with pytest.raises(SettingError, match=r"`push_to_hub` 'acme/policy' cannot be written to: .*you may not"):
        run.fit()
    assert run.trainer.global_step == 0
    assert not (tmp_path / "out").exists()


def test_a_name_without_an_owner_is_refused_and_nothing_is_asked(hub):
    with pytest.raises(SettingError, match=r"`push_to_hub` must be `owner/name`, got 'policy'"):
        make_repository("policy", private=True)
    assert hub.requests == []


def test_a_hub_that_is_not_there_is_named(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SettingError, match=r"`push_to_hub` 'acme/policy' cannot be written to"):
        make_repository("acme/policy", private=True)


def test_offline_it_is_refused(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SettingError, match=r"cannot be written to: .*[Oo]ffline"):
        make_repository("acme/policy", private=True)
    assert hub.requests == []


def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_go_on(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    hub.refuses = ("/commit/",)
    with pytest.raises(RuntimeError, match=r"the policy is in .*could not be uploaded to 'acme/policy'"):
        upload(tmp_path, "acme/policy")
    assert contents(tmp_path) == {"config.json": b"{}"}


def test_by_default_nothing_is_asked_of_the_hub(hub, make_run, tmp_path):
    make_run(ExportPolicy(folder=str(tmp_path / "out"))).fit()
    assert hub.requests == []


def test_a_trial_run_makes_no_repository(hub, make_run):
    make_run(ExportPolicy(push_to_hub="acme/policy"), trainer={"fast_dev_run": 1}).fit()
    assert hub.requests == []
