"""Real text: the movie-review sentences, and GLUE by TFDS."""

import pathlib
import subprocess
import sys
import tarfile
import tempfile

import numpy as np

VADER = "vaderSentiment==3.3.2"
CACHE = pathlib.Path(__file__).parent / "data"


class NotFetchedError(RuntimeError):
    """Data or a preset is missing; the message says how to get it."""


def vader_corpus(name):
    """Sentences of one corpus of Hutto & Gilbert (2014) and their ratings.

    The corpora (MIT licence) are in the source distribution of
    `vaderSentiment`, which pip downloads once into `examples/data`.

    Args:
        name: `"movieReviewSnippets"`, `"amazonReviewSnippets"`,
            `"nytEditorialSnippets"` or `"tweets"`.

    Returns:
        A list of str and an array of their mean human ratings, in -4..4.
    """
    archive = CACHE / "hutto_ICWSM_2014.tar.gz"
    if not archive.exists():
        _download(archive)
    with tarfile.open(archive) as tar:
        member = f"hutto_ICWSM_2014/{name}_GroundTruth.txt"
        text = tar.extractfile(member).read().decode("utf-8", "replace")
    rows = [line.split("\t") for line in text.splitlines() if line]
    return (
        [row[2].strip() for row in rows],
        np.array([float(row[1]) for row in rows]),
    )


def _download(archive):
    archive.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet"]
        command += ["--no-deps", "--no-binary", ":all:", "--dest", folder]
        try:
            subprocess.run(
                [*command, VADER], check=True, capture_output=True, text=True
            )
        except subprocess.CalledProcessError as error:
            raise NotFetchedError(
                f"The sentences are in the source distribution of {VADER}, "
                f"which pip must be able to download into {archive.parent}. "
                f"Received: {(error.stderr.strip().splitlines() or [''])[-1]}"
            ) from error
        (sdist,) = pathlib.Path(folder).iterdir()
        with tarfile.open(sdist) as tar:
            (member,) = (m for m in tar if m.name.endswith(archive.name))
            content = tar.extractfile(member).read()
        partial = pathlib.Path(folder) / archive.name
        partial.write_bytes(content)
        partial.replace(archive)


def movie_reviews(seed=0, test_size=2_000):
    """Movie-review sentences that are clearly positive or negative.

    Rating above 0.5: label 1; below -0.5: label 0; the rest is left out.

    Returns:
        `(texts, labels), (test_texts, test_labels)`, shuffled, the last
        `test_size` for the test.
    """
    texts, ratings = vader_corpus("movieReviewSnippets")
    clear = np.flatnonzero(np.abs(ratings) > 0.5)
    order = np.random.default_rng(seed).permutation(clear)
    texts = np.array(texts, dtype=object)[order]
    labels = (ratings[order] > 0).astype("int32")
    return (
        (list(texts[:-test_size]), labels[:-test_size]),
        (list(texts[-test_size:]), labels[-test_size:]),
    )


def tfds_examples(name, split):
    """The examples of one split of a TFDS dataset, in NumPy.

    Raises:
        NotFetchedError: if the dataset can't be had.
    """
    try:
        import tensorflow_datasets as tfds

        dataset = tfds.load(name, split=split)
    except Exception as error:
        raise NotFetchedError(
            f"The TFDS dataset {name} must be on this machine or within reach: "
            f"`tfds build {name}`, or "
            '`python -c "import tensorflow_datasets as tfds; '
            f"tfds.load('{name}')\"`, fetches it, TFDS_DATA_DIR says where it "
            f"is. Received: {type(error).__name__}: "
            f"{(str(error).strip().splitlines() or [''])[0]}"
        ) from error
    return tfds.as_numpy(dataset)


def glue(task, split, columns):
    """A split of a GLUE task, such as `"sst2"`, by TFDS.

    Args:
        task: str. Its name.
        split: str. Its split.
        columns: names of its sentences.

    Returns:
        A tuple of lists of str, one for each column, and an array of labels.
    """
    rows = list(tfds_examples(f"glue/{task}", split))
    texts = tuple([row[c].decode("utf-8") for row in rows] for c in columns)
    return texts, np.array([row["label"] for row in rows])


def load(name, seed=0):
    """Loads `"movie_reviews"` or a single-sentence GLUE task, `"glue/sst2"`.

    Returns:
        `(texts, labels), (test_texts, test_labels)`; GLUE's test part is the
        validation split, whose labels are public.
    """
    if name == "movie_reviews":
        return movie_reviews(seed)
    task = name.removeprefix("glue/")
    splits = (glue(task, s, ("sentence",)) for s in ("train", "validation"))
    return tuple((texts, labels) for (texts,), labels in splits)
