"""Submit main_test.py as a Slurm job: its own flags plus those of the job.

python submitit_test.py --nodes 2 --ngpus 8 --partition gpu --finetune checkpoint-00049.pth
"""

from functools import partial

import main_test
from util import run, slurm

parse_args = partial(main_test.parse_args, add_args=slurm.add_slurm_args)
main = partial(slurm.submit, "main_test")

if __name__ == "__main__":
    run.run(main, parse_args)
