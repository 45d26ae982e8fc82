"""A step around Keras's own: a rank is drawn, frozen columns are masked.

1. The gates of inference are kept, and in frozen mode what is `masked`.
2. `begin`: the objective draws a rank, or one for each example.
3. Keras's own step, at the gates and with the loss of the objective.
4. The gates of inference are put back.
5. `hold`, in frozen mode: all columns but those of the drawn rank are put back.

In frozen mode (Eq. 10) a zero gradient isn't enough: momentum and weight decay
still move a column. So the update itself is masked, the weights' and that of
whatever the optimizer keeps for them.
"""

import contextlib

import keras
from keras import ops

from keras_dylora import _keras, ranks


def begin(model, data):
    """Sets the gates of a step, and in frozen mode opens its columns.

    Returns:
        The gates `(batch, rank)` or cores `(batch, rank, rank)` of the examples
        by path, to be read within `training`, or `None` where one gate is for
        all; and a dict of what the
        step logs: its `rank`, an int32 scalar tensor, where one is drawn.
    """
    adaptation = model._dylora
    x, *_ = keras.utils.unpack_x_y_sample_weight(data)
    gates, logs = adaptation.objective.gate(adaptation, x)
    if any(len(gate.shape) > 1 for gate in gates.values()):
        return gates, logs
    adaptation.assign_gates(gates)
    if adaptation.config.frozen:
        mask = ranks.column(logs["rank"], adaptation.config.rank)
        mask = ops.cast(mask, "float32")
        if _accumulates(model.optimizer):
            mask = ops.maximum(adaptation.open_columns, mask)
        adaptation.open_columns.assign(mask)
    return None, logs


def drawn(model, x, state=None):
    """The gates of a training step that is one call, and the state after it.

    The state is that of `stateless_call`, or `None` where there are variables.
    Raises a `ValueError` if a step of the model is more than a call.
    """
    adaptation = model._dylora
    config, objective = adaptation.config, adaptation.objective
    if config.frozen or objective.own_loss:
        raise ValueError(
            "`frozen` and `objective='summed'` take more than a call of "
            "the model: train with `fit` or `train_on_batch`. Received: "
            f"frozen={config.frozen}, objective={config.objective!r}"
        )
    if state is None:
        return objective.gate(adaptation, x)[0], None
    variables = model.non_trainable_variables
    pairs = list(zip(variables, state, strict=True))
    with keras.StatelessScope(state_mapping=pairs) as scope:
        gate, _ = objective.gate(adaptation, x)
    return gate, [scope.get_current_value(v) for v in variables]


def logged(logs, drawn):
    """Logs of Keras's step with those of `begin`, none of which is lost.

    A metric of the user's may be called `rank`; the drawn one is `drawn_rank`
    then.
    """
    free = {f"drawn_{k}" if k in logs else k: v for k, v in drawn.items()}
    return {**logs, **free}


@contextlib.contextmanager
def training(model, gates):
    """Within it, `model.compute_loss` is the objective's.

    And layers read what `begin` returned, if it isn't `None`.
    """
    adaptation = model._dylora
    adaptation.training = True
    try:
        with (
            adaptation.rank_chosen(),
            adaptation.untuned(),
            adaptation.overridden(gates),
        ):
            yield
    finally:
        adaptation.training = False


def call_argument(model, training):
    """Arguments of a call beside the inputs, as in Keras's own steps."""
    takes = "training" in model.call_signature_parameters
    return {"training": training} if takes else {}


def check_frozen(optimizer):
    """Raises a `ValueError` for an optimizer that frozen mode can't hold."""
    parts = _keras.optimizers.optimizer_parts(optimizer)
    if any(part.use_ema for part in parts):
        raise ValueError(
            "Frozen mode holds columns, of which moving averages would move. "
            "Use `frozen=False` or an optimizer without `use_ema`. "
            f"Received: {optimizer!r} with use_ema=True"
        )
    if len(parts) > 1 and any(map(_accumulates, parts)):
        raise ValueError(
            "Frozen mode can't tell when a part of a `MultiOptimizer` updates "
            "the weights, if it accumulates gradients. Use one optimizer. "
            f"Received: {optimizer!r}"
        )


def masked(model):
    """What a frozen step changes in the open columns alone.

    Found once for an optimizer: there are thousands of names to compare.

    Returns:
        A list of adapters and their optimizer slots, each with whether a
        column (rather than a row) of it belongs to one rank.

    Raises:
        ValueError: if the slots of the adapters can't be found.
    """
    adaptation, optimizer = model._dylora, model.optimizer
    if not adaptation.config.frozen:
        return []
    state = optimizer, optimizer.built
    if adaptation.masked[0] != state:
        adapters = {id(v): by_column for v, by_column in _adapters(model)}
        slots = [
            (slot, adapters[id(owner)])
            for slot, owner in _keras.optimizers.optimizer_slots(optimizer)
            if id(owner) in adapters and slot.shape == owner.shape
        ]
        if not slots:
            _check_none(model)
        adaptation.masked = state, [*_adapters(model), *slots]
    return adaptation.masked[1]


def _check_none(model):
    """Raises a `ValueError` if an optimizer may have slots of adapters."""
    optimizer = model.optimizer
    shapes = {v.shape for v, _ in _adapters(model) if v.trainable}
    owned = {
        id(slot)
        for slot, _ in _keras.optimizers.optimizer_slots(optimizer, True)
    }
    nobodys = [
        v.name
        for v in optimizer.variables
        if v.shape in shapes and id(v) not in owned
    ]
    if nobodys:
        raise ValueError(
            "Frozen mode must find what the optimizer keeps for an adapter, "
            "which Keras names after the adapter's path. Make it with "
            "`add_variable_from_reference`. "
            f"Received: {optimizer!r} with variables {nobodys[:8]}"
        )


def hold(model, masked, values, iterations):
    """Puts back what the step may not have changed.

    Takes `masked(model)`, and the values of it and of the optimizer's
    iterations before the step. With gradient accumulation, an update may
    change the columns of all ranks drawn since the update before.
    """
    opened = ops.convert_to_tensor(model._dylora.open_columns)
    for (variable, by_column), value in zip(masked, values, strict=True):
        mine = _open(opened, variable.shape[-1 if by_column else 0])
        mine = mine if by_column else ops.expand_dims(mine, -1)
        after = ops.convert_to_tensor(variable)
        variable.assign(ops.where(mine, after, value))
    updated = ops.not_equal(model.optimizer.iterations, iterations)
    model._dylora.open_columns.assign(ops.where(updated, 0.0, opened))


def _open(opened, columns):
    """A mask of the open columns of a layer, whose last may be a lower one."""
    mask = ops.greater(opened, 0)
    if columns == mask.shape[0]:
        return mask
    last = ops.any(mask[columns - 1 :], keepdims=True)
    return ops.concatenate([mask[: columns - 1], last])


def _adapters(model):
    """The adapters, each with whether its columns are of one rank."""
    for layer in model._dylora.layers.values():
        yield layer.down, True
        yield layer.up, False


def _accumulates(optimizer):
    """Whether an optimizer updates the weights in some of its steps only."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return inner.gradient_accumulation_steps is not None
