"""Snapshot of a submission by `bd3 launch`: script, configuration, code, plugins and environment."""

from __future__ import annotations

import contextlib
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

from bd3_common import PACKAGES, ROOT, plugins
from bd3_common.atomic import write_text
from bd3_common.errors import ConfigError
from pretrain.config.resolve import save_config
from pretrain.config.schema import RunConfig
from pretrain.run_folder import events, layout
from slurm import client
from slurm.environment import CHAIN
from slurm.options import JobOptions

# Variables that affect computation or communication.
_RECORDED = (
    *("CUDA_", "NCCL_", "UCX_", "FI_", "OMP_", "MKL_", "NVTE_", "TORCH", "PYTHON", "MASTER_", "SLURM_", "BD3_"),
    *("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LOADEDMODULES"),
)


class LaunchFolder:
    """The folder ``<root>/launch/<number>``: code, configuration, environment and script of a submission."""

    def __init__(self, root: Path, options: JobOptions):
        name = " ".join(str(root).split())
        if found := re.search(r"[%\\\n]", str(root)):
            raise ConfigError(f"{name}: has {found[0]!r}, which Slurm replaces in names of logs; use another name")
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
            ConfigError: the project is not installed for this interpreter.
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
            f"export PATH={quote(binaries)}:$PATH",
            f"export PYTHONPATH={quote(self.folder / layout.LAUNCH_CODE)}${{PYTHONPATH:+:$PYTHONPATH}}",
            *([f"export {plugins.VARIABLE}={quote(names)}"] if names else []),
        ]

    @contextlib.contextmanager
    def written(self, text: str, files: Mapping[str, RunConfig | str]) -> Iterator[None]:
        """Write the folder; if the context fails, cancel the jobs submitted in it and remove what was written.

        Args:
            text: the batch script.
            files: contents by name in the folder, or by absolute path.

        Raises:
            ConfigError, OSError: the folder cannot be written.
        """
        paths = {self.folder / name: content for name, content in files.items()}
        folders = [self.folder, self.root / layout.LOGS, *(path.parent for path in paths)]
        new = [path for path in paths if not path.exists()]
        made = {path for folder in folders for path in (folder, *folder.parents) if not path.exists()}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.folder.mkdir()
        except FileExistsError:
            raise ConfigError(f"{self.folder}: another bd3 launch is making it; start this one again") from None
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            for room in PACKAGES:
                shutil.copytree(
                    ROOT / room, self.folder / layout.LAUNCH_CODE / room, ignore=shutil.ignore_patterns("__pycache__")
                )
            for source, target in self.plugins.items():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)
            for path, content in paths.items():
                if isinstance(content, str):
                    write_text(path, content)
                else:
                    save_config(content, path)
            write_text(self.folder / layout.LAUNCH_ENVIRONMENT, _environment_text())
            write_text(self.script, text)
            yield
            events.record(self.root, "launched", jobs=list(map(str, self.jobs)), launch=self.name)
        except BaseException:
            for number in self.jobs:
                with contextlib.suppress(client.SlurmError):
                    client.call("scancel", str(number))
            shutil.rmtree(self.folder, ignore_errors=True)
            for path in new:
                path.unlink(missing_ok=True)
            for folder in sorted(made, reverse=True):  # deeper folders first
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if it is empty
            raise

    def submit(self, *options: str) -> int:
        """Submit the script and return the job's number."""
        os.environ.pop(CHAIN, None)  # sbatch passes it on from the job that calls this, if any
        self.jobs.append(client.submit(self.script, *options))
        return self.jobs[-1]


def _environment_text() -> str:
    lines = [f"python {platform.python_version()} {sys.executable}", *_git_state(), ""]
    lines += [*sorted(f"{found.name}=={found.version}" for found in distributions() if found.name), ""]
    lines += sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_RECORDED))
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
    """Words quoted for a line of the shell."""
    return " ".join(shlex.quote(str(word)) for word in words)
