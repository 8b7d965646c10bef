#!/usr/bin/env python3
"""Checks that includes run one way: bindings -> include -> core <- reference, cpu, cuda.

Each room of the source tree may include the rooms that RULES gives it, and only headers of the C++
standard library beyond those that it is given by name. Prints what breaks a rule; exits 1 then.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = {".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh"}
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:<([^>]+)>|"([^"]+)")')
# Highway compiles a file once per instruction set by including it again under this name.
SELF_INCLUDE = re.compile(r'^\s*#\s*define\s+HWY_TARGET_INCLUDE\s+"([^"]+)"')

_STANDARD_NAMES = """
algorithm any array atomic barrier bit bitset cassert cctype cerrno cfenv cfloat charconv chrono
cinttypes climits clocale cmath compare complex concepts condition_variable coroutine csetjmp
csignal cstdarg cstddef cstdint cstdio cstdlib cstring ctime deque exception execution expected
filesystem format forward_list fstream functional future initializer_list iomanip ios iosfwd
iostream istream iterator latch limits list locale map memory memory_resource mutex new numbers
numeric optional ostream queue random ranges ratio regex scoped_allocator semaphore set
shared_mutex source_location span sstream stack stdexcept stdfloat stop_token streambuf string
string_view syncstream system_error thread tuple type_traits typeindex typeinfo unordered_map
unordered_set utility valarray variant vector version assert.h ctype.h errno.h float.h
inttypes.h limits.h math.h stdarg.h stdbool.h stddef.h stdint.h stdio.h stdlib.h string.h time.h
"""
STANDARD = frozenset(_STANDARD_NAMES.split())
# What a backend may ask of the operating system and of the processor.
OPERATING_SYSTEM = (
    "arm_neon.h",
    "asm/",
    "dlfcn.h",
    "fcntl.h",
    "immintrin.h",
    "link.h",
    "linux/",
    "pthread.h",
    "sched.h",
    "sys/",
    "unistd.h",
    "windows.h",
    "x86intrin.h",
)


@dataclass(frozen=True)
class Rule:
    """What the files under `room` may include; the rule of the longest matching room holds."""

    room: str
    rooms: tuple[str, ...] = ()
    others: tuple[str, ...] = field(default=())  # headers, or folders of headers ending in /
    standard: bool = True


RULES = (
    Rule("include/flash_attn", rooms=("flash_attn/",)),
    Rule("src/core", rooms=("core/",)),
    Rule("src/core/semantics.h", standard=False),
    Rule("src/core/registry.cc", rooms=("core/", "cpu/", "cuda/", "reference/")),
    Rule("src/reference", rooms=("core/", "reference/")),
    Rule("src/cpu", rooms=("core/", "cpu/"), others=("hwy/", *OPERATING_SYSTEM)),
    Rule("src/cuda", rooms=("core/", "cuda/"), others=OPERATING_SYSTEM),
    Rule("src/cuda/device", rooms=("core/semantics.h", "cuda/device/"), standard=False),
    Rule("src/api", rooms=("api/", "core/", "cpu/", "cuda/", "reference/", "flash_attn/")),
    Rule("src/bindings", rooms=("bindings/", "flash_attn/"), others=("tvm/ffi/", "dlpack/")),
    Rule(
        "tools",
        rooms=(
            "flash_attn/",
            "tools/",
            "core/environment.h",
            "cuda/kernel_cache.h",
            "cuda/kernel_id.h",
            "cuda/precompile.h",
            "tests/cases.h",
            "tests/case_runner.h",
        ),
        others=OPERATING_SYSTEM,
    ),
    Rule("examples", rooms=("flash_attn/",)),
)


def rule_for(path: str) -> Rule | None:
    """The rule that holds for a file, by the longest room that contains it."""
    matching = [r for r in RULES if path == r.room or path.startswith(r.room + "/")]
    return max(matching, key=lambda rule: len(rule.room), default=None)


def allows(rule: Rule, header: str) -> bool:
    """Whether `rule` lets a file include `header`."""
    if rule.standard and header in STANDARD:
        return True
    for allowed in (*rule.rooms, *rule.others):
        if header == allowed or (allowed.endswith("/") and header.startswith(allowed)):
            return True
    return False


def resolve(root: Path, file: Path, header: str) -> str:
    """`header` by its name from src/, include/ or the root, if it is named relative to `file`."""
    beside = file.parent / header
    if not beside.exists():
        return header
    for base in ("src", "include", "."):
        if beside.resolve().is_relative_to((root / base).resolve()):
            return beside.resolve().relative_to((root / base).resolve()).as_posix()
    return header


def violations(root: Path) -> Iterator[str]:
    """A line for each include under `root` that breaks a rule."""
    for top in ("src", "include", "tools", "examples"):
        for file in sorted((root / top).rglob("*")):
            if file.suffix not in SUFFIXES:
                continue
            path = file.relative_to(root).as_posix()
            rule = rule_for(path)
            if rule is None:
                yield f"{path}: is in no room; give it a rule in scripts/check_arrows.py"
                continue
            for number, line in enumerate(file.read_text().splitlines(), start=1):
                match = INCLUDE.match(line) or SELF_INCLUDE.match(line)
                if match is None:
                    continue
                quoted = match.group(match.lastindex)
                header = resolve(root, file, quoted) if '"' in line else quoted
                if not allows(rule, header):
                    yield f"{path}:{number}: must not include {quoted}"


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = list(violations(root))
    print("\n".join(found) if found else "every include is allowed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
