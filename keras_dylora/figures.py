"""Pictures: figures of matplotlib, which is an extra, and their files."""

from keras_dylora import files


def new_figure(size):
    """An empty figure of a size in inches; an `ImportError` says what to do."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`plot` needs matplotlib: pip install matplotlib"
        ) from error
    return Figure(figsize=size, layout="constrained")


def save(figure, path):
    """Writes a figure, if there is a path, in the format of its ending."""
    if path is not None:
        with files.new_file(path) as beside:
            figure.savefig(beside, format=beside.suffix[1:] or "png")
