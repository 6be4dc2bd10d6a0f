"""Results as tables: ``python -m benchmarks.report FILE.json [--out FILE.md]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_AGAINST = {
    "loop": "against the loop",
    "vmap": "against vmap",
    "jax": "against JAX",
    "peak": "of FMA peak",
    "threads": "against one thread",
    "memory": "extra memory",
}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table whose columns line up as plain text too; the first is flush left."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def padded(line: list[str]) -> str:
        first, *rest = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([padded(lines[0]), "| " + " | ".join(rule) + " |", *map(padded, lines[1:])])


def _time(seconds: float) -> str:
    """Three digits, in a unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}" if seconds < 999.5 * size else f"{seconds:.0f} s"
    return ""


def _bytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f} MB"


def _ratio(value: float) -> str:
    return f"{value:.1f}x" if value < 99.5 else f"{value:.0f}x"


def candidates(record: Record) -> str:
    """The table of one workload."""
    memory = any("memory" in row for row in record["candidates"].values())
    header = ["candidate", "off by", "a call", "quartiles", "fused is faster", "lower quartile"]
    header += ["of peak", *(["extra memory"] if memory else []), "first call"]
    rows, absent = [], []
    for row in record["candidates"].values():
        seconds, ratio, share = row.get("seconds"), row.get("ratio"), row.get("of_peak")
        if seconds is None:
            absent.append(f"- {row['title']}: {_state(row)}")
            continue
        cells = [
            row["title"],
            f"{row['error']:.0e}" if "error" in row else "",
            _time(seconds["median"]),
            f"{_time(seconds['lower'])} - {_time(seconds['upper'])}",
            _ratio(ratio["median"]) if ratio else "",
            _ratio(ratio["lower"]) if ratio else "",
            f"{share['median']:.1%}" if share else "",
        ]
        if memory:
            cells.append(_bytes(row.get("memory", {}).get("bytes")))
        cells.append(_time(row["first_call"]) if "first_call" in row else "")
        rows.append(cells)
    return "\n\n".join(part for part in (table(header, rows), "\n".join(absent)) if part)


def _state(row: Record) -> str:
    """Why a candidate has no time: absent, left out, refused, failed, or red (a wrong number)."""
    if row["status"] == "red":
        return f"red, its gradient is off by {row['error']:.0e}"
    return f"{row['status']}, {row['why']}" if row.get("why") else str(row["status"])


def correctness(results: Record) -> str:
    """How far each candidate is from float64 on each workload; the table of a smoke run."""
    keys = [key for key in results["workloads"][0]["candidates"] if key != "one_thread"]

    def cell(row: Record) -> str:
        off = f"{row['error']:.0e}" if "error" in row else ""
        return off if row["status"] == "ok" else f"{row['status']} {off}".strip()

    return table(
        ["off by", "tolerance", *keys],
        [
            [
                record["title"],
                f"{record['tolerance']:.0e}",
                *(cell(record["candidates"][key]) for key in keys),
            ]
            for record in results["workloads"]
        ],
    )


def _goal_cells(goal: Record) -> list[str]:
    against = goal["against"]

    def number(value: float | None) -> str:
        if value is None:
            return "-"
        if against == "memory":
            return _bytes(value)
        return f"{value:.0%}" if against == "peak" else _ratio(value)

    wanted = number(goal["goal"])
    if goal["stretch"] is not None:
        wanted += f", then {number(goal['stretch'])}"
    if goal["met"] is None:
        mark = goal.get("why", "")
    else:
        mark = "stretch met" if goal.get("stretch_met") else "met" if goal["met"] else "NOT MET"
    return [_AGAINST[against], wanted, number(goal.get("median")), number(goal["measured"]), mark]


def goals(results: Record) -> str:
    """Every goal, with what was measured and a mark."""
    rows = [
        [record["title"], *_goal_cells(goal)]
        for record in results["workloads"]
        for goal in record["goals"]
    ]
    for row in results["overhead"]:
        for what, title in (("call", "meta_grad"), ("call_and_read", "gradients looked at")):
            spread = row[what]
            rows.append(
                [
                    f"sinusoid, I=1, T={row['tasks']}, 1 thread",
                    f"over the kernel, {title}",
                    f"{row['goal_us']:.0f} µs",
                    f"{spread['median']:.1f} µs",
                    f"{spread['upper']:.1f} µs",
                    "met" if row["met"][what] else "NOT MET",
                ]
            )
    header = ["workload", "what", "goal", "median", "quartile", ""]
    return table(header, rows)


def _machine(results: Record) -> str:
    machine = results.get("machine", {})
    versions = ", ".join(
        f"{name} {version or 'not installed'}"
        for name, version in machine.get("versions", {}).items()
    )
    gpu = f"; {machine['gpu']}, CUDA {machine['cuda']}" if "gpu" in machine else ""
    return (
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('isa')}{gpu}; "
        f"{machine.get('system')}, Python {machine.get('python')}, commit {machine.get('commit')}, "
        f"{machine.get('date')}.\n{versions}."
    )


def markdown(results: Record) -> str:
    """The whole report; it reads well as plain text."""
    parts = [_machine(results)]
    if results["smoke"]:
        parts += ["A smoke run: a few tasks of each workload, for correctness alone."]
        return "\n\n".join([*parts, correctness(results)]) + "\n"
    parts += ["## Goals", goals(results)]
    for record in results["workloads"]:
        clock = "Process CPU time" if record["clock"] == "cpu" else "Wall time"
        peak = record["peak_gflops"]
        facts = [
            f"{clock}, {record['rounds']} interleaved rounds",
            f"{record['gflop']:.4g} GFLOP a call",
            *([] if peak is None else [f"FMA peak {peak:.0f} GFLOP/s"]),
            f"right is within {record['tolerance']:.0e} of float64",
        ]
        parts += [f"## {record['title']}", ", ".join(facts) + ".", candidates(record)]
    waiting = "\n".join(f"- {name}: {what}" for name, what in results["not_yet"].items())
    parts += ["## Not built yet", waiting]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="what --results wrote")
    parser.add_argument("--out", type=Path, help="where to; the terminal if left out")
    arguments = parser.parse_args()
    text = markdown(json.loads(arguments.results.read_text()))
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
