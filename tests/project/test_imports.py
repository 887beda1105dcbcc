"""Imports point down: between floors, between the rooms of a floor, and never in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

FLOORS = [
    [
        "configuration",
        "cpp_libraries",
        "dtypes",
        "errors",
        "files",
        "progress",
        "settled",
        "system",
    ],
    ["kernels"],
    ["moe"],
    ["chat_templates", "parallel"],
    ["training", "serving"],
    ["doctor"],
    ["commands"],
    ["cli", "__init__"],
]
"""From the ground up. A floor may import the floors below it, and a folder its own files."""

PROGRAMS = {Path("training/__main__.py"): "commands"}
"""Programs stand on the floor of the commands, wherever their files are: they put the parts
together, and nothing imports them."""

ROOMS = {
    "kernels": [
        ["values"],
        ["cpu", "gpu", "torch_ops"],
        ["checks"],
        ["trust"],
        [
            "attention",
            "foretell",
            "gated",
            "grouped_linear",
            "linear",
            "live_channels",
            "norm",
            "router",
            "waves",
        ],
        ["adapted_waves", "experts", "frozen_experts", "routed_low_rank"],
    ],
    "moe": [
        ["arrays", "blocks", "drafts", "kept_ids", "pixels", "without_memory"],
        ["routers"],
        ["adapters", "items"],
        ["kv_cache", "linear", "norm"],
        ["gated_mlp", "kv_blocks"],
        ["config", "experts"],
        ["batch"],
        ["attention", "diffusion", "image_batch", "layer", "soft_moe"],
        ["exchange"],
        ["attention", "image_batch", "layer", "soft_moe"],
        ["models"],
        ["folders", "routes"],
        ["updates"],
    ],
    "parallel": [
        ["host", "local_ranks", "parent", "planning", "watch"],
        ["gpus"],
        ["mesh", "process", "simulation"],
        ["experts"],
        ["dense", "stages"],
        ["profiling"],
    ],
    "training": [
        ["section"],
        ["formats"],
        ["checkpoint_config", "lora_config", "monitor_config", "parallel_config", "publish_config"],
        ["averages_check", "expert_memory_check", "optimizers", "parallel_check", "stages_check"],
        ["config", "device", "key_check", "phases", "precision", "schedule", "stop"],
        ["deepspeed_file", "layer_shape"],
        ["deepspeed_settings"],
        ["layer_schedule", "parallelize", "work"],
        ["ownership"],
        ["data"],
        ["checkpoints", "run"],
        ["alignment", "objectives"],
        ["micro_batches"],
        ["stages"],
        ["read_config", "report", "saves", "setup", "step"],
        ["observers", "on_paper"],
        ["publisher", "routes"],
        ["cluster", "sparsify", "trainer"],
        ["program"],
        ["__main__"],
    ],
    "serving": [
        ["experts", "packages", "relay"],
        ["proxy"],
        ["engine", "load_checks", "memory", "replica_files", "resident"],
        ["expert_parallel", "live", "planning", "speculating"],
        ["filling"],
        ["api", "expert_parallel_args", "follow_args", "frozen_experts", "lora_args", "openers"],
        ["loading"],
        ["evaluation", "load_kinds"],
        ["pruning", "widths"],
        ["serve_args"],
        ["proxy_guard", "series", "server"],
        ["hosting"],
        ["server_budgets"],
        ["cluster", "replicas"],
        ["app"],
        ["launch"],
    ],
    "commands": [
        ["model_folder", "options", "speculation"],
        ["forecast_table", "trace_place", "trace_predict", "trace_replay"],
        ["trace_gates"],
        [
            *(
                "align",
                "chat",
                "classify",
                "cluster",
                "convert",
                "doctor",
                "evaluate",
                "export",
                "forecast",
                "generate",
                "items",
                "merge",
                "plan",
                "predict",
                "price",
                "recommend",
                "report",
            ),
            *(
                "serve",
                "routers",
                "simulate",
                "sparsify",
                "sparsity",
                "tokenize",
                "trace",
                "train",
                "translate",
                "upcycle",
                "upscale",
            ),
        ],
    ],
}
"""The rooms of a folder, folders and single files, from the ground up. A room may import the rooms
below it and its own files."""

DOORS = {*ROOMS["kernels"][-1], *ROOMS["kernels"][-2], "trust", "values"}
"""What may be imported of ``kernels/`` from above."""

SEPARATE = ("tests", "benchmarks", "scripts")
"""Folders outside the package, whose files import each other by bare names."""


def package_files() -> list[Path]:
    folders = [name for floor in FLOORS for name in floor if (ROOT / name).is_dir()]
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted([*found, *ROOT.glob("*.py")])


def imports_of(path: Path, files: set[Path]) -> Iterator[Path]:
    """Yield the files of the package that ``path`` imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for name in (alias.name for alias in node.names):
            candidates = (base / f"{name}.py", base.with_suffix(".py"), base / "__init__.py")
            yield next(file for file in candidates if file in files)


def bare_imports_of(path: Path, by_name: dict[str, Path]) -> Iterator[Path]:
    """Yield the files that a test or benchmark imports by their bare names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        yield from (by_name[name] for name in names if name in by_name)


def graph_of_package() -> dict[Path, set[Path]]:
    files = package_files()
    graph = {path: set(imports_of(path, set(files))) for path in files}
    return {_short(path): {_short(other) for other in found} for path, found in graph.items()}


def circle_in(graph: dict[Path, set[Path]]) -> list[Path]:
    """Return the files of a circle of imports in order, or nothing."""
    done: set[Path] = set()
    way: list[Path] = []

    def visit(path: Path) -> list[Path]:
        if path in way:
            return [*way[way.index(path) :], path]
        if path in done:
            return []
        way.append(path)
        for other in sorted(graph[path]):
            found = visit(other)
            if found:
                return found
        done.add(way.pop())
        return []

    for path in sorted(graph):
        found = visit(path)
        if found:
            return found
    return []


def _short(path: Path) -> Path:
    return path.relative_to(ROOT)


def _level(levels: list[list[str]], name: str, owner: str) -> int:
    name = name.removesuffix(".py")
    found = [level for level, names in enumerate(levels) if name in names]
    assert found, f"{owner} has no level; give {name} one in {Path(__file__).name}"
    return found[0]


def test_a_circle_is_found_and_named():
    a, b, c = (Path(f"{name}.py") for name in "abc")
    assert circle_in({a: {b}, b: {c}, c: {b}}) == [b, c, b]
    assert circle_in({a: {a}, b: set(), c: {a}}) == [a, a]
    assert circle_in({a: {b, c}, b: {c}, c: set()}) == []


def test_no_circle_of_imports_in_the_package():
    circle = circle_in(graph_of_package())
    assert not circle, "imports go in a circle: " + " -> ".join(map(str, circle))


@pytest.mark.parametrize("folder", SEPARATE)
def test_no_circle_of_imports_outside_the_package(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    by_name = {path.stem: path for path in files}
    graph = {path: set(bare_imports_of(path, by_name)) for path in files}
    circle = circle_in({_short(p): {_short(o) for o in found} for p, found in graph.items()})
    assert not circle, "imports go in a circle: " + " -> ".join(map(str, circle))


def test_nothing_imports_a_program():
    for path, imported in graph_of_package().items():
        assert not imported & PROGRAMS.keys(), f"{path} imports a program"


def test_imports_between_floors_point_down():
    for path, imported in graph_of_package().items():
        floor = _level(FLOORS, PROGRAMS.get(path, path.parts[0]), str(path))
        for other in imported:
            is_own = other.parts[0] == path.parts[0] and len(path.parts) > 1
            if str(other) != "__init__.py" and not is_own:  # the root holds the version
                level = _level(FLOORS, other.parts[0], str(other))
                is_ground = floor == level == 0
                assert level < floor or is_ground, f"{path} imports {other}, which is not below it"


@pytest.mark.parametrize("folder", ROOMS)
def test_imports_between_rooms_point_down(folder):
    levels = ROOMS[folder]
    for path, imported in graph_of_package().items():
        if path.parts[0] != folder or path.name == "__init__.py":
            continue
        room, level = path.parts[1], _level(levels, path.parts[1], str(path))
        for other in (other for other in imported if other.parts[0] == folder):
            is_below = _level(levels, other.parts[1], str(other)) < level
            assert is_below or other.parts[1] == room, (
                f"{path} imports {other}, which is not below it"
            )


def test_only_doors_and_values_of_the_kernels_are_imported_from_above():
    for path, imported in graph_of_package().items():
        for other in imported:
            if other.parts[0] == "kernels" and path.parts[0] != "kernels":
                door = other.parts[1].removesuffix(".py")
                assert door in DOORS, f"{path} imports {other}, which is behind a door"
