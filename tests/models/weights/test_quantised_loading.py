"""Stages in few bits hold the bytes that transformers and bitsandbytes hold, quantised by them or by us."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[adapters]")

from jllm.errors import UserError
from jllm.models.pipeline.carving import published_names
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.structure import count_layers
from jllm.models.weights.loading import load_stage
from jllm.models.weights.quantisation import Quantisation, plan_quantisation, stored_quantisation
from jllm.models.weights.quantising import held_bytes
from jllm.models.weights.source import causal_class, model_info, read_config
from tests.models.tiny import tiny_config
from tests.models.weights.by_bitsandbytes import for_transformers, whole

ROOT = Path(__file__).resolve().parents[3]
FORMATS = {
    "nf4": Quantisation(bits=4),
    "fp4": Quantisation(bits=4, kind="fp4", double=False),
    "8 bits": Quantisation(bits=8),
}
SCRIPT = ROOT / "benchmarks/quantised_loading.py"


def stages(
    folder: Path, how: Quantisation, count: int = 1, dtype: torch.dtype = torch.float32, **more: Any
) -> list[PreTrainedModel]:
    config = read_config(folder, quantised=True)
    plan = plan_quantisation(config, causal_class(config), stored_quantisation(folder) or how, folder=folder)
    layers = count_layers(config)
    boundaries = [layers * index // count for index in range(count + 1)]
    return [load_stage(folder, span, dtype=dtype, quantisation=plan, **more) for span in spans_of(boundaries)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "name", "is_stored"),
    [
        *(("llama", name, is_stored) for name in FORMATS for is_stored in (False, True)),
        *((family, "nf4", False) for family in ("gpt2", "phi3", "qwen3_moe")),
        ("gpt2", "fp4", True),
        ("qwen3_moe", "8 bits", True),
    ],
)
def test_bytes_are_those_of_transformers(tmp_path: Path, family: str, name: str, is_stored: bool) -> None:
    """On one and three stages; experts, which transformers leaves, apart."""
    how = FORMATS[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path / "plain")
    expected, folder = whole(tmp_path / "plain", how), tmp_path / "plain"
    if is_stored:
        folder = tmp_path / "stored"
        expected.save_pretrained(folder)
    tensors = expected.state_dict()
    for count in (1, 3):
        found: dict[str, torch.Tensor] = {}
        for model in stages(folder, how, count):
            assert getattr(model, f"is_loaded_in_{how.bits}bit")
            found |= model.state_dict()
        left = {key for key in found if ".experts." not in key}
        assert left == {key for key in tensors if ".experts." not in key}
        for key in left:
            assert torch.equal(found[key], tensors[key]), (count, key)
        quantised = {key for key in found if key.endswith("quant_state.bitsandbytes__nf4") and ".experts." in key}
        assert len(quantised) == (8 if (family, name, is_stored) == ("qwen3_moe", "nf4", False) else 0)


def test_experts_have_their_published_names(tmp_path: Path) -> None:
    """A parameter of packed experts in 4 bits is what `replace_parameter_4bit` makes of it, and is called as before."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")).save_pretrained(tmp_path)
    expected = whole(tmp_path, FORMATS["nf4"], llm_int8_skip_modules=["lm_head"]).train()
    names = {name for name, _ in expected.named_parameters()}
    for module in expected.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3:
                replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")
    [found] = stages(tmp_path, FORMATS["nf4"])
    [span] = spans_of([0, 4])
    assert set(published_names(found, span).values()) == names
    ids = torch.arange(3, 15)[None]
    assert torch.equal(found(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)


def test_an_evaluation_leaves_the_bytes(plain: Path) -> None:
    """On some processors bitsandbytes would pack them anew there."""
    [model] = stages(plain, FORMATS["nf4"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(torch.arange(3, 15)[None])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_folder_whose_bytes_are_stored_as_other_types(tmp_path: Path, plain: Path) -> None:
    """As FSDP needs them. Types that a conversion of the model would take for weights are not kept."""
    whole(plain, FORMATS["nf4"], bnb_4bit_quant_storage=torch.bfloat16).save_pretrained(tmp_path)
    expected = whole(plain, FORMATS["nf4"]).train()
    [model] = stages(tmp_path, FORMATS["nf4"])
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    ids = torch.arange(3, 15)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_files_may_be_replaced_while_the_model_lives(tmp_path: Path, plain: Path) -> None:
    for name, how in FORMATS.items():
        folder = tmp_path / name
        whole(plain, how).save_pretrained(folder)
        [model] = stages(folder, how)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        path = folder / "model.safetensors"
        path.write_bytes(b"\xff" * path.stat().st_size)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_nothing_is_said_of_other_stages_tensors(
    tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, how in FORMATS.items():
        whole(plain, how).save_pretrained(tmp_path / name)
        stages(tmp_path / name, how, 2)
    assert "no place" not in capsys.readouterr().err


def changed(folder: Path, to: Path, change: Any) -> Path:
    """A copy of a folder whose tensors are what `change` makes of them."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    save_file(change(tensors), to / "model.safetensors", {"format": "pt"})
    return to


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("how", "change", "message"),
    [
        ("nf4", lambda t: {k: v for k, v in t.items() if not k.startswith(f"{UP}.")}, "the files have no scales for"),
        ("nf4", lambda t: {k: v for k, v in t.items() if k != f"{UP}.absmax"}, "that bitsandbytes cannot read"),
        ("nf4", lambda t: t | {f"{UP}.nested_absmax": torch.full_like(t[f"{UP}.nested_absmax"], float("nan"))}, "NaN"),
        ("nf4", lambda t: t | {k.replace("up", "down"): v.clone() for k, v in t.items() if "1.mlp.up_proj" in k},
         r"down_proj.weight is \[48, 32\], the configuration says \[32, 48\]"),
        ("8 bits", lambda t: {k: v for k, v in t.items() if k != UP.replace("weight", "SCB")}, "have no scales for"),
        ("8 bits", lambda t: t | {UP: t[UP][:, :-1].clone()}, r"up_proj.weight is \[48, 31\]"),
    ],
)  # fmt: skip
def test_damaged_folders(tmp_path: Path, plain: Path, how: str, change: Any, message: str) -> None:
    whole(plain, FORMATS[how]).save_pretrained(tmp_path / "stored")
    folder = changed(tmp_path / "stored", tmp_path / "changed", change)
    with pytest.raises(UserError, match=message) as refused:
        stages(folder, FORMATS[how], names_unused=False)
    assert "\n" not in str(refused.value)


def test_a_configuration_that_is_of_other_weights(tmp_path: Path, plain: Path) -> None:
    """Seen in the headers, so that a dry run refuses it too."""
    whole(plain, FORMATS["nf4"]).save_pretrained(tmp_path)
    shutil.copyfile(plain / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no file holds scales of quantised weights; remove quantization_config"):
        model_info(tmp_path, quantised=True)


@pytest.mark.parametrize("how", FORMATS)
def test_weights_that_cannot_be_quantised(tmp_path: Path, plain: Path, how: str) -> None:
    folder = changed(plain, tmp_path / "nan", lambda t: t | {UP: torch.full_like(t[UP], float("nan"))})
    with pytest.raises(UserError, match=rf"the tensor {UP} .*holds NaN"):
        stages(folder, FORMATS[how])
    config = json.loads((plain / "config.json").read_text())
    shutil.copytree(plain, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(UserError, match=r"do not fit its config\.json"):
        stages(tmp_path / "other", FORMATS[how])


def test_half_a_byte_for_a_parameter(tmp_path: Path) -> None:
    """The head stays as it is, and what comes out differs by what the bits lose: little in 8 bits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    ids = torch.randint(0, 512, (2, 64))
    expected = plain(ids).logits
    for name, bytes_, lost in (("8 bits", 1.0, 0.03), ("nf4", 0.5, 0.25)):
        [model] = stages(tmp_path, FORMATS[name])
        assert float((model.eval()(ids).logits - expected).norm() / expected.norm()) < lost
        assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
        layers: Any = model.model.layers
        linear = sum(each.in_features * each.out_features for each in layers.modules() if hasattr(each, "in_features"))
        assert bytes_ < held_bytes(layers) / linear < bytes_ + 0.03


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory")
def test_memory_of_loading(tmp_path: Path) -> None:
    """Little more than the bytes that are then held, mapped pages of the files included; of a slice, private memory.

    `benchmarks/quantised_loading.py` measures the same on a model of 0.4 B parameters.
    """
    config = LlamaConfig(vocab_size=500, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4)
    small = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    for size, made in (("model", config), ("small", small)):
        AutoModelForCausalLM.from_config(made).to(torch.bfloat16).save_pretrained(tmp_path / size / "bf16")
        how = for_transformers(FORMATS["nf4"])
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / size / "bf16", quantization_config=how, dtype=torch.bfloat16
        )
        model.save_pretrained(tmp_path / size / "stored")
    commands = [
        [*("--load", tmp_path / "model" / kind), *("--small", tmp_path / "small" / kind), "--who", who]
        for kind, who in (("bf16", "jllm"), ("stored", "jllm"), ("bf16", "jllm sliced"))
    ]
    loading = [
        subprocess.Popen([sys.executable, SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for words in commands
    ]
    found = [json.loads(each.communicate(timeout=200)[0].splitlines()[-1]) for each in loading]
    # A weight of which a slice is taken is mapped whole meanwhile, a large part of so small a model.
    assert all(1.0 < ratio <= 1.3 for ratio in (*(each["ratio"] for each in found[:2]), found[2]["anonymous_ratio"])), (
        found
    )


@pytest.mark.parametrize(("name", "most"), [("8 bits", 0.02), ("nf4", 0.2)])
def test_what_few_bits_do_to_a_real_model(real_model: Path, name: str, most: float) -> None:
    """Its loss on text beside that in bf16; in 8 bits within 2 %."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in ("comparisons", "slicings", "with"))
    ids = AutoTokenizer.from_pretrained(real_model)(text, return_tensors="pt")["input_ids"][:, :256]
    [quantised] = stages(real_model, FORMATS[name], dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.bfloat16)
    losses = []
    for model in (quantised, plain):
        with torch.no_grad():
            losses.append(float(model.eval()(input_ids=ids, labels=ids, use_cache=False).loss))
    assert losses[0] / losses[1] - 1 < most
