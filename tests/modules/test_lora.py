"""LoRA: the adapters alone are trained, saved and synced, under every strategy, and the engine gets their sum."""

import json
import os

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM

from drpo_lightning.callbacks import ExportPolicy, SyncProbe
from drpo_lightning.errors import SettingError
from drpo_lightning.export import export_checkpoint
from drpo_lightning.modules import PolicyModule
from drpo_lightning.modules.language_model import empty_language_model
from drpo_lightning.modules.lora import LoRA, attach_adapter, check_adapter_settings
from drpo_lightning.rollout import EngineError, RolloutHooks, TransformersEngine, VLLMEngine
from drpo_lightning.rollout.adapters import is_adapter_weight

SMALL = LoRA(r=8, lora_alpha=16.0)
NUM_ADAPTER_WEIGHTS = 28  # A and B of 7 linear layers in each of 2 layers


@pytest.fixture
def language_model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture
def make_adapted_run(make_run):
    """A small run that changes the adapters by much, and stops if the engine does not follow."""

    def make(*callbacks, peft=SMALL, module=None, **settings):
        module = {"peft": peft, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.03)} | (module or {})
        return make_run(SyncProbe(), *callbacks, module=module, **settings)

    return make


def weights_of(run):
    """Everything: the frozen weights and the adapters."""
    state = run.module.network.language_model.state_dict()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in state.items()}


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"`model\.peft\.r` must be at least 1, got 0"),
        ({"lora_alpha": 0.0}, r"`model\.peft\.lora_alpha` must be positive and finite, got 0\.0"),
        ({"lora_alpha": float("nan")}, r"`model\.peft\.lora_alpha` must be positive and finite, got nan"),
        ({"target_modules": []}, r"`model\.peft\.target_modules` must name a layer, got \[\]"),
        ({"target_modules": ""}, r"`model\.peft\.target_modules` must name a layer, got ''"),
        ({"sync": "both"}, r"`model\.peft\.sync` must be `merged` or `adapter`, got 'both'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


@pytest.mark.parametrize("targets", [["nothing"], ["q_proj", "nothing"], "nothing", ["lm_head"], ["proj"]])
def test_a_target_that_is_no_linear_layer_but_the_head_is_an_error_that_names_the_layers(language_model, targets):
    with pytest.raises(SettingError, match=r"`model\.peft\.target_modules` .* there are down_proj, gate_proj, k_proj"):
        attach_adapter(language_model, LoRA(target_modules=targets))


def test_without_peft_the_error_names_what_to_install(monkeypatch, model_folder):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'drpo-lightning\[lora\]'"):
        PolicyModule(model_folder, peft=SMALL)


# ---------------------------------------------------------------- adapters in the model


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["model.layers.1.mlp.up_proj"], 1),
        (["self_attn.q_proj"], 2),
        (r".*layers\.0\..*_proj", 7),
    ],
)
def test_the_layers_that_are_named_get_an_adapter_and_nothing_else_is_trained(language_model, targets, expected):
    attach_adapter(language_model, LoRA(r=4, target_modules=targets))
    trained = {name: p for name, p in language_model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * expected
    assert all(is_adapter_weight(name) and p.dtype == torch.float32 and 4 in p.shape for name, p in trained.items())
    assert language_model.get_output_embeddings().weight is language_model.get_input_embeddings().weight


def test_at_the_start_the_adapted_model_is_the_model(language_model):
    input_ids = torch.arange(20)[None]
    before = language_model(input_ids).logits
    kind = type(language_model)
    attach_adapter(language_model, SMALL)
    assert type(language_model) is kind
    assert torch.equal(language_model(input_ids).logits, before)


def test_what_a_starts_with_depends_on_the_seed_alone(model_folder):
    def factors(dtype, settings):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
        torch.manual_seed(torch.randint(1000, ()).item())  # as a run elsewhere in its random numbers
        before = torch.get_rng_state()
        attach_adapter(model, settings)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}

    first, again, other = (
        factors(torch.float32, SMALL),
        factors(torch.bfloat16, SMALL),  # as rank 0 of a sharded policy loads it
        factors(torch.float32, LoRA(r=8, seed=1)),
    )
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor)
        assert not torch.equal(other[name], tensor)
        bound = tensor.shape[1] ** -0.5
        assert 0.9 * bound < tensor.abs().max() <= bound
        assert abs(tensor.std().item() / (bound / 3**0.5) - 1) < 0.1  # uniform
    assert len({tuple(tensor[0, :4].tolist()) for tensor in first.values()}) == len(first)


def test_a_model_without_memory_gets_adapters_without_memory(model_folder, language_model):
    empty = empty_language_model(model_folder)
    attach_adapter(empty, SMALL)
    attach_adapter(language_model, SMALL)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    described = [
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        for model in (empty, language_model)
    ]
    assert described[0] == described[1]


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_the_adapters_learn_what_is_rewarded_and_the_model_stays_bitwise(make_adapted_run, make_recorder, sync):
    from drpo_lightning.callbacks import FunctionReward

    def even(completion_ids, **_):
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    recorder = make_recorder()
    run = make_adapted_run(
        recorder,
        peft=LoRA(r=8, lora_alpha=16.0, sync=sync),
        rewards=[FunctionReward(even, name="even")],
        data={"num_prompts": 8, "group_size": 8},
        module={"optimizer": lambda p: torch.optim.AdamW(p, lr=0.003)},
        trainer={"max_epochs": 8},
    )
    run.fit()
    rewards = [float(rollout.rewards.mean()) for rollout in recorder.rollouts]
    assert rewards[-1] > rewards[0] + 0.25
    own = AutoModelForCausalLM.from_pretrained(run.module.model_name, dtype=torch.float32).state_dict()
    for name, tensor in weights_of(run).items():
        if not is_adapter_weight(name):
            assert torch.equal(tensor, own[name.replace(".base_layer.", ".")])
    (group,) = run.trainer.optimizers[0].param_groups
    assert len(group["params"]) == NUM_ADAPTER_WEIGHTS


def test_how_the_engine_gets_the_adapters_makes_no_difference(make_adapted_run):
    weights = []
    for sync in ("merged", "adapter"):
        run = make_adapted_run(peft=LoRA(r=8, lora_alpha=16.0, sync=sync), trainer={"max_epochs": 2})
        run.fit()
        weights.append(weights_of(run))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])


def test_gradient_checkpointing_changes_nothing_but_memory(make_adapted_run):
    weights = []
    for checkpointing in (False, True):
        run = make_adapted_run(module={"gradient_checkpointing": checkpointing})
        run.fit()
        weights.append(weights_of(run))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)


def test_in_mixed_precision_the_adapters_stay_in_float32(make_adapted_run, make_memory_of_probe):
    memory = make_memory_of_probe()
    run = make_adapted_run(memory, trainer={"precision": "bf16-mixed", "max_epochs": 2})
    run.fit()
    assert {parameter.dtype for parameter in run.module.parameters()} == {torch.float32}
    assert all(tensor.any() for name, tensor in weights_of(run).items() if "lora_B" in name)
    assert 1e-4 < max(memory.differences) < 0.25


@pytest.fixture
def make_memory_of_probe():
    class Memory(Callback, RolloutHooks):
        """Keeps what the probe before it has measured."""

        def __init__(self):
            self.differences = []

        def on_engine_refresh(self, trainer, pl_module, engine):
            self.differences += [c._difference for c in trainer.callbacks if isinstance(c, SyncProbe)]

    return Memory


# ---------------------------------------------------------------- sync


class Stale(TransformersEngine):
    """Takes no adapters, as an engine would that keeps the first ones."""

    def load_adapter(self, config, weights):
        pass


class WithoutAdapters(TransformersEngine):
    supports_adapters = False


def test_the_probe_finds_adapters_that_did_not_arrive(make_adapted_run, make_recorder):
    recorder = make_recorder()
    peft = LoRA(r=8, lora_alpha=16.0, sync="adapter")
    run = make_adapted_run(recorder, peft=peft, data={"engine": Stale()}, trainer={"max_epochs": 2})
    with pytest.raises(EngineError, match="the engine does not generate with the trainer's weights"):
        run.fit()
    assert len(recorder.rollouts) == 1, "at the start the adapters are 0, and nothing is missing"


def test_an_engine_without_adapters_is_refused_with_a_way_out(make_adapted_run):
    run = make_adapted_run(peft=LoRA(sync="adapter"), data={"engine": WithoutAdapters()})
    with pytest.raises(SettingError, match=r"`model\.peft\.sync: adapter` .* WithoutAdapters; set it to `merged`"):
        run.fit()


def test_an_adapter_that_is_nan_is_not_sent(make_adapted_run, make_recorder):
    def poison(trainer, pl_module, batch_idx):
        if batch_idx + 1 < trainer.num_training_batches:
            return
        with torch.no_grad():
            pl_module.network.language_model.model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = torch.nan

    with pytest.raises(ValueError, match="a weight of the policy is NaN or infinite"):
        make_adapted_run(make_recorder(poison), trainer={"max_epochs": 2}).fit()


def vllm():
    return VLLMEngine(process="own", dtype="float32", enforce_eager=True)


@pytest.mark.slow
def test_the_probe_passes_on_vllm_after_every_sync_of_merged_weights(make_adapted_run, make_memory_of_probe):
    memory = make_memory_of_probe()
    make_adapted_run(memory, data={"engine": vllm()}, trainer={"max_epochs": 3}).fit()
    assert len(memory.differences) == 3
    assert max(memory.differences) < 1e-4


def test_the_probe_passes_on_vllm_while_the_adapters_arrive_and_not_after(
    make_adapted_run, make_memory_of_probe, monkeypatch
):
    load = VLLMEngine.load_adapter
    loads = []

    def first_two(self, config, weights):
        loads.append(config)
        if len(loads) < 3:
            load(self, config, weights)

    monkeypatch.setattr(VLLMEngine, "load_adapter", first_two)
    memory = make_memory_of_probe()
    peft = LoRA(r=8, lora_alpha=16.0, sync="adapter")
    run = make_adapted_run(memory, peft=peft, data={"engine": vllm()}, trainer={"max_epochs": 3})
    with pytest.raises(EngineError, match=r"differ by .* nats on the probe"):
        run.fit()
    assert len(memory.differences) == 2, "the second adapters are not the zeros of the start"
    assert max(memory.differences) < 1e-4


# ---------------------------------------------------------------- checkpoints


def fsdp2(**settings):
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, **settings)


STRATEGIES = {
    "single": lambda: "auto",
    "fsdp2_sharded": fsdp2,
    "fsdp2_full": lambda: fsdp2(save_distributed_checkpoint=False),
}


def size_of(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(os.path.getsize(file) for file in files)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_equals_an_uninterrupted_one_from_the_adapters_alone(make_adapted_run, tmp_path, strategy):
    def run(max_epochs):
        return make_adapted_run(trainer={"max_epochs": max_epochs, "strategy": STRATEGIES[strategy]()})

    whole, first, resumed = run(2), run(1), run(2)
    whole.fit()
    first.fit()
    path = tmp_path / "last.ckpt"
    first.trainer.save_checkpoint(path)
    trained = sum(p.nbytes for p in first.module.parameters() if p.requires_grad)
    assert 3 * trained < size_of(path) < 1_000_000, "with AdamW's two moments; the model alone has 1.6 MB"
    resumed.fit(ckpt_path=path)
    expected = weights_of(whole)
    for name, tensor in weights_of(resumed).items():
        assert torch.equal(tensor, expected[name])
        assert is_adapter_weight(name) <= (not torch.equal(tensor, weights_of(first)[name]))


def test_every_strategy_trains_the_same_adapters(make_adapted_run):
    weights = []
    for strategy in ("single", "fsdp2_full"):
        run = make_adapted_run(trainer={"strategy": STRATEGIES[strategy]()})
        run.fit()
        weights.append(weights_of(run))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)


def test_a_checkpoint_holds_the_adapters_and_their_settings(make_adapted_run, tmp_path):
    run = make_adapted_run()
    run.fit()
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert len(content["state_dict"]) == NUM_ADAPTER_WEIGHTS
    assert all(map(is_adapter_weight, content["state_dict"]))
    assert content["policy"]["peft"] == {"r": 8, "lora_alpha": 16.0, "target_modules": "all-linear"}


@pytest.mark.parametrize("other", [LoRA(r=8, lora_alpha=8.0), LoRA(r=8, target_modules=["q_proj"]), None])
def test_a_checkpoint_of_other_adapters_is_refused(make_adapted_run, tmp_path, other):
    run = make_adapted_run()
    run.fit()
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(SettingError, match=r"`model\.peft` is .*, and the checkpoint has adapters with \{'r': 8"):
        make_adapted_run(peft=other, trainer={"max_epochs": 2}).fit(ckpt_path=tmp_path / "last.ckpt")


def test_a_checkpoint_of_all_weights_is_refused_by_adapters():
    check_adapter_settings(None, None)
    check_adapter_settings(LoRA(r=8, sync="adapter", seed=3), LoRA(r=8).trained_settings)
    with pytest.raises(SettingError, match="and the checkpoint has null, all weights"):
        check_adapter_settings(SMALL, None)


# ---------------------------------------------------------------- export


@pytest.fixture
def logits_of():
    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.arange(40)[None]).logits

    return logits


@pytest.fixture(params=["file", "shards"])
def checkpoint(request, make_adapted_run, tmp_path):
    """A run and a checkpoint of it."""
    run = make_adapted_run(trainer={"strategy": STRATEGIES["single" if request.param == "file" else "fsdp2_sharded"]()})
    run.fit()
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    return run, tmp_path / "last.ckpt"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_checkpoint_is_exported_as_the_merged_model_or_as_adapters_that_peft_loads(
    checkpoint, tmp_path, model_folder, logits_of
):
    from peft import PeftModel

    run, path = checkpoint
    export_checkpoint(path, tmp_path / "merged")
    export_checkpoint(path, tmp_path / "adapter", adapter=True)
    exported = load(tmp_path / "merged")
    for name, tensor in run.module.named_weights():
        assert torch.equal(exported.state_dict()[name], tensor)
    adapted = PeftModel.from_pretrained(load(model_folder), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(adapted), logits_of(exported), rtol=0, atol=1e-4)
    assert (logits_of(load(model_folder)) - logits_of(exported)).abs().max() > 0.1
    assert not list((tmp_path / "adapter").glob("model*"))
    # The layers by their whole names: a regular expression is matched against other modules by PEFT.
    layers = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert "model.layers.0.self_attn.q_proj" in layers
    assert len(layers) == len([name for name in run.module.network.tensor_shapes if "lora_A" in name])


def test_a_merged_export_is_rounded_after_the_sum(make_adapted_run, tmp_path):
    run = make_adapted_run()
    run.fit()
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "merged", dtype="bfloat16")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    for name, tensor in run.module.named_weights():
        assert torch.equal(exported[name], tensor.bfloat16())


def test_a_checkpoint_without_adapters_has_none_to_export(make_run, tmp_path):
    run = make_run()
    run.fit()
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="has no adapters; leave `adapter` out"):
        export_checkpoint(tmp_path / "last.ckpt", tmp_path / "adapter", adapter=True)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_ends_with_the_merged_model_or_the_adapters(make_adapted_run, tmp_path, model_folder, logits_of, adapter):
    from peft import PeftModel

    run = make_adapted_run(ExportPolicy(str(tmp_path / "policy"), adapter=adapter))
    run.fit()
    exported = (
        PeftModel.from_pretrained(load(model_folder), tmp_path / "policy") if adapter else load(tmp_path / "policy")
    )
    trained = run.module.network.language_model
    torch.testing.assert_close(logits_of(exported), logits_of(trained), rtol=0, atol=1e-4)


def test_adapters_are_not_exported_from_a_policy_without_them(make_run, tmp_path):
    with pytest.raises(SettingError, match=r"`ExportPolicy\.adapter` needs `model\.peft`"):
        make_run(ExportPolicy(str(tmp_path / "policy"), adapter=True)).fit()
