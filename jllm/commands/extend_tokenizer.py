"""`jllm extend_tokenizer`: a model with more tokens."""

import dataclasses
from pathlib import Path

from jllm.atomic import check_new_folder
from jllm.errors import UserError, say
from jllm.machine import require_package
from jllm.options import command, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtendTokenizerConfig:
    """Options of `extend_tokenizer`."""

    model: Path = option(dataclasses.MISSING, "-m", help="Hugging Face folder of a model and its tokenizer")
    output: Path = option(dataclasses.MISSING, "-o", help="where the extended folder is written")
    add: tuple[str, ...] = option((), help="a token to add, which stays in decoded text (may be repeated)")
    add_special: tuple[str, ...] = option(
        (), help="a control token to add, which decoders leave out with other special tokens (may be repeated)"
    )
    add_file: Path | None = option(None, help="text file of tokens for --add, one a line")
    pad_to_multiple_of: int = option(
        1, least=1, most=1 << 20, help="the embedding gets a number of rows that is a multiple of this", metavar="N"
    )

    def __post_init__(self) -> None:
        # What a look at the folders tells is said before anything large is imported.
        if not (self.model / "config.json").is_file():
            missing = "has no config.json" if self.model.is_dir() else "does not exist"
            raise UserError(f"--model {self.model}: {missing}; give a Hugging Face model folder")
        if not self.add and not self.add_special and self.add_file is None:
            raise UserError("nothing is to be added; give --add, --add_special or --add_file")
        check_new_folder(self.output, "--output")


@command(ExtendTokenizerConfig, name="extend_tokenizer")
def main(config: ExtendTokenizerConfig) -> None:
    """Add tokens to a model's tokenizer, and rows for them to its embedding and its head, each the mean of the rows in
    use. New ids follow the largest id in use; padding rows of the embedding are taken first. The model itself is not
    changed."""
    require_package("torch", "jllm extend_tokenizer", "train")
    from jllm.data.tokenizer.extending import new_tokens
    from jllm.models.weights.vocabulary import resize_vocabulary

    plain = [*config.add, *(lines_of(config.add_file) if config.add_file is not None else ())]
    tokens = new_tokens(config.model, plain=plain, special=config.add_special)
    for token, number in tokens.known.items():
        say(f"{token!r} is there already, as id {number}: left as it is")
    if not tokens.ids:
        raise UserError("every token is there already; nothing is written")
    done = resize_vocabulary(
        config.model,
        config.output,
        used=tokens.first,
        wanted=tokens.first + len(tokens.ids),
        multiple=config.pad_to_multiple_of,
        finish=tokens.save,
    )
    first, last = tokens.first, tokens.first + len(tokens.ids) - 1
    names = list(tokens.ids)
    shown = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    say(f"{len(names)} new tokens ({shown}), ids {first} to {last}, of which {done.padding} take padding rows")
    rows = (
        f"{done.before:,} rows as before"
        if done.before == done.after
        else f"{done.after:,} rows, {done.before:,} before"
    )
    say(f"wrote {config.output}: {' and '.join(done.tensors)}, {rows}")


def lines_of(path: Path) -> list[str]:
    """The tokens in a file: every line that is not empty, as it stands; a byte order mark is none of the first."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--add_file {path}: is no UTF-8 text ({error.reason}); give a text file") from None
    return [line for line in text.split("\n") if line]
