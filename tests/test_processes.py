"""Several real processes that train together over gloo: the run of one process, whatever the shares; and no waiting for ever.

What is sampled is the same to the byte. Gradients are added up in another order, so weights agree within `TOLERANCE`, which is
3 % of what the first step moves a weight (Adam moves each by about the learning rate, 1e-2 here).
"""
import os, signal, socket, subprocess, sys, time

import pytest
from safetensors.torch import load_file

from superhf.models import package_file
from superhf.runs import read_lines
from superhf.training import TIMES
from test_resume import ended, environment, fork, model

TOLERANCE = 3e-4
LAUNCH = package_file("superhf", "assets/launch")

def options(model, run, size=5, top_k=3, superbatches=10):
    "A superbatch that two processes cannot share equally: 3 and 2 completions, 2 and 1 rows to fine-tune."
    return [*map(str, ["--model", model, "--reward-model", "myreward:vowels", "--output-dir", run, "--superbatches", superbatches, "--superbatch-size", size, "--top-k", top_k, "--max-new-tokens", 8,
            "--holdout", 3, "--learning-rate", 1e-2, "--warmup-superbatches", 0, "--sampling-dtype", "policy", "--checkpoint-every", 2, "--evaluate-every", 2, "--device", "cpu"])]

def together(model, argvs, said=None, **env) -> list[int]:
    "Forks that know of each other; their ids."
    at = str(port())
    return [fork(model, *argv, said=f"{said}{r}" if said else os.devnull, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(len(argvs)), MASTER_ADDR="127.0.0.1", MASTER_PORT=at, **env)
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

def launched(model, config, *more, argv, **env) -> subprocess.Popen:
    "accelerate's own launcher with one of the project's config files, two processes, no GPU in sight."
    return subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH/config), "--num_processes", "2", *map(str, more), "-m", "superhf.cli", *argv],
                            env=environment(model) | dict(CUDA_VISIBLE_DEVICES="") | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def port() -> int:
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

@pytest.mark.parametrize("config", ["gpus.yaml", "fsdp.yaml"])
def test_accelerate_launch(config, model, whole, tmp_path):
    "Two processes, each with a whole policy, or each with half of it: the run of one process. Without a GPU they meet over gloo."
    run = tmp_path/"run"
    done = launched(model, config, "--main_process_port", 0, argv=["train", *options(model, run)])
    said = done.communicate(timeout=180)[0]
    assert done.returncode == 0, said[-3000:]
    same_run(run, whole)

def test_two_machines(model, whole, tmp_path):
    "Two launchers that know of each other by address, one process each."
    run, at = tmp_path/"run", port()
    machines = [launched(model, "machines.yaml", "--main_process_ip", "127.0.0.1", "--main_process_port", at, "--machine_rank", rank, argv=["train", *options(model, run)]) for rank in (0, 1)]
    said = [m.communicate(timeout=180)[0] for m in machines]
    assert [m.returncode for m in machines] == [0, 0], said[0][-3000:]
    same_run(run, whole)

def test_what_shards_cannot_do(model, tmp_path):
    "PPO and adapters are refused in one line."
    for argv, why in ((["ppo", "--model", str(model), "--reward-model", "myreward:vowels", "--output-dir", str(tmp_path/"ppo"), "--device", "cpu"], "PPO does not train a policy in shards"),
                      (["train", *options(model, tmp_path/"lora"), "--lora-rank", "2"], "set lora_rank to 0")):
        assert [ended(p) for p in together(model, [argv]*2, said=tmp_path/"said", **ZERO)] == [2, 2]
        assert why in (tmp_path/"said0").read_text().splitlines()[-1]

def test_adapters_start_the_same(model, tmp_path):
    "The random start of LoRA adapters is the same in every process."
    one, two, lora = tmp_path/"one", tmp_path/"two", ["--lora-rank", "2"]
    assert ended(fork(model, "train", *options(model, one, 4, 2, 3), *lora)) == 0
    assert [ended(p) for p in together(model, [["train", *options(model, two, 4, 2, 3), *lora]]*2)] == [0, 0]
    same_run(two, one)

@pytest.mark.parametrize("processes, size, top_k", [(2, 1, 1), (3, 4, 2)])
def test_nothing_to_do_and_nothing_written(processes, size, top_k, model, tmp_path):
    "One process has no completion to sample, or no row to train; and what others than the first would write, they would write elsewhere."
    one, many, elsewhere = tmp_path/"one", tmp_path/"many", tmp_path/"elsewhere"
    assert ended(fork(model, "train", *options(model, one, size, top_k, 3))) == 0
    assert [ended(p) for p in together(model, [["train", *options(model, run, size, top_k, 3)] for run in [many] + [elsewhere]*(processes - 1)])] == [0]*processes
    same_run(many, one)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in many.iterdir()) and not elsewhere.exists()

ZERO = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="2")

@pytest.mark.parametrize("env", [{}, ZERO], ids=["whole", "in shards"])
def test_killed_together_and_resumed(env, model, whole, tmp_path):
    "Both are killed, both go on; then one of them is asked to end, both end with a checkpoint, and one alone goes on, with the whole policy. In shards as DeepSpeed's launcher asks for them."
    run = tmp_path/"run"
    pair = together(model, [["train", *options(model, run)]]*2, **env)
    wait_for(run, 3)
    for p in pair: os.kill(p, signal.SIGKILL)
    assert [ended(p) for p in pair] == [-9, -9] and len(read_lines(run/"metrics.jsonl")) < 10
    pair = together(model, [["train", "--resume", str(run)]]*2, **env)
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
