"""Pages of made-up units, for tests of `features.py` with a browser and without."""

import torch

from features import RELATED, TOKENS, Findings, page_data
from target_models import TargetModel
from unit_activity import BEFORE, BINS, PER_QUARTER, QUARTERS, SPAN, TOP, Example
from units import LogitEffects, Related, UnitGroup

HOSTILE = [
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "<!--",
    "&amp;",
    "\u2028",
]


def made_up_page(target: TargetModel, *, n: int, layers: int, tokens: int = 4096, seq: int = 256) -> dict:
    """Units of full size: every one has all the examples, tokens and neighbours that a page shows; n of each layer."""
    g = torch.Generator().manual_seed(0)
    total = n * layers
    text = torch.randint(target.vocab_size, (tokens // seq, seq), generator=g)
    groups = [
        UnitGroup(
            method="transcoder k=8", layer=i, part="latents", total=n, numbers=torch.arange(n), directions=torch.zeros(n, 1),
            sizes=torch.ones(n), targets=(i,), target_sizes=torch.ones(n, 1),
        )
        for i in range(layers)
    ]  # fmt: skip
    counts = torch.randint(1, 500, (total,), generator=g)
    counts[::97] = 0

    def examples() -> list[Example]:
        spans = torch.rand(TOP + QUARTERS * PER_QUARTER, SPAN, generator=g) * 2 - 1
        spans[:, BEFORE] = 1.0
        places = torch.randint(tokens, (len(spans),), generator=g).tolist()
        quarters = [0] * TOP + [1 + i // PER_QUARTER for i in range(QUARTERS * PER_QUARTER)]
        return [Example(*one) for one in zip(places, quarters, spans)]

    def ids() -> torch.Tensor:
        return torch.randint(target.vocab_size, (total, TOKENS), generator=g)

    effect = torch.rand(total, TOKENS, generator=g).sort(descending=True).values
    found = Findings(
        groups=groups,
        counts=counts,
        peaks=torch.rand(total, generator=g) * 10,
        effects=LogitEffects(ids(), effect, ids(), -effect),
        nearest=Related(torch.randint(total, (total, RELATED), generator=g), torch.rand(total, RELATED, generator=g)),
        partners=[Related(torch.zeros(n, 0, dtype=torch.int64), torch.zeros(n, 0))] * layers,
        histogram=torch.randint(500, (total, BINS), generator=g),
        ends=torch.full((total,), 16.0),
        examples=[examples() if count else [] for count in counts.tolist()],
    )
    return page_data(target, found, text, f"transcoder k=8 of {target.name}")
