"""WithAdapters: the methods of a live model for several adapters."""

from typing import Any

from keras_dylora import training
from keras_dylora.layers.tree import Tree


class WithAdapters:
    """The part of a `DyLoRAModel` that adds, switches and deletes adapters."""

    _adaptation: Any

    @property
    def adapter_names(self) -> list[str]:
        """list of str. The names of the adapters, in their order of adding."""
        return self._adaptation.named.names

    @property
    def active_adapter(self) -> str:
        """str. The adapter that the model computes with and trains.

        The first adapter is called `"default"`, unless `load_adapter` gave it
        another name.
        """
        return self._adaptation.named.active

    def add_adapter(self, name: str) -> None:
        """Adds an adapter to the same base and makes it the active one.

        The new adapter has fresh columns, and its head starts as a copy of the
        active adapter's head. Each adapter has its own head, rank, place in the
        rank sequence and optimizer state. The learning rate is shared. Adapters
        that aren't active are kept beside the model, as tensors.

        Args:
            name: str. The name of the new adapter.

        Raises:
            TypeError: if `name` isn't a string.
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

        `predict`, `fit`, `rank`, `save_adapter` and `merge` all use the active
        adapter. `.keras` files keep all adapters.

        Args:
            name: str, one of `adapter_names`.

        Raises:
            ValueError: if no adapter has this name.
        """
        self._named().activate(name, Tree(self))

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter that isn't the active one.

        Args:
            name: str, one of `adapter_names`.

        Raises:
            ValueError: if no adapter has this name, or if it is active.
        """
        self._named().delete(name)

    def _named(self):
        adaptation = self._adaptation
        training.write_back(self)
        return adaptation.named
