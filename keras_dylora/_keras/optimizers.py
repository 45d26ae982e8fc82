"""The private parts of Keras's optimizers: their slots, and fresh copies."""

import collections

import keras

ACCUMULATOR = "gradient_accumulator"


def slot_prefix(variable):
    """The beginning of the names of an optimizer's slots for a variable."""
    return variable.path.replace("/", "_") + "_"


def optimizer_slots(optimizer, accumulators=False):
    """Pairs of an optimizer variable and the model variable that it is for.

    Keras names the first `{path of the variable}_{name}`, and there is no other
    way to tell. If several variables share a path, their slots are in the same
    order. Gradient accumulators, which belong to the next update, are left out
    unless they are asked for.
    """
    owners = collections.defaultdict(list)
    for variable in built_for(optimizer):
        owners[slot_prefix(variable)].append(variable)
    seen = collections.Counter()
    for slot in optimizer.variables:
        if slot.name.endswith(ACCUMULATOR) and not accumulators:
            continue
        prefix = slot.name
        while prefix and prefix not in owners:  # the longest that matches
            prefix = prefix[: prefix.rfind("_", 0, -1) + 1]
        if prefix:
            same_path = owners[prefix]
            yield slot, same_path[seen[slot.name] % len(same_path)]
            seen[slot.name] += 1


def optimizer_parts(optimizer):
    """The optimizers that update weights: those in this one, or itself."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return getattr(inner, "optimizers", [inner])


def schedules(optimizer):
    """Pairs of each learning-rate schedule and the optimizer that has it."""
    for part in optimizer_parts(optimizer) if optimizer else ():
        rate = getattr(part, "_learning_rate", None)
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            yield rate, part


def built_for(optimizer):
    """The variables that an optimizer was built for."""
    return optimizer._trainable_variables


def factored_slots(optimizer):
    """The means by row and by column that `Adafactor` keeps for each variable.

    They have only the name of the variable, without its path.
    """
    means = (getattr(optimizer, name, ()) for name in ("_r", "_c"))
    return zip(built_for(optimizer), *means, strict=False)


def optimizer_state(optimizer):
    """The variables of an optimizer, except its learning rate.

    The learning rate is the user's setting, but Keras has it among them.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rates = {id(each._learning_rate) for each in (optimizer, inner)}
    return [v for v in optimizer.variables if id(v) not in rates]


def fresh_optimizer(optimizer):
    """An optimizer with the same settings, without state.

    A learning-rate schedule is passed on as it is: Keras would serialize it,
    but can train with one that has no `get_config`. The variables that are
    excluded from weight decay aren't in the config either.
    """
    if hasattr(optimizer, "inner_optimizer"):
        return type(optimizer)(
            fresh_optimizer(optimizer.inner_optimizer),
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    rate = optimizer._learning_rate
    if isinstance(rate, keras.Variable):
        config = optimizer.get_config()
    else:
        object.__setattr__(optimizer, "_learning_rate", None)
        try:
            config = optimizer.get_config() | {"learning_rate": rate}
        finally:
            object.__setattr__(optimizer, "_learning_rate", rate)
    fresh = type(optimizer).from_config(config)
    for name in (
        "_exclude_from_weight_decay",
        "_exclude_from_weight_decay_pattern",
    ):
        if hasattr(optimizer, name):
            object.__setattr__(fresh, name, getattr(optimizer, name))
    return fresh


def built_anew(optimizer):
    """The `fresh_optimizer` of an optimizer, built for the same variables.

    Keras doesn't say which these are; by now, the model may train others.
    """
    fresh = fresh_optimizer(optimizer)
    fresh.build(built_for(optimizer))
    return fresh


def public_optimizers(compile_config):
    """A compile config in which torch's own optimizers have public names.

    On torch, Keras saves its optimizers under private modules of that backend,
    which no other backend can load (Keras 3.15).
    """
    if isinstance(compile_config, dict):
        config = {k: public_optimizers(v) for k, v in compile_config.items()}
        if str(config.get("module")).startswith(_TORCH_OPTIMIZERS):
            config["module"] = "keras.optimizers"
            config["registered_name"] = None
        return config
    return compile_config


_TORCH_OPTIMIZERS = "keras.src.backend.torch.optimizers"
