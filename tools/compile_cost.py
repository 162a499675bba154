#!/usr/bin/env python3
"""Measures what it costs to compile kvcull.hpp, and fails if that exceeds its budget.

Four files are compiled with -O2: `std` includes only the standard headers that kvcull.hpp leads to, `header` includes
kvcull.hpp, `kernels` compiles the kernels of all instruction sets and nothing else, and `use` is the quick start, which
takes one KVCache<H2O> through append, attend and end_step. Time is that of the processor, the least of some rounds, in
units of the time of `std`, so that a budget holds on any machine. Size is that of code and constants (`size`, column
`text`).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Times std's, and KiB of text: 18 to 34 % above what docs/performance.md says.
BUDGETS = {
    "gcc 12": {"header": (10.5, 0), "kernels": (15, 268), "use": (40, 540)},
    "clang 14": {"header": (8, 0), "kernels": (13, 311), "use": (32, 640)},
}
ROUNDS = 5  # at most: the first within the budgets is the last

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "include"


def version_of(compiler):
    command = [compiler, "-dM", "-E", "-x", "c++", os.devnull]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    macros = dict(re.findall(r"#define (\w+) (\d+)$", text, re.MULTILINE))
    return f"clang {macros['__clang_major__']}" if "__clang_major__" in macros else f"gcc {macros['__GNUC__']}"


def reachable(header, seen):
    """The library's headers that `header` leads to, itself among them."""
    if header not in seen:
        seen.add(header)
        for target in re.findall(r'^\s*#\s*include "([^"]+)"', header.read_text(), re.MULTILINE):
            reachable((header.parent / target).resolve(), seen)
    return seen


def sources():
    headers = reachable(INCLUDE / "kvcull" / "kvcull.hpp", set())
    standard = {found for path in headers for found in re.findall(r"#\s*include (<[a-z_]+>)", path.read_text())}
    return {
        "std": "".join(f"#include {header}\n" for header in sorted(standard)),
        "header": "#include <kvcull/kvcull.hpp>\n",
        "kernels": "#include <kvcull/simd/kernels.hpp>\nconst auto& kernels = kvcull::simd::kernels();\n",
        "use": (ROOT / "examples" / "01_quickstart.cpp").read_text(),
    }


def compile_seconds(compiler, source):
    command = [compiler, "-std=c++20", "-O2", f"-I{INCLUDE}", "-c", str(source), "-o", str(source.with_suffix(".o"))]
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"exit status {child.returncode}: {' '.join(command)}")
    return usage.ru_utime + usage.ru_stime


def text_kib(source):
    command = ["size", str(source.with_suffix(".o"))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return int(lines[1].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="g++", help="default: g++")
    parser.add_argument("--scale", type=float, default=1, help="of all budgets; 0.5 shows a failure")
    options = parser.parse_args()
    version = version_of(options.compiler)
    budgets = BUDGETS.get(version)

    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.cpp" for name in sources()}
        for name, content in sources().items():
            paths[name].write_text(content)
        seconds = dict.fromkeys(paths, float("inf"))
        for rounds in range(1, ROUNDS + 1):
            for name, path in paths.items():
                seconds[name] = min(seconds[name], compile_seconds(options.compiler, path))
            costs = {name: (seconds[name] / seconds["std"], text_kib(paths[name])) for name in paths}
            over = [
                f"{name}: {cost:.1f} {unit} exceed the budget of {options.scale * budget:.1f}"
                for name in budgets or ()
                for cost, budget, unit in zip(costs[name], budgets[name], ("times std", "KiB"))
                if cost > options.scale * budget
            ]
            if not over:
                break

    print(f"{version}, {rounds} round{'s' if rounds > 1 else ''}")
    for name, (ratio, kib) in costs.items():
        print(f"{name:7} {seconds[name]:6.2f} s  {ratio:5.1f} times std  {kib:6.1f} KiB of text")
    if budgets is None:
        print(f"skipped: no budget for {version}, only for {', '.join(BUDGETS)}")
    if over:
        sys.exit("\n".join(over))


main()
