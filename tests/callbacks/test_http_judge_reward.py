"""A judge behind a real server that is slow, fails, answers nonsense, hangs up or drips."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback

from drpo_lightning.callbacks import HTTPJudgeReward
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch, RewardFailure

KEY = "sk-very-secret"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            attempt = sum(seen["completion"] == body["completion"] for _, _, seen in server.requests)
            server.active += 1
            server.most_active = max(server.active, server.most_active)
        try:
            getattr(self, body["completion"].split()[0])(body, attempt)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.active -= 1

    def answer(self, data, status=200, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def score(self, body, attempt):
        time.sleep(0.01)
        self.answer(json.dumps({"score": len(body["completion"])}).encode())

    def null(self, body, attempt):
        self.answer(b'{"score": null}')

    def busy(self, body, attempt):
        self.answer(b'{"score": 1.0}', 200 if attempt == 3 else int(body["completion"].split()[1]))

    def refused(self, body, attempt):
        self.answer(b"no such model", 404)

    def redirect(self, body, attempt):
        self.answer(b"", 307, [("Location", "/score")])

    def slow(self, body, attempt):
        self.server.closing.wait(20)
        self.answer(b'{"score": 1.0}')

    def drip(self, body, attempt):
        self.send_response(200)
        self.send_header("Content-Length", "10000")
        self.end_headers()
        while not self.server.closing.wait(0.02):
            self.wfile.write(b" ")

    def hangup(self, body, attempt):
        self.close_connection = True
        self.connection.close()

    def short(self, body, attempt):
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b'{"score": 1.0}')
        self.close_connection = True

    def garbage(self, body, attempt):
        self.answer(b"<html>come in</html>")

    def deep(self, body, attempt):
        self.answer(b"[" * 100_000)

    def other(self, body, attempt):
        self.answer(b'{"rating": 1.0}')

    def nan(self, body, attempt):
        self.answer(b'{"score": NaN}')

    def text(self, body, attempt):
        self.answer(b'{"score": "1.0"}')

    def huge(self, body, attempt):
        self.answer(b'{"score": 1.0, "padding": "' + b"x" * 2**21 + b'"}')

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.lock, server.active, server.most_active = [], threading.Lock(), 0, 0
    server.closing = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/judge?kind=math"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def judge(server, **settings):
    defaults = {"timeout_seconds": 0.5, "backoff_seconds": 0.01, "max_retries": 2, "on_failure": "drop_sample"}
    return HTTPJudgeReward(server.url, **(defaults | settings))


def batch(*completions):
    size = len(completions)
    columns = {"answer": list(range(size)), "level": ["hard"] * size}
    return RewardBatch([f"prompt {i}" for i in range(size)], completions, [[1]] * size, ["stop"] * size, columns)


def test_the_server_is_sent_what_it_is_to_judge_and_its_score_is_taken(server):
    reward = judge(server, columns=["answer"], max_concurrency=4)
    texts = ["score" + " x" * i for i in range(20)]
    assert reward.score(batch(*texts, "null")) == [float(len(text)) for text in texts] + [None]
    assert reward.required_columns == ("answer",)
    bodies = {body["completion"]: body for _, _, body in server.requests}
    assert bodies["score x x"] == {"prompt": "prompt 2", "completion": "score x x", "columns": {"answer": 2}}
    assert {path for path, _, _ in server.requests} == {"/judge?kind=math"}
    assert 1 < server.most_active <= 4


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    assert judge(server).score(batch(f"busy {status}")) == [1.0]
    assert len(server.requests) == 3
    (failure,) = judge(server, max_retries=0).score(batch(f"busy {status} "))
    assert failure == RewardFailure("error", f"raised JudgeError: status {status}")


@pytest.mark.parametrize(("act", "status"), [("refused", 404), ("redirect", 307)])
def test_a_server_that_refuses_is_not_asked_again(server, act, status):
    (failure,) = judge(server).score(batch(act))
    assert failure.reason.startswith(f"was answered with status {status}")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("hangup", "raised ServerDisconnectedError"),
        ("short", "raised ClientPayloadError"),
        ("garbage", "raised JudgeError: no JSON with a `score`, but b'<html>"),
        ("deep", "raised JudgeError: no JSON"),
        ("other", "raised JudgeError: no JSON"),
        ("huge", "raised JudgeError: an answer longer than"),
        ("nan", "returned nan, which is neither"),
        ("text", "returned '1.0', which is neither"),
    ],
)
def test_nonsense_is_an_error_after_the_last_try(server, act, reason):
    before, failure, after = judge(server).score(batch("score", act, "score x"))
    assert (before, after) == (5.0, 7.0)
    assert failure.kind == "error"
    assert failure.reason.startswith(reason), failure.reason
    assert sum(body["completion"] == act for _, _, body in server.requests) == 3


@pytest.mark.parametrize("act", ["slow", "drip"])
def test_a_server_that_does_not_finish_is_a_timeout_and_holds_no_thread(server, act):
    started = time.monotonic()
    reward = judge(server, max_retries=1, max_concurrency=2)
    *failures, after = reward.score(batch(f"{act} 1", f"{act} 2", f"{act} 3", "score"))
    assert [failure.kind for failure in failures] == ["timeout"] * 3
    assert after == 5.0
    assert time.monotonic() - started < 5


def test_a_server_that_is_not_there_is_an_error(server):
    server.url = "http://127.0.0.1:1/"
    (failure,) = judge(server, max_retries=0).score(batch("score"))
    assert failure.reason.startswith("raised ClientConnectorError")


def test_columns_that_are_no_json_are_an_error_at_once(server):
    one = RewardBatch(["p"], ["score"], [[1]], ["stop"], {"answer": [object()]})
    (failure,) = judge(server, columns=["answer"]).score(one)
    assert failure.reason.startswith("cannot send the columns ['answer'] as JSON: ")
    assert not server.requests


def test_the_key_is_sent_and_stands_nowhere_else(server, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    reward = judge(server, api_key_env="JUDGE_KEY")
    outcomes = reward.score(batch("score", "refused", "hangup"))
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
    assert KEY not in repr(outcomes) + caplog.text + repr(vars(reward))


@pytest.mark.parametrize("value", [None, "", "  ", "two\nlines", "schlüssel"])
def test_a_variable_that_holds_no_key_is_refused_without_its_value(server, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(SettingError, match=r"names the environment variable 'JUDGE_KEY', which holds no key$"):
        judge(server, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize(
    "url", ["ftp://host/", "host/judge", "http:///judge", "http://me:word@host/", "http://host:x/"]
)
def test_an_url_that_cannot_be_is_refused_without_its_password(url):
    with pytest.raises(ValueError, match=r"`url` must be http|Port could not be cast") as error:
        HTTPJudgeReward(url)
    assert "word@" not in str(error.value)


def test_its_settings_are_flat_in_a_configuration_and_checked():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Callback)

    def parse(**settings):
        init_args = {"url": "http://localhost/score"} | settings
        return parser.parse_object({"reward": {"class_path": "HTTPJudgeReward", "init_args": init_args}})

    settings = {"max_retries": 7, "weight": 0.5, "on_failure": "score", "failure_score": 0.25}
    reward = parser.instantiate(parse(**settings)).reward
    assert (reward.max_retries, reward.weight, reward.name) == (7, 0.5, "judge")
    assert vars(reward.failure_policy) == {"on_failure": "score", "failure_score": 0.25}
    for wrong in ({"max_retires": 7}, {"on_failure": "ignore"}, {"max_concurrency": "many"}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            parse(**wrong)
