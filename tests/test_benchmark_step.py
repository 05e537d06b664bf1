"""The comparison of a step with TRL's runs, and both sides do the same work."""

import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from drpo_lightning.rollout import VLLMEngine
from drpo_lightning.rollout.served import Heartbeat

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "step.py"
PHASES = ("generate", "sync", "logprobs", "update", "step")
SMALL = ["--num-prompts", "4", "--group-size", "4", "--max-tokens", "6", "--num-micro-batches", "2"]
SMALL += ["--turns", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def benchmark():
    """The modules of `benchmarks/`, which import each other as scripts do."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("step")
    sys.path.remove(str(SCRIPT.parent))
    for name in ("step", "step_clock", "step_presets", "step_tables"):
        del sys.modules[name]


@pytest.fixture
def run(benchmark, tmp_path, capsys):
    """Measures, and gives what was written and printed."""

    def call(*arguments):
        out = tmp_path / "step.json"
        benchmark.main([*SMALL, "--out", str(out), *arguments])
        return json.loads(out.read_text()), capsys.readouterr().out

    return call


@pytest.fixture
def make_side(benchmark, tmp_path):
    """A side that needs a second for nothing: it counts its steps, and fails after as many as it is told."""

    def make(name, num_steps):
        script = tmp_path / f"{name}.py"
        script.write_text(
            "import json, os, sys\n"
            f"open({str(tmp_path / 'order')!r}, 'a').write('({name}')\n"
            "print(json.dumps({'pid': str(os.getpid())}), flush=True)\n"
            f"for number in range({num_steps}):\n"
            "    sys.stdin.readline()\n"
            f"    open({str(tmp_path / 'order')!r}, 'a').write(str(number))\n"
            "    print(json.dumps({'seconds': {'step': 1, 'rollout': 0}, 'counts': {'number': number}}), flush=True)\n"
            "sys.stderr.write('no more steps')\n"
        )
        log = tmp_path / "log"
        return benchmark.Side(name, sys.executable, str(script), workload=tmp_path, log=log, environment={}, warmup=1)

    return make


def check_steps(steps):
    """Every step samples and trains 16 completions of 6 tokens, and its phases make the whole of it."""
    assert len(steps) == 2
    for step in steps:
        counts, seconds = step["counts"], step["seconds"]
        assert counts["sampled_tokens"] == counts["trained_tokens"] == 16 * 6
        assert counts["updates"] == 1
        assert min(seconds[name] for name in ("generate", "update", "step")) > 0
        assert seconds["step"] == pytest.approx(sum(seconds[name] for name in ("generate", "sync", "update")))


def test_our_side_runs_alone(run):
    report, printed = run()
    check_steps(report["steps"]["drpo-lightning"])
    assert "| generate |" in printed
    assert "TRL" not in printed


def test_steps_alternate_after_the_warm_up(benchmark, make_side, tmp_path):
    sides = [make_side("a", 3), make_side("b", 3)]
    steps = benchmark.measure(sides, turns=2, steps_per_turn=1, keep_alive=True)
    assert {name: [step["counts"]["number"] for step in of_side] for name, of_side in steps.items()} == {
        "a": [1, 2],
        "b": [1, 2],
    }
    assert (tmp_path / "order").read_text() == "(a0(b01122"
    assert sides[0].versions["pid"] != sides[1].versions["pid"]


def test_runs_alternate_each_with_a_warm_up(benchmark, make_side, tmp_path):
    sides = [make_side("a", 3), make_side("b", 3)]
    steps = benchmark.measure(sides, turns=2, steps_per_turn=2, keep_alive=False)
    assert [step["counts"]["number"] for step in steps["a"] + steps["b"]] == [1, 2, 1, 2] * 2
    assert (tmp_path / "order").read_text() == "(a012(b012" * 2


@pytest.mark.parametrize("keep_alive", [True, False])
def test_a_side_that_ends_too_early_shows_what_it_said(benchmark, make_side, keep_alive):
    sides = [make_side("a", 9), make_side("b", 1)]
    with pytest.raises(RuntimeError, match=r"(?s)b has ended:.*no more steps"):
        benchmark.measure(sides, turns=1, steps_per_turn=1, keep_alive=keep_alive)


def test_a_side_that_has_ended_before_it_is_asked_shows_what_it_said(make_side):
    with make_side("a", 1) as side:
        side._process.wait(timeout=60)
        with pytest.raises(RuntimeError, match=r"(?s)a has ended:.*no more steps"):
            side.step()


@pytest.mark.docs
def test_both_sides_do_the_same_work(run):
    pytest.importorskip("trl", reason="pip install 'drpo-lightning[trl]'")
    report, printed = run("--trl-python", sys.executable, "--num-updates", "2", "--num-micro-batches", "1")
    ours, theirs = ([step["counts"] for step in report["steps"][name]] for name in ("drpo-lightning", "TRL"))
    assert ours == theirs
    assert all(step["updates"] == 2 for step in ours)
    assert report["steps"]["TRL"][0]["seconds"]["logprobs"] > 0  # its policy has no logprobs of the engine
    assert "TRL / drpo-lightning" in printed


def test_different_work_is_refused(benchmark):
    counts = {"sampled_tokens": 8, "updates": 1}
    steps = {name: [{"counts": counts | {"updates": n}, "seconds": {}}] for name, n in (("ours", 1), ("TRL", 2))}
    with pytest.raises(ValueError, match="the sides did different work"):
        benchmark.check_equal_work(steps)
    assert benchmark.check_equal_work({"ours": steps["ours"] * 2}) == counts


def test_phases_make_a_step(benchmark):
    step = benchmark.with_phases(
        {"seconds": {"step": 10.0, "rollout": 7.0, "sync": 1.0, "logprobs": 2.0}, "counts": {}}
    )
    assert step["seconds"] == {"generate": 4.0, "sync": 1.0, "logprobs": 2.0, "update": 3.0, "step": 10.0}


def test_the_table_has_medians_ratios_and_shares_of_the_limit(benchmark):
    def steps(*updates):
        return [{"seconds": dict.fromkeys(PHASES, 0.0) | {"update": update}} for update in updates]

    limits = sys.modules["step_presets"].Limits({}, {"update": 1.0})
    rows = benchmark.table({"ours": steps(2.0, 1.0, 9.0), "TRL": steps(5.0, 6.0, 4.0)}, limits).splitlines()
    assert rows[0] == "| seconds | ours | TRL | TRL / ours | limit | limit / ours | limit / TRL |"
    assert rows[2:] == ["| update | 2 (1 to 9) | 5 (4 to 6) | 2.50 | 1 | 50% | 20% |"]


def test_the_operations_of_a_step(benchmark):
    presets = sys.modules["step_presets"]
    size = presets.ModelSize(1000, 100, 10, 1100)
    workload = benchmark.Workload("", ["a", "b"], 4, 3, 1, 1, 1.0, 1e-6, "cpu", "32-true", "transformers", 1, 1)
    flops = presets.step_flops(size, workload, prompt_tokens=8 * 2)
    attention = 8 * (2 + 3) ** 2 * 10
    assert flops["update"] == 6 * (1000 * 8 * 5 + 100 * 8 * 3) + 6 * attention
    assert flops["generate"] == 2 * (1000 * (2 * 2 + 8 * 3) + 100 * 8 * 3) + 2 * attention
    assert replace(workload, num_updates=2, num_micro_batches=2).micro_batch_size == 2


def contended(**medians):
    """Three steps whose phases have these medians."""
    return [{"seconds": {name: factor * value for name, value in medians.items()}} for factor in (0.5, 1.0, 4.0)]


def test_contention_is_each_phase_overlapped_beside_alone(benchmark):
    alone = contended(engine=3.0, waiting=3.5, sync=0.5, update=4.0, step=8.25)
    overlapped = contended(engine=4.5, waiting=0.0, sync=0.5, update=5.0, step=5.75)
    rows = [row.split(" | ") for row in benchmark.contention_table(alone, overlapped).splitlines()]
    assert [row[0].removeprefix("| ") for row in rows[2:]] == [
        "the engine samples",
        "the trainer waits for samples",
        "sync",
        "update",
        "step",
    ]
    assert [row[3].removesuffix(" |") for row in rows[2:]] == ["1.50", "0.00", "1.00", "1.25", "0.70"]
    assert rows[2][1:3] == ["3 (1.5 to 12)", "4.5 (2.25 to 18)"]


@pytest.mark.parametrize(("engine", "seconds"), [(3.0, 4.75), (6.0, 6.5)])
def test_without_contention_the_longer_of_both_is_the_step(benchmark, engine, seconds):
    alone = contended(engine=engine, waiting=engine + 0.5, sync=0.5, update=4.0, step=engine + 5.25)
    assert benchmark.uncontended_seconds(alone) == pytest.approx(seconds)


def test_sampling_ahead_is_compared_with_one_after_the_other(benchmark, tmp_path):
    settings = benchmark.parse_arguments([*SMALL, "--preset", "quickstart-overlapped", "--max-staleness", "2"])
    workload = benchmark.make_workload(settings, tmp_path)
    ours = benchmark.workloads(settings, workload)
    assert [(name, work.max_staleness) for name, work in ours.items()] == [
        ("one after the other", 0),
        ("drpo-lightning", 2),
    ]
    assert ours["one after the other"].engine_process == "own"
    assert workload.num_steps == 1 + settings.steps_per_turn + 2  # those of the end have nothing ahead of them
    assert settings.alternate == "runs"


@pytest.mark.parametrize(
    ("asked", "seeded"), [(None, [None]), ("on", [True]), ("off", [False]), ("both", [False, True])]
)
def test_seeded_requests_are_as_asked_for_or_compared(benchmark, tmp_path, asked, seeded):
    settings = benchmark.parse_arguments([*SMALL, *([] if asked is None else ["--seeded-requests", asked])])
    ours = benchmark.workloads(settings, benchmark.make_workload(settings, tmp_path))
    assert [work.seeded_requests for work in ours.values()] == seeded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-staleness", "1"], "must be 0 with `--engine transformers`, got 1"),
        (["--max-staleness", "1", "--engine", "vllm", "--alternate", "steps"], "must be `runs` with `--max-staleness`"),
        (["--seeded-requests", "both", "--trl-python", "python"], "must stand without"),
    ],
)
def test_what_cannot_be_compared_is_refused(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.reliability
def test_an_overlapped_step_does_the_work_of_one_after_the_other(run):
    arguments = ["--preset", "quickstart-overlapped", "--turns", "1", "--steps-per-turn", "2"]
    report, printed = run(*arguments)
    check_steps(report["steps"]["one after the other"])
    check_steps(report["steps"]["drpo-lightning"])
    for step in report["steps"]["one after the other"]:
        assert 0 < step["seconds"]["engine"] < step["seconds"]["waiting"]
    assert sum(step["seconds"]["engine"] for step in report["steps"]["drpo-lightning"]) > 0
    assert "| the engine samples |" in printed
    assert "each turn a process of: one after the other, drpo-lightning" in printed


@pytest.mark.reliability
def test_seeded_requests_do_the_work_of_others(run):
    report, printed = run("--engine", "vllm", "--seeded-requests", "both")
    check_steps(report["steps"]["seeded"])
    check_steps(report["steps"]["not seeded"])
    assert "seeded / not seeded" in printed


@pytest.mark.parametrize("name", ["quickstart", "quickstart-overlapped", "smollm2", "h100", "h100-overlapped"])
def test_a_preset_can_be_split_evenly(benchmark, name):
    settings = benchmark.parse_arguments(["--preset", name])
    assert settings.num_prompts * settings.group_size % (settings.num_updates * settings.num_micro_batches) == 0
    prompts = sys.modules["step_presets"].make_prompts(settings.template, settings.num_prompts)
    assert len(set(prompts)) == settings.num_prompts


def test_a_random_llama_has_a_tokenizer_of_its_size(benchmark, tmp_path):
    shape = {"vocab_size": 700, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    sys.modules["step_presets"].make_random_llama(tmp_path, shape)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert len(tokenizer) == 700
    ids = tokenizer("Question: 1 + 2?").input_ids
    assert len(ids) == 16
    assert tokenizer.decode(ids) == "Question: 1 + 2?"
    assert isinstance(tokenizer.decode(range(700)), str)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_the_random_llama_has_the_shape_that_it_is_named_for(benchmark):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sys.modules["step_presets"].SMOLLM2_1_7B, tie_word_embeddings=True))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1.71e9, rel=0.002)


def test_a_setting_takes_the_place_of_the_presets(benchmark):
    settings = benchmark.parse_arguments(["--preset", "h100", "--alternate", "steps", "--max-tokens", "5"])
    assert (settings.alternate, settings.max_tokens, settings.engine) == ("steps", 5, "vllm")
    assert (settings.turns, settings.steps_per_turn, settings.gpu_memory_utilization) == (1, 5, 0.5)


def test_the_engines_seconds_are_those_of_its_own_steps():
    heartbeat = Heartbeat()
    with heartbeat.beating():
        time.sleep(0.02)
    after_one = heartbeat.busy_seconds
    assert after_one >= 0.02
    time.sleep(0.02)
    assert heartbeat.busy_seconds == after_one
    with heartbeat.beating():
        time.sleep(0.01)
    assert heartbeat.busy_seconds >= after_one + 0.01
    assert heartbeat.count == 2
    assert VLLMEngine().sampling_seconds is None  # nothing has started
