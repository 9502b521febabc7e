"""The architecture's picture, enforced: imports go from the right to the left of it only."""

import ast
from pathlib import Path

import wnq

SOURCE = Path(wnq.__file__).parent

# Each room may import those before it; rooms of one rank do not know each other.
RANKS = [
    {"ste", "files", "layers", "environment", "names", "allocator", "kernels"},
    {"quantizer", "registered", "drawing", "readers"},
    {"normalizers", "starting", "packing", "bases", "theory"},
    {"learned_step", "max_rounding"},
    {"normalized", "activations"},
    {"methods", "prepared"},
    {"plan", "compact", "together"},
    {"plan_table", "attach"},
    {"testing", "tails", "clipping", "checkpoints", "models", "data", "folding", "procedures"},
    {"analysis", "artifact", "metrics", "recorder", "sensitivity", "budget"},
    {"integer", "allocation", "integrations"},
    {"export", "report", "train"},
    {"recipe", "speed"},
    {"demo", "compare"},
    {"settle"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}


def room_of(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "wnq":
            if node.module == "wnq":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("wnq."))


def files():
    return sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name != "__init__.py")


def test_every_room_has_its_place_in_the_picture():
    assert {room_of(path) for path in files()} == set(RANK)


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(SOURCE)} imports {target}"
        for path in files()
        for target in imports(path)
        if target != room_of(path) and RANK.get(target, len(RANKS)) >= RANK[room_of(path)]
    ]
    assert not wrong, wrong


def test_files_stay_small():
    long = [
        f"{p.relative_to(SOURCE)}: {n}" for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 310
    ]
    assert not long, long


def test_the_library_never_prints():
    shouting = [
        str(path.relative_to(SOURCE))
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not shouting


def test_public_names_are_importable_and_documented():
    for name in wnq.__all__:
        assert getattr(wnq, name).__doc__, name
