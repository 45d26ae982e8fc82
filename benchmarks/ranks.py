"""Time of evaluating all ranks, beside one `evaluate` a rank."""

import time

from benchmarks import competitors, table
from benchmarks.workers import in_turn, workers
from examples import markdown

WAYS = {
    "evaluate_ranks": "evaluate_ranks, 8 ranks",
    "evaluate": "8 × (set_rank, evaluate)",
}


def main(args):
    rounds = []
    for _ in range(args.processes):
        with workers(start, WAYS, args.size) as running:
            for worker in running.values():
                worker.ask(args.steps)
            for answers in in_turn(running, args.rounds, args.steps):
                rounds.append(answers)
                print(f"round {len(rounds)}", flush=True)
    seconds = {
        WAYS[way]: table.median(r[way][0] for r in rounds) for way in WAYS
    }
    traced = {WAYS[way]: rounds[-1][way][1] for way in WAYS}
    table.write(
        args,
        [
            markdown.table(
                ("", "seconds", "times traced, in all"),
                [
                    (
                        label,
                        f"{s:.2f}",
                        "eager" if args.backend == "torch" else traced[label],
                    )
                    for label, s in seconds.items()
                ],
            ),
            markdown.table(
                ("ratio", "median", "quartiles"),
                [
                    (
                        "evaluate_ranks / 8 × evaluate",
                        *table.spread(
                            r["evaluate_ranks"][0] / r["evaluate"][0]
                            for r in rounds
                        ),
                    )
                ],
            ),
        ],
        seconds,
        "seconds",
    )


def start(way, size):
    import keras_dylora as kd

    trained = competitors.KerasTraining(
        competitors.SIZES[size], competitors.dylora()
    )
    model, traces = trained.model, []
    test_step = model.test_step

    def counted(*args):
        traces.append(1)
        return test_step(*args)

    model.test_step = counted

    def all_ranks(data):
        kd.evaluate_ranks(model, *data, verbose=0)

    def one_by_one(data):
        for rank in range(1, 9):
            model.set_rank(rank)
            model.evaluate(*data, verbose=0)

    run = all_ranks if way == "evaluate_ranks" else one_by_one

    def answer(steps):
        data = trained.data(steps)
        begin = time.perf_counter()
        run(data)
        return time.perf_counter() - begin, len(traces)

    return answer
