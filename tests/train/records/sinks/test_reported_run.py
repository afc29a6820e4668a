"""A run has a name that people recognise, where it has a place."""

from jllm.train.records.sinks.reported_run import ReportedRun


def test_names() -> None:
    def name(**options: str | None) -> str:
        return ReportedRun(id="0123456789abcdef", options=options, folder=None, with_files=False).name

    assert name(checkpoint="runs/one", output_dir="out") == "one 01234567"
    assert name(checkpoint=None, output_dir="out") == "out 01234567"
    assert name() == "0123456789abcdef"
