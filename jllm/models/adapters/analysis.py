"""What an adapter does to each module, from its own folder alone: how much, in how many directions, and where.

With A [rank, inputs], B [outputs, rank] and s the scaling, the change of a weight is s·BA. Its Frobenius norm is
s·sqrt(Σ (BᵀB ⊙ AAᵀ)); its singular values are those of s·R_B·R_Aᵀ, the triangles of the QR decompositions of B and Aᵀ.
The effective rank is exp(-Σ p·log p) with p the singular values over their sum (Roy and Vetterli, The effective rank,
2007). How parallel rows are is the root of the mean of their squared cosines: 0 for orthogonal ones, 1 for parallel.

Guarantees: outputs × inputs is never formed; peft and the model are not needed. DoRA's magnitudes are left out.
Cost: the adapter in memory; for each module products of rank² × (inputs + outputs).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jllm.errors import UserError
from jllm.models.adapters.adapter_files import read_fields, read_weights
from jllm.models.adapters.adapter_folder import PREFIX
from jllm.models.adapters.control import DIRECTIONS, STRENGTHS
from jllm.models.weights.finite import check_finite

_FIRST = {".lora_A.weight": (".lora_B.weight", False), ".lora_embedding_A": (".lora_embedding_B", True)}
"""How the name of a first matrix ends → that of the second one, and whether it is an embedding's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleFacts:
    """What an adapter does to a module; of packed experts, to all of them.

    Attributes:
        name: of the module in the model.
        experts: 1, or how many are packed.
        rank: of the change of each.
        scaling: s.
        frobenius: norm of the change, of all experts together.
        spectral: the largest singular value, of any expert.
        effective_rank: mean over the experts; 0 where nothing is changed.
        parallel_a, parallel_b: of A's rows and B's columns, mean over the experts.
        share: of the squared norm of the whole adapter.
        singular_values: descending, of the expert with the largest one.
    """

    name: str
    experts: int
    rank: int
    scaling: float
    frobenius: float
    spectral: float
    effective_rank: float
    parallel_a: float
    parallel_b: float
    share: float
    singular_values: tuple[float, ...]

    @property
    def layer(self) -> int | None:
        """The number of its layer; None outside of all."""
        found = re.search(r"\.(\d+)\.", self.name)
        return int(found[1]) if found else None

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """What an adapter does.

    Attributes:
        kind: peft's name of it.
        modules: in the model's order.
        whole: tensors that are stored whole beside the factors.
        parameters: numbers in the file.
        frobenius: norm of the change of all modules together.
        notes: for people, a line each.
    """

    kind: str
    modules: tuple[ModuleFacts, ...]
    whole: tuple[str, ...]
    parameters: int
    frobenius: float
    notes: tuple[str, ...]


def analyse(folder: Path) -> AdapterFacts:
    """What the adapter in a peft folder does.

    Raises:
        UserError: there is none, of a kind that is known; or something in it does not fit together.
    """
    fields = read_fields(folder, kinds=tuple(_KINDS), option="")
    return _KINDS[fields["peft_type"]](folder, fields, read_weights(folder))


def _analyse_lora(folder: Path, fields: Mapping[str, Any], tensors: dict[str, Tensor]) -> AdapterFacts:
    check_finite(tensors.items(), folder)
    found: list[ModuleFacts] = []
    used: set[str] = set()
    for name, first in tensors.items():
        ending = next((each for each in _FIRST if name.endswith(each)), None)
        if ending is None:
            continue
        other, is_embedding = _FIRST[ending]
        path = name.removesuffix(ending)
        second = tensors.get(path + other)
        if second is None:
            raise UserError(f"{folder}: {name} has no {other[1:]} beside it; give an adapter that is whole")
        used |= {name, path + other, f"{path}.lora_magnitude_vector"}
        module = path.removeprefix(PREFIX)
        facts = _facts_of(folder, module, first.float(), second.float(), _setting(fields, module))
        found.append(dataclasses.replace(facts, name=f"{module} (ids)" if is_embedding else module))
    return _together(
        folder,
        str(fields["peft_type"]),
        found,
        tensors,
        whole=tuple(sorted(name.removeprefix(PREFIX) for name in tensors.keys() - used)),
        notes=("with magnitudes of DoRA, which are not in these figures",) if fields.get("use_dora") else (),
    )


def _together(
    folder: Path,
    kind: str,
    found: list[ModuleFacts],
    tensors: dict[str, Tensor],
    *,
    whole: tuple[str, ...],
    notes: tuple[str, ...],
) -> AdapterFacts:
    """The modules in order, with their shares."""
    if not found:
        raise UserError(f"{folder}: no adapter of any module in it; give an adapter that is whole")
    squares = sum(each.frobenius**2 for each in found)
    modules = [dataclasses.replace(each, share=each.frobenius**2 / squares if squares else 0.0) for each in found]
    return AdapterFacts(
        kind=kind,
        modules=tuple(sorted(modules, key=lambda each: (each.layer is None, each.layer or 0))),
        whole=whole,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        frobenius=math.sqrt(squares),
        notes=notes,
    )


def _analyse_control(folder: Path, fields: Mapping[str, Any], tensors: dict[str, Tensor]) -> AdapterFacts:
    """Of each layer the factor's change, Q diag(l) Qᵀ for class +1: B = Q diag(l), A = Qᵀ."""
    check_finite(tensors.items(), folder)
    found, rank = [], int(fields.get("r", 0))
    for name, directions in tensors.items():
        if not name.endswith(f".{DIRECTIONS}"):
            continue
        layer = name.removesuffix(f".{DIRECTIONS}")
        strengths = tensors.get(f"{layer}.{STRENGTHS}")
        if strengths is None or strengths.shape != directions.shape[1:]:
            raise UserError(f"{folder}: {name} has no {STRENGTHS} beside it that fits; give an adapter that is whole")
        q = directions.double()
        setting = _Setting(rank=rank, scaling=1.0)
        changed = q * torch.expm1(strengths.double())
        found.append(_facts_of(folder, f"{layer.removeprefix(PREFIX)}.control", q.mT, changed, setting))
    return _together(
        folder,
        str(fields["peft_type"]),
        found,
        tensors,
        whole=(),
        notes=("of class +1: what a layer adds is multiplied by 1 + ΔW; A is Qᵀ, so 0 is orthogonal",),
    )


_KINDS = {"LORA": _analyse_lora, "CONTROL": _analyse_control}
"""Kind of an adapter → what looks at it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Setting:
    rank: int
    scaling: float


def _setting(fields: Mapping[str, Any], module: str) -> _Setting:
    """A module's rank and scaling: its own where a pattern names it, by the last parts of its name."""

    def of(patterns: Any, default: Any) -> Any:
        named = module.replace(".base_layer", "")
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", named):
                return value
        return default

    rank = of(fields.get("rank_pattern"), fields.get("r", 8))
    alpha = of(fields.get("alpha_pattern"), fields.get("lora_alpha", 8))
    return _Setting(rank=rank, scaling=alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank))


def _facts_of(folder: Path, module: str, first: Tensor, second: Tensor, setting: _Setting) -> ModuleFacts:
    """A [experts·rank, inputs] and B [outputs, rank·experts], experts first in A and last in B as peft has them."""
    rows, columns = first.shape[0], second.shape[1]
    rank = setting.rank
    if rows != columns or rows % rank:
        raise UserError(
            f"{folder}: {module} has {rows} rows in A and {columns} columns in B, its rank is {rank} by the"
            " configuration; give an adapter that is whole"
        )
    experts = rows // rank
    by_a = first.reshape(experts, rank, -1).double()
    by_b = second.reshape(second.shape[0], rank, experts).permute(2, 0, 1).double()
    gram_a, gram_b = by_a @ by_a.mT, by_b.mT @ by_b
    frobenius = setting.scaling * float((gram_a * gram_b).sum().clamp(min=0).sqrt())
    values = setting.scaling * torch.linalg.svdvals(torch.linalg.qr(by_b).R @ torch.linalg.qr(by_a.mT).R.mT)
    largest = values[int(values[:, 0].argmax())]
    return ModuleFacts(
        name=module,
        experts=experts,
        rank=rank,
        scaling=setting.scaling,
        frobenius=abs(frobenius),
        spectral=float(largest[0]),
        effective_rank=float(_effective_rank(values).mean()),
        parallel_a=float(_parallel(gram_a).mean()),
        parallel_b=float(_parallel(gram_b).mean()),
        share=0.0,
        singular_values=tuple(largest.tolist()),
    )


def _effective_rank(values: Tensor) -> Tensor:
    """Of singular values [experts, rank]."""
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    found = torch.exp(-torch.special.xlogy(shares, shares).sum(-1))
    return torch.where(total.squeeze(-1) > 0, found, torch.zeros_like(found))


def _parallel(gram: Tensor) -> Tensor:
    """The root of the mean squared cosine between different vectors, of their products [experts, rank, rank]."""
    rank = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = gram / (norms[:, :, None] * norms[:, None, :]).clamp(min=torch.finfo(gram.dtype).tiny)
    cosines = cosines - torch.diag_embed(cosines.diagonal(dim1=-2, dim2=-1))
    return (cosines.square().sum((-2, -1)) / max(1, rank * (rank - 1))).sqrt()
