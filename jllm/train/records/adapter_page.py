"""What an adapter does, for people: a table on the terminal, and a page with pictures.

Cost: text; the figures are those of `jllm.models.adapters.analysis`.
"""

import dataclasses
from collections.abc import Callable, Iterable

from jllm.models.adapters.analysis import AdapterFacts, ModuleFacts
from jllm.train.records.curves import Curve, Panel
from jllm.train.records.svg import escape, page

Figure = Callable[[ModuleFacts], float]
COLUMNS: tuple[tuple[str, str, Figure], ...] = (
    ("rank", "d", lambda each: each.rank),
    ("‖ΔW‖F", ".4g", lambda each: each.frobenius),
    ("‖ΔW‖2", ".4g", lambda each: each.spectral),
    ("eff. rank", ".2f", lambda each: each.effective_rank),
    ("A parallel", ".3f", lambda each: each.parallel_a),
    ("B parallel", ".3f", lambda each: each.parallel_b),
    ("share", ".1%", lambda each: each.share),
)
"""Title, form and value of each column."""
DIAGRAMS: tuple[tuple[str, Figure], ...] = (
    ("Frobenius norm of the change", lambda each: each.frobenius),
    ("spectral norm of the change", lambda each: each.spectral),
    ("effective rank", lambda each: each.effective_rank),
    ("how parallel the rows of A are", lambda each: each.parallel_a),
    ("how parallel the columns of B are", lambda each: each.parallel_b),
)


def table(facts: AdapterFacts) -> list[str]:
    """Lines: one for each module, and a summary."""
    rows = [["module", *(title for title, _, _ in COLUMNS)]]
    rows += [[_named(each), *(format(value(each), form) for _, form, value in COLUMNS)] for each in facts.modules]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return [*lines, *summary(facts)]


def summary(facts: AdapterFacts) -> list[str]:
    """What is so of the whole adapter."""
    ranks = sorted({each.rank for each in facts.modules})
    scalings = sorted({each.scaling for each in facts.modules})
    lines = [
        f"{facts.kind}: {len(facts.modules)} modules, rank {_range(ranks)}, scaling {_range(scalings)},"
        f" {facts.parameters:,} parameters, ‖ΔW‖F {facts.frobenius:.4g} in all"
    ]
    by_leaf = _by_leaf(facts.modules)
    shares = {leaf: sum(each.share for each in group) for leaf, group in by_leaf.items()}
    lines.append("share of ‖ΔW‖²: " + ", ".join(f"{leaf} {share:.1%}" for leaf, share in shares.items()))
    if facts.whole:
        lines.append(f"stored whole: {', '.join(facts.whole)}")
    return lines + list(facts.notes)


def adapter_page(title: str, facts: AdapterFacts) -> str:
    """The whole page: figures by layer, singular values by number, and the table."""
    by_leaf = _by_leaf(each for each in facts.modules if each.layer is not None)
    panels = [Panel(title=name, x_title="layer", curves=_curves(by_leaf, value)) for name, value in DIAGRAMS]
    spectra = [
        Curve(name=leaf, points=_mean_spectrum(group), colour=number)
        for number, (leaf, group) in enumerate(by_leaf.items())
    ]
    panels.append(Panel(title="singular values, mean over the layers", x_title="number", curves=spectra))
    shown = [panel for panel in panels if any(curve.points for curve in panel.curves)]
    return page(title, shown, [_section(facts)])


def as_json(facts: AdapterFacts) -> dict[str, object]:
    """All figures as JSON values."""
    return dataclasses.asdict(facts)


def _named(module: ModuleFacts) -> str:
    return module.name if module.experts == 1 else f"{module.name} ({module.experts} experts)"


def _range(values: list[float] | list[int]) -> str:
    first, last = f"{values[0]:.4g}", f"{values[-1]:.4g}"
    return first if first == last else f"{first} to {last}"


def _by_leaf(modules: Iterable[ModuleFacts]) -> dict[str, list[ModuleFacts]]:
    found: dict[str, list[ModuleFacts]] = {}
    for each in modules:
        found.setdefault(each.leaf, []).append(each)
    return found


def _curves(by_leaf: dict[str, list[ModuleFacts]], value: Figure) -> list[Curve]:
    return [
        Curve(name=leaf, points=[(float(each.layer or 0), value(each)) for each in group], colour=number)
        for number, (leaf, group) in enumerate(by_leaf.items())
    ]


def _mean_spectrum(group: list[ModuleFacts]) -> list[tuple[float, float]]:
    longest = max(len(each.singular_values) for each in group)
    padded = [(*each.singular_values, *[0.0] * (longest - len(each.singular_values))) for each in group]
    return [(float(number + 1), sum(each) / len(group)) for number, each in enumerate(zip(*padded, strict=True))]


def _section(facts: AdapterFacts) -> str:
    return (
        '<section class="wide">\n<h2>all modules</h2>\n<pre>' + escape("\n".join(table(facts))) + "</pre>\n</section>"
    )
