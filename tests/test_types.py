"""Every public signature is annotated, as `py.typed` promises."""

import inspect

import pytest

import keras_dylora as kd


def public_functions():
    """Dict of name to function, of all that keras_dylora defines."""
    found = {}
    for name in set(kd.__all__) - {"__version__"}:
        public = getattr(kd, name)
        if not inspect.isclass(public):
            found[name] = public
            continue
        for base in reversed(public.__mro__):
            if base.__module__.split(".")[0] == kd.__name__:
                for attribute, value in vars(base).items():
                    if attribute == "__init__" or attribute[0] != "_":
                        found |= functions(f"{name}.{attribute}", value)
    return dict(sorted(found.items()))


def functions(name, value):
    """The functions of an attribute: a method, a property or neither."""
    if isinstance(value, property):
        found = {name: value.fget, f"{name}-setter": value.fset}
        return {k: function for k, function in found.items() if function}
    function = getattr(value, "__func__", value)  # of a class method
    return {name: function} if inspect.isfunction(function) else {}


FUNCTIONS = public_functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    missing = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is parameter.empty
        and parameter.name not in ("self", "cls")
    ]
    if signature.return_annotation is signature.empty:
        missing.append("return")
    assert not missing


def test_all_kinds_are_found():
    assert {
        "DyLoRADense.__init__",
        "DyLoRAEinsumDense.geometry_of",
        "DyLoRAModel.rank",
        "DyLoRAModel.rank_scope",
        "DyLoRAModel.trainable-setter",
        "RankAllocation.from_json",
        "enable_dylora",
    } <= FUNCTIONS.keys()
