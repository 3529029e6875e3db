"""DeepSpeed imported without its messages, and its compiled Adam for offloaded optimizer state, built ahead of time.

    python -m bd3_megatron.engine.ops

builds that Adam into torch's folder of extensions (``TORCH_EXTENSIONS_DIR``, or ``~/.cache/torch_extensions``), which
takes minutes. A training run loads what is there and never builds: all ranks would wait for the compiler, and a rank
that is killed meanwhile leaves a lock on which every later run waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import logging
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from bd3_common.atomic import no_follow
from bd3_common.errors import ConfigError

INSTALL = "pip install 'bd3-megatron[zero]'"
OP = "cpu_adam"
COMMAND = "python -m bd3_megatron.engine.ops"
_STAMP = "built-for.txt"


def import_deepspeed(key: str) -> ModuleType:
    """Import DeepSpeed at its first use, because that takes seconds; it logs errors only and compiles nothing.

    Args:
        key: setting that asks for it, for the error text.

    Raises:
        ConfigError: it is not installed, or something it needs is not.
    """
    import torch

    # DeepSpeed warns where it is left to find out that there is no GPU.
    told = contextlib.nullcontext() if torch.cuda.is_available() else environment("DS_ACCELERATOR", "cpu")
    try:
        with warnings.catch_warnings(), told:
            warnings.simplefilter("ignore")
            import deepspeed

            backend = importlib.import_module("deepspeed.comm.torch")  # as an attribute this name means torch
            from deepspeed.runtime import bf16_optimizer
    except ModuleNotFoundError as error:
        missing = "DeepSpeed" if error.name == "deepspeed" else f"DeepSpeed's {error.name}"
        raise ConfigError(f"{key}: {missing} is not installed; {INSTALL}") from None
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Its shared-memory all-reduce serves inference alone, and would be compiled when the process groups start.
    backend.build_shm_op = lambda: None
    bf16_optimizer.see_memory_usage = lambda *_, **__: None  # prints, whatever the logger's level
    return deepspeed


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Context in which an environment variable has a value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def built() -> bool:
    """True if the operation is built for this torch, this DeepSpeed and this kind of processor."""
    stamp = _folder() / _STAMP
    return stamp.is_file() and stamp.read_text() == _builds_for()


def load() -> None:
    """Register the built operation with DeepSpeed.

    Raises:
        ConfigError: it is not built.
    """
    if not built():
        raise ConfigError(f"zero.offload=true: DeepSpeed's {OP} is not built for this machine; run {COMMAND}")
    from deepspeed.ops.op_builder.builder import OpBuilder
    from torch.utils.cpp_extension import _import_module_from_library

    if OP not in OpBuilder._loaded_ops:
        OpBuilder._loaded_ops[OP] = _import_module_from_library(OP, str(_folder()), True)


def build() -> Path:
    """Build the operation unless it is built, and return its folder.

    Raises:
        ConfigError: DeepSpeed is not installed, or there is no compiler, or it failed.
    """
    import_deepspeed("zero.offload=true")
    folder = _folder()
    with _alone(folder):
        if built():
            return folder
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            raise ConfigError(
                f"{compiler}: not found; install a C++ compiler (Debian: apt-get install g++), or set CXX"
            )
        (folder / _STAMP).unlink(missing_ok=True)
        (folder / "lock").unlink(missing_ok=True)  # of a build that was killed: whoever builds now holds the other lock
        # ninja lies beside Python also where the virtual environment is not activated.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        from deepspeed.ops.op_builder import CPUAdamBuilder

        try:
            CPUAdamBuilder().jit_load(verbose=False)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"{OP}: the build failed: {' '.join(str(error).split())[:500]}") from error
        (folder / _STAMP).write_text(_builds_for())
    return folder


def main() -> int:
    """Build the operation and print where it is; the exit code."""
    try:
        import_deepspeed("zero.offload=true")
        if not built():
            print(f"building DeepSpeed's {OP} in {_folder()}; this takes minutes", flush=True)
        print(f"{OP} is built in {build()}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _folder() -> Path:
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(OP, verbose=False))


def _builds_for() -> str:
    """Versions and processor that a build is valid for: it uses every instruction of the processor."""
    from importlib.metadata import version

    listing = Path("/proc/cpuinfo")  # Linux
    lines = listing.read_text().splitlines() if listing.exists() else []
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    processor = f"{platform.machine()} {hashlib.sha256(instructions.encode()).hexdigest()[:12]}"
    return f"torch {version('torch')}, deepspeed {version('deepspeed')}, {processor}\n"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Context that allows one build at a time; unlike torch's lock file, the lock ends with its process."""
    with open(folder / "building", "w", opener=no_follow) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    sys.exit(main())
