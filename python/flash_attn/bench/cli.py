"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from . import cases, experiments, machine, plot, report
from .peers import PEERS, SDPA, calls_of, installed
from .timing import alternate

FORMAT = 1  # of the JSON
_EXPERIMENTS = ("alternation", "scaling")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(given)
    try:
        if options.update:
            for page in options.update:
                page.write_text(report.update_page(page))
            return 0
        if options.add and options.json is None:
            raise ValueError("--add: needs the file that --json names")
        run = json.loads(options.read.read_text()) if options.read else measure(options, given)
        if options.add and options.json.exists():
            run = report.merged(json.loads(options.json.read_text()), run)
        _write(run, options)
    except (ValueError, NotImplementedError, OSError, ModuleNotFoundError) as error:
        print(f"flash-attn-plus bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nflash-attn-plus bench: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flash-attn-plus bench",
        description="Times this library beside PyTorch and other peers, case by case and by turns,"
        " on the CPU; tells speed, ratio, and the share of what the machine was measured to reach.",
    )
    add = parser.add_argument
    add(
        "--mode",
        default="forward,backward,decode",
        metavar="MODES",
        help="of forward, backward, decode, alternation and scaling, with commas between; or all"
        " (%(default)s)",
    )
    add(
        "--dtype",
        default="float32",
        metavar="DTYPES",
        help="of float32, float16 and bfloat16, with commas between (%(default)s)",
    )
    add(
        "--shapes",
        metavar="TEXT",
        help="cases in place of the table: 'b2 h16/4 s4096 d128 causal; h8 q1 s512 d64', that is"
        " batch, heads (of queries / of keys), queries, keys, head_dim",
    )
    add("--quick", action="store_true", help="a quarter of the table")
    add(
        "--part",
        metavar="K/N",
        help="the K-th of N parts of each table, where a machine is not quiet for long; with --add",
    )
    add(
        "--peers",
        metavar="NAMES",
        help=f"of {', '.join(PEERS)}, with commas between (those installed, but for flex)",
    )
    add("--threads", type=int, metavar="N", help="as torch.set_num_threads (PyTorch's own choice)")
    add(
        "--repeat",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="how long each case repeats (%(default)s); five rounds at least",
    )
    add("--backend", metavar="NAME", help="as FLASH_ATTENTION_BACKEND: cpu:avx2, ...")
    add("--json", type=Path, metavar="FILE", help="writes all that was measured")
    add(
        "--add",
        action="store_true",
        help="keeps what --json's file holds of other cases, modes and dtypes",
    )
    add("--plot", type=Path, metavar="FILE", help="draws it: .svg, .png, .pdf (needs matplotlib)")
    add("--markdown", choices=["en", "zh"], help="prints the tables in Markdown")
    add(
        "--from",
        type=Path,
        metavar="FILE",
        dest="read",
        help="measures nothing; --plot and --markdown are of this JSON",
    )
    add(
        "--update",
        type=Path,
        nargs="+",
        metavar="PAGE",
        help="measures nothing; makes the figures of these pages anew from the JSON they name",
    )
    return parser


def _choices(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}: {name!r} is none of {', '.join(known)}")
    return names


def measure(options: argparse.Namespace, given: list[str]) -> report.Run:
    """Runs what the options ask for, printing as it goes."""
    known = (*cases.MODES, *_EXPERIMENTS)
    modes = list(known) if options.mode == "all" else _choices("--mode", options.mode, known)
    dtypes = _choices("--dtype", options.dtype, tuple(cases.BYTES))
    peers = installed() if options.peers is None else _choices("--peers", options.peers, PEERS)
    if SDPA not in peers:
        peers.insert(0, SDPA)
    if not options.repeat > 0:
        raise ValueError(f"--repeat: is {options.repeat}, must be positive")
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads: is {options.threads}, must be positive")
        torch.set_num_threads(options.threads)
    if options.backend is not None:
        os.environ["FLASH_ATTENTION_BACKEND"] = options.backend
    wanted = [
        (mode, dtype, _cases(mode, dtype, options))
        for mode in cases.MODES
        if mode in modes
        for dtype in dtypes
    ]
    described = machine.describe()
    ceilings = machine.measure_ceilings(described["threads"])
    report.print_machine(described, ceilings)
    run: report.Run = {
        "format": FORMAT,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": ["flash-attn-plus", "bench", *given],
        "machine": described,
        "ceilings": ceilings,
        "results": [],
        "alternation": [],
        "scaling": [],
    }
    progress = report.Progress(sum(len(table) for _, _, table in wanted))
    with torch.no_grad():
        for mode, dtype, table in wanted:
            run["results"] += _measure_table(mode, dtype, table, peers, ceilings, options, progress)
        _measure_experiments(run, modes, dtypes, options, progress)
    return run


def _cases(mode: str, dtype: str, options: argparse.Namespace) -> list[cases.Case]:
    if options.shapes:
        return cases.parse(options.shapes, mode, dtype)
    table = cases.table(mode, dtype, options.quick)
    if options.part is None:
        return table
    part, _, parts = options.part.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--part: is {options.part!r}, must be K/N with K from 1 to N")
    return table[int(part) - 1 :: int(parts)]


def _measure_table(
    mode: str,
    dtype: str,
    table: list[cases.Case],
    peers: list[str],
    ceilings: dict[str, float],
    options: argparse.Namespace,
    progress: report.Progress,
) -> list[report.Result]:
    columns = peers if dtype == "float32" else [*peers, report.OURS_FLOAT32]
    report.print_header(mode, dtype, columns)
    results: list[report.Result] = []
    for case in table:
        progress.show(f"{mode} {dtype} {case.name}")
        calls, refused = calls_of(case, peers)
        result: dict[str, Any] = {
            "mode": mode,
            "dtype": dtype,
            "case": case.name,
            "parameters": dataclasses.asdict(case),
            "flops": case.flops(),
            "bytes": case.bytes(),
            "ceiling": (ceiling := machine.ceiling_of(dtype, mode, ceilings)),
            "peak": ceilings[ceiling],
            "samples": alternate(calls, options.repeat),
            "refused": refused,
        }
        results.append(result)
        progress.step()
        progress.clear()
        report.print_result(result, ceilings, columns)
    report.print_summary(results)
    return results


def _measure_experiments(
    run: report.Run,
    modes: list[str],
    dtypes: list[str],
    options: argparse.Namespace,
    progress: report.Progress,
) -> None:
    if "alternation" in modes:
        print("alternation with PyTorch's matrix product, float32")
        for size in experiments.ALTERNATION:
            progress.show(f"alternation, {size}")
            entry = experiments.alternation(size)
            progress.clear()
            report.print_alternation(entry)
            run["alternation"].append(entry)
    if "scaling" in modes:
        for dtype in dtypes:
            most = torch.get_num_threads()
            entries = experiments.scaling(dtype, most, options.repeat, progress.show)
            progress.clear()
            print(f"scaling, {dtype}")
            report.print_scaling(entries)
            run["scaling"] += entries


def _write(run: report.Run, options: argparse.Namespace) -> None:
    if options.json is not None:
        options.json.write_text(json.dumps(run, indent=1) + "\n")
    if options.plot is not None:
        plot.draw(run, options.plot)
    if options.markdown is not None:
        print(report.markdown(run, options.markdown))
