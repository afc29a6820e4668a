"""Probes: what a template looks for in texts is among them."""

import jinja2

from jllm.data.chat.probes import LONGEST, probes_of


def test_literals_and_lengths_of_a_template_are_probed() -> None:
    source = (
        "{% if 'needle' in m.content %}a{% elif m.content | length > 700 %}b{% elif m.content[:9] == 'head' %}c"
        f"{{% elif m.content | length > {LONGEST + 1} %}}d{{% endif %}}"
    )
    probes = probes_of(jinja2.Environment(), source)
    assert len(probes) == len(set(probes))
    for text in ("needle", "a needle b", "aneedleb", "needle b", "a needle", "head"):
        assert text in probes
    sizes = {len(text) for text in probes if set(text) == {"x"}}
    assert sizes == {8, 9, 10, 699, 700, 701, 5000}
