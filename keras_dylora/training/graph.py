"""Passes over a traced graph of torch, which make it compute less.

Keras's layers call one operation after another. A graph shows which of them
can be one, or none. Eager steps can't tell.
"""

import torch

aten = torch.ops.aten

LARGEST = 2**16  # the number of values in a constant that is kept
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
)
_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


def fold(graph):
    """Changes a `GraphModule` in place, for torch's compiler.

    - Nodes that only detach from the gradient are dropped, as none is wanted.
    - Values that depend on no input are computed once.
    """
    _drop_detach(graph)
    _keep_constants(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def simplify(graph):
    """Changes a folded `GraphModule` in place, to run as it is.

    - A bias is added within the matrix product before it.
    - Copies are left out where the original does as well.
    - Of views of views, the last alone is made, and each once.
    - A view that memory doesn't allow is a copy.

    The compiler does so by itself. It adds a bias along with what follows the
    product, which is faster than within the product.
    """
    _add_biases_within_products(graph)
    _drop_copies(graph)
    _join_views(graph)
    _reshape(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _drop_detach(graph):
    for node in list(graph.graph.nodes):
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _keep_constants(graph):
    nodes = graph.graph.nodes
    constant = set()
    for node in nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (
            _is_pure(node) and constant.issuperset(inputs) and _is_small(node)
        ):
            constant.add(node)
    # What is written must be made anew by each step, and what is made of it,
    # such as a view.
    for node in nodes:
        if _writes(node):
            for x in node.all_input_nodes:
                _leave_out(x, constant)
    for node in nodes:
        if not constant.issuperset(node.all_input_nodes):
            constant.discard(node)
    with torch.no_grad():
        values = {}

        def value(node):
            if node not in values:
                values[node] = (
                    getattr(graph, node.target)
                    if node.op == "get_attr"
                    else node.target(
                        *torch.fx.map_arg(node.args, value),
                        **torch.fx.map_arg(node.kwargs, value),
                    )
                )
            return values[node]

        for i, node in enumerate([n for n in nodes if n in constant]):
            if node.op == "get_attr" or constant.issuperset(node.users):
                continue
            name = f"_constant_{i}"
            graph.register_buffer(name, value(node), persistent=False)
            with graph.graph.inserting_before(node):
                kept = graph.graph.get_attr(name)
            kept.meta = dict(node.meta)
            node.replace_all_uses_with(kept)


def _leave_out(node, constant):
    if node in constant:
        constant.remove(node)
        for x in node.all_input_nodes:
            _leave_out(x, constant)


def _is_pure(node):
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and not _writes(node)
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def _writes(node):
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
    )


def _is_small(node):
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.numel() <= LARGEST


def _add_biases_within_products(graph):
    for node in list(graph.graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for product, bias in (node.args, node.args[::-1]):
            found = _product(product, bias)
            if found is not None:
                _fuse(graph.graph, node, found, bias)
                break


def _product(node, bias):
    """The matrix product whose values, in their order, `node` is.

    It is `None` unless `bias` is for the columns of the product.
    """
    if not all(isinstance(x, torch.fx.Node) for x in (node, bias)):
        return None
    if bias.op != "placeholder" or "val" not in node.meta:
        return None
    value, added = node.meta["val"], bias.meta["val"]
    if not value.is_contiguous() or value.shape[-added.ndim :] != added.shape:
        return None
    while node.target in _VIEWS and len(node.users) == 1:
        node = node.args[0]
    if len(node.users) > 1:
        return None
    if node.target is aten.mm.default or (
        node.target is aten.bmm.default and node.meta["val"].shape[0] == 1
    ):
        product = node.meta["val"]
        same = product.shape[-1] == added.numel()
        return node if same and product.dtype == added.dtype else None
    return None


def _fuse(graph, node, product, bias):
    sides = product.args
    with graph.inserting_before(node):
        if product.target is aten.bmm.default:
            sides = [_made(graph, aten.squeeze.dim, x, 0) for x in sides]
        flat = _made(graph, aten.view.default, bias, [-1])
        fused = _made(graph, aten.addmm.default, flat, *sides)
        shape = list(node.meta["val"].shape)
        found = _made(graph, aten.view.default, fused, shape)
    node.replace_all_uses_with(found)


def _made(graph, target, *args):
    """A new node, with its value as a fake tensor."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda x: x.meta["val"]))
    return node


def _drop_copies(graph):
    """Copies into contiguous memory only what isn't contiguous.

    Attention on a CPU needs no contiguous inputs.
    """
    nodes = list(graph.graph.nodes)
    written = {
        _base(x)
        for node in nodes
        if _writes(node)
        for x in node.all_input_nodes
    }
    for node in nodes:
        if (
            node.target is not aten.clone.default
            or node.kwargs.get("memory_format") != torch.contiguous_format
        ):
            continue
        (original,) = node.args
        base = _base(original)
        if base.op == "placeholder" or written & {base, node}:
            continue
        if all(user.target in _ATTENTION for user in node.users):
            node.replace_all_uses_with(original)
        else:
            node.target, node.kwargs = aten.contiguous.default, {}


def _base(node):
    """The node that a view is of, or the node itself."""
    while node.target in _VIEWS:
        node = node.args[0]
    return node


def _join_views(graph):
    """Replaces a view of a view by one view, and equal views by the first.

    The base must lie in one piece in memory. A view that does too has the same
    values in the same order, in another shape.
    """
    known = {}
    for node in list(graph.graph.nodes):
        if node.target not in _VIEWS:
            continue
        base = _base(node)
        value, origin = node.meta["val"], base.meta.get("val")
        if (
            origin is None  # a constant
            or not origin.is_contiguous()
            or value.numel() != origin.numel()
        ):
            continue
        turned = not value.is_contiguous()
        if turned and not (value.ndim == 2 and value.t().is_contiguous()):
            continue
        shape = tuple(value.shape[::-1] if turned else value.shape)
        with graph.graph.inserting_before(node):
            if (base, shape) not in known:
                same = shape == tuple(origin.shape)
                known[base, shape] = (
                    base
                    if same
                    else _made(
                        graph.graph, aten.view.default, base, list(shape)
                    )
                )
            found = known[base, shape]
            if turned:
                if (found, "t") not in known:
                    known[found, "t"] = _made(
                        graph.graph, aten.t.default, found
                    )
                found = known[found, "t"]
        node.replace_all_uses_with(found)


def _reshape(graph):
    """Makes each view a reshape, which copies where a view is impossible.

    Some operations, such as a convolution on a CPU, lay out their results in
    another order of axes than fake tensors say.
    """
    for node in graph.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
