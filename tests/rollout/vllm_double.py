"""A small HTTP server that talks as vLLM 0.32 does, and misbehaves as it is told."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

from drpo_lightning.rollout.server.weights import HTTP_BACKEND, unpacked

CONFIG = {
    "model_config": {
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "override_generation_config": {},
        "logits_processors": None,
        "max_logprobs": -1,
        "max_model_len": 64,
        "quantization": None,
        "dtype": "torch.float32",
    },
    "cache_config": {"block_size": 128, "enable_prefix_caching": True},
    "weight_transfer_config": {"backend": HTTP_BACKEND},
    "instance_id": "abcde",
}


class Double(ThreadingHTTPServer):
    """Samples tokens that follow from the seed, one after the other, under a version of the weights as vLLM keeps it.

    Args:
        config: what `/server_info` says.
        port: where it listens.

    Attributes:
        seconds: that the tokens of a prompt take.
        misbehave: called with the handler and the path of every request; True if it has answered.
        requests: path and headers of each.
        versions: of the weights, at the end of each prompt.
        pause_modes: of all its pauses.
        weights: what it has been sent.
        most_active: most prompts that it has had at the same time.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, config=CONFIG, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.config = json.loads(json.dumps(config))
        self.config["model_config"]["seed"] = self.server_port
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.misbehave = lambda handler, path: False
        self.seconds = 0.0
        self.version = "default"
        self.is_open = False
        self.pause_mode = ""
        self.num_aborts = 0
        self.holds_old_blocks = False
        self.may_compute = threading.Event()
        self.may_compute.set()
        self.weights, self.requests, self.versions, self.pause_modes = {}, [], [], []
        self.num_tokens = self.active = self.most_active = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is none of ours."""

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def say(self, content, status=200, **headers):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.meet()

    def do_POST(self):
        self.meet()

    def meet(self):
        server = self.server
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query))
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(data) if data else {}
        with server.lock:
            server.requests.append((path, dict(self.headers)))
        if not server.misbehave(self, path):
            getattr(self, path.strip("/").replace("/", "_"))(server, body)

    def health(self, server, body):
        self.say("")

    def metrics(self, server, body):
        self.say(f'# HELP\nvllm:generation_tokens_total{{engine="0"}} {float(server.num_tokens)}\n')

    def server_info(self, server, body):
        self.say({"vllm_config": server.config})

    def get_world_size(self, server, body):
        self.say({"world_size": 1})

    def weight_info(self, server, body):
        self.say({"weight_version": server.version})

    def pause(self, server, body):
        server.may_compute.clear()
        server.pause_mode = self.query.get("mode", "abort")
        server.pause_modes.append(server.pause_mode)
        server.num_aborts += server.pause_mode == "abort"
        server.holds_old_blocks = server.pause_mode == "keep" and self.query.get("clear_cache") != "true"
        self.say({})

    def start_weight_update(self, server, body):
        if server.is_open:
            self.say("already active", 500)
        else:
            server.is_open = True
            self.say({})

    def update_weights(self, server, body):
        assert server.is_open
        assert server.pause_mode
        server.weights |= dict(unpacked(**body["update_info"]))
        self.say({})

    def finish_weight_update(self, server, body):
        server.is_open = False
        server.version = body.get("weight_version") or server.version
        self.say({})

    def reset_prefix_cache(self, server, body):
        self.say({"success": not (server.holds_old_blocks and server.active)})

    def resume(self, server, body):
        server.pause_mode = ""
        server.may_compute.set()
        self.say({})

    def inference_v1_abort_requests(self, server, body):
        self.say("")

    def inference_v1_generate(self, server, body):
        assert server.pause_mode != "abort"
        with server.lock:
            server.active += 1
            server.most_active = max(server.active, server.most_active)
            num_aborts = server.num_aborts
        places, max_tokens = [], body["sampling_params"]["max_tokens"]
        while len(places) < max_tokens and num_aborts == server.num_aborts:
            time.sleep(server.seconds / max_tokens)
            server.may_compute.wait(20)
            places.append(server.version)
            server.num_tokens += 1
        answer = answer_to(body, places, "length" if len(places) == max_tokens else "abort")
        with server.lock:
            server.active -= 1
            server.versions.append(server.version)
        self.say(answer)


def answer_to(message, versions, finish_reason="length"):
    """Completions that follow from the seed alone, with a version for each token."""
    parameters = message["sampling_params"]
    choices = []
    for index in reversed(range(parameters["n"])):
        token_ids = [(parameters["seed"] + index + place) % 50 + 2 for place in range(len(versions))]
        content = [{"token_id": token, "logprob": -token / 7, "rank": 1, "top_logprobs": []} for token in token_ids]
        starts = [i for i, version in enumerate(versions) if i == 0 or version != versions[i - 1]]
        ends = [*starts[1:], len(versions)]
        spans = [{"version": versions[i], "start": i, "end": j} for i, j in zip(starts, ends, strict=True)]
        choices.append(
            {
                "index": index,
                "finish_reason": finish_reason,
                "token_ids": token_ids,
                "weight_versions": spans,
                "logprobs": {"content": content},
            }
        )
    return {"prompt_token_ids": message["token_ids"], "choices": choices}
