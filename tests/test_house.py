"""How the house is built: imports run one way, rules are typed and not probed, and CONTRIBUTING's map is the tree's."""

import ast
import re
from pathlib import Path

import pytest
from test_conformance import RULES

import fastclip
from bench.rules import AT_REST

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastclip"

# Each room imports only from those above it. A folder is a room, and so is a file beside them.
ROOMS = [
    "version", "arguments", "torch_internals", "modes", "devices", "native", "packers", "backends", "host_stats",
    "stats", "distributed", "gradients", "rules", "pipeline", "graph_breaks", "clipper", "optim", "torch_ops",
    "functional", "monitor", "integrations", "__init__", "__main__",
]  # fmt: skip


def modules():
    """Dotted name within the package -> file."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports_of(name, path, known):
    """The modules of the package that one imports, wherever in it: in functions and for types only, too."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("fastclip"), f"{path}: imports within the package are relative"
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                for target in (".".join([*base, alias.name]), ".".join([*base, alias.name, "__init__"]),
                               ".".join(base), ".".join([*base, "__init__"])):  # fmt: skip
                    if target in known:
                        yield target
                        break


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: set(imports_of(name, path, known)) - {name} for name, path in known.items()}


def room(name):
    return name.split(".")[0]


def test_every_module_is_in_a_room_and_every_room_has_one():
    assert {room(name) for name in modules()} == set(ROOMS)


def test_imports_run_one_way(graph):
    against = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if ROOMS.index(room(target)) > ROOMS.index(room(name))
    ]
    assert not against


def test_no_circle_of_imports(graph):
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done:
            return
        path.append(name)
        for target in graph[name]:
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_a_broken_direction_would_be_seen(graph):
    """The test above can fail: from the package's front door everything is reached."""
    seen, left = set(), ["__init__"]
    while left:
        seen.add(name := left.pop())
        left += graph[name] - seen
    assert {"gradients.pack", "rules.fixed", "optim.adamw", "monitor.lines"} <= seen
    assert "pipeline.decide" in graph["clipper"] and "stats" in graph["rules.fixed"]


def test_rules_and_backends_are_not_probed():
    probes = re.compile(r"(has|get)attr\((self\.)?(rule|backend|group\.backend)\b|type\(rules?\[?0?\]?\) is ")
    for path in PACKAGE.rglob("*.py"):
        assert not probes.search(path.read_text()), path


def test_the_largest_file_is_a_comfortable_room():
    sources = [*PACKAGE.rglob("*.py"), *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    sizes = {path: len(path.read_text().splitlines()) for path in sources}
    largest = max(sizes, key=sizes.get)
    assert sizes[largest] < 450, (largest, sizes[largest])


def test_the_map_in_contributing_is_the_tree():
    """Every row of its table names files that are there, and every room has a row."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| folder or file |") :].split("\n\n")[0]
    named = re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE)[1:]
    entries = [entry for row in named for entry in re.findall(r"`([^`]+)`", row)]
    for entry in entries:
        assert list(ROOT.glob(entry.rstrip("/"))), f"CONTRIBUTING's map names {entry}, which is not there"
    for name in set(ROOMS) - {"__init__"}:
        spelled = {f"fastclip/{name}/", f"fastclip/{name}.py"}
        assert spelled & set(entries), f"CONTRIBUTING's map says nothing of fastclip/{name}"


def test_every_rule_is_held_to_the_conformance_suite_and_timed_and_described():
    """`fastclip.rules.__all__` is the registry; suite, benchmark and the rules' page have a line for each."""
    described = (ROOT / "docs" / "rules.md").read_text()
    for name in fastclip.rules.__all__:
        rule = getattr(fastclip.rules, name)
        if rule in (fastclip.rules.Rule, fastclip.rules.InPlaceRule) or not issubclass(rule, fastclip.rules.Rule):
            continue
        assert isinstance(RULES[name](), rule), f"tests/test_conformance.py does not hold {name} to the suite"
        assert name in AT_REST, f"bench/rules.py does not time {name}"
        assert re.search(rf"^\|.*`{name}\(.*`.* \|", described, flags=re.MULTILINE), f"docs/rules.md has no {name}"
