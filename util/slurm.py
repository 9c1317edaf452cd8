"""Jobs on a Slurm cluster (or of this machine) through submitit, for all launchers."""

import importlib
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from util.errors import UserError
from util.run import ending

MAX_TIMEOUTS = 1000  # time limits that a job may run into; submitit alone would stop at the fourth


def add_slurm_args(parser: ArgumentParser) -> None:
    """Add the flags of the job to those of the script."""
    group = parser.add_argument_group("job")
    group.add_argument(
        "--cluster",
        choices=("slurm", "local"),
        default="slurm",
        help="local: processes of this machine, without Slurm",
    )
    group.add_argument("--nodes", type=int, default=1)
    group.add_argument("--ngpus", type=int, default=8, help="GPUs per node, one task each; 0: CPU")
    group.add_argument(
        "--tasks_per_node", type=int, default=1, help="tasks per node with --ngpus 0"
    )
    group.add_argument("--cpus_per_task", type=int, default=10)
    group.add_argument("--mem_gb", type=float, default=None, help="memory per node, GB")
    group.add_argument("--time", type=int, default=4320, help="time limit, minutes")
    group.add_argument(
        "--signal_delay_s",
        type=int,
        default=120,
        help="seconds to save before the time limit; Slurm may grant up to 60 more",
    )
    group.add_argument("--partition", default=None)
    group.add_argument("--account", default=None)
    group.add_argument("--qos", default=None)
    group.add_argument("--constraint", default=None, help="node features, e.g. volta32gb")
    group.add_argument("--comment", default=None)
    group.add_argument("--job_name", default="mae-video")
    group.add_argument(
        "--job_dir",
        default="./output/%j",
        help="folder of logs and, unless --output_dir is given, checkpoints; %%j: the job's id",
    )
    # so that an --output_dir of the user can be told from the script's default
    parser.set_defaults(output_dir=None)


class Job:
    """Run a script's main in every task of a job; after a preemption, in the requeued job.

    The requeued job keeps its id and so its folder, whose newest checkpoint it resumes from.
    """

    def __init__(self, script: str, args: Namespace):
        self.script = script
        self.args = args

    def __call__(self) -> None:
        args = Namespace(**vars(self.args))
        if args.ngpus and args.device == "auto":
            args.device = "cuda"  # rather than days on a CPU
        environment = submitit.JobEnvironment()
        args.output_dir = args.output_dir or args.job_dir.replace("%j", environment.job_id)
        if environment.num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        with ending(f"{self.script}.py"):
            importlib.import_module(self.script).main(args)

    def checkpoint(self) -> DelayedSubmission:
        """Tell submitit what to requeue when the job is preempted or out of time."""
        return DelayedSubmission(Job(self.script, self.args))


def submit(script: str, args: Namespace) -> None:
    """Submit a script as a job and print its id and logs; wait for it where there is no Slurm.

    Args:
        script: module with main(args), e.g. "main_pretrain".

    Raises:
        UserError: there is no Slurm on this machine, or it refuses the job; a local one fails.
    """
    folder = Path(args.job_dir).absolute()
    args.job_dir = str(folder)
    if args.output_dir:
        args.output_dir = os.path.abspath(args.output_dir)
    executor_options, extra = {}, {}
    if args.cluster == "slurm":
        names = ("partition", "account", "qos", "constraint", "comment")
        extra = {f"slurm_{name}": getattr(args, name) for name in names}
        extra["slurm_signal_delay_s"] = args.signal_delay_s
        # srun does not take this over from sbatch
        extra["slurm_srun_args"] = [f"--cpus-per-task={args.cpus_per_task}"]
        executor_options = {"slurm_max_num_timeout": MAX_TIMEOUTS}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=args.cluster, **executor_options)
        executor.update_parameters(
            name=args.job_name,
            nodes=args.nodes,
            tasks_per_node=args.ngpus or args.tasks_per_node,
            gpus_per_node=args.ngpus,
            cpus_per_task=args.cpus_per_task,
            mem_gb=args.mem_gb,
            timeout_min=args.time,
            **extra,
        )
        job = executor.submit(Job(script, args))
    except (RuntimeError, OSError, FailedJobError) as error:
        raise UserError(f"the job could not be submitted: {error}", status=1) from error
    print(f"job {job.job_id}; logs: {job.paths.stdout} and {job.paths.stderr}")
    if args.cluster == "local":
        try:
            job.results()
        except UncompletedJobError as error:
            raise UserError(f"the job failed; the logs in {folder} say why", status=1) from error
