"""Builds a wheel of metadata alone; the hook that PEP 517 asks for.

importlib.metadata.packages_distributions() takes the import names of a distribution from
top_level.txt, so that this one claims the package `flash_attn` without owning any file of it.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

NAME = "flash-attn"
VERSION = "2.8.3"  # flash_attn.__version__
_STEM = f"{NAME.replace('-', '_')}-{VERSION}"
_INFO = f"{_STEM}.dist-info"
_FILES = {
    "METADATA": (
        f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
        "Summary: The name under which clients look for FlashAttention-Plus; holds no module\n"
        "License: BSD-3-Clause\nRequires-Python: >=3.10\n"
    ),
    "WHEEL": (
        "Wheel-Version: 1.0\nGenerator: metadata_wheel\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ),
    "top_level.txt": "flash_attn\n",
}


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Writes the wheel into wheel_directory and returns its name."""
    name = f"{_STEM}-py3-none-any.whl"
    record = ""
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        for file, text in _FILES.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            record += f"{_INFO}/{file},sha256={digest.decode().rstrip('=')},{len(text)}\n"
            wheel.writestr(zipfile.ZipInfo(f"{_INFO}/{file}"), text)
        wheel.writestr(zipfile.ZipInfo(f"{_INFO}/RECORD"), f"{record}{_INFO}/RECORD,,\n")
    return name
