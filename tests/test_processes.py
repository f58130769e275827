"""Several real processes that train together over gloo: the run of one process, whatever the shares; and no waiting for ever.

What is sampled is the same to the byte. Gradients are added up in another order, so weights agree within `TOLERANCE`, which is
3 % of what the first step moves a weight (Adam moves each by about the learning rate, 1e-2 here).
"""
import os, signal, socket, subprocess, sys, time

import pytest
from safetensors.torch import load_file

from superhf.runs import read_lines
from superhf.training import TIMES
from test_resume import ended, environment, fork, model

TOLERANCE = 3e-4

def options(model, run, size=5, top_k=3, superbatches=10):
    "A superbatch that two processes cannot share equally: 3 and 2 completions, 2 and 1 rows to fine-tune."
    return [*map(str, ["--model", model, "--reward-model", "myreward:vowels", "--output-dir", run, "--superbatches", superbatches, "--superbatch-size", size, "--top-k", top_k, "--max-new-tokens", 8,
            "--holdout", 3, "--learning-rate", 1e-2, "--warmup-superbatches", 0, "--sampling-dtype", "policy", "--checkpoint-every", 2, "--evaluate-every", 2, "--device", "cpu"])]

def together(model, argvs, said=None, **env) -> list[int]:
    "Forks that know of each other; their ids."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [fork(model, *argv, said=f"{said}{r}" if said else os.devnull, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(len(argvs)), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **env)
            for r, argv in enumerate(argvs)]

def same_run(ours, theirs):
    "Samples to the byte, numbers and weights within the tolerance."
    for name in ("samples.jsonl", "held_out_before.jsonl"): assert (ours/name).read_bytes() == (theirs/name).read_bytes()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        a, b = read_lines(ours/name), read_lines(theirs/name)
        assert [set(r) for r in a] == [set(r) for r in b] and a
        for x, y in zip(a, b):
            for k in x: assert k in TIMES or x[k] == (pytest.approx(y[k], rel=1e-3, abs=1e-4) if isinstance(y[k], float) else y[k]), k
    a, b = (load_file(run/"model"/"model.safetensors") for run in (ours, theirs))
    for k in a: assert (a[k] - b[k]).abs().max() < TOLERANCE, k

def wait_for(run, lines):
    "Until the run has written so many superbatches."
    until = time.time() + 30
    while len(read_lines(run/"metrics.jsonl")) < lines and time.time() < until: time.sleep(0.005)

@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    "The run of one process."
    run = tmp_path_factory.mktemp("runs")/"whole"
    assert ended(fork(model, "train", *options(model, run))) == 0
    return run

def test_accelerate_launch(model, whole, tmp_path):
    "Two processes by accelerate's own launcher; `--multi_gpu` is its name for it, without a GPU it is gloo."
    run = tmp_path/"run"
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
                           "-m", "superhf.cli", "train", *options(model, run)], env=environment(model), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    same_run(run, whole)

@pytest.mark.parametrize("processes, size, top_k", [(2, 1, 1), (3, 4, 2)])
def test_nothing_to_do_and_nothing_written(processes, size, top_k, model, tmp_path):
    "One process has no completion to sample, or no row to train; and what others than the first would write, they would write elsewhere."
    one, many, elsewhere = tmp_path/"one", tmp_path/"many", tmp_path/"elsewhere"
    assert ended(fork(model, "train", *options(model, one, size, top_k, 3))) == 0
    assert [ended(p) for p in together(model, [["train", *options(model, run, size, top_k, 3)] for run in [many] + [elsewhere]*(processes - 1)])] == [0]*processes
    same_run(many, one)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in many.iterdir()) and not elsewhere.exists()

def test_killed_together_and_resumed(model, whole, tmp_path):
    "Both are killed, both go on; then one of them is asked to end, both end with a checkpoint, and one alone goes on."
    run = tmp_path/"run"
    pair = together(model, [["train", *options(model, run)]]*2)
    wait_for(run, 3)
    for p in pair: os.kill(p, signal.SIGKILL)
    assert [ended(p) for p in pair] == [-9, -9] and len(read_lines(run/"metrics.jsonl")) < 10
    pair = together(model, [["train", "--resume", str(run)]]*2)
    wait_for(run, 4)
    os.kill(pair[1], signal.SIGTERM)
    assert [ended(p) for p in pair] == [130, 130]
    assert ended(fork(model, "train", "--resume", run)) == 0
    same_run(run, whole)

@pytest.mark.parametrize("how, patience", [(signal.SIGKILL, 600), (signal.SIGSTOP, 3)])
def test_no_waiting_for_ever(how, patience, model, whole, tmp_path):
    "One process dies, or stops to answer: the other ends with one line, at once or after its patience, and one alone can go on."
    run = tmp_path/"run"
    first, second = together(model, [["train", *options(model, run)]]*2, said=tmp_path/"said", SUPERHF_TIMEOUT=str(patience))
    wait_for(run, 2)
    os.kill(second, how)
    started = time.time()
    assert ended(first) == 2 and time.time() - started < min(patience, 10) + 10
    if how == signal.SIGSTOP: os.kill(second, signal.SIGKILL)
    assert ended(second) == -9
    said = (tmp_path/"said0").read_text().replace("\r", "\n").splitlines()[-1]
    assert said.startswith("superhf: error: process 0 waited in vain") and f"{patience} s" in said
    assert ended(fork(model, "train", "--resume", run)) == 0
    same_run(run, whole)

def test_ppo_together(model, tmp_path):
    "PPO shares sampling and scoring, and every process makes the whole update: the run of one process."
    def argv(run): return ["ppo", "--preset", "repaired", "--model", str(model), "--reward-model", "myreward:vowels", "--output-dir", str(run), "--superbatches", "4", "--superbatch-size", "6", "--superbatch-prompts", "3",
                           "--minibatch-size", "3", "--max-new-tokens", "6", "--holdout", "3", "--learning-rate", "1e-3", "--sampling-dtype", "policy", "--evaluate-every", "2", "--device", "cpu"]
    one, many = tmp_path/"one", tmp_path/"many"
    assert ended(fork(model, *argv(one))) == 0
    assert [ended(p) for p in together(model, [argv(many)]*2)] == [0, 0]
    same_run(many, one)
