"""The command line does what it says, from parsing to exit code, in the way that a person calls it."""

import json
import socket
import subprocess
import sys

import pytest

from bestiary.cli import VERBS, main
from bestiary.ops.native import load

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 200


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def model(tmp_path, text, capsys):
    """A model folder that the train verb made."""
    command = ["train", "gru", "--data", str(text), "--folder", str(tmp_path / "run"), "--d-model", "32"]
    command += ["--batch-size", "2", "--sequence-length", "32", "--train.steps", "4", "--train.log-every", "1"]
    assert main(command) == 0
    capsys.readouterr()
    return tmp_path / "run" / "model"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    help_text = capsys.readouterr().out
    assert stop.value.code == 0 and "Examples:" in help_text and f"  bestiary {verb}" in help_text
    assert "--json" in help_text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["comprae"], "did you mean 'compare'"),
        (["compare", "--minuts", "3"], "--minuts"),
        (["compare", "--minutes", "many"], "--minutes"),
        (["compare", "--minutes", "-1"], "minutes must be positive, not -1.0"),
        (["compare", "--arch", "mamaba"], "did you mean 'mamba'"),
        (["train"], "required"),
        (["train", "mamba*"], "mamba*"),
        (["train", "mamba{expnd=2}"], "did you mean 'expand'"),
        (["train", "mamba", "--train.schedule", "cosin"], "did you mean 'cosine'"),
        (["train", "mamba", "--device", "gpu"], "unknown device 'gpu'"),
        (["generate", "no/such/folder"], "no/such/folder"),
        (["eval", "no/such/folder", "text"], "no/such/folder"),
        (["info", "attention*999999999"], "layers"),
        (["check", "mambo"], "did you mean 'mamba'"),
        (["check", "no_such_module:Mixer"], "no_such_module"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_clear_line_and_exit_code_2(command, message, capsys):
    assert main(command) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("bestiary: ") and message in output.err


def test_no_verb_lists_the_verbs(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in VERBS)


def test_training_leaves_a_model_that_generates_and_is_scored(model, text, tmp_path, capsys):
    answer, scores = tmp_path / "answer.json", tmp_path / "scores.json"
    assert main(["generate", str(model), "--prompt", "The ", "--max-new-tokens", "8", "--json", str(answer)]) == 0
    found = json.loads(answer.read_text())
    printed = capsys.readouterr().out
    assert printed.startswith("The ") and len(found["tokens"]) <= 8
    assert printed.strip() == ("The " + found["text"]).strip()
    assert main(["eval", str(model), str(text), "--json", str(scores)]) == 0
    assert 0 < json.loads(scores.read_text())["bits_per_byte"] < 10
    assert main(["info", str(model)]) == 0
    assert "gru" in capsys.readouterr().out


@pytest.mark.skipif(load()[0] is None, reason=f"no compiled kernels: {load()[1]}")
def test_packed_weights_generate_and_eval_tells_what_they_cost(model, text, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    assert main(["generate", str(model), "--prompt", "The ", "--max-new-tokens", "8", "--weights", "int8"]) == 0
    assert capsys.readouterr().out.startswith("The ")
    assert main(["eval", str(model), str(text), "--weights", "fp32", "int4", "--json", str(scores)]) == 0
    found = json.loads(scores.read_text())
    exact, rounded = found["packed"]["fp32"], found["packed"]["int4"]
    assert (
        abs(exact["bits_per_byte"] - found["bits_per_byte"])
        < 1e-4
        < abs(rounded["bits_per_byte"] - found["bits_per_byte"])
    )
    assert rounded["weight_bytes"] < 0.5 * exact["weight_bytes"]
    assert "int4 weights" in capsys.readouterr().out
    assert main(["eval", str(model), str(text), "--weights", "int3"]) == 2
    assert "unknown format of packed weights 'int3'" in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_trained_over(model, text, capsys):
    run = str(model.parent)
    before = (model / "model.safetensors").read_bytes()
    assert main(["train", "gru", "--data", str(text), "--folder", run, "--d-model", "32"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (model / "model.safetensors").read_bytes() == before


def test_torchrun_trains_one_model_in_several_processes(tmp_path, text):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command += [
        "-m",
        "bestiary",
        "train",
        "gru",
        "--data",
        str(text),
        "--folder",
        str(tmp_path / "run"),
        "--d-model",
        "32",
    ]
    command += ["--batch-size", "2", "--sequence-length", "32", "--train.steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr and done.stderr.count("held-out text") == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_bad_byte_is_reported_with_its_file_and_offset(tmp_path, capsys):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good " * 10 + b"\xff" + b" more" * 1000)
    assert main(["train", "gru", "--data", str(path), "--folder", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "bad.txt" in message and "50" in message


def test_info_counts_a_layout_and_lists_the_mixers(tmp_path, capsys):
    path = tmp_path / "info.json"
    assert main(["info", "(mamba*3 attention)*1", "--d-model", "64", "--json", str(path)]) == 0
    assert "total" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["parts"]) == 6
    assert main(["info"]) == 0
    assert "rwkv4" in capsys.readouterr().out


def test_check_prints_the_laws_and_fails_on_a_broken_mixer(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom bestiary.mixers.lstm import LSTM\n"
        "class Leaky(LSTM):\n    '''Looks ahead.'''\n"
        "    def forward(self, x, state=None, **keywords):\n"
        "        y, state = super().forward(x, state, **keywords)\n"
        "        return y + x.sum(1, keepdim=True), state\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "laws.json"
    assert main(["check", "gru", "--examples", "2", "--json", str(path)]) == 0
    assert all(verdict["holds"] for verdict in json.loads(path.read_text()))
    assert main(["check", "mine:Leaky", "--examples", "2"]) == 1
    assert "breaks" in capsys.readouterr().out


def test_doctor_tells_what_runs_and_why(tmp_path, capsys):
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["ops"]["attention"] == {"form": "torch", "why": "plain PyTorch, any device"}
    assert found["ops"]["selective_scan"]["form"] == ("native" if load()[0] is not None else "torch")
    assert found["versions"]["torch"] in capsys.readouterr().out
