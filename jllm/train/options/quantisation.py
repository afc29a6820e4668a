"""Options of the trainer: a frozen model in 4 or 8 bits, beside which adapters are trained (QLoRA)."""

import dataclasses

from jllm.errors import UserError
from jllm.options import option

QUANT_TYPES = ("nf4", "fp4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisationOptions:
    """In how many bits a frozen model is held."""

    load_in_4bit: bool = option(
        False, help="hold the frozen model in 4 bits (QLoRA); products are computed in --precision"
    )
    load_in_8bit: bool = option(False, help="hold the frozen model in 8 bits (LLM.int8)")
    bnb_4bit_quant_type: str = option("nf4", help="what 4 bits stand for", choices=QUANT_TYPES)
    bnb_4bit_use_double_quant: bool = option(True, help="quantise the scales of 4 bits too")
    skip_quant: str | None = option(
        None,
        help="modules that are not quantised, by commas: names or regular expressions; head, embedding and routers"
        " never are",
    )

    @property
    def load_in(self) -> str | None:
        """The option that says in how many bits, without its dashes."""
        return next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name)), None)


def check_quantisation(options: QuantisationOptions) -> None:
    """Raises:
    UserError: options that exclude each other, or say how to do what is not done.
    """
    if options.load_in_4bit and options.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit exclude each other; give one of them")
    if not options.load_in_4bit:
        for name, shown, off in (
            ("bnb_4bit_quant_type", f"--bnb_4bit_quant_type {options.bnb_4bit_quant_type}", "nf4"),
            ("bnb_4bit_use_double_quant", "--no_bnb_4bit_use_double_quant", True),
        ):
            if getattr(options, name) != off:
                raise UserError(f"{shown} is an option of --load_in_4bit; give that too, or drop it")
    if options.skip_quant is not None and options.load_in is None:
        raise UserError(
            f"--skip_quant {options.skip_quant!r} says what --load_in_4bit or --load_in_8bit leaves as it is; give one"
            " of them too, or drop it"
        )
