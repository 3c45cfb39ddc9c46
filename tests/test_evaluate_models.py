"""`benchmarks.evaluate_models`: many methods at a time, and going on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import evaluate_models
from oscar_kv.demo import MODEL
from oscar_kv.evaluation import runner


@pytest.mark.slow
def test_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"peers": ("attention:windows=1,length=512",)}
    monkeypatch.setattr(evaluate_models, "TASKS", tasks)
    monkeypatch.setattr(evaluate_models, "SUITES", {"peers": ("full", "compact")})
    evaluate_models.main([MODEL], minutes=5, processes=2, out=tmp_path)
    begun = []
    command = evaluate_models.command

    def noting(model: Path, method: str, *rest: Any) -> list[str]:
        begun.append(method)
        return command(model, method, *rest)

    monkeypatch.setattr(evaluate_models, "command", noting)
    more = ("full", "compact", "int4", "mixed:layers=[8]")  # the last is not in the model
    monkeypatch.setattr(evaluate_models, "SUITES", {"peers": more})
    evaluate_models.main([MODEL], minutes=5, processes=2, out=tmp_path)
    assert begun == ["int4"]
    file = tmp_path / f"{MODEL.name}_peers.jsonl"
    assert [row["method"]["name"] for row in runner.read_rows(file)] == ["full", "compact", "int4"]
    assert capsys.readouterr().out == f"{file}: 2 new results\n{file}: 1 new results\n"
    # another setting is another result
    monkeypatch.setattr(evaluate_models, "TASKS", {"peers": ("attention:windows=1,length=256",)})
    left = {("peers", name) for name in ("full", "compact", "int4")}
    assert evaluate_models.unfinished(MODEL, "cpu", tmp_path) == left
