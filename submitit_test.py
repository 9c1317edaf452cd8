"""Submit main_test.py as a Slurm job: its own flags plus those of the job.

python submitit_test.py --nodes 2 --ngpus 8 --partition gpu --finetune checkpoint-00049.pth
"""

import argparse
from collections.abc import Sequence

import main_test
from util import run, slurm


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the script's flags and the job's."""
    return main_test.parse_args(argv, add_args=slurm.add_slurm_args)


def main(args: argparse.Namespace) -> None:
    """Submit, and wait where there is no Slurm to wait for it."""
    slurm.submit("main_test", args)


if __name__ == "__main__":
    run.run(main, parse_args)
