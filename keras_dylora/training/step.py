"""A step around Keras's own: it draws a rank and masks frozen columns.

1. The gates for inference are kept, and in frozen mode also what is `masked`.
2. `begin`: the objective draws a rank, or one for each example.
3. Keras's own step runs with these gates and the objective's loss.
4. The gates for inference are restored.
5. `hold`, in frozen mode: all columns but those of the drawn rank are restored.

In frozen mode (Eq. 10), a zero gradient isn't enough, as momentum and weight
decay still move a column. So the update itself is masked, for the weights and
for the optimizer's state.
"""

import contextlib

import keras
from keras import ops

from keras_dylora import _keras, ranks


def begin(model, data):
    """Sets the gates of a step, and in frozen mode opens its columns.

    Returns:
        The gates `(batch, rank)` of the examples by path, for `training`, or
        `None` if one gate is for all; and a dict of what the step logs. The
        dict has `rank`, an int32 scalar tensor, if one rank is drawn.
    """
    adaptation = model._dylora
    x, *_ = keras.utils.unpack_x_y_sample_weight(data)
    gates, logs = adaptation.objective.gate(adaptation, x)
    if any(len(gate.shape) == 2 for gate in gates.values()):
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

    `state` is that of `stateless_call`, or `None` if the variables have it.
    Raises a `ValueError` if a step of the model is more than one call.
    """
    adaptation = model._dylora
    config, objective = adaptation.config, adaptation.objective
    if config.frozen or objective.own_loss:
        raise ValueError(
            "`frozen` and `objective='summed'` need more than one call of "
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
    """The logs of Keras's step together with those of `begin`.

    If the user has a metric called `rank`, the drawn rank is logged as
    `drawn_rank`.
    """
    free = {f"drawn_{k}" if k in logs else k: v for k, v in drawn.items()}
    return {**logs, **free}


@contextlib.contextmanager
def training(model, gates):
    """In a `with` block, `model.compute_loss` is that of the objective.

    The layers read the `gates` that `begin` returned, unless these are `None`.
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
    """The arguments of a call besides the inputs, as in Keras's own steps."""
    takes = "training" in model.call_signature_parameters
    return {"training": training} if takes else {}


def check_frozen(optimizer):
    """Raises a `ValueError` if frozen mode can't work with an optimizer."""
    parts = _keras.optimizers.optimizer_parts(optimizer)
    if any(part.use_ema for part in parts):
        raise ValueError(
            "Frozen mode keeps columns as they are, but moving averages would "
            "change them. Use `frozen=False` or an optimizer without "
            "`use_ema`. "
            f"Received: {optimizer!r} with use_ema=True"
        )
    if len(parts) > 1 and any(map(_accumulates, parts)):
        raise ValueError(
            "Frozen mode can't tell when a part of a `MultiOptimizer` updates "
            "the weights, if it accumulates gradients. Use one optimizer. "
            f"Received: {optimizer!r}"
        )


def masked(model):
    """The variables that a frozen step changes only in the open columns.

    They are found once for an optimizer, as there are thousands of names to
    compare.

    Returns:
        A list of adapters and their optimizer slots, each with a bool: whether
        a column of it, rather than a row, belongs to one rank.

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
    """Raises a `ValueError` if an optimizer may have unknown slots."""
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
            "Frozen mode must find what the optimizer keeps for an adapter, by "
            "the adapter's path in the name. Make these variables with "
            "`add_variable_from_reference`. "
            f"Received: {optimizer!r} with variables {nobodys[:8]}"
        )


def hold(model, masked, values, iterations):
    """Restores everything that the step may not have changed.

    `masked` is that of the model. `values` and `iterations` are the values of
    `masked` and of the optimizer's iterations before the step. With gradient
    accumulation, an update may change the columns of all ranks that were drawn
    since the last update.
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
    """A mask of the open columns of a layer, whose maximum may be lower."""
    mask = ops.greater(opened, 0)
    if columns == mask.shape[0]:
        return mask
    last = ops.any(mask[columns - 1 :], keepdims=True)
    return ops.concatenate([mask[: columns - 1], last])


def _adapters(model):
    """The factors of the adapters, each with whether its columns are ranks."""
    for layer in model._dylora.layers.values():
        yield layer.down, True
        yield layer.up, False


def _accumulates(optimizer):
    """Whether an optimizer updates the weights only in some of its steps."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return inner.gradient_accumulation_steps is not None
