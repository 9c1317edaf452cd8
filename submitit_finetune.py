"""Submit main_finetune.py as a Slurm job: its own flags plus those of the job.

python submitit_finetune.py --nodes 8 --ngpus 8 --partition gpu --path_to_data_dir /data/k400
"""

import argparse
from collections.abc import Sequence

import main_finetune
from util import run, slurm


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the script's flags and the job's."""
    return main_finetune.parse_args(argv, add_args=slurm.add_slurm_args)


def main(args: argparse.Namespace) -> None:
    """Submit, and wait where there is no Slurm to wait for it."""
    slurm.submit("main_finetune", args)


if __name__ == "__main__":
    run.run(main, parse_args)
