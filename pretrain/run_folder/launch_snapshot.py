"""Snapshot of a submission by `bd3 launch`: script, configuration, code, plugins and environment."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path

from bd3_common import PACKAGES, ROOT, plugins, safe_path
from bd3_common.atomic import atomic_folder, refuse_link, write_text
from bd3_common.errors import ConfigError
from bd3_common.text import first_hidden, has_token, is_secret, printable, redacted, shorten
from pretrain.config.resolve import save_config
from pretrain.config.schema import RunConfig
from pretrain.run_folder import events, layout
from slurm import client
from slurm.environment import CHAIN
from slurm.options import JobOptions

# Variables that affect computation or communication, each by its name: others may be secrets.
_NAMES = """
PATH LD_LIBRARY_PATH LD_PRELOAD VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV LOADEDMODULES TMPDIR LANG LC_ALL
PYTHONPATH PYTHONSAFEPATH PYTHONHASHSEED PYTHONUNBUFFERED MASTER_ADDR MASTER_PORT BD3_CACHE BD3_PLUGINS BD3_SITE
CUDA_HOME CUDA_PATH CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_DEVICE_MAX_CONNECTIONS CUDA_LAUNCH_BLOCKING
CUDA_MODULE_LOADING CUDA_CACHE_PATH CUBLAS_WORKSPACE_CONFIG
NCCL_ALGO NCCL_ASYNC_ERROR_HANDLING NCCL_BUFFSIZE NCCL_COLLNET_ENABLE NCCL_CROSS_NIC NCCL_CUMEM_ENABLE NCCL_DEBUG
NCCL_DEBUG_SUBSYS NCCL_IB_ADAPTIVE_ROUTING NCCL_IB_DISABLE NCCL_IB_GID_INDEX NCCL_IB_HCA NCCL_IB_QPS_PER_CONNECTION
NCCL_IB_PCI_RELAXED_ORDERING NCCL_IB_RETRY_CNT NCCL_IB_SL NCCL_IB_TC NCCL_IB_TIMEOUT NCCL_MAX_CTAS
NCCL_MAX_NCHANNELS NCCL_MIN_CTAS NCCL_MIN_NCHANNELS NCCL_NET NCCL_NET_GDR_LEVEL NCCL_NET_GDR_READ NCCL_NET_PLUGIN
NCCL_NSOCKS_PERTHREAD NCCL_NTHREADS NCCL_NVLS_ENABLE NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_PROTO NCCL_PXN_DISABLE
NCCL_SHM_DISABLE NCCL_SOCKET_FAMILY NCCL_SOCKET_IFNAME NCCL_SOCKET_NTHREADS NCCL_TIMEOUT NCCL_TOPO_FILE
NCCL_TUNER_PLUGIN GLOO_SOCKET_IFNAME UCX_TLS UCX_NET_DEVICES UCX_IB_GID_INDEX UCX_RNDV_SCHEME
FI_PROVIDER FI_EFA_USE_DEVICE_RDMA FI_EFA_FORK_SAFE FI_CXI_DEFAULT_CQ_SIZE FI_CXI_RX_MATCH_MODE
OMP_NUM_THREADS OMP_PROC_BIND OMP_PLACES OMP_SCHEDULE MKL_NUM_THREADS MKL_DYNAMIC MKL_CBWR OPENBLAS_NUM_THREADS
NVTE_FLASH_ATTN NVTE_FUSED_ATTN NVTE_UNFUSED_ATTN NVTE_ALLOW_NONDETERMINISTIC_ALGO NVTE_DEBUG NVTE_TORCH_COMPILE
PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_NO_CUDA_MEMORY_CACHING PYTORCH_NVML_BASED_CUDA_CHECK
TORCH_CUDA_ARCH_LIST TORCH_EXTENSIONS_DIR TORCH_LOGS TORCH_COMPILE_DISABLE TORCHINDUCTOR_CACHE_DIR
TORCHDYNAMO_DISABLE TORCH_DISTRIBUTED_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT
TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_NCCL_ENABLE_MONITORING TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC
TORCH_NCCL_TRACE_BUFFER_SIZE TRITON_CACHE_DIR
SLURM_CLUSTER_NAME SLURM_CONF SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_PARTITION SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES
SLURM_CPUS_PER_TASK SLURM_NTASKS SLURM_NTASKS_PER_NODE SLURM_SUBMIT_DIR SLURM_SUBMIT_HOST SLURM_CPU_BIND
SLURM_MPI_TYPE SBATCH_ACCOUNT SBATCH_PARTITION SBATCH_QOS SBATCH_RESERVATION SBATCH_EXPORT
"""
_RECORDED = frozenset(_NAMES.split())
_PRIVATE_FILE, _PRIVATE_FOLDER = 0o600, 0o700


class LaunchFolder:
    """The folder ``<root>/launch/<number>``: code, configuration, environment and script of a submission."""

    def __init__(self, root: Path, options: JobOptions):
        if found := re.search(r"[%\\\n]", str(root)):
            raise ConfigError(f"{root}: has {found[0]!r}, which Slurm replaces in names of logs; use another name")
        quote(root)
        refuse_link(root, "run", ConfigError)
        self.root, self.options = root, options
        taken = [int(path.name) for path in (root / layout.LAUNCH).glob("[0-9]*") if path.name.isdecimal()]
        self.name = f"{max(taken, default=-1) + 1:03d}"
        self.folder = root / layout.LAUNCH / self.name
        self.script = self.folder / layout.LAUNCH_SCRIPT
        # Files are copied with the code; modules are found on the job's PYTHONPATH.
        self.plugins = {name: self.folder / "plugins" / Path(name).name for name in plugins.named() if _is_file(name)}
        self.jobs: list[int] = []

    def environment(self) -> list[str]:
        """Shell lines: the site's setup and variables, then this interpreter, the copy of the code and the plugins.

        Raises:
            ConfigError: the project is not installed for this interpreter, or a value cannot be quoted.
        """
        options = self.options
        binaries = os.path.dirname(sys.executable)
        if not os.access(os.path.join(binaries, "bd3"), os.X_OK):
            raise ConfigError(f"{binaries}/bd3: not there; install the project for {sys.executable}: pip install -e .")
        container = [f"--{word.lstrip('-')}" for word in options.srun]
        threads = [] if "OMP_NUM_THREADS" in options.env else ["export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}"]
        names = os.pathsep.join(str(self.plugins.get(name, name)) for name in plugins.named())
        return [
            f"CONTAINER=({quote(*container)})",
            *options.setup,
            *(f"export {name}={quote(value)}" for name, value in options.env.items()),
            *threads,
            f"export {safe_path.VARIABLE}=1",
            f"export PATH={quote(binaries)}:$PATH",
            f"export PYTHONPATH={quote(self.folder / layout.LAUNCH_CODE)}${{PYTHONPATH:+:$PYTHONPATH}}",
            *([f"export {plugins.VARIABLE}={quote(names)}"] if names else []),
        ]

    @contextlib.contextmanager
    def written(self, text: str, files: Mapping[str, RunConfig | str]) -> Iterator[None]:
        """Write the folder, which only its owner can read.

        If the context fails, the jobs submitted in it are cancelled, and what was written is removed.

        Args:
            text: the batch script.
            files: contents by name in the folder, or by absolute path.

        Raises:
            ConfigError, OSError: the folder cannot be written.
        """
        paths = {self.folder / name: content for name, content in files.items()}
        outside = {path: content for path, content in paths.items() if not path.is_relative_to(self.folder)}
        folders = [self.root / layout.LOGS, *(path.parent for path in outside)]
        new = [path for path in outside if not path.exists()]
        made = {path for folder in (*folders, self.folder) for path in folder.parents if not path.exists()}
        made |= {folder for folder in folders if not folder.exists()}
        self.root.mkdir(parents=True, exist_ok=True)
        refuse_link(self.folder.parent, "launch", ConfigError)
        self.folder.parent.mkdir(_PRIVATE_FOLDER, exist_ok=True)
        published = False
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            inside = {path.relative_to(self.folder): content for path, content in paths.items() if path not in outside}
            self._write(inside | {Path(layout.LAUNCH_SCRIPT): text})
            published = True
            for path, content in outside.items():
                _write(path, content)
            yield
            events.record(self.root, "launched", jobs=list(map(str, self.jobs)), launch=self.name)
        except BaseException:
            for number in self.jobs:
                with contextlib.suppress(client.SlurmError):
                    client.call("scancel", str(number))
            if published:
                shutil.rmtree(self.folder, ignore_errors=True)
            for path in new:
                path.unlink(missing_ok=True)
            for folder in sorted(made, reverse=True):  # deeper folders first
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if it is empty
            raise

    def _write(self, files: Mapping[Path, RunConfig | str]) -> None:
        """Write the folder, all of it or nothing, with these files besides code, plugins and environment."""
        try:
            with atomic_folder(self.folder) as folder:
                folder.chmod(_PRIVATE_FOLDER)
                for room in PACKAGES:
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / room, folder / layout.LAUNCH_CODE / room, ignore=ignored)
                for source, target in self.plugins.items():
                    copy = folder / target.relative_to(self.folder)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(source, copy)
                for path, content in files.items():
                    _write(folder / path, content, _PRIVATE_FILE)
                _write(folder / layout.LAUNCH_ENVIRONMENT, _environment_text(), _PRIVATE_FILE)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise ConfigError(f"{self.folder}: another bd3 launch is making it; start this one again") from None

    def submit(self, *options: str) -> int:
        """Submit the script and return the job's number."""
        os.environ.pop(CHAIN, None)  # sbatch passes it on from the job that calls this, if any
        self.jobs.append(client.submit(self.script, *options))
        return self.jobs[-1]


def _write(path: Path, content: RunConfig | str, mode: int = 0o666) -> None:
    if isinstance(content, str):
        write_text(path, content, mode=mode)
    else:
        save_config(content, path, mode)


def _environment_text() -> str:
    lines = [f"python {platform.python_version()} {sys.executable}", *_git_state(), ""]
    lines += [*sorted(f"{found.name}=={found.version}" for found in distributions() if found.name), ""]
    for name in sorted(_RECORDED & os.environ.keys()):
        value = os.environ[name]
        lines.append(f"{name}={'***' if is_secret(name, value) else printable(value)}")
    return "\n".join(lines) + "\n"


def _git_state() -> list[str]:
    """Commit of the code and the files changed since, if it is in a git checkout."""
    folder = Path(__file__).parent
    try:
        answers = [
            subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=20, check=True).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--short", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return ["not in a git checkout"]
    return [f"commit {answers[0].strip()}", *(f"changed {line.strip()}" for line in answers[1].splitlines())]


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py")


def quote(*words: object) -> str:
    """Words quoted for a line of the shell.

    Raises:
        ConfigError: one has a line end or another control character, or is a secret, which a script would keep.
    """
    for word in map(str, words):
        if found := first_hidden(word):
            raise ConfigError(f"{word}: has {found}, which cannot stand in a job's script; use another name")
        if has_token(word):
            shown = shorten(redacted(word)) if redacted(word) != word else shorten(word, 12)
            raise ConfigError(f"{shown}: looks like a secret, which a job's script would keep; give it another way")
    return " ".join(shlex.quote(str(word)) for word in words)
