"""Weights of published checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["state_dict_from_pretrained"]

# In the order in which they are looked for; an index lists the files of a checkpoint in parts.
_WEIGHTS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
)


def state_dict_from_pretrained(
    model_name: str, device: Any = None, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, whole or in parts, pickled (weights only) or as safetensors.

    Arguments:
        model_name: a folder, or a name on the Hugging Face hub; the latter needs transformers.
        device: where to put the weights.
        dtype: to convert them to; None keeps theirs.

    Returns:
        Tensors by name.

    Raises:
        OSError: no weights are found.
    """
    find = _in_folder(model_name) if Path(model_name).is_dir() else _on_hub(model_name)
    for name in _WEIGHTS:
        path = find(name)
        if path is not None:
            break
    else:
        raise OSError(f"model_name: no weights are found for {model_name!r}")
    paths = [path]
    if name.endswith(".json"):
        parts = json.loads(Path(path).read_text())["weight_map"].values()
        paths = [find(part) for part in sorted({*parts})]
    # Converted before they are moved: a 16-bit copy is half of what a device must hold.
    direct = device if dtype in (None, torch.float32) else "cpu"
    weights: dict[str, torch.Tensor] = {}
    for part in paths:
        for key, tensor in _load(part, direct).items():
            weights[key] = tensor.to(dtype=dtype).to(device=device)
    return weights


def _in_folder(folder: str) -> Callable[[str], str | None]:
    def find(name: str) -> str | None:
        path = Path(folder) / name
        return str(path) if path.is_file() else None

    return find


def _on_hub(model_name: str) -> Callable[[str], str | None]:
    from transformers.utils.hub import cached_file

    def find(name: str) -> str | None:
        return cached_file(model_name, name, _raise_exceptions_for_missing_entries=False)

    return find


def _load(path: str, device: Any) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path, device="cpu" if device is None else str(device))
    return torch.load(path, map_location=device, weights_only=True)
