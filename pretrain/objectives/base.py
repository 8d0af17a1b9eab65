"""What every objective of the loop is: modules to train, and losses from batches. It is the unit of extension.

A new objective is one file with a subclass (and its section of the configuration), and one line in each table of
`millrace.pretrain.objectives`. Loop, loader, engines, checkpoint, guard and launcher know none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from millrace.core.errors import UserError
from millrace.data.batch import IGNORED
from millrace.engine.checkpoint.write import ENGINE as MAIN
from millrace.engine.engines import Engines
from millrace.models.bridge import needs_fp32

if TYPE_CHECKING:
    from millrace.data.tokenizer import Tokenizer
    from millrace.models.config import ModelConfig
    from millrace.pretrain.config import EvalSection

Figures = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an objective is built from."""

    objective: Any  # its own section
    model: ModelConfig
    eval: EvalSection
    tokenizer: Tokenizer
    sequence_length: int
    rows: str  # data.rows
    seed: int
    manifests: tuple[str, ...] = ()  # data.manifest
    zero3: dict[str, Any] | None = None  # DeepSpeed's configuration where modules are partitioned as they are built
    costs: Mapping[str, Any] = field(default_factory=dict)  # role of a medium -> the rule that its positions follow


@dataclass(frozen=True)
class Loss:
    """One backward pass: a loss summed over this rank's targets, with gradient, of the weights of one engine.

    `figures` are scalars for the ledger, detached; names that `Objective.figures` lists. `last` is the engine's last
    loss of the step, on all ranks alike.
    """

    value: Tensor
    figures: Figures
    last: bool
    engine: str = MAIN


class Objective:
    """What is trained, and on what.

    The modules of several engines are stepped together: every loss of a step is taken at the weights with which the
    step began, and if the guard does not take the step, none of them has moved. So whatever else an objective holds
    (a teacher, a codebook) may change in `end_step` only; it is in the module of an engine, as frozen parameters or
    buffers, where checkpoints find it.
    """

    # The loss that the run is judged by comes first. One called max_… is the largest of all, the others are summed
    # over targets and given for each, or for each of what another figure counts, which `per` names.
    figures: tuple[str, ...] = ("loss",)
    per: Mapping[str, str] = {}
    of_text: bool = True  # whether a step's targets stand for all bytes of its text
    flops_per_target: float | None = None  # of training; without it utilisation is not known
    name: str = ""  # of what is trained, for people
    tokenizer: Tokenizer | None = None  # for later stages; it may know more tokens than the corpus's

    def __init__(self, modules: Mapping[str, nn.Module], factors: Mapping[str, float] | None = None) -> None:
        """`modules` by the name of the engine of each; `factors` of the learning rate, where one is not 1."""
        self.modules, self.factors = dict(modules), dict(factors or {})

    @classmethod
    def check(cls, setting: Setting) -> None:
        """Refuse what cannot be trained, before anything is touched or built.

        Raises:
            UserError: what, and what would work.
        """

    @classmethod
    def fp32_weights(cls, config: Any) -> bool:
        """Whether a run's bf16 must leave the weights in fp32 (`engine.precision` is "autocast" then).

        `config` has the sections `objective` and `model`.
        """
        return needs_fp32(config.model)

    @classmethod
    def build(cls, setting: Setting) -> Objective:
        """The objective with its modules' first weights, equal at every ZeRO stage and number of ranks."""
        raise NotImplementedError

    def losses(self, micros: Sequence[Any], engines: Engines) -> Iterator[Loss]:
        """The losses of this rank's views of a step, one at a time: each is run backward before the next is asked for.

        Every rank gives as many, for the same engines in the same order, whatever its batches hold.
        """
        for number, micro in enumerate(micros):
            value, found = engines.main.forward(micro)
            yield Loss(value, self.named(found), number == len(micros) - 1)

    def named(self, found: Tensor) -> Figures:
        """Figures from a tensor (F,) of a module's forward."""
        return dict(zip(self.figures, found.unbind(), strict=True))

    def measure(self, micro: Any, engines: Engines) -> Figures:
        """The figures of a view of held-out samples, in evaluation mode and without a gradient."""
        return self.named(engines.main.forward(micro)[1])

    def view(self, micro: Any) -> Any:
        """What the objective makes of a micro-batch of the loader before anything is counted: words hidden, say.

        What is random about a row is drawn from its seed in `micro.seeds`, so that a step is the same on any ranks.
        """
        return micro

    def targets(self, micro: Any) -> int:
        """Targets of a micro-batch's view; a step's gradient is the mean over those of all ranks."""
        return sum(micro.good) if hasattr(micro, "good") else int((micro.labels_BT != IGNORED).sum())

    def weight(self, micro: Any) -> float:
        """What the targets of a view weigh together, where they do not count alike; losses are summed by weight."""
        return self.targets(micro)

    def end_step(self, engines: Engines, *, taken: bool) -> None:
        """After the optimisers' step, or after one that was not taken; on every rank."""

    def files(self) -> dict[str, str]:
        """Text files that later stages need beside weights and tokenizer, by their name in a checkpoint."""
        return {}

    def sampler(self) -> Callable[[], list[dict[str, Any]]] | None:
        """What shows people how far it is: a function, called on every rank, that gives entries for the ledger."""
        return None


class OneModule(Objective):
    """The objective of a module with `figures`, `inputs(micro, device)` and a forward that returns (loss, figures)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__({MAIN: module})
        self.figures = tuple(module.figures)  # type: ignore[arg-type,union-attr]


def medium(view: Any, name: str) -> Tensor:
    """The images or sounds called `name` of a `SampleBatch`.

    Raises:
        UserError: samples do not have them, or not in one size.
    """
    values: Any = view.values.get(name)
    if values is None or isinstance(values, list):
        what = "are of several sizes" if values is not None else f"have no '{name}', but {', '.join(view.values)}"
        raise UserError(f"samples {what}; name in data.views a view of one size, and in objective.view its name")
    return values  # type: ignore[no-any-return]


def model_files(model: Any) -> dict[str, str]:
    """What `transformers` needs to build a model again."""
    model.config.architectures = [type(model).__name__]
    return {"model/config.json": model.config.to_json_string(use_diff=False)}


def gather(found: Sequence[Figures], names: Sequence[str], device: torch.device) -> Tensor:
    """Figures of several losses as one tensor (len(names),) in float64: largest of max_…, sums of the others."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    columns = [[figures[name].double() for figures in found if name in figures] or [zero] for name in names]
    return torch.stack(
        [
            torch.stack(column).max() if name.startswith("max_") else torch.stack(column).sum()
            for name, column in zip(names, columns, strict=True)
        ]
    )


def gathered(mine: Tensor) -> Tensor:
    """All ranks' rows, rank after rank; without a gradient."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    kind = mine.dtype
    wire = mine.contiguous().to(torch.uint8) if kind == torch.bool else mine.contiguous()
    parts = [torch.empty_like(wire) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, wire)
    return torch.cat(parts).to(kind)
