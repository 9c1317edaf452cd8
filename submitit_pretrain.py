"""Submit main_pretrain.py as a Slurm job: its own flags plus those of the job.

python submitit_pretrain.py --nodes 8 --ngpus 8 --partition gpu --path_to_data_dir /data/k400
"""

from functools import partial

import main_pretrain
from util import run, slurm

parse_args = partial(main_pretrain.parse_args, add_args=slurm.add_slurm_args)
main = partial(slurm.submit, "main_pretrain")

if __name__ == "__main__":
    run.run(main, parse_args)
