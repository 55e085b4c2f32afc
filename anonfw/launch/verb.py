"""The verb `launch`: `launch slurm` writes and submits a job, `launch check` looks before a job starts."""

from __future__ import annotations

import argparse
from pathlib import Path

from anonfw.errors import AnonfwError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m anonfw launch`."""
    parser.add_argument("what", choices=("slurm", "check"), help="slurm: submit a job; check: look before a start")
    parser.add_argument("target", metavar="RECIPE", help="a YAML file; with --array a script of data/ or `embed`")
    parser.add_argument(
        "arguments", metavar="key=value", nargs="*", help="overrides; with --array the command's arguments, after `--`"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="one task each (default 0: on CPUs)")
    parser.add_argument("--tasks-per-node", type=int, metavar="T", help="its processes (default: its GPUs, else 1)")
    parser.add_argument("--cpus-per-task", type=int, default=8, metavar="C", help="cores of a process (default 8)")
    parser.add_argument("--time", default="24:00:00", help="limit of one start; the job goes on in the next (24:00:00)")
    parser.add_argument(
        "--lead", type=int, default=300, metavar="SECONDS", help="to save in before the limit (default 300)"
    )
    parser.add_argument("--array", type=int, metavar="N", help="an array job of N tasks: writers of data/, or embed")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="an array job: a run for each line of overrides")
    parser.add_argument("--name", help="of the job (default: the recipe's or the script's)")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="--OPTION=VALUE",
        help="another, such as --partition=gpu",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")


def run(args: argparse.Namespace) -> int:
    """Submits, prints or checks; returns the exit code."""
    from anonfw.launch import check, slurm

    if args.what == "check":
        check.before_start(args.target, args.arguments)
        return 0
    sizes = {name: getattr(args, name) for name in ("nodes", "cpus_per_task", "lead")} | {
        "tasks_per_node": args.tasks_per_node if args.tasks_per_node is not None else max(args.gpus_per_node, 1)
    }
    for name, size in sizes.items():
        if size < 1:
            raise AnonfwError(f"--{name.replace('_', '-')} is at least 1, not {size}")
    if args.gpus_per_node and sizes["tasks_per_node"] != args.gpus_per_node:
        raise AnonfwError(
            f"{args.gpus_per_node} GPUs and {sizes['tasks_per_node']} tasks a node: a task uses one GPU. Leave out "
            "--tasks-per-node"
        )
    shape = slurm.Shape(
        nodes=args.nodes,
        tasks_per_node=sizes["tasks_per_node"],
        gpus_per_node=args.gpus_per_node,
        cpus_per_task=args.cpus_per_task,
        time=args.time,
        lead=args.lead,
        options=tuple(args.sbatch),
    )
    if args.array is not None:
        if args.sweep is not None or args.target.endswith((".yaml", ".yml")):
            raise AnonfwError("--array is for scripts and embed; several trainings are a sweep: --sweep FILE")
        job = slurm.array_job(shape, args.array, [args.target, *args.arguments], args.name)
    else:
        job = slurm.training_job(shape, args.target, args.arguments, args.name, args.sweep)
    if args.dry_run:
        print(job.script, end="")
    else:
        slurm.submit(job)
    return 0
