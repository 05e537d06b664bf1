"""The engine of many servers, against small ones that misbehave; tests/reliability/test_server.py has real ones."""

import logging
import ssl
import subprocess
import threading
import time

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout import EngineError, VLLMServerEngine
from drpo_lightning.rollout.server import dispatch, fleet
from tests.rollout.vllm_double import Double

KEY_VARIABLE, KEY = "DRPO_TEST_ROLLOUT_KEY", "sk-very-secret"
PROMPTS = [[5 + i, 6, 7] for i in range(12)]
WEIGHTS = {"embed": torch.arange(12.0).view(3, 4), "norm": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def doubles():
    servers = [Double(), Double()]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def make_engine(doubles):
    made = []

    def make(urls=None, *, with_weights=True, **settings):
        settings = {"start_timeout_seconds": 0.1, "stall_timeout_seconds": 0.4} | settings
        engine = VLLMServerEngine(urls or [server.url for server in doubles], **settings)
        made.append(engine)
        engine.start("model", device=torch.device("cpu"), num_ranks=1, seed=0)
        if with_weights:
            engine.load_weights(WEIGHTS.items())
        return engine

    yield make
    for engine in made:
        engine.close()


def generate(engine, prompts=PROMPTS):
    sampling = Sampling(max_tokens=3, temperature=1.5)
    return engine.generate(prompts, sampling, num_samples=2, stop_token_ids=[1], seeds=range(100, 200))


def expected(prompts=PROMPTS):
    """Token ids of what any server says."""
    return [[[(100 + i + n + place) % 50 + 2 for place in range(3)] for n in range(2)] for i in range(len(prompts))]


def token_ids(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def paths(server):
    return [path for path, _ in server.requests]


@pytest.mark.parametrize(
    "url", ["http://10.0.0.5:8000", "https://rollouts.example", "http://0.0.0.0:8000", "http://127.evil.example:8000"]
)
def test_an_address_that_is_not_of_this_machine_has_to_be_confirmed(url):
    with pytest.raises(ValueError, match=r"not on this machine.*SECURITY\.md.*`trusted_network: true`"):
        VLLMServerEngine([url])
    assert VLLMServerEngine([url], trusted_network=True).urls == [url]


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/", "http://localhost:8000", "http://[::1]:8000"])
def test_an_address_of_this_machine_needs_no_confirmation(url):
    assert VLLMServerEngine([url]).urls == [url.rstrip("/")]


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://user:secret@127.0.0.1", "http://a/?key=b"]
)
def test_what_is_no_address_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match="`urls` must be http") as error:
        VLLMServerEngine([url], trusted_network=True)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("urls", [[], ["http://127.0.0.1:1", "http://127.0.0.1:1/"]])
def test_no_server_and_the_same_one_twice_are_refused(urls):
    with pytest.raises(ValueError, match="`urls` must name at least one server, and each once"):
        VLLMServerEngine(urls)


@pytest.mark.parametrize(
    "setting", [{"max_concurrency": 0}, {"stall_timeout_seconds": 0.0}, {"max_retries": -1}, {"max_restarts": -1}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` must"):
        VLLMServerEngine(["http://127.0.0.1:8000"], **setting)


def test_a_variable_without_a_key_is_refused():
    with pytest.raises(SettingError, match=f"`api_key_env` names the environment variable '{KEY_VARIABLE}'"):
        VLLMServerEngine(["http://127.0.0.1:8000"], api_key_env=KEY_VARIABLE)


def test_the_key_goes_with_every_request_and_nowhere_else(make_engine, doubles, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    engine = make_engine(api_key_env=KEY_VARIABLE)
    generate(engine)
    for server in doubles:
        assert {headers["Authorization"] for _, headers in server.requests} == {f"Bearer {KEY}"}
        server.misbehave = lambda handler, path: handler.say("no", 401) or True
    with pytest.raises(SettingError, match="wants another key") as error:
        generate(engine)
    assert KEY not in str(error.value) + caplog.text + repr(vars(engine))


def test_redirects_are_not_followed(make_engine, doubles):
    first, second = doubles
    first.misbehave = lambda handler, path: handler.say("", 307, Location=second.url + path) or True
    with pytest.raises(SettingError, match="redirects are not followed"):
        make_engine([first.url])
    assert not second.requests


@pytest.fixture
def certificate(tmp_path):
    """That nobody else has signed, for 127.0.0.1."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=rollout"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def test_only_a_server_with_a_certificate_that_is_trusted_is_spoken_to(make_engine, doubles, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = doubles[0]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    with pytest.raises(EngineError, match="certificate verify failed"):
        make_engine([url])
    assert not server.requests
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    assert token_ids(generate(make_engine([url]))) == expected()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("logprobs_mode", "raw_logprobs"),
        ("generation_config", "auto"),
        ("override_generation_config", {"temperature": 0.5}),
        ("logits_processors", ["other"]),
        ("max_logprobs", 20),
    ],
)
def test_a_server_that_would_sample_or_score_in_another_way_is_refused(make_engine, doubles, setting, value):
    doubles[1].config["model_config"][setting] = value
    with pytest.raises(SettingError, match=rf"{doubles[1].url} cannot be used: `{setting}` is .*`drpo serve`"):
        make_engine()


def test_a_server_that_takes_weights_in_an_unknown_way_is_refused(make_engine, doubles):
    doubles[0].config["weight_transfer_config"] = {"backend": "ipc"}
    with pytest.raises(SettingError, match="it receives weights by 'ipc' instead of 'drpo_http' or 'nccl'"):
        make_engine()


def test_nccl_to_a_trainer_without_a_gpu_is_refused(make_engine, doubles):
    doubles[0].config["weight_transfer_config"] = {"backend": "nccl"}
    with pytest.raises(SettingError, match=r"receives weights by NCCL, and the trainer is on 'cpu' \(see `--transfer`"):
        make_engine()


@pytest.mark.parametrize(
    ("missing", "status"), [("/server_info", 404), ("/inference/v1/abort_requests", 403), ("/get_world_size", 404)]
)
def test_a_server_without_an_endpoint_that_is_needed_is_refused(make_engine, doubles, missing, status):
    doubles[0].misbehave = lambda handler, path: path == missing and (handler.say("no", status) or True)
    with pytest.raises(SettingError, match=f"{missing} with status {status}: it has not what a rollout needs"):
        make_engine()


@pytest.mark.parametrize(
    "said",
    [
        "a page of something else",
        [],
        {"vllm_config": None},
        {"vllm_config": {}},
        {"vllm_config": {"model_config": {}, "cache_config": {}, "weight_transfer_config": "ipc"}},
    ],
)
def test_a_server_that_is_not_the_vllm_that_is_needed_is_refused(make_engine, doubles, said):
    doubles[0].misbehave = lambda handler, path: path == "/server_info" and (handler.say(said) or True)
    with pytest.raises(SettingError, match=rf"{doubles[0].url} does not describe itself as vLLM .*`drpo serve`"):
        make_engine()


def test_servers_of_two_precisions_are_refused(make_engine, doubles):
    doubles[0].config["model_config"]["dtype"] = "torch.bfloat16"
    with pytest.raises(SettingError, match=r"weights of one precision, got \['bfloat16', 'float32'\]"):
        make_engine()


def test_the_first_start_waits_for_every_server(make_engine, doubles):
    gone = doubles.pop()
    gone.close()
    with pytest.raises(EngineError, match=r"1 of 2 rollout servers were not ready within 0\.1 s .*`drpo serve`"):
        make_engine([doubles[0].url, gone.url])


def test_it_is_said_which_servers_are_waited_for_and_why(make_engine, doubles, caplog, monkeypatch):
    monkeypatch.setattr(fleet, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(fleet, "REPORT_SECONDS", 0.2)
    gone = doubles.pop()
    gone.close()
    doubles[0].misbehave = lambda handler, path: path == "/health" and (handler.say("loading", 503) or True)
    with pytest.raises(EngineError, match="2 of 2 rollout servers were not ready"):
        make_engine([doubles[0].url, gone.url], start_timeout_seconds=1.3)
    lines = [line for line in caplog.messages if line.startswith("Waiting for rollout servers, at most 1 s: ")]
    assert f"{doubles[0].url} answered /health with status 503: loading; " in lines[0]
    assert f"{gone.url} did not answer /health: connection refused (not started, or still loading)" in lines[0]
    assert 4 <= sum(line.startswith("Waiting") for line in caplog.messages) <= 7


def test_nothing_is_said_of_servers_that_are_ready(make_engine, caplog):
    make_engine()
    assert not [line for line in caplog.messages if line.startswith(("Waiting", "Still"))]


def test_what_holds_for_all_servers_is_known(make_engine, doubles):
    doubles[1].config["model_config"]["max_model_len"] = 32
    doubles[0].config["cache_config"] = {"block_size": 16, "enable_prefix_caching": False}
    engine = make_engine()
    assert (engine.context_tokens, engine.cache_block_tokens, engine.dtype_name) == (32, 128, "float32")


def test_every_server_gets_the_weights_before_it_samples(make_engine, doubles):
    generate(make_engine())
    for server in doubles:
        assert server.weights.keys() == WEIGHTS.keys()
        assert all(torch.equal(server.weights[name], tensor) for name, tensor in WEIGHTS.items())
        steps = [
            "pause",
            "start_weight_update",
            "update_weights",
            "finish_weight_update",
            "reset_prefix_cache",
            "resume",
        ]
        assert [path[1:] for path in paths(server) if path[1:] in steps] == steps


def test_prompts_are_spread_evenly_and_answers_come_in_order(make_engine, doubles):
    for server in doubles:
        server.seconds = 0.05
    assert token_ids(generate(make_engine())) == expected()
    assert [len(server.versions) for server in doubles] == [6, 6]


def test_a_server_has_no_more_prompts_at_a_time_than_allowed(make_engine, doubles):
    for server in doubles:
        server.seconds = 0.02
    generate(make_engine(max_concurrency=2))
    assert [server.most_active for server in doubles] == [2, 2]


def test_the_slower_server_gets_less(make_engine, doubles):
    doubles[0].seconds, doubles[1].seconds = 0.01, 0.2
    generate(make_engine(max_concurrency=1))
    assert len(doubles[0].versions) > 3 * len(doubles[1].versions)


def test_a_rank_without_prompts_gets_nothing(make_engine):
    assert generate(make_engine(), []) == []


def test_servers_that_draw_the_same_random_numbers_are_refused(make_engine, doubles):
    doubles[1].config["model_config"]["seed"] = doubles[0].config["model_config"]["seed"]
    with pytest.raises(SettingError, match=r"must draw different random numbers, got the seeds .*`drpo serve`"):
        make_engine()


def fails(status, times):
    """Answers the first prompts with a status."""
    left = list(range(times))

    def misbehave(handler, path):
        if path == "/inference/v1/generate" and left:
            left.pop()
            handler.say("overloaded", status)
            return True
        return False

    return misbehave


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failed_prompt_is_asked_again_of_a_server_that_is_well(make_engine, doubles, status):
    engine = make_engine()
    doubles[0].misbehave = fails(status, 2)
    assert token_ids(generate(engine)) == expected()
    assert engine.statistics == {"servers": 2, "lost_servers": 0, "retried_requests": 2}


def test_a_prompt_that_fails_again_and_again_ends_it(make_engine, doubles):
    engine = make_engine(max_retries=2)
    for server in doubles:
        server.misbehave = fails(500, 100)
    with pytest.raises(EngineError, match=r"failed 3 times \(`max_retries`\); at last: .*status 500: overloaded"):
        generate(engine, PROMPTS[:1])
    assert engine.num_retried_requests == 2


def test_a_refused_prompt_is_not_asked_again(make_engine, doubles):
    engine = make_engine()
    for server in doubles:
        server.misbehave = fails(400, 100)
    with pytest.raises(SettingError, match="status 400: overloaded"):
        generate(engine, PROMPTS[:1])


def test_the_prompts_of_a_server_that_dies_are_asked_of_the_other(make_engine, doubles):
    engine = make_engine()
    doubles[0].misbehave = lambda handler, path: handler.connection.close() or True
    with pytest.warns(RuntimeWarning, match=rf"{doubles[0].url} did not answer .* left alone until the next sync"):
        assert token_ids(generate(engine)) == expected()
    assert engine.statistics["servers"] == engine.num_lost_servers == 1
    before = len(doubles[0].requests)
    generate(engine)
    assert len(doubles[0].requests) == before


def test_a_server_that_hangs_is_lost_and_gets_the_weights_when_it_is_back(make_engine, doubles):
    engine = make_engine()
    hanging = threading.Event()
    doubles[0].misbehave = lambda handler, path: path.endswith("generate") and (hanging.wait(20) or True)
    with pytest.warns(RuntimeWarning, match=r"made no progress for 0\.4 s \(`stall_timeout_seconds`\)"):
        assert token_ids(generate(engine)) == expected()
    hanging.set()
    doubles[0].misbehave = lambda handler, path: False
    doubles[0].weights.clear()
    with pytest.warns(RuntimeWarning, match=f"{doubles[0].url} is back, and has the current weights"):
        engine.load_weights(WEIGHTS.items())
    assert doubles[0].weights.keys() == WEIGHTS.keys()
    generate(engine)
    assert doubles[0].versions == [doubles[1].version] * 6


def test_a_server_that_ends_and_leaves_its_requests_open_is_lost_long_before_it_counts_as_hanging(
    make_engine, doubles, monkeypatch
):
    monkeypatch.setattr(dispatch, "WATCH_SECONDS", 0.1)
    engine = make_engine(stall_timeout_seconds=60.0)
    ended = threading.Event()

    def end(handler, path):
        if path.endswith("generate"):
            doubles[0].close()
            ended.wait(20)
        return path.endswith("generate")

    doubles[0].misbehave = end
    started = time.monotonic()
    with pytest.warns(RuntimeWarning, match=rf"{doubles[0].url} did not answer /metrics: connection refused .* left"):
        assert token_ids(generate(engine, PROMPTS[:1])) == expected(PROMPTS[:1])
    assert time.monotonic() - started < 10
    ended.set()


def test_a_slow_server_that_computes_is_not_taken_for_a_hanging_one(make_engine, doubles):
    engine = make_engine([doubles[0].url])
    doubles[0].seconds = 1.2

    def compute(handler, path):
        doubles[0].num_tokens += path == "/metrics"
        return False

    doubles[0].misbehave = compute
    assert token_ids(generate(engine, PROMPTS[:1])) == expected(PROMPTS[:1])


def test_samples_of_other_weights_are_not_used(make_engine, doubles):
    engine = make_engine()
    doubles[0].version = "default"  # as if it had been started again
    with pytest.warns(RuntimeWarning, match=r"it sampled with weights \['default'\] instead of"):
        assert token_ids(generate(engine)) == expected()
    assert engine.num_lost_servers == 1
    assert set(doubles[1].versions) == {doubles[1].version}


def test_a_server_that_fails_in_a_sync_is_left_out(make_engine, doubles):
    engine = make_engine()
    doubles[1].misbehave = lambda handler, path: (
        path == "/update_weights" and (handler.say("out of memory", 500) or True)
    )
    with pytest.warns(RuntimeWarning, match="out of memory.* left alone"):
        engine.load_weights(WEIGHTS.items())
    assert token_ids(generate(engine)) == expected()
    assert not doubles[1].versions


def test_a_server_that_stays_dead_is_named_once_at_every_later_sync(make_engine, doubles, caplog):
    engine = make_engine()
    doubles[1].close()
    with pytest.warns(RuntimeWarning, match="left alone"):
        engine.load_weights(WEIGHTS.items())
    said = f"Still without a server: the server {doubles[1].url} did not answer /health: connection refused"
    for number in range(3):
        assert sum(line.startswith(said) for line in caplog.messages) == number
        engine.load_weights(WEIGHTS.items())


def test_a_server_that_keeps_cached_prefixes_is_left_out(make_engine, doubles):
    engine = make_engine()
    doubles[0].misbehave = lambda handler, path: (
        path == "/reset_prefix_cache" and (handler.say({"success": False}) or True)
    )
    with pytest.warns(RuntimeWarning, match="could not reset its prefix cache"):
        engine.load_weights(WEIGHTS.items())
    assert token_ids(generate(engine)) == expected()
    assert not doubles[0].versions


def test_a_sync_that_no_server_survives_fails(make_engine, doubles):
    engine = make_engine()
    for server in doubles:
        server.misbehave = lambda handler, path: path == "/update_weights" and (handler.say("no", 500) or True)
    with pytest.warns(RuntimeWarning), pytest.raises(EngineError, match=r"no rollout server is left: .*`drpo serve`"):
        engine.load_weights(WEIGHTS.items())


def test_after_a_failure_one_server_is_enough(make_engine, doubles):
    engine = make_engine()
    doubles[0].misbehave = lambda handler, path: handler.connection.close() or True
    engine.abandon()
    engine.start("model", device=torch.device("cpu"), num_ranks=1, seed=0)
    with pytest.warns(RuntimeWarning, match="left alone"):
        engine.load_weights(WEIGHTS.items())
    assert token_ids(generate(engine)) == expected()


def test_an_update_that_was_left_open_is_closed_first(make_engine, doubles):
    doubles[0].is_open = True
    assert token_ids(generate(make_engine())) == expected()


def test_a_rollout_that_takes_too_long_is_an_error(make_engine, doubles):
    engine = make_engine(generate_timeout_seconds=0.3, stall_timeout_seconds=60.0)
    for server in doubles:
        server.seconds = 5
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"within 0\.3 s \(`generate_timeout_seconds`\)"):
        generate(engine)
    assert time.monotonic() - started < 2


def test_sleep_cannot_be_asked_for(make_engine):
    assert not make_engine(with_weights=False).can_sleep
