"""KeptInFiles: the methods that save and load a live model."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import keras

from keras_dylora import _keras, files
from keras_dylora.layers.tree import Tree
from keras_dylora.live.adaptation import Adaptation
from keras_dylora.live.live_class import is_combined, to_dylora_class
from keras_dylora.live.plain import as_plain
from keras_dylora.live.recompile import compile_from
from keras_dylora.live.saving import (
    NO_HDF5,
    check_quantized,
    check_savable,
    load_state,
    save_state,
)

if TYPE_CHECKING:
    # The class that this one is mixed into.
    from keras import Model as _Base
else:
    _Base = object

# The version of files with tuned cuts. With several adapters it is 2, else 1.
FORMAT_VERSION = 3


class KeptInFiles(_Base):
    """The part of a `DyLoRAModel` that saves and loads it."""

    _adaptation: Any
    _dylora_options: dict[str, Any]

    def save(
        self,
        filepath: str | os.PathLike[str],
        overwrite: bool = True,
        **kwargs: Any,
    ) -> None:
        """Saves the model with its adapters, as `keras.Model.save` does.

        A `.keras` file is written under another name first and then renamed, so
        it is never half-written.

        Args:
            filepath: str or path.
            overwrite: bool, as in `keras.Model.save`. Defaults to `True`.
            **kwargs: as in `keras.Model.save`.

        Raises:
            ValueError: if the file is HDF5, or if the model couldn't be loaded
                from the file.
        """
        path = str(filepath)
        if path.endswith((".h5", ".hdf5")):
            raise ValueError(f"{NO_HDF5}. Received: filepath={path!r}")
        if is_combined(type(self)):
            check_savable(Tree(self))
        asks = not overwrite and os.path.exists(path)
        if not path.endswith(".keras") or "://" in path or asks:
            return super().save(filepath, overwrite, **kwargs)
        with files.new_file(path) as beside:
            super().save(beside, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class of an enabled model can't be imported. The archive names the
        # class that revives it.
        _, arguments = super().__reduce__()
        return _keras.unpickle, arguments

    def save_own_variables(self, store: Any) -> None:
        self._prepare()
        super().save_own_variables(store)
        save_state(Tree(self), store)

    def load_own_variables(self, store: Any) -> None:
        self._prepare()
        super().load_own_variables(load_state(Tree(self), store))

    def get_compile_config(self) -> dict[str, Any] | None:
        config = _keras.optimizers.public_optimizers(
            super().get_compile_config()
        )
        if config and self.optimizer is not None:
            # Keras can't load the state of an optimizer that wasn't built into
            # one that is.
            config["optimizer_built"] = self.optimizer.built
        return _keras.stamped_jit(config)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        compile_from(self, config)

    def get_build_config(self) -> dict[str, Any] | None:
        # A subclass may have its own config, without any of this.
        config = super().get_build_config()
        if config is None or is_combined(type(self)):
            return config
        mine = {
            n: getattr(self._adaptation.config, n) for n in self._dylora_options
        }
        return {**config, "dylora": mine}

    def build_from_config(self, config: dict[str, Any]) -> None:
        config = dict(config)
        options = config.pop("dylora", {})
        self._dylora_options.update(
            keras.saving.deserialize_keras_object(options)
        )
        super().build_from_config(config)

    def get_config(self) -> dict[str, Any]:
        if _keras.saves_hdf5():  # `keras.saving.save_model` doesn't call `save`
            raise ValueError(f"{NO_HDF5}. Received: {self.name}")
        if not is_combined(type(self)):
            return super().get_config()
        adaptation, tree = self._adaptation, Tree(self)
        adaptation.settle(tree)
        check_savable(tree)
        trainable = [w.trainable for w in self.weights]
        dylora = adaptation.get_config(tree)
        with as_plain(tree):
            check_quantized(tree)
            base = keras.saving.serialize_keras_object(self)
        named = adaptation.named
        version = FORMAT_VERSION if named.are_tuned else 2 - named.is_plain
        return {
            "format_version": version,
            "base": base,
            "dylora": dylora,
            "trainable": trainable,
        }

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        custom_objects: Mapping[str, Any] | None = None,
    ) -> Self:
        if not {"format_version", "base", "dylora"} <= config.keys():
            return super().from_config(config, custom_objects)
        if config["format_version"] > FORMAT_VERSION:
            raise ValueError(
                "The file must be of format version "
                f"{FORMAT_VERSION} or older; a newer keras_dylora wrote it. "
                f"Received: format_version={config['format_version']}"
            )
        model = keras.saving.deserialize_keras_object(
            config["base"], custom_objects
        )
        adaptation = Adaptation.from_config(
            Tree(model), config["dylora"], config["trainable"]
        )
        to_dylora_class(model, adaptation, cls)
        return model
