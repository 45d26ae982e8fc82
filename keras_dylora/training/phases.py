"""Phases: what changes within `fit`, as the columns' order and the tuning."""

import functools
import math
import warnings

import keras
from keras import ops

from keras_dylora.checks import is_share
from keras_dylora.cuts import users_line
from keras_dylora.layers.factors import float32_array
from keras_dylora.training.full_rank import at_full_rank, order_columns


class Phases(keras.callbacks.Callback):
    """Begins the phases of a run: the order of the columns, and the tuning.

    A phase may begin at a number of steps or at a share of all steps. Only
    `fit` knows how many steps there are, so this callback also tells
    `ProgressiveDecay`. With `steps_per_execution`, a phase begins at the end of
    the compiled function that reaches its step. The callback reads the step
    only where a phase may begin, since a read waits for the device.

    Args:
        write_back: function of a model that writes the state of a running
            `fit` to the variables.
        decays: `Decays` of the model.
        tuning: `TuningInFit` of the model.
    """

    def __init__(self, write_back, decays, tuning):
        super().__init__()
        self._write_back = write_back
        self._decays, self._tuning = decays, tuning

    def on_train_begin(self, logs=None):
        self._batches = 0  # to pass before a phase may begin
        self._unordered = set()  # digests of the columns before the order
        self._tuned = {}  # cuts of the epochs, by digest of the columns
        # The phases to come: pairs of the step and the function to call.
        self._ahead = None

    def on_epoch_begin(self, epoch, logs=None):
        if self._ahead is None:
            self._ahead = self._found(epoch)
            self._go_on()

    def _found(self, epoch):
        """Finds the phases of a `fit` that begins at an epoch.

        It also gives the schedules the number of steps.
        """
        full_rank = self.model._run_option("full_rank_steps")
        tune = self.model._run_option("tune")
        share = is_share(full_rank)
        ordered = full_rank and self._at_full_rank()
        if not self._decays and not share and not tune:
            return [(full_rank, self._order)] if ordered else []
        steps = (self.params or {}).get("steps")
        if steps is None:
            raise ValueError(
                "`fit` must know how many batches an epoch has, for a share of "
                "the steps and for `ProgressiveDecay`. Give "
                "`steps_per_epoch`, or numbers of steps. Received: "
                f"full_rank_steps={full_rank}, tune={tune}, and data of "
                "unknown length"
            )
        total, done = steps * self.params["epochs"], steps * epoch
        tuned = min(round(tune * total), total - 1)
        untuned = total - tuned
        begin = self._drawn() - done
        order = full_rank
        if share:
            order = begin + min(round(full_rank * total), untuned)
        comes = full_rank and (epoch or ordered)
        self._decays.tell(total, order - begin if comes else None, done)
        ahead = [(order, self._order)] if ordered else []
        if tuned:
            self._tuning.check_devices()
            again = done >= untuned
            if not again:
                self._tuning.forget()
            ahead.append(
                (
                    begin + untuned,
                    functools.partial(self._tune, tuned, again),
                )
            )
        return ahead

    def on_train_batch_end(self, batch, logs=None):
        self._tuning.keep()
        self._batches -= 1
        if self._batches <= 0:
            self._go_on()

    def _go_on(self):
        """Begins the phases whose step is reached."""
        self._batches = math.inf  # the step isn't read again in this run
        if not self._ahead:
            return
        self._write_back(self.model)
        while self._ahead:
            place, begin = self._ahead[0]
            left = place - self._drawn()
            if left > 0:
                self._batches = math.ceil(left / self.model.steps_per_execution)
                return
            self._ahead.pop(0)
            begin()

    def _order(self):
        if self._at_full_rank():
            order_columns(self.model, self.model.optimizer)
            self._tell("the columns are in order, lower ranks are trained")

    def _tune(self, steps, again):
        self._tuning.begin(steps, again)
        self._tell(
            "the maximum rank and the cuts of lower ones are trained, in "
            f"{steps} steps"
        )

    def _tell(self, what):
        if (self.params or {}).get("verbose"):
            print(f"\nStep {self._drawn()}: {what}.")

    def on_test_begin(self, logs=None):
        self._tuning.publish()

    def on_epoch_end(self, epoch, logs=None):
        self._tuning.publish()
        if self._tuning.tuning is not None:
            self._tuned[self._digest()] = self.model._dylora.named.cuts
        if any(begin == self._order for _, begin in self._ahead):
            self._write_back(self.model)
            self._unordered.add(self._digest())

    def settle(self):
        """Makes columns and cuts fit each other at the end of a run.

        A callback may have restored weights of an earlier epoch, so call this
        after all callbacks have ended.
        """
        if self._tuned:
            self._settle_cuts()
        if (
            not self._unordered
            or self._at_full_rank()
            or self._digest() not in self._unordered
        ):
            return
        # The optimizer's state already belongs to the ordered columns.
        order_columns(self.model, None)
        warnings.warn(
            "The columns of adapters must be in order after `full_rank_steps`, "
            "so they were put in order again. Received: weights of before the "
            "order, restored by a callback such as `EarlyStopping`",
            stacklevel=users_line(),
        )

    def _settle_cuts(self):
        """Takes the cuts that belong to the columns, and orders the columns.

        After the order, a rank that wasn't tuned is the best cut of its size.
        """
        adaptation = self.model._dylora
        cuts = self._tuned.get(self._digest())
        adaptation.set_tuned_cuts(cuts or [])
        if cuts is None:
            warnings.warn(
                "Cuts are tuned for the columns of the same step, so they are "
                "dropped: call `tune_ranks`. Received: weights of before the "
                "tuning, restored by a callback such as `EarlyStopping`",
                stacklevel=users_line(),
            )
        elif adaptation.config.full_rank_steps:
            order_columns(self.model, self.model.optimizer)

    def on_train_end(self, logs=None):
        self._tuning.end()
        self._tuning.forget()
        if any(begin == self._order for _, begin in self._ahead):
            left = self._ahead[0][0] - self._drawn()
            warnings.warn(
                "Lower ranks are trained after `full_rank_steps`, so this run "
                "has trained the maximum alone. Train longer, or use "
                "`order_ranks`. Received: full_rank_steps="
                f"{self.model._dylora.config.full_rank_steps}, of which "
                f"{left} are left",
                stacklevel=2,
            )

    def _at_full_rank(self):
        if not hasattr(self.model, "_dylora"):
            return True  # on TensorFlow, built in its first step only
        self._write_back(self.model)
        return at_full_rank(self.model._dylora)

    def _digest(self):
        layers = self.model._dylora.layers.values()
        columns = [float32_array(v) for x in layers for v in (x.down, x.up)]
        return hash(b"".join(x.tobytes() for x in columns))

    def _drawn(self):
        if not hasattr(self.model, "_dylora"):
            return 0
        return int(ops.convert_to_numpy(self.model._dylora.ranks_drawn))
