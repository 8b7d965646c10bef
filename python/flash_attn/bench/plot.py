"""A picture of a run, from its JSON."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from .peers import OURS, OURS_FLOAT32, SDPA
from .report import Result, Run, display_name, groups, peers_of, rate

_COLOURS = {OURS: "#0b6e4f", SDPA: "#d1495b", OURS_FLOAT32: "#8fb8a8"}
_OTHERS = ("#edae49", "#30638e", "#7a5195")
_GREY = "#7d7d7d"
_MODES = {"forward": "Forward", "backward": "Backward", "decode": "Decoding"}


def draw(run: Run, path: Path) -> None:
    """Writes the picture in the format of the path's suffix: svg, png, pdf.

    A row for each mode and dtype, a column for each head_dim and mask (decoding: each group size);
    speed over length, beside the peers' and under the machine's ceiling.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--plot needs matplotlib: pip install 'flash-attention-plus[bench]'", name="matplotlib"
        ) from error
    rows = [(mode, dtype, _panels(mode, results)) for mode, dtype, results in groups(run)]
    rows = [row for row in rows if row[2]]
    if not rows:
        raise ValueError("--plot: the run has no case with a length to draw over")
    columns = max(len(panels) for _, _, panels in rows)
    figure = Figure(figsize=(max(7.0, 3.1 * columns), 2.9 * len(rows) + 1.1), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    for axes_row, (mode, dtype, panels) in zip(grid, rows):
        for axes, (title, results) in zip(axes_row, panels.items()):
            _draw_panel(axes, results, run["ceilings"])
            axes.set_title(title, fontsize=9, loc="left")
        for axes in axes_row[len(panels) :]:
            axes.set_axis_off()
        axes_row[0].set_ylabel(f"{_MODES[mode]}, {dtype}\n{_unit(mode)}", fontsize=9)
        axes_row[0].set_ylim(bottom=0)
        for axes in axes_row[: len(panels)]:
            axes.set_xlabel("keys", fontsize=7, loc="right", labelpad=0)
    machine = run["machine"]
    handles = {}
    for axes in grid.flat:
        handles.update(zip(*reversed(axes.get_legend_handles_labels())))
    place = {"loc": "outside lower left", "ncols": 6, "frameon": False, "fontsize": 9}
    figure.legend(handles.values(), handles.keys(), **place)
    figure.suptitle(
        f"FlashAttention-Plus {machine['versions']['flash-attention-plus']} beside PyTorch"
        f" {machine['versions']['torch']}: {machine['processor']}, {machine['threads']} threads",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    # The same run gives the same bytes: no date, and identifiers that are not random.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "flash-attention-plus"}):
        figure.savefig(path, dpi=160, metadata=metadata)


def _unit(mode: str) -> str:
    return "GB/s" if mode == "decode" else "GFLOP/s"


def _panels(mode: str, results: list[Result]) -> dict[str, list[Result]]:
    """Dense results by head_dim and mask, those of decoding by the size of groups."""
    panels: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        case = result["parameters"]
        if case["lengths"]:
            continue
        if mode == "decode":
            group = case["num_heads"] // case["num_heads_kv"]
            panels[f"{group} queries per key head" if group > 1 else "no groups"].append(result)
        else:
            panels[f"head_dim {case['head_dim']}{', causal' * case['causal']}"].append(result)
    return {title: panels[title] for title in sorted(panels, key=_panel_order)}


def _panel_order(title: str) -> tuple[int, str]:
    numbers = [int(word) for word in title.replace(",", " ").split() if word.isdigit()]
    return (numbers[0] if numbers else 0, title)


def _draw_panel(axes: Any, results: list[Result], ceilings: dict[str, float]) -> None:
    others = iter(_OTHERS)
    ceiling = ceilings[results[0]["ceiling"]]
    axes.axhline(ceiling, color=_GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "measured ceiling", (0.99, ceiling), xycoords=("axes fraction", "data"),
        xytext=(0, 2), textcoords="offset points", ha="right", fontsize=7, color=_GREY,
    )  # fmt: skip
    for name in [*reversed(peers_of(results)), OURS]:
        colour = _COLOURS.get(name) or next(others)
        for index, points in enumerate(_lines(results, name)):
            axes.plot(
                *zip(*sorted(points)),
                color=colour,
                linewidth=1.9 if name == OURS else 1.4,
                alpha=1.0 if index == 0 else 0.45,
                marker="o",
                markersize=3.5,
                label=_label(name) if index == 0 else None,
            )
    axes.set_xscale("log", base=2)
    lengths = sorted({result["parameters"]["seqlen_k"] for result in results})
    axes.set_xticks(lengths, [_short(length) for length in lengths], fontsize=7)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(results: list[Result], name: str) -> list[list[tuple[int, float]]]:
    """(length, speed) by batch and heads, the largest problems first."""
    lines: dict[tuple[int, int], list[tuple[int, float]]] = collections.defaultdict(list)
    for result in results:
        if name in result["samples"]:
            case = result["parameters"]
            key = (case["batch"], case["num_heads"])
            lines[key].append((case["seqlen_k"], rate(result, name)))
    # The one with the most points is the plain one; lone points only crowd the others.
    ordered = sorted(lines, key=lambda key: (len(lines[key]), key), reverse=True)
    least = 2 if ordered and len(lines[ordered[0]]) > 1 else 1
    return [lines[key] for key in ordered if len(lines[key]) >= least]


def _label(name: str) -> str:
    return "this library (paler: other batches and heads)" if name == OURS else display_name(name)


def _short(length: int) -> str:
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)
