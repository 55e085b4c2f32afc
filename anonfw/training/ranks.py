"""What all processes of a run must agree on before Lightning has connected them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from anonfw.errors import AnonfwError

# Lightning's own launcher starts the other processes of a node with the first one's environment: it carries the answer.
INHERITED = "ANONFW_DECISION"
PATIENCE = timedelta(minutes=5)
_open_stores: list[Any] = []  # a server that closed before Lightning connects would take its clients down


def decided_once(decide: Callable[[], Any], patience: timedelta = PATIENCE) -> Any:
    """What `decide` returns on rank 0, on every rank; JSON values only. No other rank calls it.

    Under srun and torchrun the ranks meet at the address that Lightning will use, and torch keeps that server for it.

    Raises:
        AnonfwError: on rank 0 what `decide` raises; on any rank, that the others did not come.
        SystemExit: on the other ranks, with exit code 2, where `decide` raised on rank 0, which says why.
    """
    import torch.distributed
    from lightning.pytorch.plugins.environments import LightningEnvironment

    cluster = launched_by()
    if cluster is None:
        cluster = LightningEnvironment()
        first = cluster.local_rank() == 0 and cluster.node_rank() == 0
        if not first and INHERITED in os.environ:
            return json.loads(os.environ[INHERITED])
        if not first:
            raise AnonfwError("several nodes without a launcher: start every process with srun or torchrun (SLURM.md)")
        value = decide()
        os.environ[INHERITED] = json.dumps(value)
        return value
    if cluster.world_size() == 1:
        return decide()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    rank, world = cluster.global_rank(), cluster.world_size()
    try:
        store, *_ = next(torch.distributed.rendezvous("env://", rank, world, timeout=patience))
        _open_stores.append(store)
        place = f"anonfw/{len(_open_stores)}"
        if rank == 0:
            return _publish(store, place, world, decide)
        answer = json.loads(store.get(f"{place}/decision"))
        store.set(f"{place}/heard/{rank}", "")
    except torch.distributed.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise AnonfwError(
            f"rank {rank} of {world} did not meet the others at {address} "
            f"within {patience.total_seconds():.0f} s: is every process running, and that address reachable? ({error})"
        ) from error
    if "value" not in answer:
        raise SystemExit(2)
    return answer["value"]


def launched_by() -> Any | None:
    """Lightning's plugin for torchrun or srun, whichever started this process; None where Lightning starts the others.

    Lightning would take SIGUSR1 under srun and save inside the handler: training/preemption.py does that instead.
    """
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None


def _publish(store: Any, place: str, world: int, decide: Callable[[], Any]) -> Any:
    try:
        value = decide()
    except BaseException:
        store.set(f"{place}/decision", "{}")  # or the others would wait for it
        with suppress(RuntimeError):  # this process, and the server with it, ends when they have heard
            store.wait([f"{place}/heard/{rank}" for rank in range(1, world)], timedelta(seconds=10))
        raise
    store.set(f"{place}/decision", json.dumps({"value": value}))
    return value


def is_first() -> bool:
    """Whether this process is rank 0: the one that prints and writes."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return rank_zero_only.rank == 0
