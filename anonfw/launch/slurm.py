"""SLURM jobs: the templates of `launch/` with their `#SBATCH` lines and arguments filled in, and their submission."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from anonfw import recipe as recipes
from anonfw.data.files import atomic
from anonfw.errors import AnonfwError

JOB_KEYS = ("trainer.num_nodes", "trainer.devices", "trainer.accelerator")  # the script sets them from the allocation
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclass(frozen=True)
class Shape:
    """What a job asks the cluster for.

    Attributes:
        nodes, tasks_per_node, gpus_per_node, cpus_per_task: of each node; 0 GPUs is a job on CPUs.
        time: limit of one start, in sbatch's notation.
        lead: seconds before the limit at which the run is told to save itself.
        options: further options for sbatch.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 8
    time: str = "24:00:00"
    lead: int = 300
    options: tuple[str, ...] = ()

    def lines(self) -> dict[str, str]:
        """sbatch's options.

        Raises:
            AnonfwError: a time or a further option that is not sbatch's notation, or one that is set here already.
        """
        if not TIME.fullmatch(self.time):
            raise AnonfwError(f"--time {self.time}: expected minutes, H:MM:SS or D-HH:MM:SS")
        made = {"nodes": str(self.nodes), "ntasks-per-node": str(self.tasks_per_node)}
        if self.gpus_per_node:
            made["gpus-per-node"] = str(self.gpus_per_node)
        made |= {"cpus-per-task": str(self.cpus_per_task), "time": self.time, "signal": f"USR1@{self.lead}"}
        for option in self.options:
            name, equals, value = option.removeprefix("--").partition("=")
            if not option.startswith("--") or name in made:
                raise AnonfwError(f"--sbatch {option}: expected --OPTION=VALUE, and none that launch sets itself")
            made[name] = value if equals else ""
        return made


class Job(NamedTuple):
    """A script and the file that it is kept in."""

    script: str
    file: Path


def training_job(
    shape: Shape, recipe: str, overrides: Sequence[str], name: str | None = None, sweep: Path | None = None
) -> Job:
    """The job that trains a recipe, or the array job that trains it with each line of `sweep`.

    The run folder is chosen here, so that all ranks and all starts of the job use the same one.

    Raises:
        AnonfwError: an override that the script sets itself, or an empty sweep. RecipeError: mistakes in the recipe.
    """
    from anonfw.training import runs

    for override in overrides:
        if override.partition("=")[0] in JOB_KEYS:
            raise AnonfwError(f"{override}: the job sets it from --nodes, --gpus-per-node and --tasks-per-node")
    lines = sweep_lines(sweep) if sweep is not None else []
    checked = [recipes.read(recipe, [*overrides, *shlex.split(line)]) for line in lines or [""]]
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.gmtime())
    given = [override for override in overrides if override.startswith("run=")]
    folder = Path(given[-1].removeprefix("run=")) if given else runs.ROOT / checked[0].name / stamp
    if sweep is not None and given:
        raise AnonfwError(f"{given[-1]}: the runs of a sweep need a folder each; leave it out")
    options = shape.lines() | {"job-name": name or checked[0].name}
    options["output"] = f"{folder}.%x-%A_%a.out" if lines else f"{folder}.%x-%j.out"
    settings = [f"export PYTHON={shlex.quote(sys.executable)}"]
    run = f"run={shlex.quote(str(folder))}"
    if sweep is not None:
        options["array"] = f"0-{len(lines) - 1}"
        settings.append(f"export SWEEP={shlex.quote(str(sweep.resolve()))}")
        run += "_$SLURM_ARRAY_TASK_ID"
    words = [recipe, *(override for override in overrides if not override.startswith("run="))]
    settings.append(f"set -- {shlex.join(words)} {run}")
    return Job(filled("slurm.sbatch", options, settings), Path(f"{folder}.sbatch"))


def sweep_lines(sweep: Path) -> list[str]:
    """The lines of overrides, quoted as in a shell.

    Raises:
        AnonfwError: no such file, or an empty file or line.
    """
    try:
        lines = sweep.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise AnonfwError(f"--sweep {sweep}: {error.strerror}") from error
    if not lines or not all(line.strip() for line in lines):
        raise AnonfwError(f"--sweep {sweep}: expected a line of overrides for each run, none of them empty")
    return lines


def array_job(shape: Shape, tasks: int, command: Sequence[str], name: str | None = None) -> Job:
    """The array job that runs a script of data/ or a verb with `--part I/N`. A script's last part joins all of them.

    Raises:
        AnonfwError: no task, more than one node or process a task, or no such script.
    """
    if tasks < 1:
        raise AnonfwError(f"--array is at least 1, not {tasks}")
    if shape.nodes > 1 or shape.tasks_per_node > 1:
        raise AnonfwError("a task of an array is one process on one node; it has its own --workers")
    if command[0].endswith(".py") and not Path(command[0]).is_file():
        raise AnonfwError(f"no script {command[0]}")
    stem = Path(command[0]).stem
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.gmtime())
    kept = Path("runs") / "arrays" / f"{stem}-{stamp}"
    options = shape.lines() | {"job-name": name or stem, "array": f"0-{tasks - 1}", "output": f"{kept}.%x-%A_%a.out"}
    del options["signal"]  # a writer and `embed` continue from any moment
    settings = [f"export PYTHON={shlex.quote(sys.executable)}", f"set -- {shlex.join(command)}"]
    return Job(filled("array.sbatch", options, settings), Path(f"{kept}.sbatch"))


def filled(name: str, options: dict[str, str], settings: Sequence[str]) -> str:
    """A template of `launch/` with these `#SBATCH` options instead of its own (its others stay), and these settings."""
    head, _, body = template(name).partition("\n\n")
    lines = head.splitlines()
    own = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")]
    merged = {key: value for key, _, value in own} | options
    if "signal" not in options:
        merged.pop("signal", None)
    shown = [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in merged.items()]
    comments = [line for line in lines if not line.startswith("#SBATCH")][:2]
    written = f"# Written by `python -m anonfw {shlex.join(sys.argv[1:])}`."
    return "\n".join([*comments, written, *shown, *settings]) + "\n\n" + body


def template(name: str) -> str:
    """The text of a file of `launch/`, from the repository or from the installed package."""
    package = Path(__file__).parent
    for place in (package / "templates", package.parent.parent / "launch"):
        if (place / name).is_file():
            return (place / name).read_text(encoding="utf-8")
    raise AnonfwError(f"the template launch/{name} is missing: install anonfw again")


def submit(job: Job) -> str:
    """Keeps the script in its file, hands it to sbatch, and says what comes next. Returns the job's number.

    Raises:
        AnonfwError: no sbatch on this machine, or it refuses the job; with its words.
    """
    if shutil.which("sbatch") is None:
        raise AnonfwError("no sbatch here: submit from a login node, or print the script with --dry-run")
    job.file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(job.file) as file:
        file.write(job.script.encode())
    # A job that is submitted from inside another one must not inherit its shape.
    traces = tuple(name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in traces}
    command = ["sbatch", "--parsable", str(job.file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise AnonfwError(f"sbatch refuses {job.file}: {why}")
    number = done.stdout.strip().partition(";")[0]
    output = re.search(r"^#SBATCH --output=(.*)$", job.script, re.MULTILINE).group(1)
    print(f"job {number}: script {job.file}, output {output}")
    print(f"look: squeue --job={number}    end: scancel {number}    go on after an end: sbatch {job.file}")
    return number
