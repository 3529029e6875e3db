"""Prepare text and train a small model on it from Python, without the command line.

python examples/train_from_python.py corpora/austen.jsonl.gz FOLDER [STEPS]
"""

import json
import sys
from pathlib import Path

from data_prep.build.prep import PrepConfig, prep
from pretrain.config.schema import RunConfig
from pretrain.trainer.loop import train


def main(text: str, folder: str, steps: str = "50") -> None:
    """Write a data set and a run folder into ``folder`` and print the losses; run again, it continues."""
    data, run = Path(folder, "data"), Path(folder, "run")
    if not data.exists():
        prep(PrepConfig(inputs=(text,), out=str(data), length=64, tokenizer="bpe:512", workers=1))
    # Sections and keys are those of `bd3 config`; what is left out has its default.
    config = RunConfig.model_validate(
        {
            "run": str(run),
            "data": {"path": str(data)},
            "model": {"layers": 2, "hidden": 64, "heads": 4, "length": 64},
            "diffusion": {"block_size": 4},
            "train": {"steps": int(steps), "global_batch": 8, "micro_batch": 8, "precision": "fp32", "lr": 3e-3},
            "eval": {"every": int(steps), "rows": 32},
        }
    )
    train(config)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        print(record["step"], record["split"], record.get("loss", record.get("nelbo")))


if __name__ == "__main__":
    main(*sys.argv[1:])
