"""The pages mirror each other, and the samples in them run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# A page, and the same in Chinese.
PAGES = {"README.md": "README.zh-CN.md", "docs/en/performance.md": "docs/zh/performance.md"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    found = BLOCK.findall((ROOT / "README.md").read_text())
    return [code for kind, code in found if kind == language]


@pytest.mark.parametrize("page", PAGES)
def test_the_two_languages_mirror_each_other(page):
    english, chinese = ((ROOT / it).read_text() for it in (page, PAGES[page]))
    assert BLOCK.findall(english) == BLOCK.findall(chinese)
    # The pages name each other, and pages of their own languages.
    chinese = chinese.replace("/en/", "/zh/").replace("README.md", "README.zh-CN.md")
    english = english.replace("/en/", "/zh/").replace("README.md", "README.zh-CN.md")
    for what in (r"^#+ ", r"^- ", r"^\| ", r"\]\([^)]*\)"):
        here, there = (
            re.findall(what, BLOCK.sub("", text), re.MULTILINE) for text in (english, chinese)
        )
        assert here == there


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_sample_runs(code):
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_cpp_sample_runs(tmp_path: Path):
    library = ROOT / "build" / "cpp" / "libflash_attention_plus.so"
    if not library.exists() or shutil.which("g++") is None:
        pytest.skip("the C++ library is not built")
    (sample,) = blocks("cpp")
    source, program = tmp_path / "sample.cc", tmp_path / "sample"
    source.write_text(sample)
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", str(source), "-o", str(program)]
    command += [f"-I{ROOT / 'include'}", str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run(command, check=True)
    subprocess.run([str(program)], check=True)


@pytest.mark.parametrize("page", [*PAGES, *PAGES.values()])
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), (
            target
        )
