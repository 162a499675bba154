#!/usr/bin/env python3
"""Prints the tables of docs/performance.md from the results of a benchmark run.

performance_tables.py [build/bench/results.json]
"""

import json
import sys


def load(path):
    with open(path) as file:
        run = json.load(file)
    context = run["context"]
    print(f"{context['date'][:10]}, load average {', '.join(f'{x:.1f}' for x in context['load_avg'])}, "
          f"{context['num_cpus']} processors, {context['compiler']}\n")
    return {case["name"]: case for case in run["benchmarks"]}


def table(title, head, rows):
    rows = [row for row in rows if any(cell for cell in row[1:])]
    if not rows:
        return
    print(f"### {title}\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def cells(cases, name, form, *keys):
    """The numbers of a case as text; nothing if the case did not run."""
    case = cases.get(name)
    return form.format(*(case[key] for key in keys)) if case else ""


def percent(cases, name, key="over_none"):
    """What a case takes beyond what `key` compares it with."""
    case = cases.get(name)
    if not case:
        return ""
    return f"{100 * (case[key] - (1 if key == 'over_none' else 0)):+.1f} %"


TYPES = ["f32", "f16", "bf16"]
ROWS = [*TYPES, "int8", "int4"]


def decode(cases):
    for n in (16384, 65536):
        for dtype in ROWS:
            for isa in ("avx512", "avx2", "scalar", "naive"):
                for heads in ("8x8", "32x8"):
                    name = f"decode/{dtype}/{isa}/heads:{heads}/n:{n}/threads:"
                    one = cases.get(name + "1", {})
                    yield [
                        f"{dtype} {isa} {heads} n {n}",
                        cells(cases, name + "1", "{:.0f}", "best_us"),
                        f"{one['bytes_per_second'] / 1e9:.1f}" if one else "",
                        cells(cases, name + "1", "{:.2f}", "roofline"),
                        cells(cases, name + "2", "{:.2f}", "roofline"),
                        f"{100 * one['spread']:.0f} %" if one else "",
                    ]


def scores(cases):
    for what in ("sums", "rows", "obcache_value", "obcache_key", "obcache_joint", "obcache_lagged", "caote", "fastcaote"):
        names = [f"decode/{t}/{isa}/heads:32x8/n:16384/threads:1/scores:{what}" for isa in ("avx512", "avx2") for t in TYPES]
        yield [f"`{what}`"] + [percent(cases, name) for name in names]


def prefill(cases):
    for isa, n in (("avx512", 4096), ("avx2", 4096), ("scalar", 1024), ("naive", 1024)):
        for what in ("/scores:none", "/scores:sums", ""):
            row = [f"{isa} n {n}{what.replace('/scores:', ' ')}"]
            for dtype in TYPES:
                name = f"prefill/{dtype}/{isa}/heads:32x8/n:{n}/tokens:64/threads:1{what}"
                share = cells(cases, name, "{:.2f}", "roofline")
                row.append(f"{share} ({percent(cases, name)})" if what.endswith("sums") and share else share)
            yield row


def policies(cases):
    names = dict.fromkeys(name.split("/")[1] for name in cases if name.startswith(("policy/", "cache/step/")))
    names.pop("step", None)
    for policy in names:
        of = f"policy/{policy}/{{}}/n:4096"
        step = f"cache/step/{policy}/heads:32x8/n:4096/slack:"
        yield [
            policy,
            *(cells(cases, of.format(part), "{:.2f}", "real_time") for part in ("observe", "score", "evict")),
            cells(cases, of.format("observe"), "{:.0f}", "state_bytes_per_row"),
            percent(cases, step + "128", "over_attention"),
            percent(cases, step + "0", "over_attention"),
        ]


def selection(cases):
    for what in ("top_k", "top_k/gone:1", "top_k/naive", "pooled/heads:8", "plan/fill", "move/fill", "plan/ascending",
                 "move/ascending", "move/naive"):
        yield [what] + [cells(cases, f"select/{what}/n:{n}", "{:.1f} us", "real_time") for n in (4096, 65536)]


def paging(cases):
    shapes = [(trace, k) for trace in ("zipf", "loop", "real") for k in (64, 512, 4096)]
    for cache in ("guard", "guard_ahead", "guard_lru", "guard_lru_ahead", "lru"):
        yield [f"`{cache}`"] + [
            cells(cases, f"paging/{cache}/{trace}/k:{k}", "{:.1f} ({:.2f})", "ns_per_request", "over_list")
            for trace, k in shapes
        ]
    yield ["misses of `guard`, of the list"] + [
        cells(cases, f"paging/guard/{trace}/k:{k}", "{:.2f}, {:.2f}", "misses", "list_misses") for trace, k in shapes
    ]


def redundancy(cases):
    for isa in ("avx512", "avx2"):
        for keys in ("random", "alike"):
            yield [f"{isa}, {keys} keys"] + [
                cells(cases, f"redundancy/{isa}/keys:{keys}/n:{n}", "{:.0f} us ({:.2f})",
                      "us", "over_eigen") for n in (640, 1664, 4224)
            ]


def queries(cases):
    for name in cases:
        if name.startswith("views/queries/"):
            yield [name.split("/")[2], percent(cases, name, "at_once"), percent(cases, name, "waits")]


def others(cases):
    for name, case in cases.items():
        if name.startswith(("sentences/", "lookahead/")):
            yield [f"`{name}`", f"{case['us']:.0f}", f"{100 * case['spread']:.0f} %"]


def main():
    cases = load(sys.argv[1] if len(sys.argv) > 1 else "build/bench/results.json")
    table("Decode attention", ["case (d = 128)", "best, us", "GB/s", "roofline 1 thread", "roofline 2 threads", "spread"],
          decode(cases))
    table("What scores cost", ["scores", "avx512 f32", "f16", "bf16", "avx2 f32", "f16", "bf16"], scores(cases))
    table("Prefill", ["prefill, 32x8, 64 tokens", *TYPES], prefill(cases))
    table("Policies, n = 4096", ["policy", "observe, us", "score, us", "evict, us", "state, bytes per row",
                                 "step, 128 rows of slack", "step, one row at a time"], policies(cases))
    table("Queries that wait", ["policy", "a pass per token", "queries wait"], queries(cases))
    table("Selection", ["selection, one head", "n 4096", "n 65536"], selection(cases))
    table("Paging", ["cache", "zipf k 64", "k 512", "k 4096", "loop k 64", "k 512", "k 4096", "real k 64", "k 512",
                     "k 4096"], paging(cases))
    table("Redundancy", ["`R-KV`'s redundancy", "n 640", "n 1664", "n 4224"], redundancy(cases))
    table("Sentences and look-ahead", ["case", "best, us", "spread"], others(cases))


if __name__ == "__main__":
    main()
