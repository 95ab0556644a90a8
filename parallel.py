"""Several processes that train together: what each of them holds, and what they tell each other.

    torchrun --nproc-per-node N SCRIPT --parallel data | coders | latents

    data      every process reads documents of its own and steps on 1/N of each batch; gradients are averaged
    coders    every process trains some of the coders on the whole of each batch; nothing is exchanged
    latents   every process holds some of the latents of every coder, sees the whole of each batch, and selects with the others

One process exchanges nothing: what is asked of `Ranks` gives back what it was given. Under `data` BatchTopK selects the
k·B/N largest of each process' part of the batch, as the trainers of the field do: no process waits in the middle of a step.
Under `latents` the k·B largest of the batch win, wherever they lie.

Engine: torch.distributed, gloo between CPUs and NCCL between GPUs. Process 0 logs, shows progress and writes; the others
repeat what it does beside training and throw it away.
"""

import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.nn  # first imported within, as optimisers do, it would keep the group and its threads until the exit
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Form = Literal["data", "coders", "latents"]
ENDED = "another process of this training has ended: start the same command again, it goes on from the last saved state"


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and what they share out."""

    rank: int = 0
    size: int = 1
    form: Form = "data"

    @property
    def leads(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def deals(self, form: Form) -> bool:
        """Whether several processes share this out."""
        return self.size > 1 and self.form == form

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many parts of the data is this process' own."""
        return (self.rank, self.size) if self.deals("data") else (0, 1)


_joined = [World()]


def world() -> World:
    return _joined[-1]


@contextlib.contextmanager
def joined(device: str, form: Form) -> Iterator[str]:
    """Within, this process is one of those that torchrun started; yields its device: of `cuda`, a GPU of its own.

    Raises ValueError for a numbered GPU, of which the processes would share one.
    """
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        yield device
        return
    if device.startswith("cuda:"):
        raise ValueError(f"{size} processes were started on {device}: use --device cuda, which gives each its own")
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    if own != device:
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own != device else "gloo")
    before = signal.signal(signal.SIGTERM, _another_ended)
    _joined.append(World(dist.get_rank(), size, form))
    yield own
    _joined.pop()
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _another_ended(*_: object) -> None:
    """torchrun's SIGTERM, which follows the end of any process."""
    raise ConnectionError(ENDED)


def first_to_say(text: str) -> bool:
    """Whether no other process has asked this of the same text: what several have to say is said once."""
    if not dist.is_initialized():
        return True
    return dist.distributed_c10d._get_default_store().add(f"said {text}", 1) == 1


def _told[**P, T](collective: Callable[P, T]) -> Callable[P, T]:
    """The call; raises ConnectionError where another process is no longer there to take part in it."""

    @functools.wraps(collective)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return collective(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise ConnectionError(ENDED) from error
            raise

    return call


# ---------------------------------------------------------------------------------------------------- what all can ask


@_told
def decided[T](decide: Callable[[], T]) -> T:
    """What process 0 decides, which alone is asked."""
    if world().size == 1:
        return decide()
    box = [decide() if world().leads else None]
    dist.broadcast_object_list(box, 0)
    return box[0]  # type: ignore[return-value]


def wait() -> None:
    """Until all processes have come here."""
    decided(lambda: None)


@_told
def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    if world().size == 1:
        return [value]
    values = [None] * world().size
    dist.all_gather_object(values, value)
    return values


@_told
def stacked(tensor: Tensor) -> Tensor:
    """The tensors of all processes, of one shape, along a new first axis."""
    out = tensor.new_empty(world().size * tensor.numel())
    dist.all_gather_into_tensor(out, tensor.flatten())
    return out.view(world().size, *tensor.shape)


@_told
def from_process(rank: int, tensor: Tensor) -> Tensor:
    """That process' tensor, written into those of the others, which have its shape."""
    dist.broadcast(tensor, rank)
    return tensor


@_told
def summed(tensors: Sequence[Tensor]) -> None:
    """The sums over processes, in place; all are on their way at once."""
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def averaged(readings: Tensor) -> Tensor:
    """Of batches that were shared out, the mean over processes; else the tensor itself."""
    if not world().deals("data"):
        return readings
    mean = readings.detach().clone()
    summed([mean])
    return mean / world().size


def united(parts: Sequence[dict[Any, Any]]) -> dict[Any, Any]:
    """Nested dictionaries as one; where two have a key whose values are no dictionaries, the first one's stays."""
    whole: dict[Any, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = key in whole and isinstance(value, dict)
            whole[key] = united([whole[key], value]) if both else whole.get(key, value)
    return whole


def check_dealt(parts: int) -> None:
    """Raises ValueError where a text that was dealt to so many processes is to be gone on with by another number."""
    here = world().part[1]
    if parts != here:
        raise ValueError(
            f"the text of this interrupted training is dealt to {parts} process(es), not to {here}: start it again with "
            f"{parts}" + ("" if parts > 1 else ", or share out coders or latents")
        )


def dealt[T](items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
    """This process' share of the items, in their order: the costliest first, each to whoever has least to do."""
    loads = [0.0] * world().size
    shares: dict[int, int] = {}
    for i in sorted(range(len(items)), key=lambda i: (-cost(items[i]), i)):
        shares[i] = loads.index(min(loads))
        loads[shares[i]] += cost(items[i])
    return [item for i, item in enumerate(items) if shares[i] == world().rank]


def bounds(n: int, part: int, parts: int) -> tuple[int, int]:
    """Where a part of n things begins and ends; the first parts have one more where they cannot be equal."""
    return part * (n // parts) + min(part, n % parts), (part + 1) * (n // parts) + min(part + 1, n % parts)


# --------------------------------------------------------------------------------------------- what a coder asks of others


class Ranks:
    """What a coder asks of the processes that train it with this one; here there are none."""

    selects = False  # whether winners must be agreed

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Gradients, before the optimiser's step."""

    def norm(self, sharded: Sequence[Tensor], whole: Sequence[Tensor]) -> Float[Tensor, ""] | None:
        """‖·‖ of gradients of which some are spread over processes; None where none is."""
        return None

    def fired(self, fired: Bool[Tensor, "d_dict"], n_tokens: int) -> tuple[Bool[Tensor, "d_dict"], int]:
        """Which latents were active in the whole batch, and its tokens."""
        return fired, n_tokens

    def smallest(self, winner: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The smallest winner, as the running threshold takes it."""
        return winner

    def pooled(self, values: Float[Tensor, "some"], n_tokens: int) -> tuple[Float[Tensor, "all"], int]:
        """Values that a calibration found, and the tokens it found them on."""
        return values, n_tokens

    def total(self, n: int) -> int:
        """A count of latents."""
        return n

    def sum(self, part: Tensor) -> Tensor:
        """What these latents write, as a part of what all latents write."""
        return part

    def read(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What these latents read, of which the others' gradient counts too."""
        return x

    def largest(
        self, flat: Int[Tensor, "some"], pre: Float[Tensor, "some"], *, n_rows: int, k: int, batch: bool
    ) -> Tensor:
        """Which of these latents' largest win; nobody asks where `selects` is False."""
        raise AssertionError("one process has nobody to agree with")


ALONE = Ranks()


class DataRanks(Ranks):
    """The others hold the same coder and other tokens."""

    def average(self, parameters: Iterable[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        summed(gradients)
        torch._foreach_div_(gradients, world().size)

    def fired(self, fired: Bool[Tensor, "d_dict"], n_tokens: int) -> tuple[Bool[Tensor, "d_dict"], int]:
        counts = fired.to(torch.int32)
        summed([counts])
        return counts > 0, n_tokens * world().size

    def smallest(self, winner: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The mean of the parts' smallest."""
        return averaged(winner)

    def pooled(self, values: Float[Tensor, "some"], n_tokens: int) -> tuple[Float[Tensor, "all"], int]:
        found = gathered((values.cpu(), n_tokens))
        return torch.cat([own for own, _ in found]).to(values.device), sum(n for _, n in found)


class _Sum(torch.autograd.Function):
    """The sum over processes; each part's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        summed([whole])
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class _Read(torch.autograd.Function):
    """The tensor itself; its gradient is the sum of all processes'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        whole = grad.clone()
        summed([whole])
        return whole


class LatentRanks(Ranks):
    """The others hold other latents, of `d_dict`, of the same coder, and the same tokens."""

    selects = True

    def __init__(self, d_dict: int) -> None:
        self.d_dict = d_dict

    def norm(self, sharded: Sequence[Tensor], whole: Sequence[Tensor]) -> Float[Tensor, ""]:
        of_shards = torch.stack([g.square().sum() for g in sharded]).sum()
        summed([of_shards])
        return (of_shards + sum(g.square().sum() for g in whole)).sqrt()

    def smallest(self, winner: Float[Tensor, ""]) -> Float[Tensor, ""]:
        positive = stacked(winner)
        least = positive.masked_fill(positive <= 0, torch.inf).amin()
        return torch.where(least.isfinite(), least, 0.0)

    def pooled(self, values: Float[Tensor, "some"], n_tokens: int) -> tuple[Float[Tensor, "all"], int]:
        return torch.cat(gathered(values.cpu())).to(values.device), n_tokens

    def total(self, n: int) -> int:
        return sum(gathered(n))

    def sum(self, part: Tensor) -> Tensor:
        return _Sum.apply(part)  # type: ignore[no-any-return]

    def read(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return _Read.apply(x)  # type: ignore[no-any-return]

    def largest(
        self, flat: Int[Tensor, "some"], pre: Float[Tensor, "some"], *, n_rows: int, k: int, batch: bool
    ) -> Tensor:
        """Positions, among the candidates of these latents, of the k largest of each token or the k·B of the batch.

        Candidates are a process' own k largest of each token, or k·B of the batch, or all it has: whoever wins is one of its
        own process' largest. Ties go to the lowest latent or (token, latent), as they do in one process. Every process
        tells all others its candidates: 4 bytes each by token, 12 in the batch.
        """
        if not batch:
            table = pre.new_full((n_rows, k), -torch.inf)
            own = table[:, : (held := len(pre) // n_rows)]
            own.copy_(pre.view(n_rows, held))
            everything = stacked(table).transpose(0, 1).reshape(n_rows, -1)
            mine = slice(world().rank * k, world().rank * k + held)
            return _stable_largest(everything, k)[:, mine].flatten().nonzero()[:, 0]
        first, end = bounds(self.d_dict, world().rank, world().size)
        row, latent = flat // (end - first), flat % (end - first)
        values, places = pre.new_full((k * n_rows,), -torch.inf), flat.new_zeros(k * n_rows)
        values[: len(pre)] = pre
        places[: len(flat)] = row * self.d_dict + first + latent
        everything, everywhere = stacked(values).flatten(), stacked(places).flatten()
        least = everything.topk(k * n_rows).values[-1]
        ties = everywhere[everything == least].sort().values
        last = ties[k * n_rows - int((everything > least).sum()) - 1]
        return ((pre > least) | ((pre == least) & (places[: len(pre)] <= last))).nonzero()[:, 0]


def _stable_largest(values: Float[Tensor, "group n"], k: int) -> Bool[Tensor, "group n"]:
    """True at the k largest of each group; ties go to the first."""
    least = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > least, values == least
    return above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))


def ranks_of(d_dict: int) -> Ranks:
    """Who trains a coder of so many latents together with this process."""
    if world().deals("data"):
        return DataRanks()
    return LatentRanks(d_dict) if world().deals("latents") else ALONE


def is_spread(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a coder has one row per latent."""
    return name.startswith(("encoder", "W_dec")) and tensor.ndim > 0


def own_rows(tensor: Tensor) -> Tensor:
    """This process' rows of a tensor of all latents."""
    begin, end = bounds(len(tensor), world().rank, world().size)
    return tensor[begin:end].clone()


@torch.no_grad()
def spread(coder: nn.Module) -> None:
    """Keep this process' latents alone."""
    for name, tensor in itertools.chain(coder.named_parameters(), coder.named_buffers()):
        if is_spread(name, tensor):
            tensor.data = own_rows(tensor)


def own_state(shards: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The state of a coder and its optimiser as this process holds it, whatever number of processes it was left by.

    `names` are those of the coder's parameters, in the optimiser's order.
    """
    if len(shards) == 1 and not world().deals("latents"):
        return shards[0]

    def regrouped(name: str, *rows: Tensor) -> Tensor:
        if not is_spread(name, rows[0]):
            return rows[0]
        return own_rows(torch.cat(rows)) if world().deals("latents") else torch.cat(rows)

    first = shards[0]
    coder = {name: regrouped(name, *(shard["coder"][name] for shard in shards)) for name in first["coder"]}
    moments = {
        i: {key: regrouped(name, *(shard["optimiser"]["state"][i][key] for shard in shards)) for key in own}
        for (i, own), name in zip(first["optimiser"]["state"].items(), names, strict=True)
    }
    return first | {"coder": coder, "optimiser": first["optimiser"] | {"state": moments}}


@_told
def whole_tensors(state: dict[str, Tensor], d_dict: int) -> dict[str, Tensor]:
    """On process 0, the tensors of a coder whose latents are spread, with all their rows, on the CPU; nothing on the others."""
    whole = {}
    for name, tensor in state.items():
        own = tensor.cpu().contiguous()
        if not world().leads and is_spread(name, tensor):
            dist.send(own, 0)
        elif world().leads:
            sizes = [end - begin for begin, end in (bounds(d_dict, rank, world().size) for rank in range(world().size))]
            rows = (
                [own] if not is_spread(name, tensor) else [own, *(own.new_empty(n, *own.shape[1:]) for n in sizes[1:])]
            )
            for rank, part in enumerate(rows[1:], 1):
                dist.recv(part, rank)
            whole[name] = torch.cat(rows) if len(rows) > 1 else own
    return whole
