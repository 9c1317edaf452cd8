"""Submit main_finetune.py as a Slurm job, with its own flags and those of the job.

python submitit_finetune.py --nodes 8 --ngpus 8 --partition gpu --path_to_data_dir /data/k400
"""

from functools import partial

import main_finetune
from util import run, slurm

parse_args = partial(main_finetune.parse_args, add_args=slurm.add_slurm_args)

if __name__ == "__main__":
    run.run(partial(slurm.submit, "main_finetune"), parse_args)
