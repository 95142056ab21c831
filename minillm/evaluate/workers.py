"""Who carries jobs out: this process, several on this machine, or a Ray cluster. All yield the rows of a Job as soon as
they are there; the jobs of a worker that is lost are run again."""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from minillm.errors import MinillmError, UsageError
from minillm.evaluate.evaluator import Evaluator

RETRIES = 3  # of a Ray job whose worker is lost, and of a pool of processes that breaks before a job is done


def here(setup, jobs):
    evaluator = Evaluator(setup)
    for job in jobs:
        yield evaluator.run(job)


# Processes


def processes(setup, jobs, workers, notice):
    """workers: processes, each with a model of its own. notice(text) is called where one is lost."""
    left, broken = dict(enumerate(jobs)), 0
    while left:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
        try:
            numbers = {pool.submit(_run, setup, job): number for number, job in left.items()}
            for future in as_completed(numbers):
                rows = future.result()
                del left[numbers[future]]
                broken = 0
                yield rows
        except BrokenProcessPool:
            broken += 1
            if broken == RETRIES:
                raise MinillmError(
                    f"workers were killed {RETRIES} times before one sample was done: if memory is short, fewer "
                    "--workers or a smaller --length help"
                ) from None
            notice("a worker was killed; what it was working on is run again")
        finally:
            pool.shutdown(cancel_futures=True)


_evaluator = None


def _start():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends us after the sample under way


def _run(setup, job):
    global _evaluator
    _evaluator = _evaluator or Evaluator(setup)
    return _evaluator.run(job)


# Ray


def on_ray(setup, jobs, address, workers, cpus, gpus):
    """An actor a worker, which Ray starts again where it is lost. address: of a cluster, or "local": one on this
    machine for as long as this takes. workers None: as many as the cluster has room for."""
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError("--ray needs Ray: pip install 'minillm-engine[ray]'") from None
    local = {"num_cpus": (workers or 1) * cpus, "num_gpus": (workers or 1) * gpus} if address == "local" else {}
    try:
        ray.init(
            address=address,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level="ERROR",
            **local,
        )
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"--ray {address}: there is no Ray cluster ({error}); --ray local starts one") from error
    try:
        if workers is None:
            have = ray.cluster_resources()
            workers = int(min(have.get("CPU", 0) // cpus, have.get("GPU", 0) // gpus if gpus else float("inf")))
        if workers < 1:
            raise UsageError(f"--ray {address}: the cluster has no room for a worker of {cpus} CPUs and {gpus} GPUs")
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": RETRIES}
        actor = ray.remote(**options)(Evaluator)
        yield from _spread(ray, [actor.remote(setup) for _ in range(workers)], jobs)
    finally:
        ray.shutdown()


def _spread(ray, actors, jobs):
    """The rows of the jobs, each given to the actor that is free first."""
    jobs, at_work = iter(jobs), {}

    def give(actor):
        job = next(jobs, None)
        if job is not None:
            at_work[actor.run.remote(job)] = actor

    for actor in actors:
        give(actor)
    while at_work:
        (done,), _ = ray.wait(list(at_work))
        give(at_work.pop(done))
        try:
            yield ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            raise MinillmError(f"a Ray worker was lost {RETRIES + 1} times over one sample: {error}") from None
