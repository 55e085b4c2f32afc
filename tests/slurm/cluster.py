"""A real SLURM cluster on one machine: munged, slurmctld and a slurmd a node, in a private folder, on free ports.

    python tests/slurm/cluster.py sinfo            # start it, run a command in it, tear it down
    python tests/slurm/cluster.py bash             # the same, by hand

Needs Debian's `slurm-wlm` and `munge`; installs nothing, writes nothing outside its folder. The daemons die with the
process that started them, even when that one is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Debian puts daemons where an ordinary PATH does not look.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
NODES = ("n1", "n2")
START_SECONDS = 60
# How long a job may take on a machine that does ten other things; alone it takes a tenth of it.
PATIENCE = 1200
PR_SET_PDEATHSIG = 1

CONF = """\
ClusterName=anonfw
SlurmctldHost=localhost
SlurmctldPort={ctld}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout={dead_after}
MinJobAge=600
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The tools that this machine lacks."""
    return [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def wait_for(what: str, true: Callable[[], bool], seconds: float, log: Callable[[], str] = str) -> None:
    """Polls until it is true.

    Raises:
        TimeoutError: not within `seconds`; with what `log` says then.
    """
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s\n{log()}")
        time.sleep(0.2)


class DaemonError(Exception):
    """A daemon has ended."""


class Cluster:
    """Context manager. `node_cpus` says how many tasks fit on each of the two nodes; they share this machine.

    Args:
        dead_after: seconds after which a node that does not answer counts as dead.
    Raises:
        TimeoutError: the daemons do not come up; with their logs.
    """

    def __init__(self, node_cpus: int = 4, dead_after: int = 10) -> None:
        self.node_cpus, self.dead_after = node_cpus, dead_after
        self.folder = Path()
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        for attempt in range(3):  # another program may take a port between our look and the daemon's
            try:
                self._start()
                return self
            except (TimeoutError, DaemonError):
                self.stop()
                if attempt == 2:
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="anonfw-slurm-"))
        ctld, *ports = free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={self.node_cpus} "
            "RealMemory=1000 Gres=gpu:2 State=UNKNOWN"
            for name, port in zip(NODES, ports, strict=True)
        ]
        self.conf.write_text(
            CONF.format(
                ctld=ctld,
                folder=self.folder,
                user=subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip(),
                dead_after=self.dead_after,
                nodes="\n".join(nodes),
            )
        )
        # Not real, but enough for SLURM to judge, place and number jobs that ask for GPUs.
        devices = ("/dev/null", "/dev/zero")
        gpus = [f"NodeName={','.join(NODES)} Name=gpu File={device}" for device in devices]
        (self.folder / "gres.conf").write_text("\n".join(gpus) + "\n")
        # Nothing here uses cgroups; left to choose, slurmd takes the plugin for v2, which wants systemd.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        here = self.folder
        self._daemon(
            "munged", "-F", "--force", f"--key-file={key}", f"--socket={here}/munge.socket",
            f"--pid-file={here}/munged.pid", f"--seed-file={here}/munged.seed",
        )  # fmt: skip
        self._up("munged", (here / "munge.socket").exists)
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self.start_node(name)
        self._up("both nodes", lambda: self._idle() == set(NODES))

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def environment(self) -> dict[str, str]:
        """The environment for commands in this cluster: ours, without traces of a job that this may run in."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return ours | {"SLURM_CONF": str(self.conf), "PATH": PATH}

    def run(self, *command: str, check: bool = True, seconds: float = 60, **more: object) -> str:
        """Standard output of a command in this cluster."""
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=seconds,
            stdin=subprocess.DEVNULL, **more,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start_node(self, name: str) -> None:
        """Starts the slurmd of a node."""
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self._daemon(f"slurmd-{name}", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """What a power cut does: the node's daemon and all its processes are gone, and nobody is told."""
        self._daemons.pop(f"slurmd-{name}").kill()
        for process in self.processes(f"ANONFW_DAEMON=slurmd-{name}") + self.processes(f"SLURMD_NODENAME={name}"):
            _kill(process)

    def states(self, job: str) -> tuple[str, int, str]:
        """(state, restarts, exit code as `CODE:SIGNAL`) of a job."""
        fields = dict(
            part.split("=", 1) for part in self.run("scontrol", "-o", "show", "job", job).split() if "=" in part
        )
        return fields["JobState"], int(fields["Restarts"]), fields["ExitCode"]

    def start_now(self, job: str) -> None:
        """SLURM puts a requeued job off for minutes; here for seconds. (Within the second in which its old credential
        was revoked the new one would count as revoked, too.)
        """
        wait_for("the end of the first start", lambda: self.states(job)[0] != "COMPLETING", PATIENCE)
        self.run("scontrol", "update", f"jobid={job}", "starttime=now+5", check=False)  # it may run already

    def wait(self, job: str, wanted: Callable[[str, int], bool], seconds: float, output: Callable[[], Path]) -> None:
        """Until `wanted(state, restarts)`; ends early when the job has ended otherwise. `output`: the job's, to show.

        Raises:
            TimeoutError, RuntimeError: with the job's output.
        """
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}
        seen: list[tuple[str, int, str]] = []

        def said() -> str:
            text = output().read_text() if output().exists() else ""
            return f"states of job {job}: {seen}\n{text[-6000:]}\n{self.logs()}"

        def arrived() -> bool:
            found = self.states(job)
            if not seen or seen[-1] != found:
                seen.append(found)
            state, restarts, _ = found
            if wanted(state, restarts):
                return True
            if state in ended:
                raise RuntimeError(f"the job has ended\n{said()}")
            return False

        wait_for(f"job {job}", arrived, seconds, said)

    def processes(self, *variables: str) -> list[int]:
        """Processes whose environment names our slurm.conf and has these variables: a start of `NAME=VALUE` each."""
        starts = [f"SLURM_CONF={self.conf}".encode(), *(variable.encode() for variable in variables)]
        ours = {os.getpid(), *(daemon.pid for daemon in self._daemons.values())}
        found = []
        for place in Path("/proc").iterdir():
            if not place.name.isdigit() or int(place.name) in ours:
                continue
            try:
                environment = (place / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended, or belongs to somebody else
                continue
            if all(any(part.startswith(start) for part in environment) for start in starts):
                found.append(int(place.name))
        return found

    def tasks(self) -> list[int]:
        """Processes that jobs have started: none are left when all jobs have ended."""
        return self.processes("SLURM_JOB_ID=")

    def logs(self) -> str:
        """The end of each daemon's log."""
        found = [*self.folder.glob("*.log"), *self.folder.glob("*.log")]
        return "\n".join(f"-- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted(found))

    def stop(self) -> None:
        """Ends the daemons and whatever their jobs have left, and removes the folder. May be called twice."""
        for daemon in reversed(list(self._daemons.values())):
            daemon.terminate()
        until = time.monotonic() + 10
        for daemon in self._daemons.values():
            try:
                daemon.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        if self.folder.name:
            for process in self.processes():
                _kill(process)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = Path()

    def _daemon(self, name: str, *arguments: str) -> None:
        tool = name.partition("-")[0]
        with (self.folder / f"{name}.log").open("a") as errors:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(tool, path=PATH), *arguments], env=self.environment() | {"ANONFW_DAEMON": name},
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, cwd=self.folder, preexec_fn=_die_with_us,
            )  # fmt: skip

    def _up(self, what: str, true: Callable[[], bool]) -> None:
        def arrived() -> bool:
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise DaemonError(f"{name} has ended with code {daemon.returncode}\n{self.logs()}")
            return true()

        wait_for(what, arrived, START_SECONDS, self.logs)

    def _idle(self) -> set[str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %t"], env=self.environment(), capture_output=True, text=True, timeout=30
        )
        return {line.split()[0] for line in done.stdout.splitlines() if line.split()[1:] == ["idle"]}


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    with Cluster() as cluster:
        sys.exit(subprocess.run(sys.argv[1:] or ["sinfo"], env=cluster.environment()).returncode)
