"""The paper's tables: run, or collected, and printed beside its figures.

    python -m experiments.tables --table 2 --scale small --processes 2
    python -m experiments.tables --table 2

The first takes 40 minutes on two cores, offline; the second is the paper's
scale. Finished runs are kept in `results/runs.jsonl` and never run again.
`methods` isn't a table of the paper: it compares all methods at every rank, at
small scale on 2,000 test sentences.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure

import keras_dylora as kd
from examples.data import NotFetchedError
from experiments import glue_roberta as glue
from experiments import markdown, methods, nlg_gpt2, nlg_metrics, parallel
from experiments.runs import Results

PAPER = json.loads((pathlib.Path(__file__).parent / "paper.json").read_text())
# At small scale, the offline tasks and whose place they take.
SMALL = {
    "1": {"movies": "sst2"},
    "2": {"movies": "sst2", "ratings": "stsb"},
    "3": {"movies": "sst2"},
    "4": {"movies": "sst2"},
    "5": {"movies": "sst2"},
    "7": {"movies": "cola"},
    "methods": {"movies": None, "ratings": None},
}
TABLES = (*PAPER, "methods")
GENERATION = ("6", "9")
LONG = ("summed", "fine-tune")
LABELS = {
    **methods.LABELS,
    "lora-search": "LoRA (search)",
    "fine-tune": "fine-tune",
    "flop": "FLOP",
}


class Runner:
    """Runs what a table needs, or finds that it has run.

    Args:
        results: `Results`.
        settings: `experiments.glue_roberta.Settings`.
        verbose: as in `fit`.
    """

    def __init__(self, results, settings, verbose):
        self.results, self.verbose = results, verbose
        self.settings = settings

    def glue(self, task, method, rank=None, distribution="uniform"):
        """The results of a method on a task, one for each seed."""
        return [
            glue.run(
                self.results,
                task,
                method,
                seed,
                self.settings,
                rank,
                distribution,
                self.verbose,
            )
            for seed in self.settings.seeds
        ]

    def search(self, task):
        """For each seed, a dict of rank to result."""
        return [
            glue.search(self.results, task, seed, self.settings, self.verbose)
            for seed in self.settings.seeds
        ]

    def nlg(self, task, method):
        return [
            nlg_gpt2.run(
                self.results,
                task,
                method,
                seed,
                nlg_gpt2.Settings(),
                nlg_metrics.available_metrics(),
                self.verbose,
            )
            for seed in (10, 42, 4242)
        ]


def settings_of(table, scale, rank=None):
    """The `Settings` of a table's runs; `rank` defaults to the scale's."""
    settings = glue.SCALES[scale]
    if rank is not None:
        settings = dataclasses.replace(settings, rank=rank)
    if (table, scale) == ("methods", "small"):
        settings = dataclasses.replace(settings, test_size=2_000)
    return settings


def tasks_of(table, scale):
    """The tasks of a table, each with the paper's whose place it takes."""
    if scale == "small":
        return SMALL[table]
    names = PAPER[table]["tasks"] if table in PAPER else ["sst2"]
    return {name: name for name in names}


def maximum_ranks(scale):
    """The highest ranks of Table 5's searches."""
    return (64,) if scale == "small" else (64, 32)


def runs_of(table, scale, rows=methods.METHODS, rank=None):
    """Task, method, rank and distribution of all runs of a table of GLUE.

    With the `rows` of the table of methods, and its maximum rank.
    """
    if table == "5":
        runs = [("lora", b, "uniform") for b in glue.SEARCHED_RANKS]
        for highest in maximum_ranks(scale):
            runs += [("dylora-frozen", highest, "uniform")]
            runs += [("dylora", highest, "uniform")]
    elif table == "methods":
        highest = settings_of(table, scale, rank).rank
        runs = []
        for method in rows:
            own = method == "lora-each"
            ranks = methods.own_ranks(highest) if own else [highest]
            trained = "lora" if own else method
            runs += [(trained, b, "uniform") for b in ranks]
    else:
        runs = [
            (
                row["method"],
                trained_rank(table, row),
                row.get("distribution", "uniform"),
            )
            for row in PAPER[table]["rows"]
        ]
    return [
        (task, *run)
        for task in tasks_of(table, scale)
        for run in dict.fromkeys(runs)
    ]


def run_alone(path, settings, seed, task, method, rank, distribution):
    """Makes a run, in a process of its own."""
    glue.run(
        Results(path),
        task,
        method,
        seed,
        settings,
        rank,
        distribution,
        verbose=0,
    )


def paper_cell(value):
    return " ± ".join(f"{v:.2f}" for v in value)


def metric_of(table, task):
    """The metric of a task where a table doesn't use the task's first."""
    return "accuracy" if table in ("1", "5") and task == "mrpc" else None


def trained_rank(table, row):
    """The rank that a row's model was trained at; `None`: the settings'."""
    own = table == "1" or (table == "3" and row["method"] == "lora")
    return row["rank"] if own else None


def name_of(row):
    name = LABELS[row["method"]]
    if "distribution" in row:
        name += f", {row['distribution']}"
    return name


def glue_table(table, runner, scale):
    """Tables 1 to 4: a row of the paper is a method at a rank."""
    paper = PAPER[table]
    tasks = tasks_of(table, scale)
    header = ["rank", "method", "trainable"]
    for task, counterpart in tasks.items():
        header += [task, f"paper: {counterpart}"]
    rows, curves = [], {}
    for row in paper["rows"]:
        found = {
            task: runner.glue(
                task,
                row["method"],
                trained_rank(table, row),
                row.get("distribution", "uniform"),
            )
            for task in tasks
        }
        trainable = next(iter(found.values()))[0]["trainable"]
        line = [row["rank"] or "full", name_of(row), f"{trainable:,}"]
        for i, (task, counterpart) in enumerate(tasks.items()):
            values = [
                100
                * glue.score(
                    result,
                    row["rank"] or "full",
                    metric=metric_of(table, task),
                )
                for result in found[task]
            ]
            published = row["values"][paper["tasks"].index(counterpart)]
            line += [markdown.mean(values), paper_cell(published)]
            if i == 0:
                key = (name_of(row), row["rank"])
                curves[key] = np.mean(values), np.std(values)
        rows.append(line)
    notes = []
    for task in tasks if table == "3" else ():
        kept = np.mean([r["kept"] for r in runner.glue(task, "flop")])
        notes.append(
            f"{task}: FLOP kept {kept:.1%} of the matrices "
            f"(target {glue.FLOP_KEEP:.0%})."
        )
    return markdown.table(header, rows), notes, curves, next(iter(tasks))


def search_table(runner, scale):
    """Table 5: seven LoRA runs against one of DyLoRA."""
    tasks = tasks_of("5", scale)
    header = ["maximum rank", "method", "time"]
    for task, counterpart in tasks.items():
        header += [f"{task} (rank)", f"paper: {counterpart} (rank)"]
    rows, curves = [], {}
    for highest in maximum_ranks(scale):
        seconds, cells = {}, {}
        for method in ("lora-search", "dylora-frozen", "dylora"):
            seconds[method], cells[method] = 0, []
            for task, counterpart in tasks.items():
                times, scores = _searched(runner, task, method, highest)
                seconds[method] += np.mean(times)
                best = [max(by_rank, key=by_rank.get) for by_rank in scores]
                values = [100 * max(by_rank.values()) for by_rank in scores]
                cells[method] += [
                    f"{markdown.mean(values)} ({', '.join(map(str, best))})",
                    _paper_search(method, highest, counterpart),
                ]
                key = f"{LABELS[method]}, up to {highest}", None
                curves.setdefault(key, (np.mean(values), np.std(values)))
        for method, found in cells.items():
            ratio = seconds[method] / seconds["dylora"]
            time = f"{seconds[method]:.0f} s ({ratio:.2f}x)"
            rows.append([highest, LABELS[method], time, *found])
    return markdown.table(header, rows), [], curves, next(iter(tasks))


def _searched(runner, task, method, highest):
    """The seconds of training and the scores by rank, for each seed."""
    if method == "lora-search":
        runs = [
            {b: result for b, result in by_rank.items() if b <= highest}
            for by_rank in runner.search(task)
        ]
        times = [sum(r["seconds"] for r in run.values()) for run in runs]
    else:
        results = runner.glue(task, method, highest)
        runs = [
            dict.fromkeys(glue.evaluated_ranks(highest), result)
            for result in results
        ]
        times = [result["seconds"] for result in results]
    metric = metric_of("5", task)
    return times, [
        {b: glue.score(result, b, metric=metric) for b, result in run.items()}
        for run in runs
    ]


def _paper_search(method, highest, task):
    for row in PAPER["5"]["rows"]:
        if (row["method"], row["max_rank"]) == (method, highest):
            i = PAPER["5"]["tasks"].index(task)
            value, rank = paper_cell(row["values"][i]), row["ranks"][i]
            return f"{value} ({rank}), {row['time']}x"
    return ""


def loss_table(runner, scale):
    """Table 7: one rank's loss a step against the sum over all."""
    ((task, counterpart),) = tasks_of("7", scale).items()
    highest = runner.settings.rank
    rows, curves = [], {}
    for row in PAPER["7"]["rows"]:
        runs = runner.glue(task, row["method"])
        values = [
            100 * np.mean([glue.score(r, b) for b in range(1, highest + 1)])
            for r in runs
        ]
        rows.append(
            [
                LABELS[row["method"]],
                f"{np.mean([r['seconds'] for r in runs]):.0f} s",
                f"{row['seconds']:.0f} s",
                markdown.mean(values),
                paper_cell(row["values"][0]),
            ]
        )
        curves[LABELS[row["method"]], None] = np.mean(values), np.std(values)
    header = [
        "loss",
        "time",
        "paper: time",
        f"{task}, mean of ranks 1..{highest}",
    ]
    return (
        markdown.table([*header, f"paper: {counterpart}"], rows),
        [],
        curves,
        task,
    )


def methods_table(runner, scale, rows):
    """Every method at every rank, on each task, and the area under its curve.

    The curves are of the last task.
    """
    ranks = glue.evaluated_ranks(runner.settings.rank)
    texts = []
    for task in tasks_of("methods", scale):
        lines, curves = [], {}
        for method in rows:
            runs = runner.glue(task, method)
            own = method == "lora-each"
            trained = methods.own_ranks(ranks[-1]) if own else ranks
            line = [LABELS[method]]
            for b in ranks:
                values = []
                if b in trained:
                    values = [100 * glue.score(r, b) for r in runs]
                    curves[LABELS[method], b] = np.mean(values), np.std(values)
                line.append(markdown.mean(values))
            areas = [
                100
                * kd.RankReport(
                    {b: {"score": glue.score(r, b)} for b in trained}
                ).area("score")
                for r in runs
            ]
            line.append(markdown.mean(areas))
            line.append(f"{np.mean([r['seconds'] for r in runs]):.0f} s")
            lines.append(line)
        texts.append(
            markdown.table([f"{task} at rank", *ranks, "area", "time"], lines)
        )
    return "\n\n".join(texts), [], curves, task


def nlg_table(table, runner):
    """Tables 6 and 9: generation by GPT-2 medium."""
    paper = PAPER[table]
    columns = [(t, m) for t in paper["tasks"] for m in paper["metrics"]]
    header = ["rank", "method"]
    for task, metric in columns:
        header += [f"{task} {metric}", "paper"]
    rows, curves = [], {}
    for row in paper["rows"]:
        rank = row["rank"] or "full"
        line = [rank, name_of(row)]
        runs = {t: runner.nlg(t, row["method"]) for t in paper["tasks"]}
        for i, (task, metric) in enumerate(columns):
            values = [
                r["metrics"][str(rank)][metric]
                for r in runs[task]
                if metric in r["metrics"][str(rank)]
            ]
            published = row["values"][i : i + 1]
            line += [markdown.mean(values), *map(paper_cell, published or [[]])]
            if i == 0:
                key = (name_of(row), row["rank"])
                curves[key] = np.mean(values), np.std(values)
        rows.append(line)
    notes = []
    if "e2e" in paper["tasks"]:
        notes = [
            "The paper's E2E is the original one. Here it is the cleaned one, "
            "the only one in TFDS, whose test set has other meanings and "
            "fewer references for each: compare the methods, not the columns."
        ]
    return markdown.table(header, rows), notes, curves, paper["tasks"][0]


def draw(path, curves, label):
    """Lines over the ranks where there are some, else bars."""
    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    axes = figure.subplots()
    by_name = {}
    for (name, rank), point in curves.items():
        by_name.setdefault(name, []).append((rank, *point))
    lines = any(len(points) > 1 for points in by_name.values())
    for name, points in by_name.items():
        ranks, means, deviations = map(list, zip(*points, strict=True))
        if not lines:
            axes.barh(name, means[0], xerr=deviations[0])
        elif ranks[0] is None:
            axes.axhline(means[0], ls="--", color="grey", label=name)
        else:
            axes.errorbar(
                ranks, means, deviations, marker="o", capsize=3, label=name
            )
    if lines:
        axes.set_xlabel("rank")
        axes.set_ylabel(label)
        axes.legend()
    else:
        low = min(means - 4 * dev for means, dev in curves.values())
        axes.set_xlim(left=max(0, low - 1))
        axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def make(table, scale, results, verbose=1, rows=methods.METHODS, settings=None):
    """The Markdown of a table, notes on it, and what is drawn."""
    settings = settings or settings_of(table, scale)
    runner = Runner(results, settings, verbose)
    match table:
        case "1" | "2" | "3" | "4":
            return glue_table(table, runner, scale)
        case "5":
            return search_table(runner, scale)
        case "7":
            return loss_table(runner, scale)
        case "methods":
            return methods_table(runner, scale, rows)
    return nlg_table(table, runner)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--table", required=True, choices=TABLES)
    parser.add_argument("--scale", default="paper", choices=glue.SCALES)
    parser.add_argument("--output", default="results", type=pathlib.Path)
    parser.add_argument("--verbose", default=1, type=int)
    parser.add_argument(
        "--processes",
        default=1,
        type=int,
        help="runs at a time, on one core each; for small models on a CPU",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=methods.METHODS,
        help="of the table of methods; default: all",
    )
    parser.add_argument(
        "--rank", type=int, help="of the table of methods; default: the scale's"
    )
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(
            "`--processes` must be at least 1. "
            f"Received: --processes {args.processes}"
        )
    if args.processes > 1 and args.table in GENERATION:
        parser.error(
            f"Table {args.table} runs in one process. "
            f"Received: --processes {args.processes}"
        )
    if args.scale == "small" and args.table in GENERATION:
        parser.error(
            f"Table {args.table} has no small scale: generation is measured by "
            "perplexity there, `python -m experiments.nlg_gpt2 --task reviews`."
        )
    for name in ("rank", "rows"):
        value = getattr(args, name)
        if value is not None and args.table != "methods":
            parser.error(
                f"`--{name}` is for the table of methods. "
                f"Received: --table {args.table} --{name} {value}"
            )
    rows = args.rows or methods.METHODS
    path = args.output / "runs.jsonl"
    settings = settings_of(args.table, args.scale, args.rank)
    try:
        if args.processes > 1:
            # The longest first, so that no core idles while the last one runs.
            runs = [
                (path, settings, seed, *run)
                for run in sorted(
                    runs_of(args.table, args.scale, rows, args.rank),
                    key=lambda run: run[1] not in LONG,
                )
                for seed in settings.seeds
            ]
            parallel.run_all(run_alone, runs, args.processes)
        text, notes, curves, task = make(
            args.table,
            args.scale,
            Results(path),
            args.verbose,
            rows,
            settings,
        )
    except NotFetchedError as error:
        parser.exit(2, f"{error}\n")
    text = "\n\n".join([text, *notes]) + "\n"
    name = f"table_{args.table}_{args.scale}"
    path = args.output / (f"{name}_{args.rank}" if args.rank else name)
    path.with_suffix(".md").write_text(text)
    draw(path.with_suffix(".png"), curves, task)
    print(f"\n{text}\n{path}.md, {path}.png")
    print("Next: docs/results.md, what other runs gave.")


if __name__ == "__main__":
    main()
