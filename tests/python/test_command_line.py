"""The command's help, and what it says of wrong flags."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(
    os.environ.get("FLASH_ATTN_PLUS") or Path(sys.executable).with_name("flash-attn-plus")
)
COMMANDS = ["info", "explain", "check", "bench", "cache"]

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="flash-attn-plus is not installed")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROGRAM), *arguments], capture_output=True, text=True)


def test_the_help_names_every_command():
    result = run("--help")
    assert result.returncode == 0 and result.stderr == ""
    assert all(f"\n  {command} " in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help(command):
    result = run(command, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.lower().startswith(f"usage: flash-attn-plus {command}")
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nonsense", "there is no command 'nonsense'"),
        ("explain --seqlen-q x", "--seqlen-q: must be a whole number, is 'x'"),
        ("explain --softcap=y", "--softcap: must be a number, is 'y'"),
        ("explain --dtype float64", "--dtype: must be one of fp32, fp16, bf16, is 'float64'"),
        ("explain --seqln-q 3", "there is no flag '--seqln-q', did you mean --seqlen-q?\n"),
        ("explain --foo", "there is no flag '--foo'\n"),
        ("explain --seqlen-q", "--seqlen-q needs a value"),
        ("explain --causal=1", "--causal takes no value"),
        ("explain --head-dim 600", "q: head_dim is 600, must be in [1, 512]"),
        ("info extra", "there is no flag 'extra'\n"),
        ("cache --shard 3 --num-shards 2", "--shard must be in [0, --num-shards)"),
    ],
)
def test_a_wrong_flag_is_named(arguments, message):
    result = run(*arguments.split())
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and "--help' " in result.stderr


def test_a_problem_is_explained():
    result = run("explain", "--seqlen-q", "4096", "--head-dim", "128", "--causal")
    assert result.returncode == 0
    assert "4096 queries" in result.stdout and " chosen " in result.stdout
