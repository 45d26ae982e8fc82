"""What a DyLoRA step does before and after Keras's own, on any backend.

In frozen mode (Eq. 10) a zero gradient isn't enough: momentum and weight decay
still move a column. So the update itself is masked, the weights' and that of
whatever the optimizer keeps for them.
"""

import collections
import contextlib

from keras import ops

from keras_dylora import ranks
from keras_dylora._keras import accumulates
from keras_dylora._keras import ema_momentum
from keras_dylora._keras import loss_metrics
from keras_dylora._keras import parts
from keras_dylora.low_rank import overridden

AVERAGE = "_average"  # how Keras ends the name of a moving average's slot


def begin(model):
    """Sets the gate of a step: draws its rank and opens its columns.

    Returns:
        Dict of what the step logs: its `rank`, an int32 scalar tensor, where
        one is drawn.
    """
    state, config = model._dylora, model._dylora.config
    logs, rank = {}, max(state.probabilities)
    if config.objective == "sampled":
        rank = logs["rank"] = state.draw(model._ranks_drawn)
        model._ranks_drawn.assign(model._ranks_drawn + 1)
    if config.objective == "matryoshka":
        gate = ranks.mean_gate(state.probabilities, config.rank, config.alpha)
    else:
        gate = ranks.gate(rank, config.rank, config.alpha)
    for layer_gate in state.gates:
        layer_gate.variable.assign(gate)
    if config.frozen:
        opened = ops.cast(ranks.column(rank, config.rank), "float32")
        if accumulates(model.optimizer):
            opened = ops.maximum(model._open_columns, opened)
        model._open_columns.assign(opened)
    return logs


@contextlib.contextmanager
def summing(model):
    """Within it, `model.compute_loss` is the loss summed over the ranks.

    Keras's own step calls it, so its gradients, loss scaling and metrics (of
    the highest rank that is trained) are Keras's.
    """
    model._dylora.summing = model._dylora.config.objective == "summed"
    try:
        yield
    finally:
        model._dylora.summing = False


def summed_loss(call, model, compute_loss, x, y, y_pred, *args, **kwargs):
    """The sum over ranks b of p(b) times the loss at b (Eq. 2).

    What layers add to it, as activity regularization, is of the same rank.

    Args:
        call: a context manager of the model and `x` that yields predictions;
            within it, `model.losses` are of that call.
        model: the `DyLoRAModel`.
        compute_loss: the loss of given predictions.
        x: inputs of the model.
        y: targets.
        y_pred: predictions at the highest rank.
        *args: further arguments of `compute_loss`.
        **kwargs: further arguments of `compute_loss`.

    Returns:
        A scalar tensor.
    """
    state, config = model._dylora, model._dylora.config
    total, highest = 0.0, max(state.probabilities)
    # The highest first, while `model.losses` are those beside `y_pred`.
    for b in sorted(state.probabilities, reverse=True):
        if b == highest:
            loss = compute_loss(x, y, y_pred, *args, **kwargs)
        else:
            gate = ranks.gate(b, config.rank, config.alpha)
            with (
                overridden(state.gates, gate),
                call(model, x) as predictions,
                kept(loss_metrics(model)),
            ):
                loss = compute_loss(x, y, predictions, *args, **kwargs)
        total = total + state.probabilities[b] * loss
    return total


@contextlib.contextmanager
def kept(variables):
    """Gives variables their values back at the end of a `with` block."""
    values = [ops.copy(v) for v in variables]
    yield
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def check_frozen(optimizer):
    """Raises a `ValueError` for an optimizer that can't be held."""
    optimizers = parts(optimizer)
    if len(optimizers) > 1 and any(
        accumulates(each) or each.use_ema for each in optimizers
    ):
        raise ValueError(
            "Frozen mode can't tell when a part of a `MultiOptimizer` updates "
            "the weights, if it accumulates gradients or keeps averages. Use "
            f"one optimizer. Received: {optimizer!r}"
        )


def end(model, previous):
    """Puts back what the step may not have changed.

    A moving average of the weights (`use_ema`) is of what they were, in all
    columns.

    With gradient accumulation, an update may change the columns of all ranks
    drawn since the update before.

    Args:
        model: the `DyLoRAModel`.
        previous: dict of variable id to its value before the step, for
            everything in `watched(model)`.
    """
    opened = ops.convert_to_tensor(model._open_columns)
    mask = ops.greater(opened, 0)
    held, averages = _held(model)
    averaged, taken_back = {id(owner) for _, owner in averages}, {}
    for variable, by_column in held:
        mine = mask if by_column else ops.expand_dims(mask, -1)
        value = ops.convert_to_tensor(variable)
        allowed = ops.where(mine, value, previous[id(variable)])
        if id(variable) in averaged:
            # Before: on torch, `value` is the variable's own memory.
            taken_back[id(variable)] = value - allowed
        variable.assign(allowed)
    for average, owner in averages:
        # Keras's first average is the value itself.
        first = ops.equal(previous["iterations"], 0)
        share = ops.where(first, 1.0, 1.0 - ema_momentum(model.optimizer))
        average.assign(average - share * taken_back[id(owner)])
    updated = ops.not_equal(model.optimizer.iterations, previous["iterations"])
    model._open_columns.assign(ops.where(updated, 0.0, opened))


def watched(model):
    """The variables whose values before the step `end` needs."""
    if not model._dylora.config.frozen:
        return []
    held, _ = _held(model)
    return [variable for variable, _ in held]


def _held(model):
    """What a frozen step holds, and the moving averages of it.

    Returns:
        A list of adapters and their optimizer slots, each with whether a
        column (rather than a row) of it belongs to one rank, and a list of
        moving averages, each with the adapter that it is of.
    """
    adapters = {}
    for layer in model._dylora.layers:
        adapters[id(layer.down)] = (layer.down, True)
        adapters[id(layer.up)] = (layer.up, False)
    held, averages = list(adapters.values()), []
    for slot, owner in _slots(model.optimizer, model.trainable_variables):
        if id(owner) not in adapters:
            continue
        if slot.name.endswith(AVERAGE):
            averages.append((slot, owner))
        else:
            held.append((slot, adapters[id(owner)][1]))
    return held, averages


def _slots(optimizer, variables):
    """Pairs of optimizer variable and the model variable it is kept for.

    Keras names them `{path of the variable}_{name}`. Where several variables
    share a path, theirs are in the same order. Gradient accumulators are left
    out: they belong to the coming update.
    """
    owners = collections.defaultdict(list)
    for variable in variables:
        owners[variable.path.replace("/", "_") + "_"].append(variable)
    seen = collections.Counter()
    for slot in optimizer.variables:
        if slot.name.endswith("gradient_accumulator"):
            continue
        prefixes = [prefix for prefix in owners if slot.name.startswith(prefix)]
        if not prefixes:
            continue
        same_path = owners[max(prefixes, key=len)]
        owner = same_path[seen[slot.name] % len(same_path)]
        seen[slot.name] += 1
        if tuple(slot.shape) == tuple(owner.shape):
            yield slot, owner
