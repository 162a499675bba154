#!/usr/bin/env python3
"""Checks what no compiler checks about the tree, and reports every offence.

check_tree.py [ROOT]        the checks; exit status 1 if anything offends
check_tree.py --self-test   breaks each rule once in a small copy, and fails if one goes unnoticed
"""

import re
import sys
import tempfile
from pathlib import Path

# What a header of a layer may include, besides its own layer.
ORDER = ["base", "views", "simd", "attention", "score", "select", "policies", "cache", "integrations"]
ALLOWED = {layer: set(ORDER[: i + 1]) for i, layer in enumerate(ORDER)}
ALLOWED["paging"] = {"base", "views", "paging"}
ALLOWED["cache"].add("paging")
ALLOWED["integrations"].add("paging")
LEAVES = ["cuda", "train"]  # may include all others; nothing includes them
for leaf in LEAVES:
    ALLOWED[leaf] = set(ORDER) | {"paging", leaf}

FORBIDDEN = {"iostream", "regex", "format"}
# Besides the standard library: what the platform gives, and other people's types where a header is about them.
SYSTEM = {"immintrin.h", "cpuid.h", "arm_neon.h", "malloc.h", "unistd.h", "fcntl.h"}
SYSTEM_FOLDERS = ("sys/",)
FOREIGN = {"integrations/eigen.hpp": ("Eigen/",), "cuda/": ("cuda", "cub/", "thrust/")}
LONGEST = 600

INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]')


def read(root, file):
    """The text; nothing where the file is missing, so that the check that wanted some of it reports that."""
    path = root / file
    return path.read_text() if path.is_file() else ""


def headers(root):
    include = root / "include" / "kvcull"
    return sorted(p for p in include.rglob("*") if p.suffix in (".hpp", ".cuh"))


def name_of(root, path):
    return path.relative_to(root / "include" / "kvcull").as_posix()


def layer_of(name):
    """The folder; a header outside the folders is its own layer (views) or an umbrella over one (policies)."""
    return name.split("/")[0] if "/" in name else Path(name).stem


def includes(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if found := INCLUDE.match(line):
            yield number, found[1], found[2]


def own_includes(root, path):
    """(line number, name below include/kvcull) of the quoted includes; None where there is no such header."""
    top = (root / "include" / "kvcull").resolve()
    for number, quote, target in includes(path):
        if quote == '"':
            found = (path.parent / target).resolve()
            known = found.is_file() and found.is_relative_to(top)
            yield number, target, found.relative_to(top).as_posix() if known else None


def check_includes(root):
    for path in headers(root):
        name = name_of(root, path)
        layer = layer_of(name)
        for number, target, found in own_includes(root, path):
            where = f"include/kvcull/{name}:{number}"
            if found is None:
                yield f'{where}: "{target}" is no header of this library'
            elif found == "kvcull.hpp":
                yield f"{where}: the umbrella is for users only"
            elif layer != "kvcull" and layer not in ALLOWED:
                yield f"{where}: layer {layer} is unknown"
            elif layer_of(found) in LEAVES and layer != layer_of(found):
                yield f"{where}: {found} is a leaf, nothing includes it"
            elif layer != "kvcull" and layer_of(found) not in ALLOWED[layer]:
                yield f"{where}: {layer} must not include {found} (an upward include)"
            elif layer_of(found) == "simd" and layer != "simd" and found != "simd/kernels.hpp":
                yield f"{where}: outside simd only simd/kernels.hpp is included, not {found}"
        for number, quote, target in includes(path):
            if quote == '"':
                continue
            where = f"include/kvcull/{name}:{number}"
            foreign = [f for at, allowed in FOREIGN.items() if name.startswith(at) for f in allowed]
            if target in FORBIDDEN:
                yield f"{where}: <{target}> is forbidden in headers"
            elif target.startswith("kvcull/"):
                yield f"{where}: own headers are included by relative path"
            elif ("." in target or "/" in target) and not (
                target in SYSTEM or target.startswith(SYSTEM_FOLDERS) or target.startswith(tuple(foreign))
            ):
                yield f"{where}: <{target}> is not of the standard library"


def check_form(root):
    for path in headers(root):
        where = f"include/kvcull/{name_of(root, path)}"
        lines = path.read_text().splitlines()
        if not lines or lines[0] != "#pragma once":
            yield f"{where}:1: the first line is not `#pragma once`"
        if len(lines) > LONGEST:
            yield f"{where}: {len(lines)} lines, more than {LONGEST}: one idea per header"
        for number, line in enumerate(lines, 1):
            # clang-format keeps namespace scope at column 0.
            if re.match(r"(inline )?static |(inline )?namespace \{", line):
                yield f"{where}:{number}: every file gets its own copy of a namespace-scope `static` or unnamed namespace"


def reachable(root, start):
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [found for _, _, found in own_includes(root, root / "include" / "kvcull" / name) if found]
    return seen


def check_umbrellas(root):
    include = root / "include" / "kvcull"
    for umbrella in ("kvcull.hpp", "policies.hpp"):
        if not (include / umbrella).is_file():
            yield f"include/kvcull/{umbrella} is missing"
            return
    listed = reachable(root, "kvcull.hpp")
    for path in headers(root):
        name = name_of(root, path)
        if layer_of(name) not in LEAVES and name not in FOREIGN and name not in listed:
            yield f"include/kvcull/kvcull.hpp does not lead to {name}"
    direct = {found for _, _, found in own_includes(root, include / "policies.hpp")}
    for path in sorted((include / "policies").glob("*.hpp")):
        policy = path.stem
        wanted = [f"tests/policies/test_{policy}.cpp", f"docs/policies/{policy}.md"]
        yield from (f"policies/{policy}.hpp lacks {file}" for file in wanted if not (root / file).is_file())
        if f"policies/{policy}.hpp" not in direct:
            yield f"policies/{policy}.hpp lacks its line in include/kvcull/policies.hpp"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def check_readme(root):
    text = read(root, "README.md")
    shell = blocks(text, "sh")
    lines = shell[0].splitlines() if shell else []
    if len(lines) != 2:
        yield f"README.md: the first `sh` block has {len(lines)} lines, want two"
        return
    for line, preset in zip(lines, ("demo", "test")):
        if not line.endswith(f" && cmake --workflow --preset {preset}"):
            yield f"README.md: the line of the preset {preset} does not end in its workflow"
    if lines[1] not in [line.strip() for line in read(root, ".ci/run").splitlines()]:
        yield ".ci/run does not run the second command of README.md word for word"


def check_snippets(root):
    for page, example in (
        ("README.md", "examples/01_quickstart.cpp"),
        ("docs/paging.md", "examples/04_page_cache.cpp"),
    ):
        for snippet in blocks(read(root, page), "cpp")[:1]:
            if snippet not in read(root, example):
                yield f"{page}: the first `cpp` block is not part of {example}"


def check_versions(root):
    config = read(root, "include/kvcull/base/config.hpp")
    version = ".".join(re.findall(r"KVCULL_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", config))
    for file, pattern in (
        ("vcpkg.json", r'"version": "([^"]+)"'),
        ("CITATION.cff", r"^version: (\S+)"),
        ("CHANGELOG.md", r"^## \[(\d[^]]*)\]"),
    ):
        found = re.search(pattern, read(root, file), re.MULTILINE)
        if not found or found[1] != version:
            yield f"{file}: version {found[1] if found else 'missing'}, want {version} as in base/config.hpp"


CHECKS = [check_includes, check_form, check_umbrellas, check_readme, check_snippets, check_versions]


def offences(root):
    return [offence for check in CHECKS for offence in check(root)]


GOOD = {
    "include/kvcull/base/config.hpp": "#pragma once\n#define KVCULL_VERSION_MAJOR 1\n#define KVCULL_VERSION_MINOR 2\n"
    "#define KVCULL_VERSION_PATCH 3\n",
    "include/kvcull/views.hpp": '#pragma once\n#include <span>\n#include "base/config.hpp"\nstatic_assert(true);\n',
    "include/kvcull/simd/avx2.hpp": "#pragma once\n#include <immintrin.h>\n",
    "include/kvcull/simd/kernels.hpp": '#pragma once\n#include "avx2.hpp"\n',
    "include/kvcull/policies/a.hpp": '#pragma once\n#include "../simd/kernels.hpp"\n#include "../views.hpp"\n',
    "include/kvcull/policies.hpp": '#pragma once\n#include "policies/a.hpp"\n',
    "include/kvcull/paging/page.hpp": '#pragma once\n#include "../views.hpp"\n',
    "include/kvcull/cache/kv.hpp": '#pragma once\n#include "../paging/page.hpp"\n#include "../policies/a.hpp"\n',
    "include/kvcull/integrations/eigen.hpp": "#pragma once\n#include <Eigen/Core>\n",
    "include/kvcull/train/gate.hpp": '#pragma once\n#include "../cache/kv.hpp"\n',
    "include/kvcull/kvcull.hpp": '#pragma once\n#include "cache/kv.hpp"\n#include "policies.hpp"\n',
    "tests/policies/test_a.cpp": "",
    "docs/policies/a.md": "",
    "examples/01_quickstart.cpp": "// first\nint main() {}\n",
    "README.md": "```sh\nx && cmake --workflow --preset demo\ny && cmake --workflow --preset test\n```\n"
    "```cpp\nint main() {}\n```\n",
    "examples/04_page_cache.cpp": "// fourth\nint main() {}\n",
    "docs/paging.md": "```cpp\nint main() {}\n```\n",
    ".ci/run": "    y && cmake --workflow --preset test\n",
    "vcpkg.json": '{"version": "1.2.3"}',
    "CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\n",
    "CHANGELOG.md": "# Changelog\n## [Unreleased]\n## [1.2.3]\n## [1.2.2]\n",
}
H = "include/kvcull/"
# (file, text put in place of its old text or None to remove it, what the report must contain)
BAD = [
    (H + "base/config.hpp", GOOD[H + "base/config.hpp"] + '#include "../views.hpp"\n', "base must not include views.hpp"),
    (H + "views.hpp", '#pragma once\n#include "policies.hpp"\n', "views must not include policies.hpp"),
    (H + "paging/page.hpp", '#pragma once\n#include "../simd/kernels.hpp"\n', "paging must not include simd/kernels.hpp"),
    (H + "policies/a.hpp", '#pragma once\n#include "../cache/kv.hpp"\n', "policies must not include cache/kv.hpp"),
    (H + "policies/a.hpp", '#pragma once\n#include "../simd/avx2.hpp"\n', "only simd/kernels.hpp"),
    (H + "policies/a.hpp", '#pragma once\n#include "../kvcull.hpp"\n', "the umbrella is for users"),
    (H + "policies/a.hpp", '#pragma once\n#include "../gone.hpp"\n', "no header of this library"),
    (H + "policies/a.hpp", "#pragma once\n#include <kvcull/views.hpp>\n", "by relative path"),
    (H + "policies/a.hpp", "#pragma once\n#include <Eigen/Core>\n", "not of the standard library"),
    (H + "policies/a.hpp", "#pragma once\n#  include <iostream>\n", "<iostream> is forbidden"),
    (H + "policies/a.hpp", "#pragma once\n#include <regex>\n", "<regex> is forbidden"),
    (H + "policies/a.hpp", "#pragma once\n#include <format>\n", "<format> is forbidden"),
    (H + "policies/a.hpp", "// no guard\n", "`#pragma once`"),
    (H + "policies/a.hpp", "#pragma once\n" * (LONGEST + 1), "more than 600"),
    (H + "policies/a.hpp", "#pragma once\nstatic int count = 0;\n", "namespace-scope `static`"),
    (H + "policies/a.hpp", "#pragma once\nnamespace {\n}\n", "unnamed namespace"),
    (H + "kvcull.hpp", '#pragma once\n#include "train/gate.hpp"\n', "is a leaf"),
    (H + "kvcull.hpp", '#pragma once\n#include "policies.hpp"\n', "does not lead to cache/kv.hpp"),
    (H + "engine/x.hpp", '#pragma once\n#include "../views.hpp"\n', "layer engine is unknown"),
    (H + "policies.hpp", "#pragma once\n", "lacks its line in include/kvcull/policies.hpp"),
    (H + "policies.hpp", None, "policies.hpp is missing"),
    ("tests/policies/test_a.cpp", None, "lacks tests/policies/test_a.cpp"),
    ("docs/policies/a.md", None, "lacks docs/policies/a.md"),
    ("README.md", None, "has 0 lines"),
    ("README.md", "```sh\nx\n```\n", "has 1 lines"),
    ("README.md", GOOD["README.md"].replace("demo", "other"), "the preset demo does not end"),
    ("README.md", GOOD["README.md"].replace("main", "other"), "not part of examples/01_quickstart.cpp"),
    ("docs/paging.md", "```cpp\nint other() {}\n```\n", "not part of examples/04_page_cache.cpp"),
    (".ci/run", "z && cmake --workflow --preset test\n", ".ci/run does not run"),
    ("vcpkg.json", '{"version": "1.2.2"}', "vcpkg.json: version 1.2.2"),
    ("CITATION.cff", "cff-version: 1.2.3\n", "CITATION.cff: version missing"),
    ("CHANGELOG.md", "## [1.2.4]\n## [1.2.3]\n", "CHANGELOG.md: version 1.2.4"),
]


def write(root, file, text):
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


def self_test():
    failures = 0
    for file, text, wanted in [(None, None, None), *BAD]:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            for good, good_text in GOOD.items():
                write(root, good, good_text)
            if file:
                write(root, file, text)
            found = offences(root)
        right = any(wanted in offence for offence in found) if wanted else not found
        if not right:
            failures += 1
            print(f"{file or 'the good tree'}: want {wanted or 'no offence'}, got {found}")
    print(f"{len(BAD)} broken trees, {failures} wrong")
    return failures


def main():
    arguments = sys.argv[1:]
    if arguments == ["--self-test"]:
        return self_test() != 0
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        sys.exit(__doc__)
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    found = offences(root)
    print("\n".join(found) if found else f"{len(headers(root))} headers, no offence")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
