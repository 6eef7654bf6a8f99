"""Triton's interpreter, without its patching of triton.language anew for every call of a device function."""

import os


def patch_once() -> None:
    """A launch patches triton.language; a device function that it calls need do it once, for the module it is of.

    Doing it for every call wraps the wrappers again, and takes most of the interpreter's time.
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
