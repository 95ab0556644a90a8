"""What a step needs at least: operations over the rate of the unit that does them, bytes over the memory's bandwidth."""

from typing import NamedTuple


class Size(NamedTuple):
    d: int
    d_dict: int
    k: int
    batch: int

    def __str__(self) -> str:
        k = f"k {self.k}, " if self.k else ""
        return f"d {self.d}, {self.d_dict} latents, {k}batch {self.batch}"


class Peak(NamedTuple):
    """Published peaks: dense operations per second in each precision, bytes per second of the device's memory."""

    bf16: float
    tf32: float
    fp32: float
    memory: float


PEAKS = {"H100": Peak(989e12, 495e12, 67e12, 3.35e12), "H200": Peak(989e12, 495e12, 67e12, 4.8e12)}


class Work(NamedTuple):
    operations: float
    bytes: float

    def floor_ms(self, peak: Peak, precision: str = "bf16") -> float:
        """The larger of the times that arithmetic and memory need at their peaks."""
        return 1e3 * max(self.operations / getattr(peak, precision), self.bytes / peak.memory)


def product_work(size: Size, item: int) -> Work:
    """x W_encᵀ, of entries of `item` bytes, written down."""
    d, d_dict, _, batch = size
    return Work(2 * batch * d * d_dict, item * (batch * d + d_dict * d + batch * d_dict))


def gather_work(size: Size) -> Work:
    """Four passes over k·B rows of d floats: decoder, its two gradients, the encoder's; no row found in a cache."""
    d, _, k, batch = size
    return Work(8 * k * batch * d, 16 * k * batch * d)


def step_work(size: Size, layers: int = 1) -> Work:
    """The least of one training step: every input read once, nothing of size B·d_dict written, gathers from a cache.

    A float of the weights is moved nine times: its gradient is written, read for the norm, and fused Adam reads four
    floats (weight, gradient, two moments) and writes three. `layers` > 1: a cross-layer transcoder.
    """
    d, d_dict, k, batch = size
    pairs = layers * (layers + 1) // 2
    sparse = 2 * k * batch * d * (3 * pairs + layers)
    return Work(layers * product_work(size, 0).operations + sparse, 4 * d * (9 * d_dict * (layers + pairs) + 2 * batch))
