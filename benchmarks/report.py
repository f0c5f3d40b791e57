"""Tables, targets and the picture of the results."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import LONG_STEPS, MB, MEMORY_TARGET, ROW, Case

Results = dict[str, dict[str, Any]]


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table, the first column left, the others right."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  " + "  ".join(cells).rstrip())


def verdict(value: float, target: float) -> str:
    """The verdict on a value that is to stay at or below its target."""
    return "pass" if value <= target else "miss"


def memory(result: dict[str, Any], of: str = "peak_bytes") -> float:
    """The peak beyond the output tensor, which is what the caller asked for."""
    return result[of] - result["output_bytes"] if result[of] is not None else math.nan


def label(case: Case) -> str:
    """A case without its N."""
    kind = {"backprop": "backprop", "adjoint": "its adjoint"}.get(case.gradient, f"Discrete, {case.gradient}")
    extras = (", alpha learned" if case.learn_alpha else "") + (
        ", loss on all outputs" if case.outputs == "all" else ""
    )
    if case.history == "exponentials":
        extras += ", exponentials"
    if case.schedule == "revolve":
        extras += ", revolve"
    return f"{case.library} {case.method}, {kind}{extras}"


def history_of(result: dict[str, Any]) -> str:
    """The history that was used, in short; chosen where none was asked for."""
    return ((result["stats"] or {}).get("history") or "").partition("(")[0]


def print_tables(cases: list[Case], results: Results) -> None:
    """All tables of a run."""
    done = [c for c in cases if "total_s" in results.get(c.name, {})]
    rows = []
    for c in done:
        r = results[c.name]
        rows.append(
            [
                label(c),
                str(c.steps),
                history_of(r),
                f"{r['floor_s'] * 1e3:.1f}",
                f"{r['forward_s'] * 1e3:.1f}",
                f"{r['backward_s'] * 1e3:.1f}",
                f"{r['total_s'] * 1e3:.1f}",
                f"{r['ratio']:.2f}",
                f"{r['ratio_min']:.2f}..{r['ratio_max']:.2f}",
                str(r["repeats"]),
                f"{verdict(r['ratio'], c.time_target)} {c.time_target:g}" if c.target else "",
            ]
        )
    header = ["", "N", "history", "floor ms", "forward", "backward", "total", "/ floor", "range", "runs", "target"]
    table("Time: CPU milliseconds, one thread, forward and backward; ratios are medians side by side", header, rows)

    rows = []
    for c in done:
        r = results[c.name]
        peak, blocks, promised = memory(r), memory(r, "blocks_bytes"), r["buffer_bytes"]
        row = [label(c), str(c.steps), f"{r['output_bytes'] / MB:.1f}" if r["output_bytes"] else ""]
        row += [f"{promised / MB:.1f}" if promised else "", f"{peak / MB:.1f}", f"{blocks / MB:.1f}".replace("nan", "")]
        if promised:
            row += [f"{peak / promised:.2f}", f"{blocks / promised:.2f}", f"{(blocks - promised) / ROW:.0f}"]
        else:
            row += [""] * 3
        row.append(f"{r['gradient_error']:.0e}" if r.get("gradient_error") is not None else "")
        row.append(verdict(peak / promised, MEMORY_TARGET) if c.target else "")
        rows.append(row)
    header = [
        "",
        "N",
        "output MB",
        "buffers",
        "peak",
        "mapped",
        "peak /",
        "mapped /",
        "rows over",
        "gradient",
        "<= 1.3",
    ]
    table("Memory: MB above a warmed-up state, without the output tensor and its cotangent", header, rows)
    if rows:
        print("  peak: of the resident set; mapped: again, with blocks mapped one by one (measure.py, NOTE 1);")
        print(
            f"  rows over: (mapped - buffers) in states of {ROW // 1024} KiB; gradient: relative error against Backprop"
        )

    rows = []
    for c in done:
        r = results[c.name]
        if r["stats"]:
            s, n = r["stats"], c.steps
            evaluations = s["nfe_forward"] + s["nfe_recompute"] + s["nfe_backward"]
            per_evaluation = r["total_s"] * 1e6 / evaluations
            counts = [s["nfe_forward"], s["nfe_backward"], s["newton_iterations"], s["linear_iterations"]]
            numbers = [f"{x / n:.2f}" for x in counts]
            rows.append([label(c), str(n), *numbers, f"{per_evaluation:.0f}", f"{r['total_s'] * 1e6 / n:.0f}"])
    header = ["", "N", "f forward", "f backward", "newton", "linear", "us per f", "us per step"]
    table(
        "Work: counts per step (newton and linear iterations are informational, for the implicit method)", header, rows
    )

    skipped = [c for c in cases if "skipped" in results.get(c.name, {})]
    if skipped:
        print("\nSkipped")
        for reason in dict.fromkeys(results[c.name]["skipped"] for c in skipped):
            print(f"  {', '.join(c.name for c in skipped if results[c.name]['skipped'] == reason)}: {reason}")


def print_targets(cases: list[Case], results: Results) -> dict[str, str]:
    """Pass or miss of each target, also returned."""
    verdicts = {}
    for c in cases:
        r = results.get(c.name, {})
        if c.target and "ratio" in r:
            if c.gradient == "state":
                text = f"time {c.name}: {r['ratio']:.2f} of at most {c.time_target:g}"
                verdicts[text] = verdict(r["ratio"], c.time_target)
            ratio = memory(r) / r["buffer_bytes"]
            in_use = memory(r, "blocks_bytes") / r["buffer_bytes"]
            text = f"memory {c.name}: {ratio:.2f} of at most {MEMORY_TARGET:g} ({in_use:.2f} mapped)"
            verdicts[text] = verdict(ratio, MEMORY_TARGET)
    if verdicts:
        print("\nTargets")
    for text, word in verdicts.items():
        print(f"  {word}  {text}")
    return verdicts


def print_profile(case: Case, result: dict[str, Any]) -> None:
    """Where one case's time goes."""
    total = result["total_us"]
    rows = [
        [name, f"{p['us']:.1f}", f"{100 * p['us'] / total:.0f}%", f"{p['calls']:.2f}"]
        for name, p in sorted(result["pieces"].items(), key=lambda item: -item[1]["us"])
    ]
    rows.append(["all, with timers", f"{total:.1f}", "", ""])
    rows.append(["the timers", f"{result['timers_us']:.1f}", "", ""])
    rows.append(["floor", f"{result['floor_us']:.1f}", "", ""])
    table(f"{label(case)}, N = {case.steps}: exclusive CPU time", ["", "us/step", "", "calls/step"], rows)
    if result["missing"]:
        print(f"  counted with their callers, since they are not there: {', '.join(result['missing'])}")


def plot(cases: list[Case], results: Results, path: Path) -> None:
    """Write the picture, or say why not."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno picture: matplotlib is missing (pip install 'pfde[bench]')", file=sys.stderr)
        return
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name, series in _series(cases, results):
        steps = [c.steps for c, _ in series]
        style = {"marker": "o", "markersize": 4, "linestyle": "--" if series[0][0].library == "torchfde" else "-"}
        time_axes.plot(steps, [r["ratio"] for _, r in series], label=name, **style)
        memory_axes.plot(steps, [max(memory(r), ROW) / MB for c, r in series], **style)
    time_axes.plot([8, LONG_STEPS, LONG_STEPS, 10_000], [2.0, 2.0, 1.25, 1.25], color="black", linewidth=0.8)
    for buffers in (2, 3):
        steps = sorted({c.steps for c in cases if c.outputs == "last"})
        allowed = [MEMORY_TARGET * buffers * n * ROW / MB for n in steps]
        memory_axes.plot(steps, allowed, color="black", linewidth=0.8)
        memory_axes.annotate(f"1.3 x {buffers} buffers", (steps[-1], allowed[-1]), fontsize=7, ha="right", va="bottom")
    time_axes.set(title="forward + backward over the floor", ylabel="ratio of CPU times, one thread")
    memory_axes.set(title="peak memory above a warmed-up state", ylabel="MB")
    for axes in (time_axes, memory_axes):
        axes.set(xscale="log", yscale="log", xlabel="steps N")
        axes.grid(True, which="both", alpha=0.2)
    if time_axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=130)


def _series(cases: list[Case], results: Results) -> Iterator[tuple[str, list[tuple[Case, dict[str, Any]]]]]:
    shown = [c for c in cases if "ratio" in results.get(c.name, {}) and c.outputs == "last"]
    for name in dict.fromkeys(label(c) for c in shown):
        yield name, [(c, results[c.name]) for c in shown if label(c) == name]
