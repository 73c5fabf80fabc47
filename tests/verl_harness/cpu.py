"""Loaded by verl in every process (``VERL_USE_EXTERNAL_MODULES``): a CPU as a platform, and a rollout engine on it."""

from __future__ import annotations

import functools
import types
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry


def _device_module() -> types.ModuleType:
    """``torch.cpu`` with the functions of ``torch.cuda`` that verl calls."""
    module = types.ModuleType("torch_cpu_as_accelerator")
    nothing = dict.fromkeys(
        (
            "empty_cache",
            "synchronize",
            "set_device",
            "manual_seed",
            "manual_seed_all",
            "reset_peak_memory_stats",
            "ipc_collect",
        )
    )
    for name in nothing:
        setattr(module, name, lambda *_, **__: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *_, **__: 0)
    module.mem_get_info = lambda *_: (2**34, 2**34)
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: "cpu"
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    module.get_device_name = lambda *_: "cpu"
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    """A CPU that counts as a (fake) GPU for Ray, which hands out the places of the workers."""

    _module = _device_module()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> Any:
        return self._module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """There is one device."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing runs asynchronously."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """There are none."""

    def empty_cache(self) -> None:
        """There is none."""

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def is_ipc_supported(self) -> bool:
        return False

    def get_collective_module(self) -> None:
        return None

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        """Do nothing; there is no profiler."""

    def profiler_stop(self) -> None:
        """Do nothing; there is no profiler."""

    def cudart(self) -> None:
        return None


def _one_backend_for_one_device() -> None:
    """verl asks for "cpu:gloo" and for "gloo" on the accelerator: here both are the same device."""
    original = torch.distributed.init_process_group

    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return original("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group


def _register_engine() -> None:
    from verl.workers.rollout import base, replica

    def load() -> type:
        from verl_harness.server import HFReplica

        return HFReplica

    replica.RolloutReplicaRegistry.register("hf", load)
    base._ROLLOUT_REGISTRY[("hf", "async")] = "verl_harness.server.ServerAdapter"


_one_backend_for_one_device()
_register_engine()
torch.set_num_threads(1)
