"""The benchmark measures what it says, in the order it says, and its pages follow its JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from flash_attn import _native
from flash_attn.bench import cases, cli, experiments, peers, plot, report, timing

PAGES = sorted((ROOT / "docs").glob("*/performance.md"))
# Small, but with all that a case can have.
SHAPES = "b2 h4/2 s96 d32; h2 q32 s64 d16; h2 s64 d16 causal"


def varlen(mode: str) -> cases.Case:
    return cases.Case(mode, "float32", 3, 40, 40, 2, 2, 16, True, (7, 40, 1))


def one_run(tmp_path, *arguments: str) -> dict:
    path = tmp_path / "run.json"
    assert cli.main(["--repeat", "0.001", "--json", str(path), *arguments]) == 0
    return json.loads(path.read_text())


# ---- Cases ----


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("causal", [False, True])
def test_operations_are_those_of_the_pairs_that_the_mask_leaves(mode, causal):
    case = cases.Case(mode, "float32", 3, 5, 7, 4, 2, 8, causal)
    pairs = sum(not causal or j <= i + 2 for i in range(5) for j in range(7))
    products = {"forward": 2, "backward": 5}[mode]
    assert case.flops() == 3 * 4 * pairs * 2 * 8 * products
    assert varlen(mode).flops() == 2 * (28 + 820 + 1) * 2 * 16 * products


def test_bytes_are_each_tensor_once():
    case = cases.Case("decode", "bfloat16", 2, 1, 100, 8, 2, 16)
    tensors = peers.make_tensors(case)
    needed = sum(x.nbytes for x in (tensors.q, tensors.q, tensors.k, tensors.v))
    assert case.bytes() == needed
    backward = cases.Case("backward", "float32", 2, 30, 40, 8, 2, 16)
    tensors = peers.make_tensors(backward)
    # q, out, dout, dq; k, v, dk, dv
    assert backward.bytes() == 4 * tensors.q.nbytes + 4 * tensors.k.nbytes


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_dense_case_is_read_back_from_its_name(mode):
    for case in cases.table(mode, "float32"):
        if not case.lengths:
            assert cases.parse(case.name, mode, "float32") == [case]


def test_the_table_has_what_the_peers_are_compared_over():
    for mode in ("forward", "backward"):
        table = cases.table(mode, "float32")
        dense = {(c.head_dim, c.seqlen_k, c.num_heads, c.causal) for c in table if not c.lengths}
        assert len(dense) == 2 * 6 * 2 * 2
        assert any(case.lengths for case in table)
        assert len(cases.table(mode, "float32", quick=True)) * 3 < len(table)
    groups = {c.num_heads // c.num_heads_kv for c in cases.table("decode", "float32")}
    assert groups == {1, 4, 8}


@pytest.mark.parametrize("text", ["b1 h8", "s0", "h8/3 s64", "s64 wide"])
def test_shapes_that_are_none_are_refused(text, capsys):
    assert cli.main(["--shapes", text]) == 2
    assert "--shapes" in capsys.readouterr().err


# ---- Calls ----


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", list(cases.BYTES))
def test_ours_and_pytorchs_calls_compute_the_same(mode, dtype):
    problems = cases.parse("b2 h4/2 s96 d32", mode, dtype)
    if mode != "decode":
        problems += cases.parse("h2 s64 d16 causal", mode, dtype)
    for case in problems:
        calls, refused = peers.calls_of(case, [peers.SDPA])
        assert not refused
        ours, theirs = calls[peers.OURS](), calls[peers.SDPA]()
        if mode != "backward":
            ours, theirs = (ours,), (theirs,)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other.transpose(1, 2), rtol=3e-2, atol=3e-2)


def test_calls_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    result = timing.alternate(calls, 0.0)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert rounds[:2] == [list("abc")] * 2  # they warm up
    measured = rounds[2:]
    assert measured[:4] == [list("abc"), list("cba")] * 2
    assert all(result[name]["samples"] == len(measured) for name in "abc")


def test_a_summary_tells_median_least_and_spread():
    result = timing.summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert result == {"median": 3.0, "least": 1.0, "spread": pytest.approx(2 / 3), "samples": 5}


# ---- Ceilings ----


def test_ceilings_are_measured_or_refused():
    assert 1e8 < _native.measure_ceiling("fp32_fma", 1) < 1e13
    assert 1e8 < _native.measure_ceiling("memory_read", 2) < 1e13
    with pytest.raises(ValueError, match="kind"):
        _native.measure_ceiling("fp8", 1)
    with pytest.raises(ValueError, match="num_threads"):
        _native.measure_ceiling("fp32_fma", -1)


# ---- The command ----


def test_a_run_is_told_whole_in_json(tmp_path, capsys):
    run = one_run(tmp_path, "--shapes", SHAPES, "--dtype", "float32,bfloat16", "--markdown", "en")
    assert {"processor", "threads", "versions"} <= run["machine"].keys()
    assert run["ceilings"]["fp32_fma"] > 0 and run["ceilings"]["memory_read"] > 0
    assert len(run["results"]) == 3 * 2 * 3
    for result in run["results"]:
        samples = result["samples"]
        assert samples["ours"]["samples"] >= timing.MIN_SAMPLES
        assert (peers.SDPA in samples) != (peers.SDPA in result["refused"])
        assert (peers.OURS_FLOAT32 in samples) == (result["dtype"] == "bfloat16")
        assert result["ceiling"] in run["ceilings"]
    printed = capsys.readouterr().out
    assert "geometric mean" in printed and "| b2 h4/2 s96 d32 |" in printed


def test_parts_of_a_table_add_up_to_it(tmp_path, monkeypatch):
    table = cases.parse("s16 d16; s24 d16; s32 d16; s40 d16; s48 d16", "forward", "float32")
    monkeypatch.setattr(cases, "table", lambda *_: table)
    arguments = ["--mode", "forward", "--add"]
    for part in ("2/3", "1/3", "3/3", "1/3"):
        run = one_run(tmp_path, *arguments, "--part", part)
    assert [result["case"] for result in run["results"]] == [case.name for case in table]
    run = one_run(tmp_path, "--mode", "backward", "--part", "1/5", "--add")
    assert [result["mode"] for result in run["results"]] == ["forward"] * 5 + ["backward"]
    assert run["command"].count("bench") == 2 and "--part" not in run["command"]


def test_alternation_is_measured_of_both(monkeypatch):
    monkeypatch.setattr("flash_attn.bench.experiments.ALTERNATION", {"small": (16, 16)})
    entry = experiments.alternation("small", repeats=10)
    assert entry["least"] <= entry["ratio"] and entry["peer_ratio"] > 0
    assert min(entry[k] for k in ("attention", "product", "together")) > 0


def test_a_forced_implementation_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_BACKEND", "")
    arguments = ["--shapes", "s64", "--mode", "forward"]
    run = one_run(tmp_path, *arguments, "--backend", "reference")
    assert run["machine"]["environment"]["FLASH_ATTENTION_BACKEND"] == "reference"
    assert cli.main([*arguments, "--backend", "cpu:abacus"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [["--mode", "sideways"], ["--dtype", "int8"], ["--peers", "abacus"], ["--threads", "0"],
     ["--repeat", "0"], ["--from", "there-is-none.json"], ["--part", "4/3"], ["--add"]],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert any(argument in error for argument in arguments)


def test_without_pytorch_the_command_says_so():
    code = (
        "import sys, runpy; sys.modules['torch'] = None;"
        "runpy.run_module('flash_attn.bench', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "PyTorch is not installed" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_run_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"run.{suffix}"
    one_run(tmp_path, "--shapes", "h2 s64 d16; h2 s128 d16", "--plot", str(picture))
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize("lengths, lines", [([[64], [64]], [1, 1]), ([[64, 128], [64]], [2])])
def test_lone_points_are_drawn_where_there_are_no_others(monkeypatch, lengths, lines):
    monkeypatch.setattr(plot, "rate", lambda result, name: 1.0)
    results = [
        {"samples": {"us": []}, "parameters": {"batch": b, "num_heads": 1, "seqlen_k": length}}
        for b, of_batch in enumerate(lengths)
        for length in of_batch
    ]
    assert [len(line) for line in plot._lines(results, "us")] == lines


# ---- Pages ----


def test_the_two_languages_mirror_each_other():
    assert [page.parent.name for page in PAGES] == ["en", "zh"]
    texts = [page.read_text() for page in PAGES]
    for what in (r"^#+ ", r"^- ", r"^\| ", r"^```.*?^```$"):
        here, there = (re.findall(what, text, re.MULTILINE | re.DOTALL) for text in texts)
        assert here == there
    for page, text in zip(PAGES, texts):
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_a_pages_figures_are_those_of_its_json(page, tmp_path):
    assert report.update_page(page) == page.read_text()
    assert "`flash-attn-plus bench --" in page.read_text()
    bare = tmp_path / "bare.md"
    bare.write_text("# Nothing\n")
    with pytest.raises(ValueError, match="no block"):
        report.update_page(bare)
