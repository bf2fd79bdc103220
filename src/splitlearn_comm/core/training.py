"""Training over the wire: forwards that are kept for one backward, and steps of gradient descent.

A kept forward lives from `GraphStore.keep` until it is taken once, it is older than `ttl_s`, or more than
`max_graphs` newer ones are kept. It holds the *leaf* that the forward began with, so that the gradient
with respect to the input can be asked for, and the Parameters that the forward ran with.

A step never writes into a Parameter: it puts a new one in its place. Graphs that are still kept refer to
the old ones, so micro-batches (forward a, forward b, backward a with a step, backward b) get gradients for
the weights their forwards ran with. No `.grad` is ever touched. Who may see the model while Parameters are
being replaced is the caller's business (`ModelComputeFunction` holds a lock).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from splitlearn_comm.core.errors import InvalidRequest, UnknownTarget


@dataclass(frozen=True)
class KeptForward:
    """One forward pass, ready for its backward."""

    leaf: torch.Tensor
    output: torch.Tensor
    parameters: tuple[nn.Parameter, ...]
    kept_at_s: float


@dataclass(frozen=True)
class Gradients:
    """d loss / d input, and d loss / d parameter in the order of `KeptForward.parameters`."""

    grad_input: torch.Tensor
    grad_parameters: tuple[torch.Tensor | None, ...]


def gradients(kept: KeptForward, grad_output: torch.Tensor, *, with_parameters: bool) -> Gradients:
    """Differentiate a kept forward; the graph is used up.

    An output that does not depend on the input has the gradient zero. Parameters that the output does not
    depend on, and frozen ones, get None.
    """
    wanted = [i for i, p in enumerate(kept.parameters) if with_parameters and p.requires_grad]
    found: Sequence[torch.Tensor | None] = torch.autograd.grad(
        kept.output,
        [kept.leaf, *(kept.parameters[i] for i in wanted)],
        grad_outputs=grad_output,
        allow_unused=True,
    )
    grad_input = torch.zeros_like(kept.leaf) if found[0] is None else found[0]
    grad_parameters: list[torch.Tensor | None] = [None] * len(kept.parameters)
    for i, grad in zip(wanted, found[1:], strict=True):
        grad_parameters[i] = grad
    return Gradients(grad_input, tuple(grad_parameters))


class GraphStore:
    """The forwards that are kept, by forward_id; safe to use from several threads.

    Args:
        max_graphs: beyond that many, the oldest is dropped.
        ttl_s: age after which a forward is dropped.
        clock: gives the time in seconds.
    """

    def __init__(self, max_graphs: int, ttl_s: float, clock: Callable[[], float]) -> None:
        self._max_graphs = max_graphs
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, KeptForward] = OrderedDict()

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def check_free(self, forward_id: str) -> None:
        """Raise `InvalidRequest` if `forward_id` is kept already."""
        self.drop_expired()
        with self._lock:
            self._check_free(forward_id)

    def keep(
        self,
        forward_id: str,
        leaf: torch.Tensor,
        output: torch.Tensor,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        """Keep a forward.

        Raises:
            InvalidRequest: if `forward_id` is kept already.
        """
        self.drop_expired()
        dropped: list[KeptForward] = []
        with self._lock:
            self._check_free(forward_id)
            self._kept[forward_id] = KeptForward(leaf, output, tuple(parameters), self._clock())
            while len(self._kept) > self._max_graphs:
                dropped.append(self._kept.popitem(last=False)[1])
        # The graphs themselves are freed here, outside the lock: that may take a while.
        del dropped

    def take(self, forward_id: str, check: Callable[[KeptForward], None]) -> KeptForward:
        """Remove a forward and return it; if `check` raises, it stays.

        Raises:
            UnknownTarget: if it was never kept, was taken, or was dropped.
        """
        self.drop_expired()
        with self._lock:
            kept = self._kept.get(forward_id)
            if kept is None:
                raise UnknownTarget(
                    f"no forward is kept under forward_id {forward_id!r}: it was never made, "
                    f"was used already, is older than {self._ttl_s:g} s, or made room for newer ones"
                )
            check(kept)
            del self._kept[forward_id]
            return kept

    def drop_expired(self) -> None:
        """Drop the forwards that are older than `ttl_s`."""
        if not self._kept:
            return
        oldest_kept_at_s = self._clock() - self._ttl_s
        expired: list[KeptForward] = []
        with self._lock:
            while self._kept:
                forward_id, kept = next(iter(self._kept.items()))
                if kept.kept_at_s >= oldest_kept_at_s:
                    break
                expired.append(self._kept.pop(forward_id))
        del expired

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            dropped, self._kept = self._kept, OrderedDict()
        del dropped

    def _check_free(self, forward_id: str) -> None:
        if forward_id in self._kept:
            raise InvalidRequest(
                f"forward_id {forward_id!r} is kept already; each training forward needs its own"
            )


class ParameterSlots:
    """The places of a module's Parameters; tied weights share a slot.

    Args:
        module: its Parameters may be replaced by others, but its places must stay as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        places: OrderedDict[int, list[tuple[nn.Module, str]]] = OrderedDict()
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(id(parameter), []).append((owner, name))
        self._slots = tuple(tuple(slot) for slot in places.values())

    def current(self) -> tuple[nn.Parameter, ...]:
        """Return the Parameters that are in place, one a slot."""
        return tuple(getattr(slot[0][0], slot[0][1]) for slot in self._slots)

    def stepped(
        self, grads: Sequence[torch.Tensor | None], learning_rate: float
    ) -> tuple[nn.Parameter | None, ...]:
        """Return p - learning_rate * grad as a new Parameter for each slot that has a gradient.

        Raises:
            InvalidRequest: if the step would make weights NaN or infinite.
        """
        with torch.no_grad():
            return tuple(
                None if grad is None else _stepped(p, grad, learning_rate)
                for p, grad in zip(self.current(), grads, strict=True)
            )

    def replace(self, parameters: Sequence[nn.Parameter | None]) -> None:
        """Put new Parameters in place; None leaves a slot as it is."""
        for slot, parameter in zip(self._slots, parameters, strict=True):
            if parameter is None:
                continue
            for owner, name in slot:
                # setattr, because some modules (the RNNs) keep further references that it updates.
                setattr(owner, name, parameter)


def _stepped(parameter: nn.Parameter, grad: torch.Tensor, learning_rate: float) -> nn.Parameter:
    before = parameter.detach()
    # A rate that is none of a small dtype would be an error of torch's.
    if learning_rate <= torch.finfo(before.dtype).max:
        after = before.sub(grad, alpha=learning_rate)
        if bool((after.isfinite() | ~before.isfinite()).all()):
            return nn.Parameter(after, parameter.requires_grad)
    raise InvalidRequest(
        f"the step (learning_rate {learning_rate:g}) would make weights NaN or infinite: it was not taken, "
        "and the forward is used up"
    )
