"""The registry of methods and the policy-spec parser.

A method is a function that returns a `Policy`, registered under its published name:

    @method(title="SnapKV: ...", arxiv="2404.14469")
    def snapkv(budget: Budget = 0.5, window: int = 32) -> Policy: ...

Its keyword arguments, with their defaults, are the arguments of the spec. Specs follow Python's expression
grammar: `name(arg=value, ...)`, composed with ` | `.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from kvjax.policies import arguments
from kvjax.policies.base import PARTS, Policy

Budget = int | float


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered method."""

    name: str
    title: str
    arxiv: str
    build: Callable[..., Policy]
    tiny: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Argument name -> default."""
        return {p.name: p.default for p in inspect.signature(self.build).parameters.values()}


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` returns. `parts` maps a part to the class that fills it, for the default arguments."""

    name: str
    title: str
    arxiv: str
    parts: dict[str, str]
    arguments: dict[str, Any]
    bits_per_element: float
    summary: str


_METHODS: dict[str, Method] = {}


def method(
    title: str, arxiv: str, tiny: dict[str, Any] | None = None
) -> Callable[[Callable[..., Policy]], Callable[..., Policy]]:
    """Register a function under its own name.

    arxiv: an id, or '' when there is no paper. tiny: arguments that make sense for prompts of about 40 tokens;
    the invariant tests, which run over the whole registry, build the method with them.
    """

    def wrap(build: Callable[..., Policy]) -> Callable[..., Policy]:
        name = build.__name__
        if name in _METHODS:
            raise ValueError(f"method {name!r} is registered twice")
        _METHODS[name] = Method(name, title, arxiv, build, tiny or {})
        return build

    return wrap


def names() -> list[str]:
    """All method names, sorted."""
    return sorted(_METHODS)


def _closest(name: str, allowed: Iterable[str]) -> str:
    allowed = sorted(allowed)
    first = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
    return ", ".join(first + [a for a in allowed if a not in first]) or "none"


def lookup(name: str) -> Method:
    """The method of that name; ValueError lists the names, closest first."""
    if name not in _METHODS:
        raise ValueError(f"unknown policy {name!r}; known, closest first: {_closest(name, _METHODS)}")
    return _METHODS[name]


def build(name: str, **kwargs: Any) -> Policy:
    """Build one method from keyword arguments; ValueError for an unknown one."""
    found = lookup(name)
    for key in kwargs:
        if key not in found.arguments:
            raise ValueError(
                f"{name} has no argument {key!r}; allowed, closest first: {_closest(key, found.arguments)}"
            )
    missing = [
        a for a, default in found.arguments.items() if default is inspect.Parameter.empty and a not in kwargs
    ]
    if missing:
        raise ValueError(f"{name} needs the argument {missing[0]!r}")
    arguments.check(name, found.build, kwargs)
    try:
        policy = found.build(**kwargs)
    except ValueError as e:  # of a part, which does not know the method's name
        text = str(e).removeprefix("full: ")
        raise ValueError(text if text.startswith(name) else f"{name}: {text}") from e
    shown = ", ".join(f"{k}={_show(v)}" for k, v in kwargs.items())
    given = {f.name for f in dataclasses.fields(Policy)} & set(kwargs) - {"scorer"}
    given = {k for k in given if kwargs[k] is not None}
    if "codec" in policy.explicit and policy.scorer is None:
        given -= {"sink"}  # a codec's exact first entries, not those that eviction protects
    return dataclasses.replace(
        policy, name=f"{name}({shown})" if kwargs else name, explicit=policy.explicit | given
    )


def _show(value: Any) -> str:
    return value.name if isinstance(value, Policy) else repr(value)


def parse(spec: str | Policy) -> Policy:
    """A policy from its spec, e.g. 'snapkv(budget=1024, window=32) | int8'; a Policy is returned as it is.

    ValueError, in one line, for bad syntax, an unknown name or argument (closest match first), a budget of 0 or
    a float budget over 1.0, and parts that exclude each other.
    """
    if isinstance(spec, Policy):
        return spec
    if not isinstance(spec, str) or not spec.strip():
        raise ValueError(
            f"a policy spec is a non-empty string such as 'snapkv(budget=0.5) | int8', got {spec!r}"
        )
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
    except (SyntaxError, ValueError) as e:
        raise ValueError(
            f"cannot read policy spec {spec!r}: {getattr(e, 'msg', e)}; write name(arg=value, ...) | name(...)"
        ) from None
    return _policy(tree, spec)


def _policy(node: ast.expr, spec: str) -> Policy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _policy(node.left, spec) | _policy(node.right, spec)
    if isinstance(node, ast.Name):
        return build(node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        allowed = list(lookup(name).arguments)
        if len(node.args) > len(allowed):
            raise ValueError(f"{name} takes at most {len(allowed)} arguments: {', '.join(allowed)}")
        kwargs = {a: _value(x, spec) for a, x in zip(allowed, node.args)}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise ValueError(f"cannot read policy spec {spec!r}: '**' is not allowed")
            if keyword.arg in kwargs:
                raise ValueError(f"{name}: argument {keyword.arg!r} is given twice")
            kwargs[keyword.arg] = _value(keyword.value, spec)
        return build(name, **kwargs)
    raise ValueError(f"cannot read policy spec {spec!r}: write name(arg=value, ...) | name(...)")


def _value(node: ast.expr, spec: str) -> Any:
    """A literal, a list or tuple of values, or a nested policy."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(_value(x, spec) for x in node.elts)
    if isinstance(node, ast.Name) and node.id not in _METHODS:
        return node.id  # a bare word is a string: pooling=avg
    return _policy(node, spec)


def describe(name: str) -> Description:
    """Title, arXiv id, parts, arguments with defaults and stored bits per element (head_dim 128, bf16)."""
    found = lookup(name)
    policy = found.build(**{a: d for a, d in found.arguments.items() if d is not inspect.Parameter.empty})
    parts = {
        part: type(getattr(policy, part)).__name__ for part in PARTS if getattr(policy, part) is not None
    }
    summary = (inspect.getdoc(found.build) or "").split("\n\n")[0].replace("\n", " ")
    bits = policy.codec.bits_per_element(128, "bfloat16")
    return Description(found.name, found.title, found.arxiv, parts, found.arguments, bits, summary)
