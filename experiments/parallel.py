"""Runs in processes of one core each: small models don't fill more of them."""

import concurrent.futures
import multiprocessing
import os
import signal


def run_all(function, runs, processes):
    """Calls `function(*run)` for each of `runs`, `processes` at a time.

    The first error, an interruption among them, ends it; what is done is kept
    by `function`.

    Args:
        function: a function that can be pickled.
        runs: list of tuples of arguments.
        processes: int. On Linux, each has one core of its own.
    """
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()
    for place in range(processes):
        places.put(place)
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, _start, (places,)
    ) as pool:
        futures = [pool.submit(function, *run) for run in runs]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(places):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[places.get() % len(cores)]})
