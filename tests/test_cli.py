"""The command line, run in this process: output, JSON, and one line for every mistake."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from test_json_fields import documented, fields
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from oscar_kv import OscarConfig
from oscar_kv.cli import main
from oscar_kv.demo import MODEL, Demo
from oscar_kv.render import continuations, continuations_plain, demo_table, size
from oscar_kv.storage.layout import PageLayout

TEXT = "the quick brown fox jumps over the lazy dog and runs away again. " * 40

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line; returns exit code, stdout and stderr."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return call


def _save(config: Any, folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder)
    config.vocab_size = len(fast)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, eos_token_id=None,
    )  # fmt: skip
    return _save(config, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt_neo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention is its own and takes no attention function."""
    config = GPTNeoConfig(
        hidden_size=64, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]
    )
    config.eos_token_id = config.bos_token_id = None
    return _save(config, tmp_path_factory.mktemp("gpt_neo"))


def _packed_bytes(preset: str, tokens: int) -> int:
    """Hand arithmetic for the tiny Llama: pages and the whole tail buffer."""
    config = OscarConfig.preset(preset)
    pages = max(0, tokens - config.recent_tokens) // 128
    tail = (config.recent_tokens + 128) * 2 * 32 * 2
    return 2 * 2 * (pages * PageLayout(config, 32, 2).page_bytes + tail)


# -- generate ---------------------------------------------------------------------------------


def test_generate_streams_text_and_sums_up_on_stderr(run: Run, llama: Path) -> None:
    args = ("generate", "--model", llama, "--prompt", TEXT, "--max-new-tokens", 12)
    code, out, err = run(*args)
    assert code == 0
    assert "error" not in err
    assert "(compact) instead of" in err
    assert "smaller; at 32K tokens" in err
    code, document, err = run(*args, "--json")
    result = json.loads(document)
    assert out.strip() == result["text"].strip()
    assert err == ""


@pytest.mark.parametrize("preset", ["paper", "compact", "quality", "high"])
def test_generate_reports_what_was_allocated(run: Run, llama: Path, preset: str) -> None:
    _, out, _ = run(
        *("generate", "--model", llama, "--prompt", TEXT, "--preset", preset),
        *("--max-new-tokens", 9, "--json"),
    )
    result = json.loads(out)
    tokens = result["prompt_tokens"] + result["new_tokens"] - 1
    assert result["new_tokens"] == 9
    assert tokens > 384
    assert result["full_precision_kv_bytes"] == 2 * 2 * tokens * 2 * 32 * 2
    tables = result["kv_bytes"] - _packed_bytes(preset, tokens)
    assert 0 <= tables < 200
    assert 0 < result["used_kv_bytes"] < result["kv_bytes"]
    long = result["long_context"]
    assert result["long_context_ratio"] == 2 * 2 * long * 2 * 32 * 2 / _packed_bytes(preset, long)
    assert result["ratio"] == pytest.approx(result["full_precision_kv_bytes"] / result["kv_bytes"])


@pytest.mark.parametrize("preset", ["paper", "compact"])
def test_a_short_prompt_is_told_the_truth(run: Run, llama: Path, preset: str) -> None:
    """Nothing is saved yet, how much is in use and allocated, and what will be at 32K tokens."""
    args = ("generate", "--model", llama, "--prompt", "the", "--preset", preset)
    result = json.loads(run(*args, "--max-new-tokens", 5, "--json")[1])
    tokens = result["prompt_tokens"] + 4
    assert result["full_precision_kv_bytes"] == 2 * 2 * tokens * 2 * 32 * 2
    assert 0 <= result["used_kv_bytes"] - result["full_precision_kv_bytes"] < 200  # its tables
    _, _, err = run(*args, "--max-new-tokens", 5)
    exact = {"paper": "0 to 127", "compact": "128 to 255"}[preset]
    used, allocated = size(result["used_kv_bytes"]), size(result["kv_bytes"])
    assert err.startswith(
        f"KV cache of {tokens} tokens: {used} in use, {allocated} allocated ({preset}) instead of "
        f"{size(result['full_precision_kv_bytes'])} (bfloat16): nothing saved yet, because the "
        f"newest {exact} tokens stay in bfloat16; at 32K tokens "
        f"{result['long_context_ratio']:.2f}x smaller (computed)"
    )


def test_full_precision_saves_nothing_and_says_so(run: Run, llama: Path) -> None:
    args = ("generate", "--model", llama, "--prompt", TEXT, "--preset", "full")
    _, _, err = run(*args, "--max-new-tokens", 2)
    assert re.fullmatch(r"KV cache of \d+ tokens: [\d.]+ KiB \(bfloat16\); [\d.]+ tokens/s\n", err)
    assert json.loads(run(*args, "--json", "--max-new-tokens", 2)[1])["long_context_ratio"] == 1


def test_a_prompt_from_standard_input(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(piped: bytes, *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        return run("generate", "--model", llama, *args, "--json", "--max-new-tokens", 3)

    (tmp_path / "prompt").write_text("the quick\nbrown")
    results = [
        json.loads(generate(piped, *args)[1])
        for piped, *args in (
            (b"", "--prompt-file", tmp_path / "prompt"),
            (b"the quick\nbrown", "--prompt", "-"),
            (b"\xef\xbb\xbfthe quick\r\nbrown", "--prompt-file", "-"),
        )
    ]
    for result in results:
        assert (result["text"], result["prompt_tokens"]) == (
            results[0]["text"],
            results[0]["prompt_tokens"],
        )
    assert generate(b"", "--prompt", "-")[2] == "error: the prompt is empty\n"
    assert generate(b"\xff", "--prompt", "-")[2] == "error: standard input is not UTF-8 text\n"


def test_an_instruct_model_answers_in_its_chat_template(
    run: Run, llama: Path, tmp_path: Path
) -> None:
    """As is expected of one; what it was taught to continue is the template's text."""
    shutil.copytree(llama, tmp_path / "instruct")
    (tmp_path / "instruct" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def generate(model: Path, prompt: str, *args: str) -> tuple[dict[str, Any], str]:
        code, out, err = run(
            *("generate", "--model", model, "--prompt", prompt, "--max-new-tokens", 8, "--json"),
            *args,
        )
        assert code == 0
        return json.loads(out), err

    plain, none = generate(llama, "<user>the quick<assistant>")
    assert (plain["chat_template"], none) == (False, "")
    answer, note = generate(tmp_path / "instruct", "the quick")
    assert "--no-chat-template continues the text" in note
    assert answer["chat_template"]
    for field in ("text", "prompt_tokens"):
        assert answer[field] == plain[field]
    asked, none = generate(tmp_path / "instruct", "the quick", "--chat-template")
    assert (asked["text"], none) == (answer["text"], "")
    continued, none = generate(tmp_path / "instruct", "the quick", "--no-chat-template")
    assert (continued["chat_template"], none) == (False, "")
    assert continued["text"] == generate(llama, "the quick")[0]["text"]
    code, _, err = run("generate", "--model", llama, "--prompt", "a", "--chat-template")
    assert (code, err) == (2, "error: --chat-template: this model has none\n")


def test_a_seed_repeats_a_continuation(run: Run, llama: Path) -> None:
    args = ("generate", "--model", llama, "--prompt", "the", "--json", "--max-new-tokens", 20)

    def text(*more: object) -> str:
        return json.loads(run(*args, *more)[1])["text"]

    drawn = ("--temperature", 1, "--seed")
    assert text(*drawn, 1) == text(*drawn, 1) != text(*drawn, 2)
    assert text(*drawn, 1, "--top-k", 1) == text() != text(*drawn, 1)
    assert text(*drawn, 1, "--top-p", 1e-6) == text()


def test_generate_with_pages_in_cpu_memory(run: Run, llama: Path) -> None:
    args = ("generate", "--model", llama, "--prompt", TEXT, "--max-new-tokens", 9)
    resident, offloaded = (
        json.loads(run(*args, *more, "--json")[1]) for more in ((), ("--offload",))
    )
    assert offloaded["text"] == resident["text"]
    assert resident["host_kv_bytes"] == 0
    assert offloaded["kv_bytes"] > offloaded["host_kv_bytes"] > 0
    _, _, err = run(*args, "--offload")
    assert "of it in CPU memory" in err
    code, _, err = run(*args, "--offload", "--preset", "full")
    assert code == 2
    assert "--offload: needs a preset" in err


def test_generate_in_full_precision_is_greedy_search(run: Run, llama: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT, encoding="utf-8")
    _, out, _ = run(
        *("generate", "--model", llama, "--prompt-file", prompt, "--preset", "full"),
        *("--max-new-tokens", 10, "--dtype", "float32", "--json"),
    )
    result = json.loads(out)
    assert (result["dtype"], result["ratio"]) == ("float32", 1.0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    inputs: Any = tokenizer(TEXT, return_tensors="pt")
    ids = model.generate(inputs.input_ids, max_new_tokens=10, do_sample=False)
    assert result["text"] == tokenizer.decode(ids[0, inputs.input_ids.shape[1] :])


def test_generate_samples_with_a_temperature(run: Run, llama: Path) -> None:
    args = ("generate", "--model", llama, "--prompt", "the", "--json", "--max-new-tokens", 20)
    greedy = {json.loads(run(*args)[1])["text"] for _ in range(2)}
    torch.manual_seed(0)
    sampled = {json.loads(run(*args, "--temperature", 1)[1])["text"] for _ in range(2)}
    assert len(greedy) == 1
    assert len(sampled) == 2


def test_generate_says_when_attention_is_the_models_own(run: Run, gpt_neo: Path) -> None:
    args = ("generate", "--model", gpt_neo, "--prompt", TEXT, "--max-new-tokens", 4)
    code, _, err = run(*args)
    assert code == 0
    assert "dequantized states" in err
    assert json.loads(run(*args, "--json")[1])["attends_packed"] is False


# -- info -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [False, True])
def test_info_numbers(run: Run, llama: Path, as_file: bool) -> None:
    code, out, _ = run(
        *("info", "--model", llama / "config.json" if as_file else llama, "--json"),
        *("--context", 5000, "--batch", 3, "--gpu-memory", 2, "--weights", 1),
    )
    assert code == 0
    result = json.loads(out)
    caches = {cache["method"]: cache for cache in result["caches"]}
    assert caches["bf16"]["nbytes"] == 3 * 5000 * 2 * 2 * 2 * 32 * 2
    assert caches["bf16"]["longest_context"] == (1 << 30) // (3 * 2 * 2 * 2 * 32 * 2)
    for preset in ("paper", "compact", "quality", "high"):
        assert caches[preset]["nbytes"] == 3 * _packed_bytes(preset, 5000)
    assert result["max_context"] == 1024


def test_info_table_and_picture(run: Run, llama: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    code, out, err = run(
        *("info", "--model", llama, "--preset", "high", "--plot", picture, "--gpu-memory", 1)
    )
    assert (code, err) == (0, "")
    lines = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert [word for word in lines if word in ("bf16", "fp8", "compact", "high")] == [
        "bf16",
        "fp8",
        "high",
    ]
    assert "longest context" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_narrow_terminal_folds_numbers_and_cuts_none(
    run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    code, out, _ = run("info", "--model", llama, "--gpu-memory", 1000)
    assert code == 0
    assert "\N{HORIZONTAL ELLIPSIS}" not in out


def test_a_picture_that_cannot_be_finished_leaves_the_earlier_one(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "plan.svg"
    picture.write_text("earlier")

    def full(figure: Figure, path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    code, _, err = run("info", "--model", llama, "--plot", picture)
    assert (code, err) == (2, f"error: cannot write '{picture}': No space left on device\n")
    assert picture.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.svg"]


# -- mistakes ---------------------------------------------------------------------------------

GENERATE = ("generate", "--model", "{llama}")
INFO = ("info", "--model", "{llama}")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "Missing command"),
        (("frobnicate",), "frobnicate"),
        (("info",), "--model"),
        (("info", "--model", "{tmp}/nothing"), "nothing"),
        (("info", "--model", "no/such-model"), "no/such-model"),
        (("info", "--model", "{tmp}"), "config.json"),
        (("info", "--model", "{tmp}/odd-heads"), "head_dim=12"),
        ((*INFO, "--preset", "tiny"), "tiny"),
        ((*INFO, "--context", "0"), "--context"),
        ((*INFO, "--context", "many"), "--context"),
        ((*INFO, "--batch", "-1"), "--batch"),
        ((*INFO, "--gpu-memory", "8", "--weights", "9"), "--weights"),
        ((*INFO, "--gpu-memory", "nan"), "--gpu-memory"),
        ((*INFO, "--weights", "9"), "--gpu-memory"),
        ((*INFO, "--plot", "{tmp}/no/folder.png"), "cannot write"),
        ((*INFO, "--plot", "{tmp}/plan.xyz"), "xyz"),
        ((*INFO, "--plot", "{tmp}/plan"), "plan.png"),
        ((*INFO, "--plot", "{tmp}"), "names no format"),
        (("info", "--model", "/nonexistent"), "cannot plan '/nonexistent': no such file or folder"),
        (("generate", "--frobnicate"), "oscar-kv generate --help"),
        (GENERATE, "--prompt-file"),
        ((*GENERATE, "--prompt", "a", "--prompt-file", "{tmp}/latin1.txt"), "one of"),
        ((*GENERATE, "--prompt", ""), "empty"),
        ((*GENERATE, "--prompt-file", "{tmp}/nothing.txt"), "cannot read"),
        ((*GENERATE, "--prompt-file", "{tmp}/latin1.txt"), "UTF-8"),
        ((*GENERATE, "--prompt", "a", "--preset", "tiny"), "tiny"),
        ((*GENERATE, "--prompt", "a", "--dtype", "int8"), "int8"),
        ((*GENERATE, "--prompt", "a", "--device", "toaster"), "toaster"),
        ((*GENERATE, "--prompt", "a", "--temperature", "-1"), "--temperature"),
        ((*GENERATE, "--prompt", "a", "--temperature", "nan"), "temperature"),
        ((*GENERATE, "--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens"),
        ((*GENERATE, "--prompt", "a", "--top-p", "0.9"), "set a temperature"),
        ((*GENERATE, "--prompt", "a", "--temperature", "1", "--top-p", "2"), "--top-p"),
        ((*GENERATE, "--prompt", "a", "--temperature", "1", "--top-k", "0"), "--top-k"),
        ((*GENERATE, "--prompt", "a", "--max-new-tokens", "1024"), "context of 1024"),
        (("generate", "--model", "{tmp}/nothing", "--prompt", "a"), "cannot load"),
        (("generate", "--model", "{tmp}/config-only", "--prompt", "a"), "cannot load"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_end_in_one_line(
    run: Run, llama: Path, tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    for name, head_dim in (("odd-heads", 12), ("config-only", 32)):
        LlamaConfig(head_dim=head_dim).save_pretrained(tmp_path / name)
    code, out, err = run(*(arg.format(llama=llama, tmp=tmp_path) for arg in args))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_missing_matplotlib(run: Run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("info", "--model", llama, "--plot", "plan.png")
    assert code == 2
    assert err == "error: --plot needs matplotlib: pip install 'oscar-kv[plot]'\n"


# -- demo -------------------------------------------------------------------------------------


needs_bundled_model = pytest.mark.skipif(
    not (MODEL / "model.safetensors").exists(), reason="no bundled model"
)


@needs_bundled_model
def test_demo_on_few_windows() -> None:
    run = Demo(text_windows=1, recall_windows=1)
    made = run.generate(new_tokens=8)
    steps = []
    result = run.evaluate(made, progress=steps.append)
    assert sum(steps) == run.evaluation_steps
    full, paper, compact = result.caches
    # 8 KiB a token in bfloat16; the last token is generated but never cached
    assert full.nbytes == 8192 * (result.prompt_tokens + 7)
    assert full.ratio == full.recall == full.agreement == 1
    assert paper.page_bits_per_element == OscarConfig.paper().bits_per_element(128, 2)
    for cache in (paper, compact):
        assert cache.ratio == pytest.approx(full.nbytes / cache.nbytes)
        assert 3 < cache.ratio < cache.long_context_ratio
        assert 0.99 < cache.perplexity / full.perplexity < 1.15
        assert 0.85 < cache.agreement < 1
        assert cache.text.startswith(" 18346")
    assert result.scored_tokens == 1023
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(continuations(made, result.dtype), demo_table(result))
    shown = console.export_text()
    assert f"{compact.ratio:.2f}x" in shown
    assert shown.count("18346") == continuations_plain(made, result.dtype).count("18346") == 3


@needs_bundled_model
def test_demo_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    few = functools.partial(Demo, text_windows=1, recall_windows=1)
    monkeypatch.setattr("oscar_kv.demo.Demo", few)
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    assert out.index("prompt:") < out.index("--- compact") < out.index("held-out perplexity")
    assert "1,023 tokens of 1 held-out windows" in " ".join(out.split())
    code, out, err = run("demo", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert [cache["name"] for cache in result["caches"]] == ["full", "paper", "compact"]
    assert fields(result) == documented("demo")
