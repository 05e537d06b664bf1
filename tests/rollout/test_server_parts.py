"""What goes between trainer and servers: messages, weights, the key; and the command that starts a server."""

import asyncio
import json
import math
import subprocess
import sys

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout.server import weights as server_weights
from drpo_lightning.rollout.server.guard import RequireKey
from drpo_lightning.rollout.server.messages import completions_in, generate_message
from drpo_lightning.rollout.server.sent import SentWeights
from drpo_lightning.rollout.server.weights import buckets, unpacked, update_message
from drpo_lightning.serve import OWN_OPTIONS, main, server_command

CPU = torch.device("cpu")
KEY = "sk-very-secret"


def message(num_topk=0, **settings):
    sampling = Sampling(max_tokens=4, temperature=1.5, top_p=0.9, top_k=7)
    settings = {"num_samples": 1, "stop_token_ids": [1, 2], "seed": 3} | settings
    return generate_message([5, 6], sampling, num_topk=num_topk, **settings)


def test_a_message_asks_for_tokens_of_exactly_this_distribution():
    assert message()["token_ids"] == [5, 6]
    assert message()["sampling_params"] == {
        "n": 1,
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 7,
        "max_tokens": 4,
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
        "seed": 3,
    }


def vllms_answer(logits, sampled, asked, version="v"):
    """As vLLM 0.32 gives it: the sampled token first, then the most likely, cut to as many as were asked for."""
    content = []
    for row, token in zip(logits.log_softmax(-1), sampled, strict=True):
        order = row.argsort(descending=True).tolist()
        entries = {token: int((row >= row[token]).sum())}
        entries |= {other: rank for rank, other in enumerate(order[: len(row) if asked < 0 else asked], start=1)}
        listed = [{"token_id": i, "logprob": max(float(row[i]), -9999.0), "rank": rank} for i, rank in entries.items()]
        content.append(listed[0] | {"top_logprobs": listed if asked < 0 else listed[: max(asked, 1)]})
    choice = {"index": 0, "finish_reason": "length", "token_ids": list(sampled), "logprobs": {"content": content}}
    choice["weight_versions"] = [{"version": version, "start": 0, "end": len(sampled)}]
    return {"prompt_token_ids": [5, 6], "choices": [choice]}


@pytest.mark.parametrize("num_topk", [0, 1, 3, -1])
@pytest.mark.parametrize("rank", [0, 2, 3, 9], ids="sampled_at_{}".format)
def test_the_most_likely_tokens_are_all_there_whichever_was_sampled(num_topk, rank):
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(rank))
    ordered = logits.log_softmax(-1).sort(descending=True)
    sampled = ordered.indices[:, rank].tolist()
    asked = message(num_topk)
    answer = vllms_answer(logits, sampled, asked["sampling_params"]["logprobs"])
    (completion,) = completions_in(json.loads(json.dumps(answer)), asked, num_topk, {"v": 7})
    assert completion.token_ids == sampled
    assert completion.logprobs == ordered.values[:, rank].tolist()
    if num_topk:
        width = 10 if num_topk < 0 else num_topk
        assert torch.equal(completion.topk_ids, ordered.indices[:, :width])
        assert torch.equal(completion.topk_logprobs, ordered.values[:, :width])
    else:
        assert completion.topk_ids is None


def test_a_token_that_was_cut_off_has_minus_infinity():
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    answer = vllms_answer(logits, [1], -1)
    (completion,) = completions_in(answer, message(-1), -1, {"v": 7})
    assert completion.topk_logprobs[0, 2] == -math.inf


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda answer, choice: answer.update(prompt_token_ids=[5]), "did not continue the prompt"),
        (lambda answer, choice: answer["choices"].append(choice), "2 completions instead of 1"),
        (lambda answer, choice: choice.update(weight_versions=None), r"sampled with weights \[\] instead of \['v'"),
        (lambda answer, choice: choice["weight_versions"].append({"version": "w"}), r"with weights \['v', 'w'\]"),
        (lambda answer, choice: choice.update(token_ids=[0, 0]), "logprobs of other tokens"),
        (lambda answer, choice: choice.update(finish_reason="abort"), "ended a completion with 'abort'"),
    ],
)
def test_an_answer_to_something_else_is_refused(harm, complaint):
    answer = vllms_answer(torch.randn(2, 5), [1, 2], 0)
    harm(answer, answer["choices"][0])
    with pytest.raises(ValueError, match=complaint):
        completions_in(answer, message(), 0, {"v": 7})


def version_of(versions, weights):
    """The number that a completion of tokens of some versions has, where `weights` may have been used."""
    answer = vllms_answer(torch.randn(len(versions), 5), [1] * len(versions), 0)
    spans = [{"version": version, "start": i, "end": i + 1} for i, version in enumerate(versions)]
    answer["choices"][0]["weight_versions"] = spans
    (completion,) = completions_in(answer, message(), 0, weights)
    return completion.weights_version


def test_a_completion_has_the_number_of_the_oldest_weights_of_its_tokens():
    weights = {"a": 4, "b": 4, "c": 5, "d": 6}
    assert version_of("a", weights) == version_of("bc", weights) == version_of("abd", weights) == 4
    assert version_of("cd", weights) == 5
    assert version_of("d", weights) == 6


@pytest.mark.parametrize("versions", ["ba", "aba", "ax", "x"])
def test_tokens_of_weights_in_another_order_or_of_others_are_refused(versions):
    with pytest.raises(ValueError, match=r"sampled with weights .* instead of \['a', 'b'\]"):
        version_of(versions, {"a": 4, "b": 5})


def test_weights_from_before_a_request_are_not_among_those_that_it_may_be_answered_with():
    sent = SentWeights()
    for label, number in (("a", 4), ("b", 4), ("c", 5)):
        sent.announce(label, number)
    assert list(sent.since("b").items()) == [("b", 4), ("c", 5)]
    assert sent.since("default") == {}


def tensors():
    """Of several types and odd sizes, one not contiguous."""
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, generator=generator).bfloat16(),
        "double": torch.randn(2, 3, generator=generator, dtype=torch.float64),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "turned": torch.randn(4, 3, generator=generator).T,
        "scalar": torch.tensor(2.5),
        "special": torch.tensor([float("nan"), math.inf, -0.0]),
    }


@pytest.mark.parametrize("size", [1, 16, 40, 10**6])
def test_weights_arrive_bit_for_bit_whatever_the_buckets(monkeypatch, size):
    monkeypatch.setattr(server_weights, "BUCKET_BYTES", size)
    parts = list(buckets(tensors().items(), CPU))
    assert all(len(part) == 1 or sum(tensor.nbytes for _, tensor in part) <= size for part in parts)
    assert (len(parts) == 1) == (size == 10**6)
    arrived = {}
    for part in parts:
        arrived |= dict(unpacked(**json.loads(update_message(part, with_content=True))["update_info"]))
    assert arrived.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert arrived[name].shape == tensor.shape
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_bucket_keeps_what_its_source_overwrites():
    shared = torch.zeros(2)

    def source():
        for value in (1.0, 2.0):
            yield str(value), shared.fill_(value)

    (bucket,) = buckets(source(), CPU)
    assert [tensor.tolist() for _, tensor in bucket] == [[1.0, 1.0], [2.0, 2.0]]


def test_what_goes_by_nccl_is_only_announced():
    (bucket,) = buckets(tensors().items(), CPU)
    info = json.loads(update_message(bucket, with_content=False))["update_info"]
    assert info.keys() == {"names", "dtype_names", "shapes"}
    assert info["dtype_names"][:2] == ["bfloat16", "float64"]


def test_bytes_that_do_not_make_the_tensors_are_refused():
    (bucket,) = buckets({"a": torch.ones(3)}.items(), CPU)
    info = json.loads(update_message(bucket, with_content=True))["update_info"]
    with pytest.raises(ValueError, match="12 bytes for tensors of 16"):
        list(unpacked(**info | {"shapes": [[4]]}))


def status_of(path, *given, kind="http"):
    """What the guard answers; 200 is the server behind it."""
    sent = []

    async def app(scope, receive, send):
        sent.append(200)

    async def send(event):
        sent.append(event.get("status", event["type"]))

    scope = {"type": kind, "path": path, "headers": [(b"authorization", value) for value in given]}
    asyncio.run(RequireKey(app)(scope, None, send))
    return sent[0]


def test_the_guard_lets_only_the_key_through(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    right = f"Bearer {KEY}".encode()
    for path in ("/update_weights", "/collective_rpc", "/v1/models", "/metrics", "/health/../pause", "//health"):
        assert status_of(path, right) == 200
        for wrong in ((), (b"Bearer other",), (right[:-1],), (KEY.encode(),), (right, right), (b"",), (right.lower(),)):
            assert status_of(path, *wrong) == 401
    assert status_of("/health") == 200
    assert status_of("/v1/realtime", kind="websocket") == "websocket.close"


def test_a_guard_without_a_key_does_not_start(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ValueError, match="VLLM_API_KEY holds no key"):
        RequireKey(None)


@pytest.mark.parametrize("option", OWN_OPTIONS)
@pytest.mark.parametrize("form", ["{}", "{}=x", "underscores"])
def test_an_option_that_must_be_as_it_is_cannot_be_given(option, form):
    given = "--" + option[2:].replace("-", "_") if form == "underscores" else form.format(option)
    with pytest.raises(SettingError, match=f"`{option}` is set by `drpo serve`"):
        server_command("model", options=["--dtype", "float32", given])


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "::"])
def test_an_open_address_needs_a_key_or_a_confirmation(host):
    with pytest.raises(SettingError, match=r"`--host .* lets others reach the server.*SECURITY\.md"):
        server_command("model", host=host)
    server_command("model", host=host, trusted_network=True)
    assert "drpo_lightning.rollout.server.guard.RequireKey" in server_command("model", host=host, api_key_env="K").words


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_an_address_of_this_machine_needs_neither(host):
    server_command("model", host=host)


def test_a_gpu_server_needs_nothing_of_this_package():
    command = server_command("model", transfer="nccl")
    assert "drpo_lightning" not in str(command)
    assert '{"backend": "nccl"}' in command.words
    assert command.environment["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize("on_cpu", [True, False])
def test_only_a_cpu_server_compiles_nothing_unless_it_is_told_to(on_cpu):
    command = server_command("model", on_cpu=on_cpu, options=["--no-enforce-eager"])
    assert ("--enforce-eager" in command.words) == ("TORCHDYNAMO_DISABLE" in command.environment) == on_cpu
    assert ("--no-enable-chunked-prefill" in command.words) == on_cpu
    assert command.words[-1] == "--no-enforce-eager"  # the last one counts


def test_the_model_comes_first(capsys):
    with pytest.raises(SystemExit):
        main(["--dtype", "bfloat16", "model", "--print"])
    assert "MODEL must come first, got '--dtype'" in capsys.readouterr().err


def test_the_printed_command_has_the_name_of_the_key_only():
    result = subprocess.run(
        [
            *(sys.executable, "-c", "import sys; from drpo_lightning.serve import main; main(sys.argv[1:])"),
            *("some model", "--print", "--api-key-env", "ROLLOUT_KEY", "--max-model-len", "64"),
        ],
        env={"PATH": "", "ROLLOUT_KEY": KEY, "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert KEY not in result.stdout
    assert 'VLLM_API_KEY="$ROLLOUT_KEY"' in result.stdout
    assert result.stdout.strip().endswith("--max-model-len 64")
    assert "'some model'" in result.stdout
