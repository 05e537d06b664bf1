"""In vLLM's workers: weights that come in the body of `/update_weights`. Imported by vLLM alone."""

from dataclasses import dataclass, field

from drpo_lightning.rollout.server.weights import HTTP_BACKEND, unpacked


class WeightReceiver:
    """Named by `--worker-extension-cls`, so that each worker imports this module; adds nothing to the worker."""


def _register() -> None:
    """Makes the backend known to vLLM."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
        """Nothing."""

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
        """See `unpacked`."""

        names: list[str]
        dtype_names: list[str]
        shapes: list[list[int]]
        data: str = field(repr=False)

    class HTTPWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc]
        """Loads what the requests bring."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """Has nothing to do."""

        def start_weight_update(self) -> None:
            """Prepares the model for weights as they are in a checkpoint."""
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            """Loads a bucket."""
            bucket = unpacked(update_info.names, update_info.dtype_names, update_info.shapes, update_info.data)
            self.model.load_weights((name, tensor.to(self.device)) for name, tensor in bucket)

        def finish_weight_update(self) -> None:
            """Does with the weights what vLLM does once they are all there, such as packing them."""
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            """Has nothing to do."""

    WeightTransferEngineFactory.register_engine(HTTP_BACKEND, HTTPWeightTransferEngine)


_register()
