"""Every option of `raw2ids`, once: flags, checks and help."""

import dataclasses
import datetime
from pathlib import Path

from jllm.errors import UserError
from jllm.machine import parse_memory
from jllm.options import option
from jllm.ranges import LEAST_INT

MOST_LEN = (1 << 31) - 1
CODECS = ("zstd", "gzip", "snappy", "lz4", "brotli")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raw2IdsConfig:
    """Options of `raw2ids`."""

    input: tuple[str, ...] = option(
        dataclasses.MISSING,
        "-i",
        group="Input and output",
        help="file, folder, glob, URL, or - for standard input; may be repeated",
    )
    output: Path | None = option(
        None, "-o", help="data set folder  [default: beside the input, <stem>_<tokenizer>]", metavar="FOLDER"
    )
    type: str = option(
        "ft",
        "-t",
        help="ft: chat fine-tuning; pretrain: documents; preference: pairs of a chosen and a rejected answer",
        choices=("ft", "pretrain", "preference"),
    )
    input_format: str | None = option(
        None, help="format of the input, where names do not say it", choices=("text", "jsonl", "json", "parquet", "ids")
    )
    clean: bool = option(False, "-C", help="start over: remove what an earlier run left in the output folder")

    tokenizer: str = option(
        dataclasses.MISSING, group="Tokenizer", help="Hugging Face folder or name", metavar="FOLDER"
    )
    engine: str = option("auto", help="tokenizer engine", choices=("auto", "fastokens", "hf"))
    trust_remote_code: bool = option(False, help="run the tokenizer's own Python code, where its folder has some")

    max_len: int = option(2048, group="Rows", help="row length in tokens, before the label shift", metavar="N")
    packing: str = option(
        "none",
        help="best_fit: documents or conversations whole, in as few rows as possible (preference: always)",
        choices=("none", "best_fit"),
    )
    pad: bool = option(False, help="ft, best_fit: pad rows to max_len; cu_seqlens says where the padding starts")
    pad_to_multiple_of: int | None = option(None, help="ft, best_fit: pad rows to a multiple of this", metavar="N")
    max_tokens: int | None = option(None, help="stop before the document that would exceed this many tokens")
    max_rows: int | None = option(None, help="stop after this many rows")

    stack: bool = option(
        False, group="Documents, -t pretrain", help="pretrain: pack documents into full rows that overlap by one token"
    )
    text_field: str = option("text", help="pretrain: where the text is in a record; dots lead into it", metavar="A.B")
    doc_prefix: str | None = option(
        None, help='pretrain: before every document: text, an id, or [ids]; "" for nothing  [default: the tokenizer\'s]'
    )
    doc_suffix: str | None = option(None, help="pretrain: after every document  [default: end-of-text]")
    sequence_prefix: str | None = option(None, help="pretrain: at the start of every row; not trained on")
    mask_tokens: bool = option(False, help="pretrain: do not train on special tokens")
    parse_special: bool = option(False, help="pretrain: special tokens inside the text become their ids")
    stride: int | None = option(
        None, help="pretrain without --stack: windows of a long document start this far apart  [default: max_len - 1]"
    )
    drop_tails: bool = option(False, help="pretrain: drop the shorter row at the end of a split or long document")

    format: str = option(
        "auto",
        group="Conversations, -t ft",
        help="ft: what a record looks like",
        choices=("auto", "roles", "messages", "sharegpt", "alpaca", "completion", "fields"),
    )
    field_map: str | None = option(
        None,
        help="ft: user=FIELD,assistant=FIELD[,system=FIELD,tools=FIELD], or messages=FIELD; preference:"
        " [prompt=FIELD,]chosen=FIELD,rejected=FIELD[,system=FIELD,tools=FIELD]; dots lead into objects and lists",
        metavar="MAP",
    )
    join: str = option(
        "\n\n", help="ft: between consecutive texts of one role  [default: a blank line]", metavar="TEXT"
    )
    ignore_tools: bool = option(False, help="ft: leave out lists of tools, which the template may not be able to show")
    chat_template: str | None = option(
        None, help="ft: a built-in name, a file, or text  [default: the tokenizer's own]", metavar="TEMPLATE"
    )
    train_on: str = option("all", help="ft: answers to train on", choices=("all", "last"))
    train_on_prompt: bool = option(False, help="ft: train on everything")
    overlong: str | None = option(
        None,
        help="conversations, or pairs (both sides together), longer than max_len  [default: split; preference: drop]",
        choices=("split", "drop", "error"),
    )
    filter: bool = option(False, help="ft: drop rows with at most one trained token")
    date: str | None = option(None, help="ft: date for templates that show one  [default: today]", metavar="2026-01-31")

    control_class: tuple[str, ...] = option(
        (),
        group="Control adapters",
        help="class of the documents of files whose name fits a glob: +1, -1, 0 (adapters are off) or random (+1 or -1"
        " by the document); for all input or none; may be repeated, the first that fits counts",
        metavar="GLOB=CLASS",
    )

    num: int = option(
        1 << 23, "-n", group="Files", help="documents or conversations in a split (one sub-folder)", metavar="N"
    )
    batch_size: int = option(65536, help="rows in a Parquet file", metavar="N")
    compress: str = option("zstd", "-c", help="compression of the shards", choices=CODECS)

    eval_fraction: float | None = option(
        None,
        group="Held out for evaluation",
        help="hold this fraction of the documents or conversations out, as a data set of its own",
        metavar="F",
    )
    eval_output: Path | None = option(
        None, help="data set folder of what is held out  [default: _eval/<name> beside the output]", metavar="FOLDER"
    )
    seed: int = option(1234, help="decides with a document's ids whether it is held out")

    on_error: str = option(
        "auto",
        group="Bad records",
        help="bad records: skip them, stop at the first, or (auto) skip and fail at the end where more than 1 % and at"
        " least 10 are bad",
        choices=("auto", "skip", "stop"),
    )
    max_record: str = option(
        "128M", help="largest record, decompressed, in bytes: 64M, 1G; a larger one ends the run", metavar="SIZE"
    )
    bad_records: Path | None = option(
        None, help="write all bad records there, as JSON lines with file, line, kind and reason", metavar="FILE"
    )

    cores: int = option(-1, least=LEAST_INT, group="This run", help="workers; negative: all cores this process may use")
    threads: bool = option(False, "-T", help="threads instead of processes, where that makes a difference")
    quiet: bool = option(False, help="no progress line")
    debug: int = option(0, help="print this many decoded rows at the end", metavar="N")
    dry_run: bool = option(
        False,
        help="write nothing: show format, template, three rows, bad records and expected sizes of the first 1,000",
    )
    json: bool = option(False, help="with --dry_run: print all of that, and every option, as one JSON object")

    def __post_init__(self) -> None:
        if self.json and not self.dry_run:
            raise UserError("--json prints what --dry_run finds; give --dry_run too, or drop it")
        for name in ("num", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")
        if self.largest_record < 1:
            raise UserError(f"--max_record {self.max_record}: give at least 1")
        if self.max_len < 2:
            raise UserError(f"--max_len {self.max_len}: give at least 2: a row of one token trains nothing")
        if self.max_len > MOST_LEN:
            raise UserError(f"--max_len {self.max_len}: give at most {MOST_LEN}: places in a row are int32")
        if self.date is not None:
            self._check_date(self.date)
        if self.cores == 0:
            raise UserError("--cores 0: give the number of workers, or a negative number for all cores")
        if self.stack and self.type != "pretrain":
            raise UserError("--stack: only for -t pretrain; conversations are packed with --packing best_fit")
        if self.type == "preference":
            self._check_preference()
        if self.packing != "none" and (self.stack or self.stride or self.sequence_prefix):
            raise UserError("--packing best_fit: not together with --stack, --stride or --sequence_prefix")
        if self.is_chat:
            for name in (
                "stride",
                "doc_prefix",
                "doc_suffix",
                "sequence_prefix",
                "mask_tokens",
                "parse_special",
                "drop_tails",
            ):
                if getattr(self, name):
                    raise UserError(f"--{name}: only for -t pretrain")
        else:
            if self.join != "\n\n":
                raise UserError("--join: only for -t ft")
            for name in ("filter", "field_map", "chat_template", "train_on_prompt", "date", "ignore_tools"):
                if getattr(self, name):
                    raise UserError(f"--{name}: only for -t ft")
            if (self.pad or self.pad_to_multiple_of) and self.packing == "none":
                raise UserError("--pad: for -t ft or --packing best_fit; the rows of documents are not padded")
        if self.pad_to_multiple_of is not None and not 1 <= self.pad_to_multiple_of <= MOST_LEN:
            raise UserError(f"--pad_to_multiple_of {self.pad_to_multiple_of}: give at least 1, at most {MOST_LEN}")
        if self.stride is not None and (self.stack or not 1 <= self.stride < self.max_len):
            raise UserError(f"--stride {self.stride}: give 1 to max_len - 1, without --stack")
        if self.eval_fraction is None and self.eval_output is not None:
            raise UserError(f"--eval_output {self.eval_output}: say with --eval_fraction how much is held out")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise UserError(f"--eval_fraction {self.eval_fraction}: give a fraction between 0 and 1, such as 0.01")
        if self.eval_fraction is not None and self.max_rows is not None:
            raise UserError("--max_rows: not together with --eval_fraction; end the data set with --max_tokens")
        for name in ("max_tokens", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: give at least 1")
        if self.format != "auto" and self.type == "pretrain":
            raise UserError(f"--format {self.format}: only for -t ft; --input_format says what a file is")
        if self.format not in ("auto", "fields") and self.field_map:
            raise UserError(f"--format {self.format}: not together with --field_map, which is the format fields")

    @property
    def is_chat(self) -> bool:
        """Whether records are conversations, or pairs of them."""
        return self.type != "pretrain"

    @property
    def is_best_fit(self) -> bool:
        """Whether rows are packed best-fit, as pairs always are."""
        return self.packing == "best_fit" or self.type == "preference"

    @property
    def overlong_way(self) -> str:
        """`--overlong`, or its default."""
        return self.overlong or ("drop" if self.type == "preference" else "split")

    def _check_preference(self) -> None:
        """Raises:
        UserError: an option that has no meaning for pairs.
        """
        if self.overlong == "split":
            raise UserError("--overlong split: a preference pair is never split; give drop or error")
        if self.format != "auto":
            raise UserError(
                f"--format {self.format}: -t preference finds out by itself what a pair looks like; name its fields"
                " with --field_map prompt=..,chosen=..,rejected=.., or drop it"
            )
        if self.input_format == "ids":
            raise UserError("--input_format ids: -t preference reads texts and messages; give these")
        for name, why in (
            ("train_on_prompt", "both sides of a pair repeat the prompt, which is not trained on"),
            ("filter", "each side of a pair has a trained answer"),
            ("control_class", "control adapters are not trained on pairs"),
        ):
            if getattr(self, name):
                raise UserError(f"--{name}: not for -t preference: {why}; drop it")

    @property
    def largest_record(self) -> int:
        """Bytes of `--max_record`."""
        return parse_memory("--max_record", self.max_record)

    def _check_date(self, given: str) -> None:
        try:
            datetime.date.fromisoformat(given)
        except ValueError:
            raise UserError(f"--date {given}: write it as 2026-01-31") from None
