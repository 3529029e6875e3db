"""Changes of the ranks inside of jobs that the tests ask for: put this folder on PYTHONPATH and set

- ``BD3_TEST_STEP_SECONDS=0.2``: every batch takes so long to make;
- ``BD3_TEST_NAN_STEPS=7,9``: a prediction of each rank in these steps (0 is the first) has the weight NaN;
- ``BD3_TEST_EAGER=1``: ``torch.compile`` leaves functions as they are. Megatron-core decorates some with it, none of
  which the small runs of the tests call, and its import is a third of all that a rank imports.

Modules are changed when the program imports them, so that nothing is imported earlier than usual.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import time

STEP_SECONDS = float(os.environ.get("BD3_TEST_STEP_SECONDS") or 0)
EAGER = os.environ.get("BD3_TEST_EAGER") == "1"
NAN_STEPS = {int(step) for step in os.environ.get("BD3_TEST_NAN_STEPS", "").split(",") if step}


def change_batches(module) -> None:
    made = module.Batches.at

    @functools.wraps(made)
    def at(self, step):
        batches = made(self, step)
        time.sleep(STEP_SECONDS)
        if step in NAN_STEPS:
            batches[0].weight.view(-1)[batches[0].predicted[0]] = float("nan")
        return batches

    module.Batches.at = at


def change_torch(module) -> None:
    module.compile = undecorated


def change_torch_compile(module) -> None:
    module._disable_dynamo = undecorated


def undecorated(function=None, *args, **options):
    return (lambda decorated: decorated) if function is None else function


CHANGES = {}
if STEP_SECONDS or NAN_STEPS:
    CHANGES["pretrain.trainer.batches"] = change_batches
if EAGER:
    CHANGES["torch"] = change_torch
    CHANGES["torch._compile"] = change_torch_compile


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of ``CHANGES`` where the others would, and changes each once it has run."""

    def find_spec(self, name, path=None, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                CHANGES[name](module)

            spec.loader.exec_module = exec_module
        return spec


if CHANGES:
    sys.meta_path.insert(0, Finder())
