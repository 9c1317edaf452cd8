"""Submit the scripts as jobs through submitit, to Slurm or to this machine."""

import contextlib
import importlib
import os
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from util.args import adder, between, positive_float, positive_int, up_to_1000
from util.errors import UserError
from util.run import ending, fill_placeholders

FOLDERS = ("output_dir", "log_dir", "job_dir")  # in whose names %j is the job's id
MAX_TIMEOUTS = 1000  # how often a job may reach its time limit; submitit's default is 3


def add_queue_args(parser: ArgumentParser, job_name: str) -> None:
    """Add the flags that say what a job may use and how the queue sees it."""
    add = adder(parser, "job")
    add("--cpus_per_task", 10, "CPU cores per task", positive_int)
    add("--mem_gb", None, "memory per node, GB", positive_float)
    add("--time", 4320, "time limit, minutes", positive_int)
    delay = "seconds between the signal to save and the time limit; Slurm may add up to 60"
    add("--signal_delay_s", 120, delay, between(int, 0, 65535))
    add("--partition", None, "Slurm's partition")
    add("--account", None, "account that pays for the job")
    add("--qos", None, "Slurm's quality of service")
    add("--constraint", None, "node features, e.g. volta32gb")
    add("--comment", None, "comment on the job")
    add("--job_name", job_name, "name of the job")


def add_slurm_args(parser: ArgumentParser) -> None:
    """Add the flags of the job to those of the script."""
    add_queue_args(parser, "mae-video")
    add = adder(parser, "nodes and folder of the job")
    cluster = "local: run processes on this machine, without Slurm"
    add("--cluster", "slurm", cluster, choices=("slurm", "local"))
    add("--nodes", 1, "number of machines", positive_int)
    add("--ngpus", 8, "GPUs per node, with one task each; 0: run on CPUs", up_to_1000)
    add("--tasks_per_node", 1, "tasks per node if --ngpus is 0", between(int, 1, 1000))
    folder = "folder of logs and, unless --output_dir is given, checkpoints; %%j: the job's id"
    add("--job_dir", "./output/%j", folder)
    # None shows that the user gave no --output_dir: the job then uses its own folder
    parser.set_defaults(output_dir=None)


class Job:
    """Run a script's main in every task of a job, and again in the requeued job.

    A requeued job keeps its id and so its folder, and resumes from the newest checkpoint there.
    """

    def __init__(self, script: str, args: Namespace):
        self.script, self.args = script, args

    def __call__(self) -> None:
        args = Namespace(**vars(self.args))
        if args.ngpus and args.device == "auto":
            args.device = "cuda"  # fail without a GPU rather than train on the CPU for days
        environment = submitit.JobEnvironment()
        if args.output_dir is None:  # empty: save nothing
            args.output_dir = args.job_dir
        fill_placeholders(args, environment.job_id, FOLDERS)
        if environment.num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        with ending(f"{self.script}.py"):
            importlib.import_module(self.script).main(args)

    def checkpoint(self) -> DelayedSubmission:
        """Return the job that submitit requeues at preemption or at the time limit."""
        return DelayedSubmission(Job(self.script, self.args))


def submit_jobs(
    calls: Sequence[Callable[[], None]], folder: str, args: Namespace, **sizes: int
) -> list[submitit.Job[None]]:
    """Submit calls as jobs with the flags of add_queue_args; several become one array.

    A requeued job calls what the method `checkpoint` of its call gives. `folder` is for the logs;
    `sizes` are nodes, tasks_per_node and gpus_per_node. Raise UserError if Slurm is missing or
    refuses the jobs.
    """
    names = "partition account qos constraint comment".split()
    try:
        # a local executor ignores the arguments named slurm_*
        executor = submitit.AutoExecutor(folder, args.cluster, slurm_max_num_timeout=MAX_TIMEOUTS)
        executor.update_parameters(
            name=args.job_name,
            cpus_per_task=args.cpus_per_task,
            mem_gb=args.mem_gb,
            timeout_min=args.time,
            slurm_signal_delay_s=args.signal_delay_s,
            # sbatch does not pass this on to srun
            slurm_srun_args=[f"--cpus-per-task={args.cpus_per_task}"],
            **{f"slurm_{name}": getattr(args, name) for name in names},
            **sizes,
        )
        with executor.batch():
            return [executor.submit(call) for call in calls]
    except (RuntimeError, OSError, FailedJobError) as error:
        raise UserError(f"the job could not be submitted: {error}", status=1) from error


def submit(script: str, args: Namespace) -> None:
    """Submit a script, a module with main(args); print where its logs are; wait for a local job.

    Raise UserError if this machine has no Slurm, Slurm refuses the job, or a local job fails.
    """
    fill_placeholders(Namespace(**vars(args)), "0", FOLDERS)  # refuse now what the job would
    folder = args.job_dir = os.path.abspath(args.job_dir)
    if args.output_dir:
        args.output_dir = os.path.abspath(args.output_dir)
    sizes = {"nodes": args.nodes, "tasks_per_node": args.ngpus or args.tasks_per_node}
    call = Job(script, args)
    [job] = submit_jobs([call], folder, args, **sizes, gpus_per_node=args.ngpus)
    if "%" in folder:
        with contextlib.suppress(OSError):  # submitit has made it, but the job has another one
            os.rmdir(folder)
    print(f"job {job.job_id}; logs: {job.paths.stdout} and {job.paths.stderr}")
    if args.cluster == "local":
        try:
            job.results()
        except UncompletedJobError as error:
            raise UserError(f"the job failed; the logs in {folder} say why", status=1) from error


def find_live(jobs: Iterable[str]) -> set[str]:
    """Return which jobs, given by their ids, wait in Slurm's queue or run."""
    jobs = set(jobs)
    if not jobs:
        return jobs
    arrays = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    words = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={arrays}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        return jobs  # Slurm does not answer now
    return jobs & set(done.stdout.split())
