"""What `jllm plan` estimates, beside what `gpu_train.py` measured: memory and tokens a second of the same settings.

    python benchmarks/planned.py

`MEASURED` is copied from the table of H200 figures in benchmarks/README.md. Prints one JSON line; `ratio` is the one of
all estimates over their measurements that is furthest from 1. Needs no device, and takes some seconds.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from transformers import LlamaForCausalLM  # noqa: E402

from benchmarks.gpu_rows import LORA_RANK, SETTINGS, Setting, llama  # noqa: E402
from jllm.models.weights.quantisation import Quantisation, plan_quantisation  # noqa: E402
from jllm.train.planning.cluster import Cluster, peak_of  # noqa: E402
from jllm.train.planning.layouts import Estimate, Layout, Wanted, estimate  # noqa: E402

QLORA = "qlora-8b"
"""`qlora_8b.py --length 4096 --recompute`."""
SETTINGS_OF = {**SETTINGS, QLORA: Setting(shape="8b", rows=1, accumulation=4, lora=True, recompute=True)}
MEASURED = {
    "wide-kahan": (36.3, 41_179),
    "wide-masters": (57.1, 39_317),
    "1b-kahan": (31.3, 66_499),
    "1b-masters": (40.5, 65_701),
    "two-stages": (38.3, 74_470),
    "two-slices": (29.9, 70_035),
    "two-runs": (37.7, 63_606),
    "lora-8b": (50.9, 15_568),
    QLORA: (8.1, 9_966),
}
"""By the name of the setting: GiB of the fullest device, and tokens a second."""


def planned(name: str) -> Estimate:
    """The estimate of a setting."""
    setting = SETTINGS_OF[name]
    peak = peak_of("H200")
    assert peak is not None
    devices = {"devices": setting.devices, "devices_per_node": 8}
    cluster = Cluster(**devices, memory=140.0 * 2**30, operations=peak, inside=400e9, between=50e9)
    layout = Layout(
        pipe=setting.stages,
        data=1,
        sequence=setting.runs,
        tensor=setting.slices,
        rows=setting.rows,
        micro_batches=setting.accumulation,
        interval=int(setting.recompute),
    )
    config = llama(setting.shape)
    adapters: dict[str, Any] = {}
    if setting.lora:
        from jllm.models.adapters.lora_plan import LoraChoice, plan_lora  # here: peft may not be there

        adapters["lora"] = plan_lora(config, LlamaForCausalLM, LoraChoice(rank=LORA_RANK, alpha=LORA_RANK))
    if name == QLORA:
        adapters["quantised"] = plan_quantisation(config, LlamaForCausalLM, Quantisation(bits=4), folder=ROOT)
    wanted = Wanted(
        config=config,
        length=setting.length,
        rows=setting.rows * setting.accumulation,
        optimizer="adamw_kahan" if setting.states == "bf16" else "adamw",
        **adapters,
    )
    return estimate(wanted, cluster, layout)


def main() -> int:
    """Work out, report."""
    table, ratios = {}, []
    for name, (memory, speed) in MEASURED.items():
        found = planned(name)
        gib = found.memory / 2**30
        table[name] = {
            "memory_gib": [round(gib, 1), memory],
            "tokens_per_second": [round(found.tokens_per_second), speed],
        }
        ratios += [gib / memory, found.tokens_per_second / speed]
    furthest = max(ratios, key=lambda ratio: abs(ratio - 1))
    print(json.dumps({"benchmark": "planned", "ratio": round(furthest, 3), "estimated_and_measured": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
