"""Tables of a run: on the terminal as it goes, and in Markdown from its JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from . import cases
from .peers import OURS, OURS_FLOAT32, SDPA

Run = dict[str, Any]
Result = dict[str, Any]

_NAMES = {SDPA: "PyTorch", OURS_FLOAT32: "fp32", "flex": "FlexAttention"}


def display_name(peer: str) -> str:
    return _NAMES.get(peer, peer)


# ---- Derived figures ----


def ratio(result: Result, peer: str) -> float | None:
    """The peer's time by ours; above 1 we are faster. None where the peer has not run."""
    samples = result["samples"]
    return samples[peer]["median"] / samples[OURS]["median"] if peer in samples else None


def rate(result: Result, implementation: str = OURS) -> float:
    """What the case is bound by, in G per second: bytes in decode, else operations."""
    amount = result["bytes"] if result["mode"] == "decode" else result["flops"]
    return amount / result["samples"][implementation]["median"] / 1e9


def unit(result: Result) -> str:
    return "GB/s" if result["mode"] == "decode" else "GFLOP/s"


def share(result: Result, ceilings: dict[str, float]) -> float:
    """Of the ceiling that the machine was measured to have.

    That of memory, which neighbours share, in the same run; that of arithmetic at its highest.
    """
    peak = ceilings[result["ceiling"]]
    if result["ceiling"] == "memory_read":
        peak = result.get("peak", peak)
    return rate(result) / peak


def ratios(results: list[Result], peer: str) -> tuple[int, float, float, str]:
    """How many cases the peer ran, and of their ratios the geometric mean, the least, its case."""
    found = [(value, r["case"]) for r in results if (value := ratio(r, peer)) is not None]
    logarithms = [math.log(value) for value, _ in found]
    return len(found), math.exp(sum(logarithms) / len(found)), *min(found)


def groups(run: Run) -> Iterator[tuple[str, str, list[Result]]]:
    """(mode, dtype, results) in the order of the run."""
    keys = dict.fromkeys((result["mode"], result["dtype"]) for result in run["results"])
    for mode, dtype in keys:
        members = [r for r in run["results"] if (r["mode"], r["dtype"]) == (mode, dtype)]
        yield mode, dtype, members


def peers_of(results: list[Result]) -> list[str]:
    """Those that ran any of the cases, PyTorch first."""
    found = dict.fromkeys(name for r in results for name in r["samples"] if name != OURS)
    return sorted(found, key=lambda name: name != SDPA)


def duration(seconds: float) -> str:
    """With three digits."""
    for scale, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {name}"
    return f"{seconds / 1e-6:.3g} us"


# ---- The terminal ----


class Progress:
    """One line that is written over, where standard error is a terminal."""

    _WIDTH = 30

    def __init__(self, total: int, stream: TextIO = sys.stderr) -> None:
        self._total, self._done, self._stream = total, 0, stream
        self._shows = stream.isatty()

    def show(self, text: str) -> None:
        if self._shows:
            filled = self._WIDTH * self._done // max(1, self._total)
            bar = "█" * filled + "·" * (self._WIDTH - filled)
            self._stream.write(f"\r\x1b[K{bar} {self._done}/{self._total}  {text}")
            self._stream.flush()

    def step(self) -> None:
        self._done += 1

    def clear(self) -> None:
        if self._shows:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def print_machine(machine: dict[str, Any], ceilings: dict[str, float]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['processor']}, {machine['threads']} threads ({machine['threads_of']})")
    print(versions)
    print("measured ceilings: " + ", ".join(ceiling_texts(ceilings)) + "\n")


def ceiling_texts(ceilings: dict[str, float]) -> list[str]:
    units = {kind: "GB/s" if kind == "memory_read" else "GFLOP/s" for kind in ceilings}
    return [f"{kind} {value:.0f} {units[kind]}" for kind, value in ceilings.items()]


def print_header(mode: str, dtype: str, peers: list[str]) -> None:
    columns = "".join(f"{display_name(peer):>14} {'ratio':>6}" for peer in peers)
    what = "GB/s" if mode == "decode" else "GFLOP/s"
    print(f"{mode}, {dtype}")
    print(f"  {'case':34}{'ours':>9} {'spread':>6} {what:>8} {'share':>6}{columns}")


def print_result(result: Result, ceilings: dict[str, float], peers: list[str]) -> None:
    ours = result["samples"][OURS]
    line = f"  {result['case']:34}{duration(ours['median']):>9} {ours['spread']:6.1%}"
    line += f" {rate(result):8.1f} {share(result, ceilings):6.1%}"
    for peer in peers:
        value = ratio(result, peer)
        if value is None:
            line += f"{'-':>14} {'-':>6}"
        else:
            line += f"{duration(result['samples'][peer]['median']):>14} {value:6.2f}"
    print(line, flush=True)


def print_summary(results: list[Result]) -> None:
    for peer in peers_of(results):
        count, mean, least, where = ratios(results, peer)
        print(
            f"  {display_name(peer)}: geometric mean {mean:.2f}, least {least:.2f} ({where}),"
            f" {count} cases"
        )
    print(flush=True)


def print_alternation(entry: dict[str, Any]) -> None:
    print(
        f"  {entry['name']}, {entry['repeats']} times: apart {duration(entry['attention'])} +"
        f" {duration(entry['product'])}, by turns {duration(entry['together'])},"
        f" ratio {entry['ratio']:.3f}, of PyTorch's attention {entry['peer_ratio']:.3f}",
        flush=True,
    )


def print_scaling(entries: list[dict[str, Any]]) -> None:
    for e in entries:
        print(
            f"  {e['mode']:9} {e['case']} {display_name(e['implementation']):8} {e['threads']:3}"
            f" threads {e['gflops']:8.0f} GFLOP/s, efficiency {e['efficiency']:.0%}"
        )


# ---- Markdown ----

_TEXTS = {
    "en": {
        "colon": ": ",
        "comma": ", ",
        "forward": "Forward",
        "backward": "Backward",
        "decode": "Decoding",
        "case": "case",
        "ours": "ours",
        "share": "of ceiling",
        "ratio": "faster",
        "least": "least",
        "mean": "geometric mean",
        "cases": "cases",
        "machine": "Machine",
        "ceilings": "Measured ceilings",
        "command": "Command",
        "alternation": "By turns with PyTorch's matrix product",
        "peer_by_turns": "the same of PyTorch's attention",
        "scaling": "Threads",
        "threads": "threads",
        "efficiency": "efficiency",
        "summary": "Summary",
        "peer": "peer",
        "implementation": "implementation",
    },
    "zh": {
        "colon": "：",  # noqa: RUF001
        "comma": "，",  # noqa: RUF001
        "forward": "前向",
        "backward": "反向",
        "decode": "解码",
        "case": "算例",
        "ours": "本库",
        "share": "占上限",
        "ratio": "倍数",
        "least": "最小",
        "mean": "几何平均",
        "cases": "算例数",
        "machine": "机器",
        "ceilings": "实测上限",
        "command": "命令",
        "alternation": "与 PyTorch 矩阵乘交替",
        "peer_by_turns": "PyTorch 的注意力同样交替",
        "scaling": "线程",
        "threads": "线程",
        "efficiency": "效率",
        "summary": "汇总",
        "peer": "对手",
        "implementation": "实现",
    },
}


def merged(old: Run, new: Run) -> Run:
    """`new`, and what `old` has of other cases, modes and dtypes.

    Cases come in the order of the table, ceilings are the higher ones, commands follow one another,
    those that differ by their part but once.
    """

    def key(result: Result) -> tuple[str, str, str]:
        return result["mode"], result["dtype"], result["case"]

    results = {key(result): result for result in (*old["results"], *new["results"])}
    groups_ = list(dict.fromkeys(name[:2] for name in results))
    order = {
        (mode, dtype, case.name): i
        for mode, dtype in groups_
        for i, case in enumerate(cases.table(mode, dtype))
    }
    names = sorted(results, key=lambda n: (groups_.index(n[:2]), order.get(n, len(order))))
    ceilings = dict(old["ceilings"])
    for name, value in new["ceilings"].items():
        ceilings[name] = max(value, ceilings.get(name, value))
    commands = f"{' '.join(old['command'])} ; {' '.join(new['command'])}"
    whole = re.sub(r" --part[ =]\S+", "", commands).split(" ; ")
    return {
        **new,
        "command": " ; ".join(dict.fromkeys(whole)).split(" "),
        "ceilings": ceilings,
        "results": [results[name] for name in names],
        "alternation": new["alternation"] or old["alternation"],
        "scaling": new["scaling"] or old["scaling"],
    }


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def markdown(run: Run, language: str = "en", level: int = 3) -> str:
    """All tables of a run, under headings of `level`. `language`: "en" or "zh"."""
    text = _TEXTS[language]
    heading = "#" * level
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    command = " ".join(run["command"])
    parts = [
        f"- {text['machine']}{text['colon']}{machine['processor']}, {machine['threads']}"
        f" {text['threads']}; {versions}; {run['time'][:10]}\n"
        f"- {text['ceilings']}{text['colon']}{', '.join(ceiling_texts(run['ceilings']))}\n"
        f"- {text['command']}{text['colon']}`{command}`\n"
    ]
    if run["results"]:
        parts += [f"{heading} {text['summary']}\n", _summary_table(run, text)]
    for mode, dtype, results in groups(run):
        parts.append(f"{heading} {text[mode]}{text['comma']}{dtype}\n")
        parts.append(_result_table(results, run["ceilings"], text))
    if run["alternation"]:
        parts += [f"{heading} {text['alternation']}\n", _alternation_table(run, text)]
    if run["scaling"]:
        parts += [f"{heading} {text['scaling']}\n", _scaling_table(run, text)]
    return "\n".join(parts)


def _summary_table(run: Run, text: dict[str, str]) -> str:
    rows = []
    for mode, dtype, results in groups(run):
        for peer in peers_of(results):
            count, mean, least, where = ratios(results, peer)
            row = [
                f"{text[mode]}{text['comma']}{dtype}",
                display_name(peer),
                str(count),
                f"{mean:.2f}",
            ]
            rows.append([*row, f"{least:.2f} ({where})"])
    return _table(["", text["peer"], text["cases"], text["mean"], text["least"]], rows)


def _result_table(results: list[Result], ceilings: dict[str, float], text: dict[str, str]) -> str:
    peers = peers_of(results)
    header = [text["case"], text["ours"], unit(results[0]), text["share"]]
    for peer in peers:
        header += [display_name(peer), text["ratio"]]
    rows = []
    for result in results:
        row = [result["case"], duration(result["samples"][OURS]["median"])]
        row += [f"{rate(result):.0f}", f"{share(result, ceilings):.0%}"]
        for peer in peers:
            value = ratio(result, peer)
            if value is None:
                row += ["-", "-"]
            else:
                row += [duration(result["samples"][peer]["median"]), f"{value:.2f}"]
        rows.append(row)
    return _table(header, rows)


def _alternation_table(run: Run, text: dict[str, str]) -> str:
    header = [text["case"], text["ours"], "PyTorch", text["alternation"], text["ratio"]]
    header.append(text["peer_by_turns"])
    rows = [
        [
            e["name"],
            *(duration(e[k]) for k in ("attention", "product", "together")),
            f"{e['ratio']:.3f}",
            f"{e['peer_ratio']:.3f}" if "peer_ratio" in e else "-",
        ]
        for e in run["alternation"]
    ]
    return _table(header, rows)


def _scaling_table(run: Run, text: dict[str, str]) -> str:
    header = [text["case"], text["implementation"], text["threads"], "GFLOP/s", text["efficiency"]]
    rows = [
        [
            f"{text[e['mode']]}, {e['dtype']}, {e['case']}",
            text["ours"] if e["implementation"] == OURS else display_name(e["implementation"]),
            str(e["threads"]),
            f"{e['gflops']:.0f}",
            f"{e['efficiency']:.0%}",
        ]
        for e in run["scaling"]
    ]
    return _table(header, rows)


_BLOCK = re.compile(
    r"(<!-- figures (?P<language>en|zh) (?P<path>\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL
)


def update_page(page: Path) -> str:
    """The page's text with each block of figures made anew from its JSON.

    A block begins with `<!-- figures LANGUAGE PATH -->`, the path relative to the page, and ends
    with `<!-- end of figures -->`. Raises ValueError where the page has none.
    """

    def replace(match: re.Match[str]) -> str:
        run = json.loads((page.parent / match["path"]).read_text())
        return f"{match[1]}\n{markdown(run, match['language'])}\n{match[4]}"

    text, count = _BLOCK.subn(replace, page.read_text())
    if count == 0:
        raise ValueError(f"--update: {page} has no block of figures")
    return text
