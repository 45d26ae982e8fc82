"""The private parts of Keras's optimizers: slots, and how to make another."""

import collections

import keras

ACCUMULATOR = "gradient_accumulator"


def slot_prefix(variable):
    """How the names of what an optimizer keeps for a variable begin."""
    return variable.path.replace("/", "_") + "_"


def optimizer_slots(optimizer, accumulators=False):
    """Pairs of optimizer variable and the model variable it is kept for.

    Keras names them `{path of the variable}_{name}` and has no other way to
    tell. Where several variables share a path, theirs are in the same order.
    Gradient accumulators, which belong to the coming update, are left out
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
        while prefix and prefix not in owners:  # the longest that is one
            prefix = prefix[: prefix.rfind("_", 0, -1) + 1]
        if prefix:
            same_path = owners[prefix]
            yield slot, same_path[seen[slot.name] % len(same_path)]
            seen[slot.name] += 1


def optimizer_parts(optimizer):
    """The optimizers that update weights: those in one, or just this."""
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
    """What `Adafactor` keeps for each variable: means by row and by column.

    They have the name of the variable alone, without its path.
    """
    means = (getattr(optimizer, name, ()) for name in ("_r", "_c"))
    return zip(built_for(optimizer), *means, strict=False)


def optimizer_state(optimizer):
    """The variables of an optimizer without its learning rate.

    The user's own setting, which Keras has among them.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rates = {id(each._learning_rate) for each in (optimizer, inner)}
    return [v for v in optimizer.variables if id(v) not in rates]


def fresh_optimizer(optimizer):
    """An optimizer of the same settings, without state.

    A learning-rate schedule is handed over as it is: Keras would serialize it,
    but trains with one that has no `get_config`. What is excluded from weight
    decay isn't in the config either.
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
    """The `fresh_optimizer` of one, built for the same variables.

    Keras doesn't tell them; those that a model trains may be others by now.
    """
    fresh = fresh_optimizer(optimizer)
    fresh.build(built_for(optimizer))
    return fresh


def public_optimizers(compile_config):
    """A compile config in which torch's own optimizers have public names.

    On torch, Keras saves its optimizers under private modules of that
    backend, and no other backend can load them (Keras 3.15).
    """
    if isinstance(compile_config, dict):
        config = {k: public_optimizers(v) for k, v in compile_config.items()}
        if str(config.get("module")).startswith(_TORCH_OPTIMIZERS):
            config["module"] = "keras.optimizers"
            config["registered_name"] = None
        return config
    return compile_config


_TORCH_OPTIMIZERS = "keras.src.backend.torch.optimizers"
