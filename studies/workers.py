"""Run independent jobs on several processes, each once the jobs that it needs are done."""
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import NamedTuple

import torch
from tqdm import tqdm

from support.errors import InputError, ServiceError

EXPECTED = (InputError, ServiceError, OSError)  # all others are bugs


class Job(NamedTuple):
    """A call that another process can make: function and arguments are pickled."""
    name: str
    needs: tuple  # names of jobs that have to be done before; those not in the list count as done
    function: Callable
    arguments: tuple


def run_jobs(jobs, workers):
    """Yield (name, result) of each job as it is done; of those that are ready the first goes first.

    Raises what a job raises. Then, and when it is closed, all processes are ended at once.
    """
    waiting = list(jobs)
    running = {}  # connection to a worker: name of its job
    processes, connections = start_workers(min(workers, len(jobs)))
    try:
        while waiting or running:
            idle = [connection for connection in connections if connection not in running]
            for connection in idle:
                job = next_ready(waiting, running.values())
                if job:
                    waiting.remove(job)
                    send(connection, job)
                    running[connection] = job.name
            assert running, f"{waiting[0].name} waits for a job that waits for it"
            for connection in wait(list(running)):
                name = running.pop(connection)
                yield name, receive(connection, name)
    finally:
        for process in processes:
            process.kill()
            process.join()


def next_ready(waiting, running):
    """The first job that waits for no other one; None where all do."""
    unfinished = {job.name for job in waiting}.union(running)
    for job in waiting:
        if unfinished.isdisjoint(job.needs):
            return job
    return None


def send(connection, job):
    """Give a job to a worker. Raises ServiceError where that has died."""
    try:
        connection.send((job.function, job.arguments))
    except ConnectionError:
        raise died(job.name) from None


def receive(connection, name):
    """The result of a job. Raises what it raised, and ServiceError where its process has died."""
    try:
        result, error = connection.recv()
    except (EOFError, ConnectionError):  # the second one if it had not read its job yet
        raise died(name) from None
    if error:
        raise error
    return result


def died(name):
    """The error of a job whose process is gone."""
    return ServiceError(
        f"{name}: its process has died, perhaps for lack of memory. Try fewer workers."
    )


def start_workers(count):
    """Start processes that `serve`; returns (the processes, the connections to them)."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    processes = []
    connections = []
    for number in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, number), daemon=True)
        with interrupts_ignored():
            process.start()
        theirs.close()  # so that the worker's death ends the connection
        processes.append(process)
        connections.append(ours)
    return processes, connections


@contextmanager
def interrupts_ignored():
    """Ignore Ctrl-C. Processes that start meanwhile always do: it is their parent that ends them.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(connection, number):
    """The life of worker `number`: do one job after the other and send (result, error) of each."""
    torch.set_num_threads(1)  # so that the order of sums does not depend on the machine
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())  # a GPU of its own
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        result = None
        error = None
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
            if not isinstance(error, EXPECTED):
                traceback.print_exc()  # it does not travel
        connection.send((result, error))


def end_with_parent():
    """End this process as soon as its parent has ended, however that was."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
