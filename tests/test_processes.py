"""Several real processes, joined by gloo, give the run of one process; one that dies does not leave the others waiting."""
import os, signal, socket, time

import pytest
import torch
from safetensors.torch import load_file

from superhf.runs import read_lines
from superhf.training import TIMES
from test_resume import ended, fork, model, options

def together(model, size, *argv, **env) -> list[int]:
    "The command line in `size` forks that know of each other; their ids."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    children = []
    for rank in range(size):
        os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **env)
        children.append(fork(model, *argv))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *env): os.environ.pop(name, None)
    return children

def short(model, run, *more): return options(model, run, "--superbatches", 4, *more)

@pytest.mark.parametrize("size, more", [(2, ["--top-k", 1]), (3, ["--top-k", 3, "--superbatch-size", 6])])
def test_several_processes_are_one_run(model, tmp_path, size, more):
    "Same samples and selection; weights and loss to 1e-5, for gradients are added in another order."
    one, many = tmp_path/"one", tmp_path/"many"
    assert ended(fork(model, "train", *short(model, one, *more))) == 0
    assert [ended(child) for child in together(model, size, "train", *short(model, many, *more))] == [0]*size
    assert (one/"samples.jsonl").read_bytes() == (many/"samples.jsonl").read_bytes()
    for ours, theirs in zip(read_lines(many/"metrics.jsonl"), read_lines(one/"metrics.jsonl"), strict=True):
        for key in ours.keys() - set(TIMES): assert ours[key] == (pytest.approx(theirs[key], rel=1e-4, abs=1e-5) if isinstance(ours[key], float) else theirs[key]), key
    a, b = load_file(one/"model/model.safetensors"), load_file(many/"model/model.safetensors")
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in many.iterdir())

def test_resume_with_another_number_of_processes(model, tmp_path):
    "A run of two processes, ended by SIGTERM to one of them, goes on with one."
    run, whole = tmp_path/"run", tmp_path/"whole"
    children = together(model, 2, "train", *options(model, run))
    while len(read_lines(run/"metrics.jsonl")) < 3: time.sleep(0.01)
    os.kill(children[1], signal.SIGTERM)
    assert [ended(child) for child in children] == [130, 130]
    assert ended(fork(model, "train", "--resume", run)) == 0
    assert ended(fork(model, "train", *options(model, whole))) == 0
    assert (run/"samples.jsonl").read_bytes() == (whole/"samples.jsonl").read_bytes()

def test_a_death_ends_the_others(model, tmp_path):
    run, started = tmp_path/"run", time.time()
    children = together(model, 2, "train", *options(model, run), SUPERHF_TIMEOUT="20")
    while len(read_lines(run/"metrics.jsonl")) < 2: time.sleep(0.01)
    os.kill(children[1], signal.SIGKILL)
    assert ended(children[1]) == -signal.SIGKILL and ended(children[0]) not in (0, -signal.SIGKILL)
    assert time.time() - started < 60
