"""Submit main_test.py as a Slurm job, with its own flags and those of the job.

python submitit_test.py --nodes 2 --ngpus 8 --partition gpu --finetune checkpoint-00049.pth
"""

from functools import partial

import main_test
from util import run, slurm

parse_args = partial(main_test.parse_args, add_args=slurm.add_slurm_args)

if __name__ == "__main__":
    run.run(partial(slurm.submit, "main_test"), parse_args)
