"""Triton's interpreter, without what takes most of its time and changes nothing."""

import os


def patch_once() -> None:
    """Let the interpreter do once what it does anew for every call, operation or tensor.

    A launch patches triton.language; a device function that it calls need do it once, for the module it is of. Doing it
    for every call wraps the wrappers again.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    _look_types_up()


def _look_types_up() -> None:
    """Types and shapes are made of a few dozen values: what was worked out for one of them is kept."""
    from triton import language as tl
    from triton.language import core, semantic
    from triton.runtime import interpreter

    np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype(tt_dtype):
        element = tt_dtype.element_ty if tt_dtype.is_block() else tt_dtype
        if element.name not in np_dtypes:
            np_dtypes[element.name] = np_dtype(element)
        return np_dtypes[element.name]

    interpreter._get_np_dtype = get_np_dtype

    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_where_shapes_differ(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and (*lhs.type.shape,) == (*rhs.type.shape,):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.TritonSemantic.broadcast_impl_value = broadcast_where_shapes_differ

    block_init, tensor_init, blocks, shapes = tl.block_type.__init__, tl.tensor.__init__, {}, {}

    def block(self, element_ty, shape):
        key = element_ty.name, tuple(core._unwrap_if_constexpr(n) for n in shape)
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    tl.block_type.__init__ = block

    def tensor(self, handle, type):
        key = (*type.shape,) if type.is_block() else ()
        if key not in shapes:
            tensor_init(self, handle, type)
            shapes[key] = {name: value for name, value in vars(self).items() if name not in ("handle", "type", "dtype")}
        vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    tl.tensor.__init__ = tensor
