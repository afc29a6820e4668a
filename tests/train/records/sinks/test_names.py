"""`--report_to`: services by name; what is not known or not installed is refused in a line."""

import pytest

from jllm.errors import UserError
from jllm.train.records.sinks import names
from jllm.train.records.sinks.names import services_of


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names.importlib.util, "find_spec", lambda name: name != "mlflow" or None)
    assert services_of("") == services_of(" , ") == []
    assert services_of("wandb, trackio,wandb") == ["wandb", "trackio"]
    with pytest.raises(UserError, match=r"--report_to mlflow: the package mlflow is not installed; install it"):
        services_of("wandb,mlflow")
    with pytest.raises(UserError, match=r'wandbb is none of .*Did you mean "wandb"\?'):
        services_of("wandbb")
