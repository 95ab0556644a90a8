"""The only hooks of the project: read what modules of a model were given and wrote, or write something else in their place.

`capture` keeps MLP inputs and outputs, `patched` puts a function in place of MLPs, `kept_streams` and `resumed` begin a forward
pass in the middle. All are contexts that leave the model as it was, also when something fails. They ask of a target only what
`Patchable` names; `target_models.TargetModel` is one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from devices import bf16_is_fast, sent


class MLPPaths(NamedTuple):
    read: str  # module whose output the MLP reads
    write: str  # module whose output is the MLP's output
    down: str  # linear map whose input is the hidden activation h; empty at a site that is no MLP


class Patchable(Protocol):
    """A model and where its MLPs read and write: all that capturing and patching need of a target."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def mlps(self) -> tuple[MLPPaths, ...]: ...

    @property
    def device(self) -> torch.device: ...

    def logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]: ...


def after(module: nn.Module, function: Callable[[tuple[Any, ...], Any], Any]) -> AbstractContextManager[Any]:
    """Inside, function(inputs, output) runs after the module; what it returns, unless None, replaces the output."""
    return module.register_forward_hook(lambda _module, inputs, output: function(inputs, output))


def before(module: nn.Module, function: Callable[[tuple[Any, ...]], Any]) -> AbstractContextManager[Any]:
    """Inside, function(inputs) runs before the module; what it returns, unless None, replaces the inputs."""
    return module.register_forward_pre_hook(lambda _module, inputs: function(inputs))


class Captured(NamedTuple):
    """What MLPs were given and wrote in a forward pass, and what other modules were given, by their paths."""

    inputs: Float[Tensor, "layer batch seq d_in"]
    outputs: Float[Tensor, "layer batch seq d_out"]
    modules: Mapping[str, Tensor] = MappingProxyType({})


def _value(output: Any) -> Tensor:
    """What a module wrote; attention modules and some blocks return it first in a tuple, GPT-1's in a list."""
    return output[0] if isinstance(output, tuple | list) else output


def _with_value(output: Any, value: Tensor) -> Any:
    """What a module returned, with another value in place of what it wrote."""
    if isinstance(output, list):
        return [value, *output[1:]]
    return (value, *output[1:]) if isinstance(output, tuple) else value


class _Enough(Exception):
    """Raised by the last hook of `capture`: what comes after it in the forward pass is not needed."""


def capture(target: Patchable, tokens: Int[Tensor, "batch seq"], layers: Sequence[int]) -> Captured:
    """MLP inputs and outputs of `layers`; the forward pass stops after the last of them, so logits are never computed.

    Under inference_mode, in bf16 autocast where the device has fast bf16; the result is what the modules gave.
    """
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}

    def hook(into: dict[int, Tensor], layer: int, last: bool) -> Callable[..., None]:
        def keep(_args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
            into[layer] = _value(output).clone()  # Falcon's blocks add attention to it in place
            if last:
                raise _Enough

        return keep

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast(target.device.type, torch.bfloat16, enabled=bf16_is_fast(target.device)))
        for layer in layers:
            for name, into in ((target.mlps[layer].read, read), (target.mlps[layer].write, written)):
                last = into is written and layer == max(layers)
                stack.enter_context(after(target.model.get_submodule(name), hook(into, layer, last)))
        with contextlib.suppress(_Enough):
            target.logits(sent(tokens, target.device))
    shape = (*tokens.shape, -1)
    return Captured(*(torch.stack([kept[layer].reshape(shape) for layer in layers]) for kept in (read, written)))


MLPFunction = Callable[
    [Float[Tensor, "batch seq d_in"], Float[Tensor, "batch seq d_out"]], Float[Tensor, "batch seq d_out"]
]


@contextlib.contextmanager
def patched(target: Patchable, functions: Mapping[int, MLPFunction], first_only: bool = False) -> Iterator[None]:
    """Inside, the MLP of each named layer gives f(x, y): x its input, y its own output there. Restored on any exit.

    `first_only`: y is wanted at the first position of each sequence alone, and where the MLP reads what the norm gave it
    is computed there alone.
    """
    shapes: list[torch.Size] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(before(target.model, lambda args: shapes.append(args[0].shape)))
        for layer, function in functions.items():
            stack.enter_context(_patched_layer(target, layer, function, first_only=first_only, shapes=shapes))
        yield


@contextlib.contextmanager
def _patched_layer(
    target: Patchable, layer: int, function: MLPFunction, *, first_only: bool, shapes: Sequence[torch.Size]
) -> Iterator[None]:
    """`shapes` ends with (batch, seq) of the tokens under way: OPT's MLPs are given their positions as rows."""
    paths = target.mlps[layer]
    inputs: list[Tensor] = []

    def keep(_args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> None:
        inputs.append(_value(output))

    def narrow(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, :1], *args[1:]) if args and args[0] is inputs[-1] else args

    def write(_args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> Any:
        x, y = inputs.pop(), _value(output)
        batch, seq = shapes[-1]
        given = y.reshape(batch, -1, y.shape[-1])
        y_hat = function(x.reshape(batch, seq, -1), given)
        y_hat = y_hat.clone() if y_hat is given else y_hat  # the block may add to it in place, the function may keep it
        y_hat = y_hat if y.ndim == 3 else y_hat.flatten(0, 1)
        return _with_value(output, y_hat)

    read, wrote = target.model.get_submodule(paths.read), target.model.get_submodule(paths.write)
    with contextlib.ExitStack() as stack:
        stack.enter_context(after(read, keep))
        stack.enter_context(after(wrote, write))
        if first_only and wrote is not read:
            stack.enter_context(before(wrote, narrow))
        yield


def block_outputs(
    target: Patchable, tokens: Int[Tensor, "batch seq"], given: Sequence[Tensor] = ()
) -> list[Float[Tensor, "batch seq d"]]:
    """What every block writes, one forward pass; each block but the first is given what `given` says that the one before it
    wrote, so that whatever is patched in one block is not felt in another. ValueError where blocks do not run once each."""
    written: list[Tensor] = []

    def keep(_args: tuple[Any, ...], output: Tensor | tuple[Any, ...]) -> Any:
        written.append(_value(output).clone())
        if len(written) > len(target.mlps):
            raise ValueError(
                f"the model runs its {len(target.mlps)} blocks more than once each: its layout is not supported"
            )
        if not given:
            return None
        return _with_value(output, given[len(written) - 1].clone())

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for layer in range(len(target.mlps)):
            stack.enter_context(after(_block(target, layer), keep))
        target.logits(tokens)
    if len(written) < len(target.mlps):
        raise ValueError(f"the model ran {len(written)} of its {len(target.mlps)} blocks: its layout is not supported")
    return written


def _block(target: Patchable, layer: int) -> nn.Module:
    return target.model.get_submodule(target.mlps[layer].read.rpartition(".")[0])


@contextlib.contextmanager
def kept_inputs(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, a forward pass leaves in the dictionary what each of these modules was given, if it ran."""
    inputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[tuple[Any, ...]], None]:
        return lambda args: inputs.__setitem__(path, args[0])

    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(before(model.get_submodule(path), keep(path)))
        yield inputs


class Begun(NamedTuple):
    """What a forward pass computes before the MLP of a layer has its input."""

    stream: Any  # what the block before wrote; None before block 0
    # what the block's own modules wrote until then, those that run once: its attention, as a rule
    ran: dict[nn.Module, Any]


@contextlib.contextmanager
def kept_streams(target: Patchable, layers: Sequence[int]) -> Iterator[dict[int, Begun]]:
    """Inside, a forward pass leaves in the dictionary what it computed before the MLP of each of `layers`."""
    streams: dict[int, Any] = {0: None}
    begun: dict[int, Begun] = {}
    written: dict[int, dict[nn.Module, Any]] = {layer: {} for layer in layers}
    called: set[nn.Module] = set()

    def keep(layer: int) -> Callable[..., None]:
        return lambda _args, output: streams.__setitem__(layer, output)

    def note(layer: int, module: nn.Module) -> Callable[..., None]:
        def write(_args: tuple[Any, ...], output: Any) -> None:
            if module in called:  # a dropout, say: it writes another value each time
                written[layer].pop(module, None)
            elif layer not in begun:
                written[layer][module] = _copied(output)
            called.add(module)

        return write

    def begin(layer: int) -> Callable[..., None]:
        return lambda _args: begun.__setitem__(layer, Begun(streams[layer], written[layer]))

    with contextlib.ExitStack() as stack:
        for layer in written:
            if layer:
                stack.enter_context(after(_block(target, layer - 1), keep(layer)))
            read = target.model.get_submodule(target.mlps[layer].read)
            for module in _block(target, layer).children():
                if module is not read:
                    stack.enter_context(after(module, note(layer, module)))
            stack.enter_context(before(read, begin(layer)))
        yield begun


def _copied(output: Any) -> Any:
    """What a module wrote, safe from what its block adds to it in place."""
    return tree_map_only(Tensor, torch.clone, output)


@contextlib.contextmanager
def resumed(target: Patchable, layer: int, begun: Begun | None) -> Iterator[None]:
    """Inside, a forward pass begins before the MLP of `layer`; None: at the beginning. What is before is not computed again."""

    def give(module: nn.Module, output: Any, stack: contextlib.ExitStack) -> None:
        module.__dict__["forward"] = lambda *_args, **_kwargs: output()  # past what wrappers make of attributes
        stack.callback(module.__dict__.pop, "forward")

    with contextlib.ExitStack() as stack:
        if begun is not None:
            for i in range(layer):
                give(_block(target, i), lambda: begun.stream, stack)
            for module, output in begun.ran.items():
                give(module, functools.partial(_copied, output), stack)
        yield


@contextlib.contextmanager
def without(module: nn.Module) -> Iterator[None]:
    """Inside, the module hands on what it is given."""
    module.__dict__["forward"] = lambda x: x
    try:
        yield
    finally:
        module.__dict__.pop("forward")
