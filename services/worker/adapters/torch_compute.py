"""Devices. Owns: where a worker computes, on how many threads, and the memory of its KV cache."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from services.worker.adapters.process_memory import available_bytes, machine_bytes
from services.worker.adapters.stored_forms import StoredForms
from services.worker.adapters.torch_loader import TorchLoader, TorchSettings
from services.worker.config import WorkerConfig

# The rest is for weights of the next revision, activations and other processes.
KV_CACHE_SHARE = 4


def choose_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        RuntimeError: `cuda` was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise RuntimeError("device is cuda, and torch finds none; install a driver, or choose auto or cpu.")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def describe_device(device: torch.device) -> tuple[str, str, int]:
    """Kind, name and memory in bytes."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return device.type, str(facts.name), int(facts.total_memory)
    return device.type, _processor(), machine_bytes()


def make_loader(config: WorkerConfig, device: torch.device, threads: int) -> TorchLoader:
    """The loader for this worker's settings; `threads` are those of a forward pass on a CPU."""
    forms = None
    if config.cache_forms_bytes:
        forms = StoredForms(config.cache_dir / "forms", config.cache_forms_bytes)
    kv_bytes = kv_budget(config.kv_cache_bytes, device)
    return TorchLoader(TorchSettings(device, threads, config.slots, kv_bytes, forms=forms))


def kv_budget(given_bytes: int, device: torch.device) -> Callable[[], int]:
    """Tells how many bytes of keys and values a revision that was just loaded may keep; given 0: measured."""

    # Once: a later revision is loaded while the one before it still holds weights and cache, and would have
    # less for as long as it serves. So prompts that fit before a rollout fit after it.
    @functools.cache
    def first_share() -> int:
        return available_bytes() // KV_CACHE_SHARE

    def kv_bytes() -> int:
        if given_bytes:
            return given_bytes
        if device.type == "cuda":
            # Rows take a card's memory when they are made, so that both caches must fit into what is free:
            # with what torch keeps of tensors that are gone, of the module that became a form above all.
            torch.cuda.empty_cache()
            return int(torch.cuda.mem_get_info(device)[0]) // KV_CACHE_SHARE
        return first_share()

    return kv_bytes


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
