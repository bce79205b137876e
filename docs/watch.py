"""Follows a run into TensorBoard or Weights & Biases, from its folder alone, until Ctrl-C.

    python docs/watch.py runs/main0 tensorboard       # then: tensorboard --logdir runs
    python docs/watch.py runs/main0 wandb

Neither is a dependency: `pip install` the one that is used. Runs that have ended may be read too.
"""
import json
import sys
import time
from pathlib import Path


def records(file: Path):
    """Yield the records of a log as they are written."""
    with open(file) as lines:
        while True:
            line = lines.readline()
            if line.endswith("\n"):
                yield json.loads(line)
            else:
                lines.seek(lines.tell() - len(line))               # half a line: its rest comes later
                time.sleep(2)


def main(folder: Path, to: str):
    if to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        write = SummaryWriter(folder).add_scalar
    else:
        import wandb
        wandb.init(project="ra3", name=folder.name, config=json.loads((folder / "config.json").read_text()))

        def write(name: str, value: float, step: int):
            wandb.log({name: value, "update": step})               # "update" is the axis to choose
    for record in records(folder / "metrics.jsonl"):
        phase = record.pop("phase", None) or record.pop("key")
        step = record.pop("step", 0)
        for name, value in record.items():
            write(f"{phase}/{name}", value, step)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except KeyboardInterrupt:
        pass
