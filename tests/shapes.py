"""jaxtyping's shapes, checked when functions are called: within a call every axis name has one size.

`check_shapes` makes the named modules check themselves once they are imported. Only tensors are looked at, also where a
union holds them; what a container, a tuple or a named tuple holds is not.
"""

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import AbstractArray, install_import_hook


def check_shapes(modules: Sequence[str]) -> None:
    install_import_hook(list(modules), "shapes.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, raising TypeError where an argument or the result is a tensor of another shape or type than written."""
    signature = inspect.signature(function)
    hints = {name: _shapes(hint) for name, hint in function.__annotations__.items()}
    known = {axis for name, shapes in hints.items() if name != "return" for shape in shapes for axis in _axes(shape)}
    hints = {
        name: shapes
        for name, shapes in hints.items()
        if shapes and all(_told(shape, known if name == "return" else set()) for shape in shapes)
    }
    if not hints:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        for name in hints.keys() & given.keys():
            _check(function, name, given[name], hints[name])
        result = function(*args, **kwargs)
        if "return" in hints:
            _check(function, "return", result, hints["return"])
        return result

    return call


def _shapes(hint: Any) -> tuple[Any, ...]:
    """The array types of an annotation; empty where it allows anything else but None."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = [part for part in (typing.get_args(hint) if union else [hint]) if part not in (None, type(None))]
    arrays = tuple(part for part in parts if isinstance(part, type) and issubclass(part, AbstractArray))
    return arrays if len(arrays) == len(parts) else ()


def _axes(shape: type[AbstractArray]) -> list[str]:
    return shape.dim_str.replace("*", " ").split()


def _told(shape: type[AbstractArray], known: set[str]) -> bool:
    """Whether sums and differences in a shape are of axes that are known: `batch+1` means nothing where no batch is."""
    return all(known.intersection(re.split("[+-]", axis)) or re.fullmatch(r"\w*|\.\.\.", axis) for axis in _axes(shape))


def _check(function: Callable[..., Any], name: str, value: Any, shapes: tuple[Any, ...]) -> None:
    if value is not None and not any(isinstance(value, shape) for shape in shapes):
        found = f"{value.dtype}{tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
        raise TypeError(f"{function.__qualname__}: {name} is {found}, not {' or '.join(map(str, shapes))}")
