"""Whether all ranks still hold the same weights and moments, where each holds them all (ZeRO 0).

A bit that flips in one rank's memory makes that rank compute another gradient for ever, and nothing else shows it. At
ZeRO 1 to 3 every rank owns its part alone: there such a flip is not found.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch

from millrace.engine.checkpoint.joint import AnyAdapter
from millrace.engine.distributed import World


def compare_replicas(adapter: AnyAdapter, world: World, hosts: Sequence[str]) -> str:
    """Which ranks differ from the most, empty where none does; call it on every rank."""
    if not adapter.replicated or world.size == 1:
        return ""
    return name_odd(world.gather_objects(checksum(adapter)), hosts)


@torch.no_grad()
def checksum(adapter: AnyAdapter) -> str:
    """Changes with any single bit of weights, masters and moments: a hash of the sums of their bits as integers."""
    tensors = [param for _, param in adapter.named]
    tensors += [view for held in adapter.held() for view in held.views.values()]
    sums = torch.stack([_integers(tensor).sum(dtype=torch.int64) for tensor in tensors])
    return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(kinds[tensor.element_size()])


def name_odd(found: Sequence[str], hosts: Sequence[str]) -> str:
    """What to say of the ranks' checksums; three ranks or more name who differs, two only that they do."""
    (common, votes), *others = Counter(found).most_common()
    if not others:
        return ""
    if votes <= len(found) / 2:
        return "the ranks' weights differ, and none of them has a majority"
    odd = [f"rank {rank} on {hosts[rank]}" for rank, digest in enumerate(found) if digest != common]
    return f"the weights or moments of {', '.join(odd)} differ from those of the other ranks: look at its memory"
