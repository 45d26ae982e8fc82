"""WithAdapters: the methods of a live model that tell of several adapters."""

from typing import Any

from keras_dylora import training
from keras_dylora.layers.tree import Tree


class WithAdapters:
    """The part of a `DyLoRAModel` that names, adds and changes adapters."""

    _adaptation: Any

    @property
    def adapter_names(self) -> list[str]:
        """list of str. The adapters on the base, in the order they came."""
        return self._adaptation.named.names

    @property
    def active_adapter(self) -> str:
        """str. The adapter that the model computes with and trains.

        `"default"` is the name of the first, unless `load_adapter` gave it
        another.
        """
        return self._adaptation.named.active

    def add_adapter(self, name: str) -> None:
        """Adds an adapter to the same base and makes it the active one.

        Its columns are fresh, and its head starts as that of the one that was
        active. Each adapter has a head, a rank, a place in the rank sequence
        and an optimizer state of its own; the learning rate is shared. Those
        that aren't active wait beside the model, as tensors.

        Args:
            name: str.

        Raises:
            TypeError: if it isn't a string.
            ValueError: if the name is empty or taken, or a hand-built model
                isn't built yet.

        Example:

        ```python
        clf.fit(german_texts, german_labels)  # trains "default"
        clf.add_adapter("french")
        clf.fit(french_texts, french_labels)
        clf.set_adapter("default")
        ```
        """
        self._named().add(name, Tree(self))

    def set_adapter(self, name: str) -> None:
        """Makes another adapter the active one; nothing is traced again.

        Everything is of the active adapter: `predict`, `fit`, `rank`,
        `save_adapter`, `merge`. `.keras` files keep all.

        Args:
            name: str, one of `adapter_names`.

        Raises:
            ValueError: if there is no adapter of the name.
        """
        self._named().activate(name, Tree(self))

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter that isn't the active one.

        Args:
            name: str, one of `adapter_names`.

        Raises:
            ValueError: if there is no adapter of the name, or it is active.
        """
        self._named().delete(name)

    def _named(self):
        adaptation = self._adaptation
        training.write_back(self)
        return adaptation.named
