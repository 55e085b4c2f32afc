"""The project's rules that a machine can check. CONTRIBUTING.md says why each one is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from anonfw import recipe

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "anonfw"
MODULES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

STEP_LINES, RECIPE_LINES = 60, 100
SYSTEM_LINES, BASE_LINES, FILE_LINES = 250, 150, 305

TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
TORCH_DRAWS_IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
TORCH_LIKE = {"rand_like", "randn_like", "randint_like"}  # they take no generator
TORCH_GLOBAL = {"manual_seed", "seed"}
NUMPY_EXPLICIT = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[Path]:
    """Files of the repository: what git tracks, or everything outside hidden and output folders in an unpacked copy."""
    try:
        shown = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        skipped = {"runs", "build", "dist", "wandb", "__pycache__"}
        inside = (path.relative_to(ROOT).parts for path in ROOT.rglob("*") if path.is_file())
        return [ROOT.joinpath(*parts) for parts in inside if not any(p in skipped or p.startswith(".") for p in parts)]
    return [ROOT / name for name in shown.stdout.split("\0") if name and (ROOT / name).is_file()]


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """(dotted name as written, call) of every call; a method of anything but a name is `.method`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, function = [], node.func
            while isinstance(function, ast.Attribute):
                parts.append(function.attr)
                function = function.value
            parts.append(function.id if isinstance(function, ast.Name) else "")
            found.append((".".join(reversed(parts)), node))
    return found


# Size.


def most_lines(path: Path) -> float:
    """How long a module may be. Networks may be as long as they are deep."""
    folder = path.parent.relative_to(PACKAGE).as_posix()
    if path == PACKAGE / "system.py":
        return BASE_LINES
    return {"nets": float("inf"), "systems": SYSTEM_LINES}.get(folder, FILE_LINES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_is_read_in_one_sitting(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= most_lines(path), f"{name_of(path)} has {lines} lines, at most {most_lines(path)}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "systems").glob("*.py")), ids=name_of)
def test_a_step_fits_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "step":
            lines = node.end_lineno - node.lineno + 1
            assert lines <= STEP_LINES, f"{name_of(path)}: step has {lines} lines, at most {STEP_LINES}"


def test_inheritance_is_one_deep():
    """A class of this project may have one base of this project, and that base none."""
    bases: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [b.id if isinstance(b, ast.Name) else getattr(b, "attr", "") for b in node.bases]
    for name, own in bases.items():
        ours = [base for base in own if base in bases]
        errors = name.endswith("Error") or name.endswith("Exception")
        assert len(ours) <= 1, f"{name} inherits from several of our classes: {ours}"
        for base in ours:
            deeper = [b for b in bases[base] if b in bases]
            assert errors or not deeper, f"{name} inherits from {base}, which inherits from {deeper[0]}"


# Recipes.


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_passes_check(path):
    assert [str(mistake) for mistake in recipe.check(recipe.load(path))] == []


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_short_and_opens_with_its_command(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= RECIPE_LINES
    opening = []
    for line in lines:
        if not line.startswith("#"):
            break
        opening.append(line)
    assert f"python -m anonfw fit {name_of(path)}" in "\n".join(opening), "say the command, its cost and its result"


def test_there_are_recipes():
    assert [path for path in RECIPES if path.parent.name == "recipes"], "recipes/ is empty"


# Imports.


def test_importing_the_package_does_nothing_else(tmp_path):
    """Every module imports, and importing writes no file, prints nothing, and leaves seeds and threads alone."""
    code = (
        "import importlib, random, sys, torch, numpy\n"
        "import lightning  # draws from `random` while it is imported, which is not ours to forbid\n"
        "torch.manual_seed(5); numpy.random.seed(5); random.seed(5)\n"
        "def state():\n"
        "    kind, keys, *rest = numpy.random.get_state()\n"
        "    grad = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()\n"
        "    return torch.get_rng_state().tolist(), keys.tolist(), rest, random.getstate(), grad\n"
        "before = state()\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert state() == before, name\n"
    )
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    command = [sys.executable, "-W", "ignore", "-c", code, *names]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_imports_are_declared():
    """Every third-party module that the package imports belongs to a dependency of pyproject.toml."""
    provided = {"opencv-python": "cv2", "pyyaml": "yaml", "pillow": "PIL", "facenet-pytorch": "facenet_pytorch"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = [re.split(r"[<>=!~ \[;]", line)[0].lower() for line in project["dependencies"] + extra]
    modules = {provided.get(name, name.replace("-", "_").removesuffix("_torch")) for name in declared}
    missing = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top != "anonfw" and top not in modules:
                    missing[top] = name_of(path)
    assert missing == {}


def test_doctor_asks_for_packages_that_are_dependencies():
    from anonfw.doctor import PACKAGES

    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert set(PACKAGES) <= {re.split(r"[<>=!~]", line)[0] for line in dependencies}


# Randomness.


def global_draws(source: str) -> list[str]:
    """`line: call` of each draw from a global random state, and of each seeding of one.

    Inside `with torch.random.fork_rng(...)` torch's state is a private one: layers draw their first weights from it.
    """
    found = []
    tree = ast.parse(source)
    forks = [node for node in ast.walk(tree) if isinstance(node, ast.With) and "fork_rng" in ast.dump(node.items[0])]
    forked = {id(call) for fork in forks for name, call in calls(fork) if name.startswith(("torch.", "nn."))}
    for name, call in calls(tree):
        if id(call) in forked:
            continue
        head, _, last = name.rpartition(".")
        keywords = {keyword.arg for keyword in call.keywords}
        bad = (
            (head == "torch" and (last in TORCH_GLOBAL or last in TORCH_LIKE))
            or (head == "torch" and last in TORCH_DRAWS and "generator" not in keywords)
            or (head.startswith("torch.cuda") and last.startswith(("manual_seed", "seed")))
            or (
                last in TORCH_DRAWS_IN_PLACE
                and "generator" not in keywords
                and not head.startswith(("nn.init", "init"))
            )
            or (head in ("np.random", "numpy.random") and last not in NUMPY_EXPLICIT)
            or (last == "default_rng" and not call.args and not call.keywords)
            or (head == "random" and last != "Random")
            or last in ("seed_everything", "shuffle_")
        )
        if bad:
            found.append(f"{call.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_draws_from_a_global_random_state(path):
    assert global_draws(path.read_text(encoding="utf-8")) == [], "draw from a generator that the caller hands in"


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("torch.manual_seed(0)", True),
        ("torch.Generator().manual_seed(0)", False),
        ("torch.rand(3)", True),
        ("torch.rand(3, generator=rng)", False),
        ("torch.randn_like(x)", True),
        ("x.normal_()", True),
        ("x.normal_(generator=rng)", False),
        ("np.random.seed(0)", True),
        ("np.random.rand(3)", True),
        ("np.random.default_rng(seed)", False),
        ("np.random.default_rng()", True),
        ("random.shuffle(x)", True),
        ("rng.random(3)", False),
        ("lightning.seed_everything(1)", True),
        ("with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)", False),
        ("with torch.random.fork_rng(devices=[]):\n    pass\ntorch.manual_seed(0)", True),
    ],
)
def test_the_randomness_rule_itself(line, bad):
    assert bool(global_draws(line)) is bad


# Nothing of one machine, nothing swallowed.

# Written in pieces, or this file would be its own first finding.
PRIVATE = re.compile(
    r"(?<![\w.$}/])/(?:home|root|Users|work|mnt|scratch)/\w"
    r"|[A-Z]:\\\\?Users"
    r"|file://" r"/"
    r"|(?:extra-)?index-" r"url"
    r"|\b(?:artifactory|nexus|devpi|jfrog)\b"
)  # fmt: skip
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".sbatch", ".txt", ".json", ".cfg", ""}


def test_no_file_names_a_machine():
    found = []
    for path in tracked():
        if path.suffix not in TEXT or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if PRIVATE.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "private"),
    [
        ("path = '/home/somebody/data'", True),
        ("see /root/x", True),
        ("pip install --extra-index-" + "url x", True),
        ("https://example.org/home/page", False),
        ("$HOME/work/data", False),
        ("relative/work/here", False),
    ],
)
def test_the_machine_rule_itself(line, private):
    assert bool(PRIVATE.search(line)) is private


def test_no_large_file_and_no_leftover_is_tracked():
    for path in tracked():
        assert path.stat().st_size <= 31e6, f"{name_of(path)} has {path.stat().st_size / 1e6:.0f} MB"
        assert not path.name.endswith((".partial", ".orig", ".rej", ".ckpt")), name_of(path)


def test_real_photographs_are_named_only_by_tests():
    """The package works without them, so nothing in it may know where they lie."""
    word = "ANONFW_" + "SHARED"
    for path in tracked():
        if path.suffix == ".py" and path.is_relative_to(PACKAGE):
            assert word not in path.read_text(encoding="utf-8"), name_of(path)


def test_makefile_commands_are_listed_and_named_in_the_contributing_guide():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("setup", "demo", "test", "test-slurm", "check", "lint", "bench", "clean"):
        assert f"make {name} " in shown
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "make check" in guide and "make test" in guide


def test_every_rule_of_the_guide_names_an_enforcer_that_exists():
    """CONTRIBUTING.md's table: the last column names tests of this suite, ruff rules, or a person."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line for line in guide.splitlines() if line.startswith("| ") and line.count("|") == 3][1:]
    assert len(rows) >= 10
    tests = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    for row in rows:
        enforcer = row.split("|")[2]
        named = re.findall(r"`(test_\w+)`", enforcer)
        assert named or "ruff" in enforcer or "review" in enforcer, row
        for test in named:
            assert test in tests or (ROOT / "tests" / f"{test}.py").is_file(), f"no test {test}: {row}"
