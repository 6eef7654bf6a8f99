"""An attention of transformers with a call of ours in place of its RoPE: what `fuse` and `add_qk_norm` stand on.

transformers' attentions turn q and k in one line,

    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

and those with QK-norm have `self.q_norm(...)` and `self.k_norm(...)` a few lines before it or after it. `rewired` makes
a subclass whose forward is the class's own source with that line turned into

    query_states, key_states = self.qk_norm_rope(query_states, key_states, (cos, sin))

and the calls of the norms left out. Everything else, caches, masks, kernels, gates, stays the installed version's own
code. What is not exactly of this shape is refused, with the reason. An attention becomes of the subclass, and is itself
again, by an assignment to its __class__: no parameter, hook, or name in its state dict is touched.
"""

import ast
import functools
import inspect
import linecache
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nsphere.qk_norm import Layout, QKNorm, Tables

# RoPE functions, and how they take q and k
_ROPES: dict[str, Layout] = {
    "apply_rotary_pos_emb": "bhsd",
    "apply_rotary_emb": "bshd",
    "apply_rotary_pos_emb_vision": "thd",
}
# calls that change how a tensor is seen, not its values
_SHAPES = {"view", "reshape", "transpose", "contiguous", "unflatten", "flatten", "squeeze", "unsqueeze", "permute"}


class CannotRewireError(ValueError):
    """The attention's forward is not of the known shape; says why."""


class Wiring:
    """What a rewired attention calls: a plain object, so that its QKNorms are no submodules of the attention."""

    def __init__(self, qk_norm: QKNorm, without_rope: QKNorm):
        self.qk_norm = qk_norm
        self.without_rope = without_rope

    def __call__(self, q: Tensor, k: Tensor, tables: Tables | Tensor | None) -> Tables:
        """Normalise and turn q and k; `tables` is None where the layer does not turn."""
        if tables is None:
            return self.without_rope(q, k)
        if isinstance(tables, Tensor):  # complex, cos + i·sin
            tables = tables.real, tables.imag
        return self.qk_norm(q, k, rope=tables)


def rewire(attention: Any, norms: tuple[str, ...], wiring: Wiring) -> None:
    """Let the attention run with its RoPE, and the norms of these names, replaced by the wiring.

    Raises:
        CannotRewireError: if its forward is not of the known shape. The attention is then as it was.
    """
    original: Any = type(attention)
    attention.__class__ = rewired(original, norms)
    attention.__dict__["_wiring"] = wiring


def restore(attention: Any) -> None:
    """Undo `rewire`."""
    attention.__class__ = type(attention)._original
    del attention.__dict__["_wiring"]


def wiring_of(attention: Any) -> Wiring | None:
    """The wiring of a rewired attention, None for any other module."""
    return attention.__dict__.get("_wiring")


def own_rope(attention: nn.Module, q: Tensor, k: Tensor, tables: Tables | Tensor) -> Tables:
    """What the own RoPE of a rewired attention makes of q and k."""
    kind: Any = type(attention)
    if isinstance(tables, Tensor):
        return kind._rope(q, k, tables)
    if not kind._joined:
        return kind._rope(q, k, *tables)
    width = tables[0].shape[-1]
    turned = kind._rope(q[..., :width], k[..., :width], *tables)
    q, k = (torch.cat((part, x[..., width:]), -1) for part, x in zip(turned, (q, k), strict=True))
    return q, k


def layout_of(attention: Any, norms: tuple[str, ...]) -> Layout:
    """How q and k come to the wiring of such an attention."""
    return rewired(attention, norms)._layout  # type: ignore[attr-defined]


@functools.cache
def rewired(attention: Any, norms: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of an attention whose forward calls self.qk_norm_rope in place of RoPE and of these norms.

    Its name and module are the attention's own, for code that goes by them; printed it shows as "Fused...".

    Raises:
        CannotRewireError: see the module's text.
    """
    function = inspect.getattr_static(attention, "forward", None)
    if not isinstance(function, types.FunctionType) or function.__closure__ or hasattr(function, "__wrapped__"):
        raise CannotRewireError("its forward is no plain function")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        raise CannotRewireError("the source of its forward is not at hand") from None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        raise CannotRewireError("its forward is decorated")
    joined = _join_parts(definition)
    layout, rope, options = _rewrite(definition, frozenset(norms))
    source = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    filename = f"nsphere/hf/rewired/{attention.__module__}.{attention.__qualname__}.py"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # for tracebacks, and inspect
    namespace: dict[str, Any] = {}
    # in the globals of the original: what it calls is looked up where it always was
    exec(compile(source, filename, "exec"), function.__globals__, namespace)
    forward = namespace["forward"]
    forward.__qualname__, forward.__module__ = function.__qualname__, function.__module__

    if norms:  # with its norms the own code does the same, and for one token on a CPU it has less to call
        forward = _own_code_for_one_token(function, forward)

    def qk_norm_rope(self: Any, q: Tensor, k: Tensor, tables: Tables | Tensor | None) -> Tables:
        return self._wiring(q, k, tables)

    members = {
        "__module__": attention.__module__,
        "__qualname__": attention.__qualname__,
        "__doc__": attention.__doc__,
        "_original": attention,
        "_layout": layout,
        "_joined": joined,
        "_rope": staticmethod(functools.partial(function.__globals__[rope], **options)),
        "forward": forward,
        "qk_norm_rope": qk_norm_rope,
        "_get_name": lambda self: f"Fused{attention.__name__}",
        # the class has no importable name of its own: copies and pickles make it again
        "__reduce_ex__": lambda self, protocol: (_new, (attention, norms), self.__dict__),
    }
    return type(attention.__name__, (attention,), members)


def _own_code_for_one_token(own: types.FunctionType, fused: types.FunctionType) -> Any:
    """The fused forward, but for generation one token at a time, in eager code on a CPU, the attention's own."""

    @functools.wraps(fused)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        one_token = isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() == 3 and x.shape[1] == 1
        if one_token and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return own(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    return forward


def _new(attention: Any, norms: tuple[str, ...]) -> nn.Module:
    cls = rewired(attention, norms)
    return cls.__new__(cls)


def _rewrite(function: ast.FunctionDef, norms: frozenset[str]) -> tuple[Layout, str, dict[str, Any]]:
    """Rewrite the forward in place; how q and k come to the new call, and what RoPE was called, with which keywords."""
    for argument in (*function.args.args, *function.args.kwonlyargs, function.args.vararg, function.args.kwarg):
        if argument is not None:
            argument.annotation = None
    function.returns = None
    rope = _the_rope(function)
    (q, k), call = _targets(rope), rope.value
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    statements = list(_flat(function.body))
    _check_that_they_reach_the_kernel(function, q, k)
    for name in (q, k):
        _check_what_happens_to(name, statements, rope, norms)
    layout = _layout(call)
    tables = call.args[2] if len(call.args) == 3 else ast.Tuple(call.args[2:], ast.Load())
    rope.value = _our_call(q, k, tables)
    for block in ast.walk(function):
        # a layer that does not turn still normalises
        if isinstance(block, ast.If) and rope in block.body:
            if block.orelse or any(_norms_in(s, norms) for s in block.body):
                raise CannotRewireError("its RoPE stands in an if of an unknown shape")
            block.orelse = [ast.Assign([_pair(q, k, ast.Store())], _our_call(q, k, ast.Constant(None)))]
    _LeaveOut(norms).visit(function)
    return layout, call.func.id, {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements in order, those of an if in its place."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _flat(statement.body)
            yield from _flat(statement.orelse)
        else:
            yield statement


def _is_rope(statement: ast.AST) -> bool:
    call = getattr(statement, "value", None)
    named = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in _ROPES
    return isinstance(statement, ast.Assign) and named


def _the_rope(function: ast.FunctionDef) -> ast.Assign:
    """The one line that turns q and k."""
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    turning = [n for n in calls if isinstance(n.func, ast.Name) and "rotary" in n.func.id]
    found = [s for s in _flat(function.body) if _is_rope(s)]
    if len(turning) != 1 or len(found) != 1:
        raise CannotRewireError(f"it turns q and k in {len(turning)} calls, where one is known")
    (rope,) = found
    assert isinstance(rope, ast.Assign) and isinstance(rope.value, ast.Call)
    arguments, names = rope.value.args, _targets(rope)
    given = tuple(a.id for a in arguments[:2] if isinstance(a, ast.Name))
    if len(arguments) != (3 if _layout(rope.value) == "bshd" and not rope.value.keywords else 4) or given != names:
        raise CannotRewireError("its RoPE is not of the form q, k = rope(q, k, cos, sin)")
    return rope


def _layout(call: ast.Call) -> Layout:
    assert isinstance(call.func, ast.Name)
    layout = _ROPES[call.func.id]
    for keyword in call.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg != "unsqueeze_dim" or value not in (1, 2):
            raise CannotRewireError(f"its RoPE takes {keyword.arg}")
        layout = "bhsd" if value == 1 else "bshd"
    return layout


def _targets(assign: ast.Assign) -> tuple[str, ...]:
    target = assign.targets[0]
    elements = target.elts if isinstance(target, ast.Tuple) else []
    return tuple(e.id for e in elements if isinstance(e, ast.Name))


def _pair(q: str, k: str, context: ast.expr_context) -> ast.Tuple:
    return ast.Tuple([ast.Name(q, context), ast.Name(k, context)], context)


def _our_call(q: str, k: str, tables: ast.expr) -> ast.Call:
    method = ast.Attribute(ast.Name("self", ast.Load()), "qk_norm_rope", ast.Load())
    return ast.Call(method, [ast.Name(q, ast.Load()), ast.Name(k, ast.Load()), tables], [])


def _mentions(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def _norm_call(node: ast.AST, norms: frozenset[str]) -> ast.expr | None:
    """The argument of `self.<norm>(x)`, None for anything else."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in norms:
        return None
    owner = node.func.value
    single = len(node.args) == 1 and not node.keywords
    return node.args[0] if single and isinstance(owner, ast.Name) and owner.id == "self" else None


def _norms_in(node: ast.AST, norms: frozenset[str]) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr in norms for n in ast.walk(node))


def _inside_shapes(value: ast.AST) -> ast.AST:
    """What `value` is a view of: x of x.view(...).transpose(...)."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _SHAPES:
        value = value.func.value
    return value


def _check_what_happens_to(name: str, statements: list[ast.stmt], rope: ast.Assign, norms: frozenset[str]) -> None:
    """Between its norm and RoPE, in either order, q (or k) may change its shape and nothing else."""

    def assigned(s: ast.stmt) -> bool:
        return isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name) and s.targets[0].id == name

    normed = [s for s in statements if s is not rope and assigned(s) and _norms_in(s, norms)]
    if norms and not normed:
        raise CannotRewireError(f"the norm of {name} was not found")
    for s in statements:
        if _norms_in(s, norms) and not isinstance(s, ast.Assign):
            raise CannotRewireError("a norm is used in an unknown way")
        target = s.targets[0] if isinstance(s, ast.Assign) and _norms_in(s, norms) else None
        if target is not None and (not isinstance(target, ast.Name) or target.id not in _targets(rope)):
            raise CannotRewireError("a norm is applied to something else besides q and k")
    events = [i for i, s in enumerate(statements) if s is rope or s in normed]
    for s in statements[events[0] : events[-1] + 1]:
        if s is rope or not _mentions(s, name):
            continue
        inner = _inside_shapes(s.value) if isinstance(s, ast.Assign) and assigned(s) else None
        argument = None if inner is None else _norm_call(inner, norms)
        if s in normed:
            first = s is statements[events[0]]
            if argument is None or (not first and not isinstance(_inside_shapes(argument), ast.Name)):
                raise CannotRewireError(f"more than a norm happens to {name} in one line")
        elif not (isinstance(inner, ast.Name) and inner.id == name):
            raise CannotRewireError(f"something happens to {name} between its norm and RoPE")


def _check_that_they_reach_the_kernel(function: ast.FunctionDef, q: str, k: str) -> None:
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    kernels = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "attention_interface"]
    if not any([a.id for a in c.args[1:3] if isinstance(a, ast.Name)] == [q, k] for c in kernels):
        raise CannotRewireError("what it turns is not what goes to its attention kernel")


def _join_parts(function: ast.FunctionDef) -> bool:
    """Let RoPE have whole heads where the forward itself cuts off the dims that turn, as StableLM's does; True if so.

    It cuts with `part, rest = x[..., :n], x[..., n:]` and joins with `x = torch.cat((part, rest), dim=-1)`.
    """
    rope = next((s for s in function.body if _is_rope(s)), None)
    assigns = [s for s in function.body if isinstance(s, ast.Assign) and s is not rope]
    for part in _targets(rope) if isinstance(rope, ast.Assign) else ():
        cut = next((s for s in assigns if _targets(s)[:1] == (part,) and len(_targets(s)) == 2), None)
        if cut is None:
            return False
        joined = f"torch.cat(({part}, {_targets(cut)[1]}), dim=-1)"
        join = next((s for s in assigns if ast.unparse(s.value) == joined), None)
        halves = cut.value.elts if isinstance(cut.value, ast.Tuple) else []
        cut_from = {ast.unparse(half.value) for half in halves if isinstance(half, ast.Subscript)}
        if join is None or len(halves) != 2 or cut_from != {ast.unparse(join.targets[0])}:
            return False
        function.body = [s for s in function.body if s is not cut and s is not join]
        for node in ast.walk(rope) if rope is not None else ():
            if isinstance(node, ast.Name) and node.id == part:
                node.id = ast.unparse(join.targets[0])
    return isinstance(rope, ast.Assign)


class _LeaveOut(ast.NodeTransformer):
    """x in place of self.<norm>(x)."""

    def __init__(self, norms: frozenset[str]):
        self.norms = norms

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        argument = _norm_call(node, self.norms)
        return node if argument is None else argument
