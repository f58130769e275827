"""Real processes, killed with SIGKILL at odd moments and resumed: the records and weights are those of a run never killed."""
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from superhf.models import load_tokenizer
from superhf.runs import read_lines
from superhf.training import TIMES

ROOT = Path(__file__).resolve().parents[1]
SUPERBATCHES = 40

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A tiny random policy with the demo's tokenizer."
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer("demo")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder/"myreward.py").write_text("def vowels(prompts, completions): return [sum(c in 'aeiou' for c in t)/(1 + len(t)) for t in completions]\n")
    return folder

def command(model, *options):
    "The command line of a short run."
    return [sys.executable, "-c", "import sys; from superhf.cli import main; sys.exit(main())", "train", *map(str, options)]

def options(model, run):
    "Options of the run: float32 on CPU, a checkpoint every three superbatches."
    return ["--model", model, "--reward-model", "myreward:vowels", "--output-dir", run, "--superbatches", SUPERBATCHES, "--superbatch-size", 4, "--max-new-tokens", 12, "--holdout", 4,
            "--learning-rate", 1e-2, "--sampling-dtype", "policy", "--mixed-precision", "no", "--checkpoint-every", 3, "--device", "cpu"]

def environment(model):
    "The project and the reward function can be imported."
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(model)]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

def finished(run):
    "What must be equal: metrics without times, samples, weights, held-out samples."
    metrics = [{k: v for k, v in r.items() if k not in TIMES} for r in read_lines(run/"metrics.jsonl")]
    return metrics, (run/"samples.jsonl").read_bytes(), (run/"model"/"model.safetensors").read_bytes(), (run/"held_out_after.jsonl").read_bytes()

def wait_for(process, run, lines):
    "Wait until the run has written so many metrics."
    while process.poll() is None and len(read_lines(run/"metrics.jsonl")) < lines: time.sleep(0.005)

def test_killed_and_resumed_runs_are_equal(model, tmp_path):
    whole, torn = tmp_path/"whole", tmp_path/"torn"
    subprocess.run(command(model, *options(model, whole)), env=environment(model), check=True, capture_output=True)
    luck, kills = random.Random(0), 0
    start = options(model, torn)
    for lines in (5, 16, 30):
        process = subprocess.Popen(command(model, *start), env=environment(model), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(process, torn, lines)
        time.sleep(luck.uniform(0, 0.2))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        start = ["--resume", torn]
    assert kills == 3
    subprocess.run(command(model, *start), env=environment(model), check=True, capture_output=True)
    for ours, theirs in zip(finished(torn), finished(whole)): assert ours == theirs

def test_other_options_are_refused(model, tmp_path):
    run = tmp_path/"run"
    subprocess.run(command(model, *options(model, run), "--superbatches", 1), env=environment(model), check=True, capture_output=True)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    done = subprocess.run(command(model, "--resume", run, "--learning-rate", "5e-3"), env=environment(model), capture_output=True, text=True)
    assert done.returncode == 2 and "learning_rate" in done.stderr and done.stderr.count("\n") == 1
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

@pytest.mark.parametrize("wrong, part", [(["--model", "no/such/folder"], "no/such/folder"), (["--prompts", "missing.jsonl"], "missing.jsonl"), (["--superbatches", "-3"], "at least 1"), (["--superbatchs", "3"], "superbatches")])
def test_wrong_input_is_one_line_and_writes_nothing(wrong, part, tmp_path):
    done = subprocess.run([sys.executable, "-c", "import sys; from superhf.cli import main; sys.exit(main())", "train", "--output-dir", str(tmp_path/"run"), *wrong], env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
