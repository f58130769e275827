"""Real processes, killed with SIGKILL at odd moments and resumed: the records and weights are those of a run never killed.

Starting Python with its libraries takes most of the time of a short run. So one process imports them and makes the models, and forks the
ones that are killed; the runs that need the command line go through it.
"""
import json, os, random, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest
import torch
import tqdm.auto
from transformers import AutoConfig, AutoModelForCausalLM

from superhf.models import load_tokenizer
from superhf.runs import read_lines
from superhf.training import TIMES

torch.set_num_threads(1)            # before the first fork: a fork has none of its parent's threads
ROOT = Path(__file__).resolve().parents[1]
SUPERBATCHES, KILLS = 48, 20

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

def options(model, run, *more):
    "Options of the run: float32 on CPU, a checkpoint every two superbatches, an evaluation every four."
    return [*map(str, ["--model", model, "--reward-model", "myreward:vowels", "--output-dir", run, "--superbatches", SUPERBATCHES, "--superbatch-size", 4, "--max-new-tokens", 8, "--holdout", 4,
            "--learning-rate", 1e-2, "--sampling-dtype", "policy", "--checkpoint-every", 2, "--evaluate-every", 4, "--put-back", "true", "--superbatch-prompts", 2, "--device", "cpu", *more])]

def environment(model):
    "The project and the reward function can be imported."
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(model)]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

def superhf(model, *argv, **how):
    "The command line in a process of its own."
    return subprocess.run([sys.executable, "-m", "superhf.cli", *map(str, argv)], env=environment(model) | how.pop("env", {}), capture_output=True, text=True, **how)

def fork(model, *argv, said=os.devnull, **env) -> int:
    "The command line in a fork of this process, its errors written to the file `said`; gives its id."
    child = os.fork()
    if child: return child
    try:
        os.setsid()
        os.environ.update(env)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1): os.dup2(null, stream)
        speak(os.open(said, os.O_WRONLY | os.O_CREAT))
        for bar in (tqdm.std.tqdm, tqdm.auto.tqdm): bar.set_lock(threading.RLock())   # forks share tqdm's own, and one that is killed while it holds it never gives it back
        sys.path.insert(0, str(model))
        from superhf.cli import main
        os._exit(main(list(map(str, argv))))
    except BaseException:
        import traceback
        (Path(model)/"traceback.txt").write_text(traceback.format_exc())
        os._exit(99)

def speak(fd:int):
    "Let this fork's standard error be a file of its own."
    os.dup2(fd, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)

def ended(child) -> int:
    "Wait for a fork; minus the signal that ended it, or its exit code."
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def finished(run):
    "What must be equal: metrics without times, samples, evaluations, weights, held-out samples."
    metrics = [{k: v for k, v in r.items() if k not in TIMES} for r in read_lines(run/"metrics.jsonl")]
    return metrics, *((run/name).read_bytes() for name in ("samples.jsonl", "evaluations.jsonl", "model/model.safetensors", "held_out_before.jsonl", "held_out_after.jsonl"))

def bytes_written(run) -> int:
    "Size of all records and of the checkpoint being written: grows with every superbatch, line and file."
    return sum(p.stat().st_size for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl") for p in run.glob(name))

@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    "A run that nobody disturbs."
    run = tmp_path_factory.mktemp("runs")/"whole"
    assert ended(fork(model, "train", *options(model, run))) == 0
    return run

def test_killed_and_resumed_runs_are_equal(model, whole, tmp_path):
    "Kills at random moments: a fraction of a superbatch after the run has moved on, or while a checkpoint is being written."
    torn, luck, kills, while_saving = tmp_path/"torn", random.Random(0), 0, 0
    start, seconds = options(model, torn), sum(r["time/total"] for r in read_lines(whole/"metrics.jsonl"))/SUPERBATCHES
    while True:
        before, child = bytes_written(torn), fork(model, "train", *start)
        if kills >= KILLS: break
        saving = kills % 3 == 2
        while bytes_written(torn) <= before: time.sleep(0.001)
        until = time.time() + luck.uniform(0, 2)*seconds
        while time.time() < until or saving and time.time() < until + 1 and not list(torn.glob("checkpoints/.step-*")): time.sleep(0.0005)
        while_saving += bool(list(torn.glob("checkpoints/.step-*")))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL, "the run ended before it was killed"
        kills += 1
        start = ["--resume", torn] if (torn/"config.yaml").exists() else start
        if kills == 5: torn_files(torn)
    assert ended(child) == 0
    assert while_saving
    for ours, theirs in zip(finished(torn), finished(whole)): assert ours == theirs

def test_adapters_killed_before_any_checkpoint(model, tmp_path):
    "A run with LoRA adapters that was killed at its first superbatch begins again with the same adapters; and one that has ended is left as it is."
    short = lambda run: ["train", *options(model, run), "--superbatches", "6", "--checkpoint-every", "0", "--lora-rank", "2"]
    whole, torn = tmp_path/"whole", tmp_path/"torn"
    assert ended(fork(model, *short(whole))) == 0
    child = fork(model, *short(torn))
    while not read_lines(torn/"metrics.jsonl"): time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    for _ in range(2): assert ended(fork(model, "train", "--resume", torn)) == 0
    for ours, theirs in zip(finished(torn), finished(whole)): assert ours == theirs

def torn_files(run):
    "What a crash of the machine leaves: half a line, and a checkpoint whose file is cut short."
    with open(run/"metrics.jsonl", "ab") as f: f.write(b'{"step": 99, "rew')
    checkpoints = sorted(run.glob("checkpoints/step-*"))
    if len(checkpoints) > 1: os.truncate(checkpoints[-1]/"model.safetensors", 100)

def test_asked_to_end(model, whole, tmp_path):
    "SIGTERM finishes the superbatch and writes a checkpoint; the run goes on from there."
    run = tmp_path/"run"
    child = fork(model, "train", *options(model, run))
    while len(read_lines(run/"metrics.jsonl")) < 5: time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert ended(child) == 130
    done = len(read_lines(run/"metrics.jsonl"))
    assert done < SUPERBATCHES and (run/f"checkpoints/step-{done:06d}").is_dir()
    assert ended(fork(model, "train", "--resume", run)) == 0
    for ours, theirs in zip(finished(run), finished(whole)): assert ours == theirs

@pytest.mark.parametrize("function, call", [("append_lines", 13), ("save_checkpoint", 3)])
def test_full_disk(function, call, model, whole, tmp_path):
    "From some line or checkpoint on files may not grow: one line says so, and with room the run goes on as if nothing had been."
    import resource
    from superhf import runs
    run, write, calls = tmp_path/"run", getattr(runs, function), []
    def limited(place, *rest):
        calls.append(place)
        if len(calls) == call:
            size = place.stat().st_size + 20 if function == "append_lines" else 10_000
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return write(place, *rest)
    setattr(runs, function, limited)
    try: child = fork(model, "train", *options(model, run), said=tmp_path/"said")
    finally: setattr(runs, function, write)
    assert ended(child) == 2
    said = (tmp_path/"said").read_text().replace("\r", "\n").splitlines()[-1]
    assert "cannot write to" in said and "File too large" in said and f"--resume {run}" in said
    assert all(line.endswith(b"}\n") for name in ("metrics.jsonl", "samples.jsonl") for line in open(run/name, "rb"))
    assert not list(run.glob("checkpoints/.step-*")) and all(map(runs.is_whole, run.glob("checkpoints/step-*")))
    assert ended(fork(model, "train", "--resume", run)) == 0
    for ours, theirs in zip(finished(run), finished(whole)): assert ours == theirs

def test_other_options_are_refused(model, tmp_path):
    run = tmp_path/"run"
    assert ended(fork(model, "train", *options(model, run, "--superbatches", 1))) == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    done = superhf(model, "train", "--resume", run, "--learning-rate", "5e-3")
    assert done.returncode == 2 and "learning_rate" in done.stderr and done.stderr.count("\n") == 1
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

@pytest.mark.parametrize("wrong, part", [(["--model", "no/such/folder"], "no/such/folder"), (["--prompts", "missing.jsonl"], "missing.jsonl"), (["--superbatches", "-3"], "at least 1"), (["--superbatchs", "3"], "superbatches"),
                                         (["--preset", "demoo"], "--preset must be one of paper, demo, got 'demoo'"), (["--track", "tensorbord"], "tensorbord"), (["--push-to-hub", "me/mine"], "HF_HUB_OFFLINE")])
def test_wrong_input_is_one_line_and_writes_nothing(wrong, part, model, tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.chdir(tmp_path)
        speak(write)
        from superhf.cli import main
        os._exit(main(["train", "--output-dir", str(tmp_path/"run"), *wrong]))
    os.close(write)
    with open(read) as f: said = f.read()
    assert ended(child) == 2 and part in said and said.count("\n") == 1, said
    assert not list(tmp_path.iterdir())

def test_ppo_killed_and_resumed(model, tmp_path):
    "The baseline lives in the same run folder: killed at random moments, it ends with the same bytes, value head and KL coefficient included."
    def argv(run): return ["--model", model, "--reward-model", "myreward:vowels", "--output-dir", run, "--preset", "repaired", "--superbatches", 10, "--superbatch-size", 4, "--superbatch-prompts", 2, "--minibatch-size", 2,
                           "--max-new-tokens", 6, "--holdout", 4, "--evaluate-every", 5, "--learning-rate", 1e-3, "--sampling-dtype", "policy", "--checkpoint-every", 2, "--device", "cpu", "--warmup-superbatches", 2]
    whole, torn, luck = tmp_path/"whole", tmp_path/"torn", random.Random(1)
    assert ended(fork(model, "ppo", *argv(whole))) == 0
    start = argv(torn)
    for kill in range(5):
        before, child = bytes_written(torn), fork(model, "ppo", *start)
        while bytes_written(torn) <= before: time.sleep(0.001)
        time.sleep(luck.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        start = ["--resume", torn]
    assert ended(fork(model, "ppo", *start)) == 0
    for ours, theirs in zip(finished(torn), finished(whole)): assert ours == theirs
