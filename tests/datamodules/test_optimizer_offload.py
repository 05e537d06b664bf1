"""The optimizer's state leaves its device while the engine samples, and comes back as it was."""

import pytest
import torch

from drpo_lightning.callbacks import FunctionReward
from drpo_lightning.datamodules.optimizer_offload import OptimizerOffload
from drpo_lightning.rewards.base import RewardError

CPU = torch.device("cpu")


def trained_adam(dtype=torch.float32):
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,), (1,))]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def tensors_of(optimizer):
    return [value for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_states_have_no_memory_meanwhile_and_come_back_in_the_same_tensors(dtype):
    optimizer, offload = trained_adam(dtype), OptimizerOffload()
    for _ in range(2):
        tensors, before = tensors_of(optimizer), [tensor.clone() for tensor in tensors_of(optimizer)]
        with offload.offloaded([optimizer], CPU):
            sizes = {tensor.numel(): tensor.untyped_storage().nbytes() for tensor in tensors}
            assert sizes[12] == sizes[5] == 0 < sizes[1]
        for tensor, now, value in zip(tensors, tensors_of(optimizer), before, strict=True):
            assert tensor is now
            assert torch.equal(tensor, value)
        optimizer.step()


def test_an_exception_brings_them_back():
    optimizer, offload = trained_adam(), OptimizerOffload()
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    with pytest.raises(OSError, match="disk full"), offload.offloaded([optimizer], CPU):
        raise OSError("disk full")
    assert all(torch.equal(*pair) for pair in zip(tensors_of(optimizer), before, strict=True))


def test_another_device_keeps_them():
    optimizer = trained_adam()
    with OptimizerOffload().offloaded([optimizer], torch.device("meta")):
        assert all(tensor.untyped_storage().nbytes() for tensor in tensors_of(optimizer))


def test_an_optimizer_without_states_has_nothing_to_move():
    with OptimizerOffload().offloaded([torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])], CPU):
        pass


# ---------------------------------------------------------------- in a run


def weights_of(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.module.parameters()])


def test_a_run_is_the_same_with_it(make_run):
    sizes = []

    def watching(completion_ids, **_):
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(runs[0].trainer.optimizers[0])))
        return [sum(i * token for i, token in enumerate(ids, start=1)) % 5 / 4 for ids in completion_ids]

    runs = [
        make_run(
            trainer={"max_epochs": 2},
            data={"offload_optimizer": is_offloaded},
            rewards=[FunctionReward(watching, name="watching")],
        )
        for is_offloaded in (True, False)
    ]
    for run in runs:
        run.fit()
    single_numbers = sum(tensor.nbytes for tensor in tensors_of(runs[0].trainer.optimizers[0]) if tensor.numel() == 1)
    assert sizes[:2] == [0, single_numbers]  # before the first update, and between two
    assert torch.equal(*map(weights_of, runs))


def test_a_rollout_that_fails_leaves_the_state_whole(make_run):
    def fails_later(completion_ids, **_):
        if run.data.iteration:
            raise ValueError("no more")
        return [float(i % 2) for i in range(len(completion_ids))]

    run = make_run(
        trainer={"max_epochs": 2},
        data={"offload_optimizer": True},
        rewards=[FunctionReward(fails_later, name="fails")],
    )
    with pytest.raises(RewardError, match="no more"):
        run.fit()
    assert all(tensor.untyped_storage().nbytes() for tensor in tensors_of(run.trainer.optimizers[0]))


def test_while_the_engine_samples_there_are_no_gradients(make_run):
    found = []

    def watching(completion_ids, **_):
        found.append(any(parameter.grad is not None for parameter in run.module.parameters()))
        return [float(ids[0] % 2) for ids in completion_ids]

    run = make_run(rewards=[FunctionReward(watching, name="watching")], trainer={"max_epochs": 3})
    run.fit()
    assert found == [False] * 3
