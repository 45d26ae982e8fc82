"""The runner of all benchmarks: a grid of cells, one process each."""

import concurrent.futures

from benchmarks import competitors
from benchmarks.workers import workers


class Cell:
    """A cell of the grid, measured in a process. Each method returns a dict.

    The dicts make the row of the cell. `prepare` and `finish` return what is
    true of all rounds. The numbers of `measure` are appended to lists.

    Args:
        name: str. The name of the cell.
        size: what all cells are made at.
    """

    def __init__(self, name, size):
        self.name, self.size = name, size

    def prepare(self, steps):
        """Measures once, and does what compiles."""
        return {}

    def measure(self, steps):
        """Measures in one round."""
        return {}

    def finish(self, steps):
        """Measures once more."""
        return {}


class Training(Cell):
    """Steps of the competitor of a name."""

    def __init__(self, name, size):
        super().__init__(name, size)
        self.competitor = competitors.make(name, size)

    def prepare(self, steps):
        self.measure(steps)  # the first steps compile
        return {"parameters": self.competitor.parameters}

    def measure(self, steps):
        return {"seconds": self.competitor.seconds(steps)}


def measured(
    args,
    cell,
    names,
    *given,
    processes=1,
    rounds=None,
    alone=False,
    at_once=1,
    ours=None,
):
    """The rows of cells that are measured beside each other.

    Args:
        args: what the command was given: its `rounds` and `steps`.
        cell: subclass of `Cell`. Each process makes one of a name and `given`.
        names: list of the cells' names, which a row has as `method`.
        *given: what all cells are made of.
        processes: int. How many fresh ones a cell has, one after the other.
        rounds: int. Those of a process. Defaults to `None`, `args.rounds`.
        alone: bool. Whether a process ends before the next cell's begins.
        at_once: int. How many are prepared at the same time; `None` is all.
        ours: dict of name to the name whose seconds its row has as `ours`.

    Returns:
        A list of dicts.
    """
    rows = {name: {"method": name} for name in names}
    rounds = args.rounds if rounds is None else rounds
    for _ in range(processes):
        for group in [[name] for name in names] if alone else [names]:
            with workers(cell, group, *given) as running:
                with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
                    answers = pool.map(
                        lambda x: x.ask("prepare", args.steps),
                        running.values(),
                    )
                    for name, answer in zip(group, answers, strict=True):
                        rows[name] |= answer
                for turn in range(rounds):
                    # There and back: a drift of the machine meets all alike.
                    for name in group[:: -1 if turn % 2 else 1]:
                        answer = running[name].ask("measure", args.steps)
                        for key, number in answer.items():
                            rows[name].setdefault(key, []).append(number)
                for name, worker in running.items():
                    rows[name] |= worker.ask("finish", args.steps)
            print(f"measured: {group}", flush=True)
    for name, of in (ours or {}).items():
        if name in rows and of in rows:
            rows[name]["ours"] = rows[of]["seconds"]
    return list(rows.values())
