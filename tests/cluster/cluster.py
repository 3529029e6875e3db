"""A real Slurm cluster on one machine: controller, nodes, fake GPUs, and power switches for all of them.

Every machine of the cluster is a process with namespaces of its own (network, host name, processes, mounts), wired to a
bridge in the namespace of the ``switch``. None of the namespaces has a name and none of the addresses is seen outside,
so that any number of clusters run side by side, and nothing of a cluster outlives its processes. These are killed
by the kernel when the process that started the cluster ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests import polling

COMMANDS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "ip", "unshare", "nsenter", "setpriv")
CLIENTS = ("sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "salloc")
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc")
NETWORK = "10.99.0"
HOST = {"switch": 1, "head": 2, "node": 10}  # last octets; node k has HOST["node"] + k
PREFIX = "bd3-cluster-"
SLOW = polling.TIMEOUT  # seconds that a command or daemon may take on a busy machine

DONE = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"})

# TaskPlugin, ProctrackType: without cgroups. ReturnToService, SlurmdTimeout and intervals: a node that is lost or comes
# back is noticed in seconds, not minutes. cred_expire: a requeued job is held back until its credential has expired.
# MessageTimeout: a message that a busy machine does not answer in time is sent again a minute later, when it may end a
# step of the job's next start. SlurmdParameters, CPUs: nodes may claim more cores than there are. MinJobAge: jobs can
# be asked about to the end.
CONFIG = """\
ClusterName=test
SlurmctldHost=head({network}.2)
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/state/slurmctld.pid
SlurmdPidFile={root}/spool/%n/slurmd.pid
SlurmctldLogFile={root}/log/head.log
SlurmdLogFile={root}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
BatchStartTimeout=10
KillWait=10
MessageTimeout=30
MinJobAge=3600
JobRequeue=1
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 MaxTime=INFINITE State=UP
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 MaxTime=INFINITE State=UP
PartitionName=short Nodes=ALL PriorityTier=10 MaxTime=10 State=UP
"""

# What each machine does once it is wired: its process 1 collects orphans and never ends by itself. The switch also
# runs munged, so that the controller can be lost without it.
BOOT = """\
read -r wired || exit 1
ulimit -c 0
hostname {name}
mount --bind {root}/hosts /etc/hosts
mount -t tmpfs -o size=4g shm /dev/shm
ip link set lo up
{daemon} </dev/null >/dev/null 2>>{root}/log/{name}.err &
wait
while :; do sleep 3600 & wait; done
"""
DAEMONS = {
    "switch": "munged --foreground --force --key-file={root}/munge/key --socket={root}/munge/socket "
    "--pid-file={root}/munge/pid --log-file={root}/log/munged.log --seed-file={root}/munge/seed",
    "head": "slurmctld -D",
    "node": "slurmd -D -N {name}",
}


class ClusterError(RuntimeError):
    """The cluster did not do in time what was asked of it, or a command failed."""


def missing() -> str | None:
    """Why no cluster can run here, in a few words; None where one can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (tests/cluster/install.sh)"
    tried = subprocess.run(
        [*UNSHARE, "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True,
        text=True,
    )
    return f"namespaces are not permitted ({tried.stderr.strip()})" if tried.returncode else None


def until(
    condition: Callable[[], object], timeout: float = SLOW, what: str | Callable[[], str] = "", every: float = 0.1
):
    """Poll ``condition`` and return its first true value.

    Raises:
        ClusterError: it was not true within ``timeout`` seconds; says ``what`` was waited for.
    """
    try:
        return polling.until(condition, timeout, what, every)
    except TimeoutError as error:
        raise ClusterError(str(error)) from None


class Cluster:
    """A cluster of ``nodes`` nodes ``node1``, ``node2``, ..., each with ``gpus`` fake GPUs.

    Partitions: ``main`` (the default), ``low`` (its jobs are requeued when ``main`` wants the nodes, 10 s after a
    warning), ``short`` (at most 10 minutes).

    Attributes:
        root: folder of the cluster: configuration, state, ``log/``. Everyone on the machine may read it.
    """

    def __init__(self, nodes: int = 4, gpus: int = 2, cpus: int = 64):
        self.gpus, self.cpus = gpus, cpus
        self.nodes = [f"node{k + 1}" for k in range(nodes)]
        self.root = Path()
        self._machines: dict[str, subprocess.Popen] = {}
        self._lock: int | None = None

    def start(self) -> Cluster:
        """Boot the cluster and wait until all nodes are idle."""
        sweep()
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = _locked(self.root)
        try:
            self._write_files()
            for name in ["switch", "head", *self.nodes]:
                self.power_on(name, wait=False)
            self.wait_idle()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every process of the cluster and remove its folder. May be called at any time, more than once."""
        for name in reversed(list(self._machines)):
            self.power_off(name)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            shutil.rmtree(self.root)

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    # Machines

    def power_off(self, name: str) -> None:
        """Power loss of a node, or of the controller (``head``): all its processes are gone at once."""
        machine = self._machines.pop(name, None)
        if machine is not None:
            machine.kill()  # unshare takes process 1 with it, process 1 its namespaces, and these the network card
            machine.wait()

    def power_on(self, name: str, wait: bool = True) -> None:
        """Boot a machine that is off; with ``wait`` until Slurm sees it."""
        if name in self._machines:
            return
        kind = name if name in DAEMONS else "node"
        daemon = DAEMONS[kind].format(root=self.root, name=name)
        boot = BOOT.format(root=self.root, name=name, daemon=daemon)
        machine = subprocess.Popen(
            [*UNSHARE, "bash", "-c", boot],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={"PATH": os.environ["PATH"], "SLURM_CONF": str(self.root / "slurm.conf")},
        )
        self._machines[name] = machine
        booted = time.time()
        self._wire(name, kind)
        machine.stdin.write(b"wired\n")
        machine.stdin.close()
        if kind == "switch":
            until((self.root / "munge" / "socket").exists, SLOW, "munged listens")
        if wait and kind == "head":
            until(lambda: self.run("scontrol", "ping", check=False).returncode == 0, SLOW, "the controller answers")
        if wait and kind == "node":
            until(lambda: self._registered(name) >= int(booted), SLOW, f"{name} has registered")

    def cut(self, name: str) -> None:
        """Take a machine off the network; its processes go on."""
        self._in("switch", ["ip", "link", "set", name, "down"])

    def mend(self, name: str) -> None:
        """Undo :meth:`cut`."""
        self._in("switch", ["ip", "link", "set", name, "up"])

    def processes(self, name: str) -> list[str]:
        """Command lines of the processes on a machine, without its own process 1 and daemon."""
        lines = self._in(name, ["ps", "-eo", "args="], namespaces=("--pid", "--mount")).stdout.splitlines()
        return [line for line in lines if not line.startswith(("bash -c read", "slurm", "munged", "sleep 3600", "ps "))]

    # Commands

    def run(
        self,
        *command: object,
        check: bool = True,
        timeout: float = SLOW,
        user: str | None = None,
        env: Mapping[str, object] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess:
        """Run a command on the switch, which is the cluster's login node, in ``cwd`` (``root/jobs``).

        Args:
            check: raise when the exit status is not 0.
            user: name of the user to run as; else root.
            env: variables to add to this process's own.

        Raises:
            ClusterError: the command failed or took more than ``timeout`` seconds.
        """
        words = [str(word) for word in command]
        if user is not None:
            words = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", *words]
        try:
            done = self._in("switch", words, env=env, cwd=cwd, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"{shlex.join(words)}: not done in {timeout} s: {error.output} {error.stderr}") from None
        if check and done.returncode:
            raise ClusterError(f"{shlex.join(words)}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return done

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a program outside of the cluster finds the Slurm commands and the cluster."""
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        return {"PATH": path, "SLURM_CONF": str(self.root / "slurm.conf")}

    def sbatch(self, *arguments: object, script: str | None = None, **options) -> int:
        """Submit ``arguments`` (or the text of a script, after options) and return the job's number."""
        if script is not None:
            handle, name = tempfile.mkstemp(dir=self.root / "jobs", suffix=".sbatch")
            with os.fdopen(handle, "w") as file:
                file.write(script if script.startswith("#!") else f"#!/bin/bash\n{script}")
            os.chmod(name, 0o755)
            arguments = (*arguments, name)
        return int(self.run("sbatch", "--parsable", *arguments, **options).stdout)

    def scontrol(self, *arguments: object, **options) -> str:
        return self.run("scontrol", *arguments, **options).stdout

    def job(self, job: int) -> dict[str, str]:
        """What ``scontrol show job`` says, by its names (JobState, Reason, Restarts, NodeList, ExitCode, ...)."""
        return _fields(self.scontrol("--oneliner", "show", "job", job))

    def wait_for(
        self, job: int, condition: str | Callable[[dict[str, str]], object], timeout: float = SLOW
    ) -> dict[str, str]:
        """Wait for a job's state, or for a condition on what :meth:`job` says, and return that.

        Raises:
            ClusterError: not in time, or the job has ended in another state; says what became of it.
        """
        seen: dict[str, str] = {}

        def holds() -> bool:
            seen.update(self.job(job))
            if isinstance(condition, str):
                if seen["JobState"] in DONE - {condition}:
                    raise ClusterError(f"job {job} is not {condition} but {self._story(seen)}")
                return seen["JobState"] == condition
            return bool(condition(seen))

        wanted = condition if isinstance(condition, str) else "as wanted"
        until(holds, timeout, lambda: f"job {job} is {wanted}; it is {self._story(seen)}", every=0.2)
        return seen

    def wait_done(self, job: int, timeout: float = SLOW) -> dict[str, str]:
        """Wait until a job has ended, in whatever state."""
        return self.wait_for(job, lambda seen: seen["JobState"] in DONE, timeout)

    def node_state(self, name: str) -> str:
        """A node's state in the words of sinfo, without the marks for not answering and the like."""
        state = self.run("sinfo", "-h", "-N", "-n", name, "-p", "main", "-o", "%T").stdout.strip()
        return state.rstrip("*~#!%$@^-+")

    def wait_idle(self, timeout: float = SLOW) -> None:
        """Wait until all nodes are idle."""

        def states() -> str:
            return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N:%T", check=False).stdout

        def idle() -> bool:
            return sorted(states().split()) == [f"{name}:idle" for name in self.nodes]

        until(idle, timeout, lambda: f"all nodes are idle; they are {' '.join(states().split())}; {self._errors()}")

    def tidy(self) -> None:
        """Cancel all jobs, boot what is off, take back what was drained, and wait until all nodes are idle."""
        self.power_on("head")
        self.run("bash", "-c", "squeue -h -o %A | xargs -r scancel --signal=KILL --full", check=False)
        self.run("bash", "-c", "squeue -h -o %A | xargs -r scancel", check=False)
        for name in self.nodes:
            self.mend(name) if name in self._machines else self.power_on(name, wait=False)
            if self.node_state(name).startswith("drain"):
                self.scontrol("update", f"NodeName={name}", "State=RESUME")
        self.wait_idle()

    # The parts

    def _write_files(self) -> None:
        root = self.root
        root.chmod(0o755)
        for name in ["bin", "dev", "jobs", "log", "munge", "state", *(f"spool/{node}" for node in self.nodes)]:
            (root / name).mkdir(parents=True)
        (root / "jobs").chmod(0o777)
        (root / "munge" / "key").write_bytes(os.urandom(1024))
        (root / "munge" / "key").chmod(0o600)
        hosts = {f"{NETWORK}.{self._octet(name)}": name for name in ["switch", "head", *self.nodes]}
        lines = [f"{address} {name}" for address, name in hosts.items()]
        (root / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        for gpu in range(self.gpus):  # a plain file would give an empty CUDA_VISIBLE_DEVICES
            os.mknod(root / "dev" / f"gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (root / "gres.conf").write_text(f"Name=gpu File={root}/dev/gpu[0-{self.gpus - 1}]\n")
        nodes = [
            f"NodeName={name} NodeAddr={NETWORK}.{self._octet(name)} CPUs={self.cpus} RealMemory=500000 "
            f"Gres=gpu:{self.gpus} State=UNKNOWN"
            for name in self.nodes
        ]
        (root / "slurm.conf").write_text(CONFIG.format(root=root, network=NETWORK, nodes="\n".join(nodes)))

    def _wire(self, name: str, kind: str) -> None:
        address = f"{NETWORK}.{self._octet(name)}/24"
        if kind == "switch":
            commands = "link add br0 type bridge", f"addr add {address} dev br0", "link set br0 up"
            for command in commands:
                self._in(name, ["ip", *command.split()])
            for client in CLIENTS:
                wrapper = self.root / "bin" / client
                wrapper.write_text(
                    f'#!/bin/sh\nexec nsenter -t {self._first(name)} --net {shutil.which(client)} "$@"\n'
                )
                wrapper.chmod(0o755)
            return
        peer = f"peer name eth0 netns {self._first(name)}"
        with contextlib.suppress(ClusterError):  # the card of a machine that just lost its power may still be there
            self._ip("switch", f"link del {name}")
        self._ip("switch", f"link add {name} type veth {peer}")
        self._ip("switch", f"link set {name} master br0 up")
        self._ip(name, f"addr add {address} dev eth0")
        self._ip(name, "link set eth0 up")

    def _ip(self, name: str, command: str) -> None:
        done = self._in(name, ["ip", *command.split()])
        if done.returncode:
            raise ClusterError(f"ip {command}: {done.stderr.strip()}")

    def _in(
        self,
        name: str,
        command: list[str],
        namespaces: tuple[str, ...] = ("--net",),
        env: Mapping[str, object] | None = None,
        cwd: Path | None = None,
        timeout: float = SLOW,
    ) -> subprocess.CompletedProcess:
        variables = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}
        variables.update({key: str(value) for key, value in (env or {}).items()})
        enter = ["nsenter", "-t", str(self._first(name)), *namespaces]
        return subprocess.run(
            enter + command,
            capture_output=True,
            text=True,
            env=variables,
            cwd=cwd or self.root / "jobs",
            timeout=timeout,
        )

    def _registered(self, name: str) -> float:
        """When the node daemon that the controller knows of was started; 0 for none. In whole seconds."""
        seen = _fields(self.scontrol("--oneliner", "show", "node", name))
        try:
            started = time.mktime(time.strptime(seen["SlurmdStartTime"], "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            return 0
        return 0 if "DOWN" in seen["State"] else started

    def _first(self, name: str) -> int:
        """Process 1 of a machine, as it is numbered outside."""
        machine = self._machines[name]
        children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children")

        def first() -> int:
            if machine.poll() is not None:
                raise ClusterError(f"{name} ended with {machine.returncode}; {self._errors()}")
            try:
                found = children.read_text().split()
            except (FileNotFoundError, ProcessLookupError):  # it has ended since
                return 0
            return int(found[0]) if found else 0  # unshare forks when it has made the namespaces

        return until(first, SLOW, f"{name} has a process 1", every=0.005)

    def _octet(self, name: str) -> int:
        return HOST[name] if name in HOST else HOST["node"] + int(name.removeprefix("node"))

    def _story(self, seen: Mapping[str, str]) -> str:
        names = ("JobState", "Reason", "ExitCode", "Restarts", "NodeList", "StdErr")
        text = " ".join(f"{name}={seen.get(name)}" for name in names)
        with contextlib.suppress(OSError):
            text += "\n" + "".join(Path(seen["StdErr"]).read_text(errors="replace").splitlines(True)[-20:])
        return text

    def _errors(self) -> str:
        """The errors in the daemons' logs."""
        logs = sorted((self.root / "log").iterdir())
        lines = [f"{log.name}: {line}" for log in logs for line in log.read_text(errors="replace").splitlines()]
        return "\n".join([line for line in lines if re.search(r"error|fatal", line)][-20:])


def sweep() -> None:
    """Remove the folders of clusters whose process was killed before it could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > 60:  # else its process may be about to lock it
                os.close(_locked(folder))
                shutil.rmtree(folder)


def _locked(folder: Path) -> int:
    """An open file that holds the folder's lock; OSError while another process has it."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _fields(line: str) -> dict[str, str]:
    """``A=1 B=two words C=(null)``, as scontrol prints it."""
    return {match[1]: match[2] for match in re.finditer(r"(\S+?)=(.*?)(?=\s+[^\s=]+=|\s*$)", line.strip())}
