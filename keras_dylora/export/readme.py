"""README.md of an export: the ranks that it serves, and how to call it."""

NAME = "README.md"


def write(folder, plan, tuned):
    """Writes the file.

    Args:
        folder: `pathlib.Path`.
        plan: `Plan`.
        tuned: the `Served` ranks whose cut is tuned.
    """
    several = bool(plan.adapters)
    head = ["rank", "input `rank`" if plan.layout == "shared" else "folder"]
    rows = []
    for x in plan.ranks:
        b = (
            f"{min(x.rank)} to {max(x.rank)}, by layer"
            if x.by_layer
            else x.rank
        )
        mark = ", tuned" if x in tuned else ""
        place = x.value if plan.layout == "shared" else f"`{x.name}/`"
        rows.append([f"{b}{mark}", place])
    lines = [
        "# One model at every rank",
        "",
        "Fine-tuned once with [DyLoRA](https://arxiv.org/abs/2210.07558), and "
        "exported by keras_dylora. It serves these ranks:",
        "",
        *(f"| {' | '.join(map(str, x))} |" for x in [head, ["---"] * 2, *rows]),
        "",
    ]
    if several:
        names = ", ".join(f"`{x.name}` (up to {x.rank})" for x in plan.adapters)
        lines += [f"The input `adapter` names one of {names}.", ""]
    if plan.format == "saved_model":
        lines += ["```python", *_loading(plan), "```", ""]
    lines += ["`manifest.json` has the inputs, sizes and checksums.", ""]
    (folder / NAME).write_text("\n".join(lines), encoding="utf-8")


def _loading(plan):
    """Lines of code that load and call the artifact with TensorFlow."""
    inputs = "".join(f"{x.name}={x.name}, " for x in plan.inputs.specs)
    last = plan.ranks[-1]
    if plan.layout == "merged":
        load = f'tf.saved_model.load("{last.name}")'
        return ["import tensorflow as tf", "", f"model = {load}",
                f"model.serve({inputs.removesuffix(', ')})"]  # fmt: skip
    if plan.adapters:
        inputs += f'adapter=tf.constant("{plan.adapters[0].name}"), '
    return [
        "import tensorflow as tf",
        "",
        'serve = tf.saved_model.load(".").signatures["serve"]',
        f"serve({inputs}rank=tf.constant({last.value}))",
    ]
